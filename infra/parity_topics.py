"""The topics the worker writes beside bars, read for :class:`infra.parity_outputs.Outputs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from infra import offsets
from infra.parity_compare import Record
from infra.parity_outputs import Origin, OutputFindings, Outputs
from infra.parity_reader import Stretch
from infra.registry_client import RegistryClient
from infra.runs import Run
from infra.settings import Settings
from schemas.codec import FrameCodec, RowCodec, decode_learning
from schemas.errors import DecodeError, UnknownSchemaError
from schemas.topics import TOPICS
from streams.bar_shard import COMPONENT

BESIDE_BARS: Final = ("quality", "quarantine", "deadletter")
"""Looked at in any case: a record there that the replay does not make is a difference too."""


def check_outputs(
    settings: Settings, run: Run, registry: RegistryClient, outputs: Outputs, covered: Mapping[int, tuple[int, int]]
) -> list[OutputFindings]:
    """Compare every topic, from the run's start to now. Raises UnreachableError."""
    names = sorted({*outputs.topics(), *BESIDE_BARS})
    starts = offsets.since(settings.kafka, names, run.started_us)
    _, ends = offsets.bounds(settings.kafka, names)

    def records(name: str) -> Iterator[tuple[int, Record]]:
        for partition, start in starts[name].items():
            with Stretch(settings, name, partition, start, ends[name][partition]) as found:
                for record in found:
                    yield partition, record

    return [outputs.check(name, records(name), _origin(registry, name), covered, killed=run.state != "running") for name in names]


def _origin(registry: RegistryClient, name: str) -> Callable[[int, bytes], Origin | None]:
    """How to tell which trades a record of a topic was made from; None for one of another writer, or one nobody can read."""
    if TOPICS[name].kind == "frame":
        frames = registry.frame_codec(name)
        return lambda partition, value: _of_frame(frames, registry, partition, value)
    rows = registry.row_codec(name)
    return lambda _, value: _of_row(rows, registry, value)


def _of_frame(codec: FrameCodec, registry: RegistryClient, partition: int, value: bytes) -> Origin | None:
    try:
        frame = decode_learning(codec, value, registry.schema)
    except DecodeError:
        return None
    return Origin(partition, frame.input_offset) if frame.input_offset >= 0 else None


def _of_row(codec: RowCodec, registry: RegistryClient, value: bytes) -> Origin | None:
    try:
        row: dict[str, Any] = codec.decode(value)
    except UnknownSchemaError as unknown:
        codec.add_writer(unknown.schema_id, registry.schema(unknown.schema_id))
        return _of_row(codec, registry, value)
    except DecodeError:
        return None
    made_here = row.get("component") == COMPONENT and row.get("topic") == "trades"
    return Origin(int(row["partition"]), int(row["offset"])) if made_here else None
