"""The lines of the proof: each a promise in one sentence, and the tests or commands that show it, in a short and in a full form."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from infra.prove.matrix import FORM_FILES, named_tests


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of a line. Its tests and commands append figures, JSON objects a line, to the file ``PROVE_FIGURES`` names.

    Attributes:
        name: what is shown while it runs.
        tests: pytest node ids; or
        argv: a command of ours, run with this Python.
        short: environment of the short form, e.g. how many kills.
        full: environment of the full form.
        short_argv: arguments that only the short form has; ``full_argv`` the other.
        timeout_s: the full form is ended after this long and has failed.
    """

    name: str
    tests: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()
    short: Mapping[str, str] = field(default_factory=dict)
    full: Mapping[str, str] = field(default_factory=dict)
    short_argv: tuple[str, ...] = ()
    full_argv: tuple[str, ...] = ()
    timeout_s: float = 7_200.0

    def command(self, *, short: bool, junit: str) -> list[str]:
        """What is run."""
        if self.argv:
            return [sys.executable, *self.argv, *(self.short_argv if short else self.full_argv)]
        # a limit for each test would be the short form's; the step's own limit holds
        limit = [] if short else ["--timeout", str(int(self.timeout_s))]
        return [sys.executable, "-m", "pytest", "-q", "-rs", "-s", f"--junit-xml={junit}", *limit, *self.tests]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One promise."""

    name: str
    claim: str
    steps: tuple[Step, ...]


def _matrix() -> tuple[str, ...]:
    """Every test the matrix names; files whose form decides which of their tests exist as a whole."""
    return (*(test for test in named_tests() if not test.startswith(FORM_FILES)), *FORM_FILES)


_PARITY = tuple(f"tests/infra/test_parity{part}.py" for part in ("", "_repaired", "_repaired_store", "_twins"))


def _integration(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/integration/{name}" for name in names)


LINES: Final[tuple[Line, ...]] = (
    Line(
        name="simulation",
        claim="1,000 seeded kill points each of collector, broker, worker, sink and api in simulation: nothing lost, nothing doubled, "
        "tables equal to an undisturbed run.",
        steps=(
            Step(
                name="kill points in simulation",
                argv=("-m", "infra.simulation.proof"),
                short_argv=("--kills", "20"),
                full_argv=("--kills", "1000"),
            ),
        ),
    ),
    Line(
        name="kills",
        claim="50 kills each of collector, broker, worker, sink and api on the real stack: nothing lost, nothing doubled, output again within 3 s.",
        steps=(
            Step(
                name="kill -9 under a replay", tests=_integration("test_chaos.py"), short={"PROVE_KILLS": "1"}, full={"PROVE_KILLS": "50"}
            ),
            Step(
                name="kill -9 under live trades",
                tests=_integration("test_fault_kills.py"),
                short={"PROVE_KILLS": "1"},
                full={"PROVE_KILLS": "50"},
            ),
        ),
    ),
    Line(
        name="gaps",
        claim="1,000 known trade ids lost in more than 20 ways: the ledger names exactly those, each is fetched within 10 s or called unfillable, "
        "bars equal the no-fault run; a stale feed is found within 3 s and replaced within 1 s and jitter.",
        steps=(
            Step(
                name="lost trades",
                tests=_integration("test_fault_gaps.py"),
                short={"PROVE_FAULT_IDS": "200"},
                full={"PROVE_FAULT_IDS": "1000"},
            ),
        ),
    ),
    Line(
        name="day",
        claim="A recorded day at 1x, at full speed, shuffled within the lateness bound, with 50 % duplicates, on 1, 2 and 4 workers that come and "
        "go: the same SHA-256 of every table.",
        steps=(
            Step(
                name="one day, many ways", tests=_integration("test_fault_day.py"), short={"PROVE_DAY": "short"}, full={"PROVE_DAY": "full"}
            ),
        ),
    ),
    Line(
        name="matrix",
        claim="Every cell of the fault matrix (docs/faults.md) comes out as it says there, with no step done by hand.",
        steps=(
            Step(name="the matrix is up to date", tests=("tests/infra/test_prove.py",)),
            Step(
                name="every test the matrix names",
                tests=_matrix(),
                full={"PROVE_CELLS": "all", "PROVE_KILLS": "5", "PROVE_OLD_CODE": "1"},
            ),
            Step(
                name="ten minutes without broker and ClickHouse",
                tests=_integration("test_supervision.py"),
                full={"PROVE_OUTAGE_S": "600"},
            ),
        ),
    ),
    Line(
        name="bugs",
        claim="30 planted bugs are each caught within 1,000 seeds.",
        steps=(
            Step(
                name="planted bugs", argv=("-m", "infra.simulation.planted"), short_argv=("--seeds", "100"), full_argv=("--seeds", "1000")
            ),
        ),
    ),
    Line(
        name="soak",
        claim="1e9 accelerated trades through worker and sink, in one process and through the real stack: memory grows by less than 1 MB per "
        "1e8, nothing waits at the end.",
        steps=(
            Step(
                name="in one process",
                argv=("-m", "infra.prove.soak"),
                short_argv=("--trades", "4000000"),
                full_argv=("--trades", "1000000000"),
            ),
            Step(
                name="through Kafka and ClickHouse",
                argv=("-m", "tests.performance.soak_stack"),
                short_argv=("--trades", "4000000"),
                full_argv=("--trades", "1000000000"),
                timeout_s=4 * 3_600.0,
            ),
        ),
    ),
    Line(
        name="parity",
        claim="A recorded live session replayed from its topics gives the same rows; none is unexplained.",
        steps=(Step(name="parity", tests=(*_PARITY, *_integration("test_time_machine.py"))),),
    ),
)


def names() -> list[str]:
    """Names of all lines, in order."""
    return [line.name for line in LINES]
