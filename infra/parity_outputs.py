"""What the worker publishes beside bars (scores, suspects, dead letters): the replay's records in, those the run lacks or has too many out.

These records are sent again after a crash, so they are compared as a set: every record of the replay must stand in its topic, byte for byte,
and every record there that was made from the run's trades must be one of the replay's. Whatever topic a later stage of the worker writes to
is compared in the same way. Pure: no Kafka; memory is 100 bytes a record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final, NamedTuple

from infra.parity_compare import Record
from infra.parity_rows import Difference
from streams.records import OutRecord

COMPARED_ELSEWHERE: Final = ("bars", "bars.rows")
"""Bars are compared row by row, their row twin, which is compacted, series by series (``infra.parity_twins``)."""
MOST_RECORDS: Final = 2_000_000
_MOST_DIFFERENCES: Final = 20


class Origin(NamedTuple):
    """Which trades record an output was made from."""

    partition: int
    input_offset: int


@dataclass(kw_only=True, slots=True)
class OutputFindings:
    """What the comparison of one topic came to."""

    topic: str
    records: int = 0
    """Records the replay made."""
    equal: int = 0
    again: int = 0
    """Records of the run that were sent again with the same bytes."""
    pending: int = 0
    """Records that a killed run may not have sent before its end."""
    explained: Counter[str] = field(default_factory=Counter)
    """Reason -> records."""
    unexplained: int = 0
    differences: list[Difference] = field(default_factory=list)

    def value(self) -> dict[str, Any]:
        """For JSON and the certificate."""
        names = ("topic", "records", "equal", "again", "pending", "unexplained")
        counts: dict[str, Any] = {name: getattr(self, name) for name in names}
        return counts | {"explained": dict(self.explained), "differences": [item.value() for item in self.differences]}

    def differ(self, difference: Difference) -> None:
        """One unexplained thing."""
        self.unexplained += 1
        if len(self.differences) < _MOST_DIFFERENCES:
            self.differences.append(difference)


class Outputs:
    """Collects what a replay makes beside bars, then holds it against the topics."""

    def __init__(self) -> None:
        self._expected: dict[str, dict[bytes, Origin]] = {}
        self._count = 0

    def take(self, input_offset: int, out: OutRecord, partition: int) -> None:
        """One record the replay made from the trades at ``input_offset``."""
        if out.topic not in COMPARED_ELSEWHERE and self._count < MOST_RECORDS:
            self._expected.setdefault(out.topic, {})[_digest(out.value)] = Origin(partition, input_offset)
            self._count += 1

    @property
    def full(self) -> bool:
        """There were more records than are kept: nothing can be said of them."""
        return self._count >= MOST_RECORDS

    def check(
        self,
        topic: str,
        records: Iterable[tuple[int, Record]],
        origin: Callable[[int, bytes], Origin | None],
        covered: Mapping[int, tuple[int, int]],
        *,
        killed: bool,
    ) -> OutputFindings:
        """Compare a topic.

        Args:
            topic: its name.
            records: (partition, record) of it, from the run's start on.
            origin: which trades a record (its partition, its value) was made from, None for one of another writer.
            covered: partition -> trades ``[first, stop)`` of the run whose bars were compared.
            killed: the run ended without notice, so its last records may never have been sent.
        """
        expected = {digest: place for digest, place in self._expected.get(topic, {}).items() if _covers(covered, place)}
        found = OutputFindings(topic=topic, records=len(expected))
        seen: set[bytes] = set()
        for partition, record in records:
            digest = _digest(record.value)
            if digest in expected:
                found.again += digest in seen
                seen.add(digest)
                continue
            place = origin(partition, record.value)
            if place is not None and _covers(covered, place):
                what = f"a record of {topic} ({partition}@{record.offset}) is not in the replay"
                found.differ(Difference(what=what, partition=place.partition, bars_offset=-1, input_offset=place.input_offset))
        found.equal = len(seen)
        for digest, place in expected.items():
            if digest in seen:
                continue
            if killed:
                found.pending += 1
                continue
            what = f"the run published no such record of {topic}"
            found.differ(Difference(what=what, partition=place.partition, bars_offset=-1, input_offset=place.input_offset))
        return found

    def topics(self) -> list[str]:
        """Every topic the replay wrote to, bars left out."""
        return sorted(self._expected)


def _covers(covered: Mapping[int, tuple[int, int]], place: Origin) -> bool:
    first, stop = covered.get(place.partition, (0, 0))
    return first <= place.input_offset < stop


def _digest(value: bytes) -> bytes:
    return blake2b(value, digest_size=16).digest()
