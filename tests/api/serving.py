"""The API on a real socket over stores in memory: the very server, protocol and close codes a client meets."""

# ruff: noqa: D102, D103 - helpers say what they do by their names

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from api.app import Api, create_app
from api.deps import ApiLimits, Deps, StreamLimits
from api.live.hub import Hub
from infra.api import ApiServer, server_config
from infra.seam import SystemClock
from tests.api.support import MemoryHistory, MemoryKafka, MemoryStore, MemorySymbols


@dataclass
class Served:
    """A running server and what is behind it."""

    api: Api
    server: ApiServer
    port: int
    kafka: MemoryKafka
    store: MemoryStore
    history: MemoryHistory
    symbols: MemorySymbols

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def socket(self, **options: Any) -> connect:
        return connect(f"ws://127.0.0.1:{self.port}/api/v1/stream", **options)


@asynccontextmanager
async def served(
    *keys: str, stream: StreamLimits | None = None, limits: ApiLimits | None = None, plain: bool = False
) -> AsyncIterator[Served]:
    """Serve instruments ``keys`` on a free port; ``plain``: by a server that offers no writer of its own."""
    kafka, history, symbols = MemoryKafka(), MemoryHistory(), MemorySymbols(*keys)
    store = MemoryStore(kafka)
    deps = Deps(
        history=history,
        symbols=symbols,
        frames=kafka,
        clock=SystemClock(),
        partitions=1,
        stream=stream or StreamLimits(),
        limits=limits or ApiLimits(),
    )
    api = create_app(deps)
    # the live tail asks a store that knows the truth; REST asks `history`, which answers what a test tells it to
    api.hub = Hub(kafka, store, deps.clock, 1, deps.stream)
    api.stream._hub = api.hub
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = server_config(api)
        config.ws = "websockets-sansio" if plain else config.ws
        server = ApiServer(config, api)
        task = asyncio.ensure_future(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.005)
        try:
            yield Served(api, server, listener.getsockname()[1], kafka, store, history, symbols)
        finally:
            server.should_exit = True
            await task


async def ask(client: ClientConnection, **request: Any) -> None:
    await client.send(json.dumps(request))


async def hear(client: ClientConnection, kind: str | None = None) -> dict[str, Any]:
    """The next message, or the next one of that type."""
    while True:
        message: dict[str, Any] = json.loads(await asyncio.wait_for(client.recv(), 5))
        if kind is None or message["type"] == kind:
            return message
