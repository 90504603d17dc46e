"""The row twin of ``bars``: final bars of a frame in, one plain Avro record each (``bars.rows``) out, the same bytes ``RowCodec`` would write."""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from processors.avro_rows import BOOLEAN, DOUBLE, LONG, encode_rows
from schemas.codec import RowCodec
from schemas.timeframes import NAME_BY_SECONDS
from streams.records import OutRecord

TOPIC: Final = "bars.rows"
_KINDS: Final = {"long": LONG, "int": LONG, "double": DOUBLE, "boolean": BOOLEAN}
_MAX_SERIES: Final = 262_144
"""Series whose key and leading bytes are remembered: 16,384 symbols of eight timeframes are half of it."""


class RowTwin:
    """Writes the twin of one partition.

    Args:
        codec: of ``bars.rows``; its schema begins with exchange, symbol and timeframe and goes on with numbers only.

    Raises:
        ValueError: the schema has another form.
    """

    def __init__(self, codec: RowCodec) -> None:
        fields = json.loads(codec.text)["fields"]
        lead, rest = fields[:3], fields[3:]
        if [entry["name"] for entry in lead] != ["exchange", "symbol", "timeframe"] or any(entry["type"] not in _KINDS for entry in rest):
            raise ValueError(
                f"Schema '{codec.name}' does not begin with exchange, symbol and timeframe, or holds more than numbers after them."
            )
        self._header = codec.schema_id.to_bytes(5, "big")  # 0x00 and the id
        self._names = tuple(entry["name"] for entry in rest)
        self._plan = np.array([_KINDS[entry["type"]] for entry in rest], np.int8)
        self._series: dict[tuple[str, int], tuple[bytes, bytes]] = {}

    def records(self, partition: int, offset: int, symbols: tuple[str, ...], bars: dict[str, npt.NDArray[Any]]) -> list[OutRecord]:
        """One record for each final bar, in the order of the rows."""
        final = np.flatnonzero(bars["is_final"])
        if not len(final):
            return []
        codes, lengths = bars["symbol_code"][final].tolist(), bars["timeframe_s"][final].tolist()
        series = [self._of(symbols[code], seconds) for code, seconds in zip(codes, lengths, strict=True)]
        inputs = np.full(len(final), offset, np.int64)
        none = np.zeros(len(final), np.int64)  # what these bars do not know, e.g. held_count
        columns = [inputs if name == "input_offset" else bars[name][final] if name in bars else none for name in self._names]
        values = encode_rows([head for _, head in series], self._plan, columns)
        return [OutRecord(TOPIC, partition, key, value) for (key, _), value in zip(series, values, strict=True)]

    def _of(self, key: str, seconds: int) -> tuple[bytes, bytes]:
        """(Kafka key, leading bytes) of a series."""
        found = self._series.get((key, seconds))
        if found is None:
            if len(self._series) >= _MAX_SERIES:
                self._series.clear()
            timeframe = NAME_BY_SECONDS[seconds]
            exchange, _, symbol = key.partition(":")
            head = self._header + b"".join(_text(word) for word in (exchange, symbol, timeframe))
            found = self._series[(key, seconds)] = (f"{key}:{timeframe}".encode(), head)
        return found


def _text(word: str) -> bytes:
    """Avro's string: zigzag length, then UTF-8."""
    data = word.encode()
    rest, out = len(data) << 1, bytearray()
    while rest > 127:
        out.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*out, rest]) + data
