"""Whether a new Avro schema may follow earlier ones: schema texts and a level in, a list of what speaks against it out."""

from __future__ import annotations

import functools
import json
import warnings
from typing import Any

LEVELS = ("NONE", "BACKWARD", "BACKWARD_TRANSITIVE", "FORWARD", "FORWARD_TRANSITIVE", "FULL", "FULL_TRANSITIVE")


def parse_error(schema: str) -> str | None:
    """Why a text is not an Avro schema, None when it is one."""
    import avro.errors

    try:
        json.loads(schema)
        _parse(schema)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, avro.errors.AvroException) as exc:
        return f"{type(exc).__name__}: {str(exc)[:300]}"
    return None


def check(level: str, new: str, earlier: list[str]) -> list[str]:
    """What speaks against ``new`` after ``earlier`` (oldest first) at a compatibility level; empty when nothing does.

    BACKWARD: readers with the new schema read what the last one wrote; FORWARD: readers with the last one read what the new one
    writes; FULL: both; ``_TRANSITIVE``: against every earlier schema, not only the last.
    """
    if level == "NONE" or not earlier:
        return []
    against = earlier if level.endswith("_TRANSITIVE") else earlier[-1:]
    problems = []
    for old in reversed(against):
        if level.startswith(("BACKWARD", "FULL")):
            problems += [f"new schema cannot read old data: {problem}" for problem in _problems(reader=new, writer=old)]
        if level.startswith(("FORWARD", "FULL")):
            problems += [f"old schema cannot read new data: {problem}" for problem in _problems(reader=old, writer=new)]
    return problems[:20]


@functools.lru_cache(maxsize=256)
def _parse(schema: str) -> Any:
    import avro.schema  # 15 ms and 6 MB that a registry which only answers reads never needs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # our logicalType names are ours: avro says of each that it does not know it
        return avro.schema.parse(schema)


def _problems(*, reader: str, writer: str) -> list[str]:
    from avro.compatibility import ReaderWriterCompatibilityChecker, SchemaCompatibilityType

    result = ReaderWriterCompatibilityChecker().get_compatibility(_parse(reader), _parse(writer))
    if result.compatibility is SchemaCompatibilityType.compatible:
        return []
    found = [f"{message} at {place}" for message, place in zip(sorted(result.messages), sorted(result.locations), strict=False)]
    return found or ["incompatible"]
