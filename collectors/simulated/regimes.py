"""How a market is set up: rate, seed, bursts and the regimes it goes through. Constants and a frozen config, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from collectors.simulated.errors import SimulationConfigError
from collectors.simulated.universe import MarketKind

MAX_RATE: Final = 2_000_000.0
"""Trades a second; beyond this one step would hold more trades than the history ring may."""

MAX_FILLS: Final = 12
"""Trades one order can make: bounds what a step can hold."""

MAX_LOTS: Final = 2**52
"""Sizes stay exact as float64."""


ID_EPOCH_S: Final = 1_577_836_800
"""2020-01-01: ids count from here."""

IDS_A_SECOND: Final = 16_384
"""Ids set aside for each second and symbol; the busiest symbol makes 9,500 trades a second at a rate of 100,000."""


LEVELLING_S: Final = 4.0
"""Seconds over which the rate is brought back to the one asked for: long against a burst, short against a benchmark. 20 s left a run of
60 s up to 17 % short in a calm regime."""


class Regime(NamedTuple):
    """How the whole market behaves for a while."""

    name: str
    volatility: float
    """Factor on every symbol's volatility."""
    activity: float
    """Factor on the rate of orders; the long-run rate is held by the controller, so only the ratio between regimes counts."""
    drift: float
    """Drift of the common factor, in its standard deviations over one second."""
    mean_s: float
    """Mean stay, seconds."""
    share: float
    """How often this regime follows another."""


REGIMES: Final = (
    Regime("calm", 0.6, 0.8, 0.0, 120.0, 0.55),
    Regime("volatile", 2.2, 1.5, 0.0, 40.0, 0.25),
    Regime("trending", 1.2, 1.2, 0.15, 60.0, 0.20),
)


@dataclass(frozen=True, kw_only=True)
class MarketConfig:
    """One market.

    Attributes:
        kind: ``spot`` or ``usdm``.
        symbols: how many are listed, 1..10,000.
        rate: trades a second over all symbols in the long run (bursts go beyond), 0..2e6.
        seed: same seed, same market.
        step_ms: resolution of generation, a divisor of a minute; a trade reaches the wire at most this late. 40 ms cost 2.5 % of a core at
            2,000 trades a second, 20 ms 4.2 %, and every step wakes all that listen; use 5 or 10 to measure latency.
        excitation: orders that one order triggers, 0..0.95 (the Hawkes branching ratio).
        memory_s: how long a burst lasts, seconds.
        mean_fills: trades an order makes on average, >= 1.
    """

    kind: MarketKind = "spot"
    symbols: int = 300
    rate: float = 2_000.0
    seed: int = 1
    step_ms: int = 40
    excitation: float = 0.6
    memory_s: float = 1.2
    mean_fills: float = 1.6

    def __post_init__(self) -> None:
        """Refuse what cannot be run, naming it."""
        for name, value, low, high in (
            ("rate", self.rate, 0.0, MAX_RATE),
            ("step_ms", self.step_ms, 1, 1_000),
            ("excitation", self.excitation, 0.0, 0.95),
            ("memory_s", self.memory_s, 0.01, 3_600.0),
            ("mean_fills", self.mean_fills, 1.0, 8.0),
        ):
            if not low <= value <= high:
                raise SimulationConfigError(f"{name}={value}: must be within {low:g}..{high:g}")
        if 60_000 % self.step_ms:
            raise SimulationConfigError(f"step_ms={self.step_ms}: must divide a minute, so that no step lies in two candles")
