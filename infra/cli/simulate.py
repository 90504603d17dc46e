"""`marketstream simulate`: seeds in, worlds run, what does not hold out, with the command that shows it again.

Exit code 0 when every invariant held in every world, 1 otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

from infra.cli.output import Output
from infra.errors import SettingsError
from infra.simulation.bugs import BUGS, planted
from infra.simulation.side_by_side import side_by_side
from infra.simulation.world import Result, Scenario, simulate

MAX_SHOWN = 5
"""Violations of a seed that are printed; the rest follow from the first more often than not."""


def seeds_of(seed: int | None, seeds: str | None) -> range:
    """The seeds that are asked for. Raises SettingsError."""
    if seeds is None:
        return range(1 if seed is None else seed, (1 if seed is None else seed) + 1)
    first, dots, last = seeds.partition("..")
    if seed is not None or not dots or not first.isdigit() or not last.isdigit() or int(last) < int(first):
        raise SettingsError(f"--seeds {seeds}: write A..B with A <= B, as in 1..1000, and no --seed beside it.")
    return range(int(first), int(last) + 1)


def scenario_of(seed: int, *, kills: int | None, plain: bool) -> Scenario:
    """The world of a seed under the options given."""
    return Scenario.plain(seed) if plain else Scenario.drawn(seed, kills=kills)


def _world(call: tuple[int, int | None, bool, str | None], tell: Callable[[str], None] | None = None) -> Result:
    number, kills, plain, plant = call
    with planted(plant):
        return simulate(scenario_of(number, kills=kills, plain=plain), tell)


def replay_command(seed: int, *, kills: int | None, plain: bool, plant: str | None) -> str:
    """The command that runs a seed again, exactly."""
    words = ["marketstream simulate", f"--seed {seed}"]
    words += ["--plain"] if plain else []
    words += [f"--kills {kills}"] if kills is not None else []
    words += [f"--plant {plant}"] if plant else []
    return " ".join(words)


def run(
    output: Output,
    *,
    seed: int | None,
    seeds: str | None,
    kills: int | None,
    plain: bool,
    plant: str | None,
    trace: bool,
) -> int:
    """Run every seed; with ``plant`` until the planted bug is found. The exit code. Raises SettingsError."""
    if plant is not None and plant not in BUGS:
        raise SettingsError(f"--plant {plant}: no such bug. Known are: {', '.join(BUGS)}.")
    asked = seeds_of(seed, seeds)
    failed = 0
    worlds = ((number, kills, plain, plant) for number in asked)
    # one world is run here; more, one a core
    results = (
        side_by_side(_world, worlds)
        if len(asked) > 1 and not trace
        else ((call, _world(call, output.line if trace else None)) for call in worlds)
    )
    for (number, *_), result in results:
        command = replay_command(number, kills=kills, plain=plain, plant=plant)
        _tell(output, result, command)
        failed += bool(result.violations)
        if failed and plant is not None:
            output.note(f"The planted bug '{plant}' was found by seed {number}, after {number - asked.start + 1} of {len(asked)} seeds.")
            return 1
    if plant is not None:
        output.note(f"The planted bug '{plant}' was not found by seeds {asked.start}..{asked.stop - 1}.")
        return 0
    if len(asked) > 1:
        output.note(f"{len(asked)} worlds, {failed} of them broke an invariant.")
    return 1 if failed else 0


def _tell(output: Output, result: Result, command: str) -> None:
    if output.as_json:
        output.emit(
            {
                "seed": result.seed,
                "trace": result.digest,
                "virtual_s": round(result.virtual_s, 3),
                "wall_s": round(result.wall_s, 4),
                "speed": round(result.speed, 1),
                "trades": result.trades,
                "kills": result.kills,
                "recovery_s": result.recovery_s,
                "violations": result.violations,
                "replay": command,
            }
        )
        return
    kills = ", ".join(f"{name} {count}" for name, count in sorted(result.kills.items())) or "none"
    output.line(
        f"seed {result.seed}  trace {result.digest}  {result.virtual_s:.1f} virtual s at {result.speed:,.0f}x  "
        f"{result.trades} trades  kills: {kills}"
    )
    for line in result.violations[:MAX_SHOWN]:
        output.line(f"  BROKEN {line}")
    if result.violations:
        if len(result.violations) > MAX_SHOWN:
            output.line(f"  ... and {len(result.violations) - MAX_SHOWN} more")
        output.line(f"  again: {command}")
