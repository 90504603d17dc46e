"""Dead letters for people: list and show them, try them again, drop them. Settings and ids in; what became of each out.

The order of a retry: the letter is claimed, its records are acknowledged by the broker, its jobs stand in ``repairs``, and only then it is
settled. A command killed in between leaves the claim, which another one takes over after a minute; what is sent twice is stored once.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from confluent_kafka import Consumer, KafkaException, TopicPartition

from api.errors import StoreUnavailableError
from api.letters import LetterFilter, Letters
from infra.api_stores import ClickHouseHistory
from infra.clickhouse.client import connect
from infra.database import connected
from infra.deadletter_decisions import Decisions, decider
from infra.deadletter_retry import SUPERSEDED_BY, Plan, Planner
from infra.deadletter_sources import RefusedError, StillBadError
from infra.errors import MarketstreamError, SettingsError, UnreachableError
from infra.kafka import FrameProducer, consumer_config, unreachable
from infra.registry_client import RegistryClient
from infra.repair_jobs import RepairJobs
from infra.settings import Settings
from infra.symbol_reader import SymbolReader
from schemas.frames import Frame
from schemas.seam import Clock
from schemas.symbols import parse_key
from schemas.topics import TOPICS
from streams.deadletters import dead_letter

_CHUNK: Final = 100
"""Letters read with their bytes at a time: 100 MiB at most."""
_TIMEOUT_S: Final = 10.0
COMPONENT: Final = "retry"
"""Who wrote a letter that a failed retry made, where the origin names none."""


class NotRetriedError(MarketstreamError):
    """A letter cannot be tried again, or was and failed again; the sentence says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What became of one letter."""

    id: int
    result: str
    """``retried``, ``failed`` (again, a new letter says why), ``refused`` (cannot be tried; open as before), ``dropped``, ``unchanged``."""
    detail: str
    """One sentence."""
    new_letter: int | None = None
    repairs: tuple[int, ...] = ()


class Office:
    """Letters and what is decided on them. Made by :func:`office`."""

    def __init__(self, settings: Settings, clock: Clock, letters: Letters, decisions: Decisions) -> None:
        self.letters = letters
        self._settings = settings
        self._clock = clock
        self._decisions = decisions

    async def get(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """The letters with their bytes, in that order. Raises SettingsError for one that is not there."""
        found: dict[int, dict[str, Any]] = {}
        for start in range(0, len(ids), _CHUNK):
            found |= await self.letters.with_bytes(ids[start : start + _CHUNK])
        missing = [letter for letter in ids if letter not in found]
        if missing:
            raise SettingsError(f"There is no dead letter {missing[0]}: `marketstream deadletter list` shows those there are.")
        return [found[letter] for letter in ids]

    async def ids_of(self, wanted: LetterFilter) -> AsyncIterator[list[int]]:
        """Ids of all letters of a filter, newest first, in chunks."""
        before: int | None = None
        while True:
            rows, following = await self.letters.page(wanted, limit=_CHUNK, before=before)
            if rows:
                yield [row["id"] for row in rows]
            if following is None:
                return
            before = following

    async def drop(self, ids: Sequence[int]) -> list[Result]:
        """Decide that nothing more is done about letters. Raises SettingsError for one that is not there."""
        letters = {letter["id"]: letter for letter in await self.get(ids)}
        dropped = await self._decisions.drop(
            [one for one, letter in letters.items() if letter["state"] == "open"], f"Dropped by {decider()}."
        )
        return [
            Result(id=one, result="dropped", detail="Nothing more is done about it.") if one in dropped else _unchanged(letters[one])
            for one in dict.fromkeys(ids)
        ]

    async def retry(self, ids: Sequence[int]) -> list[Result]:
        """Try letters again, one after the other. Raises SettingsError for one that is not there, before anything is done."""
        letters = await self.get(list(dict.fromkeys(ids)))
        async with RepairJobs(self._settings) as jobs:
            with RegistryClient.from_settings(self._settings) as registry:
                producer = FrameProducer(self._settings.kafka, registry)
                planner = await self._planner(registry)
                return [await self._retry(letter, planner, producer, jobs) for letter in letters]

    async def _retry(self, letter: dict[str, Any], planner: Planner, producer: FrameProducer, jobs: RepairJobs) -> Result:
        number = letter["id"]
        if letter["state"] == "repaired" or not await self._decisions.claim(number):
            return _unchanged((await self.letters.with_bytes([number])).get(number, letter))
        try:
            plan = await asyncio.to_thread(planner.plan, letter)
        except RefusedError as exc:
            await self._decisions.release(number)
            return Result(id=number, result="refused", detail=str(exc))
        except StillBadError as exc:
            return await self._failed_again(letter, exc, producer)
        except BaseException:
            await self._decisions.release(number)
            raise
        repairs = await self._carry_out(plan, producer, jobs)
        await self._decisions.settle(number, plan.what, repairs=repairs)
        return Result(id=number, result="retried", detail=plan.what, repairs=tuple(repairs))

    async def _carry_out(self, plan: Plan, producer: FrameProducer, jobs: RepairJobs) -> list[int]:
        """Publish, wait for the broker, then order the repair; ids of its jobs."""
        for record in plan.records:
            await producer.send_raw(record.topic, record.partition, record.key, record.value)
        if plan.records:
            await producer.flush()
        return await jobs.add(plan.repairs) if plan.repairs else []

    async def _failed_again(self, letter: dict[str, Any], exc: StillBadError, producer: FrameProducer) -> Result:
        """A new letter that names this one."""
        raw = base64.b64decode(letter["raw_base64"])
        row = dead_letter(
            reason=exc.reason,
            detail=exc.detail,
            component=letter["component"] or COMPONENT,
            raw=raw,
            time_us=letter["time_us"],
            exchange=letter["exchange"],
            symbol=letter["symbol"],
            topic=letter["topic"],
            partition=letter["partition"],
            offset=letter["offset"],
            place=letter["place"],
            origin=letter["id"],
        )
        await producer.send_row("deadletter", f"{letter['exchange']}:{letter['symbol']}", row | {"raw_size": letter["raw_size"]})
        new_letter = (await producer.flush())["deadletter"][0]
        detail = f"It failed again, see letter {new_letter}: {exc.detail}"
        await self._decisions.settle(letter["id"], detail, new_letter=new_letter)
        return Result(id=letter["id"], result="failed", detail=detail, new_letter=new_letter)

    async def _planner(self, registry: RegistryClient) -> Planner:
        return Planner(
            registry=registry,
            partitions=self._settings.kafka.partitions,
            symbols=await self._symbols(),
            read_record=self._read_record,
            newer_rows=self._newer_rows,
            stored_ids=self._stored_ids,
            now_us=self._clock.now_us(),
        )

    async def _symbols(self) -> dict[str, set[str]]:
        """Every market that is collected or was, by exchange."""
        found: dict[str, set[str]] = {}
        rows = [(row["exchange"], row["symbol"]) for row in await self._decisions.markets()]
        for exchange, symbol in [*rows, *await asyncio.to_thread(self._traded)]:
            found.setdefault(exchange, set()).add(symbol)
        return found

    # Blocking: called from threads.

    def _traded(self) -> list[tuple[str, str]]:
        client = connect(self._settings.clickhouse)
        try:
            return [tuple(row) for row in client.query("SELECT exchange, symbol FROM trades GROUP BY exchange, symbol").result_rows]
        finally:
            client.close()

    def _read_record(self, topic: str, partition: int, offset: int) -> bytes | None:
        kafka = self._settings.kafka
        consumer = Consumer(consumer_config(kafka, "deadletter"))
        place = TopicPartition(TOPICS[topic].full_name(kafka.topic_prefix), partition, offset)
        try:
            low, high = consumer.get_watermark_offsets(place, timeout=_TIMEOUT_S, cached=False)
            if not low <= offset < high:
                return None
            consumer.assign([place])
            message = consumer.poll(_TIMEOUT_S)
            if message is None or message.error():
                raise unreachable(kafka, TimeoutError(f"no answer reading {place.topic}[{partition}] at {offset}"))
            return (message.value() or b"") if message.offset() == offset else None
        except KafkaException as exc:
            raise unreachable(kafka, exc) from exc
        finally:
            consumer.close()

    def _stored_ids(self, key: str, time_us: int) -> tuple[int, int]:
        client = connect(self._settings.clickhouse)
        try:
            reader = SymbolReader(client, *parse_key(key))
            before, after = reader.before(time_us), reader.after(time_us)
        finally:
            client.close()
        return before.trade_id if before is not None else -1, after.trade_id if after is not None else -1

    def _newer_rows(self, topic: str, partition: int, offset: int, frame: Frame) -> np.ndarray[Any, Any]:
        names = SUPERSEDED_BY[topic]
        counts = " AND state != 1" if topic == "quarantine" else ""  # held replaces nothing, see api.quality.BY_WEIGHT
        rows = frame.to_polars().select(names).rows()
        client = connect(self._settings.clickhouse)
        try:
            newer = client.query(
                f"SELECT DISTINCT {', '.join(names)} FROM `{topic}` WHERE kafka_partition = {{p:UInt16}} AND kafka_offset > {{o:UInt64}}{counts}",
                parameters={"p": partition, "o": offset},
            ).result_rows
        finally:
            client.close()
        known = {tuple(row) for row in newer}
        return np.array([tuple(row) in known for row in rows], bool)


@asynccontextmanager
async def office(settings: Settings, clock: Clock) -> AsyncIterator[Office]:
    """The letters of a stack, with connections to ClickHouse and PostgreSQL. Raises UnreachableError, inside too."""
    store = ClickHouseHistory(settings.clickhouse)
    try:
        async with connected(settings.postgres) as connection:
            decisions = Decisions(connection, settings.kafka.topic_prefix)
            yield Office(settings, clock, Letters(store, decisions), decisions)
    except StoreUnavailableError as exc:
        raise UnreachableError(f"{exc.reason.rstrip('.')}: start the stack or set MARKETSTREAM_CLICKHOUSE_URL.") from exc
    finally:
        await store.close()


def _unchanged(letter: dict[str, Any]) -> Result:
    if letter["state"] == "open":
        return Result(id=letter["id"], result="unchanged", detail="Another command is about to retry it.")
    when = f" at {letter['decided_at'][:19]}Z" if letter["decided_at"] else ""
    return Result(
        id=letter["id"], result="unchanged", detail=f"It was {letter['state']} by {letter['decided_by']}{when}: {letter['outcome']}"
    )
