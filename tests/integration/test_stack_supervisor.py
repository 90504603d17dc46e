"""The tree of processes: it starts in order, heals, stops whole, and says in one sentence why it does not start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra import errors
from infra.provision import provision
from infra.settings import Settings, load_settings
from infra.stack import state
from infra.stack.supervisor import ProcessSpec, Stack, down, read_state
from tests.integration.conftest import RunningStack, process_environ
from tests.integration.test_worker import check_outputs, encoded, publish, wait_done

# Nothing local: the servers are "elsewhere", so that these tests run processes of their own only, in a second each.
_ELSEWHERE = {
    "MARKETSTREAM_KAFKA_BOOTSTRAP": "127.0.0.1:1",
    "MARKETSTREAM_CLICKHOUSE_URL": "http://127.0.0.1:1",
    "MARKETSTREAM_POSTGRES_DSN": "postgresql://x@127.0.0.1:1/x",
    "MARKETSTREAM_REGISTRY_URL": "http://127.0.0.1:1",
}
SERVER = """
import os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(os.environ["MARKETSTREAM_SOURCE"].encode())
    def log_message(self, *_): pass
if "child" in sys.argv: subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
if "stubborn" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(0.2)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """A stack without local servers; whatever a test leaves running is stopped."""
    made = load_settings({**process_environ(tmp_path / "data"), **_ELSEWHERE, "MARKETSTREAM_SOURCE": "none"})
    yield made
    down(made.data_dir)


def server(settings: Settings, name: str = "web", *arguments: str, **fields: object) -> ProcessSpec:
    """A little web server on the port of the collector (or API)."""
    port = settings.ports.collector if name == "web" else settings.ports.api
    argv = (sys.executable, "-c", SERVER, str(port), *arguments)
    values: dict[str, object] = {"ready": f"http://127.0.0.1:{port}/", "ports": {f"ports.{name}": port}, **fields}
    return ProcessSpec(name=name, argv=argv, **values)  # type: ignore[arg-type]


