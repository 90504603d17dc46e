"""Whether a process gets on with its work: counters in, the reason to restart it out.

A process can live, answer and do nothing. So each one counts what it has done, and a thread of its own looks whether that number moves
while work waits. It does not blame a process for what others do: nothing waits, or somebody else is away, and the time does not count.
``/livez`` of a stuck process is 503 with the reason; the supervisor (or Docker, or Kubernetes) restarts it. ``/progress`` shows the counters.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

from schemas.seam import Clock

logger = logging.getLogger(__name__)

_LONGEST_STEP_US: Final = 3_000_000
"""What one look may add to the time without progress: a machine that slept, or a process that was stopped, is not stuck for that."""
_LOOK_S: Final = 1.0
_STILL_S: Final = 2.0
"""Only when nothing was done for this long is it asked what waits: that may cost a request to the broker."""
_IDLE_LOOK_S: Final = 5.0
"""Between two such questions while nothing waits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """What a process could be doing."""

    count: int = 0
    """Pieces of work that wait for it."""
    blocked: dict[str, str] | None = None
    """Who keeps it from them: name -> one sentence; None or {} when nobody does."""


class Work(Protocol):
    """What a process does, as its watchdog sees it. Called from the watchdog's thread."""

    @property
    def verb(self) -> str:
        """What is done to a piece of work: ``applied``, ``stored``."""
        ...

    def done(self) -> int:
        """A number that changes with each piece of work done. Cheap; never blocks."""
        ...

    def waiting(self) -> Waiting:
        """What waits and who is in the way. May block for some seconds."""
        ...


class Watchdog:
    """The rule: work waits, nobody is in the way, and nothing was done for ``stuck_after_s`` of watched time. Pure.

    Args:
        stuck_after_s: longer than anything a healthy process may be busy with at a stretch.
        verb: for the reason.
    """

    def __init__(self, stuck_after_s: float, verb: str = "done") -> None:
        self._limit_us = int(stuck_after_s * 1e6)
        self._verb = verb
        self._done: int | None = None
        self._seen_us = 0
        self._guilty_us = 0  # time with work waiting, nobody in the way and nothing done
        self.still_us = 0
        """Time since the last piece of work, microseconds, whatever the reason."""
        self.waiting = Waiting()

    def observe(self, mono_us: int, done: int, waiting: Waiting | None = None) -> None:
        """One look; ``waiting`` None: as it was."""
        step = min(max(mono_us - self._seen_us, 0), _LONGEST_STEP_US) if self._done is not None else 0
        self._seen_us = mono_us
        if waiting is not None:
            self.waiting = waiting
        if done != self._done:
            self._done, self.still_us, self._guilty_us = done, 0, 0
            self.waiting = waiting or Waiting()
            return
        self.still_us += step
        self._guilty_us = self._guilty_us + step if self.waiting.count > 0 and not self.waiting.blocked else 0

    @property
    def stuck(self) -> str:
        """Why the process should be started anew; empty when it should not."""
        if self._guilty_us < self._limit_us:
            return ""
        return f"{self.waiting.count:,} records wait and none was {self._verb} for {self._guilty_us / 1e6:.0f} s"


class Monitor:
    """A thread that looks once a second.

    Args:
        work: what the process does.
        stuck_after_s: see :class:`Watchdog`.
        clock: only its monotonic time is read.
    """

    def __init__(self, work: Work, stuck_after_s: float, clock: Clock) -> None:
        self._work, self._clock = work, clock
        self._watchdog = Watchdog(stuck_after_s, work.verb)
        self._asked_us = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._done = 0
        self._told = ""

    def start(self) -> Self:
        """Begin to look."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End; does not wait."""
        self._ended.set()

    def stuck(self) -> str:
        """Why the process should be started anew; empty when it should not."""
        return self._watchdog.stuck

    def reasons(self) -> dict[str, str]:
        """What belongs into ``/readyz``."""
        found = dict(self._watchdog.waiting.blocked or {})
        if stuck := self._watchdog.stuck:
            found["stuck"] = f"The process does not get on: {stuck}."
        return found

    def document(self) -> dict[str, Any]:
        """What ``/progress`` shows."""
        watchdog = self._watchdog
        return {
            "done": self._done,
            "verb": self._work.verb,
            "age_s": round(watchdog.still_us / 1e6, 1),
            "waiting": watchdog.waiting.count,
            "blocked": watchdog.waiting.blocked or {},
            "stuck": watchdog.stuck,
        }

    def look(self) -> None:
        """One look; the thread does this once a second."""
        self._done = done = self._work.done()
        watchdog = self._watchdog
        watchdog.observe(self._clock.monotonic_us(), done)
        if watchdog.still_us >= _STILL_S * 1e6 and self._may_ask():
            waiting = self._work.waiting()
            self._asked_us = self._clock.monotonic_us()
            watchdog.observe(self._asked_us, self._work.done(), waiting)
        if watchdog.stuck != "" and not self._told:
            logger.error("The watchdog asks for a restart: %s", watchdog.stuck)
        self._told = watchdog.stuck

    def _may_ask(self) -> bool:
        waiting = self._watchdog.waiting
        if waiting.count or waiting.blocked:
            return True
        return self._clock.monotonic_us() - self._asked_us >= _IDLE_LOOK_S * 1e6

    def _run(self) -> None:
        while not self._ended.wait(_LOOK_S):
            try:
                self.look()
            except Exception:  # a watchdog that fails must not take down what it watches; it says so and looks again
                logger.exception("The watchdog could not look")
