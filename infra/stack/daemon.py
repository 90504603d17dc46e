"""The supervisor's process: a plan on standard input, the tree of processes kept running until told to stop.

Started by :class:`infra.stack.supervisor.Stack`; not meant to be run by hand. The first line on standard input is the plan; as long as the
starter has not written ``detach``, the end of the input means that it is gone, and everything is stopped. Events go as JSON lines to the
descriptor named in the plan. One thread does all starting, stopping and waiting, since the kernel ties a child's life to the THREAD that
made it; only the preparations (formatting, downloads) have threads of their own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from infra.errors import MarketstreamError, StartError
from infra.settings import Settings, load_settings
from infra.stack import datadir, launch, servers, state
from infra.stack.child import BACKOFF_FIRST_S, BACKOFF_MOST_S, BACKOFF_RESET_S, Child
from infra.stack.spec import ProcessSpec, kill_if_same, probe, start_ticks
from infra.stack.watch import Answer, Asker, Hearing

logger = logging.getLogger("infra.stack.daemon")

POLL_STARTING_S = 0.03
POLL_IDLE_S = 1.0
HOUSEKEEPING_S = 10.0
OVERSLEPT_S = 5.0
"""A longer pause between two rounds means that this process did not run (a machine that slept): others' silence then counts for nothing."""
LOW_DISK_BYTES = 128 * 1024 * 1024
Emit = Callable[[dict[str, Any]], None]


