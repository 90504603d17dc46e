"""One open connection of a feed and what it is subscribed to.

Comes in: the streams that are wanted. Goes out: the venue's requests, no faster than it takes them, each waiting for its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from collectors.connection import Connection
from collectors.errors import SubscribeError, WireError
from collectors.rate_limit import RateLimit, RateLimitConfig
from collectors.wire import Reply
from schemas.seam import Clock

PROBE_INTERVAL_US: Final = 450_000
"""Between two pings to a silent feed: two a second, of the five messages a second Binance takes."""
_NEVER_US: Final = 2**63


class Feed(Protocol):
    """A venue's manners on one connection."""

    url: str
    """Where to connect."""
    max_age_s: float
    """A connection older than this is replaced."""
    messages_per_s: float
    """Requests the venue takes a second on one connection, pings included."""

    def requests(self, streams: Sequence[str], *, subscribe: bool) -> list[tuple[list[str], int, str]]:
        """Requests that (un)subscribe ``streams``: (streams, request id, text) each; ids are never used twice."""
        ...


class Answers:
    """Who waits for which answer of the venue; shared by the connections of a shard, whose messages are parsed together."""

    def __init__(self) -> None:
        self._waiting: dict[int | str, asyncio.Future[Reply]] = {}

    def expect(self, request_id: int) -> asyncio.Future[Reply]:
        """A future for the answer to ``request_id``."""
        waiter: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = waiter
        return waiter

    def forget(self, request_id: int) -> None:
        """Nobody waits any more."""
        self._waiting.pop(request_id, None)

    def arrived(self, reply: Reply) -> bool:
        """Hand an answer to who waits for it; False when nobody does."""
        waiter = self._waiting.pop(reply.request_id, None) if reply.request_id is not None else None
        if waiter is None or waiter.done():
            return False
        waiter.set_result(reply)
        return True


@dataclass(slots=True)
class Renewal:
    """When a connection is to be replaced."""

    max_age_s: float
    not_before_us: int = 0
    """After a failed renewal the next one waits until then."""

    def is_due(self, opened_us: int, mono_us: int) -> bool:
        """Whether it is time."""
        return mono_us - opened_us > self.max_age_s * 1e6 and mono_us >= self.not_before_us


class Link:
    """One connection.

    Args:
        name: the shard's, for messages.
        connection: open.
        feed: the venue's manners.
        answers: the shard's.
        clock: time, sleep, randomness.
        ack_timeout_s: a request without answer for this long is a failure.
    """

    def __init__(self, name: str, connection: Connection, feed: Feed, answers: Answers, clock: Clock, *, ack_timeout_s: float) -> None:
        self.connection = connection
        self.subscribed: set[str] = set()
        self.again: set[str] = set()
        """Streams to subscribe once more: they went silent."""
        # half an hour of stagger: shards that started together do not renew together
        self.renewal = Renewal(feed.max_age_s * (1.0 - 0.02 * clock.random.random()))
        self.proven = False
        """It held for some seconds."""
        self._name, self._feed, self._answers, self._clock = name, feed, answers, clock
        self._ack_timeout_s = ack_timeout_s
        # a bucket of one and 60 % of the rate: four messages in any second of five, one is left for a ping or a pong
        self._budget = RateLimit(RateLimitConfig(weight_per_minute=60 * feed.messages_per_s, burst=1.0, share=0.6))
        self._probe_after_us = 0
        self._probe_sent_us = 0  # of the ping that is not answered yet; 0: none

    async def subscribe(self, wanted: Callable[[], set[str]]) -> None:
        """Bring the subscriptions to what is wanted, also when that changes meanwhile. Raises WireError."""
        while True:
            again = self.again & wanted()
            self.again.clear()
            add, drop = sorted((wanted() - self.subscribed) | again), sorted(self.subscribed - wanted())
            if not add and not drop:
                return
            for streams, request_id, text in self._feed.requests(drop, subscribe=False):
                await self._request(request_id, text)
                self.subscribed.difference_update(streams)
            for streams, request_id, text in self._feed.requests(add, subscribe=True):
                await self._request(request_id, text)
                self.subscribed.update(streams)

    def may_probe(self, mono_us: int) -> bool:
        """Whether a ping may be sent: the one before is answered and some time has passed."""
        return mono_us >= self._probe_after_us

    def unanswered_us(self, mono_us: int) -> int:
        """How long our last ping has waited for its answer; 0: none waits."""
        return mono_us - self._probe_sent_us if self._probe_sent_us else 0

    async def probe(self) -> int | None:
        """Ping; the monotonic time it was sent once it is answered, None when the connection ended."""
        sent_us = self._probe_sent_us = self._clock.monotonic_us()
        self._probe_after_us = _NEVER_US
        with contextlib.suppress(WireError):
            await self.connection.probe()
            self._probe_sent_us = 0
            self._probe_after_us = sent_us + PROBE_INTERVAL_US
            return sent_us
        return None

    async def _request(self, request_id: int, text: str) -> None:
        while (wait_s := self._budget.wait_s(1.0, self._clock.monotonic_us())) > 0:
            await self._clock.sleep(wait_s)
        self._budget.take(1.0, self._clock.monotonic_us())
        answer, closed = self._answers.expect(request_id), self.connection.closed
        try:
            await self.connection.send(text)
            either: set[asyncio.Future[Any]] = {answer, closed}
            done, _ = await asyncio.wait(either, timeout=self._ack_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._answers.forget(request_id)
        if answer in done:
            if answer.result().error:
                raise SubscribeError(f"{self._name}: the venue refused a subscription: {answer.result().error}")
            return
        if closed.done():
            raise WireError(f"{self._name}: the connection ended while subscribing: {closed.result()}.")
        raise SubscribeError(f"{self._name}: the venue did not acknowledge a subscription within {self._ack_timeout_s:g} s.")
