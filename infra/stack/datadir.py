"""The data folder: claimed by one supervisor at a time, checked before anything is started. Each thing that can be wrong is one sentence.

Layout: ``VERSION``, ``kafka/``, ``postgres/``, ``clickhouse/``, ``logs/``, ``run/`` (``lock``, ``state.json``), ``spool/`` (collectors make it).
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from infra.errors import DataDirBrokenError, DataDirOwnedError, DataDirVersionError, DiskFullError, PortInUseError

LAYOUT = "1"
_VERSION_LINE = "marketstream data layout "
MIN_FREE_BYTES = 512 * 1024 * 1024
"""Below this nothing is started: Kafka, ClickHouse and PostgreSQL all stop uncleanly on a full disk."""
FOLDERS = ("kafka", "postgres", "clickhouse", "logs", "run")


def free_bytes(path: Path) -> int:
    """Free space for us on the disk that holds ``path``."""
    return shutil.disk_usage(path).free


def claim(data_dir: Path, free: Callable[[Path], int] = free_bytes) -> BinaryIO:
    """Makes or checks the folder and takes its lock, which the system frees when the holder ends, however it ends.

    Returns:
        The open lock; keep it as long as the folder is used.

    Raises:
        DataDirBrokenError: not ours, or not writable.
        DataDirVersionError: of another layout version.
        DataDirOwnedError: another running process has it.
        DiskFullError: less than 512 MB are free.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        check_version(data_dir)
        for name in FOLDERS:
            (data_dir / name).mkdir(exist_ok=True)
        lock = (data_dir / "run" / "lock").open("ab+")
    except OSError as exc:
        raise translate(exc, data_dir) from exc
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        lock.seek(0)
        owner = lock.read(20).decode(errors="replace").strip() or "unknown"
        lock.close()
        raise DataDirOwnedError(
            f"the data folder {data_dir} is in use by a running stack (pid {owner}); stop it with `marketstream down`, "
            "or choose another folder with --data-dir"
        ) from exc
    lock.truncate(0)
    lock.write(str(os.getpid()).encode())
    lock.flush()
    left = free(data_dir)
    if left < MIN_FREE_BYTES:
        lock.close()
        raise DiskFullError(
            f"only {left // 1_000_000} MB are free where {data_dir} lies and {MIN_FREE_BYTES // 1_000_000} MB are needed; "
            "free some space or choose another folder with --data-dir"
        )
    return lock


def check_version(data_dir: Path) -> None:
    """Writes ``VERSION`` into an empty folder, checks it in any other.

    Raises:
        DataDirBrokenError: a folder with other things in it.
        DataDirVersionError: another layout version.
    """
    file = data_dir / "VERSION"
    try:
        text = file.read_text(errors="replace")
    except FileNotFoundError:
        others = sorted(path.name for path in data_dir.iterdir() if path.name not in ("logs", "run", "spool"))
        if others:
            raise DataDirBrokenError(
                f"{data_dir} is not a data folder of ours: it has no VERSION file but holds {others[0]!r}; choose an empty folder"
            ) from None
        file.write_text(f"{_VERSION_LINE}{LAYOUT}\n")
        return
    if not text.startswith(_VERSION_LINE):
        raise DataDirBrokenError(
            f"{file} is damaged ({text[:40]!r}); write {_VERSION_LINE + LAYOUT!r} into it if you know the folder is fine"
        )
    found = text.removeprefix(_VERSION_LINE).strip()
    if found != LAYOUT:
        raise DataDirVersionError(
            f"the data folder {data_dir} has layout {found[:20]}, this program knows {LAYOUT}; use the program that wrote it, or another folder"
        )


def check_ports(ports: Mapping[str, int]) -> None:
    """Refuses to start when one of ``ports`` (setting -> port) is taken.

    Raises:
        PortInUseError: names the port, the setting and, where it can be seen, the program.
    """
    for setting, port in ports.items():
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ports in TIME_WAIT are ours to take
            try:
                trial.bind(("127.0.0.1", port))
                trial.listen(1)
            except OSError as exc:
                if exc.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                variable = "MARKETSTREAM_" + setting.upper().replace("PORTS.", "PORT_").replace(".", "_")
                raise PortInUseError(
                    f"port {port} ({setting}) is in use{_holder(port)}; stop that program or set {variable}, or move all ports at once "
                    "with MARKETSTREAM_PORT_BASE",
                    port=port,
                ) from exc


def _holder(port: int) -> str:
    import psutil

    try:
        for link in psutil.net_connections("tcp"):
            if link.status == psutil.CONN_LISTEN and getattr(link.laddr, "port", 0) == port and link.pid:
                return f" by {psutil.Process(link.pid).name()} (pid {link.pid})"
    except psutil.Error:
        return ""  # other users' processes may not be looked at
    return ""


def translate(exc: OSError, path: Path) -> DataDirBrokenError | DiskFullError:
    """The typed form of an operating system error on the data folder."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"the disk that holds {path} is full; free some space or choose another folder with --data-dir")
    return DataDirBrokenError(f"cannot use the data folder {path}: {exc.strerror}; choose a folder you can write with --data-dir")
