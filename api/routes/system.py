"""``/``, ``/livez``, ``/readyz``, ``/progress``, ``/metrics`` and ``GET /api/v1/symbols``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from api.catalogue import Catalogue
from api.deps import Deps
from api.errors import StoreUnavailableError
from api.http import Answer, Scope
from api.metrics import CONTENT_TYPE, Metrics
from api.params import parse_query
from api.sessions import Sessions


class SystemRoutes:
    """Answers about the service itself.

    Args:
        deps: what readiness depends on.
        catalogue: known instruments.
        sessions: of the time machine.
        metrics: what ``/metrics`` shows.
    """

    def __init__(self, deps: Deps, catalogue: Catalogue, sessions: Sessions, metrics: Metrics) -> None:
        self._deps = deps
        self._catalogue = catalogue
        self._sessions = sessions
        self._metrics = metrics

    async def root(self, scope: Scope) -> Answer:
        """What this is and where to go on."""
        links = {
            "symbols": "/api/v1/symbols",
            "bars": "/api/v1/bars/{exchange}/{symbol}",
            "trades": "/api/v1/trades/{exchange}/{symbol}",
            "coverage": "/api/v1/coverage",
            "deadletters": "/api/v1/deadletters",
            "stream": "/api/v1/stream",
            "openapi": "/openapi.json",
            "live": "/livez",
            "ready": "/readyz",
            "metrics": "/metrics",
        }
        return _json({"name": "marketstream", "version": self._deps.version, "links": links})

    async def livez(self, scope: Scope) -> Answer:
        """The event loop turns, and the live tail moves while there is something to read."""
        stuck = self._deps.stuck()
        return _json({"status": "stuck", "reason": stuck}, 503) if stuck else _json({"status": "ok"})

    async def progress(self, scope: Scope) -> Answer:
        """How far the live tail is, and whether it moves."""
        return _json(self._deps.progress())

    async def readyz(self, scope: Scope) -> Answer:
        """Whether every dependency answers, each with its reason and how long it took."""
        checks = {"clickhouse": self._deps.history.ping, "kafka": self._deps.frames.ping, "postgres": self._deps.symbols.ping}
        results = await asyncio.gather(*(self._check(name, ping) for name, ping in checks.items()))
        ready = all(result["ok"] for result in results)
        body = {"status": "ready" if ready else "not ready", "checks": dict(zip(checks, results, strict=True))}
        return _json(body, 200 if ready else 503)

    async def metrics(self, scope: Scope) -> Answer:
        """Prometheus text."""
        return Answer(self._metrics.render(), CONTENT_TYPE)

    async def symbols(self, scope: Scope) -> Answer:
        """Every instrument, or one exchange's with ``?exchange=``; with ``?session=`` those it sees trades of."""
        given = parse_query(scope["query_string"], ("exchange", "session"))
        if "session" in given:
            session = await self._sessions.find(given["session"])
            listed = await self._catalogue.listed_in(session, session.now_us(self._sessions.clock.now_us()))
        else:
            listed = await self._catalogue.listed()
        wanted = given.get("exchange")
        rows = [row for row in listed if wanted is None or row["exchange"] == wanted]
        return _json({"count": len(rows), "symbols": rows})

    async def _check(self, name: str, ping: Callable[[], Awaitable[None]]) -> dict[str, Any]:
        limit_s = self._deps.limits.ping_timeout_s
        begun_us = self._deps.clock.monotonic_us()
        reason = ""
        try:
            async with asyncio.timeout(limit_s):
                await ping()
        except StoreUnavailableError as exc:
            reason = exc.reason
        except TimeoutError:
            reason = f"{name} did not answer within {limit_s:g} s"
        milliseconds = (self._deps.clock.monotonic_us() - begun_us) / 1000
        return {"ok": not reason, "reason": reason, "ms": round(milliseconds, 1)}


def _json(document: Any, status: int = 200) -> Answer:
    return Answer(msgspec.json.encode(document), status=status)
