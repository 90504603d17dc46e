"""What a simulated world is made of and what it came to: a :class:`Scenario` in, a :class:`Result` out. Both follow from a seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Final

from infra.simulation.components import Tuning

COMPONENTS: Final = ("collector", "broker", "worker", "sink", "api")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One world, wholly."""

    seed: int
    duration_s: float = 40.0
    """Trading time after the warm-up."""
    kills: int = 4
    """Kill points, spread over ``targets``."""
    targets: tuple[str, ...] = COMPONENTS
    faults: bool = True
    """Whether the network, the exchange, the broker and the store misbehave besides."""
    skew_us: int = 0
    """How far the collector's wall clock is off."""
    tuning: Tuning = field(default_factory=Tuning)

    @classmethod
    def drawn(cls, seed: int, *, kills: int | None = None, targets: tuple[str, ...] = COMPONENTS) -> Scenario:
        """The scenario of a seed: rates, waits and sizes differ from one to the next, so that bugs of few sizes are met too."""
        random = Random(f"{seed}/scenario")
        tuning = Tuning(
            partitions=random.choice((1, 2)),
            rate=random.choice((3.0, 6.0, 12.0)),
            linger_ms=random.choice((100.0, 250.0, 500.0)),
            snapshot_interval_s=random.choice((0.3, 0.6, 5.0)),
            sink_linger_s=random.choice((0.3, 1.0, 2.0)),
            page_rows=random.choice((5, 20, 1_000)),
        )
        return cls(
            seed=seed,
            duration_s=25.0,
            kills=random.randint(3, 10) if kills is None else kills,
            targets=targets,
            skew_us=random.choice((0, 0, -3_000_000, 40_000_000)),
            tuning=tuning,
        )

    @classmethod
    def plain(cls, seed: int) -> Scenario:
        """Nothing goes wrong: five minutes as fast as they go."""
        tuning = Tuning(
            partitions=1,
            rate=2.0,
            linger_ms=3_000.0,
            heartbeat_ms=3_000.0,
            check_s=1.0,
            spool_idle_s=5.0,
            snapshot_interval_s=30.0,
            sink_linger_s=10.0,
        )
        return cls(seed=seed, duration_s=300.0, kills=0, faults=False, tuning=tuning)


@dataclass(kw_only=True, slots=True)
class Result:
    """What a world came to."""

    seed: int
    digest: str
    violations: list[str]
    virtual_s: float
    wall_s: float
    steps: int
    trades: int
    kills: dict[str, int]
    recovery_s: dict[str, list[float]]
    """Per component and kill: virtual seconds from its restart until it had caught up with what there was then."""
    tables: dict[str, str] = field(default_factory=dict)
    """Table -> SHA-256 of what it holds, apart from when and where it was received."""

    @property
    def speed(self) -> float:
        """Virtual seconds a second."""
        return self.virtual_s / self.wall_s if self.wall_s else 0.0
