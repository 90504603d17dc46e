"""Our processes as a released version ran them, as far as schemas go: ``python -m tests.integration.released RELEASE infra.worker [arguments]``.

Every codec of the process has the texts of that release: it writes with them and reads what newer writers send through the registry.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace

from infra.clickhouse.schema import TABLES, Table
from infra.registry_client import RegistryClient
from infra.schema_evolution import released
from schemas.codec import FrameCodec, RowCodec, schema_text
from schemas.topics import SCHEMA_NAMES, TOPICS, subject, topic


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


def tables_of(release: str) -> dict[str, Table]:
    """The tables as that release declared them: without what came later."""
    found = {}
    for name, table in TABLES.items():
        text = released()[release].get(TOPICS[name].schema)
        if text is None:
            continue
        added = {field["name"] for field in json.loads(schema_text(TOPICS[name].schema))["fields"]}
        added -= {field["name"] for field in json.loads(text)["fields"]}
        if release == "0.1.0":
            added.add("known_at_us")
        found[name] = replace(table, columns=tuple(column for column in table.columns if column[0] not in added), fills={})
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
