"""Figures of a run of the proof: an object in; a line of the file that ``make prove`` names out, where it names one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def note_figures(figures: Mapping[str, Any]) -> None:
    """Append figures to the file ``PROVE_FIGURES`` names, a JSON object a line; without one nothing."""
    name = os.environ.get("PROVE_FIGURES")
    if name:
        with Path(name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(figures) + "\n")


def conclude(line: str, figures: Mapping[str, Any], problems: Sequence[str]) -> int:
    """Print figures and what does not hold, note the figures under the line's name; the exit code."""
    print(json.dumps(figures), flush=True)
    note_figures({"line": line, **figures})
    for text in problems:
        print(f"{line}: {text}", file=sys.stderr)
    return 1 if problems else 0