def eventually(condition: Callable[[], bool], seconds: float = 15) -> None:
    """Waits until the condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not happen"
        time.sleep(0.02)


def pids_of(settings: Settings) -> list[int]:
    """The supervisor and everything below it."""
    found = read_state(settings.data_dir)
    assert found is not None
    return [found.pid, *(child.pid for child in psutil.Process(found.pid).children(recursive=True))]


def gone(pids: list[int]) -> bool:
    """Whether none of the processes runs any more."""
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_processes_start_in_order_report_and_stop_whole(settings: Settings) -> None:
    """Dependents wait, children of children go too, and nothing answers any more."""
    stack = Stack(settings, [server(settings, "api", after=("web",)), server(settings, "web", "child")])
    events: list[dict[str, object]] = []
    statuses = stack.up(on_progress=lambda event: events.append(dict(event)))
    assert [(event["event"], event.get("name")) for event in events] == [
        ("starting", "web"),
        ("ready", "web"),
        ("starting", "api"),
        ("ready", "api"),
        ("up", None),
    ]
    assert {status.name: status.state for status in statuses} == {"web": "ready", "api": "ready"}
    pids = pids_of(settings)
    assert len(pids) == 4
    assert stack.down() is True and gone(pids) and stack.status() == [] and stack.down() is False


def test_a_detached_stack_outlives_its_starter_and_an_attached_one_does_not(settings: Settings) -> None:
    """The starter ends in the same way both times: killed."""
    code = (
        "import os, sys, signal; from infra.settings import load_settings; from infra.stack.supervisor import ProcessSpec, Stack; "
        "s = load_settings(); Stack(s, [ProcessSpec(name='sleep', argv=('/bin/sleep', '1000'))]).up(detach=sys.argv[1] == 'detach'); "
        "print('up', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environ = {**os.environ, **settings.as_environ()}
    for mode in ("detach", "attach"):
        subprocess.run([sys.executable, "-c", code, mode], env=environ, check=False, timeout=30, stdout=subprocess.PIPE)
        if mode == "detach":
            assert read_state(settings.data_dir) is not None
            pids = pids_of(settings)
            assert down(settings.data_dir) and gone(pids)
        else:
            eventually(lambda: read_state(settings.data_dir) is None)


def test_a_killed_process_is_started_again_and_counted(settings: Settings) -> None:
    """Its neighbours stay as they are."""
    stack = Stack(settings, [server(settings, "web"), server(settings, "api")])
    before = {status.name: status.pid for status in stack.up()}
    os.kill(before["web"], signal.SIGKILL)
    eventually(lambda: any(status.name == "web" and status.restarts == 1 and status.state == "ready" for status in stack.status()))
    after = {status.name: status.pid for status in stack.status()}
    stack.down()
    assert after["web"] != before["web"] and after["api"] == before["api"]


def test_no_process_survives_kill_9_of_the_supervisor_and_the_next_up_works(settings: Settings) -> None:
    """The kernel ends the children; a grandchild that escaped is ended by the next start."""
    stack = Stack(settings, [server(settings)])
    stack.up(detach=True)
    supervisor, *children = pids_of(settings)
    os.kill(supervisor, signal.SIGKILL)
    eventually(lambda: gone(children))
    assert stack.status() == []
    again = Stack(settings, [server(settings)])
    assert [status.state for status in again.up()] == ["ready"]
    again.down()


def test_what_a_killed_supervisor_left_is_ended_by_pid_and_start_time_only(settings: Settings) -> None:
    """A process that merely has the pid of one of ours is left alone."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    try:
        settings.data_dir.mkdir()
        (settings.data_dir / "run").mkdir()
        left = state.ProcessStatus(name="web", pid=other.pid, ticks=1)
        state.write(settings.data_dir, state.StackState(pid=2**22 + 5, ticks=1, data_dir=str(settings.data_dir), processes=[left]))
        assert down(settings.data_dir) is False and other.poll() is None
        left.ticks = state.start_ticks(other.pid) or 0
        state.write(settings.data_dir, state.StackState(pid=2**22 + 5, ticks=1, data_dir=str(settings.data_dir), processes=[left]))
        assert down(settings.data_dir) is True
        assert other.wait(5) == -signal.SIGKILL
    finally:
        other.kill()
        other.wait()


def test_a_process_that_ignores_sigterm_is_killed_in_time(settings: Settings) -> None:
    """Stopping has an end."""
    stack = Stack(settings, [server(settings, "web", "stubborn", stop_timeout_s=0.5)])
    stack.up()
    pids = pids_of(settings)
    began = time.monotonic()
    assert stack.down() and gone(pids) and time.monotonic() - began < 10


def test_ctrl_c_while_starting_stops_what_was_started(settings: Settings) -> None:
    """Exit code 130, no process left."""
    stack = Stack(settings, [server(settings), ProcessSpec(name="never", argv=("/bin/sleep", "1000"), ready="tcp://127.0.0.1:1")])
    pids: list[int] = []

    def interrupt(event: object) -> None:
        if isinstance(event, dict) and event["event"] == "ready":
            pids.extend(pids_of(settings))
            raise KeyboardInterrupt

    with pytest.raises(errors.StoppedError) as caught:
        stack.up(on_progress=interrupt)
    assert caught.value.exit_code == 130 and len(pids) == 3 and gone(pids)


def test_a_process_that_does_not_start_is_named_with_its_last_words(settings: Settings) -> None:
    """And everything else is stopped; its own exit code is passed on."""
    failing = ProcessSpec(name="worker", argv=(sys.executable, "-c", "import sys; sys.exit(print('no such topic', file=sys.stderr) or 6)"))
    failing = ProcessSpec(name="worker", argv=failing.argv, ready="tcp://127.0.0.1:1")
    with pytest.raises(errors.UnreachableError, match="worker ended with code 6 while starting: no such topic; its log is .*worker.log"):
        Stack(settings, [server(settings), failing]).up()
    assert read_state(settings.data_dir) is None
    with pytest.raises(errors.StartError, match="cannot start /no/such/program"):
        Stack(settings, [ProcessSpec(name="x", argv=("/no/such/program",))]).up()
    slow = ProcessSpec(name="slow", argv=("/bin/sleep", "1000"), ready="tcp://127.0.0.1:1", ready_timeout_s=0.3)
    with pytest.raises(errors.StartError, match="slow was not ready after 0 s: port 1 does not answer"):
        Stack(settings, [slow]).up()


