"""Kafka records of any topic to rows of plain values and back to text: what `tail` shows and `--where` compares."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

from infra.cli.where import Kind
from infra.registry_client import RegistryClient
from schemas.codec import FrameCodec, RowCodec, decode_learning, frame_dtypes, schema_text
from schemas.errors import UnknownSchemaError
from schemas.frames import Frame
from schemas.symbols import SIDE_NAMES, parse_key
from schemas.timeframes import NAME_BY_SECONDS, format_time_us
from schemas.topics import Topic

Row = dict[str, Any]
POSITION: dict[str, Kind] = {"partition": "number", "offset": "number"}


def columns_of(entry: Topic) -> dict[str, Kind]:
    """Columns of a topic's rows with what they hold, in the order they are shown."""
    if entry.kind == "raw":
        return {"key": "text", "bytes": "number", **POSITION}
    text = schema_text(entry.schema)
    if entry.kind == "frame":
        found: dict[str, Kind] = {"exchange": "text", "symbol": "text"}
        for name in frame_dtypes(text):
            if name == "timeframe_s":
                found["timeframe"] = "text"
            elif name == "side":
                found["side"] = "text"
            elif name != "symbol_code":
                found[name] = "time" if name.endswith("_time_us") else "number"
        return found | POSITION
    return {field["name"]: _kind(field["name"], field["type"]) for field in json.loads(text)["fields"]} | POSITION


def _kind(name: str, avro: Any) -> Kind:
    kinds = avro if isinstance(avro, list) else [avro]
    if any(kind in ("string", "bytes") for kind in kinds):
        return "text"
    return "time" if name.endswith("time_us") else "number"


def rows_of_frame(frame: Frame, partition: int, offset: int) -> Iterator[Row]:
    """The rows of a frame, oldest first, with exchange, symbol, side and timeframe as words."""
    pairs = [parse_key(key) for key in frame.symbols]
    columns = {name: column.tolist() for name, column in frame.columns.items()}
    codes = columns.pop("symbol_code", [])
    for index, code in enumerate(codes):
        row: Row = {"exchange": pairs[code].exchange, "symbol": pairs[code].symbol}
        for name, values in columns.items():
            if name == "timeframe_s":
                row["timeframe"] = NAME_BY_SECONDS.get(values[index], f"{values[index]}s")
            elif name == "side":
                row["side"] = SIDE_NAMES.get(values[index], str(values[index]))
            else:
                row[name] = values[index]
        row["partition"], row["offset"] = partition, offset
        yield row


def reader(entry: Topic, registry: RegistryClient) -> Callable[[bytes | None, bytes, int, int], list[Row]]:
    """A function ``(key, value, partition, offset) -> rows`` for one topic. It raises DecodeError for bytes that are none of ours."""
    if entry.kind == "raw":
        return lambda key, value, partition, offset: [
            {"key": (key or b"").decode("utf-8", "replace"), "bytes": len(value), "partition": partition, "offset": offset}
        ]
    if entry.kind == "frame":
        frames = registry.frame_codec(entry.name)
        return lambda key, value, partition, offset: _frame_rows(frames, registry, value, partition, offset)
    records = registry.row_codec(entry.name)
    return lambda key, value, partition, offset: [
        {**{name: _plain(item) for name, item in _record(records, registry, value).items()}, "partition": partition, "offset": offset}
    ]


def _frame_rows(codec: FrameCodec, registry: RegistryClient, value: bytes, partition: int, offset: int) -> list[Row]:
    return list(rows_of_frame(decode_learning(codec, value, registry.schema), partition, offset))


def _record(codec: RowCodec, registry: RegistryClient, value: bytes) -> Row:
    try:
        return codec.decode(value)
    except UnknownSchemaError as unknown:
        codec.add_writer(unknown.schema_id, registry.schema(unknown.schema_id))
        return codec.decode(value)


def _plain(value: Any) -> Any:
    """Bytes as text where they are text, as base64 where they are not."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return "base64:" + base64.b64encode(value).decode("ascii")


def shown(name: str, value: Any, kind: Kind) -> str:
    """A cell as a person reads it: times in ISO 8601, numbers without trailing zeros."""
    if value is None:
        return ""
    if kind == "time" and isinstance(value, int):
        return format_time_us(value)
    if isinstance(value, float):
        return f"{value:.10f}".rstrip("0").rstrip(".")
    return str(value)
