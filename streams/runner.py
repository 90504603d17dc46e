"""Runs bar shards for whoever delivers records: loads state, sends outputs, takes snapshots in the safe order.

The order is the contract: outputs are sent; the broker acknowledges them; only then is the snapshot that covers them written; only then
may the input be committed. A crash between any two steps repeats work and loses nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from processors.bars import BarConfig
from schemas.seam import Clock
from streams.bar_shard import BarCodecs, BarShard
from streams.errors import StateError
from streams.state_store import StateLog, load, save

logger = logging.getLogger(__name__)


class Sender(Protocol):
    """Sends records; see ``infra.kafka.FrameProducer``."""

    async def send_raw(self, topic_name: str, partition: int, key: bytes | None, value: bytes) -> None:
        """Queue a record; waits while the queue is full."""
        ...

    async def wait_acknowledged(self) -> None:
        """Return when everything queued before the call is acknowledged."""
        ...

    def poll(self) -> None:
        """Serve delivery reports."""
        ...


class BarRunner:
    """All shards of one worker process.

    Args:
        open_log: gives the state partition of a trades partition.
        emitted_offset: gives ``input_offset`` of the newest record in a bars partition, -1 for none. May block.
        max_snapshot_share: a snapshot of 10,000 symbols takes long; it is taken again only after its own duration divided by this.
    """

    def __init__(
        self,
        *,
        config: BarConfig,
        codecs: BarCodecs,
        sender: Sender,
        open_log: Callable[[int], StateLog],
        emitted_offset: Callable[[int], int],
        clock: Clock,
        max_snapshot_share: float = 0.05,
    ) -> None:
        self.shards: dict[int, BarShard] = {}
        self._config = config
        self._codecs = codecs
        self._sender = sender
        self._open_log = open_log
        self._emitted_offset = emitted_offset
        self._clock = clock
        self._share = max_snapshot_share
        self._logs: dict[int, StateLog] = {}
        self._saved: dict[int, int] = {}
        self._restoring: dict[int, asyncio.Task[BarShard]] = {}
        self._next_snapshot_us = 0
        self._saving = asyncio.Lock()

    def prepare(self, partition: int) -> asyncio.Task[BarShard]:
        """Begin to restore a partition from its newest snapshot, where that was not begun yet."""
        restoring = self._restoring.get(partition)
        if restoring is None:
            restoring = self._restoring[partition] = asyncio.create_task(asyncio.to_thread(self._restore, partition))
        return restoring

    async def shard(self, partition: int) -> BarShard:
        """The shard of a partition, restored from its newest snapshot on first use. Raises what the broker's failure to answer raises."""
        while (found := self.shards.get(partition)) is None:
            restoring = self.prepare(partition)
            try:
                restored = await asyncio.shield(restoring)
            finally:
                current = self._restoring.get(partition) is restoring
                if current and restoring.done():
                    del self._restoring[partition]
            if current:  # dropped meanwhile: what was restored is another worker's by now
                self.shards[partition] = restored
                self._saved[partition] = restored.applied_offset
        return found

    async def handle(self, partition: int, offset: int, value: bytes) -> None:
        """Process one record and queue what follows from it."""
        shard = self.shards.get(partition) or await self.shard(partition)
        send = self._sender.send_raw
        for record in shard.process(offset, value):
            await send(record.topic, record.partition, record.key, record.value)
        self._sender.poll()

    async def snapshot(self, *, force: bool = False) -> dict[int, int]:
        """Write the state of every shard that moved; applied offset per partition that may now be committed.

        Returns {} when the last snapshot was too recent for its cost, unless ``force``.
        """
        async with self._saving:
            started_us = self._clock.monotonic_us()
            if not force and started_us < self._next_snapshot_us:
                return {}
            saved: dict[int, int] = {}
            for partition, shard in list(self.shards.items()):
                if shard.applied_offset == self._saved.get(partition):
                    continue
                # one at a time: packing 250 symbols takes 4 ms, and four partitions after each other would stop the loop for 16
                state, applied_offset = shard.snapshot(), shard.applied_offset
                await self._sender.wait_acknowledged()
                await asyncio.to_thread(save, self._log(partition), state, applied_offset)
                self._saved[partition] = saved[partition] = applied_offset
            if saved:
                took_us = self._clock.monotonic_us() - started_us
                self._next_snapshot_us = started_us + int(took_us / self._share)
            return saved

    def drop(self, partition: int) -> None:
        """Forget a partition that now belongs to another worker."""
        self.shards.pop(partition, None)
        self._saved.pop(partition, None)
        abandoned = self._restoring.pop(partition, None)
        if abandoned is not None:
            abandoned.add_done_callback(_forget)

    def _log(self, partition: int) -> StateLog:
        if partition not in self._logs:
            self._logs[partition] = self._open_log(partition)
        return self._logs[partition]

    def _restore(self, partition: int) -> BarShard:
        emitted = self._emitted_offset(partition)
        state = load(self._log(partition))
        if state is not None:
            try:
                shard = BarShard.restore(partition, self._config, self._codecs, state, emitted_offset=emitted)
            except StateError as exc:
                logger.error("Partition %d is rebuilt from its first record: %s", partition, exc)
            else:
                logger.info("Partition %d goes on after offset %d", partition, shard.applied_offset)
                return shard
        return BarShard(partition, self._config, self._codecs, emitted_offset=emitted)


def _forget(task: asyncio.Task[BarShard]) -> None:
    """Take the result of a restore that nobody wants any more: an exception that nobody takes is a warning."""
    if not task.cancelled():
        task.exception()
