"""The proof by planted bugs: each must be found within so many seeds, and the same worlds must be sound without them.

``python -m infra.simulation.planted --seeds 1000`` prints which seed found which bug; exit code 0 when all were found.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable

from infra.prove.figures import note_figures
from infra.simulation.bugs import BUGS, planted
from infra.simulation.side_by_side import side_by_side
from infra.simulation.world import Scenario, simulate


def find(name: str, seeds: Iterable[int]) -> tuple[int, str] | None:
    """(seed, what it violates) of the first world that finds a bug, None when none does."""
    for seed in seeds:
        with planted(name):
            result = simulate(Scenario.drawn(seed))
        if result.violations:
            return seed, result.violations[0]
    return None


def _find(call: tuple[str, int]) -> tuple[int, str] | None:
    name, seeds = call
    return find(name, range(1, seeds + 1))


def _violates(seed: int) -> bool:
    return bool(simulate(Scenario.drawn(seed)).violations)


def run(seeds: int, tell: Callable[[str], None]) -> tuple[dict[str, int | None], list[int]]:
    """(bug -> seed that found it, seeds that break a promise without any bug), over seeds 1..``seeds``.

    Without bugs every seed is run that found one, and as many as were needed for the one that took longest.
    """
    found: dict[str, int | None] = {}
    for (name, _), hit in side_by_side(_find, ((name, seeds) for name in BUGS)):
        found[name] = None if hit is None else hit[0]
        tell(f"{name}: {'not found' if hit is None else f'seed {hit[0]}: {hit[1]}'}")
    last = max((seed for seed in found.values() if seed is not None), default=0)
    broken = [seed for seed, violated in side_by_side(_violates, range(1, last + 1)) if violated]
    tell(f"seeds 1..{last} without a bug: {len(broken)} broke a promise {broken[:10]}")
    return found, broken


def main() -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(description="Planted bugs")
    parser.add_argument("--seeds", type=int, default=1_000, help="worlds that may be needed for a bug")
    found, broken = run(parser.parse_args().seeds, print)
    caught = sum(seed is not None for seed in found.values())
    print(f"{caught} of {len(found)} planted bugs found; {len(broken)} false alarms")
    note_figures({"name": "planted bugs", "caught": caught, "planted": len(found), "false_alarms": len(broken), "seeds": found})
    return 0 if caught == len(found) and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
