"""`marketstream topics` and `marketstream config show`: what there is and how it is set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra.cli.context import settings_of
from infra.cli.output import Output
from infra.settings import Settings
from schemas.topics import TOPICS, Topic

_MS_PER_HOUR = 3_600_000


def topics(output: Output, *, data_dir: Path | None) -> None:
    """Every topic of the catalogue with its partitions, offsets and bytes on the broker. Raises UnreachableError."""
    settings = settings_of(data_dir)
    rows = [describe(entry, settings, measured) for entry, measured in _measured(settings)]
    if output.as_json:
        output.emit({"topics": rows})
        return
    output.table(
        ("topic", "holds", "partitions", "records", "size", "kept for", "kept at most"),
        [
            (row["name"], row["kind"], row["partitions"], row["records"], _size(row["bytes"]), _kept(row), _bound(row["retention_bytes"]))
            for row in rows
        ],
    )


def describe(entry: Topic, settings: Settings, measured: dict[str, Any]) -> dict[str, Any]:
    """One topic as `--json` gives it."""
    from infra.kafka import partition_count

    return {
        "name": entry.full_name(settings.kafka.topic_prefix),
        "kind": entry.kind,
        "schema": entry.schema or None,
        "key": entry.key or None,
        "partitions": partition_count(settings.kafka, entry),
        "compacted": entry.compacted,
        "retention_ms": -1 if entry.compacted else entry.retention_ms,
        "retention_bytes": entry.retention_bytes,
        **measured,
    }


def _measured(settings: Settings) -> list[tuple[Topic, dict[str, Any]]]:
    from confluent_kafka import Consumer, KafkaException, TopicPartition

    from infra.kafka import consumer_config, partition_count, unreachable

    sizes = _sizes(settings)
    consumer = Consumer(consumer_config(settings.kafka, "topics"))
    try:
        known = consumer.list_topics(timeout=3).topics
        found = []
        for entry in TOPICS.values():
            full = entry.full_name(settings.kafka.topic_prefix)
            offsets = {}
            if full in known:
                for partition in range(min(partition_count(settings.kafka, entry), len(known[full].partitions))):
                    low, high = consumer.get_watermark_offsets(TopicPartition(full, partition), timeout=10, cached=False)
                    offsets[str(partition)] = {"first": low, "next": high}
            records = sum(place["next"] - place["first"] for place in offsets.values())
            found.append((entry, {"exists": full in known, "records": records, "bytes": sizes.get(full), "offsets": offsets}))
        return found
    except KafkaException as exc:
        raise unreachable(settings.kafka, exc) from exc
    finally:
        consumer.close()


def _sizes(settings: Settings) -> dict[str, int]:
    """Bytes on disk by topic where the broker's folder is ours to read; {} for a remote one."""
    totals: dict[str, int] = {}
    for segment in settings.data_dir.glob("kafka/**/*.log"):
        name = segment.parent.name.rpartition("-")[0]
        try:
            totals[name] = totals.get(name, 0) + segment.stat().st_size
        except OSError:  # the broker deletes and compacts segments while we look
            continue
    return totals


def _size(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 1024 / 1024:,.1f} MiB"


def _kept(row: dict[str, Any]) -> str:
    if row["compacted"]:
        return "newest per key"
    hours = row["retention_ms"] / _MS_PER_HOUR
    return "for ever" if hours < 0 else f"{hours / 24:g} days"


def _bound(value: int) -> str:
    return "unbounded" if value < 0 else f"{value / 1024 / 1024:,.0f} MiB a partition"


def config_show(output: Output, *, data_dir: Path | None) -> None:
    """Every setting, its value (secrets masked) and where it came from."""
    settings = settings_of(data_dir)
    if output.as_json:
        output.emit({"settings": [{"key": key, "value": value, "origin": origin} for key, value, origin in settings.shown()]})
        return
    output.table(("setting", "value", "from"), settings.shown())
