"""The spool: what goes in comes out, in order, whatever the disk does; and the sink that uses it only while the broker does not keep up."""

from __future__ import annotations

import asyncio
import errno
import random
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.collector import CollectorProcess
from infra.collector_metrics import CollectorMetrics
from infra.errors import DataDirBrokenError, DataDirOwnedError
from infra.registry_client import RegistryClient
from infra.settings import load_settings
from infra.spool import Opened, Record, Spool, SpoolConfig, SpoolDamagedError, SpoolFullError, decode, encode
from infra.spool_files import DiskFiles
from infra.spool_sink import SpoolSink, SpoolSinkConfig
from schemas.frames import Frame


class Disk:
    """`Files` in memory that knows what was synced; ``room`` bytes of it, then ENOSPC after a part of the data."""

    def __init__(self, room: int = 1 << 40) -> None:
        self.files: dict[str, bytearray] = {}
        self.synced: dict[str, int] = {}
        self.room = room
        self.writes = 0

    def used(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.files.values()))

    def names(self) -> list[str]:
        """See Files."""
        return list(self.files)

    def size(self, name: str) -> int:
        """See Files."""
        return len(self.files[name])

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See Files."""
        return bytes(self.files[name][offset : offset + size])

    def append(self, name: str, data: bytes) -> None:
        """See Files."""
        self.writes += 1
        fits = data[: max(self.room - self.used(), 0)]
        self.files.setdefault(name, bytearray()).extend(fits)
        if len(fits) < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def sync(self, name: str) -> None:
        """See Files."""
        if name in self.files:
            self.synced[name] = len(self.files[name])

    def truncate(self, name: str, size: int) -> None:
        """See Files."""
        del self.files[name][size:]

    def replace(self, name: str, data: bytes) -> None:
        """See Files."""
        self.files[name] = bytearray(data)

    def remove(self, name: str) -> None:
        """See Files."""
        self.files.pop(name, None)
        self.synced.pop(name, None)

    def free_bytes(self) -> int:
        """See Files."""
        return self.room - self.used() if self.room < 1 << 40 else 1 << 40

    def lose_power(self, rng: random.Random) -> None:
        """What was not synced is gone, but for some of it, which may be torn."""
        for name, data in list(self.files.items()):
            keep = max(self.synced.get(name, 0), rng.randint(0, len(data)))
            del data[keep:]
            if keep > self.synced.get(name, 0) and rng.random() < 0.5:
                data[rng.randrange(self.synced.get(name, 0), keep)] ^= 0xFF


def record(number: int, size: int = 50, partition: int = 0) -> Record:
    """A record that can be told from any other."""
    return Record(number, "trades", partition, None, number.to_bytes(8, "big") * (size // 8 + 1))


def number_of(value: bytes) -> int:
    """Inverse of :func:`record`."""
    return int.from_bytes(value[:8], "big")


def content(spool: Spool) -> list[int]:
    """Numbers of everything that waits."""
    found, position = [], spool.acked
    while batch := spool.read(position, 500):
        found += [number_of(item.value) for _, item in batch]
        position = batch[-1][0]
    return found


def opened(disk: Disk, **config: Any) -> Spool:
    """A spool as a new process finds it; segments of 1 kB."""
    spool = Spool(disk, SpoolConfig(**{"segment_bytes": 1_000, "min_free_bytes": 0, **config}))
    spool.open()
    return spool


@given(
    st.integers(-(2**62), 2**62),
    st.text(max_size=20),
    st.integers(-1, 2**31 - 1),
    st.none() | st.binary(max_size=9),
    st.binary(max_size=99),
)
def test_a_record_comes_back_as_it_was(time_us: int, topic: str, partition: int, key: bytes | None, value: bytes) -> None:
    """Every field, an empty key and no key told apart."""
    made = Record(time_us, topic, partition, key, value)
    data = encode(made)
    assert decode(data + data) == [(len(data), made), (2 * len(data), made)]


@given(st.integers(0, 2**32), st.data())
@settings(max_examples=50, deadline=None)
def test_no_single_flipped_byte_goes_unnoticed(number: int, data: st.DataObject) -> None:
    """Nor does a record that is cut anywhere."""
    whole = encode(record(number))
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[place] ^= data.draw(st.integers(1, 255))
    assert decode(bytes(damaged)) == []
    assert decode(whole[:place]) == []


def test_records_leave_in_order_across_segments_and_space_comes_back() -> None:
    """Segments go once everything in them is acknowledged, not before."""
    disk = Disk()
    spool = opened(disk)
    ends = [end for number in range(100) for end in spool.append([record(number)])]
    assert content(spool) == list(range(100)) and len(disk.files) > 5
    spool.acknowledge(ends[49])
    assert content(spool) == list(range(50, 100))
    assert spool.disk_bytes <= spool.tail - ends[49] + 1_100
    spool.acknowledge(ends[-1])
    assert spool.is_empty and list(disk.files) == ["acked"]
    spool.append([record(7)])
    assert content(opened(disk)) == [7]


def test_a_restart_goes_on_after_what_was_acknowledged() -> None:
    """Also where nothing waits, and where the note of it is lost or damaged."""
    disk = Disk()
    spool = opened(disk)
    ends = spool.append([record(number) for number in range(5)]) + spool.append([record(number) for number in range(5, 60)])
    spool.acknowledge(ends[20])
    assert content(opened(disk)) == list(range(21, 60))
    disk.files["acked"][0] ^= 1
    again = opened(disk)
    assert content(again) == list(range(again.read(again.acked, 1)[0][1].time_us, 60))  # from a segment's beginning: some are sent twice
    again.acknowledge(again.tail)
    assert opened(disk).is_empty and opened(disk).tail == again.tail


@pytest.mark.parametrize("seed", range(30))
def test_after_power_loss_a_prefix_is_left_that_holds_what_was_synced(seed: int) -> None:
    """Torn or damaged records go with all that follows, and what comes later is kept."""
    rng = random.Random(seed)
    disk = Disk()
    spool = opened(disk)
    ends: list[int] = []
    synced = 0
    for number in range(200):
        ends += spool.append([record(number, rng.randint(8, 200))])
        if rng.random() < 0.05:
            spool.sync()
            synced = len(ends)
        if rng.random() < 0.05:
            spool.acknowledge(ends[rng.randint(0, synced - 1)] if synced else 0)
    disk.lose_power(rng)
    spool = opened(disk)
    left = content(spool)
    first = next((place for place, end in enumerate(ends) if end > spool.acked), len(ends))
    assert left == list(range(first, first + len(left))) or not left
    assert not left or left[-1] >= synced - 1
    assert spool.tail >= (ends[synced - 1] if synced else 0)
    spool.append([record(999)])
    assert content(opened(disk)) == [*left, 999]


def test_damage_in_an_older_segment_cuts_everything_behind_it() -> None:
    """A hole that later records hide would be found by nobody."""
    disk = Disk()
    opened(disk).append([record(number) for number in range(10)])
    spool = opened(disk)
    for number in range(10, 100):
        spool.append([record(number)])
    names = sorted(disk.files)
    disk.files[names[1]][200] ^= 1
    spool = Spool(disk, SpoolConfig(segment_bytes=1_000, min_free_bytes=0))
    found = spool.open()
    left = content(spool)
    assert 10 <= len(left) < 40 and left == list(range(len(left)))
    assert found == Opened(spool.tail, found.cut_bytes) and found.cut_bytes > 1_000
    assert len(disk.files) == 2


def test_damage_that_appears_while_it_runs_is_an_error_and_not_a_hole() -> None:
    """The process ends; the next one cuts."""
    disk = Disk()
    spool = opened(disk)
    spool.append([record(1), record(2)])
    disk.files[disk.names()[0]][30] ^= 1
    with pytest.raises(SpoolDamagedError, match="cannot be read back"):
        spool.read(0, 10_000)


def test_a_full_spool_refuses_whole_and_takes_again_when_there_is_room() -> None:
    """Its own bound, the disk's floor, and a disk that fills in the middle of a write."""
    spool = opened(Disk(), max_bytes=5_000)
    ends: list[int] = []
    with pytest.raises(SpoolFullError, match="MARKETSTREAM_COLLECTOR_SPOOL_MAX_MB"):
        while True:
            ends += spool.append([record(len(ends))])
    assert spool.disk_bytes <= 5_000 and content(spool) == list(range(len(ends)))
    spool.acknowledge(ends[len(ends) // 2])
    spool.append([record(len(ends))])
    with pytest.raises(SpoolFullError, match="leaves 0 MB to others"):
        opened(Disk(room=100), min_free_bytes=90).append([record(1)])
    disk = Disk(room=1_500)
    spool = opened(disk)
    disk.free_bytes = lambda: 10**9  # type: ignore[method-assign]
    kept = 0
    with pytest.raises(SpoolFullError, match="No space left"):
        while True:
            spool.append([record(kept)])
            kept += 1
    assert content(spool) == list(range(kept)) == content(opened(disk))


def test_one_process_at_a_time_holds_the_folder(tmp_path: Path) -> None:
    """The second waits a moment, then says who is in the way; a foreign file is told too."""
    files = DiskFiles(tmp_path / "spool")
    with pytest.raises(DataDirOwnedError, match="another collector"):
        DiskFiles(tmp_path / "spool", wait_s=0.1)
    files.close()
    (tmp_path / "spool" / "notes.spool").write_text("x")
    files = DiskFiles(tmp_path / "spool")
    with pytest.raises(DataDirBrokenError, match=r"none of ours: 'notes.spool'"):
        Spool(files).open()
    files.close()


def test_the_real_disk_keeps_what_a_process_left(tmp_path: Path) -> None:
    """The same files through the operating system, a torn tail included."""
    files = DiskFiles(tmp_path / "spool")
    spool = Spool(files, SpoolConfig(segment_bytes=1_000, min_free_bytes=0))
    spool.open()
    ends = [end for number in range(100) for end in spool.append([record(number)])]
    spool.sync()
    spool.acknowledge(ends[29])
    files.close()
    newest = sorted((tmp_path / "spool").glob("*.spool"))[-1]
    with newest.open("r+b") as stream:
        stream.truncate(newest.stat().st_size - 3)
    files = DiskFiles(tmp_path / "spool")
    again = Spool(files, SpoolConfig(segment_bytes=1_000, min_free_bytes=0))
    assert again.open().cut_bytes > 0
    assert content(again) == list(range(30, 99))
    files.close()


# The sink.


class Time:
    """A clock that moves when it is slept on."""

    random = Random(1)

    def __init__(self) -> None:
        self.now = 1_000_000_000

    def now_us(self) -> int:
        """See Clock."""
        return self.now

    def monotonic_us(self) -> int:
        """See Clock."""
        return self.now

    async def sleep(self, seconds: float) -> None:
        """See Clock."""
        self.now += int(seconds * 1e6) + 1
        await asyncio.sleep(0)


class Broker:
    """An `Outlet` whose broker can be away, and whose queue holds ``queue`` records."""

    def __init__(self, queue: int = 1_000) -> None:
        self.away = False
        self.queue = queue
        self.held: list[tuple[str, int, bytes]] = []
        self.log: list[tuple[int, int]] = []
        self.sent: dict[tuple[str, int], int] = {}
        self.acked: dict[tuple[str, int], int] = {}

    def encode(self, topic_name: str, frame: Frame) -> bytes:
        """See Outlet."""
        return record(frame.watermark_us).value

    def encode_row(self, topic_name: str, row: Mapping[str, Any]) -> bytes:
        """See Outlet."""
        return record(row["number"]).value

    def try_send(self, topic_name: str, partition: int, key: bytes | None, value: bytes) -> bool:
        """See Outlet."""
        if len(self.held) >= self.queue:
            return False
        self.held.append((topic_name, partition, value))
        self.sent[(topic_name, partition)] = self.sent.get((topic_name, partition), 0) + 1
        if not self.away:
            self.poll()
        return True

    def poll(self) -> None:
        """See Outlet."""
        if not self.away:
            for topic_name, partition, value in self.held:
                self.log.append((partition, number_of(value)))
                self.acked[(topic_name, partition)] = self.acked.get((topic_name, partition), 0) + 1
            self.held.clear()

    def sent_count(self, topic_name: str, partition: int) -> int:
        """See Outlet."""
        return self.sent.get((topic_name, partition), 0)

    def acked_count(self, topic_name: str, partition: int) -> int:
        """See Outlet."""
        return self.acked.get((topic_name, partition), 0)

    def restarted(self) -> None:
        """The process that held the producer is gone, with what it held."""
        self.held.clear()
        self.sent.clear()
        self.acked.clear()

    def numbers(self, partition: int) -> list[int]:
        """What arrived in a partition."""
        return [number for of, number in self.log if of == partition]


async def inline(function: Any, *arguments: Any) -> Any:
    """Offload to nowhere, giving others a turn as a thread would."""
    await asyncio.sleep(0)
    result = function(*arguments)
    await asyncio.sleep(0)
    return result


def sink_over(broker: Broker, disk: Disk, clock: Time, **config: Any) -> SpoolSink:
    """A sink as a new process makes it."""
    return SpoolSink(broker, opened(disk, **config), clock, SpoolSinkConfig(window_bytes=2_000, read_bytes=500), offload=inline)


async def test_while_the_broker_answers_the_disk_is_never_touched() -> None:
    """10,000 frames, not one write."""
    broker, disk, clock = Broker(), Disk(), Time()
    sink = sink_over(broker, disk, clock)
    for number in range(10_000):
        await sink.send("trades", number % 4, Frame(source="s", watermark_us=number))
    assert disk.writes == 0 and sink.waiting_bytes <= 2_000 and sink.reasons() == {}
    assert broker.numbers(1) == list(range(1, 10_000, 4))


async def feed(sink: SpoolSink, clock: Time, first: int, last: int) -> None:
    """Frames ``first`` to ``last``, 10 ms apart, over two partitions."""
    for number in range(first, last):
        await sink.send("trades", number % 2, Frame(source="s", watermark_us=number))
        await clock.sleep(0.01)


async def test_a_broker_that_is_away_costs_disk_and_everything_arrives_in_order() -> None:
    """Nothing lost, nothing doubled; the reason names the broker, and goes."""
    broker, disk, clock = Broker(), Disk(), Time()
    sink = sink_over(broker, disk, clock)
    running = asyncio.create_task(sink.run())
    await feed(sink, clock, 0, 100)
    broker.away = True
    await feed(sink, clock, 100, 3_000)
    assert "acknowledged nothing" in sink.reasons()["kafka"]
    assert sink.waiting_bytes <= 2_000 + 200 and sink.spool_bytes > 100_000 and sink.oldest_age_s() > 25
    broker.away = False
    await feed(sink, clock, 3_000, 3_500)
    await sink.drained()
    await feed(sink, clock, 3_500, 3_600)
    assert await sink.close(1.0)
    running.cancel()
    assert broker.numbers(0) == list(range(0, 3_600, 2))
    assert broker.numbers(1) == list(range(1, 3_600, 2))
    assert sink.reasons() == {} and disk.used() < 100


@pytest.mark.parametrize("seed", range(20))
async def test_killed_anywhere_the_next_process_sends_what_the_first_had_spooled(seed: int) -> None:
    """In order; doubled is at most what was acknowledged after the last note."""
    rng = random.Random(seed)
    broker, disk, clock = Broker(), Disk(), Time()
    number = 0
    for _ in range(4):
        broker.restarted()
        broker.away = True
        sink = sink_over(broker, disk, clock)
        running = asyncio.create_task(sink.run())
        for _ in range(rng.randint(1, 4)):
            stop = number + rng.randint(50, 300)
            await feed(sink, clock, number, stop)
            number = stop
            broker.away = not broker.away
        broker.away = True
        await feed(sink, clock, number, number + 150)  # an outage that is noticed, then the end of the process
        number += 150
        await clock.sleep(2)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    broker.restarted()
    broker.away = False
    sink = sink_over(broker, disk, clock)
    running = asyncio.create_task(sink.run())
    await sink.drained()
    assert await sink.close(1.0)
    running.cancel()
    for partition in (0, 1):
        once = list(dict.fromkeys(broker.numbers(partition)))
        assert once == list(range(partition, number, 2))
    assert len(broker.log) - number < 200


async def test_a_full_spool_makes_senders_wait_and_goes_on_in_order() -> None:
    """Backpressure, told by name."""
    broker, disk, clock = Broker(), Disk(), Time()
    sink = sink_over(broker, disk, clock, max_bytes=10_000)
    running = asyncio.create_task(sink.run())
    broker.away = True
    feeding = asyncio.create_task(feed(sink, clock, 0, 1_000))
    for _ in range(5_000):
        await clock.sleep(0.01)
    assert not feeding.done() and sink.is_full and sink.full_waits > 0 and disk.used() <= 10_100
    assert "Nothing more is read" in sink.reasons()["spool"]
    broker.away = False
    await feeding
    await sink.drained()
    running.cancel()
    assert broker.numbers(0) == list(range(0, 1_000, 2)) and not sink.is_full


async def test_a_disk_without_room_stops_reading_and_is_forgotten_when_the_broker_is_back() -> None:
    """Nothing was written, nothing is lost; both reasons are told while it lasts."""
    broker, disk, clock = Broker(), Disk(room=50), Time()
    sink = sink_over(broker, disk, clock)
    running = asyncio.create_task(sink.run())
    broker.away = True
    feeding = asyncio.create_task(feed(sink, clock, 0, 1_000))
    for _ in range(2_000):
        await clock.sleep(0.01)
    assert not feeding.done() and sink.is_full and not sink.is_spooling
    assert sink.reasons().keys() == {"kafka", "spool"}
    broker.away = False
    await feeding
    running.cancel()
    assert broker.numbers(0) == list(range(0, 1_000, 2)) and not sink.is_full and sink.reasons() == {}


async def test_closing_while_the_broker_is_away_keeps_everything_on_disk() -> None:
    """SIGTERM in an outage: the next process sends it."""
    broker, disk, clock = Broker(), Disk(), Time()
    sink = sink_over(broker, disk, clock)
    broker.away = True
    await feed(sink, clock, 0, 10)
    assert not await sink.close(0.5)
    broker.restarted()
    disk.lose_power(random.Random(1))  # it was synced
    again = sink_over(broker, disk, clock)
    broker.away = False
    running = asyncio.create_task(again.run())
    await again.send("trades", 0, Frame(source="s", watermark_us=10))
    await again.drained()
    running.cancel()
    assert broker.numbers(0) == [0, 2, 4, 6, 8, 10]


async def test_what_an_earlier_collector_left_counts_as_sent_once_the_broker_has_it() -> None:
    """Not when the producer has taken it: a broker that hangs takes it into a socket, and its topics do not tell of it yet."""
    broker, disk, clock = Broker(), Disk(), Time()
    broker.away = True
    sink = sink_over(broker, disk, clock)
    await feed(sink, clock, 0, 10)
    await sink.close(0.5)
    broker.restarted()
    again = sink_over(broker, disk, clock)
    running = asyncio.create_task(again.run())
    while again.is_spooling:
        await clock.sleep(0.01)
    process = CollectorProcess(load_settings({}), cast(RegistryClient, None), again, CollectorMetrics("binance"))
    waiting = asyncio.create_task(process.sent_before())
    await clock.sleep(0.5)
    assert not waiting.done() and broker.log == []
    broker.away = False
    assert await waiting and broker.numbers(0) == [0, 2, 4, 6, 8]
    running.cancel()


async def test_a_small_queue_of_the_producer_is_waited_for() -> None:
    """The spool goes no faster than the producer takes it."""
    broker, disk, clock = Broker(queue=3), Disk(), Time()
    sink = sink_over(broker, disk, clock)
    running = asyncio.create_task(sink.run())
    broker.away = True
    await feed(sink, clock, 0, 400)
    broker.away = False
    await sink.drained()
    running.cancel()
    assert broker.numbers(0) == list(range(0, 400, 2))


class FullDisk(Disk):
    """Others took the rest of the disk: no file can be written anew, segments can be deleted."""

    is_full = False

    def replace(self, name: str, data: bytes) -> None:
        """See Files."""
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().replace(name, data)

    def free_bytes(self) -> int:
        """See Files."""
        return 0 if self.is_full else 1 << 40


async def test_a_spool_on_a_full_disk_is_sent_and_makes_the_room_itself() -> None:
    """Its position cannot be noted, its segments can be deleted; a process that starts then sends nothing for ever anew."""
    broker, disk, clock = Broker(), FullDisk(), Time()
    sink = sink_over(broker, disk, clock, min_free_bytes=10)
    running = asyncio.create_task(sink.run())
    broker.away = True
    await feed(sink, clock, 0, 600)
    assert sink.spool_bytes > 10_000
    disk.is_full, broker.away = True, False
    for _ in range(20_000):
        if running.done() or disk.used() < 100:
            break
        await clock.sleep(0.01)
    assert not running.done()
    assert sink.spool_bytes == 0
    assert set(disk.files) <= {"acked"}
    await sink.close(1.0)
    running.cancel()
    assert sorted(number for _, number in broker.log) == list(range(600))


# A slow disk.


class Turns(Time):
    """A clock that goes on by 5 ms with each turn of the event loop: a loop that is blocked stops it."""

    async def run(self) -> None:
        """Go on; beside the sink."""
        while True:
            self.now += 5_000
            await asyncio.sleep(0.0005)

    async def sleep(self, seconds: float) -> None:
        """See Clock."""
        until = self.now + int(seconds * 1e6) + 1
        while self.now < until:
            await asyncio.sleep(0.0005)


class SlowDisk(Disk):
    """A disk whose writes and syncs take their time, by a clock that only goes on while the event loop does."""

    def __init__(self, clock: Turns, *, write_s: float, sync_s: float) -> None:
        super().__init__()
        self._clock, self._write_s, self._sync_s = clock, write_s, sync_s
        self.syncs = 0
        self.longest_s = 0.0

    def append(self, name: str, data: bytes) -> None:
        """See Files."""
        self._take(self._write_s)
        super().append(name, data)

    def replace(self, name: str, data: bytes) -> None:
        """See Files."""
        self._take(self._write_s)
        super().replace(name, data)

    def sync(self, name: str) -> None:
        """See Files."""
        size = len(self.files.get(name, b""))
        self._take(self._sync_s)
        self.syncs += 1
        if name in self.files:  # what was appended meanwhile is not promised
            self.synced[name] = size

    def _take(self, seconds: float) -> None:
        begun_us, limit = self._clock.now, time.monotonic() + 20
        while self._clock.now - begun_us < seconds * 1e6:
            assert time.monotonic() < limit, "the event loop stands still while the disk is busy"
            time.sleep(0.0002)
        self.longest_s = max(self.longest_s, (self._clock.now - begun_us) / 1e6)


async def test_a_slow_disk_delays_what_is_spooled_and_nothing_else() -> None:
    """Writes of 30 ms, syncs of half a second: in order, each once, in bounded memory; the event loop goes on, or the disk would never end."""
    clock = Turns()
    broker, disk = Broker(), SlowDisk(clock, write_s=0.03, sync_s=0.5)
    sink = SpoolSink(broker, opened(disk), clock, SpoolSinkConfig(window_bytes=2_000, read_bytes=500))
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, sink.waiting_bytes)
            await asyncio.sleep(0)

    beside = [asyncio.create_task(task) for task in (clock.run(), sink.run(), watch())]

    async def send(partition: int, first: int, last: int) -> None:
        for number in range(first, last):
            await sink.send("trades", partition, Frame(source="s", watermark_us=number))
            await clock.sleep(0.01)

    async def both(first: int, last: int) -> None:
        await asyncio.gather(send(0, first, last), send(1, first, last))

    await both(0, 50)
    assert disk.writes == 0 and disk.syncs == 0
    broker.away = True
    await both(50, 150)
    assert sink.is_spooling and disk.writes > 150 and disk.syncs > 0
    disk_of_then = {name: bytes(data[: disk.synced.get(name, 0)]) for name, data in disk.files.items()}
    broker.away = False
    await both(150, 200)
    await sink.drained()
    assert await sink.close(5.0)
    for task in beside:
        task.cancel()
    await asyncio.gather(*beside, return_exceptions=True)
    assert broker.numbers(0) == broker.numbers(1) == list(range(200))
    assert sum(len(decode(data)) for data in disk_of_then.values()) > 50, "syncs keep up with what is written"
    assert most <= 2_000 + 4 * 200 and disk.longest_s >= 0.5
