"""What the repair publishes: bars that differ in, frames of ``bars`` and records of ``bars.rows`` out, acknowledged when it returns."""

from __future__ import annotations

from typing import Final

import numpy as np

from infra.kafka import FrameProducer
from infra.registry_client import RegistryClient
from infra.repair_run import Columns, Outcome
from schemas.frames import Frame
from streams.row_twin import RowTwin

SOURCE: Final = "repair"
"""Source of its frames; they have no input offset."""
_FRAME_ROWS: Final = 4_096


class BarPublisher:
    """Sends bars of the past.

    Args:
        producer: of this process.
        registry: of the stack.
    """

    def __init__(self, producer: FrameProducer, registry: RegistryClient) -> None:
        self._producer = producer
        self._twin = RowTwin(registry.row_codec("bars.rows"))

    async def publish(self, key: str, partition: int, outcome: Outcome) -> None:
        """Send the rows of ``outcome`` and wait for the acknowledgement. Raises UnreachableError.

        The twin goes first and is acknowledged first: who is killed in between finds that ``bars`` still differs, and sends both again. The
        other way round nothing would differ any more, and the twin's last word on a series would stay an old bar.
        """
        frames = []
        for start in range(0, len(outcome.rows["open"]), _FRAME_ROWS):
            columns = {name: column[start : start + _FRAME_ROWS] for name, column in outcome.rows.items()}
            columns = {"symbol_code": np.zeros(len(columns["open"]), np.int32), **columns}
            frames.append(Frame(source=SOURCE, watermark_us=0, symbols=(key,), columns=columns))
            await self._rows(key, partition, -1, columns)
        for newest in outcome.newest:  # the twin is compacted: the last row of a key is to be its newest bar
            columns = {"symbol_code": np.zeros(1, np.int32), **newest}
            await self._rows(key, partition, int(newest["input_offset"][0]), columns)
        await self._producer.flush()
        for frame in frames:
            await self._producer.send("bars", partition, frame)
        await self._producer.flush()

    async def _rows(self, key: str, partition: int, offset: int, columns: Columns) -> None:
        for record in self._twin.records(partition, offset, (key,), columns):
            await self._producer.send_raw(record.topic, record.partition, record.key, record.value)
