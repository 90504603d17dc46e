"""Asking for topics and making them on a broker that may just have come back.

A broker that was paused, or late on a loaded machine, is fenced until its next heartbeat. Its controller knows no broker meanwhile: lists
of topics come without one, and no topic can be made. That is over in a quarter of a second, so it is asked again for ten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic, TopicMetadata

from infra.seam import SYSTEM

_PATIENCE_S: Final = 10.0
_PAUSE_S: Final = 0.1
_TRY_S: Final = 2.0


def listed(admin: AdminClient, timeout_s: float) -> dict[str, TopicMetadata]:
    """Topics by name. Raises KafkaException."""
    until = SYSTEM.monotonic_s() + _PATIENCE_S
    while True:
        try:
            return dict(admin.list_topics(timeout=timeout_s).topics)
        except KafkaException as exc:
            if exc.args[0].code() != KafkaError._PARTIAL or SYSTEM.monotonic_s() > until:  # noqa: SLF001 - its public name
                raise
        SYSTEM.pause(_PAUSE_S)


def create(client: Mapping[str, Any], topics: Sequence[NewTopic]) -> dict[str, KafkaException | None]:
    """Create topics that are not there; by name, None or why the broker refuses. ``client``: librdkafka settings."""
    refused: dict[str, KafkaException | None] = {}
    until = SYSTEM.monotonic_s() + _PATIENCE_S
    waiting = list(topics)
    while True:
        admin = AdminClient(dict(client))  # a new one: librdkafka that has heard of no controller does not ask again for minutes
        for name, future in admin.create_topics(waiting, operation_timeout=_PATIENCE_S, request_timeout=_TRY_S).items():
            try:
                future.result()
                refused[name] = None
            except KafkaException as exc:
                refused[name] = None if exc.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS else exc
        waiting = [topic for topic in waiting if _is_over_soon(refused[topic.topic])]
        if not waiting or SYSTEM.monotonic_s() > until:
            return refused
        SYSTEM.pause(_PAUSE_S)


def _is_over_soon(refusal: KafkaException | None) -> bool:
    if refusal is None:
        return False
    error = refusal.args[0]
    if error.code() == KafkaError._TIMED_OUT:  # noqa: SLF001 - its public name
        return True
    # the code alone also says that there are fewer brokers than copies wanted, which waiting does not change
    return bool(error.code() == KafkaError.INVALID_REPLICATION_FACTOR and "fenced" in error.str())
