"""Medians and spreads of interleaved rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median


def summary(rounds: Mapping[str, Sequence[float]], unit: str) -> dict[str, dict[str, float | str]]:
    """Per name: median, least and greatest of its rounds, with the unit."""
    return {
        name: {
            "median": round(median(values), 4),
            "min": round(min(values), 4),
            "max": round(max(values), 4),
            "rounds": len(values),
            "unit": unit,
        }
        for name, values in rounds.items()
        if values
    }


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the per-round ratios: both were measured in the same round, so a slow machine slows both."""
    return round(median(a / b for a, b in zip(over, under, strict=True)), 3)
