"""What runs: written by the supervisor to ``run/state.json``, read by everybody else. Whole files only, replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from infra.stack.spec import start_ticks

State = Literal["waiting", "starting", "ready", "not ready", "restarting", "failing", "stopping", "stopped"]
"""``not ready``: it runs and says why it cannot work now, as when a server is away; nobody restarts it for that. ``failing``: it ends or hangs again and again; it is still started again, with pauses of 10 s."""


@dataclass(kw_only=True)
class ProcessStatus:
    """One process as ``status`` shows it."""

    name: str
    pid: int = 0
    """0 when it does not run."""
    state: State = "waiting"
    ports: Mapping[str, int] = field(default_factory=dict)
    """Port by the setting that chooses it."""
    ready: str = ""
    """What was probed, see ``ProcessSpec.ready``."""
    log: str = ""
    """Its log file."""
    restarts: int = 0
    """Unplanned ends since the stack was started."""
    reason: str = ""
    """Why it was started again the last time."""
    restarted_at: float = 0.0
    """When that was, seconds since the epoch."""
    ready_s: float = 0.0
    """Seconds from its start until it was ready."""
    ticks: int = 0
    """Start time in clock ticks since boot; with ``pid`` names the process for good."""
    detail: str = ""
    """Why it is not ready, or how it last ended."""

    def lives(self) -> bool:
        """Whether this very process still runs."""
        return self.pid > 0 and start_ticks(self.pid) == self.ticks


@dataclass(kw_only=True)
class StackState:
    """The whole tree."""

    pid: int
    ticks: int
    data_dir: str
    processes: list[ProcessStatus]
    urls: dict[str, str] = field(default_factory=dict)

    def lives(self) -> bool:
        """Whether its supervisor still runs."""
        return self.pid > 0 and start_ticks(self.pid) == self.ticks


def file_of(data_dir: Path) -> Path:
    """Where the state of a stack lies."""
    return data_dir / "run" / "state.json"


def write(data_dir: Path, state: StackState) -> None:
    """Replaces the state file."""
    file = file_of(data_dir)
    staged = file.with_suffix(".new")
    staged.write_text(json.dumps(asdict(state), indent=1))
    staged.replace(file)


def read(data_dir: Path) -> StackState | None:
    """The state on file; None when there is none or it cannot be understood (it is only a note, never the truth)."""
    try:
        data: dict[str, Any] = json.loads(file_of(data_dir).read_text())
        processes = [ProcessStatus(**entry) for entry in data.pop("processes")]
        return StackState(processes=processes, **data)
    except (OSError, ValueError, TypeError, KeyError):
        return None
