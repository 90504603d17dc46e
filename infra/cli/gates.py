"""Everything that must hold before a change lands, cheap first: `make test` and `make lint`.

``python -m infra.cli.gates test [pytest arguments]`` runs the gates one after the other, stops at the first that fails and closes with
one summary whose last line is ``N passed, N failed, N skipped``. ``lint`` runs the gates that execute no test.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = (".",)
"""What ruff looks at; it leaves out what git ignores."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One gate: its name in the summary and its command."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a gate came to: exit status and seconds."""

    name: str
    status: int
    seconds: float


def gates(kind: str, arguments: Sequence[str], report: Path) -> list[Gate]:
    """The gates of ``lint`` or ``test`` in the order they run; pytest writes its counts to ``report``."""
    python = sys.executable
    lint = [
        Gate(name="ruff check", command=(python, "-m", "ruff", "check", *CODE)),
        Gate(name="ruff format", command=(python, "-m", "ruff", "format", "--check", "--quiet", *CODE)),
        Gate(name="mypy --strict", command=(python, "-m", "mypy")),
        Gate(name="import directions", command=(python, "-m", "pytest", "-q", "tests/test_imports.py")),
        Gate(name="schemas", command=(python, "-m", "infra.schema_evolution")),
    ]
    if kind == "lint":
        return lint
    tests = Gate(name="tests", command=(python, "-m", "pytest", "-rs", f"--junit-xml={report}", *arguments))
    return [*lint, tests]


def run(gate: Gate) -> Outcome:
    """Run one gate in the checkout with its output on ours."""
    print(f"--- {gate.name}", flush=True)
    started = time.monotonic()
    status = subprocess.run(gate.command, cwd=ROOT, check=False, stdin=subprocess.DEVNULL, env=dict(os.environ)).returncode
    return Outcome(name=gate.name, status=status, seconds=time.monotonic() - started)


def counts(report: Path) -> tuple[int, int, int]:
    """``(passed, failed, skipped)`` of a JUnit report; an error counts as failed. (0, 0, 0) where no test ran."""
    if not report.is_file() or report.stat().st_size == 0:
        return 0, 0, 0
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    total = failed = skipped = 0
    for suite in suites:
        total += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return total - failed - skipped, failed, skipped


def summary(outcomes: Sequence[Outcome], planned: int, tested: tuple[int, int, int] | None) -> str:
    """The closing lines: one a gate, then the counts where tests ran."""
    lines = [f"{item.name:<18} {'ok' if item.status == 0 else 'FAILED':<7} {item.seconds:7.1f} s" for item in outcomes]
    if len(outcomes) < planned:
        lines.append(f"{planned - len(outcomes)} more not run: fix {outcomes[-1].name} first")
    if tested is not None:
        lines.append("{} passed, {} failed, {} skipped".format(*tested))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run the gates of ``argv[0]``. Returns the exit status of the first that fails, 0 when none does."""
    kind, arguments = (argv[0] if argv else "test"), argv[1:]
    with tempfile.TemporaryDirectory(prefix="marketstream-gates-") as folder:
        report = Path(folder) / "tests.xml"
        planned = gates(kind, arguments, report)
        outcomes: list[Outcome] = []
        for gate in planned:
            outcomes.append(run(gate))
            if outcomes[-1].status != 0:
                break
        tested = counts(report) if outcomes[-1].name == "tests" else None
    print("\n" + summary(outcomes, len(planned), tested), flush=True)
    return outcomes[-1].status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
