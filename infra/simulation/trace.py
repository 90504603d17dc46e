"""What happened in a simulated world, as one hash: the same seed must give the same one, whatever machine or process runs it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from infra.simulation.loop import VirtualLoop


class Trace:
    """SHA-256 over every event, in order, with its virtual time.

    Args:
        loop: whose time is noted.
        tell: called with a line an event; None: nobody listens.
    """

    def __init__(self, loop: VirtualLoop, tell: Callable[[str], None] | None = None) -> None:
        self.events = 0
        self._loop = loop
        self._hash = hashlib.sha256()
        self._tell = tell

    def note(self, kind: str, *what: object, data: bytes = b"") -> None:
        """Something happened; ``data`` counts by its bytes."""
        self.events += 1
        line = f"{self._loop.now_us - self._loop.start_us} {kind} {' '.join(map(str, what))}"
        self._hash.update(line.encode())
        if data:
            self._hash.update(data)
        if self._tell is not None:
            self._tell(f"{line} [{len(data)}]" if data else line)

    def digest(self) -> str:
        """The hash so far, 64 hexadecimal digits."""
        return self._hash.hexdigest()
