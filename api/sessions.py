"""Sessions of the time machine: a moment and a pace under an id, which REST, the stream and every later consumer take.

A session has a *virtual now*: ``as_of + speed x (wall clock - start)``, never beyond ``until``; at speed ``max`` (0) it has no pace of its own:
a stream runs from ``as_of`` to ``until`` as fast as it is read, and a single question is answered as of ``until``. What a reader may see at a
virtual now V follows from the session's clock:

* ``known`` - what the system knew at V: rows whose record was published at or before V (``known_at_us``) and that lie at or before V
  themselves. A revision replaces its bar at the moment it was published, a backfilled trade appears when it was fetched. This is what a live
  consumer had at V, bit for bit, without any look ahead.
* ``market`` - what happened until V, as the system knew it when the session was made: trades at or before V and bars that had closed, each in
  its newest revision. For recordings and backfills that were stored long after they happened.

Rows appear in one order: by the time they appear, then by their place in the topic (``known``), then by their key. Nothing that is
stored after the session was made belongs to it, so every reader of a session sees the same rows in the same order, however often it looks.
Open bars are not stored and so are no part of a session. A session costs a row in PostgreSQL and, while somebody reads it, one bounded query
at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Final, Protocol

from api.errors import Problem
from api.live.series import SeriesKey
from schemas.seam import Clock
from schemas.timeframes import format_time_us

if TYPE_CHECKING:
    from api.params import Range  # which knows api.deps, which knows this module

KNOWN: Final = "known"
MARKET: Final = "market"
CLOCKS: Final = (KNOWN, MARKET)
MAX_ID_CHARS: Final = 64
_US: Final = 1_000_000
_TTL_US: Final = 1_000_000
"""A session that was stopped is refused within this time."""
_REMEMBERED: Final = 1_024


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One session; nothing of it ever changes but that it is stopped."""

    id: str
    clock: str
    """``known`` or ``market``."""
    as_of_us: int
    """Virtual now when it began."""
    until_us: int
    """Virtual now never passes this."""
    started_us: int
    """Wall clock when it was made."""
    pinned_us: int
    """What was published after this is no part of it."""
    speed: float
    """Virtual seconds a second; 0: as fast as it is read."""
    stopped: bool = False

    @property
    def epoch(self) -> int:
        """64-bit name for its cursors: one of another session, or of the live stream, is told from its own."""
        return int.from_bytes(sha256(self.id.encode()).digest()[:8], "big")

    def now_us(self, wall_us: int) -> int:
        """The virtual now."""
        if not self.speed:
            return self.until_us
        return min(self.as_of_us + int(max(wall_us - self.started_us, 0) * self.speed), self.until_us)

    def begin_us(self, wall_us: int) -> int:
        """Where a new stream begins: the virtual now, or the session's beginning when it has no pace."""
        return self.now_us(wall_us) if self.speed else self.as_of_us

    def wait_s(self, due_us: int, wall_us: int) -> float:
        """Seconds until the virtual now is ``due_us``; 0 when it is, or when the session has no pace."""
        if not self.speed:
            return 0.0
        return max((due_us - self.as_of_us) / self.speed - (wall_us - self.started_us), 0.0) / _US

    def known_at_us(self, now_us: int) -> int:
        """Rows published after this are not to be seen at a virtual now."""
        return min(now_us, self.pinned_us) if self.clock == KNOWN else self.pinned_us

    def end_us(self, key: SeriesKey, now_us: int) -> int:
        """Rows whose time (open time of a bar) is this or later are not to be seen at a virtual now."""
        return now_us + 1 - (key.timeframe_s * _US if self.clock == MARKET else 0)

    def narrow(self, asked: Range, wall_us: int) -> Range:
        """The part of a request for history that the session may see now."""
        if asked.cursor is not None:
            return asked  # the page before was narrowed, and the cursor holds its range and what was known
        now_us = self.now_us(wall_us)
        return replace(asked, end_us=min(asked.end_us, self.end_us(asked.key, now_us)), known_at_us=self.known_at_us(now_us))

    def seen_until_us(self, asked: Range) -> int:
        """The virtual now that a narrowed request without an end was narrowed to."""
        return asked.end_us - self.end_us(asked.key, 0)

    @property
    def fields(self) -> dict[str, object]:
        """What an answer says about it."""
        return {
            "session": self.id,
            "clock": self.clock,
            "as_of_us": self.as_of_us,
            "until_us": self.until_us,
            "speed": self.speed or "max",
        }


class SessionStore(Protocol):
    """PostgreSQL's table of sessions. An unreachable server raises StoreUnavailableError."""

    async def session(self, name: str) -> Session | None:
        """The session with that id, stopped or not; None when there is none."""
        ...


class NoSessions:
    """A store without any, for an API without PostgreSQL."""

    async def session(self, name: str) -> Session | None:
        """None."""
        return None


class Sessions:
    """Sessions by id, each remembered for a second.

    Args:
        store: PostgreSQL.
        clock: the wall clock that paces them.
    """

    def __init__(self, store: SessionStore, clock: Clock) -> None:
        self.clock = clock
        self._store = store
        self._known: dict[str, tuple[int, Session | None]] = {}

    async def find(self, name: str) -> Session:
        """The session with that id. Raises Problem ``unknown_session`` or ``session_ended`` (404), StoreUnavailableError."""
        if not name or len(name) > MAX_ID_CHARS:
            raise Problem("unknown_session", "'session' is empty or too long: give the id that `marketstream replay --as-of` printed.")
        now_us = self.clock.monotonic_us()
        found = self._known.get(name)
        if found is None or now_us - found[0] > _TTL_US:
            found = (now_us, await self._store.session(name))
            while len(self._known) >= _REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[name] = found
        session = found[1]
        if session is None:
            raise Problem("unknown_session", f"There is no session '{name}': `marketstream sessions list` shows those there are.")
        if session.stopped:
            raise Problem("session_ended", f"Session '{name}' was stopped: make another one with `marketstream replay --as-of`.")
        return session


def describe(session: Session) -> str:
    """One sentence about a session."""
    pace = f"{session.speed:g} virtual seconds a second" if session.speed else "as fast as it is read"
    what = "what was known" if session.clock == KNOWN else "what had happened, as known now"
    return f"{what} from {format_time_us(session.as_of_us)} to {format_time_us(session.until_us)}, {pace}"