class Supervisor:
    """Runs the tree. All methods belong to the main thread."""

    def __init__(self, settings: Settings, apps: list[ProcessSpec], emit: Emit) -> None:
        self._settings = settings
        self._apps = apps
        self._emit = emit
        self._children: dict[str, Child] = {}
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="prepare")
        self._lock: BinaryIO | None = None
        self._asker = Asker()
        self._stepped_at = time.monotonic()
        self._housekept_at = 0.0
        self._announced = False

    def claim(self) -> None:
        """Takes the data folder, ends what a killed predecessor left, checks ports. Raises the typed errors of ``datadir``."""
        data_dir = self._settings.data_dir
        self._lock = datadir.claim(data_dir)
        end_leftovers(data_dir)
        for listened in [*servers.ports(self._settings).values(), *(spec.ports for spec in self._apps)]:
            datadir.check_ports(listened)

    def plan(self) -> None:
        """Begins every preparation."""
        for name, prepare in servers.plan(self._settings).items():
            self._add(name, servers.ports(self._settings)[name]).preparing = self._pool.submit(prepare)
        self._pool.shutdown(wait=False)
        local = set(self._children)
        for spec in self._apps:
            child = self._add(spec.name, dict(spec.ports))
            child.spec = spec
            child.pending = [name for name in spec.after if name in local or any(name == other.name for other in self._apps)]
        self._write()

    def _add(self, name: str, ports: dict[str, int]) -> Child:
        log = self._settings.data_dir / "logs" / f"{name}.log"
        self._children[name] = Child(name=name, status=state.ProcessStatus(name=name, ports=ports, log=str(log)))
        return self._children[name]

    def step(self) -> bool:
        """Does what can be done now; returns whether something is being started (and should be looked at again soon)."""
        now = time.monotonic()
        if now - self._stepped_at > OVERSLEPT_S:
            self._overslept(now)
        self._stepped_at = now
        busy = changed = False
        for child in self._children.values():
            before = (child.status.state, child.status.pid)
            busy |= self._advance(child, now)
            changed |= before != (child.status.state, child.status.pid)
        if changed:
            self._write()
        if not self._announced and all(child.was_ready for child in self._children.values()):
            self._announced = True
            self._emit({"event": "up", "urls": servers.urls(self._settings)})
        if now - self._housekept_at > HOUSEKEEPING_S:
            self._housekept_at = now
            self._housekeep()
        return busy

    def _overslept(self, now: float) -> None:
        for child in self._children.values():
            self._asker.forget(child.name)
            if child.hearing is not None:
                child.hearing.slept(now)

    def _advance(self, child: Child, now: float) -> bool:
        if child.preparing is not None:
            if not child.preparing.done():
                return True
            child.spec = child.preparing.result()
            child.pending = [name for name in child.spec.after if name in self._children]
            child.preparing = None
        assert child.spec is not None
        if child.process is not None and child.process.poll() is not None:
            self._ended(child, child.spec, now)
        if child.process is None:
            if child.status.state == "stopped" or now < child.not_before:
                return child.status.state != "stopped"
            if any(not self._children[name].was_ready for name in child.pending):
                return True
            self._launch(child, child.spec, now)
            return True
        self._listen(child, child.spec, now)
        if child.status.state in ("starting", "failing"):
            self._check_ready(child, child.spec, now)
            return child.status.state in ("starting", "failing")
        if now - child.started_at > BACKOFF_RESET_S:
            child.backoff_s = BACKOFF_FIRST_S
        return False

    def _launch(self, child: Child, spec: ProcessSpec, now: float) -> None:
        child.process = launch.start(
            spec.argv,
            env=spec.env,
            log=Path(child.status.log),
            cwd=self._settings.data_dir,
            death_signal=signal.SIGQUIT if spec.unprivileged else signal.SIGKILL,
            unprivileged=spec.unprivileged,
        )
        child.started_at = now
        child.first_started_at = child.first_started_at or now
        status = child.status
        status.pid, status.ticks = child.process.pid, start_ticks(child.process.pid) or 0
        status.ready, status.detail = spec.ready, ""
        if status.state != "failing":  # until it is ready
            status.state = "starting"
        child.hearing = child.hearing or Hearing(self._silent_s(child.name), spec.ready_timeout_s)
        child.hearing.begin(now)
        child.verdict = ""
        self._asker.forget(child.name)
        logger.info("started %s (pid %s)", child.name, status.pid)
        self._emit({"event": "starting", "name": child.name, "pid": status.pid})

    def _silent_s(self, name: str) -> float:
        watchdog = self._settings.watchdog
        return watchdog.server_silent_s if name in servers.ports(self._settings) else watchdog.silent_s

    def _listen(self, child: Child, spec: ProcessSpec, now: float) -> None:
        """Ends a process that says it is stuck, or says nothing any more; its end is then handled like any other."""
        assert child.process is not None and child.hearing is not None
        if not spec.live or child.verdict:
            return
        answer = self._asker.answer(child.name, spec.live, now)
        verdict = child.hearing.note(now, answer) if answer is not None else ""
        if verdict:
            child.verdict = verdict
            logger.warning("%s is ended and started again: %s", child.name, verdict)
            child.process.kill()  # nothing is lost by it, and one that hangs would not heed anything else

    def _check_ready(self, child: Child, spec: ProcessSpec, now: float) -> None:
        reason = probe(spec.ready)
        if reason is None:
            child.status.state, child.status.detail = "ready", ""
            child.status.ready_s = round(time.monotonic() - child.started_at, 3)
            child.was_ready = True
            if child.hearing is not None:  # or one that hangs before it is asked for the first time would have the time of a start
                child.hearing.note(now, Answer(True))
            logger.info("%s is ready after %.2f s", child.name, child.status.ready_s)
            self._emit({"event": "ready", "name": child.name, "seconds": child.status.ready_s})
            return
        child.status.detail = reason
        if not child.was_ready and now - child.first_started_at > spec.ready_timeout_s:
            raise StartError(f"{child.name} was not ready after {spec.ready_timeout_s:.0f} s: {reason}; its log is {child.status.log}")

    def _ended(self, child: Child, spec: ProcessSpec, now: float) -> None:
        assert child.process is not None
        code = child.process.returncode
        self._sweep_group(child.process.pid)
        child.process = None
        status = child.status
        how = child.verdict or (f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}")
        said = launch.last_line(Path(status.log))
        status.pid, status.detail = 0, f"{how}; last said: {said}" if said and not child.verdict else how
        if not child.was_ready and (2 <= code <= 11 or not spec.restart):
            raise _failure(code, f"{child.name} {how} while starting: {said or 'no output'}; its log is {status.log}")
        if not child.was_ready and now - child.first_started_at > spec.ready_timeout_s:
            raise StartError(f"{child.name} {how} again and again while starting: {said or 'no output'}; its log is {status.log}")
        logger.warning("%s %s", child.name, status.detail)
        if not spec.restart:
            status.state = "stopped"
            return
        status.restarts += 1
        status.reason, status.restarted_at = status.detail, round(time.time(), 3)
        status.state = "failing" if child.fails(now) else "restarting"
        child.not_before = now + child.backoff_s
        child.backoff_s = min(child.backoff_s * 2, BACKOFF_MOST_S)
        self._emit({"event": "restarting", "name": child.name, "detail": status.detail})

    @staticmethod
    def _sweep_group(pid: int) -> None:
        """What a child leaves in its own session goes with it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)

    def _housekeep(self) -> None:
        data_dir = self._settings.data_dir
        for log in (data_dir / "logs").glob("*.log"):
            if launch.rotate(log):
                logger.info("moved %s aside", log)
        left = datadir.free_bytes(data_dir)
        if left < LOW_DISK_BYTES:
            logger.warning("only %s MB are free where %s lies; free some space before the stores stop", left // 1_000_000, data_dir)

    def stop(self) -> None:
        """Stops every process, those that need others first; kills what does not stop in its time. Leaves none."""
        if self._lock is None:
            return  # the folder, and the state file in it, are someone else's
        self._asker.close()
        left = {name: child for name, child in self._children.items() if child.process is not None and child.spec is not None}
        while left:
            needed = {dependency for child in left.values() for dependency in child.pending}
            wave = [child for name, child in left.items() if name not in needed] or list(left.values())
            self._stop_wave(wave)
            left = {name: child for name, child in left.items() if child not in wave}
        self._sweep_descendants()
        for child in self._children.values():
            child.status.state, child.status.pid = "stopped", 0
        self._write()

    def _stop_wave(self, wave: list[Child]) -> None:
        for child in wave:
            assert child.process is not None and child.spec is not None
            child.status.state = "stopping"
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(child.spec.stop_number())
        self._write()
        began = time.monotonic()
        for child in wave:
            assert child.process is not None and child.spec is not None
            try:
                child.process.wait(max(0.0, began + child.spec.stop_timeout_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.warning("%s did not stop in %.0f s and was killed", child.name, child.spec.stop_timeout_s)
                child.process.kill()
                child.process.wait()
            self._sweep_group(child.process.pid)
            logger.info("stopped %s", child.name)

    @staticmethod
    def _sweep_descendants() -> None:
        import psutil

        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _write(self) -> None:
        current = state.StackState(
            pid=os.getpid(),
            ticks=start_ticks(os.getpid()) or 0,
            data_dir=str(self._settings.data_dir),
            processes=[child.status for child in self._children.values()],
            urls=servers.urls(self._settings),
        )
        try:
            state.write(self._settings.data_dir, current)
        except OSError as exc:
            logger.warning("cannot write the state file: %s", exc)


def _failure(code: int, message: str) -> MarketstreamError:
    """An error with the child's own exit code, where that code is one of ours."""
    kinds = {kind.exit_code: kind for kind in MarketstreamError.__subclasses__()}
    return kinds.get(code, StartError)(message)


