"""How a command speaks: tables for a terminal, JSON for scripts, one sentence and a stable exit code for what goes wrong.

Results go to stdout, progress and errors to stderr, so that a pipe gets nothing but results.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from infra.errors import DiskFullError, MarketstreamError, SettingsError, UnreachableError

if TYPE_CHECKING:
    from rich.console import Console

EXIT_PIPE_CLOSED = 141
"""What a shell reports for SIGPIPE: the reader of our output has had enough."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where and how a command answers. ``as_json`` follows ``--json``."""

    as_json: bool
    out: TextIO = field(default_factory=lambda: sys.stdout)
    err: TextIO = field(default_factory=lambda: sys.stderr)

    @property
    def is_terminal(self) -> bool:
        """Whether a person is looking at stdout and has not asked for JSON."""
        return self.out.isatty() and not self.as_json

    def emit(self, value: Any) -> None:
        """One JSON value on a line of its own."""
        print(json.dumps(value, default=str, separators=(", ", ": ")), file=self.out, flush=True)

    def line(self, text: str) -> None:
        """One line for a person."""
        print(text, file=self.out, flush=True)

    def note(self, text: str) -> None:
        """One line about what is going on, on stderr; one JSON object with ``--json``."""
        print(json.dumps({"note": text}) if self.as_json else text, file=self.err, flush=True)

    def console(self, *, stderr: bool = False) -> Console:
        """A rich console on our stdout or stderr; without a terminal it does not cut lines at 80 columns."""
        from rich.console import Console

        stream = self.err if stderr else self.out
        return Console(file=stream, width=None if stream.isatty() else 200, highlight=False, soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
        """A table for a person; numbers to the right."""
        self.console().print(make_table(columns, [list(row) for row in rows], title))


def make_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> Any:
    """A rich table of plain values."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell_text(value)) for value in row))
    return table


def cell_text(value: object) -> str:
    """A value as people read it: digits in groups, no trailing zeros, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.8f}".rstrip("0").rstrip(".") if abs(value) < 1e15 else f"{value:g}"
    return str(value)


def translate(exc: BaseException) -> MarketstreamError | None:
    """The operator's error for an exception of a library or of a pure package; None for one that is a bug of ours.

    Only the kinds are known here; a module that can say more precisely what went wrong does so itself.
    """
    if isinstance(exc, MarketstreamError):
        return exc
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"the disk is full ({exc.filename or 'writing'}): free some space and run the command again.")
    module = type(exc).__module__.partition(".")[0]
    if module in ("schemas", "collectors", "processors") and isinstance(exc, ValueError):
        return SettingsError(_first_line(exc))
    if isinstance(exc, OSError) and exc.filename is not None:
        return SettingsError(f"{exc.filename}: {exc.strerror}")
    if module in ("confluent_kafka", "cimpl", "asyncpg", "clickhouse_connect", "httpx", "websockets", "aiokafka") or isinstance(
        exc, ConnectionError
    ):
        return UnreachableError(f"a server of the stack does not answer or refuses ({_first_line(exc)}): see `marketstream doctor`.")
    return None


def _first_line(exc: BaseException) -> str:
    lines = str(exc).splitlines()
    return lines[0] if lines else type(exc).__name__


def error_value(kind: str, exit_code: int, message: str) -> dict[str, Any]:
    """The one shape errors have with ``--json``."""
    return {"error": {"type": kind, "exit_code": exit_code, "message": message}}


def report(kind: str, exit_code: int, message: str, *, as_json: bool, stream: TextIO | None = None) -> int:
    """Say what went wrong in one line on stderr; returns the exit code."""
    text = json.dumps(error_value(kind, exit_code, message)) if as_json else f"marketstream: {message}"
    print(text, file=stream or sys.stderr, flush=True)
    return exit_code
