"""`marketstream tail`: a topic in, its rows on stdout as they come. Reads without a consumer group, so it disturbs nobody."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from confluent_kafka import OFFSET_END, Consumer, KafkaError, KafkaException, TopicPartition

from infra.cli.context import settings_of
from infra.cli.output import Output
from infra.cli.rows import Row, columns_of, reader, shown
from infra.cli.where import Kind, compile_where
from infra.errors import SettingsError
from infra.kafka import consumer_config, partition_count, unreachable
from infra.registry_client import RegistryClient
from infra.seam import SystemClock
from infra.settings import Settings
from schemas.errors import DecodeError
from schemas.seam import Clock
from schemas.timeframes import parse_duration_us
from schemas.topics import Topic, topic

_TIMEOUT_S: Final = 3.0
_CELL_WIDTH: Final = 60
"""Characters of a text cell a person gets to see; --json gives all of it."""


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Where to begin: one of ``latest``, ``earliest``, an offset, or ``ago_us`` before now."""

    word: str = ""
    offset: int = -1
    ago_us: int = -1


def parse_begin(text: str) -> Begin:
    """Read ``--from``. Raises SettingsError."""
    if text in ("latest", "earliest"):
        return Begin(word=text)
    if text.isascii() and text.isdigit():
        return Begin(offset=int(text))
    try:
        return Begin(ago_us=parse_duration_us(text))
    except ValueError:
        raise SettingsError(f"--from is '{text}'; write latest, earliest, an offset, or how long ago as in 10m") from None


def tail(output: Output, *, data_dir: Path | None, topic: str, begin: str, where: str | None, limit: int | None, follow: bool) -> None:
    """Show rows until ``limit``, the end (``follow=False``) or Ctrl-C. Raises SettingsError, VocabularyError, UnreachableError."""
    entry = _topic(topic)
    columns = columns_of(entry)
    test = compile_where(where, columns) if where else None
    start = parse_begin(begin)
    settings = settings_of(data_dir)
    count = 0
    shell = Printer(output, columns)
    for row in _rows(output, settings, entry, start, follow, SystemClock()):
        if test is not None and not test(row):
            continue
        shell.show(row)
        count += 1
        if limit is not None and count >= limit:
            break
    shell.end(count)


def _topic(name: str) -> Topic:
    return topic(name)


def _rows(output: Output, settings: Settings, entry: Topic, begin: Begin, follow: bool, clock: Clock) -> Iterator[Row]:
    with RegistryClient.from_settings(settings) as registry:
        read = reader(entry, registry)
        consumer = Consumer(consumer_config(settings.kafka, "tail", **{"enable.partition.eof": not follow}))
        try:
            places = _places(consumer, settings, entry, begin, clock)
            consumer.assign(places)
            open_ends = {place.partition for place in places}
            while open_ends:
                message = consumer.poll(0.25)
                if message is None:
                    continue
                error = message.error()
                if error is None:
                    yield from _decoded(output, read, message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    open_ends.discard(message.partition())
                elif error.fatal() or not error.retriable():
                    raise unreachable(settings.kafka, KafkaException(error))
        except KafkaException as exc:
            raise unreachable(settings.kafka, exc) from exc
        finally:
            consumer.close()


def _decoded(output: Output, read: Any, message: Any) -> list[Row]:
    try:
        rows: list[Row] = read(message.key(), message.value() or b"", message.partition(), message.offset())
        return rows
    except (DecodeError, KeyError) as exc:
        output.note(f"{message.topic()}[{message.partition()}] offset {message.offset()} skipped: {exc}")
        return []


def _places(consumer: Consumer, settings: Settings, entry: Topic, begin: Begin, clock: Clock) -> list[TopicPartition]:
    """Where to start in each partition; within what the broker still holds. Raises SettingsError when the topic does not exist."""
    full = entry.full_name(settings.kafka.topic_prefix)
    known = consumer.list_topics(timeout=_TIMEOUT_S).topics
    if full not in known:
        raise SettingsError(f"the broker at {settings.kafka.bootstrap} has no topic '{full}': start the stack with `marketstream up` first")
    if begin.ago_us >= 0:
        since_ms = (clock.now_us() - begin.ago_us) // 1000
        asked = [TopicPartition(full, partition, since_ms) for partition in range(partition_count(settings.kafka, entry))]
        return list(consumer.offsets_for_times(asked, timeout=_TIMEOUT_S))
    places = []
    for partition in range(partition_count(settings.kafka, entry)):
        low, high = consumer.get_watermark_offsets(TopicPartition(full, partition), timeout=_TIMEOUT_S, cached=False)
        wanted = {"earliest": low, "latest": OFFSET_END}.get(begin.word, max(low, min(begin.offset, high)))
        places.append(TopicPartition(full, partition, wanted))
    return places


class Printer:
    """Prints rows as JSON lines or as text columns whose widths only grow."""

    def __init__(self, output: Output, columns: dict[str, Kind]) -> None:
        self._output = output
        self._columns = columns
        self._widths: dict[str, int] = {}

    def show(self, row: Row) -> None:
        """Print one row."""
        if self._output.as_json:
            self._output.emit(row)
            return
        cells = {name: _cut(shown(name, row.get(name), kind)) for name, kind in self._columns.items()}
        wider = any(len(cell) > self._widths.get(name, 0) for name, cell in cells.items())
        if not self._widths or wider:
            first = not self._widths
            self._widths = {name: max(len(name), len(cell), self._widths.get(name, 0)) for name, cell in cells.items()}
            if first:
                self._output.line("  ".join(name.ljust(self._widths[name]) for name in cells))
        self._output.line("  ".join(self._aligned(name, cell) for name, cell in cells.items()).rstrip())

    def _aligned(self, name: str, cell: str) -> str:
        width = self._widths[name]
        return cell.rjust(width) if self._columns[name] == "number" else cell.ljust(width)

    def end(self, count: int) -> None:
        """Say so where nothing was printed."""
        if not self._output.as_json and count == 0:
            print("no rows", file=sys.stderr)


def _cut(text: str) -> str:
    text = text.replace("\n", " ")
    return text if len(text) <= _CELL_WIDTH else text[: _CELL_WIDTH - 1] + "…"
