"""Until what was published is stored: the repair compares nothing that is still on its way. Topics in, '' or one sentence why not, out."""

from __future__ import annotations

import asyncio
from typing import Final

from infra.kafka import committed_offsets, end_offsets
from infra.newest_bars import newest_worker_bars
from infra.progress import SINK_GROUP
from infra.registry_client import RegistryClient
from infra.settings import KafkaSettings
from schemas.seam import Clock
from schemas.topics import TOPICS

_TOPICS: Final = ("trades", "bars", "gaps", "quarantine")
_PATIENCE_S: Final = 10.0
_POLL_S: Final = 0.1
_FRESH_US: Final = 10_000_000
"""What was settled longer ago is asked anew: bars that closed since are to be compared too."""
_US: Final = 1_000_000


class Settler:
    """Waits for worker and sink, partition by partition.

    Args:
        kafka: where the broker is.
        registry: of the stack.
        clock: time and sleep.
    """

    def __init__(self, kafka: KafkaSettings, registry: RegistryClient, clock: Clock) -> None:
        self._kafka = kafka
        self._registry = registry
        self._clock = clock
        self._settled_us: dict[int, int] = {}  # partition -> everything published before this is stored

    def covers(self, partition: int, since_us: int) -> bool:
        """Whether an earlier wait covers all that was published before ``since_us``.

        After an outage a thousand symbols ask at once, and a wait asks the broker four times.
        """
        return self._settled_us.get(partition, 0) >= max(since_us, self._clock.now_us() - _FRESH_US)

    async def settle(self, partition: int) -> str:
        """Wait until all that is in the partition now has its bars and is stored; one sentence when that takes too long, else ''.

        Raises UnreachableError.
        """
        asked_us = self._clock.now_us()
        until_us = self._clock.monotonic_us() + round(_PATIENCE_S * _US)
        end = (await asyncio.to_thread(end_offsets, self._kafka, ["trades"]))["trades"][partition]
        behind = await self._worker(partition, end, until_us)
        if not behind:
            behind = await self._sink(partition, until_us)
        if not behind:
            self._settled_us[partition] = asked_us
        return behind

    async def _worker(self, partition: int, end: int, until_us: int) -> str:
        codec = self._registry.frame_codec("bars")
        while True:
            newest = await asyncio.to_thread(newest_worker_bars, self._kafka, self._registry, codec, partition)
            lacking = end - 1 - (-1 if newest is None else newest.input_offset)
            if lacking <= 0:
                return ""
            if self._clock.monotonic_us() >= until_us:
                return f"The worker is {lacking:,} records behind: what it has not seen cannot be compared."
            await self._clock.sleep(_POLL_S)

    async def _sink(self, partition: int, until_us: int) -> str:
        places = {name: partition if TOPICS[name].per_partition else 0 for name in _TOPICS}
        ends = await asyncio.to_thread(end_offsets, self._kafka, _TOPICS)
        while True:
            stored = await asyncio.to_thread(committed_offsets, self._kafka, SINK_GROUP, _TOPICS)
            lacking = sum(max(ends[name][place] - max(stored[name][place], 0), 0) for name, place in places.items())
            if not lacking:
                return ""
            if self._clock.monotonic_us() >= until_us:
                return f"The sink is {lacking:,} records behind: what is not stored cannot be compared."
            await self._clock.sleep(_POLL_S)
