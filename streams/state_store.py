"""State snapshots in a Kafka topic: chunks, then a manifest that names them; the newest whole one wins.

A Faust table was not used: its changelog decodes JSON whatever the serializer and hangs on recovery, and RocksDB loses increments
(pitfalls 9-13). Here a snapshot is a few large records in the partition's own state partition; the manifest is written only after the
broker has acknowledged every chunk, and names them by offset and checksum, so a crash at any point leaves the previous snapshot valid.
"""

from __future__ import annotations

import json
import logging
import zlib
from typing import Final, Protocol

from streams.errors import StateError

logger = logging.getLogger(__name__)

CHUNK_BYTES: Final = 4 * 1024 * 1024
"""Below the 8 MiB record limit with room for the broker's own overhead."""
_CHUNK: Final = b"chunk"
_MANIFEST: Final = b"manifest"
_FIRST_LOOK: Final = 8
"""Records read from the end at first: a manifest and the chunks of 28 MB; eight times more each time none is found."""


class StateLog(Protocol):
    """One partition of the state topic. Calls may block; they are made from a worker thread."""

    def append(self, key: bytes, value: bytes) -> int:
        """Write a record and wait for its acknowledgement; its offset."""
        ...

    def bounds(self) -> tuple[int, int]:
        """(offset of the oldest record, offset after the newest)."""
        ...

    def read(self, start: int, stop: int) -> list[tuple[int, bytes, bytes]]:
        """Records (offset, key, value) with ``start <= offset < stop``; fewer when some are gone."""
        ...


def save(log: StateLog, state: bytes, applied_offset: int) -> None:
    """Write a snapshot; when this returns it is durable."""
    chunks = [
        [log.append(_CHUNK, part), len(part), zlib.crc32(part)]
        for part in (state[start : start + CHUNK_BYTES] for start in range(0, len(state), CHUNK_BYTES))
    ]
    log.append(_MANIFEST, json.dumps({"version": 1, "applied_offset": applied_offset, "chunks": chunks}).encode())


def load(log: StateLog) -> bytes | None:
    """The newest whole snapshot, None when there is none. A damaged one is passed over for the one before it, and logged."""
    low, high = log.bounds()
    stop, look = high, _FIRST_LOOK
    while stop > low:
        start = max(low, stop - look)
        for offset, key, value in reversed(log.read(start, stop)):
            if key != _MANIFEST:
                continue
            try:
                return _assemble(log, value, low, offset)
            except StateError as exc:
                logger.warning("The state manifest at offset %d cannot be used (%s); trying the one before it", offset, exc)
        stop, look = start, look * 8
    return None


def _assemble(log: StateLog, manifest: bytes, oldest: int, before: int) -> bytes:
    """The state whose chunks a manifest names; they stand in ``[oldest, before)``."""
    try:
        chunks = [(int(offset), int(size), int(checksum)) for offset, size, checksum in json.loads(manifest)["chunks"]]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as exc:
        raise StateError(f"The manifest is damaged: {exc!r}") from exc
    if not chunks:
        raise StateError("The manifest names no chunks.")
    if not all(oldest <= offset < before for offset, _, _ in chunks):
        raise StateError(f"The manifest names chunks outside the offsets {oldest} to {before - 1}.")
    held = {offset: value for offset, _, value in log.read(chunks[0][0], chunks[-1][0] + 1)}
    parts = []
    for offset, size, checksum in chunks:
        part = held.get(offset)
        if part is None or len(part) != size or zlib.crc32(part) != checksum:
            raise StateError(f"The chunk at offset {offset} is gone or damaged.")
        parts.append(part)
    return b"".join(parts)
