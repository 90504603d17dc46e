"""The spool's folder on the real disk: `infra.spool.Files` over the operating system, held by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from typing import BinaryIO, Final

from infra.errors import DataDirOwnedError
from infra.seam import SYSTEM
from infra.stack.datadir import translate

_LOCK: Final = "lock"
_STAGED: Final = ".new"


class DiskFiles:
    """One folder, made when it is not there.

    Args:
        folder: nobody else writes there.
        wait_s: how long to wait for another process to let go of it; a predecessor that drains needs up to 5 s.

    Raises DataDirOwnedError, DataDirBrokenError, DiskFullError.
    """

    def __init__(self, folder: Path, *, wait_s: float = 6.0) -> None:
        self._folder = folder
        self._new: set[str] = set()  # files whose names may not be on the disk yet
        self._writing = ("", -1)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / _LOCK).open("ab")
        except OSError as exc:
            raise translate(exc, folder) from exc
        _claim(self._lock, folder, wait_s)
        for path in folder.glob(f"*{_STAGED}"):
            path.unlink()

    def close(self) -> None:
        """Let go of the folder."""
        self._close_writer()
        self._lock.close()

    def names(self) -> list[str]:
        """See Files.names."""
        return [path.name for path in self._folder.iterdir() if path.name != _LOCK]

    def size(self, name: str) -> int:
        """See Files.size."""
        return (self._folder / name).stat().st_size

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See Files.read."""
        with (self._folder / name).open("rb", buffering=0) as stream:
            stream.seek(offset)
            return stream.read(size) or b""

    def append(self, name: str, data: bytes) -> None:
        """See Files.append."""
        if self._writing[0] != name:
            self._close_writer()
            path = self._folder / name
            if not path.exists():
                self._new.add(name)
            self._writing = (name, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640))
        view = memoryview(data)
        while view:
            view = view[os.write(self._writing[1], view) :]

    def sync(self, name: str) -> None:
        """See Files.sync."""
        try:
            descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        if name in self._new:
            self._new.discard(name)
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def truncate(self, name: str, size: int) -> None:
        """See Files.truncate."""
        os.truncate(self._folder / name, size)

    def replace(self, name: str, data: bytes) -> None:
        """See Files.replace."""
        staged = self._folder / (name + _STAGED)
        staged.write_bytes(data)
        staged.replace(self._folder / name)

    def remove(self, name: str) -> None:
        """See Files.remove."""
        if self._writing[0] == name:
            self._close_writer()
        self._new.discard(name)
        with contextlib.suppress(FileNotFoundError):
            (self._folder / name).unlink()

    def free_bytes(self) -> int:
        """See Files.free_bytes."""
        return shutil.disk_usage(self._folder).free

    def _close_writer(self) -> None:
        if self._writing[1] >= 0:
            os.close(self._writing[1])
        self._writing = ("", -1)


def _claim(lock: BinaryIO, folder: Path, wait_s: float) -> None:
    until = SYSTEM.monotonic_s() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            if SYSTEM.monotonic_s() < until:
                SYSTEM.pause(0.05)
                continue
            lock.close()
            raise DataDirOwnedError(
                f"The spool {folder} is in use by another collector of the same exchange and topic prefix; stop that one, or give this one "
                "another data folder (MARKETSTREAM_DATA_DIR)."
            ) from exc
        return
