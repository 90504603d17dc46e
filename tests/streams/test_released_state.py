"""What a released worker left behind is taken over: its snapshot restores, and the bars go on as that release would have made them."""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.schema_evolution import released
from processors.bars import BarConfig
from schemas.codec import FrameCodec, RowCodec, frame_dtypes
from streams.bar_shard import BarCodecs, BarShard
from streams.errors import StateError

FOLDER = Path(__file__).resolve().parents[1] / "resources" / "released"
NAMES = ("trades", "bars", "bars_row", "deadletter")
NOW = 100
"""Added to a schema's old id: what today's schema of that name has in these tests."""


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a release left: see the README of the folder."""

    release: str
    partition: int
    config: BarConfig
    ids: dict[str, int]
    trades: list[bytes]
    covered: int
    state: bytes
    sent: list[list[tuple[str, bytes, bytes]]]

    def codecs(self, *, texts: dict[str, str] | None = None) -> BarCodecs:
        """Codecs of today's schemas; with ``texts`` those of a release."""
        known = {old: released()[self.release][name] for name, old in self.ids.items()}

        def codec(kind: Any, name: str) -> Any:
            made = kind(name, self.ids[name] + (NOW if texts is None else 0), None if texts is None else texts[name])
            if texts is None:
                made.add_writer(self.ids[name], known[self.ids[name]])
            return made

        return BarCodecs(
            trades=codec(FrameCodec, "trades"),
            bars=codec(FrameCodec, "bars"),
            rows=codec(RowCodec, "bars_row"),
            deadletter=codec(RowCodec, "deadletter"),
            fetch_schema=known.__getitem__,
        )


@pytest.fixture(params=sorted(path.parent.name for path in FOLDER.glob("*/bar_shard.json.gz")))
def left(request: pytest.FixtureRequest) -> Left:
    """The worker's remains of a release."""
    found = json.loads(gzip.decompress((FOLDER / request.param / "bar_shard.json.gz").read_bytes()))
    return Left(
        release=found["release"],
        partition=found["partition"],
        config=BarConfig(timeframes=tuple(found["timeframes"]), live_interval_us=found["live_interval_us"]),
        ids=found["schema_ids"],
        trades=[base64.b64decode(record) for record in found["trades"]],
        covered=found["covered"],
        state=base64.b64decode(found["state"]),
        sent=[[(topic, *map(base64.b64decode, rest)) for topic, *rest in records] for records in found["sent"]],
    )


def test_the_snapshot_of_a_released_worker_restores_and_its_bars_go_on(left: Left) -> None:
    """Every later bar, row and letter is what that release would have sent, on the fields it had."""
    now, then = left.codecs(), left.codecs(texts=released()[left.release])
    shard = BarShard.restore(left.partition, left.config, now, left.state)
    assert shard.applied_offset == left.covered - 1
    compared = {"bars": 0, "bars.rows": 0, "deadletter": 0}
    for offset, (record, expected) in enumerate(zip(left.trades[left.covered :], left.sent, strict=True), left.covered):
        sent: dict[str, list[Any]] = {name: [] for name in compared}
        for item in shard.process(offset, record):
            sent.setdefault(item.topic, []).append(item)
        for topic in compared:
            wanted = [(key, value) for name, key, value in expected if name == topic]
            assert [item.key or b"" for item in sent[topic]] == [key for key, _ in wanted]
            for item, (_, value) in zip(sent[topic], wanted, strict=True):
                compared[topic] += 1
                if topic == "bars":
                    _same_bars(now.bars.decode(item.value), then.bars.decode(value), left)
                else:
                    codec, old = (now.rows, then.rows) if topic == "bars.rows" else (now.deadletter, then.deadletter)
                    assert codec.decode(item.value).items() >= old.decode(value).items()
    assert min(compared.values()) > 0


def _same_bars(now: Any, then: Any, left: Left) -> None:
    assert (now.source, now.watermark_us, now.input_offset, now.symbols) == (
        then.source,
        then.watermark_us,
        then.input_offset,
        then.symbols,
    )
    for name in frame_dtypes(released()[left.release]["bars"]):
        assert np.array_equal(now.columns[name], then.columns[name], equal_nan=now.columns[name].dtype.kind == "f"), name


def test_a_state_restored_from_a_released_one_is_saved_in_todays_layout_and_restores_again(left: Left) -> None:
    """The first snapshot after an upgrade is one of this release; nothing is lost by writing and reading it."""
    codecs = left.codecs()
    first = BarShard.restore(left.partition, left.config, codecs, left.state)
    second = BarShard.restore(left.partition, left.config, codecs, first.snapshot())
    for offset, record in enumerate(left.trades[left.covered :], left.covered):
        assert second.process(offset, record) == first.process(offset, record)
    assert second.snapshot() == first.snapshot()


def test_a_damaged_snapshot_of_a_released_worker_is_refused(left: Left) -> None:
    """One flipped bit is found by its checksum: the partition is rebuilt, never continued wrongly."""
    codecs = left.codecs()
    for place in (30, len(left.state) // 2, len(left.state) - 1):
        broken = bytearray(left.state)
        broken[place] ^= 1
        with pytest.raises(StateError):
            BarShard.restore(left.partition, left.config, codecs, bytes(broken))
