"""Our processes as a released version ran them, as far as schemas go: ``python -m tests.integration.released RELEASE infra.worker [arguments]``.

Every codec of the process has the texts of that release: it writes with them and reads what newer writers send through the registry.
"""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path

from infra.clickhouse.schema import TABLES, Table
from infra.registry_client import RegistryClient
from infra.schema_evolution import released
from schemas.codec import FrameCodec, RowCodec, schema_text
from schemas.topics import SCHEMA_NAMES, subject, topic

RESOURCES = Path(__file__).resolve().parents[1] / "resources" / "released"


class ReleasedRegistry(RegistryClient):
    """A registry client that knows the schemas of one release; a schema that release did not have is today's."""

    release = ""

    def register(self, schema_name: str) -> int:
        """Id of the release's text."""
        if schema_name not in self._ids:
            answer = self._request("POST", f"/subjects/{subject(schema_name, self._prefix)}/versions", {"schema": self.text(schema_name)})
            self._ids[schema_name] = int(answer["id"])
        return self._ids[schema_name]

    def register_all(self) -> dict[str, int]:
        """What a stack of that release registers when it is made."""
        return {name: self.register(name) for name in dict.fromkeys(SCHEMA_NAMES) if name in released()[self.release]}

    def frame_codec(self, topic_name: str) -> FrameCodec:
        """A codec with the release's text."""
        name = topic(topic_name).schema
        return FrameCodec(name, self.register(name), self.text(name))

    def row_codec(self, topic_name: str) -> RowCodec:
        """A codec with the release's text."""
        name = topic(topic_name).schema
        return RowCodec(name, self.register(name), self.text(name))

    def text(self, schema_name: str) -> str:
        """The ``.avsc`` of that release."""
        return released()[self.release].get(schema_name) or schema_text(schema_name)


def of(release: str) -> type[ReleasedRegistry]:
    """The client of a release."""
    return type("Registry", (ReleasedRegistry,), {"release": release})


def statements(release: str, database: str) -> list[str]:
    """The release's own DDL."""
    text = (RESOURCES / release / "clickhouse.sql").read_text("utf-8").replace("{database}", database)
    return [statement for part in text.split(";") if (statement := part.strip())]


def tables_of(release: str) -> dict[str, Table]:
    """The tables with the columns they had then."""
    found = {}
    for statement in statements(release, "then"):
        created = re.match(r"CREATE TABLE IF NOT EXISTS `then`\.`(\w+)`", statement)
        if created is not None:
            columns = set(re.findall(r"^    `(\w+)`", statement, re.MULTILINE))
            table = TABLES[created[1]]
            found[created[1]] = replace(table, columns=tuple(column for column in table.columns if column[0] in columns), fills={})
    return found


def main() -> int:
    """Run a module's ``main`` with the client and the tables of a release; its exit code."""
    release, name, *arguments = sys.argv[1:]
    earlier = tables_of(release)
    TABLES.clear()
    TABLES.update(earlier)
    module = importlib.import_module(name)
    module.RegistryClient = of(release)  # type: ignore[attr-defined]
    sys.argv = [name, *arguments]
    return int(module.main())


if __name__ == "__main__":
    sys.exit(main())
