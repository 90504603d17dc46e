"""The end of a process: SIGTERM or SIGINT in; a request to stop, and in any case the end within its time, out."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

DRAIN_S: Final = 4.4
"""From the request to the end, whatever hangs; the promise is 5 s, and a busy machine may be late with a timer."""
_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT})


def end_within(seconds: float = DRAIN_S) -> None:
    """Let this process end with code 0 in ``seconds`` at the latest.

    For processes that lose nothing by it, as they would lose nothing by kill -9: what is not acknowledged or committed is done again.
    """
    timer = threading.Timer(seconds, _leave, (seconds,))
    timer.daemon = True
    timer.start()


def on_request_to_end(stop: Callable[[], None]) -> None:
    """Call ``stop`` from a thread of its own once SIGTERM or SIGINT comes, and end within ``DRAIN_S``.

    For processes without an event loop; call it from the main thread. A handler there would wait for as long as that thread is inside a
    client's library, which a server that hangs can make minutes; so the interpreter's own handler wakes a thread.
    """
    awaited, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.detach())
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        awaited.recv(1)
        end_within()
        stop()

    threading.Thread(target=wait, name="signals", daemon=True).start()


def on_request_to_end_loop(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
    """The same for a process that is an event loop: ``stop`` runs in it.

    The limit is there for threads: the end of a loop waits for every call handed to one, and a client's library may keep it for a minute
    while its server hangs (the repair took over 20 s in 3 of 8 runs with a broker that was stopped).
    """

    def ask() -> None:
        end_within()
        stop()

    for number in _SIGNALS:
        loop.add_signal_handler(number, ask)


def _leave(seconds: float) -> None:
    logger.warning("A server did not answer within %.1f s of the request to stop; what is not done is done at the next start.", seconds)
    logging.shutdown()
    os._exit(0)
