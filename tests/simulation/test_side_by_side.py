"""Worlds that run side by side are those that run one after the other, in the same order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from infra.simulation.scenario import Scenario
from infra.simulation.side_by_side import AHEAD, side_by_side
from infra.simulation.world import simulate


def digest(seed: int) -> str:
    """Of the plain world of a seed."""
    if seed < 0:
        raise ValueError(f"no world {seed}")
    return simulate(Scenario.plain(seed)).digest


def test_worlds_side_by_side_are_those_one_after_the_other() -> None:
    """Every call once, in order; calls are drawn only so far ahead, so that a sweep that has seen enough ends there."""
    drawn: list[int] = []

    def calls() -> Iterator[int]:
        for seed in range(5, 100):
            drawn.append(seed)
            yield seed

    found = []
    for seed, made in side_by_side(digest, calls()):
        found.append((seed, made))
        assert len(drawn) <= len(found) + AHEAD
        if len(found) == 3:
            break
    assert found == [(seed, digest(seed)) for seed in (5, 6, 7)]


def test_what_a_world_raises_is_raised_in_its_turn() -> None:
    """After the results before it."""
    found = []
    with pytest.raises(ValueError, match="no world -1"):
        for _, made in side_by_side(digest, (5, -1, 6)):
            found.append(made)
    assert len(found) == 1
