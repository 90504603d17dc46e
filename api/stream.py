"""``WS /api/v1/stream``: one connection, many subscriptions. Requests in; acks, snapshots and live messages out.

Close codes: 1000 the client left, 1009 message too large, 1012 the server restarts, 1013 too many clients, 4408 the client reads too
slowly, 4429 too many requests. After 1012, 4408 or a lost line: connect again and subscribe ``from`` the last cursor of each series.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from api.catalogue import Catalogue
from api.cursors import LiveCursor
from api.deps import StreamLimits
from api.errors import PositionLostError, Problem, StoreUnavailableError
from api.http import Receive, Scope, Send
from api.live.client import RESTART_CLOSE, SLOW_CLOSE, Client, Subscription, TaskWriter, Writer
from api.live.hub import Hub
from api.live.requests import OPS, Refused, Request, cursor_of, parse_request, reply, request_id, series_of
from api.metrics import Metrics
from api.sessions_feed import SessionFeeds
from schemas.seam import Clock

logger = logging.getLogger(__name__)

_TOO_LARGE_CLOSE: Final = 1009
_FULL_CLOSE: Final = 1013
_BUSY_CLOSE: Final = 4429
_CLOSE_WAIT_S: Final = 2.0
_US: Final = 1_000_000
RAW_WRITER: Final = "marketstream.writer"
"""Scope extension of a server that offers an ``api.live.client.Writer``: many messages in one write, no task a client."""


class StreamApp:
    """The stream as an ASGI app; one instance serves all connections.

    Args:
        hub: where live messages come from.
        feeds: where those of sessions come from.
        catalogue: known instruments.
        metrics, clock, limits: as their names say.
    """

    def __init__(self, hub: Hub, feeds: SessionFeeds, catalogue: Catalogue, metrics: Metrics, clock: Clock, limits: StreamLimits) -> None:
        self._hub = hub
        self._feeds = feeds
        self._catalogue = catalogue
        self._metrics = metrics
        self._clock = clock
        self._limits = limits
        self._open: set[_Connection] = set()
        self._stopping = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection until it ends."""
        await receive()  # websocket.connect
        if self._stopping or len(self._open) >= self._limits.max_clients:
            code = RESTART_CLOSE if self._stopping else _FULL_CLOSE
            reason = "server restarts: try again" if self._stopping else "too many clients: try again later"
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close", "code": code, "reason": reason})
            return
        await send({"type": "websocket.accept"})
        connection = _Connection(scope, receive, send, self._hub, self._feeds, self._catalogue, self._metrics, self._clock, self._limits)
        self._open.add(connection)
        self._metrics.connections.set(len(self._open))
        try:
            await connection.serve()
        finally:
            self._open.discard(connection)
            self._metrics.connections.set(len(self._open))

    async def shutdown(self) -> None:
        """Tell every client that the server restarts and from which cursors to resume, then close (1012). Returns within seconds."""
        self._stopping = True
        for connection in list(self._open):
            connection.announce_restart()
        waiting = [connection.ended.wait() for connection in list(self._open)]
        if waiting:
            await asyncio.wait([asyncio.ensure_future(one) for one in waiting], timeout=_CLOSE_WAIT_S)


