"""What asks for a repair: records of ``gaps``, ``deadletter`` and ``quarantine`` in, jobs in PostgreSQL out; committed after they are stored.

A gap that was filled or given up, a trade that came too late for its bar, a suspect that was released, discarded or confirmed: each changes
bars of the past. Records of one symbol that are read together and lie close to each other make one job.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Final

from confluent_kafka import Consumer, KafkaException, TopicPartition

from infra.kafka import consumer_config, partition_count, unreachable
from infra.registry_client import RegistryClient
from infra.repair_jobs import Wanted
from infra.settings import KafkaSettings
from schemas.codec import FrameCodec, RowCodec, decode_learning
from schemas.errors import DecodeError, UnknownSchemaError
from schemas.frames import GAP_FILLED, GAP_UNFILLABLE, Frame
from schemas.symbols import check_exchange, check_symbol
from schemas.timeframes import MAX_TIME_US, MIN_TIME_US, US_PER_SECOND
from schemas.topics import TOPICS

logger = logging.getLogger(__name__)

GROUP: Final = "marketstream-repair"
"""Consumer group whose committed offsets say which records have their jobs."""
TOPIC_NAMES: Final = ("gaps", "deadletter", "quarantine")
NEAR_US: Final = 60 * US_PER_SECOND
"""Stretches of a symbol this close to each other make one job: a minute's bars are read in one go anyway."""
_QUIET: Final = {"fetch.wait.max.ms": 1_000, "queued.max.messages.kbytes": 4_096}
"""These topics are quiet: asked ten times a second, as other consumers do, they cost 1 % of a core for nothing."""
_TIMEOUT_S: Final = 10.0
_TRADES_CHANNEL: Final = 1
EVIDENCE_PERSON: Final = 7
_DECIDED: Final = (2, 3, 4)
"""States of quarantine that put a trade into bars or take it out: confirmed by the market, released, discarded."""


class Triggers:
    """The consumer. Blocking; calls from several threads wait for each other."""

    def __init__(self, settings: KafkaSettings, registry: RegistryClient) -> None:
        self._settings = settings
        self._registry = registry
        self._codecs: dict[str, FrameCodec | RowCodec] = {
            name: registry.frame_codec(name) if TOPICS[name].kind == "frame" else registry.row_codec(name) for name in TOPIC_NAMES
        }
        self._consumer = Consumer(consumer_config(settings, GROUP, **_QUIET))
        self._read: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()  # a read that was given up goes on in its thread: it must not be closed under way

    def open(self) -> None:
        """Go on where the group has committed. Raises UnreachableError."""
        places = [
            TopicPartition(TOPICS[name].full_name(self._settings.topic_prefix), partition)
            for name in TOPIC_NAMES
            for partition in range(partition_count(self._settings, TOPICS[name]))
        ]
        try:
            found = []
            for place in self._consumer.committed(places, timeout=_TIMEOUT_S):
                if place.error:
                    raise KafkaException(place.error)
                low, _ = self._consumer.get_watermark_offsets(place, timeout=_TIMEOUT_S, cached=False)
                found.append(TopicPartition(place.topic, place.partition, max(place.offset, low, 0)))
            self._consumer.assign(found)
        except KafkaException as exc:
            raise unreachable(self._settings, exc) from exc

    def read(self, timeout_s: float) -> list[Wanted]:
        """Jobs that follow from the next records; [] when there are none in time. Call :meth:`commit` when they are stored."""
        wanted: list[Wanted] = []
        with self._lock:
            messages = self._consumer.consume(500, timeout_s)
        for message in messages:
            if message.error():
                raise unreachable(self._settings, KafkaException(message.error()))
            name = message.topic().removeprefix(self._settings.topic_prefix)
            self._read[(message.topic(), message.partition())] = message.offset() + 1
            wanted.extend(self._of(name, f"{name}/{message.partition()}/{message.offset()}", message.value() or b""))
        return merge(wanted)

    def commit(self) -> None:
        """What was read has its jobs."""
        if not self._read:
            return
        places = [TopicPartition(topic, partition, offset) for (topic, partition), offset in self._read.items()]
        try:
            self._consumer.commit(offsets=places, asynchronous=False)
        except KafkaException as exc:
            logger.warning("Offsets of the repair's triggers not committed: %s; they are read again, which changes nothing.", exc)
            return
        self._read.clear()

    def close(self) -> None:
        """Leave."""
        with self._lock:
            self._consumer.close()

    def _of(self, name: str, trigger: str, value: bytes) -> Iterator[Wanted]:
        codec = self._codecs[name]
        try:
            if isinstance(codec, FrameCodec):
                frame = decode_learning(codec, value, self._registry.schema)
                yield from of_gaps(frame, trigger) if name == "gaps" else of_quarantine(frame, trigger)
            else:
                yield from of_letter(self._row(codec, value), trigger)
        except DecodeError as exc:
            logger.warning("Record %s cannot be read and asks for nothing: %s", trigger, exc)

    def _row(self, codec: RowCodec, value: bytes) -> dict[str, Any]:
        try:
            return dict(codec.decode(value))
        except UnknownSchemaError as unknown:
            try:
                codec.add_writer(unknown.schema_id, self._registry.schema(unknown.schema_id))
            except KeyError:
                raise DecodeError(f"The schema registry has no schema with id {unknown.schema_id}.") from unknown
            return dict(codec.decode(value))


