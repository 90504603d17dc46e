"""What is listed: names, price levels, tick and lot sizes, volatility and share of activity of every symbol.

Comes in: how many symbols, a seed, spot or USD-M. Goes out: a frozen :class:`Universe` of parallel arrays, the same for the same
arguments. The first symbols are well known pairs near the prices they traded at in August 2024 (the recorded captures' month); the rest
are invented five-letter coins with log-normal prices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from collectors.simulated.errors import SimulationConfigError

MarketKind = Literal["spot", "usdm"]
"""``spot`` speaks ``/api/v3``; ``usdm`` speaks ``/fapi/v1``."""

MAX_SYMBOLS: Final = 10_000
"""Symbol codes are kept as int16 in the history; Binance itself lists about 3,500 spot pairs."""

WELL_KNOWN: Final[tuple[tuple[str, float], ...]] = (
    ("BTC", 60000.0), ("ETH", 2600.0), ("SOL", 150.0), ("BNB", 520.0), ("XRP", 0.58), ("DOGE", 0.105), ("PEPE", 0.0000085),
    ("ADA", 0.34), ("AVAX", 22.0), ("LINK", 10.4), ("TRX", 0.128), ("SUI", 0.92), ("WIF", 1.75), ("NEAR", 4.1), ("LTC", 61.0),
    ("DOT", 4.6), ("FET", 0.86), ("UNI", 6.0), ("APT", 6.1), ("SHIB", 0.0000142), ("BONK", 0.0000199), ("FLOKI", 0.000128),
    ("ATOM", 4.7), ("ETC", 18.8), ("FIL", 3.7), ("ARB", 0.55), ("OP", 1.42), ("INJ", 17.9), ("TIA", 5.5), ("SEI", 0.29),
    ("AAVE", 103.0), ("STX", 1.47), ("RUNE", 3.9), ("GALA", 0.0187), ("HBAR", 0.055), ("XLM", 0.098), ("ALGO", 0.127),
    ("MKR", 2050.0), ("GRT", 0.151), ("SAND", 0.26), ("MANA", 0.272), ("AXS", 4.75), ("EOS", 0.485), ("XTZ", 0.68), ("THETA", 1.22),
    ("CRV", 0.29), ("DYDX", 0.98), ("LDO", 1.03), ("ENS", 17.6), ("JUP", 0.84), ("PYTH", 0.29), ("ORDI", 30.1), ("WLD", 1.68),
    ("JTO", 2.2), ("BLUR", 0.163), ("CHZ", 0.058), ("COMP", 43.0), ("SNX", 1.35), ("ZEC", 36.5), ("DASH", 22.9), ("KSM", 18.4),
    ("VET", 0.0214), ("IOTA", 0.122), ("NEO", 9.2), ("QTUM", 2.25), ("ONT", 0.187), ("ZIL", 0.0142), ("BAT", 0.163), ("ENJ", 0.139),
)  # fmt: skip
"""Base asset and its level in USDT."""

_FIRST_TRADE_ID: Final = {"spot": 1_000_000, "usdm": 100_000_000}


@dataclass(frozen=True, kw_only=True)
class Universe:
    """Parallel arrays over symbols; index = symbol code.

    Attributes:
        kind: ``spot`` or ``usdm``.
        symbols: exchange names, ``BTCUSDT``.
        bases: base assets; the quote asset is USDT for all.
        price0: starting mid price, float64, quote units.
        price_decimals: a price is an integer count of ``10**-price_decimals``, int64.
        size_decimals: a size is an integer count of ``10**-size_decimals`` (one lot), int64.
        tick_units: tick size as a count of ``10**-price_decimals``, int64.
        volatility: standard deviation of the log price over one second, float64.
        beta: exposure to the common market factor, float64.
        weight: share of all activity, float64, sums to 1.
        typical_notional: median trade in quote units, float64.
        first_trade_id: the id of the first trade, int64.
    """

    kind: MarketKind
    symbols: tuple[str, ...]
    bases: tuple[str, ...]
    price0: npt.NDArray[np.float64]
    price_decimals: npt.NDArray[np.int64]
    size_decimals: npt.NDArray[np.int64]
    tick_units: npt.NDArray[np.int64]
    volatility: npt.NDArray[np.float64]
    beta: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64]
    typical_notional: npt.NDArray[np.float64]
    first_trade_id: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.symbols)


def build_universe(*, kind: MarketKind, symbols: int, seed: int) -> Universe:
    """The listing of ``symbols`` pairs for ``seed``; a longer listing begins with the shorter one.

    Raises:
        SimulationConfigError: ``symbols`` is not within 1..10,000.
    """
    if not 1 <= symbols <= MAX_SYMBOLS:
        raise SimulationConfigError(f"symbols={symbols}: the simulated exchange lists 1 to {MAX_SYMBOLS} symbols")
    # Drawn for the largest listing and cut, so that symbol k is the same coin whatever the number listed.
    rng = np.random.Generator(np.random.PCG64([seed, 1]))
    levels = np.exp(rng.normal(-0.7, 2.2, MAX_SYMBOLS))
    jitter = rng.normal(0.0, 1.0, (3, MAX_SYMBOLS))
    first_id = rng.integers(0, 50_000_000, MAX_SYMBOLS)

    bases = _base_names(symbols)
    known = min(symbols, len(WELL_KNOWN))
    price0 = np.clip(levels[:symbols], 0.00005, 5_000.0)
    price0[:known] = [price for _, price in WELL_KNOWN[:known]]
    magnitude = np.floor(np.log10(price0)).astype(np.int64)
    price_decimals = np.clip(3 - magnitude, 2, 8)
    rank = np.arange(1, symbols + 1)
    if kind == "spot":
        size_decimals = np.clip(1 + magnitude, 0, 5)
        tick_units = np.ones(symbols, dtype=np.int64)
    else:
        size_decimals = np.clip(magnitude - 1, 0, 3)
        # BTCUSDT perpetual: two decimals on the wire, but a tick of 0.10 (recorded exchangeInfo).
        tick_units = np.where(price0 >= 10_000, 10, 1).astype(np.int64)
    weight = 1.0 / (rank + 2.0) ** 1.15
    return Universe(
        kind=kind,
        symbols=tuple(base + "USDT" for base in bases),
        bases=bases,
        price0=price0,
        price_decimals=price_decimals,
        size_decimals=size_decimals,
        tick_units=tick_units,
        # 60 % a year for the leaders (1.07e-4 a second), rising to about 150 % for small coins.
        volatility=1.07e-4 * np.exp(0.9 * (1.0 - np.exp(-rank / 60.0)) + 0.15 * jitter[0, :symbols]),
        beta=np.clip(0.85 + 0.15 * jitter[1, :symbols], 0.3, 1.3),
        weight=weight / weight.sum(),
        typical_notional=300.0 * np.exp(-0.4 * np.log(rank) * 0.5 + 0.3 * jitter[2, :symbols]),
        first_trade_id=_FIRST_TRADE_ID[kind] + first_id[:symbols],
    )


def _base_names(count: int) -> tuple[str, ...]:
    """``count`` distinct base assets: the well known ones, then pronounceable invented ones in a fixed order."""
    names = [name for name, _ in WELL_KNOWN[:count]]
    consonants, vowels = "BCDFGKLMNPRSTVZ", "AEIOU"
    known = set(names)
    index = 0
    while len(names) < count:
        # A stride coprime to the 15*5*15*5*15 combinations visits each once, in an order that does not look alphabetical.
        value = (index * 34_567 + 4_321) % 84_375
        index += 1
        letters = []
        for alphabet in (consonants, vowels, consonants, vowels, consonants):
            value, digit = divmod(value, len(alphabet))
            letters.append(alphabet[digit])
        name = "".join(letters)
        if name not in known:
            known.add(name)
            names.append(name)
    return tuple(names)
