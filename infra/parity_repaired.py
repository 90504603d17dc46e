"""What the repair published beside the bars of the trades stored: both as columns in; the bars that differ, and in which columns, out. Pure.

The bars are made anew by the kernel and judged by the rules the repair itself has (``processors.reconcile``), from the trades alone: what was
published decides nothing, but that a bar which was complete before stays so until something is known to be missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from infra.parity_rows import Difference
from processors.reconcile import STORED, VALUES, Evidence, completeness, held_counts, places

Array = npt.NDArray[Any]
Columns = dict[str, Array]

JUDGED: Final = ("complete", "held_count")
"""Columns that follow from what was known of the trades; all others compared follow from the trades alone."""
REPAIRED: Final = (*STORED, "was_complete", "input_offset", "kafka_offset", "known_at_us")
"""Columns of what was published: the newest revision of each bar and, of the one before, ``complete`` (0: there was none)."""
NOT_RETAINED: Final = "not retained: ClickHouse no longer holds the trades of the bar"
TAKEN_AWAY: Final = "stands as it was: every trade up to it is held back now"
KNOWN_LATER: Final = "complete or held_count as it was known then: what was learned later asks for no repair"
_COMPARED: Final = ("open_time_us", *VALUES)


class Wrong(NamedTuple):
    """A bar that is not the bar of its trades."""

    row: int
    """Of what was published."""
    columns: dict[str, tuple[Any, Any]]
    """Column -> (as published, as the trades have it); none where the trades make no such bar."""

    @property
    def in_values(self) -> bool:
        """Not just in what was known of the trades."""
        return not self.columns or not self.columns.keys() <= set(JUDGED)


@dataclass(kw_only=True, slots=True)
class RepairedFindings:
    """What the comparison of repaired bars with their trades came to."""

    bars: int = 0
    """Bars of which the run's repair published a row, each in its newest revision."""
    equal: int = 0
    explained: Counter[str] = field(default_factory=Counter)
    """Reason -> bars that cannot be compared, or need not be equal."""
    pending: int = 0
    """Rows the sink has not stored yet, and bars that a job is yet to make anew: they are those of the trades of then."""
    unexplained: int = 0
    differences: list[Difference] = field(default_factory=list)

    def value(self) -> dict[str, Any]:
        """For JSON and the certificate."""
        names = ("bars", "equal", "pending", "unexplained")
        counts: dict[str, Any] = {name: getattr(self, name) for name in names}
        return counts | {"explained": dict(self.explained), "differences": [item.value() for item in self.differences]}


def total(parts: Iterable[RepairedFindings], most_differences: int) -> RepairedFindings:
    """All of them as one."""
    found = RepairedFindings()
    for part in parts:
        found.bars += part.bars
        found.equal += part.equal
        found.explained.update(part.explained)
        found.pending += part.pending
        found.unexplained += part.unexplained
        found.differences += part.differences[: most_differences - len(found.differences)]
    return found


def compare_repaired(published: Mapping[str, Array], made: Mapping[str, Array], evidence: Evidence) -> list[Wrong]:
    """The bars of ``published`` that are not those of the trades, in order.

    Args:
        published: columns ``REPAIRED``, a row a bar. Where the worker has the last word (``input_offset`` >= 0) the values are compared alone:
            of its own rows the replay tells.
        made: from ``processors.reconcile.rebuild``; may hold more bars.
        evidence: what is missing of the trades, what vouches for them and which are held back.
    """
    spot = places(made, dict(published))
    known = np.flatnonzero(spot >= 0)
    bars = {name: column[spot[known]] for name, column in made.items()}
    sound, vouched = completeness(bars, evidence)
    bars["complete"] = (sound & (vouched | (published["was_complete"][known] == 1))).astype(np.int8)
    bars["held_count"] = held_counts(bars, evidence.held_us)
    repaired = published["input_offset"][known] < 0
    unequal = {name: published[name][known] != bars[name] for name in _COMPARED}
    unequal |= {name: (published[name][known] != bars[name]) & repaired for name in JUDGED}
    found = [Wrong(row, {}) for row in np.flatnonzero(spot < 0).tolist()]
    for place in np.flatnonzero(np.logical_or.reduce(list(unequal.values()))).tolist():
        row = int(known[place])
        columns = {name: (published[name][row].item(), bars[name][place].item()) for name, where in unequal.items() if where[place]}
        found.append(Wrong(row, columns))
    return sorted(found, key=lambda wrong: wrong.row)


def newest_of(rows: Mapping[str, Array]) -> Columns:
    """``REPAIRED`` columns of rows in order of (bar, newest first), two of a bar at most."""
    keys = rows["timeframe_s"].astype(np.int64), rows["open_time_us"]
    begins = np.ones(len(keys[0]), np.bool_)
    begins[1:] = (keys[0][1:] != keys[0][:-1]) | (keys[1][1:] != keys[1][:-1])
    first = np.flatnonzero(begins)
    before = np.minimum(first + 1, max(len(begins) - 1, 0))
    found: Columns = {name: column[first] for name, column in rows.items()}
    found["was_complete"] = np.where(begins[before], 0, rows["complete"][before]).astype(np.int8)
    return found


def only(published: Mapping[str, Array], keep: Iterable[int]) -> Columns:
    """Only these rows."""
    rows = np.array(list(keep), np.int64)
    return {name: column[rows] for name, column in published.items()}
