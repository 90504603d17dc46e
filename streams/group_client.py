"""What the worker changes in aiokafka's client."""

from __future__ import annotations

from typing import Any

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import NodeNotReadyError

_LOOKUP = AIOKafkaClient.coordinator_lookup


async def _coordinator_lookup(client: AIOKafkaClient, kind: int, key: str) -> Any:
    missing = [topic for topic in client._topics if not client.cluster.partitions_for_topic(topic)]
    if missing or client.get_random_node() is None:
        # retriable: aiokafka asks for metadata and comes again
        raise NodeNotReadyError(f"The broker does not list its nodes and partitions yet: {', '.join(missing) or 'no node'}.")
    return await _LOOKUP(client, kind, key)


def wait_for_metadata() -> None:
    """Let a consumer that begins while the broker lists no node and no partition wait for them before it joins its group.

    A broker that came back is fenced until its first heartbeat and lists none, not even itself. aiokafka 0.14 then fails an assertion in the
    task that joins the group, at which nobody looks, and the worker waits for partitions for ever (aio-libs/aiokafka#460); or it joins
    without a partition to share out, and has none until the next refresh of metadata.
    """
    AIOKafkaClient.coordinator_lookup = _coordinator_lookup