class _Connection:
    """One client."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        hub: Hub,
        feeds: SessionFeeds,
        catalogue: Catalogue,
        metrics: Metrics,
        clock: Clock,
        limits: StreamLimits,
    ) -> None:
        self._receive = receive
        self._send = send
        self._hub = hub
        self._catalogue = catalogue
        self._metrics = metrics
        self._clock = clock
        self._limits = limits
        writer: Writer = scope.get("extensions", {}).get(RAW_WRITER) or TaskWriter(self._send_text)
        self._client = Client(writer, limits.queue_bytes, metrics)
        self._subscriptions = self._client.subscriptions
        self._feeds = feeds
        self._feeding: dict[Subscription, asyncio.Task[None]] = {}
        self._work: set[asyncio.Task[None]] = set()
        self._tokens = limits.max_requests_per_s
        self._tokens_us = clock.monotonic_us()
        self._close: tuple[int, str] | None = None
        self.ended = asyncio.Event()

    async def serve(self) -> None:
        """Read requests until either side ends; messages go out by themselves."""
        tasks = {asyncio.ensure_future(self._read()), asyncio.ensure_future(self._client.ending.wait())}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self._client.overflow:
                self._metrics.closed_slow.inc()
                self._close = (SLOW_CLOSE, "slow consumer: reconnect and subscribe from the last cursor")
            elif self._close is not None:
                await self._flush()
        finally:
            tasks |= self._work
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for subscription in self._subscriptions.values():
                self._hub.unsubscribe(subscription)
            self._metrics.subscriptions.dec(len(self._subscriptions))
            self.ended.set()
        await self._say_goodbye()

    def announce_restart(self) -> None:
        """Queue the notice of a restart and end the connection once it is out."""
        cursors = [
            entry.key.fields | {"cursor": entry.series.announce("heartbeat", b"{}").cursor}
            for entry in self._subscriptions.values()
            if entry.series is not None
        ]
        self._client.say(reply("error", None, {"code": "restart", "detail": "The server restarts: resume from these.", "resume": cursors}))
        self._finish(RESTART_CLOSE, "server restarts: subscribe from the last cursor")

    # -- writing

    async def _send_text(self, text: str) -> None:
        await self._send({"type": "websocket.send", "text": text})

    async def _flush(self) -> None:
        """Give what is queued a moment to go out."""
        try:
            async with asyncio.timeout(_CLOSE_WAIT_S / 2):
                while self._client.waiting:
                    await self._clock.sleep(0.005)
        except TimeoutError:
            logger.info("A client did not take its last messages in time")

    async def _say_goodbye(self) -> None:
        if self._close is None:
            return
        code, reason = self._close
        try:
            async with asyncio.timeout(_CLOSE_WAIT_S / 2):
                await self._send({"type": "websocket.close", "code": code, "reason": reason})
        except (TimeoutError, OSError, RuntimeError):
            logger.info("A client was gone before it could be told why (%d)", code)

    def _finish(self, code: int, reason: str) -> None:
        self._close = (code, reason)
        self._client.ending.set()

    # -- reading

    async def _read(self) -> None:
        while True:
            event = await self._receive()
            if event["type"] == "websocket.disconnect":
                return
            text: str | bytes = event.get("text") or event.get("bytes") or ""
            if len(text) > self._limits.max_request_bytes:
                self._finish(_TOO_LARGE_CLOSE, f"a request has at most {self._limits.max_request_bytes} bytes")
                return
            if not self._allowed():
                self._finish(_BUSY_CLOSE, f"more than {self._limits.max_requests_per_s:g} requests a second")
                return
            self._handle(text)

    def _allowed(self) -> bool:
        """Token bucket over requests."""
        now_us = self._clock.monotonic_us()
        rate = self._limits.max_requests_per_s
        self._tokens = min(rate, self._tokens + (now_us - self._tokens_us) * rate / _US) - 1
        self._tokens_us = now_us
        return self._tokens >= 0

    def _handle(self, text: str | bytes) -> None:
        try:
            request = parse_request(text)
            if request.op == "subscribe":
                self._subscribe(request)
            elif request.op == "unsubscribe":
                self._unsubscribe(request)
            elif request.op == "list":
                listed = [entry.key.fields | {"id": entry.id, "seq": entry.seq} for entry in self._subscriptions.values()]
                self._client.say(reply("ack", request.id, {"op": "list", "subscriptions": listed}))
            else:
                self._client.say(reply("ack", request.id, {"op": OPS[-1], "time_us": self._clock.now_us()}))
        except Refused as exc:
            self._refuse(request_id(text), exc)

    def _refuse(self, id_: int | str | None, exc: Refused) -> None:
        self._metrics.refused.labels(exc.code).inc()
        body: dict[str, object] = {"code": exc.code, "detail": exc.detail}
        self._client.say(reply("error", id_, body | exc.extra))

    def _unsubscribe(self, request: Request) -> None:
        key = series_of(request)
        subscription = self._subscriptions.pop(key, None)
        if subscription is None:
            raise Refused("not_subscribed", f"There is no subscription to {key.fields}.")
        self._hub.unsubscribe(subscription)
        if subscription in self._feeding:
            self._feeding.pop(subscription).cancel()
        self._metrics.subscriptions.dec()
        self._client.say(reply("ack", request.id, {"op": "unsubscribe"} | key.fields))

    def _subscribe(self, request: Request) -> None:
        key = series_of(request)
        if key in self._subscriptions:
            raise Refused("already_subscribed", f"There is a subscription to {key.fields} already: unsubscribe first.")
        if len(self._subscriptions) >= self._limits.max_subscriptions:
            raise Refused("too_many_subscriptions", f"A connection has at most {self._limits.max_subscriptions} subscriptions.")
        most = self._limits.snapshot_rows(key.channel)
        limit = most if request.limit is None else request.limit
        if not 0 <= limit <= most:
            raise Refused("invalid_limit", f"limit is {limit}, a snapshot of {key.channel} has 0 to {most} rows: ask REST for more.")
        cursor = cursor_of(request, key, self._hub.partition(key))
        subscription = Subscription(request.id, key, self._client, limit)
        self._subscriptions[key] = subscription
        self._metrics.subscriptions.inc()
        if request.session is None:
            task = asyncio.ensure_future(self._begin(subscription, cursor))
        else:
            task = self._feeding[subscription] = asyncio.ensure_future(self._feed(subscription, cursor, request.session))
            task.add_done_callback(lambda _: self._feeding.pop(subscription, None))
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _feed(self, subscription: Subscription, cursor: LiveCursor | None, name: str) -> None:
        """Check the session, acknowledge, and send what it sees until its end; a failure ends the subscription with an error."""
        key = subscription.key
        try:
            await self._catalogue.check(key.exchange, key.symbol)
            opened = await self._feeds.open(name, key, cursor)
            subscription.epoch = opened.session.epoch
            self._metrics.resumes.labels("session").inc()
            ack: dict[str, object] = {"op": "subscribe"}
            self._client.say(reply("ack", subscription.id, ack | key.fields | opened.session.fields))
            await self._feeds.run(opened, subscription)
        except Refused as exc:
            self._fail(subscription, exc)
        except Problem as exc:
            self._fail(subscription, Refused(exc.code, exc.detail, **exc.extra))
        except StoreUnavailableError as exc:
            self._fail(subscription, Refused(f"{exc.store}_unavailable", exc.reason))
        except Exception:
            logger.exception("The session '%s' of %s failed", name, key)
            self._fail(subscription, Refused("internal", "Something went wrong here; it is in the log of the server."))

    async def _begin(self, subscription: Subscription, cursor: LiveCursor | None) -> None:
        """Check the instrument, acknowledge, and let the hub deliver; a failure ends the subscription with an error."""
        key = subscription.key
        try:
            await self._catalogue.check(key.exchange, key.symbol)
            await self._hub.ready(key)
            subscription.epoch = self._hub.epoch(key.channel)
            self._metrics.resumes.labels("snapshot" if cursor is None else "cursor").inc()
            ack: dict[str, object] = {"op": "subscribe"}
            self._client.say(reply("ack", subscription.id, ack | key.fields))
            try:
                async with asyncio.timeout(self._limits.resume_timeout_s):
                    await self._hub.subscribe(subscription, cursor, subscription.limit)
            except PositionLostError as exc:
                await self._hub.restart(subscription, f"The cursor cannot be continued: {exc}")
        except Problem as exc:
            self._fail(subscription, Refused(exc.code, exc.detail, **exc.extra))
        except StoreUnavailableError as exc:
            self._fail(subscription, Refused(f"{exc.store}_unavailable", exc.reason))
        except TimeoutError:
            self._fail(subscription, Refused("timeout", f"Catching up took longer than {self._limits.resume_timeout_s:g} s: try again."))
        except Exception:
            logger.exception("Subscribing to %s failed", key)
            self._fail(subscription, Refused("internal", "Something went wrong here; it is in the log of the server."))

    def _fail(self, subscription: Subscription, why: Refused) -> None:
        self._hub.unsubscribe(subscription)
        if self._subscriptions.get(subscription.key) is subscription:
            del self._subscriptions[subscription.key]
            self._metrics.subscriptions.dec()
        self._refuse(subscription.id, why)
