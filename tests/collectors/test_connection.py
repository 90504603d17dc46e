"""One connection against small local servers: what they send, how they end, what they get wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from collectors.connection import Connection, ConnectionConfig, is_retryable, open_connection
from collectors.errors import BlockedError, CollectorError, WireError
from infra.seam import SystemClock

Handler = Callable[[ServerConnection], Awaitable[None]]


class Received:
    """What a connection delivered."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.oversized: list[tuple[bytes, int]] = []

    async def until(self, count: int) -> None:
        """Until ``count`` messages came."""
        async with asyncio.timeout(5):
            while len(self.messages) < count:
                await asyncio.sleep(0.005)


@asynccontextmanager
async def served(handler: Handler, config: ConnectionConfig | None = None) -> AsyncIterator[tuple[Connection, Received]]:
    """A connection to a server that runs ``handler``."""
    async with serve(handler, "127.0.0.1", 0, compression=None, close_timeout=0.3) as server:
        received = Received()
        port = server.sockets[0].getsockname()[1]
        connection = await open_connection(
            f"ws://127.0.0.1:{port}",
            clock=SystemClock(),
            on_messages=received.messages.extend,
            on_oversized=lambda head, size: received.oversized.append((head, size)),
            config=config,
        )
        try:
            yield connection, received
        finally:
            connection.cut()
            await connection.closed


async def test_messages_that_come_with_the_handshake_are_not_lost() -> None:
    """A server that talks at once: its first frames share the packet of its answer."""

    async def talk(server: ServerConnection) -> None:
        for number in range(1_000):
            await server.send(f"m{number}")
        await server.wait_closed()

    async with served(talk) as (_, received):
        await received.until(1_000)
        assert received.messages == [f"m{number}".encode() for number in range(1_000)]


async def test_pings_are_answered_and_ours_are_too() -> None:
    """Both directions go through the library."""
    answered = asyncio.Event()

    async def ping(server: ServerConnection) -> None:
        await (await server.ping(b"hello"))
        answered.set()
        await server.wait_closed()

    async with served(ping) as (connection, _), asyncio.timeout(5):
        await answered.wait()
        await connection.probe()


async def test_a_server_that_answers_no_ping_is_given_up() -> None:
    """Half open: found by our own pings, without a word of data."""

    async def deaf(server: ServerConnection) -> None:
        server.transport.pause_reading()
        await asyncio.sleep(1.5)

    config = ConnectionConfig(ping_interval_s=0.1, ping_timeout_s=0.2, close_timeout_s=0.2)
    async with served(deaf, config) as (connection, _), asyncio.timeout(3):
        assert "keepalive ping timeout" in await connection.closed


@pytest.mark.parametrize(
    ("code", "says"), [(1000, "closed with code 1000"), (1001, "closed with code 1001 going"), (1012, "closed with code 1012")]
)
async def test_close_codes_are_told(code: int, says: str) -> None:
    """Why the venue ended it."""

    async def end(server: ServerConnection) -> None:
        await server.close(code, "going" if code == 1001 else "")

    async with served(end) as (connection, _), asyncio.timeout(5):
        assert (await connection.closed).startswith(says)


async def test_a_cut_line_is_told_apart_from_a_close() -> None:
    """No close frame."""

    async def cut(server: ServerConnection) -> None:
        server.transport.abort()

    async with served(cut) as (connection, _), asyncio.timeout(5):
        assert await connection.closed == "the connection broke without a close frame"


async def test_a_message_above_the_limit_costs_nothing_but_itself() -> None:
    """Reported with its first bytes; the connection goes on."""

    async def send(server: ServerConnection) -> None:
        await server.send("before")
        await server.send("x" * 3_000_000)
        await server.send("after")
        await server.wait_closed()

    async with served(send, ConnectionConfig(max_message_bytes=1_000_000)) as (connection, received):
        await received.until(2)
        assert received.messages == [b"before", b"after"]
        ((head, size),) = received.oversized
        assert size == 3_000_000
        assert 0 < len(head) <= 1_000_000
        assert not connection.closed.done()


