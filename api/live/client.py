"""One WebSocket client: messages of its subscriptions in, text messages out, bounded. Nothing here waits for the network."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

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


class Writer(Protocol):
    """The way to the peer, as the server gives it."""

    def ready(self) -> bool:
        """Whether the peer takes more; when it does again, :meth:`on_ready`'s callable is called."""
        ...

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever the peer takes more again."""
        ...

    def write(self, texts: Sequence[bytes]) -> None:
        """Hand over text messages (UTF-8) in one go. Never waits; does nothing when the peer is gone."""
        ...


class TaskWriter:
    """A Writer over an ASGI ``send``, for servers that offer nothing quicker: one message after the other, in a task."""

    def __init__(self, send_text: Callable[[str], Awaitable[None]]) -> None:
        self._send_text = send_text
        self._callback: Callable[[], None] = lambda: None
        self._task: asyncio.Task[None] | None = None

    def ready(self) -> bool:
        """Whether the last batch is out."""
        return self._task is None or self._task.done()

    def on_ready(self, callback: Callable[[], None]) -> None:
        """See Writer."""
        self._callback = callback

    def write(self, texts: Sequence[bytes]) -> None:
        """See Writer."""
        self._task = asyncio.ensure_future(self._send(texts))

    async def _send(self, texts: Sequence[bytes]) -> None:
        try:
            for text in texts:
                await self._send_text(text.decode())
        except (OSError, RuntimeError):
            return  # the peer is gone; the reader sees it and ends the connection
        asyncio.get_running_loop().call_soon(self._callback)


class Subscription:
    """One series for one client. ``push`` is what a series calls."""

    __slots__ = ("_epoch", "client", "closed", "head", "id", "key", "limit", "quiet", "seq", "series", "skip_until")

    def __init__(self, id_: int | str | None, key: SeriesKey, client: Client, limit: int) -> None:
        self.id = id_
        self.key = key
        self.client = client
        self.limit = limit
        self.closed = False
        self.seq = 0
        self.series: Series | None = None
        self.skip_until = Position(-1)
        self.quiet = False
        """Nothing was pushed since the last heartbeat round."""
        self.epoch = 0

    @property
    def epoch(self) -> int:
        """Incarnation of the topic its cursors belong to; set once the topic is known."""
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch = value
        fields = msgspec.json.encode(self.key.fields | {"epoch": f"{value:016x}"})
        self.head = fields[:-1] + b',"seq":'

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
            self.quiet = False
            self.client.enqueue(self, message)


class Client:
    """The sending side of one connection.

    Args:
        writer: the way to the peer.
        queue_bytes: bound of what waits; beyond it ``overflow`` is set and everything waiting is dropped.
        metrics: counters.
    """

    def __init__(self, writer: Writer, queue_bytes: int, metrics: Metrics) -> None:
        self.overflow = False
        self.ending = asyncio.Event()
        """Set when the connection must end: overflow or shutdown."""
        self.subscriptions: dict[SeriesKey, Subscription] = {}
        self._writer = writer
        self._queue_bytes = queue_bytes
        self._high_bytes = int(queue_bytes * _HIGH_SHARE)
        self._metrics = metrics
        self._queue: deque[tuple[Subscription | None, bytes]] = deque()
        self._open: dict[Subscription, bytes] = {}
        self._size = 0
        self._scheduled = False
        self._room = asyncio.Event()
        self._room.set()
        self._call_soon = asyncio.get_running_loop().call_soon
        writer.on_ready(self.flush)

    def enqueue(self, subscription: Subscription, message: Message) -> None:
        """Queue a message; an update of an open bar replaces the one that still waits."""
        if message.kind == "open":
            if self._open.pop(subscription, None) is not None:
                self._metrics.conflated += 1
            self._open[subscription] = message.tail
        else:
            if self._open:
                self._settle_open(subscription, message.kind)
            self._append(subscription, message.tail)
        if not self._scheduled:
            self._scheduled = True
            self._call_soon(self.flush)

    def say(self, text: bytes) -> None:
        """Queue a whole message that belongs to no subscription: ack, error."""
        self._append(None, text)
        if not self._scheduled:
            self._scheduled = True
            self._call_soon(self.flush)

    def _settle_open(self, subscription: Subscription, kind: str) -> None:
        """A final bar makes the waiting update of its bar worthless; a correction or heartbeat is about something else."""
        waiting = self._open.pop(subscription, None)
        if waiting is not None and kind in ("corrected", "heartbeat"):
            self._append(subscription, waiting)

    def _append(self, subscription: Subscription | None, text: bytes) -> None:
        if self.overflow:
            return
        self._size += len(text)
        self._queue.append((subscription, text))
        if self._size > self._high_bytes:
            self._room.clear()
            if self._size > self._queue_bytes:
                self.overflow = True
                self._clear()
                self.ending.set()

    def _clear(self) -> None:
        self._queue.clear()
        self._open.clear()
        self._size = 0
        self._room.set()

    @property
    def waiting(self) -> bool:
        """Whether anything is queued."""
        return bool(self._queue or self._open)

    async def drained(self) -> None:
        """Return when a reader of history may push more."""
        await self._room.wait()

    def flush(self) -> None:
        """Hand what waits to the peer, if it takes more."""
        self._scheduled = False
        if not (self._queue or self._open) or not self._writer.ready():
            return
        texts: list[bytes] = []
        for subscription, text in self._queue:
            if subscription is None:
                texts.append(text)
            elif not subscription.closed:
                subscription.seq += 1
                texts.append(b"%b%d%b" % (subscription.head, subscription.seq, text))
        for subscription, text in self._open.items():
            if not subscription.closed:
                subscription.seq += 1
                texts.append(b"%b%d%b" % (subscription.head, subscription.seq, text))
        self._clear()
        self._metrics.messages_sent += len(texts)
        self._writer.write(texts)
