"""A simulated disk: files that a process leaves behind, of which a power cut takes what was not synced."""

from __future__ import annotations

from random import Random

from infra.simulation.loop import PROCESS


class SimDisk:
    """`infra.spool.Files` in memory. What a killed process wrote stays; a write it died in may be torn.

    Args:
        random: of torn writes and of what a power cut leaves.
        room: bytes; a write beyond it fails with ENOSPC after a part.
    """

    def __init__(self, random: Random, room: int = 1 << 40) -> None:
        self.room = room
        self.appends = 0
        """Writes so far."""
        self._files: dict[str, bytearray] = {}
        self._synced: dict[str, bytes] = {}
        self._random = random

    def power_cut(self) -> None:
        """Everything that was not synced is lost, but for a prefix of what was appended."""
        for name, data in list(self._files.items()):
            synced = self._synced.get(name)
            if synced is None:
                del self._files[name]
                continue
            kept = len(synced) if len(data) < len(synced) else self._random.randint(len(synced), len(data))
            self._files[name] = bytearray(data[:kept]) if bytes(data[: len(synced)]) == synced else bytearray(synced)

    # -- infra.spool.Files

    def names(self) -> list[str]:
        """See Files.names."""
        return sorted(self._files)

    def size(self, name: str) -> int:
        """See Files.size."""
        return len(self._files[name])

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See Files.read."""
        return bytes(self._files[name][offset : offset + size])

    def append(self, name: str, data: bytes) -> None:
        """See Files.append."""
        self.appends += 1
        file = self._files.setdefault(name, bytearray())
        process = PROCESS.get()
        if process is not None and process.doomed_in == 1:
            file += data[: self._random.randint(0, len(data))]
        _touch()
        fits = data[: max(0, self.room - sum(map(len, self._files.values())))]
        file += fits
        if len(fits) < len(data):
            raise OSError(28, "No space left on device")

    def sync(self, name: str) -> None:
        """See Files.sync."""
        _touch()
        if name in self._files:
            self._synced[name] = bytes(self._files[name])

    def truncate(self, name: str, size: int) -> None:
        """See Files.truncate."""
        del self._files[name][size:]

    def replace(self, name: str, data: bytes) -> None:
        """See Files.replace."""
        _touch()
        self._files[name] = bytearray(data)
        self._synced[name] = data  # a rename shows the old or the new whole; that the new one may be lost is no harm to its reader

    def remove(self, name: str) -> None:
        """See Files.remove."""
        self._files.pop(name, None)
        self._synced.pop(name, None)

    def free_bytes(self) -> int:
        """See Files.free_bytes."""
        return max(0, self.room - sum(map(len, self._files.values())))


def _touch() -> None:
    process = PROCESS.get()
    if process is not None:
        process.touch()
