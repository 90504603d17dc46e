"""Whether today's schemas can live beside every released one: ``.avsc`` texts in, a sentence for each thing that speaks against it out.

Released schemas lie in ``schemas/released/<release>/*.avsc`` and are never edited. Two machines of two releases share topics while an
upgrade rolls on, and a topic holds records of months, so every schema must be FULL_TRANSITIVE compatible with each released one: new code
reads old records, old code reads new ones. Avro alone does not see all of it, because a column of a frame is ``bytes`` to Avro:

- a column keeps its ``logicalType``: another dtype of the same bytes is other numbers;
- a column that was added has ``default: ""`` and a ``fill``: an old frame has no bytes for it, its rows get the fill;
- a column stays, and so does its ``fill``: tables keep their columns, and old rows must mean tomorrow what they mean today;
- a schema stays: topics of an older process would have no reader.

``marketstream schemas check`` (and ``python -m infra.schema_evolution``, a gate of ``make lint``) prints what it found and ends with 1 when
that is anything. ``marketstream schemas freeze VERSION`` copies ``schemas/avro`` to ``schemas/released/VERSION``: run it once on the commit
that is released, with the version of ``pyproject.toml``; from then on these texts are a promise.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final

from infra.errors import MarketstreamError, SettingsError
from infra.stack.registry_compat import check

LEVEL: Final = "FULL_TRANSITIVE"
_VERSION: Final = re.compile(r"\d+\.\d+\.\d+")


class SchemaEvolutionError(MarketstreamError):
    """Today's schemas do not fit the released ones."""


def current() -> dict[str, str]:
    """Text of every schema in ``schemas/avro`` by name."""
    return _texts(files("schemas").joinpath("avro"))


@cache
def released() -> dict[str, dict[str, str]]:
    """Text of every released schema, by release (oldest first) and name."""
    folder = files("schemas").joinpath("released")
    names = [entry.name for entry in folder.iterdir() if entry.is_dir() and _VERSION.fullmatch(entry.name)] if folder.is_dir() else []
    return {name: _texts(folder.joinpath(name)) for name in sorted(names, key=_number)}


def problems(now: Mapping[str, str], earlier: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What speaks against the schemas ``now`` beside those of ``earlier`` releases, one sentence each; empty when nothing does."""
    found = []
    for release, texts in earlier.items():
        found += [f"{name}.avsc of release {release} is gone: keep it, its topics hold records." for name in sorted(set(texts) - set(now))]
        for name in sorted(set(texts) & set(now)):
            found += [f"{name}.avsc: {problem} (release {release})" for problem in _against(now[name], texts[name])]
    return found


def freeze(version: str, folder: Path | None = None) -> list[Path]:
    """Make today's schemas those of release ``version``; the files written.

    Raises SettingsError for a version that is none, not above the last one, or taken; SchemaEvolutionError where they are not compatible.
    """
    if not _VERSION.fullmatch(version):
        raise SettingsError(f"'{version}' is no version: write it as in 1.2.0.")
    found = problems(current(), released())
    if found:
        raise SchemaEvolutionError(f"{len(found)} problem(s), the first: {found[0]}")
    last = next(reversed(released()), "0.0.0")
    if _number(version) <= _number(last):
        raise SettingsError(f"Version {version} is not above {last}, the last one with frozen schemas: what was released is not changed.")
    target = (folder or Path(str(files("schemas"))) / "released") / version
    target.mkdir(parents=True)
    written = []
    for name, text in sorted(current().items()):
        (target / f"{name}.avsc").write_text(text, "utf-8")
        written.append(target / f"{name}.avsc")
    released.cache_clear()
    return written


def _texts(folder: Traversable) -> dict[str, str]:
    entries = [entry for entry in folder.iterdir() if entry.name.endswith(".avsc")]
    return {entry.name.removesuffix(".avsc"): entry.read_text("utf-8") for entry in sorted(entries, key=lambda entry: entry.name)}


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _against(new: str, old: str) -> list[str]:
    found = check(LEVEL, new, [old])
    was, now = _columns(old), _columns(new)
    for name, column in was.items():
        if name not in now:
            found.append(f"column '{name}' is gone: keep it, tables and old readers have it.")
        elif now[name]["type"]["logicalType"] != column["type"]["logicalType"]:
            found.append(
                f"column '{name}' was {column['type']['logicalType']} and is {now[name]['type']['logicalType']}:"
                " the same bytes are other numbers; add a column instead."
            )
        elif "fill" in column and now[name].get("fill") != column["fill"]:
            found.append(f"the fill of column '{name}' was {column['fill']}: rows of older releases would change their meaning.")
    for name in now.keys() - was.keys():
        if now[name].get("default") != "" or not isinstance(now[name].get("fill"), (int, float)):
            found.append(f'column \'{name}\' was added without "default": "" and a "fill": frames of older releases have no bytes for it.')
    return found


def _columns(text: str) -> dict[str, dict[str, Any]]:
    """Fields of a frame schema that are columns, by name."""
    fields = json.loads(text)["fields"]
    return {field["name"]: field for field in fields if isinstance(field["type"], dict) and "logicalType" in field["type"]}


def main() -> int:
    """Print what speaks against today's schemas; 1 when there is anything."""
    found = problems(current(), released())
    for problem in found:
        print(problem, file=sys.stderr)
    print(f"{len(current())} schemas beside those of {', '.join(released()) or 'no release'}: {len(found)} problem(s).")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
