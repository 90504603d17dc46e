"""A bounded queue of encoded records on disk, between a collector and its Kafka producer: records in, the same ones out, oldest first.

Nothing here knows a clock, an event loop or Kafka; files come through :class:`Files`, so that a simulated disk can take their place.

Layout of the folder: segments ``<position>.spool``, named by the position (bytes since the spool's beginning, 20 digits) of their first
record, only ever appended to; and ``acked``, the position up to which the broker has acknowledged everything. A record is
``crc32, length`` (4 bytes each, little-endian) and a body: time (us), partition, lengths of topic and key, topic, key, value.

What survives: a record is written to the page cache before :meth:`Spool.append` returns, so kill -9 of the process loses nothing of it;
power loss or a crash of the system loses what was not synced (``infra.spool_sink`` syncs once a second). What is damaged is found by its
checksum at :meth:`Spool.open` and cut off together with all that follows: those ids are then fetched over REST like any others that are missing.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from infra.errors import DataDirBrokenError, DiskFullError

logger = logging.getLogger(__name__)

_FRAME: Final = struct.Struct("<II")
_FIELDS: Final = struct.Struct("<qiHi")
_ACKED: Final = struct.Struct("<QI")
_SUFFIX: Final = ".spool"
_ACKED_NAME: Final = "acked"
_NO_KEY: Final = -1
_MAX_BODY: Final = 64 * 1024 * 1024
"""A longer length is damage, not a record: the broker takes 8 MiB."""


class Record(NamedTuple):
    """One Kafka record on its way."""

    time_us: int
    """When it was handed over, wall clock, UTC."""
    topic: str
    """Name without prefix."""
    partition: int
    key: bytes | None
    value: bytes


class Files(Protocol):
    """One folder. Blocking; every method raises OSError as the system does. Called from one thread at a time, except :meth:`sync`."""

    def names(self) -> list[str]:
        """Files in it, any order."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file."""
        ...

    def read(self, name: str, offset: int, size: int) -> bytes:
        """At most ``size`` bytes; fewer at the end of the file."""
        ...

    def append(self, name: str, data: bytes) -> None:
        """Write at the end, making the file when it is not there; in the page cache on return. A failure may leave a part of ``data``."""
        ...

    def sync(self, name: str) -> None:
        """Make what was appended before this call, and the file's name, survive power loss. A file that is gone is no error."""
        ...

    def truncate(self, name: str, size: int) -> None:
        """Cut to ``size`` bytes."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Write a small file whole, or leave the old one as it is."""
        ...

    def remove(self, name: str) -> None:
        """Delete; a file that is not there is no error."""
        ...

    def free_bytes(self) -> int:
        """Free space of the disk."""
        ...


class SpoolFullError(DiskFullError):
    """The spool has reached its bound or the disk its floor; nothing was written."""


class SpoolDamagedError(DataDirBrokenError):
    """A record that was written cannot be read back. Opening the spool anew cuts it off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpoolConfig:
    """Bounds."""

    max_bytes: int = 2048 * 1024 * 1024
    """Bytes on disk at most, segments that are partly acknowledged included."""
    segment_bytes: int = 16 * 1024 * 1024
    """A segment is closed when it is this large; space comes back in these pieces."""
    min_free_bytes: int = 256 * 1024 * 1024
    """Free space the spool leaves to others: the broker and the stores stop uncleanly on a full disk."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What was found in the folder."""

    waiting_bytes: int
    """Bytes of records that are not acknowledged yet."""
    cut_bytes: int
    """Bytes of torn or damaged records that were cut off."""


def encode(record: Record) -> bytes:
    """The record as it lies on disk."""
    topic, key = record.topic.encode(), record.key
    fields = _FIELDS.pack(record.time_us, record.partition, len(topic), _NO_KEY if key is None else len(key))
    body = b"".join((fields, topic, key or b"", record.value))
    return _FRAME.pack(zlib.crc32(body), len(body)) + body