async def test_a_message_of_a_hundred_megabytes_takes_one_megabyte() -> None:
    """Skipped as it streams in; what follows is read."""

    async def send(server: ServerConnection) -> None:
        piece = b"x" * 1_000_000
        server.transport.write(b"\x81\x7f" + (100 * len(piece)).to_bytes(8, "big"))
        for _ in range(100):
            server.transport.write(piece)
            await server.drain()
        await server.send("after")
        await server.wait_closed()

    async with served(send) as (connection, received):
        await received.until(1)
        assert received.messages == [b"after"]
        assert [size for _, size in received.oversized] == [100_000_000]
        assert connection._wire._reader.buffered_bytes == 0


async def test_bytes_that_are_no_frames_end_the_connection_with_1002() -> None:
    """What came before is delivered; the peer is told why."""
    told: list[int | None] = []

    async def break_rules(server: ServerConnection) -> None:
        await server.send("good")
        server.transport.write(b"\xc1\x01a")
        await asyncio.sleep(0.05)
        with pytest.raises(ConnectionClosed):
            await server.recv()
        told.append(server.close_code)

    async with served(break_rules) as (connection, received):
        async with asyncio.timeout(5):
            assert "reserved bits" in await connection.closed
        assert received.messages == [b"good"]
        await asyncio.sleep(0.1)
    assert told == [1002]


async def test_a_paused_connection_reads_nothing_and_then_everything() -> None:
    """The kernel holds it back; nothing is lost."""

    async def flood(server: ServerConnection) -> None:
        for number in range(200):
            await server.send(f"{number:05d}" + "x" * 20_000)
        await server.wait_closed()

    async with served(flood) as (connection, received):
        await received.until(1)
        connection.pause()
        await asyncio.sleep(0.1)
        before = len(received.messages)
        await asyncio.sleep(0.2)
        assert len(received.messages) == before
        connection.resume()
        await received.until(200)
        assert [int(message[:5]) for message in received.messages] == list(range(200))


async def test_sending_on_a_closed_connection_is_a_wire_error() -> None:
    """Not the library's own exception."""

    async def end(server: ServerConnection) -> None:
        await server.close()

    async with served(end) as (connection, _):
        await connection.closed
        with pytest.raises(WireError, match="is gone"):
            await connection.send("x")
        with pytest.raises(WireError, match="is gone"):
            await connection.probe()


async def attempt(url: str, timeout_s: float = 2.0) -> CollectorError:
    """The error of an attempt to open ``url``."""
    with pytest.raises(CollectorError) as caught:
        await open_connection(
            url,
            clock=SystemClock(),
            on_messages=lambda messages: None,
            on_oversized=lambda head, size: None,
            config=ConnectionConfig(open_timeout_s=timeout_s),
        )
    return caught.value


@pytest.mark.parametrize(("status", "retryable"), [(451, False), (403, False), (404, True), (429, True), (503, True)])
async def test_refusals_are_told_apart(status: int, retryable: bool) -> None:
    """A blocked region is fatal; a busy or wrong server may come back."""

    def refuse(connection: ServerConnection, request: Request) -> Response:
        return connection.respond(status, "no\n")

    async with serve(lambda server: server.wait_closed(), "127.0.0.1", 0, process_request=refuse) as server:
        error = await attempt(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert is_retryable(error) is retryable
    assert isinstance(error, BlockedError) is not retryable
    assert str(status) in str(error)


async def test_nobody_listening_no_answer_no_websocket_and_no_address() -> None:
    """Four ways not to get a connection, each one sentence."""
    assert "cannot be reached" in str(await attempt("ws://127.0.0.1:1"))

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n")
        await writer.drain()
        writer.close()

    for answer, says in ((silent, "did not answer in time"), (other, "does not speak WebSocket")):
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            error = await attempt(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout_s=0.3)
        assert says in str(error)
        assert is_retryable(error)
    error = await attempt("nonsense")
    assert not is_retryable(error)
    assert "MARKETSTREAM_COLLECTOR_WS_URL" in str(error)
