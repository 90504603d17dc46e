"""A snapshot is there whole or not at all, whatever a crash left behind."""

from __future__ import annotations

import pytest

from streams.state_store import CHUNK_BYTES, load, save


class MemoryLog:
    """A state partition in memory; ``die_after`` appends it stops, as a killed process does."""

    def __init__(self) -> None:
        self.records: list[tuple[int, bytes, bytes]] = []
        self.first = 0
        self.next = 0
        self.die_after = 10**9

    def append(self, key: bytes, value: bytes) -> int:
        """Write a record."""
        if self.die_after == 0:
            raise ConnectionError
        self.die_after -= 1
        self.records.append((self.next, key, value))
        self.next += 1
        return self.next - 1

    def bounds(self) -> tuple[int, int]:
        """Oldest and end."""
        return self.first, self.next

    def read(self, start: int, stop: int) -> list[tuple[int, bytes, bytes]]:
        """Records between."""
        return [record for record in self.records if start <= record[0] < stop and record[0] >= self.first]


BIG = bytes(range(256)) * (CHUNK_BYTES // 100)  # three chunks


def test_the_newest_snapshot_comes_back() -> None:
    """Small and large states are read back whole; the last one wins."""
    log = MemoryLog()
    assert load(log) is None
    save(log, b"first", 1)
    save(log, BIG, 2)
    assert load(log) == BIG
    save(log, b"third", 3)
    assert load(log) == b"third"


@pytest.mark.parametrize("appends", range(4))
def test_a_crash_in_the_middle_leaves_the_one_before(appends: int) -> None:
    """Killed after any number of its records, an unfinished snapshot does not count."""
    log = MemoryLog()
    save(log, b"before", 1)
    log.die_after = appends
    with pytest.raises(ConnectionError):
        save(log, BIG, 2)
    assert load(log) == b"before"


def test_a_damaged_snapshot_is_passed_over() -> None:
    """A flipped bit in a chunk or a garbled manifest falls back to the snapshot before it."""
    log = MemoryLog()
    save(log, b"before", 1)
    save(log, BIG, 2)
    offset, key, value = log.records[3]
    log.records[3] = (offset, key, b"\xff" + value[1:])
    assert load(log) == b"before"
    log.append(b"manifest", b"{not json")
    assert load(log) == b"before"


def test_many_unfinished_snapshots_do_not_hide_the_last_whole_one() -> None:
    """Hundreds of orphaned chunks behind it are searched through."""
    log = MemoryLog()
    save(log, b"whole", 1)
    for _ in range(300):
        log.append(b"chunk", b"orphan")
    assert load(log) == b"whole"


def test_a_snapshot_cut_by_retention_does_not_count() -> None:
    """When its first chunk is deleted nothing is loaded rather than half a state."""
    log = MemoryLog()
    save(log, BIG, 1)
    log.first = 1
    assert load(log) is None
