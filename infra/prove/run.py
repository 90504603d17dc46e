"""Running lines of the proof: commands in, a verdict with figures and duration each out."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.prove.lines import Line, Step

ROOT = Path(__file__).resolve().parents[2]
KEPT_OUTPUT = 4_000
"""Characters of a failed step's output that the report shows."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What became of one command.

    Attributes:
        name: of the step.
        ok: exit code 0, and with tests: at least one ran and none was left out.
        seconds: how long it took.
        reason: why not, in a few words; empty when ok.
        figures: measured values, in the order they were written.
        passed: tests that passed.
        skipped: tests that were left out, with their reasons.
        output: the end of what a failed step wrote.
    """

    name: str
    ok: bool
    seconds: float
    reason: str = ""
    figures: list[dict[str, Any]] = field(default_factory=list)
    passed: int = 0
    skipped: tuple[str, ...] = ()
    output: str = ""


@dataclass(frozen=True, kw_only=True)
class LineResult:
    """What became of one line."""

    name: str
    claim: str
    steps: tuple[StepResult, ...]

    @property
    def ok(self) -> bool:
        """Whether every step is."""
        return all(step.ok for step in self.steps)

    @property
    def seconds(self) -> float:
        """Duration of all steps."""
        return sum(step.seconds for step in self.steps)


def run(lines: Sequence[Line], *, short: bool, on_step: Callable[[Line, Step], None]) -> list[LineResult]:
    """Run ``lines`` one after the other, every step of each even after a failure. ``on_step`` is told before each."""
    results = []
    for line in lines:
        steps = []
        for step in line.steps:
            on_step(line, step)
            steps.append(run_step(step, short=short))
        results.append(LineResult(name=line.name, claim=line.claim, steps=tuple(steps)))
    return results


def run_step(step: Step, *, short: bool) -> StepResult:
    """Run one command in the checkout."""
    with tempfile.TemporaryDirectory(prefix="marketstream-prove-") as folder:
        junit, figures, output = (Path(folder) / name for name in ("junit.xml", "figures.jsonl", "output.txt"))
        environ = {**os.environ, **(step.short if short else step.full), "PROVE_FIGURES": str(figures)}
        begun = time.monotonic()
        with output.open("wb") as stream:
            try:
                code: int | None = subprocess.run(
                    step.command(short=short, junit=str(junit)),
                    cwd=ROOT,
                    env=environ,
                    stdout=stream,
                    stderr=stream,
                    stdin=subprocess.DEVNULL,
                    timeout=step.timeout_s,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        seconds = time.monotonic() - begun
        passed, failed, skipped = counts(junit) if step.tests else (0, 0, ())
        reason = _reason(step, code, passed, failed, skipped)
        return StepResult(
            name=step.name,
            ok=not reason,
            seconds=seconds,
            reason=reason,
            figures=read_figures(figures),
            passed=passed,
            skipped=skipped,
            output=output.read_text(errors="replace")[-KEPT_OUTPUT:] if reason else "",
        )


def _reason(step: Step, code: int | None, passed: int, failed: int, skipped: tuple[str, ...]) -> str:
    if code is None:
        return f"not done after {step.timeout_s:.0f} s"
    if failed:
        return f"{failed} of {passed + failed} tests failed"
    if code:
        return f"exit code {code}"
    if skipped:
        return f"{len(skipped)} tests were left out: {skipped[0]}"
    return "no test ran" if step.tests and not passed else ""


def counts(junit: Path) -> tuple[int, int, tuple[str, ...]]:
    """Tests passed, failed (errors too), and the reasons of those left out."""
    if not junit.is_file() or not junit.stat().st_size:
        return 0, 0, ()
    total = failed = 0
    skipped = []
    for suite in ElementTree.parse(junit).getroot().iter("testsuite"):
        total += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += [item.get("message") or "no reason" for item in suite.iter("skipped")]
    return total - failed - len(skipped), failed, tuple(skipped)


def read_figures(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text.strip()]
