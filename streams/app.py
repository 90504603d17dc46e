"""The Faust application: membership and scheduling; what is computed stands in ``streams.bar_shard``.

Comes in: ``trades``. Goes out: ``bars``, ``bars.rows``, ``deadletter`` through the runner. Faust's tables, windows, transactions and web
server are not used (pitfalls 1-13, 21); input is acknowledged only after the snapshot that covers it.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import faust
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.types import TP

from streams.runner import BarRunner

logger = logging.getLogger(__name__)

_BUFFERED_RECORDS: Final = 32
"""Records Faust may hold ready for the agent: at most 32 x 8 MiB, usually 32 x 100 kB. Its default of 4,096 is unbounded by bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AppConfig:
    """How the worker joins its group."""

    bootstrap: str
    """host:port of the broker, comma separated."""
    topic_prefix: str
    instance_id: str
    """Static member id (KIP-345): a worker that comes back within the session timeout gets its partitions without a rebalance."""
    session_timeout_s: float
    """Faust's default is 60 s; a worker killed -9 would leave its partitions alone that long."""
    snapshot_interval_s: float
    folder: str
    """Where Faust makes a folder it then leaves empty; by default it would be the current one."""
    credentials: Any = None
    """Faust broker credentials, None for plaintext."""


class _Recovery(Recovery):  # type: ignore[misc]  # Faust carries no types
    """Faust's recovery, which after each rebalance asks for the committed offsets and lets the streams flow.

    It gives that 90 s (``broker_request_timeout``) and takes the end of its patience for the end of the service: a worker that was given its
    partitions while the broker hung for longer never read again.
    """

    async def _wait(self, coro: Any, timeout: Any = None) -> None:
        await super()._wait(coro)  # until it is done, or the next rebalance begins anew


class _NoTables(TableManager):  # type: ignore[misc]  # Faust carries no types
    """Faust's table manager where there are no tables: its start waits a second for them to be declared, a third of a worker's restart."""

    _recovery: _Recovery | None

    @property
    def recovery(self) -> _Recovery:
        """The recovery."""
        if self._recovery is None:
            self._recovery = _Recovery(self.app, self, beacon=self.beacon, loop=self.loop)
        return self._recovery

    async def on_start(self) -> None:
        """Declare that there are none, and begin."""
        await self._update_channels()
        await self.recovery.start()


def create_app(config: AppConfig, runner: BarRunner) -> faust.App:
    """The application with its one agent, ready for ``faust.Worker``."""
    app = faust.App(
        f"{config.topic_prefix}marketstream-bars",
        broker=[f"kafka://{address}" for address in config.bootstrap.split(",")],
        broker_credentials=config.credentials,
        datadir=config.folder,
        store="memory://",
        autodiscover=False,
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        consumer_auto_offset_reset="earliest",
        consumer_group_instance_id=config.instance_id,
        broker_session_timeout=config.session_timeout_s,
        broker_heartbeat_interval=config.session_timeout_s / 4,
        broker_commit_interval=1.0,
        broker_max_poll_records=64,
        consumer_max_fetch_size=9 * 1024 * 1024,
        stream_buffer_maxsize=_BUFFERED_RECORDS,
        # Input is acknowledged by snapshots, so waiting for an empty stream at a rebalance would wait for ever.
        stream_wait_empty=False,
        TableManager=_NoTables,
    )
    topic = app.topic(f"{config.topic_prefix}trades", key_serializer="raw", value_serializer="raw")
    unacknowledged: dict[int, deque[Any]] = {}

    @app.agent(topic, name="bars", concurrency=1)
    async def bars(stream: Any) -> None:
        async for event in stream.noack().events():
            message = event.message
            shard = await runner.shard(message.partition)
            if message.offset > shard.applied_offset + 1 and not await _resume_at(app, message, shard.applied_offset + 1):
                continue
            await runner.handle(message.partition, message.offset, message.value or b"")  # a tombstone has none
            message.value = b""  # the message waits for its snapshot; its bytes need not
            unacknowledged.setdefault(message.partition, deque()).append(message)

    @app.timer(interval=config.snapshot_interval_s, name="snapshot")
    async def snapshot() -> None:
        acknowledge(await runner.snapshot())

    def acknowledge(applied: dict[int, int]) -> None:
        for partition, offset in applied.items():
            waiting = unacknowledged.get(partition, deque())
            while waiting and waiting[0].offset <= offset:
                app.consumer.ack(waiting.popleft())

    @app.on_partitions_assigned.connect
    async def assigned(_: Any, partitions: set[TP], **__: Any) -> None:
        # side by side, before the first records come: one after the other, at its first record each, four took 0.5 s
        for place in partitions:
            if place.topic == topic.get_topic_name():
                runner.prepare(place.partition)

    @app.on_partitions_revoked.connect
    async def revoked(_: Any, partitions: set[TP], **__: Any) -> None:
        acknowledge(await runner.snapshot(force=True))
        for place in partitions:
            runner.drop(place.partition)
            unacknowledged.pop(place.partition, None)

    return app


async def _resume_at(app: faust.App, message: Any, expected: int) -> bool:
    """True when the record may be processed although earlier ones are missing: they are gone. Otherwise reading goes back to them.

    Committed offsets can be ahead of the state when a snapshot was lost, so the state decides where reading starts.
    """
    place = message.tp
    oldest = (await app.consumer.earliest_offsets(place))[place]
    if oldest >= message.offset:
        logger.error(
            "Partition %d of trades: records %d to %d were deleted by retention before they were processed; replay them from their source",
            place.partition,
            expected,
            message.offset - 1,
        )
        return True
    logger.info("Partition %d goes back from offset %d to %d", place.partition, message.offset, max(expected, oldest))
    await app.consumer.seek(place, max(expected, oldest))
    return False