def test_a_used_port_and_a_folder_in_use_are_told_before_anything_starts(settings: Settings) -> None:
    """Exit codes 3 and 4; the stack that runs is not disturbed."""
    with socket.create_server(("127.0.0.1", settings.ports.collector)), pytest.raises(errors.PortInUseError, match="ports.web") as caught:
        Stack(settings, [server(settings)]).up()
    assert caught.value.exit_code == 3
    first = Stack(settings, [server(settings)])
    first.up()
    with pytest.raises(errors.DataDirOwnedError, match="in use by a running stack"):
        Stack(settings, [server(settings)]).up()
    assert [status.state for status in first.status()] == ["ready"]
    first.down()


def test_a_folder_of_another_version_is_refused(settings: Settings) -> None:
    """Through the whole road from the supervisor's process back to the caller."""
    settings.data_dir.mkdir()
    (settings.data_dir / "VERSION").write_text("marketstream data layout 7\n")
    with pytest.raises(errors.DataDirVersionError, match="layout 7"):
        Stack(settings).up()


def test_logs_are_kept_per_process_and_cut_when_large(tmp_path: Path) -> None:
    """One generation is kept; the writer goes on in the emptied file."""
    from infra.stack.launch import last_line, rotate

    log = tmp_path / "x.log"
    with log.open("ab") as writer:
        writer.write(b"a" * 2000 + b"\nlast words\n\n")
        writer.flush()
        assert last_line(log) == "last words" and rotate(log, 1000) and not rotate(log, 1000)
        writer.write(b"more\n")
    assert log.read_bytes() == b"more\n" and (tmp_path / "x.log.1").stat().st_size > 2000


def test_the_whole_local_stack_continues_from_its_data(tmp_path: Path) -> None:
    """A topic and a table made before are there after down and up; a broken PostgreSQL folder is one sentence."""
    import clickhouse_connect
    from confluent_kafka.admin import AdminClient
    from confluent_kafka.cimpl import NewTopic

    settings = load_settings(process_environ(tmp_path / "data"))
    stack = Stack(settings)
    try:
        stack.up(detach=True)
        admin = AdminClient(settings.kafka.client_config())
        admin.create_topics([NewTopic("kept", 1, 1)])["kept"].result(10)
        with clickhouse_connect.get_client(dsn=settings.clickhouse.url) as client:
            client.command("CREATE TABLE default.kept ENGINE = MergeTree ORDER BY a AS SELECT number AS a FROM numbers(10)")
        pids = pids_of(settings)
        assert stack.down() and gone(pids)
        (settings.data_dir / "postgres" / "data" / "postmaster.pid").write_text(f"{os.getpid()}\n/x\n")  # stale, its pid reused
        assert {status.name: status.state for status in stack.up()} == dict.fromkeys(
            ("kafka", "clickhouse", "postgres", "registry"), "ready"
        )
        assert "kept" in AdminClient(settings.kafka.client_config()).list_topics(timeout=5).topics
        with clickhouse_connect.get_client(dsn=settings.clickhouse.url) as client:
            assert client.command("SELECT sum(a) FROM default.kept") == 45
        stack.down()
        (settings.data_dir / "postgres" / "data" / "global" / "pg_control").unlink()
        with pytest.raises(errors.DataDirBrokenError, match="pg_control"):
            stack.up()
    finally:
        stack.down()


