"""The proof by kill points: each component killed so many times in seeded worlds, the tables compared with those of an undisturbed run.

Comes in: how many kills, and the seeds to draw worlds from. Goes out: a :class:`Proof` with what was lost, doubled or different, and how
long recovery took in virtual seconds. ``python -m infra.simulation.proof --kills 1000`` prints it; exit code 0 when every promise held.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from infra.prove.figures import note_figures
from infra.seam import SYSTEM
from infra.simulation.side_by_side import AHEAD, side_by_side
from infra.simulation.world import COMPONENTS, Result, Scenario, simulate

KILLS_A_WORLD: Final = 12
"""Over 30 s of trading: a component is killed every 2.5 s and away for 0.2 to 2 s."""
MAX_RECOVERY_S: Final = 3.0
"""From its restart until a component has caught up with what there was then, virtual seconds."""
SEEDS: Final = range(1, 100_000)
PLAIN_SEEDS: Final = range(1, 49)


@dataclass(kw_only=True, slots=True)
class Component:
    """What killing one component came to."""

    name: str
    kills: int = 0
    worlds: int = 0
    failures: list[str] = field(default_factory=list)
    """Sentences with the seed they are of."""
    recoveries: int = 0
    slowest_s: float = 0.0
    median_s: float = 0.0


@dataclass(kw_only=True, slots=True)
class Proof:
    """What all kills came to."""

    components: list[Component]
    virtual_s: float
    wall_s: float
    plain_speed: float
    """Times real time at which worlds run in which nothing goes wrong, one a core: a figure, as the machine may have other work."""

    @property
    def holds(self) -> bool:
        """Nothing lost, nothing doubled, equal tables, and recovery in time."""
        return all(not one.failures and one.slowest_s <= MAX_RECOVERY_S for one in self.components)

    def as_dict(self) -> dict[str, Any]:
        """Figures as JSON knows them."""
        speed = round(self.virtual_s / self.wall_s) if self.wall_s else 0
        plain = round(self.plain_speed)
        return {"holds": self.holds, "speed": speed, "plain_speed": plain, "components": [asdict(one) for one in self.components]}


def scenario_of(seed: int, target: str | None) -> Scenario:
    """The world of a seed with ``target`` killed again and again; None: undisturbed."""
    drawn = Scenario.drawn(seed)
    kills = 0 if target is None else KILLS_A_WORLD
    return replace(drawn, duration_s=30.0, kills=kills, faults=False, targets=COMPONENTS if target is None else (target,))


def _worlds(call: tuple[int, tuple[str, ...]]) -> tuple[Result, list[Result]]:
    """The undisturbed world of a seed, and those in which each of some components is killed."""
    seed, targets = call
    return simulate(scenario_of(seed, None)), [simulate(scenario_of(seed, target)) for target in targets]


def _plain(seed: int) -> Result:
    return simulate(Scenario.plain(seed))


def _plain_speed() -> float:
    virtual_s, began_s = 0.0, 0.0
    for number, (_, result) in enumerate(side_by_side(_plain, PLAIN_SEEDS)):
        if number == AHEAD:
            began_s = SYSTEM.monotonic_s()  # each process has imported and compiled all it needs by now
        elif number > 2 * AHEAD:  # those before had begun by then
            virtual_s += result.virtual_s
    return virtual_s / (SYSTEM.monotonic_s() - began_s)


def run(kill_points: int, seeds: Iterable[int] = SEEDS, tell: Callable[[str], None] = lambda _: None) -> Proof:
    """Kill each component ``kill_points`` times, in worlds of ``seeds``. ``tell`` gets a line a world."""
    components = {name: Component(name=name) for name in COMPONENTS}
    times: dict[str, list[float]] = {name: [] for name in COMPONENTS}

    def calls() -> Iterator[tuple[int, tuple[str, ...]]]:
        for seed in seeds:
            wanted = tuple(one.name for one in components.values() if one.kills < kill_points)
            if not wanted:
                return
            yield seed, wanted

    virtual_s, began_s = 0.0, SYSTEM.monotonic_s()
    for (seed, targets), (calm, results) in side_by_side(_worlds, calls()):
        virtual_s += calm.virtual_s + sum(result.virtual_s for result in results)
        for name, result in zip(targets, results, strict=True):
            one = components[name]
            one.worlds += 1
            one.kills += result.kills.get(name, 0)
            one.failures += _failures(seed, name, calm, result)
            times[name] += result.recovery_s.get(name, [])
            tell(f"seed {seed}: {name} killed {one.kills} times, {len(one.failures)} failures")
    wall_s = SYSTEM.monotonic_s() - began_s
    for name, one in components.items():
        one.recoveries = len(times[name])
        one.slowest_s = max(times[name], default=0.0)
        one.median_s = sorted(times[name])[len(times[name]) // 2] if times[name] else 0.0
    return Proof(components=list(components.values()), virtual_s=virtual_s, wall_s=wall_s, plain_speed=_plain_speed())


def _failures(seed: int, target: str, calm: Result, result: Result) -> list[str]:
    found = [f"seed {seed}, {target} killed: {line}" for line in result.violations]
    found += [f"seed {seed}, undisturbed: {line}" for line in calm.violations]
    for table, digest in calm.tables.items():
        if result.tables[table] != digest:
            found.append(f"seed {seed}, {target} killed: table {table} differs from that of the undisturbed run")
    return found


def main() -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(description="Kill points in simulation")
    parser.add_argument("--kills", type=int, default=1_000, help="kill points of each component")
    parser.add_argument("--first-seed", type=int, default=1)
    arguments = parser.parse_args()
    proof = run(arguments.kills, range(arguments.first_seed, arguments.first_seed + 100_000), lambda line: print(line, file=sys.stderr))
    for one in proof.components:
        print(
            f"{one.name}: {one.kills} kills in {one.worlds} worlds, {len(one.failures)} failures, "
            f"recovery median {one.median_s:.2f} s, slowest {one.slowest_s:.2f} s of {one.recoveries}"
        )
        for line in one.failures[:5]:
            print(f"  {line}")
    figures = proof.as_dict()
    print(
        f"{proof.virtual_s:,.0f} virtual seconds at {figures['speed']:,}x (plain worlds: {figures['plain_speed']:,}x); every promise held: {'yes' if proof.holds else 'NO'}"
    )
    note_figures({"name": "kill points in simulation", **figures})
    return 0 if proof.holds else 1


if __name__ == "__main__":
    sys.exit(main())
