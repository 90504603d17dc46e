"""The HTTP shell every request passes: limits, one place for errors, headers, compression, metrics, and the short-lived cache of hot reads.

Plain ASGI, because a hot read must not cost more than its bytes: routing, dependency injection and response models are bypassed for it.
"""

from __future__ import annotations

import asyncio
import gzip
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final

from api.deps import ApiLimits
from api.errors import PROBLEM_TYPE, Problem, StoreUnavailableError
from api.metrics import Metrics
from schemas.seam import Clock

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

SECURITY_HEADERS: Final[tuple[Header, ...]] = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_NO_STORE: Final[Header] = (b"cache-control", b"no-store")
_US: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response."""

    body: bytes
    media_type: str = "application/json"
    status: int = 200
    headers: tuple[Header, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamedAnswer:
    """A response sent piece by piece."""

    pieces: Callable[[], AsyncIterator[bytes]]
    media_type: str
    headers: tuple[Header, ...] = ()


Handler = Callable[[Scope], Awaitable[Answer | StreamedAnswer]]


@dataclass(slots=True)
class _Ready:
    """An answer as it goes out."""

    start: MutableMapping[str, Any]
    body: bytes
    until_us: int
    size: int = field(default=0)


def header(scope: Scope, name: bytes) -> str:
    """The value of a request header, '' when it is missing."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return ""


def problem_answer(problem: Problem, path: str) -> Answer:
    """The response of a problem."""
    extra: tuple[Header, ...] = ()
    if problem.retry_after_s is not None:
        extra = ((b"retry-after", str(problem.retry_after_s).encode()),)
    return Answer(problem.body(path), PROBLEM_TYPE, problem.status, extra)


