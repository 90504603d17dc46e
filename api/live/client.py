"""One WebSocket client: messages of its subscriptions in, text frames out, bounded. Nothing here waits for the network but the writer."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import msgspec

from api.cursors import Position
from api.live.series import Message, Series, SeriesKey

if TYPE_CHECKING:
    from api.metrics import Metrics

SLOW_CLOSE: Final = 4408
"""Close code of a client that read too slowly: connect again and subscribe ``from`` the last cursor."""
RESTART_CLOSE: Final = 1012
_HIGH_SHARE: Final = 0.25
"""Catching up waits while more than this share of the queue is taken; live messages may use all of it."""


class Subscription:
    """One series for one client. ``push`` is what a series calls."""

    __slots__ = ("_epoch", "client", "closed", "head", "id", "key", "limit", "pushed_us", "seq", "series", "skip_until")

    def __init__(self, id_: int | str | None, key: SeriesKey, client: Client, limit: int) -> None:
        self.id = id_
        self.key = key
        self.client = client
        self.limit = limit
        self.closed = False
        self.seq = 0
        self.series: Series | None = None
        self.skip_until = Position(-1)
        self.pushed_us = 0
        self.epoch = 0

    @property
    def epoch(self) -> int:
        """Incarnation of the topic its cursors belong to; set once the topic is known."""
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch = value
        fields = msgspec.json.encode(self.key.fields | {"epoch": f"{value:016x}"}).decode()
        self.head = fields[:-1] + ',"seq":'

    def attach(self, series: Series, skip_until: Position) -> None:
        """Get the messages of ``series`` that begin at ``skip_until`` or later."""
        if self.series is not None:
            self.series.subscribers.discard(self)
        if self.closed:
            return
        self.series = series
        self.skip_until = skip_until
        series.subscribers.add(self)

    def push(self, message: Message) -> None:
        """Queue a message unless its rows were delivered before."""
        if not self.closed and message.start >= self.skip_until:
            self.client.enqueue(self, message)


class Client:
    """The sending side of one connection.

    Args:
        send_texts: sends text messages in one go; waits while the peer does not read.
        queue_bytes: bound of what waits; beyond it ``overflow`` is set and everything waiting is dropped.
        now_us: monotonic time.
        metrics: counters.
    """

    def __init__(
        self, send_texts: Callable[[list[str]], Awaitable[None]], queue_bytes: int, now_us: Callable[[], int], metrics: Metrics
    ) -> None:
        self.overflow = False
        self.ending = asyncio.Event()
        """Set when the connection must end: overflow or shutdown."""
        self.subscriptions: dict[SeriesKey, Subscription] = {}
        self._send_texts = send_texts
        self._queue_bytes = queue_bytes
        self._now_us = now_us
        self._metrics = metrics
        self._queue: deque[tuple[Subscription | None, str]] = deque()
        self._open: dict[Subscription, str] = {}
        self._size = 0
        self._sending = False
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def enqueue(self, subscription: Subscription, message: Message) -> None:
        """Queue a message; an update of an open bar replaces the one that still waits."""
        subscription.pushed_us = self._now_us()
        if message.kind == "open":
            if self._open.pop(subscription, None) is not None:
                self._metrics.conflated.inc()
            self._open[subscription] = message.tail
        else:
            waiting = self._open.pop(subscription, None)
            if waiting is not None and message.kind in ("corrected", "heartbeat"):
                self._append(subscription, waiting)  # it is about another bar, and not superseded
            self._append(subscription, message.tail)
        self._wake.set()

    def say(self, text: str) -> None:
        """Queue a whole message that belongs to no subscription: ack, error."""
        self._append(None, text)
        self._wake.set()

    def _append(self, subscription: Subscription | None, text: str) -> None:
        if self.overflow:
            return
        self._size += len(text)
        if self._size > self._queue_bytes:
            self.overflow = True
            self._queue.clear()
            self._open.clear()
            self._size = 0
            self._room.set()
            self.ending.set()
            return
        self._queue.append((subscription, text))
        if self._size > self._queue_bytes * _HIGH_SHARE:
            self._room.clear()

    @property
    def waiting(self) -> bool:
        """Whether anything is queued or on its way to the peer."""
        return bool(self._queue or self._open or self._sending)

    async def drained(self) -> None:
        """Return when a reader of history may push more."""
        await self._room.wait()

    async def write(self) -> None:
        """Send what is queued, for ever; ends by cancellation or when the peer is gone."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue or self._open:
                texts = self._take()
                self._sending = True
                await self._send_texts(texts)
                self._sending = False
                self._metrics.messages_sent.inc(len(texts))

    def _take(self) -> list[str]:
        """Everything that waits, each with its head and number."""
        texts: list[str] = []
        for subscription, text in self._queue:
            if subscription is None:
                texts.append(text)
            elif not subscription.closed:
                subscription.seq += 1
                texts.append(f"{subscription.head}{subscription.seq}{text}")
        for subscription, text in self._open.items():
            if not subscription.closed:
                subscription.seq += 1
                texts.append(f"{subscription.head}{subscription.seq}{text}")
        self._queue.clear()
        self._open.clear()
        self._size = 0
        self._room.set()
        return texts
