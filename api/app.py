"""``create_app(deps)``: the whole API as one ASGI app. Imports no driver: stores and broker come in through ``Deps``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client.core import Metric
from starlette.routing import Route, WebSocketRoute

from api.catalogue import Catalogue
from api.deps import Deps
from api.errors import Problem
from api.history import History
from api.http import Answer, ASGIApp, Endpoint, Handler, Receive, Scope, Send, Shell, problem_answer, refusal
from api.letters import Letters
from api.live.hub import Hub
from api.metrics import Metrics, tail_metrics
from api.openapi import document
from api.quality import Quality
from api.routes.coverage import CoverageRoute
from api.routes.deadletters import DeadLetterRoutes
from api.routes.history import HistoryRoute
from api.routes.quality import QualityRoute
from api.routes.system import SystemRoutes
from api.sessions import Sessions
from api.sessions_feed import SessionFeeds
from api.stream import StreamApp

_HOT_PARTS = 6
"""Of ``/api/v1/bars/binance/BTC-USDT`` split at its slashes."""


class Api:
    """The app and its parts. Call it as ASGI; ``stream.shutdown`` before the server closes connections gives clients their notice."""

    def __init__(self, deps: Deps) -> None:
        self.deps = deps
        self.metrics = Metrics()
        self.history = History(deps.history, deps.clock, deps.partitions, deps.limits)
        self.catalogue = Catalogue(deps.symbols, self.history, deps.clock, deps.limits.catalogue_ttl_s)
        self.hub = Hub(deps.frames, self.history, deps.clock, deps.partitions, deps.stream)
        self.sessions = Sessions(deps.sessions, deps.clock)
        feeds = SessionFeeds(self.sessions, self.history, self.hub.partition, deps.stream)
        self.stream = StreamApp(self.hub, feeds, self.catalogue, self.metrics, deps.clock, deps.stream)
        self.metrics.watch(self._tails)
        self.fastapi = FastAPI(
            title="Marketstream", version=deps.version, lifespan=self._lifespan, docs_url=None, redoc_url=None, openapi_url=None
        )
        self._hot: dict[str, Endpoint] = {}
        self._add_routes()
        self._app: ASGIApp = Shell(self.fastapi, deps.limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection. Hot reads go straight to their endpoint: the framework's way there costs as much as the read."""
        if scope["type"] == "http":
            parts = scope["path"].split("/")
            if len(parts) == _HOT_PARTS and parts[1] == "api" and parts[2] == "v1":
                endpoint = self._hot.get(parts[3])
                if endpoint is not None and parts[4] and parts[5] and refusal(scope, self.deps.limits) is None:
                    scope["path_params"] = {"exchange": parts[4], "symbol": parts[5]}
                    await endpoint(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _add_routes(self) -> None:
        system = SystemRoutes(self.deps, self.catalogue, self.sessions, self.metrics)
        self._route("/", "root", system.root)
        self._route("/livez", "livez", system.livez)
        self._route("/readyz", "readyz", system.readyz, cached=True)
        self._route("/progress", "progress", system.progress)
        self._route("/metrics", "metrics", system.metrics)
        self._route("/openapi.json", "openapi", self._openapi, cached=True)
        self._route("/api/v1/symbols", "symbols", system.symbols, cached=True)
        letters = DeadLetterRoutes(Letters(self.deps.history, self.deps.letters))
        self._route("/api/v1/deadletters", "deadletters", letters.listed, cached=True)
        self._route("/api/v1/deadletters/{id}", "deadletter", letters.one)
        self._route(
            "/api/v1/quality/{symbol}", "quality", QualityRoute(Quality(self.deps.history), self.catalogue, self.sessions), cached=True
        )
        coverage = CoverageRoute(self.deps.coverage, self.catalogue, self.sessions)
        self._route("/api/v1/coverage", "coverage", coverage, cached=True)
        for channel in ("bars", "trades"):
            places = (self.hub.epoch, self.hub.partition)
            handler = HistoryRoute(channel, self.history, self.catalogue, *places, self.sessions, self.deps.limits)
            self._hot[channel] = self._route(f"/api/v1/{channel}/{{exchange}}/{{symbol}}", channel, handler, cached=True)
        self.fastapi.router.routes.append(WebSocketRoute("/api/v1/stream", self.stream, name="stream"))
        self._route("/{path:path}", "unknown", self._unknown)

    def _route(self, path: str, name: str, handler: Handler, *, cached: bool = False) -> Endpoint:
        endpoint = Endpoint(name, handler, metrics=self.metrics, clock=self.deps.clock, limits=self.deps.limits, cached=cached)
        self.fastapi.router.routes.append(Route(path, endpoint, name=name))
        return endpoint

    async def _openapi(self, scope: Scope) -> Answer:
        return Answer(document(self.deps.version))

    async def _unknown(self, scope: Scope) -> Answer:
        return problem_answer(Problem("not_found", "There is nothing at this address: GET / lists what there is."), scope["path"][:200])

    def _tails(self) -> list[Metric]:
        tails = [(tail.topic, tail.partition, tail.next_offset, tail.bad_records) for tail in self.hub.tails()]
        return tail_metrics(self.hub.lag(), tails)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        await self.hub.start()
        try:
            yield
        finally:
            await self.stream.shutdown()
            await self.hub.stop()
            for close in self.deps.on_close:
                await close()


def create_app(deps: Deps) -> Api:
    """The API over these stores and this broker."""
    return Api(deps)
