"""The API beside the usual ways: REST of 100 bars, and one update to many WebSocket clients. ClickHouse and Kafka are in memory.

Figures are per second of the server's own CPU time, so a busy machine or a slow load generator does not count against anybody.
"""

from __future__ import annotations

import asyncio
import base64
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import psutil
import uvloop

from infra.stack.kafka import free_ports
from tests.performance.statistics import ratio, summary

ROUNDS = int(os.environ.get("MARKETSTREAM_BENCH_ROUNDS", "5"))
REST_KINDS = ("ours", "ours_uncached", "fastapi", "bytes")
CONNECTIONS = 8
REST_SECONDS = 1.0
CLIENTS = 200
UPDATES = 500
_SUBSCRIBE = b'{"op":"subscribe","id":1,"channel":"bars","exchange":"binance","symbol":"BTC-USDT","timeframe":"1m","limit":0}'
_PATH = "/api/v1/bars/binance/BTC-USDT?limit=100"


@contextmanager
def _server(kind: str) -> Iterator[tuple[int, psutil.Process]]:
    (port,) = free_ports(1)
    process = subprocess.Popen([sys.executable, "-m", "tests.performance.api_server", kind, str(port)])
    try:
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(10)


async def _wait(port: int) -> None:
    until = time.monotonic() + 20
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.05)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


class _Getter(asyncio.Protocol):
    """Asks the same question over and over on one connection."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._missing = 0
        self.answers = 0
        self.bytes = 0
        self.running = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.bytes += len(data)
        if self._missing <= 0:
            head, _, rest = data.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head[:100]
            length = head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]
            self._missing = int(length) - len(rest)
        else:
            self._missing -= len(data)
        if self._missing <= 0:
            self.answers += 1
            if self.running:
                self._transport.write(self._request)


async def _rest(kind: str) -> tuple[float, float]:
    """(requests per CPU second, requests per second)."""
    with _server(kind) as (port, process):
        await _wait(port)
        request = f"GET {_PATH} HTTP/1.1\r\nHost: localhost:{port}\r\nAccept: */*\r\n\r\n".encode()
        loop = asyncio.get_running_loop()
        pairs = [await loop.create_connection(lambda: _Getter(request), "127.0.0.1", port) for _ in range(CONNECTIONS)]
        getters = [getter for _, getter in pairs]
        await asyncio.sleep(0.3)
        cpu, begun, answers = _cpu(process), time.monotonic(), sum(getter.answers for getter in getters)
        await asyncio.sleep(REST_SECONDS)
        count = sum(getter.answers for getter in getters) - answers
        used, seconds = _cpu(process) - cpu, time.monotonic() - begun
        for transport, getter in pairs:
            getter.running = False
            transport.close()
        return count / used, count / seconds


class _Listener(asyncio.Protocol):
    """Counts WebSocket messages without looking into them."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._buffer = b""
        self.messages = 0
        self.open = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        key = base64.b64encode(os.urandom(16)).decode()
        head = f"GET {self._path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        self.transport.write(f"{head}Sec-WebSocket-Key: {key}\r\n\r\n".encode())

    def say(self, text: bytes) -> None:
        size = len(text)
        length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
        self.transport.write(b"\x81" + length + b"\0\0\0\0" + text)

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data
        place = 0
        if not self.open.done():
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._buffer = data
                return
            self.open.set_result(None)
            place = end + 4
        total = len(data)
        while place + 2 <= total:
            size, head = data[place + 1], 2
            if size == 126:
                size, head = int.from_bytes(data[place + 2 : place + 4], "big"), 4
            elif size == 127:
                size, head = int.from_bytes(data[place + 2 : place + 10], "big"), 10
            if place + head + size > total:
                break
            place += head + size
            self.messages += 1
        self._buffer = data[place:]


async def _fan_out(kind: str, burst: int) -> float:
    """Deliveries per CPU second."""
    with _server(kind) as (port, process):
        await _wait(port)
        loop = asyncio.get_running_loop()
        path = "/" if kind == "broadcast" else "/api/v1/stream"
        listeners = [(await loop.create_connection(lambda: _Listener(path), "127.0.0.1", port))[1] for _ in range(CLIENTS)]
        await asyncio.gather(*(listener.open for listener in listeners))
        if kind == "broadcast":
            start = 0
        else:
            for listener in listeners:
                listener.say(_SUBSCRIBE)
            start = 2
        await _until(listeners, start)
        cpu = _cpu(process)
        if kind == "broadcast":
            listeners[0].say(str(UPDATES).encode())
        else:
            await _feed(port, burst)
        await _until(listeners, start + UPDATES)
        used = _cpu(process) - cpu
        for listener in listeners:
            listener.transport.close()
        return CLIENTS * UPDATES / used


async def _feed(port: int, burst: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET /feed?{UPDATES},{burst} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    writer.close()


async def _until(listeners: list[_Listener], messages: int) -> None:
    until = time.monotonic() + 30
    while any(listener.messages < messages for listener in listeners):
        if time.monotonic() > until:
            raise TimeoutError(f"{min(listener.messages for listener in listeners)} of {messages} messages after 30 s")
        await asyncio.sleep(0.005)


async def _measure() -> dict[str, Any]:
    rest: dict[str, list[float]] = {kind: [] for kind in REST_KINDS}
    wall: dict[str, list[float]] = {kind: [] for kind in REST_KINDS}
    fan: dict[str, list[float]] = {"ours_single": [], "ours_burst10": [], "broadcast": []}
    for _ in range(ROUNDS):
        for kind in REST_KINDS:
            per_cpu, per_second = await _rest(kind)
            rest[kind].append(per_cpu)
            wall[kind].append(per_second)
        fan["ours_single"].append(await _fan_out("ours", 1))
        fan["ours_burst10"].append(await _fan_out("ours", 10))
        fan["broadcast"].append(await _fan_out("broadcast", 1))
    figures = summary({f"rest_100_bars_{kind}": values for kind, values in rest.items()}, "requests/cpu-s")
    figures |= summary({f"rest_100_bars_{kind}_wall": values for kind, values in wall.items()}, "requests/s")
    figures |= summary({f"fan_out_{CLIENTS}_clients_{kind}": values for kind, values in fan.items()}, "deliveries/cpu-s")
    return {
        "name": "api",
        "figures": figures,
        "ratios": {
            "rest_ours_over_fastapi": ratio(rest["ours"], rest["fastapi"]),
            "rest_ours_uncached_over_fastapi": ratio(rest["ours_uncached"], rest["fastapi"]),
            "rest_ours_over_prebuilt_bytes": ratio(rest["ours"], rest["bytes"]),
            "fan_out_over_websockets_broadcast": ratio(fan["ours_single"], fan["broadcast"]),
            "fan_out_burst_over_single": ratio(fan["ours_burst10"], fan["ours_single"]),
        },
    }


def run() -> dict[str, Any]:
    """Figures and ratios of ``ROUNDS`` interleaved rounds."""
    return uvloop.run(_measure())


if __name__ == "__main__":
    import json

    sys.stdout.write(json.dumps(run(), indent=1) + "\n")
