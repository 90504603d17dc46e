"""What a process of the stack is and when it is ready: plain data that can be written to a pipe, and the probes."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from infra.stack import kafka

PROBE_TIMEOUT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """One process for the supervisor to run."""

    name: str
    """Unique; also the name of its log file."""
    argv: tuple[str, ...]
    """Program and arguments; the program with its path."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the supervisor's environment, which already holds every setting (``Settings.as_environ()``)."""
    ready: str = ""
    """When it counts as ready: ``http://host:port/path`` answers 200, ``kafka://host:port`` and ``postgres://host:port`` speak their
    protocol, ``tcp://host:port`` accepts; empty: as soon as it runs."""
    live: str = ""
    """Asked once a second while it runs: without an answer for long, or with 503 and a reason from ``/livez``, it is ended and started
    again. As ``ready``, but any answer of ``http`` counts; empty: only its end is seen."""
    ports: Mapping[str, int] = field(default_factory=dict)
    """Ports it listens on, by the setting that chooses them; checked to be free before the start."""
    after: tuple[str, ...] = ()
    """Names of processes that must be ready first; stopping goes the other way."""
    restart: bool = True
    """Start it again when it ends, with growing pauses (0.1 s doubling to 10 s, back to 0.1 s after 5 s of running)."""
    ready_timeout_s: float = 60.0
    """Seconds it may take to become ready at the first start."""
    stop_signal: str = "SIGTERM"
    """What asks it to stop."""
    stop_timeout_s: float = 10.0
    """Seconds until it is killed."""
    unprivileged: bool = False
    """Must not run as root (PostgreSQL refuses to)."""

    def as_json(self) -> dict[str, Any]:
        """A dict for ``json.dumps``."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ProcessSpec:
        """The inverse of :meth:`as_json`."""
        return ProcessSpec(**{**data, "argv": tuple(data["argv"]), "after": tuple(data["after"])})

    def stop_number(self) -> signal.Signals:
        """``stop_signal`` as a number."""
        return signal.Signals[self.stop_signal]


def probe(ready: str, timeout_s: float = PROBE_TIMEOUT_S) -> str | None:
    """None when what ``ready`` names answers, else one phrase saying why not. Blocks for at most ``timeout_s`` or so."""
    if not ready:
        return None
    url = urlsplit(ready)
    host, port = url.hostname or "127.0.0.1", url.port or 0
    if url.scheme == "kafka":
        return kafka.probe(port, host, timeout_s)
    try:
        if url.scheme == "http":
            return _probe_http(host, port, url.path or "/", timeout_s)
        if url.scheme == "postgres":
            return _probe_postgres(host, port, timeout_s)
        socket.create_connection((host, port), timeout=timeout_s).close()
    except (OSError, http.client.HTTPException) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else type(exc).__name__
        return f"port {port} does not answer ({reason})"
    return None


def _probe_http(host: str, port: int, path: str, timeout_s: float) -> str | None:
    link = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        link.request("GET", path)
        response = link.getresponse()
        body = response.read(500)
        return None if response.status == 200 else f"{path} answers {response.status}: {body.decode(errors='replace').strip()[:200]}"
    finally:
        link.close()


def _probe_postgres(host: str, port: int, timeout_s: float) -> str | None:
    """A start-up message is answered with R (authenticate) by a server that takes connections, with E while it is starting."""
    body = struct.pack(">i", 196608) + b"user\0postgres\0database\0postgres\0\0"
    with socket.create_connection((host, port), timeout=timeout_s) as link:
        link.settimeout(timeout_s)
        link.sendall(struct.pack(">i", len(body) + 4) + body)
        answer = link.recv(1000)
    if answer[:1] == b"R":
        return None
    fields = [part[1:].decode(errors="replace") for part in answer[5:].split(b"\0") if part[:1] == b"M"]
    return fields[0] if fields else f"port {port} does not speak PostgreSQL's protocol"


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when there is no such process (or only its zombie).

    Together with the pid this names a process for good: pids are reused, the pair is not.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:  # noqa: PTH123 - a third of the cost of Path.open, asked every second
            fields = stream.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def kill_if_same(pid: int, ticks: int, number: int = signal.SIGKILL) -> bool:
    """Signals the process when it is still the one that started at ``ticks``; returns whether it was."""
    if start_ticks(pid) != ticks:
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
