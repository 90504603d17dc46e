"""What can go wrong for an operator: one typed tree, each error one sentence and one stable exit code.

Tree (exit code):

- ``MarketstreamError`` (1): base; anything without a more exact type
    - ``SettingsError`` (2): a setting or command-line value is unknown or not allowed
    - ``PortInUseError`` (3): a port of the stack is taken by another program
    - ``DataDirError`` (4): the data folder cannot be used
        - ``DataDirVersionError``: written by another layout version
        - ``DataDirOwnedError``: in use by another running process
        - ``DataDirBrokenError``: damaged, not ours, or not writable
    - ``DiskFullError`` (5): too little free space
    - ``UnreachableError`` (6): broker, ClickHouse, PostgreSQL, registry or API does not answer or refuses
    - ``InputFileError`` (7): a file given by the user cannot be read as what it should be
    - ``NetworkError`` (8): first-time set-up needs the network and has none
    - ``StartError`` (9): a process of the stack did not become ready
    - ``NotRunningError`` (10): the command needs a running stack and there is none
    - ``IntegrityError`` (11): a downloaded file is not the one that was locked
    - ``StoppedError`` (130): interrupted by Ctrl-C or a signal

Exit codes never change meaning; scripts rely on them.
"""

from __future__ import annotations

from typing import ClassVar


class MarketstreamError(Exception):
    """One sentence for the operator: what happened, where, and what to do. ``exit_code`` is the process's exit status."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class SettingsError(MarketstreamError):
    """A setting is unknown or its value is not allowed."""

    exit_code = 2


class PortInUseError(MarketstreamError):
    """A port the stack wants to listen on is taken."""

    exit_code = 3

    def __init__(self, message: str, *, port: int = 0) -> None:
        super().__init__(message)
        self.port = port


class DataDirError(MarketstreamError):
    """The data folder cannot be used."""

    exit_code = 4


class DataDirVersionError(DataDirError):
    """The data folder was written by another layout version."""


class DataDirOwnedError(DataDirError):
    """The data folder is in use by another running process."""


class DataDirBrokenError(DataDirError):
    """The data folder is damaged, is not a data folder of ours, or cannot be written."""


class DiskFullError(MarketstreamError):
    """Too little free space where the data folder lies."""

    exit_code = 5


class UnreachableError(MarketstreamError):
    """A server does not answer, or refuses."""

    exit_code = 6


class InputFileError(MarketstreamError):
    """A file given by the user is not what it should be."""

    exit_code = 7


class NetworkError(MarketstreamError):
    """Something must be downloaded and the network does not answer."""

    exit_code = 8


class StartError(MarketstreamError):
    """A process of the stack did not become ready in time, or ended while starting."""

    exit_code = 9


class NotRunningError(MarketstreamError):
    """The command needs a running stack."""

    exit_code = 10


class IntegrityError(MarketstreamError):
    """A downloaded file does not have the locked checksum."""

    exit_code = 11


class StoppedError(MarketstreamError):
    """The operator interrupted the command."""

    exit_code = 130
