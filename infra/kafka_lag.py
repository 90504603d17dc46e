"""How many records a process has not come to yet, asked of the broker itself: positions in, a count out.

Over a connection of its own: a consumer that hangs would tell of its own end, not of the topic's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from infra.kafka import SOON, unreachable
from infra.settings import KafkaSettings
from infra.watchdog import Waiting
from schemas.topics import TOPICS

_TIMEOUT_S: Final = 3.0


class KafkaLag:
    """Asks for the ends of partitions.

    Args:
        settings: broker and prefix.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._admin: AdminClient | None = None
        self._first: dict[tuple[str, int], int] = {}

    def waiting(self, positions: Mapping[tuple[str, int], int | None]) -> Waiting:
        """Records at or after ``positions`` (topic without prefix, partition) -> next offset; says so when the broker is away.

        None: it has not read from there yet; what came since this was asked first waits.
        """
        if not positions:
            return Waiting()
        try:
            ends = self._ends(list(positions))
        except KafkaException as exc:
            self._admin = None  # one that met a broker's return may ask with what it knew of it before, for ever
            return Waiting(blocked={"kafka": str(unreachable(self._settings, exc))})
        count = 0
        for place, end in ends.items():
            position = positions[place]
            if position is None:
                position = self._first.setdefault(place, end)
            else:
                self._first.pop(place, None)
            count += max(end - position, 0)
        return Waiting(count=count)

    def _ends(self, places: list[tuple[str, int]]) -> dict[tuple[str, int], int]:
        if self._admin is None:
            quiet = {"log_level": 0, "error_cb": lambda _error: None, **SOON}
            self._admin = AdminClient({**self._settings.client_config(), **quiet, "log.connection.close": False})
        prefix = self._settings.topic_prefix
        wanted = {TopicPartition(TOPICS[name].full_name(prefix), partition): OffsetSpec.latest() for name, partition in places}
        found: dict[tuple[str, int], int] = {}
        for place, future in self._admin.list_offsets(wanted, request_timeout=_TIMEOUT_S).items():
            try:
                offset = future.result().offset
                if offset < 0:  # a broker that is known and silent: the client reports no error, only no offset
                    raise KafkaException(KafkaError(KafkaError._TIMED_OUT))  # noqa: SLF001 - its public name
                found[(place.topic.removeprefix(prefix), place.partition)] = offset
            except KafkaException as exc:
                if exc.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                    continue  # being made or gone: nothing waits there
                raise
        return found