def of_gaps(frame: Frame, trigger: str) -> Iterator[Wanted]:
    """A job for each gap that was filled or given up; both ends count, as the missing may have the time of a neighbour.

    What a person asked for (backfill) has its own job.
    """
    if not frame.row_count:
        return
    names = ("symbol_code", "start_time_us", "end_time_us", "state", "channel", "evidence")
    for code, start_us, end_us, state, channel, evidence in zip(*(frame.columns[name].tolist() for name in names), strict=True):
        if state in (GAP_FILLED, GAP_UNFILLABLE) and channel == _TRADES_CHANNEL and start_us <= end_us and evidence != EVIDENCE_PERSON:
            reason = "gap_filled" if state == GAP_FILLED else "gap_unfillable"
            yield from _wanted(frame.symbols[code], start_us, end_us + 1, reason, trigger)


def of_quarantine(frame: Frame, trigger: str) -> Iterator[Wanted]:
    """A job for each suspect that goes into bars or out of them now."""
    if not frame.row_count:
        return
    names = ("symbol_code", "exchange_time_us", "state")
    for code, time_us, state in zip(*(frame.columns[name].tolist() for name in names), strict=True):
        if state in _DECIDED:
            yield from _wanted(frame.symbols[code], time_us, time_us + 1, "quarantine", trigger)


def of_letter(row: dict[str, Any], trigger: str) -> Iterator[Wanted]:
    """A job for a trade that came too late for its bar: it is stored and not in it."""
    if row.get("reason") != "too_late" or row.get("component") != "worker":
        return
    try:
        said = json.loads(row["raw"])
        key, time_us = str(said["key"]), int(said["exchange_time_us"])
    except (ValueError, KeyError, TypeError):
        logger.warning("Dead letter %s names no trade; the bars of its time are not reconciled.", trigger)
        return
    yield from _wanted(key, time_us, time_us + 1, "too_late", trigger)


def merge(wanted: Iterable[Wanted]) -> list[Wanted]:
    """Stretches of one symbol and reason that lie close to each other as one, named by the first of their triggers."""
    found: list[Wanted] = []
    newest: dict[tuple[str, str, str], int] = {}
    for one in sorted(wanted, key=lambda each: (each.exchange, each.symbol, each.reason, each.start_us)):
        series = (one.exchange, one.symbol, one.reason)
        place = newest.get(series)
        if place is not None and one.start_us <= found[place].end_us + NEAR_US:
            before = found[place]
            trigger = min(before.trigger, one.trigger, key=_place)
            found[place] = replace(before, end_us=max(before.end_us, one.end_us), trigger=trigger)
        else:
            newest[series] = len(found)
            found.append(one)
    # two stretches of one record far apart are two jobs: the start tells their triggers apart
    return [replace(one, trigger=f"{one.trigger}/{one.reason}/{one.start_us}") for one in found]


def _place(trigger: str) -> tuple[str, int, int]:
    topic, partition, offset = trigger.split("/")
    return topic, int(partition), int(offset)


def _wanted(key: str, start_us: int, end_us: int, reason: str, trigger: str) -> Iterator[Wanted]:
    exchange, _, symbol = key.partition(":")
    try:
        check_exchange(exchange)
        check_symbol(symbol)
    except ValueError:
        logger.warning("Record %s names no instrument: '%s'", trigger, key[:80])
        return
    if MIN_TIME_US <= start_us < end_us <= MAX_TIME_US:
        yield Wanted(exchange=exchange, symbol=symbol, start_us=start_us, end_us=end_us, reason=reason, trigger=trigger)
