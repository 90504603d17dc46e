"""Why a file cannot be replayed; each message is one sentence: file, line, what, what to do.

- ReplayError                     anything wrong with a file or with what was asked of it
  - FileAccessError               missing, a folder, no permission, read error
  - FormatError                   not the format it claims to be; nothing of it was published
  - NoRowsError                   readable, but holds no trade of the instrument asked for
  - TruncatedError                ends early: what could be read was given out before this was raised
  - StrictError                   a bad row, and the caller asked to refuse bad rows
"""

from __future__ import annotations

from pathlib import Path


class ReplayError(ValueError):
    """The file cannot be replayed. ``path`` and ``line`` (1-based, 0 = not at a line) say where."""

    def __init__(self, path: Path, what: str, *, line: int = 0) -> None:
        self.path = path
        self.line = line
        self.what = what
        super().__init__(f"{path}, line {line:,}: {what}" if line else f"{path}: {what}")


class FileAccessError(ReplayError):
    """The file cannot be opened or read."""


class FormatError(ReplayError):
    """The file is not of the format; nothing was published."""


class NoRowsError(ReplayError):
    """The file holds no trade of the instrument."""


class TruncatedError(ReplayError):
    """The file ends early; the rows before ``line`` were read, the rest is missing."""


class StrictError(ReplayError):
    """A bad row in strict mode; nothing was published."""
