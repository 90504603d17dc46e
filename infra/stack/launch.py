"""Starting a process so that it cannot outlive us, and keeping its log bounded."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from infra.errors import StartError

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWUSER = 0x10000000
LOG_BYTES = 8 * 1024 * 1024
"""A log is moved aside (one generation) when it is this large: 16 MB a process at most."""
UNPRIVILEGED_ID = 65534

_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Grandchildren whose parent dies become our children, so that none is lost when the tree is stopped."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def start(
    argv: Sequence[str], *, env: Mapping[str, str], log: Path, cwd: Path, death_signal: int = signal.SIGKILL, unprivileged: bool = False
) -> subprocess.Popen[bytes]:
    """Starts ``argv`` in a session of its own, its output appended to ``log``.

    The kernel sends ``death_signal`` when the calling THREAD ends: call it from a thread that lives as long as the process should.

    Raises:
        StartError: the program cannot be started.
    """
    with log.open("ab") as out:
        try:
            return subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, **env},
                start_new_session=True,
                preexec_fn=_before_exec(os.getpid(), death_signal, unprivileged),
            )
        except (OSError, subprocess.SubprocessError) as exc:
            raise StartError(f"cannot start {argv[0]}: {exc}") from exc


def _before_exec(parent: int, death_signal: int, unprivileged: bool) -> Callable[[], None]:
    """What the child does between fork and exec."""
    drop = drop_root if unprivileged and os.geteuid() == 0 else None

    def run() -> None:
        if drop is not None:
            drop()
        _libc.prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return run


def drop_root() -> None:
    """Stops being root, in a process about to exec.

    First choice is a user namespace in which we are user 65534: files keep their owner and every path stays reachable. Where the kernel
    forbids it (some containers), the real user 65534, which must be able to reach the program and own the data.
    """
    gid, uid = os.getegid(), os.geteuid()
    if _libc.unshare(CLONE_NEWUSER) == 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{UNPRIVILEGED_ID} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{UNPRIVILEGED_ID} {gid} 1")
        return
    os.setgroups([])
    os.setgid(UNPRIVILEGED_ID)
    os.setuid(UNPRIVILEGED_ID)


def needs_owner_change() -> bool:
    """Whether, as root, files for an unprivileged process must be given away because user namespaces are not to be had."""
    if os.geteuid() != 0:
        return False
    child = os.fork()
    if child == 0:
        os._exit(0 if _libc.unshare(CLONE_NEWUSER) == 0 else 1)
    return os.waitpid(child, 0)[1] != 0


def run_unprivileged(argv: Sequence[str], *, stdin: str = "", env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a short command to its end, not as root; output is captured as text."""
    return subprocess.run(
        list(argv),
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **(env or {})},
        preexec_fn=_before_exec(os.getpid(), signal.SIGKILL, True),
    )


def rotate(log: Path, limit: int = LOG_BYTES) -> bool:
    """Moves a log that is too large aside; returns whether it was.

    The writer keeps its descriptor (opened to append), so the content is copied and the file cut: a line written in between may be lost,
    which for a log of 8 MB is the smaller evil than a pipe through the supervisor.
    """
    try:
        if log.stat().st_size <= limit:
            return False
        shutil.copyfile(log, log.with_name(log.name + ".1"))
        os.truncate(log, 0)
    except OSError as exc:
        logger.warning("cannot rotate %s: %s", log, exc)
        return False
    return True


def last_line(log: Path, most: int = 300) -> str:
    """The last line in a log that says something, shortened."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 8192))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:most] for line in reversed(lines) if line.strip()), "")
