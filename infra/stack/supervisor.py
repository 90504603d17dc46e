"""Starting, looking at and stopping the whole local stack: settings and process specs in; a running tree out.

stack = Stack(settings, processes=[ProcessSpec(name="api", argv=(...), ready="http://127.0.0.1:19080/readyz", after=("kafka",))])
stack.up(detach=True, on_progress=print)     # returns when everything is ready
stack.status()                               # from any process
stack.down()
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from infra import errors
from infra.settings import Settings
from infra.stack import datadir, state
from infra.stack.daemon import end_leftovers
from infra.stack.spec import ProcessSpec, kill_if_same, probe
from infra.stack.state import ProcessStatus, StackState

__all__ = ["ProcessSpec", "ProcessStatus", "Stack", "down", "read_state"]

Progress = Callable[[Mapping[str, Any]], None]
"""Called with events: ``{"event": "starting"|"ready"|"restarting", "name": ..., ...}``, last ``{"event": "up", "urls": {...}}``."""
ROOT = Path(__file__).resolve().parents[2]
STOP_TIMEOUT_S = 60.0


class Stack:
    """The stack of one data folder.

    Args:
        settings: what to run where.
        processes: our own services, run after and beside the local servers; they inherit every setting through the environment.
    """

    def __init__(self, settings: Settings, processes: Sequence[ProcessSpec] = ()) -> None:
        self._settings = settings
        self._processes = list(processes)
        self._daemon: subprocess.Popen[bytes] | None = None

    def up(self, detach: bool = False, on_progress: Progress | None = None) -> list[ProcessStatus]:
        """Starts everything and returns when all of it is ready.

        With ``detach`` it stays when this process ends; without, it is stopped when this process ends, however it ends
        (call :meth:`down`, or :meth:`wait` for its end). Ctrl-C while starting stops what was started.

        Raises:
            MarketstreamError: the typed reason (port, folder, disk, a process that does not start); nothing is left running.
            StoppedError: interrupted.
        """
        self._daemon, events = self._start_daemon()
        try:
            self._follow(self._daemon, events, on_progress)
        except KeyboardInterrupt:
            self.down()
            raise errors.StoppedError("interrupted while starting; everything was stopped") from None
        except BaseException:
            self._release(self._daemon)
            raise
        finally:
            os.close(events)
        if detach:
            self._detach(self._daemon)
        return self.status(check=False)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Waits for the supervisor this object started; its exit code, or None after ``timeout_s``."""
        if self._daemon is None:
            return 0
        try:
            return self._daemon.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def down(self) -> bool:
        """Stops everything; False when nothing ran. Returns only when no process is left."""
        stopped = down(self._settings.data_dir)
        if self._daemon is not None:
            self._release(self._daemon)
        return stopped

    def status(self, check: bool = True) -> list[ProcessStatus]:
        """Every process of the running stack, empty when none runs; with ``check`` each one that should be ready is asked."""
        found = state.read(self._settings.data_dir)
        if found is None or not found.lives():
            return []
        if check:
            for status in found.processes:
                if status.state == "ready":
                    if not status.lives():
                        status.state, status.detail = "restarting", "its process is gone"
                    elif (reason := probe(status.ready)) is not None:
                        status.state, status.detail = "not ready", reason
        return found.processes

    def _release(self, daemon: subprocess.Popen[bytes]) -> None:
        """Lets go of a supervisor, which makes it stop, and waits for its end."""
        if daemon.stdin is not None:
            daemon.stdin.close()
        daemon.wait(STOP_TIMEOUT_S)
        self._daemon = None

    def _detach(self, daemon: subprocess.Popen[bytes]) -> None:
        assert daemon.stdin is not None
        daemon.stdin.write(b"detach\n")
        daemon.stdin.close()
        daemon.returncode = 0  # it is no longer ours to wait for; without this Popen warns about a process left running
        self._daemon = None

    def _start_daemon(self) -> tuple[subprocess.Popen[bytes], int]:
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MARKETSTREAM_")}
        with _open_log(self._settings.data_dir) as log:
            events, theirs = os.pipe()
            try:
                daemon = subprocess.Popen(
                    [sys.executable, "-m", "infra.stack.daemon"],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    cwd=ROOT,
                    env={**inherited, **self._settings.as_environ(), "PYTHONPATH": path},
                    pass_fds=(theirs,),
                    start_new_session=True,
                )
            finally:
                os.close(theirs)
        assert daemon.stdin is not None
        daemon.stdin.write(json.dumps({"processes": [spec.as_json() for spec in self._processes], "events": theirs}).encode() + b"\n")
        daemon.stdin.flush()
        return daemon, events

    def _follow(self, daemon: subprocess.Popen[bytes], events: int, on_progress: Progress | None) -> None:
        buffer = b""
        while True:
            part = os.read(events, 65536)
            if not part:
                raise errors.StartError(f"the supervisor ended while starting; see {self._settings.data_dir / 'logs' / 'supervisor.log'}")
            buffer += part
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                event = json.loads(line)
                if event["event"] == "failed":
                    daemon.wait(STOP_TIMEOUT_S)
                    raise getattr(errors, event["kind"], errors.StartError)(event["message"])
                if on_progress is not None:
                    on_progress(event)
                if event["event"] == "up":
                    return


def _open_log(data_dir: Path) -> BinaryIO:
    try:
        (data_dir / "logs").mkdir(parents=True, exist_ok=True)
        return (data_dir / "logs" / "supervisor.log").open("ab")
    except OSError as exc:
        raise datadir.translate(exc, data_dir) from exc


def read_state(data_dir: Path) -> StackState | None:
    """The running stack of a folder with its urls and processes; None when none runs."""
    found = state.read(data_dir)
    return found if found is not None and found.lives() else None


def down(data_dir: Path) -> bool:
    """Stops the stack of a folder and whatever a killed one left; False when nothing ran.

    Raises:
        StartError: it did not stop within a minute and was killed.
    """
    found = state.read(data_dir)
    if found is None:
        return False
    if not found.lives():
        return bool(end_leftovers(data_dir))
    kill_if_same(found.pid, found.ticks, signal.SIGTERM)
    until = time.monotonic() + STOP_TIMEOUT_S
    while found.lives() and time.monotonic() < until:
        time.sleep(0.02)
    if found.lives():
        kill_if_same(found.pid, found.ticks)
        time.sleep(0.2)
        end_leftovers(data_dir)
        raise errors.StartError(f"the stack of {data_dir} did not stop within {STOP_TIMEOUT_S:.0f} s and was killed")
    return True
