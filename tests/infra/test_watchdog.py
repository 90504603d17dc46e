"""Who is stuck, who is only idle, who waits for somebody else; and when the supervisor ends a process that runs."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import pytest

from infra.stack.child import Child
from infra.stack.state import ProcessStatus
from infra.stack.watch import Answer, Hearing, ask
from infra.watchdog import Monitor, Waiting, Watchdog

AWAY = Waiting(count=5, blocked={"kafka": "Kafka is away."})
BUSY = Waiting(count=5)
SECOND = 1_000_000


def watched(looks: list[tuple[int, Waiting]], stuck_after_s: float = 10) -> Watchdog:
    """A watchdog that looked once a second at (done, waiting)."""
    dog = Watchdog(stuck_after_s, "stored")
    for second, (done, waiting) in enumerate(looks):
        dog.observe(second * SECOND, done, waiting)
    return dog


def test_work_that_waits_and_is_not_done_is_stuck() -> None:
    """With the count, the verb and the time in the reason."""
    assert watched([(7, BUSY)] * 10).stuck == ""
    assert watched([(7, BUSY)] * 12).stuck == "5 records wait and none was stored for 11 s"


@pytest.mark.parametrize(
    "looks",
    [
        [(7, Waiting())] * 1_000,
        [(7, AWAY)] * 1_000,
        [(number // 9, BUSY) for number in range(1_000)],
        ([(7, BUSY)] * 9 + [(7, AWAY)]) * 50,
        ([(7, BUSY)] * 9 + [(7, Waiting())]) * 50,
    ],
    ids=["idle", "broker away", "slow", "broker comes and goes", "caught up now and then"],
)
def test_nobody_is_blamed_for_what_others_do(looks: list[tuple[int, Waiting]]) -> None:
    """Idle, blocked or slow is not stuck."""
    assert watched(looks).stuck == ""


def test_time_that_was_slept_does_not_count() -> None:
    """A process that was stopped for an hour gets its time to go on."""
    dog = watched([(7, BUSY)] * 3)
    dog.observe(3_600 * SECOND, 7, BUSY)
    assert dog.stuck == "" and dog.still_us < 10 * SECOND


def test_one_piece_of_work_clears_it() -> None:
    """Stuck is a state, not a sentence for life."""
    dog = watched([(7, BUSY)] * 20)
    assert dog.stuck
    dog.observe(21 * SECOND, 8)
    assert dog.stuck == "" and dog.still_us == 0


class Time:
    """A clock that is set."""

    random = Random(1)
    now = 0

    def now_us(self) -> int:
        """See Clock."""
        return self.now

    def monotonic_us(self) -> int:
        """See Clock."""
        return self.now

    async def sleep(self, seconds: float) -> None:
        """See Clock."""


class Consumer:
    """`Work` that counts how often it was asked what waits."""

    verb = "read"

    def __init__(self) -> None:
        self.count, self.asked, self.state = 0, 0, Waiting()

    def done(self) -> int:
        """See Work."""
        return self.count

    def waiting(self) -> Waiting:
        """See Work."""
        self.asked += 1
        return self.state


def test_a_busy_process_is_never_asked_what_waits_and_an_idle_one_now_and_then() -> None:
    """The question may cost a request to the broker."""
    work, clock = Consumer(), Time()
    monitor = Monitor(work, 10, clock)
    for _ in range(100):
        clock.now += SECOND
        work.count += 1
        monitor.look()
    assert work.asked == 0
    for _ in range(100):
        clock.now += SECOND
        monitor.look()
    assert 15 <= work.asked <= 25 and monitor.reasons() == {} and monitor.stuck() == ""
    work.state = AWAY
    for _ in range(100):
        clock.now += SECOND
        monitor.look()
    assert monitor.reasons() == {"kafka": "Kafka is away."} and monitor.stuck() == ""
    work.state = BUSY
    for _ in range(12):
        clock.now += SECOND
        monitor.look()
    document = monitor.document()
    assert document["stuck"] == monitor.stuck() == "5 records wait and none was read for 11 s" and document["waiting"] == 5
    assert "does not get on" in monitor.reasons()["stuck"]


# The supervisor's side.


def test_silence_is_forgiven_for_a_while_and_for_longer_each_time() -> None:
    """Twice as long after each verdict, up to eight times; forgotten after ten minutes."""
    hearing, silence = Hearing(10, 60), Answer(False, "port 1 does not answer")
    now, took = 0.0, []
    for _ in range(6):
        hearing.begin(now)
        hearing.note(now, Answer(True))
        began = now
        while not hearing.note(now, silence):
            now += 1
        took.append(now - began)
    assert took == [11, 21, 41, 81, 81, 81] and hearing.verdicts(now) == 6
    assert hearing.verdicts(now + 601) == 0


def test_a_process_that_never_answered_has_its_start_up_time() -> None:
    """Compiling takes long; a stuck one that answers does not."""
    hearing = Hearing(10, 300)
    hearing.begin(0)
    assert hearing.note(299, Answer(False)) == ""
    assert hearing.note(301, Answer(False)).startswith("did not answer for 301 s")
    hearing.begin(400)
    assert hearing.note(401, Answer(True, "5 records wait")) == "5 records wait"


def test_a_supervisor_that_slept_blames_nobody() -> None:
    """A laptop that was closed opens without a restart."""
    hearing = Hearing(10, 60)
    hearing.begin(0)
    hearing.note(1, Answer(True))
    hearing.slept(5_000)
    assert hearing.note(5_005, Answer(False)) == ""


def test_ends_that_follow_each_other_closely_are_called_failing() -> None:
    """Five within a minute; kills ten seconds apart over a long time are not."""
    child = Child(name="x", status=ProcessStatus(name="x"))
    assert [child.fails(now) for now in (0, 1, 3, 7, 15)] == [False] * 4 + [True]
    assert not child.fails(100)
    child = Child(name="x", status=ProcessStatus(name="x"))
    assert not any(child.fails(now) for now in range(0, 1_000, 20))


@contextmanager
def answering(status: int, document: object) -> Iterator[str]:
    """A server whose every answer is this one."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/livez"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "document", "answer"),
    [
        (200, {"status": "ok"}, Answer(True)),
        (404, {"error": 1}, Answer(True)),
        (503, {"status": "not ready", "reasons": {}}, Answer(True)),
        (503, [1], Answer(True)),
        (503, {"status": "stuck", "reason": "5 records wait"}, Answer(True, "5 records wait")),
    ],
)
def test_any_answer_is_life_and_only_stuck_asks_for_a_restart(status: int, document: object, answer: Answer) -> None:
    """Not ready is no reason: somebody else may be away."""
    with answering(status, document) as url:
        assert ask(url) == answer


def test_a_closed_port_is_no_answer() -> None:
    """Nor is one where nobody accepts."""
    assert not ask("http://127.0.0.1:1/livez").answered
    assert not ask("tcp://127.0.0.1:1").answered
