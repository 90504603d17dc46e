"""How long work shows where it is: a bar with rows a second and the time left on a terminal, JSON lines on stderr otherwise."""

from __future__ import annotations

import json
import time
from types import TracebackType
from typing import Any, Final, Self

from infra.cli.output import Output

_JSON_EVERY_S: Final = 1.0
"""Between two JSON lines of one stage; a log keeps what matters."""
_JSON_STILL_S: Final = 10.0
"""The same while nothing moves: enough to see that it waits."""


class Progress:
    """One piece of work. ``update`` may be called as often as one likes.

    Args:
        output: stderr of it is where progress goes; stdout is for results.
        what: a word or two, e.g. the file's name.
    """

    def __init__(self, output: Output, what: str) -> None:
        self._output = output
        self._what = what
        self._bar: Any = None
        self._task: Any = None
        self._stage = ""
        self._told_s = 0.0
        self._last = (-1.0, -1)

    def __enter__(self) -> Self:
        if self._output.err.isatty() and not self._output.as_json:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[detail]}"),
                TimeRemainingColumn(compact=True),
                console=self._output.console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=None, detail="")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, stage: str, done: float, total: float, *, rows: int, rows_per_s: float, **more: Any) -> None:
        """Show how far ``stage`` is: ``done`` of ``total`` in any one unit (0: unknown), ``rows`` so far and their rate."""
        changed = stage != self._stage
        self._stage = stage
        moved = (done, rows) != self._last
        self._last = (done, rows)
        if self._bar is not None:
            if changed:
                self._bar.reset(self._task, description=f"{self._what}: {stage}")
            detail = f"{rows:,} rows, {rows_per_s:,.0f} rows/s" if rows_per_s else f"{rows:,} rows"
            self._bar.update(self._task, completed=done, total=total or None, detail=detail)
            return
        now = time.monotonic()
        if changed or now - self._told_s >= (_JSON_EVERY_S if moved else _JSON_STILL_S):
            self._told_s = now
            value = {"stage": stage, "done": done, "total": total, "rows": rows, "rows_per_s": round(rows_per_s), **more}
            print(json.dumps({"progress": value}), file=self._output.err, flush=True)
