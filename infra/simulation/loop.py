"""An asyncio event loop with virtual time, and processes on it that can be killed between any two steps.

Comes in: a seed and the moment the world begins. Goes out: a loop on which ordinary asyncio code runs unchanged and always in the same
order: when nothing is ready, time jumps to the next timer; work for other threads runs inline; there are no sockets but those of
:mod:`infra.simulation.network`. A process is a name in the context of its tasks; once it is killed none of its callbacks runs again, as
after ``kill -9``: no ``finally``, no farewell.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import heapq
import warnings
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from random import Random
from typing import Any, Final, TypeVar

from infra.errors import MarketstreamError

_T = TypeVar("_T")
_US: Final = 1_000_000

PROCESS: ContextVar[Process | None] = ContextVar("marketstream_process", default=None)
"""The simulated process the running code belongs to; None: the world itself."""


class FrozenWorldError(MarketstreamError):
    """Nothing is ready and no timer is set, yet somebody still waits: the world would stand still for ever."""


class KilledError(BaseException):
    """The process dies at this very call; nothing catches it but the task it dies in."""


class WouldBlockError(Exception):
    """A blocking call cannot be answered now: a thread would wait. Raised by simulated clients; the loop makes the whole call again later."""


class Process:
    """One simulated process: a group of tasks that live and die together.

    Args:
        name: what it is, e.g. ``collector``.
        generation: how often it was started before.
    """

    def __init__(self, name: str, generation: int = 0) -> None:
        self.name = name
        self.generation = generation
        self.alive = True
        self.skew_us = 0
        """How far its wall clock is off."""
        self.tasks: list[asyncio.Task[Any]] = []
        self.on_death: list[Callable[[], None]] = []
        """What the operating system does when the process is gone: its sockets are reset."""
        self.doomed_in = 0
        """Calls to the outside world after which it is killed in the middle of one; 0: it is not."""
        self.kill: Callable[[Process], None] = lambda _: None

    def touch(self) -> None:
        """A call to the outside world begins or ends: where a process that is doomed dies. Raises KilledError."""
        if not self.alive:
            raise KilledError
        if self.doomed_in:
            self.doomed_in -= 1
            if not self.doomed_in:
                self.kill(self)
                raise KilledError

    def __repr__(self) -> str:
        return f"{self.name}#{self.generation}"


class _Task(asyncio.Task):  # type: ignore[type-arg]
    """A task whose place in a set does not depend on its address: asyncio keeps sets of tasks and walks them."""

    def __init__(self, work: Any, *, loop: VirtualLoop, **kwargs: Any) -> None:
        self.number = loop.next_number()  # before the base class, which puts it into a set
        super().__init__(work, loop=loop, **kwargs)

    def __hash__(self) -> int:
        return self.number


class _Future(asyncio.Future):  # type: ignore[type-arg]
    """A future with the same property."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.number = loop.next_number()
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.number


