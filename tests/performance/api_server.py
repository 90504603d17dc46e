"""Servers for ``bench_api``, one a process: ours over stores in memory, and the usual ways to do the same. ``python -m ... KIND PORT``."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI, Response
from pydantic import BaseModel
from websockets.asyncio.server import ServerConnection, broadcast
from websockets.asyncio.server import serve as serve_websockets

from api.app import create_app
from api.deps import ApiLimits, Deps, StreamLimits
from api.http import ASGIApp, Receive, Scope, Send
from infra.api import ApiServer, server_config
from infra.seam import SystemClock
from tests.api.support import MemoryHistory, MemoryKafka, MemorySymbols, bars_frame

KEY = "binance:BTC-USDT"
BARS = 100
FIRST_US = 1_700_000_040_000_000


class Bar(BaseModel):
    """A bar as a FastAPI tutorial would declare it."""

    open_time_us: int
    close_time_us: int
    open: float
    high: float
    low: float
    close: float
    volume: float
    quote_volume: float
    buy_volume: float
    trade_count: int
    vwap: float
    first_trade_id: int
    last_trade_id: int
    revision: int
    is_final: bool
    complete: bool
    last_receive_time_us: int


def bar(number: int) -> dict[str, Any]:
    """A bar with every field."""
    opened = FIRST_US + number * 60_000_000
    prices = {name: 60_000.1 + number for name in ("open", "high", "low", "close", "vwap")}
    volumes = {"volume": 12.345, "quote_volume": 740_000.12, "buy_volume": 6.5}
    ids = {"trade_count": 321, "first_trade_id": number * 321, "last_trade_id": number * 321 + 320, "revision": 0}
    flags = {"is_final": True, "complete": True, "last_receive_time_us": opened + 60_000_900}
    found = {"open_time_us": opened, "close_time_us": opened + 60_000_000} | prices | volumes | ids | flags
    return {name: found[name] for name in Bar.model_fields}


def ours(ttl_s: float) -> tuple[ASGIApp, Any]:
    """Our API; ClickHouse is a constant, so that only what we do is measured."""
    lines = b"".join(json.dumps(bar(number), separators=(",", ":")).encode() + b"\n" for number in range(BARS))
    history = MemoryHistory({"DISTINCT exchange": b"", "GROUP BY exchange": b"", "max(kafka_offset)": b"", "FROM bars": lines})
    history.queries = _Nothing()
    kafka = MemoryKafka()
    deps = Deps(
        history=history,
        symbols=MemorySymbols(KEY),
        frames=kafka,
        clock=SystemClock(),
        partitions=1,
        limits=ApiLimits(cache_ttl_s=ttl_s),
        stream=StreamLimits(max_clients=20_000, queue_bytes=64 * 1024 * 1024),
    )
    api = create_app(deps)
    for number in range(BARS, BARS + 2000):  # after the bars that are stored
        kafka.append("bars", bars_frame(KEY, [(number, 0, 1)]))
    kafka.handed[("bars", 0)] = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        """Serve; ``GET /feed?records,burst`` hands the next records to the hub, ``burst`` of them in one go."""
        if scope["type"] == "http" and scope["path"] == "/feed":
            records, burst = map(int, scope["query_string"].split(b","))
            for _ in range(records // burst):
                kafka.hand("bars", count=burst)
                await asyncio.sleep(0)
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
        else:
            await api(scope, receive, send)

    return app, api


class _Nothing(list[Any]):
    def append(self, _: Any) -> None:
        """Forget it."""


def usual(prebuilt: bool) -> FastAPI:
    """FastAPI's own return path with a response model, or bytes that were built before."""
    app = FastAPI()
    bars = [bar(number) for number in range(BARS)]
    body = json.dumps(bars, separators=(",", ":")).encode()
    if prebuilt:

        @app.get("/api/v1/bars/{exchange}/{symbol}")
        async def bytes_(exchange: str, symbol: str, limit: int = 100) -> Response:
            return Response(body, media_type="application/json")
    else:

        @app.get("/api/v1/bars/{exchange}/{symbol}")
        async def models(exchange: str, symbol: str, limit: int = 100) -> list[Bar]:
            return [Bar(**one) for one in bars]

    return app


async def fan_out_peer(port: int) -> None:
    """``websockets.broadcast`` of the same text to every client; a client that sends a number starts that many."""
    text = json.dumps({"channel": "bars", "exchange": "binance", "symbol": "BTC-USDT", "timeframe": "1m", "data": [bar(1)]})
    clients: set[ServerConnection] = set()

    async def handler(client: ServerConnection) -> None:
        clients.add(client)
        async for message in client:
            if message[:1].isdigit():
                for _ in range(int(message)):
                    broadcast(clients, text)
                    await asyncio.sleep(0)

    async with serve_websockets(handler, "127.0.0.1", port, compression=None):
        await asyncio.get_running_loop().create_future()


async def main(kind: str, port: int) -> None:
    """Serve until killed."""
    if kind == "broadcast":
        await fan_out_peer(port)
    elif kind in ("fastapi", "bytes"):
        config = uvicorn.Config(usual(kind == "bytes"), port=port, loop="uvloop", access_log=False, log_level="warning")
        await uvicorn.Server(config).serve()
    else:
        app, api = ours(0.0 if kind == "ours_uncached" else 0.2)
        await ApiServer(server_config(app, port=port), api).serve()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2])))