class Endpoint:
    """One route as an ASGI app: runs ``handler``, turns what it raises into problems, sends what it returns.

    Args:
        name: the route's name in metrics.
        handler: the request's scope in, the answer out.
        metrics, clock, limits: as their names say.
        cached: identical requests within ``limits.cache_ttl_s`` share one answer, and one query while it runs.
        methods: allowed ones.
    """

    def __init__(
        self,
        name: str,
        handler: Handler,
        *,
        metrics: Metrics,
        clock: Clock,
        limits: ApiLimits,
        cached: bool = False,
        methods: tuple[str, ...] = ("GET", "HEAD"),
    ) -> None:
        self._name = name
        self._handler = handler
        self._metrics = metrics
        self._clock = clock
        self._limits = limits
        self._methods = methods
        self._ttl_us = int(limits.cache_ttl_s * _US) if cached else 0
        self._cache: OrderedDict[tuple[str, bytes, str, bool], _Ready] = OrderedDict()
        self._cache_bytes = 0
        self._running: dict[tuple[str, bytes, str, bool], asyncio.Future[_Ready | StreamedAnswer]] = {}
        self._count = {status: metrics.requests.labels(name, "GET", str(status)) for status in (200,)}
        self._seconds = metrics.duration.labels(name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        begun_us = self._clock.monotonic_us()
        method = scope["method"]
        ready = await self._ready(scope, method, begun_us)
        if isinstance(ready, StreamedAnswer):
            status = await self._send_stream(ready, send)
        else:
            status = ready.start["status"]
            await send(ready.start)
            await send({"type": "http.response.body", "body": b"" if method == "HEAD" else ready.body})
        if status == 200 and method == "GET":
            self._count[200].inc()
        else:
            self._metrics.requests.labels(self._name, method if method in self._methods else "other", str(status)).inc()
        self._seconds.observe((self._clock.monotonic_us() - begun_us) / _US)

    async def _ready(self, scope: Scope, method: str, now_us: int) -> _Ready | StreamedAnswer:
        if method not in self._methods:
            problem = Problem("method_not_allowed", f"{method[:20]} is not allowed here: use {' or '.join(self._methods)}.")
            answer = problem_answer(problem, scope["path"])
            allow = ((b"allow", ", ".join(self._methods).encode()),)
            return self._pack(Answer(answer.body, answer.media_type, answer.status, allow), zipped=False, until_us=0)
        zipped = "gzip" in header(scope, b"accept-encoding")
        if not self._ttl_us:
            return await self._run(scope, zipped)
        key = (scope["path"], scope["query_string"], header(scope, b"accept"), zipped)
        found = self._cache.get(key)
        if found is not None and found.until_us > now_us:
            self._metrics.cache_hits.inc()
            return found
        running = self._running.get(key)
        if running is not None:
            self._metrics.cache_hits.inc()
            return await asyncio.shield(running)
        self._metrics.cache_misses.inc()
        task = self._running[key] = asyncio.ensure_future(self._run(scope, zipped))
        task.add_done_callback(lambda _: self._running.pop(key, None))
        ready = await asyncio.shield(task)
        if isinstance(ready, StreamedAnswer):
            return ready
        if ready.start["status"] == 200:
            self._remember(key, ready)
        return ready

    async def _run(self, scope: Scope, zipped: bool) -> _Ready | StreamedAnswer:
        try:
            answer = await self._handler(scope)
        except Problem as exc:
            answer = problem_answer(exc, scope["path"])
        except StoreUnavailableError as exc:
            answer = problem_answer(exc.problem(), scope["path"])
        except Exception:
            logger.exception("Request %s failed", scope["path"])
            answer = problem_answer(Problem("internal", "Something went wrong here; it is in the log of the server."), scope["path"])
        if isinstance(answer, StreamedAnswer):
            return answer
        return self._pack(answer, zipped=zipped, until_us=self._clock.monotonic_us() + self._ttl_us)

    def _pack(self, answer: Answer, *, zipped: bool, until_us: int) -> _Ready:
        body = answer.body
        headers: list[Header] = [(b"content-type", answer.media_type.encode()), *answer.headers, *SECURITY_HEADERS, _NO_STORE]
        if zipped and len(body) >= self._limits.gzip_min_bytes:
            # Level 1: bars shrink to 25 % at 120 MB/s; level 6 gets 20 % at a third of the speed.
            body = gzip.compress(body, 1, mtime=0)
            headers.append((b"content-encoding", b"gzip"))
        headers += [(b"vary", b"accept, accept-encoding"), (b"content-length", str(len(body)).encode())]
        return _Ready({"type": "http.response.start", "status": answer.status, "headers": headers}, body, until_us, len(body) + 512)

    def _remember(self, key: tuple[str, bytes, str, bool], ready: _Ready) -> None:
        if ready.size > self._limits.cache_bytes // 8:
            return
        old = self._cache.pop(key, None)
        self._cache_bytes += ready.size - (old.size if old else 0)
        self._cache[key] = ready
        while self._cache_bytes > self._limits.cache_bytes:
            self._cache_bytes -= self._cache.popitem(last=False)[1].size

    async def _send_stream(self, answer: StreamedAnswer, send: Send) -> int:
        """Send headers with the first piece, so that a query that fails at once still gets its status."""
        headers = [(b"content-type", answer.media_type.encode()), *answer.headers, *SECURITY_HEADERS, _NO_STORE, (b"vary", b"accept")]
        pieces = answer.pieces()
        try:
            async with asyncio.timeout(self._limits.request_timeout_s):
                first = await anext(pieces, b"")
        except (StoreUnavailableError, Problem, TimeoutError) as exc:
            return await self._send_failed(exc, send)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        async for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return 200

    async def _send_failed(self, exc: Exception, send: Send) -> int:
        if isinstance(exc, StoreUnavailableError):
            problem = exc.problem()
        elif isinstance(exc, Problem):
            problem = exc
        else:
            problem = Problem("timeout", f"ClickHouse took longer than {self._limits.request_timeout_s:g} s: ask for a shorter range.")
        ready = self._pack(problem_answer(problem, ""), zipped=False, until_us=0)
        await send(ready.start)
        await send({"type": "http.response.body", "body": ready.body})
        return problem.status


class Shell:
    """The outermost app: refuses what is too large before anything reads it.

    Args:
        app: what answers everything else.
        limits: bounds.
    """

    def __init__(self, app: ASGIApp, limits: ApiLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one connection on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        problem = refusal(scope, self._limits)
        if problem is None:
            await self._app(scope, receive, send)
            return
        answer = problem_answer(problem, scope["path"][:200])
        headers = [(b"content-type", answer.media_type.encode()), *SECURITY_HEADERS, (b"connection", b"close")]
        headers.append((b"content-length", str(len(answer.body)).encode()))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})


def refusal(scope: Scope, limits: ApiLimits) -> Problem | None:
    """Why a request is refused before anything reads it; None for a good one."""
    target = len(scope["raw_path"] if scope.get("raw_path") else scope["path"]) + len(scope["query_string"])
    if target > limits.max_target_bytes:
        return Problem("uri_too_long", f"The address has {target:,} bytes, the limit is {limits.max_target_bytes:,}.")
    if scope["method"] in ("GET", "HEAD"):
        return None
    length = header(scope, b"content-length")
    if length.isdigit() and int(length) > limits.max_body_bytes:
        return Problem("request_too_large", f"The body has {int(length):,} bytes, the limit is {limits.max_body_bytes:,}.")
    return None
