"""The topics the worker writes beside bars, read for :class:`infra.parity_outputs.Outputs` and :class:`infra.parity_twins.TwinBook`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import numpy as np

from infra import offsets
from infra.parity_compare import Record
from infra.parity_outputs import Origin, OutputFindings, Outputs
from infra.parity_reader import Stretch
from infra.parity_twins import Terms, TwinBook
from infra.registry_client import RegistryClient
from infra.repair_reader import RepairReader
from infra.runs import Run
from infra.settings import Settings
from schemas.codec import FrameCodec, RowCodec, decode_learning
from schemas.errors import DecodeError, UnknownSchemaError
from schemas.timeframes import TIMEFRAME_SECONDS
from schemas.topics import TOPICS
from streams.bar_shard import COMPONENT
from streams.row_twin import TOPIC as TWIN
from streams.row_twin import RowTwin

Covered = Mapping[int, tuple[int, int]]
"""Partition -> trades ``[first, stop)``."""
BESIDE_BARS: Final = ("quality", "quarantine", "deadletter")
"""Looked at in any case: a record there that the replay does not make is a difference too."""


def check_outputs(settings: Settings, run: Run, registry: RegistryClient, outputs: Outputs, covered: Covered) -> list[OutputFindings]:
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


def check_twins(
    settings: Settings, run: Run, registry: RegistryClient, client: Any, books: Iterable[TwinBook], covered: Covered, until_us: int
) -> OutputFindings:
    """Compare ``bars.rows`` with ``bars``, partition by partition, from the run's start to now.

    Args:
        client: a connected clickhouse-connect client.
        books: of all partitions, their records of ``bars`` taken.
        covered: partition -> trades ``[first, stop)`` of the run that it has turned into bars.
        until_us: when the end of the run was read.
    """
    found = OutputFindings(topic=TWIN)
    codec = registry.row_codec(TWIN)
    starts = offsets.since(settings.kafka, [TWIN], run.started_us)[TWIN]
    _, ends = offsets.bounds(settings.kafka, [TWIN])

    def stored(key: bytes) -> bytes | None:
        instrument, _, timeframe = key.decode(errors="replace").rpartition(":")
        exchange, _, symbol = instrument.partition(":")
        newest = RepairReader(client, exchange, symbol, 1).newest_bar(TIMEFRAME_SECONDS.get(timeframe, 0))
        if not len(newest["open"]):
            return None
        columns = {"symbol_code": np.zeros(1, np.int32), **newest}
        return RowTwin(codec).records(0, int(newest["input_offset"][0]), (instrument,), columns)[0].value

    for book in books:
        first, stop = covered[book.partition]
        terms = Terms(
            first=first,
            stop=stop,
            until_us=min(run.ended_us or until_us, until_us),
            killed=run.state == "killed",
            decode=partial(_row, codec, registry),
            stored=stored,
        )
        with Stretch(settings, TWIN, book.partition, starts[book.partition], ends[TWIN][book.partition]) as records:
            book.check(records, terms, found)
    return found


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
    row = _row(codec, registry, value)
    if row is None:
        return None
    made_here = row.get("component") == COMPONENT and row.get("topic") == "trades"
    return Origin(int(row["partition"]), int(row["offset"])) if made_here else None


def _row(codec: RowCodec, registry: RegistryClient, value: bytes) -> dict[str, Any] | None:
    try:
        return dict(codec.decode(value))
    except UnknownSchemaError as unknown:
        try:
            codec.add_writer(unknown.schema_id, registry.schema(unknown.schema_id))
        except KeyError:
            return None
        return _row(codec, registry, value)
    except DecodeError:
        return None
