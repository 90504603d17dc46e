"""What a collector sends into: straight to Kafka while the broker keeps up, through the disk spool while it does not.

Frames and rows in; records at an :class:`Outlet` (the producer) out, per partition in the order they came, each at least once.

While the broker answers, nothing touches the disk: records wait for their acknowledgement in memory only (measured: under 3 us a frame).
Once the oldest has waited ``spill_after_s`` or more than ``window_bytes`` wait, they are written to the spool in order, and everything
new goes to its tail until the producer has been given all of it, oldest first. So kill -9 during an outage loses at most the last
``spill_after_s`` before it was noticed, which the next start fetches by id; power loss costs one ``sync_every_s`` more.

Memory: ``window_bytes`` of records not acknowledged, once here and once in the producer, and ``read_bytes``, however long the broker is away.
Full (its bound, or the disk's floor): :meth:`SpoolSink.send` waits, and with it whoever reads the socket.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from infra.spool import Record, Spool, SpoolFullError
from schemas.frames import Frame
from schemas.seam import Clock

logger = logging.getLogger(__name__)

T = TypeVar("T")
Offload = Callable[..., Awaitable[Any]]
"""``await offload(function, *arguments)``: runs something that blocks on the disk; ``asyncio.to_thread`` unless told otherwise."""
_OVERHEAD_BYTES: Final = 100
"""What a small record costs beyond its value; heartbeats count too."""
_FULL_RETRY_S: Final = 0.05
_AWAY_S: Final = 5.0
"""Nothing acknowledged for this long: the broker is away, and readiness says so."""
_BEHIND_S: Final = 10.0


class Outlet(Protocol):
    """The producer. Records of one partition are acknowledged in the order they were given; see ``infra.kafka.FrameProducer``."""

    def encode(self, topic_name: str, frame: Frame) -> bytes:
        """Bytes of a frame's record."""
        ...

    def encode_row(self, topic_name: str, row: Mapping[str, Any]) -> bytes:
        """Bytes of a row's record."""
        ...

    def try_send(self, topic_name: str, partition: int, key: bytes | None, value: bytes) -> bool:
        """Take a record; False when the queue is full. Raises when the broker has refused an earlier record for good."""
        ...

    def poll(self) -> None:
        """Learn what was acknowledged."""
        ...

    def sent_count(self, topic_name: str, partition: int) -> int:
        """Records taken so far."""
        ...

    def acked_count(self, topic_name: str, partition: int) -> int:
        """Of these, how many are acknowledged."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SpoolSinkConfig:
    """When the disk comes in."""

    window_bytes: int = 16 * 1024 * 1024
    """Records at the producer that are not acknowledged; more go to disk. At 435,000 trades/s 0.7 s worth."""
    spill_after_s: float = 1.0
    """A record that waits this long for its acknowledgement is written to disk, with all that came after it."""
    sync_every_s: float = 1.0
    """Between two syncs while spooling."""
    save_every_s: float = 0.25
    """Between two notes of what is acknowledged while draining; what a crash makes us send twice."""
    read_bytes: int = 1024 * 1024
    """Read from the spool at a time."""
    idle_s: float = 0.2
    """Between two looks while nothing is spooled."""


@dataclass(slots=True)
class _Waiting:
    """A record at the producer that is not acknowledged."""

    place: tuple[str, int]
    number: int  # acknowledged once the place's count reaches it
    size: int
    time_us: int
    since_us: int  # monotonic
    record: Record | None  # None: it is in the spool
    end: int = -1  # position after it in the spool
    done: bool = False  # acknowledged


class SpoolSink:
    """`collectors.wire.FrameSink` that outlives the broker. One per process, on one event loop; :meth:`run` beside it.

    Args:
        outlet: the producer.
        spool: opened already; what it holds is sent before anything new.
        clock, config, offload: as named.
    """

    def __init__(
        self, outlet: Outlet, spool: Spool, clock: Clock, config: SpoolSinkConfig | None = None, *, offload: Offload = asyncio.to_thread
    ) -> None:
        self._outlet, self._spool, self._clock, self._offload = outlet, spool, clock, offload
        self._config = config or SpoolSinkConfig()
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._lock = asyncio.Lock()
        self._writing = False  # records that wait are being written: nobody may take them off meanwhile
        self._spooling = not spool.is_empty
        self._read = spool.acked  # next position to give to the producer
        self._acked = spool.acked
        self._acked_at_us = clock.monotonic_us()
        self._saved_us = self._synced_us = self._acked_at_us
        self._closing = False
        self._full = ""
        self.taken_records = 0
        """Records taken so far, by the producer or the disk."""
        self.spooled_records = 0
        """Records that were written to disk so far."""
        self.full_waits = 0
        """Times a sender had to wait because the spool was full."""

    # What others ask.

    @property
    def is_spooling(self) -> bool:
        """New records go to disk."""
        return self._spooling

    @property
    def is_full(self) -> bool:
        """Senders wait: neither the broker nor the disk takes more."""
        return bool(self._full)

    @property
    def waiting_bytes(self) -> int:
        """Bytes in memory that are not acknowledged."""
        return self._waiting_bytes

    @property
    def spool_bytes(self) -> int:
        """Bytes of the spool that are not acknowledged."""
        return self._spool.tail - self._acked

    @property
    def disk_bytes(self) -> int:
        """Bytes the spool takes on disk."""
        return self._spool.disk_bytes

    def oldest_age_s(self) -> float:
        """Age of the oldest record that is not acknowledged, seconds; 0 when there is none."""
        try:
            oldest = self._waiting[0]
        except IndexError:  # asked from the health server's thread: it may be gone between a look and the next
            return 0.0
        return max(0, self._clock.now_us() - oldest.time_us) / 1e6

    def reasons(self) -> dict[str, str]:
        """Why what is sent does not arrive."""
        if not self._spooling and not self._full:
            return {}
        found = {}
        silent_s = (self._clock.monotonic_us() - self._acked_at_us) / 1e6
        age_s, megabytes = self.oldest_age_s(), self.spool_bytes / 1e6
        if silent_s > _AWAY_S:
            found["kafka"] = f"Kafka has acknowledged nothing for {silent_s:.0f} s; {megabytes:.1f} MB wait on disk."
        elif age_s > _BEHIND_S:
            found["spool"] = f"{megabytes:.1f} MB of the spool are still to be sent; the oldest record is {age_s:.0f} s old."
        if self._full:
            found["spool"] = f"{self._full} Nothing more is read from the venue until the broker is back; what is missed is fetched by id."
        return found

    # Sending.

    async def send(self, topic_name: str, partition: int, frame: Frame) -> None:
        """See FrameSink.send. Raises EncodeError, and what the outlet raises."""
        await self._put(topic_name, partition, None, self._outlet.encode(topic_name, frame))

    async def send_row(self, topic_name: str, key: str, row: Mapping[str, Any], partition: int = 0) -> None:
        """One row record, as :meth:`send`."""
        await self._put(topic_name, partition, key.encode(), self._outlet.encode_row(topic_name, row))

    async def _put(self, topic_name: str, partition: int, key: bytes | None, value: bytes) -> None:
        record = Record(self._clock.now_us(), topic_name, partition, key, value)
        if not self._lock.locked() and self._straight(record):
            self.taken_records += 1
            return
        while True:
            async with self._lock:
                if self._straight(record) or await self._store(record):
                    self.taken_records += 1
                    return
            await self._clock.sleep(_FULL_RETRY_S)

    def _straight(self, record: Record) -> bool:
        """To the producer, unless records wait on disk or too long."""
        if self._spooling:
            return False
        self._reap()
        if self._waiting and (self._waiting_bytes > self._config.window_bytes or self._is_late()):
            return False
        if not self._hand_over(record, -1):
            return False
        self._full = ""
        return True

    def _is_late(self) -> bool:
        return bool(self._waiting) and self._clock.monotonic_us() - self._waiting[0].since_us > self._config.spill_after_s * 1e6

    def _hand_over(self, record: Record, end: int) -> bool:
        topic_name, partition = record.topic, record.partition
        if not self._outlet.try_send(topic_name, partition, record.key, record.value):
            return False
        size = len(record.value) + _OVERHEAD_BYTES
        number = self._outlet.sent_count(topic_name, partition)
        kept = record if end < 0 else None
        self._waiting.append(_Waiting((topic_name, partition), number, size, record.time_us, self._clock.monotonic_us(), kept, end))
        self._waiting_bytes += size
        return True

    def _reap(self) -> None:
        """Take off what is acknowledged, in the order it was sent."""
        if self._writing:
            return
        waiting, acked_count = self._waiting, self._outlet.acked_count
        moved = False
        while waiting and acked_count(*waiting[0].place) >= waiting[0].number:
            done = waiting.popleft()
            done.done = True
            self._waiting_bytes -= done.size
            moved = True
            if done.end >= 0:
                self._acked = done.end
        if moved or not waiting:
            self._acked_at_us = self._clock.monotonic_us()

    async def _store(self, record: Record) -> bool:
        """To the spool's tail; False when it is full. The lock is held."""
        try:
            if not self._spooling:
                await self._spill()
            await self._offload(self._spool.append, [record])
        except SpoolFullError as exc:
            if not self._full:
                logger.error("%s Reading stops until there is room.", exc)
            self._full = str(exc)
            self.full_waits += 1
            return False
        self._full = ""
        self.spooled_records += 1
        return True

    async def _spill(self) -> None:
        """Write what waits in memory to the spool; from here on everything goes there. The lock is held. Raises SpoolFullError."""
        kept = [(entry, entry.record) for entry in self._waiting if entry.record is not None]
        self._writing = True
        try:
            ends = await self._offload(self._spool.append, [record for _, record in kept]) if kept else []
        finally:
            self._writing = False
        for (entry, _), end in zip(kept, ends, strict=True):
            entry.record, entry.end = None, end
        if not self._spooling and not self._closing:
            logger.warning("The broker does not keep up: %d records wait on disk, and what comes follows them there.", len(kept))
        self._spooling = True
        self._read = self._spool.tail
        self.spooled_records += len(kept)

    # Beside it.

    async def run(self) -> None:
        """Drain, sync and note until cancelled. Raises what the outlet raises; everything that waits is then on disk."""
        while True:
            self._outlet.poll()
            self._reap()
            if not self._spooling and self._is_late():
                await self._spill_now()
            moved = self._spooling and await self._drain()
            await self._note()
            await self._clock.sleep(0.0 if moved else 0.005 if self._spooling else self._config.idle_s)

    async def drained(self) -> None:
        """Until everything taken so far, by the spool or the producer, is acknowledged. :meth:`run` must be running."""
        while self._spooling or self._waiting:
            await self._clock.sleep(0.01)

    async def wait_acknowledged(self) -> None:
        """See FrameSink.wait_acknowledged: what is on disk survives this process as well as what the broker acknowledged."""
        if not self._waiting:
            return
        newest = self._waiting[-1]
        while not newest.done and newest.record is not None:
            self._outlet.poll()
            self._reap()
            await self._clock.sleep(0.002)

    async def close(self, timeout_s: float) -> bool:
        """Wait for acknowledgements, then keep on disk what has none; True when nothing is left. Nothing may be sent afterwards.

        Raises SpoolFullError when the rest cannot be kept; it is then fetched by id at the next start.
        """
        self._closing = True
        until_us = self._clock.monotonic_us() + int(timeout_s * 1e6)
        while self._waiting and self._clock.monotonic_us() < until_us:
            self._outlet.poll()
            self._reap()
            await self._clock.sleep(0.002)
        async with self._lock:
            self._reap()
            if any(entry.record is not None for entry in self._waiting):
                await self._spill()
            await self._offload(self._spool.acknowledge, self._acked)
            await self._offload(self._spool.sync)
        if not self._spool.is_empty:
            logger.warning("%.1f MB are kept on disk and sent at the next start.", self.spool_bytes / 1e6)
        return self._spool.is_empty

    async def _spill_now(self) -> None:
        async with self._lock:
            if not self._spooling:
                try:
                    await self._spill()
                except SpoolFullError as exc:
                    self._full = str(exc)  # the window bounds what waits in memory; senders will try again

    async def _drain(self) -> bool:
        """Give the producer a piece of the spool; False when there is nothing to do or no room."""
        if self._closing or self._waiting_bytes > self._config.window_bytes:
            return False
        async with self._lock:
            batch = await self._offload(self._spool.read, self._read, self._config.read_bytes)
            if not batch:
                if self._is_late():  # the broker is still busy with what it was given: what comes would be late at once, and spill again
                    return False
                self._spooling = False
                self._full = ""
                logger.info("The spool is sent: records go straight to the broker again.")
                return False
        for end, record in batch:
            while not self._closing and (self._waiting_bytes > self._config.window_bytes or not self._hand_over(record, end)):
                self._outlet.poll()
                self._reap()
                await self._note()
                await self._clock.sleep(0.005)
            if self._closing:
                return False
            self._read = end
        return True

    async def _note(self) -> None:
        """Tell the disk what is acknowledged, and sync, when it is time."""
        if self._spool.disk_bytes == 0:
            return
        now_us = self._clock.monotonic_us()
        done = not self._spooling and self._acked == self._spool.tail
        if self._acked > self._spool.acked and (done or now_us - self._saved_us > self._config.save_every_s * 1e6):
            self._saved_us = now_us
            async with self._lock:
                await self._offload(self._spool.acknowledge, self._acked)
        if now_us - self._synced_us > self._config.sync_every_s * 1e6:
            self._synced_us = now_us
            await self._offload(self._spool.sync)
