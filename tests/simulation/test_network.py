"""The simulated network: asyncio protocols on both ends, TCP's promises kept and nothing beyond them."""

import asyncio
from random import Random

import pytest

from infra.simulation.loop import Process, VirtualLoop
from infra.simulation.network import Network, Weather

PLACE = ("127.0.0.1", 7000)


class Recorder(asyncio.Protocol):
    """Remembers what happens to it."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.ended: list[Exception | None] = []
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Bytes."""
        self.chunks.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Over."""
        self.ended.append(exc)


@pytest.fixture
def world():
    """A loop and its network."""
    loop = VirtualLoop(1, 1_767_225_600_000_000)
    yield loop, Network(loop, Random(2))
    loop.close()


async def connected(loop: VirtualLoop) -> tuple[Recorder, Recorder]:
    """Both ends of a connection."""
    servers: list[Recorder] = []
    await loop.create_server(lambda: servers.append(Recorder()) or servers[-1], *PLACE)  # type: ignore[func-returns-value]
    _, client = await loop.create_connection(Recorder, *PLACE)
    await asyncio.sleep(0.01)
    return client, servers[0]


def test_bytes_arrive_whole_and_in_order(world) -> None:
    """However they are cut and delayed, within a connection nothing is lost, doubled or reordered."""
    loop, network = world
    network.weather = Weather(stall_share=0.5, cut_share=0.9, jitter_us=5_000)
    sent = [Random(number).randbytes(number * 7 + 1) for number in range(60)]

    async def work() -> bytes:
        client, server = await connected(loop)
        for data in sent:
            client.transport.write(data)
            await asyncio.sleep(0.001)
        await asyncio.sleep(5)
        assert len(server.chunks) > len(sent)
        return b"".join(server.chunks)

    assert loop.run(work()) == b"".join(sent)


def test_connections_overtake_each_other(world) -> None:
    """Order is a promise of one connection only."""
    loop, network = world
    network.weather = Weather(stall_share=0.5)
    arrived: list[int] = []

    class Numbered(Recorder):
        def data_received(self, data: bytes) -> None:
            arrived.append(data[0])

    async def work() -> None:
        await loop.create_server(Numbered, *PLACE)
        ends = [(await loop.create_connection(Recorder, *PLACE))[1] for _ in range(30)]
        for number, end in enumerate(ends):
            end.transport.write(bytes([number]))
        await asyncio.sleep(5)

    loop.run(work())
    assert sorted(arrived) == list(range(30)) and arrived != sorted(arrived)


def test_nobody_listens(world) -> None:
    """A closed port refuses."""
    loop, _ = world
    with pytest.raises(ConnectionRefusedError):
        loop.run(loop.create_connection(Recorder, *PLACE))


def test_abort_resets_the_peer(world) -> None:
    """The one who aborts ends at once, the other sees a reset."""
    loop, _ = world

    async def work() -> None:
        client, server = await connected(loop)
        client.transport.abort()
        await asyncio.sleep(1)
        assert client.ended == [None]
        assert [type(error) for error in server.ended] == [ConnectionResetError]

    loop.run(work())


def test_close_delivers_what_was_written(world) -> None:
    """Closing flushes: the peer gets everything, then the end."""
    loop, _ = world

    async def work() -> None:
        client, server = await connected(loop)
        client.transport.write(b"last words")
        client.transport.close()
        await asyncio.sleep(1)
        assert (server.chunks, client.ended, server.ended) == ([b"last words"], [None], [None])

    loop.run(work())


def test_silent_connection_stays_open_on_both_sides(world) -> None:
    """Half-open: each believes in the other, nothing arrives."""
    loop, network = world

    async def work() -> None:
        process = Process("left")
        server: Recorder
        other: list[Recorder] = []

        async def serve() -> None:
            await loop.create_server(lambda: other.append(Recorder()) or other[-1], *PLACE)  # type: ignore[func-returns-value]

        await loop.spawn(Process("right"), serve())
        _, client = await loop.spawn(process, loop.create_connection(Recorder, *PLACE))
        await asyncio.sleep(0.01)
        server = other[0]
        assert network.silence("left", "right") == 1
        client.transport.write(b"hello?")
        server.transport.write(b"hello?")
        await asyncio.sleep(60)
        assert (client.chunks, server.chunks, client.ended, server.ended) == ([], [], [], [])

    loop.run(work())


def test_partition_holds_bytes_back_until_it_heals(world) -> None:
    """What was sent into a partition arrives after it, in order."""
    loop, network = world

    async def work() -> None:
        other: list[Recorder] = []

        async def serve() -> None:
            await loop.create_server(lambda: other.append(Recorder()) or other[-1], *PLACE)  # type: ignore[func-returns-value]

        await loop.spawn(Process("right"), serve())
        _, client = await loop.spawn(Process("left"), loop.create_connection(Recorder, *PLACE))
        await asyncio.sleep(0.01)
        network.split.add(frozenset(("left", "right")))
        for data in (b"a", b"b", b"c"):
            client.transport.write(data)
            await asyncio.sleep(1)
        assert other[0].chunks == []
        network.heal()
        await asyncio.sleep(1)
        assert b"".join(other[0].chunks) == b"abc"

    loop.run(work())


def test_dead_process_resets_its_connections(world) -> None:
    """The kernel closes what a killed process had open, its listening ports too."""
    loop, network = world

    async def work() -> None:
        other: list[Recorder] = []
        process = Process("right")

        async def serve() -> None:
            await loop.create_server(lambda: other.append(Recorder()) or other[-1], *PLACE)  # type: ignore[func-returns-value]

        await loop.spawn(process, serve())
        _, client = await loop.create_connection(Recorder, *PLACE)
        await asyncio.sleep(0.01)
        loop.kill(process)
        await asyncio.sleep(1)
        assert [type(error) for error in client.ended] == [ConnectionResetError]
        assert other[0].ended == []
        with pytest.raises(ConnectionRefusedError):
            await loop.create_connection(Recorder, *PLACE)

    loop.run(work())


def test_slow_reader_pauses_the_writer(world) -> None:
    """Backpressure reaches the sender, and ends."""
    loop, _ = world
    seen: list[str] = []

    class Writer(Recorder):
        def pause_writing(self) -> None:
            seen.append("pause")

        def resume_writing(self) -> None:
            seen.append("resume")

    async def work() -> None:
        servers: list[Recorder] = []
        await loop.create_server(lambda: servers.append(Recorder()) or servers[-1], *PLACE)  # type: ignore[func-returns-value]
        _, client = await loop.create_connection(Writer, *PLACE)
        await asyncio.sleep(0.01)
        servers[0].transport.pause_reading()
        for _ in range(10):
            client.transport.write(bytes(100_000))
            await asyncio.sleep(0.01)
        assert seen == ["pause"]
        servers[0].transport.resume_reading()
        await asyncio.sleep(1)
        assert seen == ["pause", "resume"]
        assert sum(map(len, servers[0].chunks)) == 1_000_000

    loop.run(work())