def decode(data: bytes, start: int = 0) -> list[tuple[int, Record]]:
    """Whole, undamaged records from ``start`` on, each with the offset after it; ends before the first that is neither."""
    found: list[tuple[int, Record]] = []
    view = memoryview(data)
    while start + _FRAME.size <= len(data):
        checksum, size = _FRAME.unpack_from(data, start)
        begin, end = start + _FRAME.size, start + _FRAME.size + size
        if size < _FIELDS.size or size > _MAX_BODY or end > len(data) or zlib.crc32(view[begin:end]) != checksum:
            break
        time_us, partition, topic_size, key_size = _FIELDS.unpack_from(data, begin)
        topic_end = begin + _FIELDS.size + topic_size
        value_begin = topic_end + max(key_size, 0)
        key = None if key_size == _NO_KEY else data[topic_end:value_begin]
        found.append((end, Record(time_us, data[begin + _FIELDS.size : topic_end].decode(), partition, key, data[value_begin:end])))
        start = end
    return found


class Spool:
    """The queue. Positions are bytes since its beginning and never go back: ``acked <= tail``.

    Args:
        files: the folder; nobody else writes there.
        config: bounds.

    Call :meth:`open` first. Blocking; one call at a time, except :meth:`sync`.
    """

    def __init__(self, files: Files, config: SpoolConfig | None = None) -> None:
        self._files = files
        self._config = config or SpoolConfig()
        self._segments: list[list[int]] = []  # [start, end] each, oldest first, without holes
        self._unsynced: int | None = None  # start of the segment that holds bytes not synced
        self._saved = 0
        self.acked = 0
        self._unnoted = False  # the disk refused to take the position
        """Everything before it is acknowledged."""
        self.tail = 0
        """Position of the next record."""

    @property
    def is_empty(self) -> bool:
        """Nothing waits."""
        return self.acked == self.tail

    @property
    def disk_bytes(self) -> int:
        """Bytes of all segments."""
        return self._segments[-1][1] - self._segments[0][0] if self._segments else 0

    def open(self) -> Opened:
        """Find what an earlier process left; cuts off what is torn. Raises DataDirBrokenError for files that are none of ours."""
        names = self._files.names()
        self.acked = self._read_acked() if _ACKED_NAME in names else 0
        cut, expected = 0, -1
        for start, name in sorted((_start_of(name), name) for name in names if name.endswith(_SUFFIX)):
            if expected not in (-1, start):  # everything behind damage goes: what follows a hole would hide it
                cut += self._files.size(name)
                self._files.remove(name)
                continue
            end = start + self._valid_bytes(name)
            size = start + self._files.size(name) - end
            if size:
                cut += size
                self._files.truncate(name, end - start)
            if end > start:
                self._segments.append([start, end])
            else:
                self._files.remove(name)
            expected = end if not size else -2
        self.tail = max(self._segments[-1][1] if self._segments else 0, self.acked)
        if self._segments and self.tail > self._segments[-1][1]:  # acknowledged beyond what is left on disk: nothing here waits
            self._remove_all()
        self.acked = max(self.acked, self._segments[0][0] if self._segments else self.tail)
        self._saved = self.acked
        self._forget_acknowledged()
        return Opened(self.tail - self.acked, cut)

    def append(self, records: Sequence[Record]) -> list[int]:
        """Write records at the tail; the position after each. Raises SpoolFullError, OSError; then nothing of them is kept."""
        encoded = [encode(record) for record in records]
        data = b"".join(encoded)
        self._check_room(len(data))
        begun = not self._segments or self._segments[-1][1] - self._segments[-1][0] >= self._config.segment_bytes
        start = self.tail if begun else self._segments[-1][0]
        try:
            self._files.append(_name(start), data)
        except OSError as exc:
            if begun:
                self._files.remove(_name(start))
            else:
                self._files.truncate(_name(start), self.tail - start)
            raise SpoolFullError(f"The spool cannot be written ({exc.strerror}); free some space where it lies.") from exc
        if begun:
            self._segments.append([start, start])
        if self._unsynced is None:
            self._unsynced = start
        positions = []
        for part in encoded:
            self.tail += len(part)
            positions.append(self.tail)
        self._segments[-1][1] = self.tail
        return positions

    def read(self, position: int, max_bytes: int) -> list[tuple[int, Record]]:
        """Records from ``position`` on with the position after each; about ``max_bytes``, at least one; [] at the tail.

        Raises SpoolDamagedError.
        """
        if position >= self.tail:
            return []
        start, end = next((start, end) for start, end in self._segments if start <= position < end)
        size = min(max(max_bytes, _FRAME.size), end - position)
        data = self._files.read(_name(start), position - start, size)
        found = decode(data)
        if not found and len(data) >= _FRAME.size:  # one record is larger than that
            needed = _FRAME.size + _FRAME.unpack_from(data)[1]
            found = decode(self._files.read(_name(start), position - start, min(needed, end - position)))
        if not found:
            raise SpoolDamagedError(
                f"The spool's record at {position} of {_name(start)} cannot be read back: the disk damages what is written."
            )
        return [(position + offset, record) for offset, record in found]

    def acknowledge(self, position: int) -> None:
        """Everything before ``position`` is acknowledged: note it and delete the segments that are done with."""
        self.acked = max(self.acked, min(position, self.tail))
        self._forget_acknowledged()  # first: on a full disk it makes the room that noting the position takes
        if self.acked == self._saved:
            return
        try:
            # not synced: an older position after power loss sends a few records twice, which everybody behind drops by id
            self._files.replace(_ACKED_NAME, _ACKED.pack(self.acked, zlib.crc32(_ACKED.pack(self.acked, 0))))
        except OSError as exc:  # the same: an older position
            if not self._unnoted:
                logger.warning("The spool's position cannot be noted (%s); free some space where it lies.", exc.strerror)
            self._unnoted = True
        else:
            self._saved, self._unnoted = self.acked, False

    def sync(self) -> None:
        """Make everything appended before this call survive power loss."""
        first, self._unsynced = self._unsynced, None
        if first is None:
            return
        for start in [start for start, _ in list(self._segments) if start >= first]:
            self._files.sync(_name(start))

    def _check_room(self, size: int) -> None:
        config = self._config
        if self.disk_bytes + size > config.max_bytes:
            raise SpoolFullError(
                f"The spool holds {self.disk_bytes / 1e6:.0f} MB and may hold {config.max_bytes / 1e6:.0f} (MARKETSTREAM_COLLECTOR_SPOOL_MAX_MB)."
            )
        free = self._files.free_bytes()
        if free - size < config.min_free_bytes:
            raise SpoolFullError(
                f"Only {free / 1e6:.0f} MB are free where the spool lies; it leaves {config.min_free_bytes / 1e6:.0f} MB to others."
            )

    def _forget_acknowledged(self) -> None:
        while self._segments and self._segments[0][1] <= self.acked:
            start, _ = self._segments.pop(0)
            self._files.remove(_name(start))

    def _remove_all(self) -> None:
        for start, _ in self._segments:
            self._files.remove(_name(start))
        self._segments.clear()

    def _read_acked(self) -> int:
        data = self._files.read(_ACKED_NAME, 0, _ACKED.size)
        if len(data) != _ACKED.size:
            return 0
        position, checksum = _ACKED.unpack(data)
        return int(position) if checksum == zlib.crc32(_ACKED.pack(position, 0)) else 0

    def _valid_bytes(self, name: str) -> int:
        """Bytes up to the first damage."""
        data = self._files.read(name, 0, self._files.size(name))
        found = decode(data)
        return found[-1][0] if found else 0


def _name(start: int) -> str:
    return f"{start:020d}{_SUFFIX}"


def _start_of(name: str) -> int:
    try:
        return int(name.removesuffix(_SUFFIX))
    except ValueError:
        raise DataDirBrokenError(f"The spool's folder holds a file that is none of ours: {name!r}; move it away.") from None