def end_leftovers(data_dir: Path) -> list[str]:
    """Kills processes that a dead supervisor of this folder left behind; returns their names."""
    found = state.read(data_dir)
    if found is None or found.lives():
        return []
    ended = [status.name for status in found.processes if status.pid and kill_if_same(status.pid, status.ticks)]
    until = time.monotonic() + 10
    while any(status.lives() for status in found.processes) and time.monotonic() < until:
        time.sleep(0.02)
    for name in ended:
        logger.warning("ended %s, left behind by a supervisor that was killed", name)
    return ended


class Loop:
    """Waits for signals, the starter's words and time; drives a supervisor."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        os.set_blocking(self._wake_read, False)
        self._end = False
        self._attached = True

    def run(self) -> None:
        """Until SIGTERM, SIGINT or the end of an attached starter."""
        signal.set_wakeup_fd(self._wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_stop)
        while not self._end:
            busy = self._supervisor.step()
            self._wait(POLL_STARTING_S if busy else POLL_IDLE_S)

    def _on_stop(self, *_: object) -> None:
        self._end = True

    def _wait(self, seconds: float) -> None:
        watched = [self._wake_read, *([0] if self._attached else [])]
        ready, _, _ = select.select(watched, [], [], seconds)
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        if 0 in ready:
            word = os.read(0, 4096)
            if b"detach" in word:
                self._attached = False
            elif not word:
                logger.warning("the starter is gone; stopping")
                self._end = True


def _emitter(descriptor: int) -> Emit:
    def emit(event: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more: the state file says the same
            os.write(descriptor, json.dumps(event).encode() + b"\n")

    return emit


def main() -> int:
    """Process entry; returns the exit code."""
    line = b""
    while not line.endswith(b"\n"):  # unbuffered on purpose: later words must be seen by select
        part = os.read(0, 65536)
        if not part:
            return 1
        line += part
    plan = json.loads(line)
    settings = load_settings()
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    emit = _emitter(plan["events"])
    launch.adopt_orphans()
    supervisor = Supervisor(settings, [ProcessSpec.from_json(entry) for entry in plan["processes"]], emit)
    try:
        supervisor.claim()
        supervisor.plan()
        Loop(supervisor).run()
    except MarketstreamError as exc:
        logger.error("%s", exc)
        supervisor.stop()
        emit({"event": "failed", "kind": type(exc).__name__, "message": exc.message})
        return exc.exit_code
    supervisor.stop()
    emit({"event": "down"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
