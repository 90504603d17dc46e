"""What people decide on suspect trades: release them into the bars or discard them. Trades and a decision in, rows of ``quarantine`` out.

The rows say source ``person`` and no input offset; the repair reads them and makes the bars of those trades anew.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from api.errors import StoreUnavailableError
from api.quality import STATES, Quality, SuspectFilter
from infra.api_stores import ClickHouseHistory
from infra.errors import SettingsError, UnreachableError
from infra.kafka import FrameProducer
from infra.registry_client import RegistryClient
from infra.settings import Settings
from processors.quality import CONFIRMED, DISCARDED, RELEASED, Suspect
from schemas.partitions import partition_of
from streams.quality_records import suspects_frame

SOURCE: Final = "person"
"""``source`` of frames of ``quarantine`` that a person's decision made."""
MOST_AT_ONCE: Final = 10_000
"""Trades one command decides on; each makes bars anew."""
_POINTLESS: Final = {RELEASED: (CONFIRMED, RELEASED), DISCARDED: (DISCARDED,)}
"""States in which a decision changes nothing: the trade is in the bars already, or out of them for good."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decided:
    """What became of one trade."""

    exchange: str
    symbol: str
    trade_id: int
    before: str
    state: str
    """One of ``api.quality.STATES``; as before where the decision changes nothing."""


class Desk:
    """Suspects of a stack and what is decided on them. Made by :func:`desk`."""

    def __init__(self, settings: Settings, quality: Quality) -> None:
        self.quality = quality
        self._settings = settings

    async def wanted(self, asked: SuspectFilter) -> list[dict[str, Any]]:
        """Suspects of a filter. Raises SettingsError for a trade id that was never held, and for more than ``MOST_AT_ONCE`` trades."""
        found = await self.quality.suspects(asked, limit=MOST_AT_ONCE + 1)
        if len(found) > MOST_AT_ONCE:
            raise SettingsError(f"These are more than {MOST_AT_ONCE:,} suspects: narrow them by --exchange, --symbol or --reason.")
        missing = set(asked.trade_ids) - {row["trade_id"] for row in found}
        if missing:
            place = ":".join(part for part in (asked.exchange, asked.symbol) if part)
            where = f" of {place}" if place else ""
            raise SettingsError(f"Trade {min(missing)}{where} was never held: `marketstream quarantine list` shows the suspects there are.")
        return found

    async def decide(self, suspects: Sequence[dict[str, Any]], state: int) -> list[Decided]:
        """Give suspects (rows of ``Quality.suspects``) state RELEASED or DISCARDED; returns when the broker holds it. Raises UnreachableError."""
        changing = [row for row in suspects if row["state"] not in _POINTLESS[state]]
        by_partition: dict[int, list[tuple[Suspect, int]]] = {}
        for row in changing:
            suspect = _suspect(row)
            by_partition.setdefault(partition_of(suspect.key, self._settings.kafka.partitions), []).append((suspect, state))
        if by_partition:
            with RegistryClient.from_settings(self._settings) as registry:
                producer = FrameProducer(self._settings.kafka, registry)
                codec = registry.frame_codec("quarantine")
                for partition, rows in by_partition.items():
                    await producer.send("quarantine", partition, suspects_frame(codec, rows, source=SOURCE))
                await producer.flush()
        changed = {(row["exchange"], row["symbol"], row["trade_id"]) for row in changing}
        return [
            Decided(
                exchange=row["exchange"],
                symbol=row["symbol"],
                trade_id=row["trade_id"],
                before=STATES[row["state"]],
                state=STATES[state if (row["exchange"], row["symbol"], row["trade_id"]) in changed else row["state"]],
            )
            for row in suspects
        ]


@asynccontextmanager
async def desk(settings: Settings) -> AsyncIterator[Desk]:
    """The suspects of a stack, with a connection to ClickHouse. Raises UnreachableError, inside too."""
    store = ClickHouseHistory(settings.clickhouse)
    try:
        yield Desk(settings, Quality(store))
    except StoreUnavailableError as exc:
        raise UnreachableError(f"{exc.reason.rstrip('.')}: start the stack or set MARKETSTREAM_CLICKHOUSE_URL.") from exc
    finally:
        await store.close()


def _suspect(row: dict[str, Any]) -> Suspect:
    values = {name: row[name] for name in Suspect._fields if name != "key"}
    return Suspect(key=f"{row['exchange']}:{row['symbol']}", **values)
