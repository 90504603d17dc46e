"""How far each stage has come: lag per stage, and waiting until what was published is stored.

Worker: the ``input_offset`` of the newest record in each ``bars`` partition (it writes one frame for every frame it reads).
Sink: what its consumer group has committed (it commits only what ClickHouse has acknowledged).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from infra.errors import MarketstreamError
from infra.kafka import committed_offsets, end_offsets
from infra.newest_bars import newest_worker_bars
from infra.registry_client import RegistryClient
from infra.seam import SYSTEM
from infra.settings import Settings

SINK_GROUP = "marketstream-sink"
"""Consumer group whose committed offsets say what ClickHouse holds."""


class NotStoredError(MarketstreamError):
    """What was published was not stored in time; it is safe in Kafka."""


def worker_offsets(settings: Settings) -> dict[int, tuple[int, int]]:
    """Per partition: (offset of the newest trades record turned into bars, offset after the newest bars record); (-1, 0) for none."""
    found: dict[int, tuple[int, int]] = {}
    with RegistryClient.from_settings(settings) as registry:
        codec = registry.frame_codec("bars")
        for partition in range(settings.kafka.partitions):
            newest = newest_worker_bars(settings.kafka, registry, codec, partition)
            if newest is None:
                found[partition] = (-1, 0)
                continue
            # Both from the one record: an end asked for earlier would belong to an older input offset, and a waiting replay would
            # return before its last bars are stored (tests/integration/test_chaos.py found it).
            found[partition] = (newest.input_offset, newest.offset + 1)
    return found


def lag(settings: Settings) -> dict[str, int]:
    """Records each stage still has to process: ``worker`` (trades), ``sink.trades``, ``sink.bars``."""
    ends = end_offsets(settings.kafka, ["trades", "bars"])
    stored = committed_offsets(settings.kafka, SINK_GROUP, ["trades", "bars"])
    worker = worker_offsets(settings)
    answer = {"worker": sum(max(end - worker[partition][0] - 1, 0) for partition, end in ends["trades"].items())}
    for name in ("trades", "bars"):
        answer[f"sink.{name}"] = sum(max(end - max(stored[name][partition], 0), 0) for partition, end in ends[name].items())
    return answer


async def wait_stored(
    settings: Settings,
    published: Mapping[str, Mapping[int, int]],
    *,
    deadline_s: float = 600.0,
    on_lag: Callable[[dict[str, int]], None] | None = None,
) -> None:
    """Return when the worker has made bars of every published trades offset and the sink has stored trades and bars.

    Args:
        published: last published offset per topic and partition, as ``FrameProducer.flush`` returns it.
        deadline_s: raises NotStoredError after that long without an end, saying which stage is behind.
        on_lag: called with what is missing per stage, about four times a second.
    """
    trades = dict(published.get("trades", {}))
    until = SYSTEM.monotonic_s() + deadline_s
    while True:
        missing = await asyncio.to_thread(_missing, settings, trades)
        if on_lag is not None:
            on_lag(missing)
        if not any(missing.values()):
            return
        if SYSTEM.monotonic_s() > until:
            behind = ", ".join(f"{stage}: {count} records" for stage, count in missing.items() if count)
            raise NotStoredError(
                f"After {deadline_s:.0f} s not everything is stored ({behind}); it is safe in Kafka: see `marketstream status`."
            )
        await SYSTEM.sleep(0.25)


def _missing(settings: Settings, trades: Mapping[int, int]) -> dict[str, int]:
    worker = worker_offsets(settings)
    behind = sum(max(offset - worker[partition][0], 0) for partition, offset in trades.items())
    stored = committed_offsets(settings.kafka, SINK_GROUP, ["trades", "bars"])
    return {
        "worker": behind,
        "sink.trades": sum(max(offset + 1 - stored["trades"][partition], 0) for partition, offset in trades.items()),
        # while the worker is behind, more bars are to come than the topic holds now
        "sink.bars": behind + sum(max(worker[partition][1] - stored["bars"][partition], 0) for partition in trades),
    }
