"""Decisions on dead letters in PostgreSQL: which letter in; claimed, settled or dropped, and its state for a reader, out.

The row of a letter is the lock: who inserts it may retry. A command that was killed in the middle leaves it at ``retrying``; after
``CLAIM_S`` another command takes it over, and what both sent is the same (sinks drop rows they hold).
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from api.letters import LetterState

CLAIM_S: Final = 60
"""A retry takes a second; after a minute its command is dead."""

# A letter is repaired when the jobs its retry asked for are done, or when a later repair of its symbol covered its trade.
_STATES: Final = """
    SELECT l.id, d.state, d.decided_by, d.decided_at, d.outcome, d.new_letter, coalesce(d.repairs, '{}') AS repairs,
        (d.state = 'retried' AND cardinality(d.repairs) > 0 AND NOT EXISTS (
            SELECT FROM repairs r WHERE r.id = ANY(d.repairs) AND r.state <> 'done'
        )) AS jobs_done,
        CASE WHEN d.state IS NULL AND l.trade_us > 0 THEN (
            SELECT r.id FROM repairs r WHERE r.topic_prefix = $1 AND r.exchange = l.exchange AND r.symbol = l.symbol AND r.state = 'done'
                AND r.start_us <= l.trade_us AND r.end_us > l.trade_us AND extract(epoch FROM r.updated_at) * 1000000 >= l.known_us
            ORDER BY r.id LIMIT 1
        ) END AS covered_by
    FROM unnest($2::bigint[], $3::text[], $4::text[], $5::bigint[], $6::bigint[]) AS l (id, exchange, symbol, trade_us, known_us)
    LEFT JOIN deadletter_decisions d ON d.topic_prefix = $1 AND d.letter = l.id
"""


async def states(fetch: Callable[..., Awaitable[Any]], prefix: str, letters: Sequence[Mapping[str, Any]]) -> dict[int, LetterState]:
    """State by id of the letters that are not simply open; ``fetch(sql, *arguments)`` asks PostgreSQL. See api.letters.LetterStates."""
    columns = [[letter[name] for letter in letters] for name in ("id", "exchange", "symbol", "trade_time_us", "known_at_us")]
    found = {}
    for row in await fetch(_STATES, prefix, *columns):
        if row["state"] is None and row["covered_by"] is None:
            continue
        if row["state"] is None:
            found[row["id"]] = LetterState(
                state="repaired", decided_by="repair", outcome=f"Its bars were made anew by repair {row['covered_by']}."
            )
            continue
        state = "repaired" if row["jobs_done"] else {"retrying": "open"}.get(row["state"], row["state"])
        found[row["id"]] = LetterState(
            state=state,
            decided_by=row["decided_by"],
            decided_at=row["decided_at"].isoformat(),
            outcome=row["outcome"],
            new_letter=row["new_letter"],
            repairs=tuple(row["repairs"]),
        )
    return found


class Decisions:
    """Writes decisions of one stack over an asyncpg connection (``infra.database.connected``)."""

    def __init__(self, connection: Any, prefix: str) -> None:
        self._connection = connection
        self._prefix = prefix
        self._by = decider()

    async def states(self, letters: Sequence[Mapping[str, Any]]) -> dict[int, LetterState]:
        """See api.letters.LetterStates."""
        return await states(self._connection.fetch, self._prefix, letters)

    async def claim(self, letter: int) -> bool:
        """Take a letter to retry it; False when it was retried already or another command is about to."""
        sql = """
            INSERT INTO deadletter_decisions AS d (topic_prefix, letter, state, decided_by) VALUES ($1, $2, 'retrying', $3)
            ON CONFLICT (topic_prefix, letter) DO UPDATE SET state = 'retrying', decided_by = $3, decided_at = now(), outcome = ''
                WHERE d.state = 'dropped' OR (d.state = 'retrying' AND d.decided_at < now() - make_interval(secs => $4))
            RETURNING letter
        """
        return await self._connection.fetchval(sql, self._prefix, letter, self._by, float(CLAIM_S)) is not None

    async def release(self, letter: int) -> None:
        """Give a claimed letter back: it is open again."""
        sql = "DELETE FROM deadletter_decisions WHERE topic_prefix = $1 AND letter = $2 AND state = 'retrying'"
        await self._connection.execute(sql, self._prefix, letter)

    async def settle(self, letter: int, outcome: str, *, repairs: Sequence[int] = (), new_letter: int | None = None) -> None:
        """Write what a retry came to."""
        sql = """
            UPDATE deadletter_decisions SET state = 'retried', decided_at = now(), outcome = $3, repairs = $4, new_letter = $5
            WHERE topic_prefix = $1 AND letter = $2
        """
        await self._connection.execute(sql, self._prefix, letter, outcome, list(repairs), new_letter)

    async def drop(self, letters: Sequence[int], outcome: str) -> set[int]:
        """Drop letters on which nothing was decided yet; those that are dropped now."""
        sql = """
            INSERT INTO deadletter_decisions (topic_prefix, letter, state, decided_by, outcome)
            SELECT $1, id, 'dropped', $3, $4 FROM unnest($2::bigint[]) AS id
            ON CONFLICT (topic_prefix, letter) DO NOTHING RETURNING letter
        """
        return {row["letter"] for row in await self._connection.fetch(sql, self._prefix, list(letters), self._by, outcome)}

    async def markets(self) -> Sequence[Mapping[str, Any]]:
        """(exchange, symbol) of everything that is collected or was."""
        rows: Sequence[Mapping[str, Any]] = await self._connection.fetch("SELECT exchange, symbol FROM symbols")
        return rows


def decider() -> str:
    """``user@host``, for the record."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container may run under a number that has no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
