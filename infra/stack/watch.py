"""Whether a process that runs also answers: addresses asked in the background, verdicts out.

Three things end a running process: its own watchdog says that it is stuck (``/livez`` answers 503), it answers nobody for too long (it
hangs, or was stopped), and nothing else. That a server it needs is away is no reason: the process is not at fault.
"""

from __future__ import annotations

import http.client
import json
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from infra.stack.spec import probe

ASK_TIMEOUT_S: Final = 2.0
ASK_EVERY_S: Final = 2.0
"""Between two questions to one process: each costs it and us half a millisecond."""
MOST_PATIENCE: Final = 8
"""A process ended for its silence is given twice as long the next time, up to this factor."""
VERDICTS_KEPT_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    answered: bool
    detail: str = ""
    """Why not; or, from one that answered, why it wants to be started anew."""


def ask(live: str, timeout_s: float = ASK_TIMEOUT_S) -> Answer:
    """Ask what ``ProcessSpec.live`` names. Blocks for ``timeout_s`` or so.

    ``http``: any answer counts, 503 of ``/livez`` asks for a restart; ``kafka``, ``postgres``: they speak their protocol; ``tcp``: it accepts.
    """
    url = urlsplit(live)
    if url.scheme != "http":
        reason = probe(live, timeout_s)
        return Answer(reason is None, reason or "")
    link = http.client.HTTPConnection(url.hostname or "127.0.0.1", url.port or 80, timeout=timeout_s)
    try:
        link.request("GET", url.path or "/")
        response = link.getresponse()
        return Answer(True, _complaint(response.status, response.read(2_000)))
    except (OSError, http.client.HTTPException) as exc:
        return Answer(False, f"port {url.port} does not answer ({getattr(exc, 'strerror', None) or type(exc).__name__})")
    finally:
        link.close()


def _complaint(status: int, body: bytes) -> str:
    if status != 503:
        return ""
    try:
        document = json.loads(body)
        return str(document["reason"]) if document.get("status") == "stuck" else ""
    except (ValueError, KeyError, AttributeError):
        return ""


class Hearing:
    """What is known of one process; pure. Times are monotonic seconds.

    Args:
        silent_s: without any answer for this long it is ended.
        first_s: until its first answer it may take this long.
    """

    def __init__(self, silent_s: float, first_s: float) -> None:
        self._silent_s, self._first_s = silent_s, first_s
        self._heard_at = 0.0
        self._answered = False
        self._verdicts: deque[float] = deque()

    def begin(self, now: float) -> None:
        """The process was started."""
        self._heard_at, self._answered = now, False

    def slept(self, now: float) -> None:
        """We ourselves did not run for a while: what others did meanwhile is not known."""
        self._heard_at = now

    def note(self, now: float, answer: Answer) -> str:
        """An answer, or none; why the process must be ended, empty when it need not be."""
        if answer.answered:
            self._heard_at, self._answered = now, True
            return self._verdict(now, answer.detail) if answer.detail else ""
        silent_s = now - self._heard_at
        limit_s = self._silent_s * min(2 ** len(self._recent(now)), MOST_PATIENCE) if self._answered else max(self._first_s, self._silent_s)
        return self._verdict(now, f"did not answer for {silent_s:.0f} s ({answer.detail})") if silent_s > limit_s else ""

    def verdicts(self, now: float) -> int:
        """How often it was ended lately."""
        return len(self._recent(now))

    def _verdict(self, now: float, reason: str) -> str:
        self._verdicts.append(now)
        return reason

    def _recent(self, now: float) -> deque[float]:
        while self._verdicts and now - self._verdicts[0] > VERDICTS_KEPT_S:
            self._verdicts.popleft()
        return self._verdicts


class Asker:
    """Asks many addresses at a time, so that one that hangs delays nobody."""

    def __init__(self, threads: int = 8) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ask")
        self._asked: dict[str, Future[Answer]] = {}
        self._next_at: dict[str, float] = {}

    def answer(self, name: str, live: str, now: float) -> Answer | None:
        """The answer to the last question about ``name``, once; None while there is none. Asks again when it is time."""
        asked = self._asked.get(name)
        if asked is not None and asked.done():
            del self._asked[name]
            return asked.result()
        if asked is None and now >= self._next_at.get(name, 0.0):
            self._next_at[name] = now + ASK_EVERY_S
            self._asked[name] = self._pool.submit(ask, live)
        return None

    def forget(self, name: str) -> None:
        """The process is another one now: what is still out was asked of its predecessor."""
        self._asked.pop(name, None)

    def close(self) -> None:
        """Ask no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
