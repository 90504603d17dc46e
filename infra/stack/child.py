"""What the supervisor knows of one process, and when it calls it failing. Times are monotonic seconds."""

from __future__ import annotations

import subprocess
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from infra.stack import state
from infra.stack.spec import ProcessSpec
from infra.stack.watch import Hearing

BACKOFF_FIRST_S, BACKOFF_MOST_S, BACKOFF_RESET_S = 0.1, 10.0, 5.0
FAILING_ENDS, FAILING_WITHIN_S, FAILING_VERDICTS = 5, 60.0, 3
"""So many ends within a minute, or verdicts of its watchers within ten, and a process is called failing."""


@dataclass(kw_only=True)
class Child:
    """A process under supervision."""

    name: str
    status: state.ProcessStatus
    spec: ProcessSpec | None = None
    preparing: Future[ProcessSpec] | None = None
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    first_started_at: float = 0.0
    backoff_s: float = BACKOFF_FIRST_S
    not_before: float = 0.0
    was_ready: bool = False
    pending: list[str] = field(default_factory=list)
    hearing: Hearing | None = None
    verdict: str = ""
    """Why we ended it."""
    ends: deque[float] = field(default_factory=lambda: deque(maxlen=FAILING_ENDS))

    def fails(self, now: float) -> bool:
        """Note an end; whether it ends or hangs again and again. One that hangs is then left alone for the longest pause first."""
        self.ends.append(now)
        often = len(self.ends) == FAILING_ENDS and now - self.ends[0] < FAILING_WITHIN_S
        hangs = self.hearing is not None and self.hearing.verdicts(now) >= FAILING_VERDICTS
        if hangs:
            self.backoff_s = BACKOFF_MOST_S
        return often or hangs