STUCK = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        stuck = os.path.exists(sys.argv[2])
        if stuck: os.unlink(sys.argv[2])
        self.send_response(503 if stuck else 200); self.end_headers()
        self.wfile.write(json.dumps({"status": "stuck", "reason": "5 records wait and none was stored for 61 s"} if stuck else {}).encode())
    def log_message(self, *_): pass
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def watched(settings: Settings) -> Settings:
    """The same stack with a watcher that is quick to judge."""
    return load_settings({**settings.as_environ(), "MARKETSTREAM_WATCHDOG_SILENT_S": "6"})


def the(stack: Stack, name: str) -> state.ProcessStatus:
    """One process as its supervisor sees it."""
    return next(status for status in stack.status(check=False) if status.name == name)


def test_a_stopped_process_is_found_and_started_again(settings: Settings) -> None:
    """SIGSTOP: it lives, its port is open, and it answers nobody. The reason is kept; a neighbour that answers is left alone."""
    settings = watched(settings)
    live = {"web": f"http://127.0.0.1:{settings.ports.collector}/livez", "api": f"http://127.0.0.1:{settings.ports.api}/livez"}
    stack = Stack(settings, [server(settings, "web", live=live["web"]), server(settings, "api", live=live["api"])])
    before = {status.name: status.pid for status in stack.up()}
    eventually(lambda: the(stack, "web").state == "ready")
    time.sleep(2.5)  # it has answered
    os.kill(before["web"], signal.SIGSTOP)
    eventually(lambda: the(stack, "web").restarts == 1 and the(stack, "web").state == "ready")
    status, neighbour = the(stack, "web"), the(stack, "api")
    stack.down()
    assert status.pid != before["web"] and "did not answer for" in status.reason and status.restarted_at > 0
    assert neighbour.pid == before["api"] and neighbour.restarts == 0


def test_a_process_that_says_it_is_stuck_is_started_again_with_its_reason(settings: Settings, tmp_path: Path) -> None:
    """Once for each time it says so."""
    flag, port = tmp_path / "stuck", settings.ports.collector
    ready = f"http://127.0.0.1:{port}/"
    spec = ProcessSpec(name="web", argv=(sys.executable, "-c", STUCK, str(port), str(flag)), ready=ready, live=ready)
    stack = Stack(settings, [spec])
    stack.up()
    flag.touch()
    eventually(lambda: the(stack, "web").restarts == 1 and the(stack, "web").state == "ready")
    status = the(stack, "web")
    assert status.reason.startswith("5 records wait and none was stored for 61 s")
    time.sleep(3)
    assert the(stack, "web").restarts == 1
    stack.down()


HANGING_WORKER = """
import asyncio, sys
from pathlib import Path
from infra.worker import main
from streams.runner import BarRunner
hung, handle = Path(sys.argv.pop(1)), BarRunner.handle
async def hang(self, partition, offset, value):
    if sum(shard.applied_offset + 1 for shard in self.shards.values()) >= 20:
        hung.touch()
        await asyncio.Event().wait()
    await handle(self, partition, offset, value)
if not hung.exists():
    BarRunner.handle = hang
sys.exit(main())
"""
"""The worker itself; in its first life it waits for ever in the middle of a record, as for a lock that nobody gives back."""


