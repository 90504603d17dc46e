"""The virtual loop: time that jumps, an order that is always the same, processes that die without a word."""

import asyncio

import pytest

from infra.simulation.loop import FrozenWorldError, KilledError, Process, SimClock, VirtualLoop, WouldBlockError

START_US = 1_767_225_600_000_000


@pytest.fixture
def loop():
    """A loop of its own, closed at the end."""
    made = VirtualLoop(1, START_US)
    yield made
    made.close()


def test_hour_of_sleep_takes_no_time(loop: VirtualLoop) -> None:
    """Time jumps to the next timer; nobody waits."""
    loop.run(asyncio.sleep(3_600))
    assert loop.time() == 3_600
    assert loop.steps < 10


def test_timers_of_one_moment_run_in_the_order_they_were_set(loop: VirtualLoop) -> None:
    """Ties are decided by the order of the calls, not by a heap's whim."""
    seen: list[int] = []

    async def work() -> None:
        for number in range(50):
            loop.call_later(1.0, seen.append, number)
        await asyncio.sleep(2)

    loop.run(work())
    assert seen == list(range(50))


def test_timer_is_never_early(loop: VirtualLoop) -> None:
    """When it fires the clock shows its time, whatever fraction of a microsecond that was: some callers ask again at once otherwise."""
    seen: list[tuple[float, float]] = []

    async def work() -> None:
        for number in range(200):
            when = loop.time() + 0.1 + number / 3e7
            loop.call_at(when, lambda when=when: seen.append((loop.time(), when)))  # type: ignore[misc]
        await asyncio.sleep(1)

    loop.run(work())
    assert len(seen) == 200 and all(now >= when for now, when in seen)


def test_standard_library_waits_work(loop: VirtualLoop) -> None:
    """Timeouts, gathering, events and queues are asyncio's own."""

    async def work() -> list[object]:
        queue: asyncio.Queue[int] = asyncio.Queue()
        loop.call_later(5, queue.put_nowait, 7)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await asyncio.Event().wait()
        return [loop.time(), await queue.get(), loop.time(), *await asyncio.gather(asyncio.sleep(1, "a"), asyncio.sleep(2, "b"))]

    assert loop.run(work()) == [1.0, 7, 5.0, "a", "b"]


def test_work_for_threads_runs_inline_and_may_wait(loop: VirtualLoop) -> None:
    """`to_thread` runs on the loop; a call that would block is made again later."""
    calls = []

    def blocking() -> str:
        calls.append(loop.time())
        if len(calls) < 3:
            raise WouldBlockError
        return "done"

    assert loop.run(asyncio.to_thread(blocking)) == "done"
    assert len(calls) == 3 and calls[2] > calls[0] + 0.09


def test_killed_process_runs_nothing_more(loop: VirtualLoop) -> None:
    """No `finally`, no `except`: as after kill -9. What the world cleans up afterwards is seen by nobody."""
    seen: list[str] = []
    process = Process("victim")

    async def victim() -> None:
        try:
            await asyncio.sleep(1)
            seen.append("begun")
            await asyncio.sleep(10)
        finally:
            seen.append("farewell")

    async def work() -> None:
        loop.spawn(process, victim())
        await asyncio.sleep(2)
        loop.kill(process)
        await asyncio.sleep(20)
        assert seen == ["begun"]

    loop.run(work())
    loop.bury(process)


def test_tasks_a_process_starts_die_with_it(loop: VirtualLoop) -> None:
    """Whatever a process begins belongs to it, at any depth."""
    seen: list[float] = []
    process = Process("victim")

    async def grandchild() -> None:
        while True:
            await asyncio.sleep(1)
            seen.append(loop.time())

    async def child() -> None:
        await asyncio.gather(grandchild(), asyncio.create_task(grandchild()))

    async def work() -> None:
        loop.spawn(process, child())
        await asyncio.sleep(2.5)
        loop.kill(process)
        await asyncio.sleep(5)

    loop.run(work())
    assert seen == [1.0, 1.0, 2.0, 2.0]
    loop.bury(process)


def test_doomed_process_dies_inside_a_call_to_the_outside_world() -> None:
    """The call in which it dies does not return."""
    process = Process("victim")
    process.kill = lambda one: setattr(one, "alive", False)
    process.doomed_in = 2
    process.touch()
    with pytest.raises(KilledError):
        process.touch()
    with pytest.raises(KilledError):
        process.touch()


def test_ambush_strikes_between_two_callbacks(loop: VirtualLoop) -> None:
    """A step number is a place between any two callbacks of the world."""
    process = Process("victim")
    seen: list[int] = []

    async def busy() -> None:
        for number in range(1_000):
            seen.append(number)
            await asyncio.sleep(0)

    async def work() -> None:
        loop.ambush_step, loop.ambush = loop.steps + 40, lambda: loop.kill(process)
        loop.spawn(process, busy())
        await asyncio.sleep(5)

    loop.run(work())
    assert 0 < len(seen) < 60
    loop.bury(process)


def test_world_that_stands_still_says_so(loop: VirtualLoop) -> None:
    """Waiting for what nobody will do is an error, not a hang."""
    with pytest.raises(FrozenWorldError):
        loop.run(asyncio.Event().wait())


def test_clock_tells_virtual_time(loop: VirtualLoop) -> None:
    """Wall clocks may be off, the monotonic one is not."""
    clock = SimClock(loop, "seed", offset_us=-3_000_000)
    before = clock.now_us(), clock.monotonic_us()
    loop.run(clock.sleep(2.0))
    assert (clock.now_us(), clock.monotonic_us()) == (before[0] + 2_000_000, before[1] + 2_000_000)
    assert before[0] == START_US - 3_000_000
    assert SimClock(loop, "seed").random.random() == SimClock(loop, "seed").random.random()