class VirtualLoop(asyncio.BaseEventLoop):
    """The loop.

    Args:
        seed: of :attr:`random`, from which every other source of randomness in the world is drawn.
        start_us: wall-clock time at which the world begins, microseconds since the epoch.
    """

    def __init__(self, seed: int, start_us: int) -> None:
        super().__init__()
        self.seed = seed
        self.random = Random(seed)
        self.now_us = start_us
        self.start_us = start_us
        self.steps = 0
        """Callbacks run so far."""
        self.failures: list[str] = []
        """What no task caught."""
        self.ambush_step = -1
        """When so many callbacks have run, :attr:`ambush` is called: between any two of them."""
        self.ambush: Callable[[], None] = lambda: None
        self._clock_resolution = 1e-6
        self._soon: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[int, int, asyncio.TimerHandle]] = []
        self._made = 0
        self.set_task_factory(_make_task)
        self.set_exception_handler(_note_failure)

    # -- time

    def time(self) -> float:
        """Virtual seconds since the world began."""
        return (self.now_us - self.start_us) / _US

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> asyncio.Handle:  # type: ignore[override]
        """Run ``callback`` in the next step."""
        handle = asyncio.Handle(callback, args, self, context)
        self._soon.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> asyncio.TimerHandle:  # type: ignore[override]
        """Run ``callback`` after ``delay`` virtual seconds."""
        return self.call_at_us(self.now_us + max(0, round(delay * _US)), callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> asyncio.TimerHandle:  # type: ignore[override]
        """Run ``callback`` at a time as :meth:`time` tells it."""
        after_us = round(when * _US)
        if after_us / _US < when:  # never early: who looks at the clock and finds it early asks again at once, for ever
            after_us += 1
        return self.call_at_us(self.start_us + after_us, callback, *args, context=context)

    def call_at_us(self, when_us: int, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> asyncio.TimerHandle:
        """Run ``callback`` at a moment of the virtual wall clock; of the same moment's in the order they were asked for."""
        timer = asyncio.TimerHandle((when_us - self.start_us) / _US, callback, args, self, context)
        self._made += 1
        heapq.heappush(self._timers, (when_us, self._made, timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are skipped when their time comes."""

    def _run_once(self) -> None:
        soon = self._soon
        if not soon:
            self._advance()
        for _ in range(len(soon)):
            handle = soon.popleft()
            if handle._cancelled:  # noqa: SLF001 - as the base class reads it
                continue
            process = handle._context.get(PROCESS)  # type: ignore[attr-defined]  # noqa: SLF001
            if process is not None and not process.alive:
                continue
            self.steps += 1
            if self.steps == self.ambush_step:
                self.ambush()
                if process is not None and not process.alive:
                    continue
            handle._run()  # noqa: SLF001

    def _advance(self) -> None:
        """Jump to the next timer that is still wanted."""
        timers = self._timers
        while timers:
            when_us, _, timer = heapq.heappop(timers)
            if timer._cancelled:  # noqa: SLF001
                continue
            self.now_us = max(self.now_us, when_us)
            self._soon.append(timer)
            return
        if not self._stopping:  # type: ignore[attr-defined]
            raise FrozenWorldError("The simulated world stands still: something waits for what nobody will do.")

    def _process_events(self, event_list: Any) -> None:
        """There are no file descriptors to watch."""

    def _write_to_self(self) -> None:
        """Nobody sleeps in a system call."""

    # -- what asyncio would take from the operating system

    def create_future(self) -> asyncio.Future[Any]:
        """A future whose hash does not depend on its address."""
        return _Future(self)

    def next_number(self) -> int:
        """A number nobody got before."""
        self._made += 1
        return self._made

    def run_in_executor(self, executor: Any, func: Callable[..., _T], *args: Any) -> asyncio.Future[_T]:  # type: ignore[override]
        """Run ``func`` on the loop, some virtual time later: a thread takes its time, and a process may die meanwhile."""
        future = self.create_future()
        self._run_later(future, functools.partial(func, *args))
        return future

    def _run_later(self, future: asyncio.Future[Any], func: Callable[[], Any], delay_s: float = 0.0) -> None:
        self.call_later(delay_s + self.random.uniform(0.0, 0.002), self._run_into, future, func)

    def _run_into(self, future: asyncio.Future[Any], func: Callable[[], Any]) -> None:
        if future.done():
            return
        try:
            future.set_result(func())
        except WouldBlockError:
            self._run_later(future, func, 0.05)
        except Exception as exc:
            future.set_exception(exc)
        except KilledError:
            return

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """There are no threads."""

    async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> Any:
        """Every address is what it says."""
        return [(2, 1, 6, "", (host, port))]

    # -- processes

    def spawn(self, process: Process, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Begin ``work`` as (part of) ``process``; whatever it begins belongs to it too."""
        context = copy_context()
        context.run(PROCESS.set, process)
        return self.create_task(work, context=context)

    def kill(self, process: Process) -> None:
        """End ``process`` where it stands."""
        if process.alive:
            process.alive = False
            for last in process.on_death:
                last()

    def bury(self, process: Process) -> None:
        """Close what a dead process left behind, in order, so that nothing of it runs whenever memory is collected."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # farewells begin what nobody will await
            for task in process.tasks:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001
                    with contextlib.suppress(BaseException):
                        task.get_coro().close()
        process.tasks.clear()

    def run(self, work: Awaitable[_T]) -> _T:
        """Run ``work`` to its end as the world itself."""
        return self.run_until_complete(work)


def _make_task(loop: asyncio.AbstractEventLoop, work: Any, context: Context | None = None, **kwargs: Any) -> asyncio.Task[Any]:
    assert isinstance(loop, VirtualLoop)
    task = _Task(work, loop=loop, context=context, **kwargs)
    process = context.get(PROCESS) if context is not None else PROCESS.get()
    if process is not None:
        process.tasks.append(task)
        if len(process.tasks) > 256:  # finished ones need no burial
            process.tasks[:] = [one for one in process.tasks if not one.done()]
    return task


def _note_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    assert isinstance(loop, VirtualLoop)
    error = context.get("exception")
    if isinstance(error, KilledError):
        return
    loop.failures.append(f"{context.get('message')}: {error!r}")


class SimClock:
    """`schemas.seam.Clock` on the virtual loop.

    Args:
        loop: whose time it tells.
        seed: of its own randomness.
        offset_us: how far this process's wall clock is off.
    """

    def __init__(self, loop: VirtualLoop, seed: str, offset_us: int = 0) -> None:
        self._loop = loop
        self._random = Random(seed)
        self.offset_us = offset_us

    @property
    def random(self) -> Random:
        """Seeded randomness."""
        return self._random

    def now_us(self) -> int:
        """Virtual wall clock, microseconds since the epoch."""
        return self._loop.now_us + self.offset_us

    def monotonic_us(self) -> int:
        """Virtual microseconds since the world began, plus one second, as 0 means "never" in places."""
        return self._loop.now_us - self._loop.start_us + _US

    async def sleep(self, seconds: float) -> None:
        """Wait virtual seconds."""
        if seconds <= 0:
            await _turn()
            return
        future = self._loop.create_future()
        timer = self._loop.call_later(seconds, _wake, future)
        try:
            await future
        finally:
            timer.cancel()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _turn:  # noqa: N801 - reads as a word where it is awaited
    """Lets the others run once."""

    def __await__(self) -> Generator[None, None, None]:
        yield