async def test_a_worker_whose_input_offset_stands_still_is_started_again(stack: RunningStack, topic_prefix: str, tmp_path: Path) -> None:
    """It lives and answers, its loop and its group membership go on: only its offset does not move. It says so, is ended, and all arrives."""
    servers = {
        name: value
        for name, value in stack.settings.as_environ().items()
        if name.endswith(("_BOOTSTRAP", "CLICKHOUSE_URL", "_DSN", "REGISTRY_URL"))
    }
    settings = load_settings(
        {
            **process_environ(tmp_path / "data"),
            **servers,
            "MARKETSTREAM_TOPIC_PREFIX": topic_prefix,
            "MARKETSTREAM_WATCHDOG_STUCK_S": "4",
            "MARKETSTREAM_WORKER_SNAPSHOT_INTERVAL_S": "0.2",
        }
    )
    provision(settings)
    script, hung = tmp_path / "worker.py", tmp_path / "hung"
    script.write_text(HANGING_WORKER)
    address = f"http://127.0.0.1:{settings.worker.health_port}"
    argv = (sys.executable, str(script), str(hung))
    supervised = Stack(
        settings, [ProcessSpec(name="worker", argv=argv, ready=address + "/readyz", live=address + "/livez", ready_timeout_s=300)]
    )
    before = supervised.up()[0]
    await publish(settings, encoded(settings, 4_000, 50))

    def asked(path: str) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(address + path, timeout=5) as answer:
                return dict(json.loads(answer.read()))
        except urllib.error.HTTPError as exc:
            with exc:
                return dict(json.loads(exc.read()))

    told: dict[str, dict[str, Any]] = {}

    def is_stuck() -> bool:
        told.update(progress=asked("/progress"), livez=asked("/livez"))
        return bool(told["livez"]["status"] == "stuck")

    await asyncio.to_thread(eventually, hung.exists)
    await asyncio.to_thread(eventually, lambda: asked("/progress")["done"] >= 20)
    stood = asked("/progress")["done"]
    await asyncio.to_thread(eventually, is_stuck)
    assert "records wait and none was applied for" in told["livez"]["reason"]
    assert told["progress"]["done"] == stood and told["progress"]["waiting"] > 0 and not told["progress"]["blocked"]
    await asyncio.to_thread(eventually, lambda: the(supervised, "worker").restarts == 1 and the(supervised, "worker").state == "ready", 60)
    status = the(supervised, "worker")
    await wait_done(settings)
    await check_outputs(settings)
    supervised.down()
    assert status.pid != before.pid and "none was applied for" in status.reason


def test_a_process_that_is_not_ready_is_shown_as_such_and_left_alone(settings: Settings, tmp_path: Path) -> None:
    """A server it needs may be away: that is no reason to start it again."""
    flag, port = tmp_path / "away", settings.ports.collector
    code = STUCK.replace("if stuck: os.unlink(sys.argv[2])", "pass").replace('"stuck", "reason"', '"not ready", "reasons"')
    ready = f"http://127.0.0.1:{port}/"
    stack = Stack(
        watched(settings), [ProcessSpec(name="web", argv=(sys.executable, "-c", code, str(port), str(flag)), ready=ready, live=ready)]
    )
    before = stack.up()[0].pid
    flag.touch()
    time.sleep(5)
    status = stack.status()[0]
    assert (status.state, status.pid, status.restarts) == ("not ready", before, 0) and "answers 503" in status.detail
    flag.unlink()
    assert stack.status()[0].state == "ready"
    stack.down()


def test_a_process_that_ends_again_and_again_is_failing_with_growing_pauses(settings: Settings, tmp_path: Path) -> None:
    """Pauses of 0.1 s doubling; five ends in a minute are called by name; it recovers when the reason is gone."""
    flag, starts = tmp_path / "broken", tmp_path / "starts"
    code = (
        "import os, sys, time\n"
        "open(sys.argv[2], 'a').write(f'{time.time()}\\n')\n"
        "print('cannot work like this', file=sys.stderr)\n"
        "time.sleep(1000 if not os.path.exists(sys.argv[1]) else 0)"
    )
    # ready at once where nothing is probed: it "runs" and ends
    stack = Stack(settings, [ProcessSpec(name="loop", argv=(sys.executable, "-c", code, str(flag), str(starts)))])
    first = stack.up()[0].pid
    flag.touch()
    os.kill(first, signal.SIGKILL)
    eventually(lambda: the(stack, "loop").state == "failing")
    status = the(stack, "loop")
    assert status.restarts >= 5 and "cannot work like this" in status.reason
    times = [float(line) for line in starts.read_text().split()]
    pauses = [after - before for before, after in zip(times[1:], times[2:], strict=False)]
    assert all(later > earlier * 1.3 for earlier, later in zip(pauses[1:], pauses[2:], strict=False)), pauses
    flag.unlink()
    eventually(lambda: the(stack, "loop").state == "ready", 20)
    stack.down()
