"""What the API asks of the outside world: three small interfaces, a clock and its limits, all passed into ``create_app``.

The real ones are made in ``infra.api``; tests pass their own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from api.coverage import CoverageReader, NoCoverage
from api.sessions import NoSessions, SessionStore
from schemas.frames import Frame
from schemas.seam import Clock

if TYPE_CHECKING:
    from api.letters import LetterStates


class Record(NamedTuple):
    """One Kafka record of a frame topic."""

    topic: str
    """Name without prefix: ``bars`` or ``trades``."""
    partition: int
    offset: int
    timestamp_ms: int
    """When the broker or producer stamped it, milliseconds UTC; -1 unknown."""
    value: bytes


class HistoryStore(Protocol):
    """ClickHouse. Called once or twice a request; must not block the loop; an unreachable server raises StoreUnavailableError."""

    async def fetch(self, sql: str, parameters: Mapping[str, Any], fmt: str) -> bytes:
        """The whole answer of a query in ClickHouse's format ``fmt``."""
        ...

    def stream(self, sql: str, parameters: Mapping[str, Any], fmt: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The answer in pieces; leaving the context ends the query."""
        ...

    async def ping(self) -> None:
        """Return when it answers."""
        ...


class SymbolStore(Protocol):
    """PostgreSQL's table of symbols. An unreachable server raises StoreUnavailableError."""

    async def symbols(self) -> Sequence[Mapping[str, Any]]:
        """Every row: ``exchange``, ``symbol``, ``active`` and what else the table holds, values as JSON knows them."""
        ...

    async def ping(self) -> None:
        """Return when it answers."""
        ...


class FrameSource(Protocol):
    """Kafka. One live tail over all partitions feeds the whole process; :meth:`read` re-reads a bounded stretch for one reader.

    On the event loop, per partition, it calls ``moved(topic, partition, offset)`` once before the first record and whenever the tail has
    to jump (retention, topic made anew), and ``deliver`` with records in offset order, each once, without holes since the last ``moved``.
    """

    async def start(self, deliver: Callable[[Sequence[Record]], None], moved: Callable[[str, int, int], None]) -> None:
        """Begin to deliver, a little before the present. Returns at once, also when the broker is away."""
        ...

    async def stop(self) -> None:
        """End; nothing is delivered afterwards."""
        ...

    def epoch(self, topic: str) -> int | None:
        """64-bit name of the topic's incarnation; None while it is not known (broker away since start)."""
        ...

    def decode(self, record: Record) -> Frame:
        """The frame in a record. Raises schemas.errors.DecodeError."""
        ...

    def read(self, topic: str, partition: int, start: int, stop: int) -> AsyncGenerator[Sequence[Record], None]:
        """Records ``[start, stop)`` in batches.

        Raises PositionLostError when the topic does not hold ``start``, StoreUnavailableError when the broker does not answer.
        """
        ...

    async def ping(self) -> None:
        """Return when the broker answers."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamLimits:
    """Bounds of the WebSocket stream, per client unless it says otherwise."""

    max_clients: int = 2_000
    """Connections of one process; more are refused with 1013."""
    max_subscriptions: int = 512
    max_request_bytes: int = 16 * 1024
    max_requests_per_s: float = 50.0
    """Mean; a burst of as many is allowed."""
    queue_bytes: int = 4 * 1024 * 1024
    """Waiting text; beyond it the client is closed (4408) and resumes from its last cursor."""
    snapshot_bars: int = 200
    """Final bars of a snapshot; the most a subscribe may ask for as ``limit``. More is a matter of REST."""
    snapshot_trades: int = 100
    heartbeat_s: float = 15.0
    """A subscription that is silent for this long gets a heartbeat with a fresh cursor."""
    max_resume_records: int = 100_000
    """Farthest a resume reads back in one partition, records; beyond it the client gets a reset."""
    max_resume_rows: int = 50_000
    """Most history rows a cursor from an old page is continued with; beyond it the client gets a reset."""
    resume_timeout_s: float = 30.0
    begin_timeout_s: float = 5.0
    """How long a subscribe waits for the broker's first answer, as right after a restart."""
    log_messages: int = 512
    """Encoded messages a series keeps, so that a reconnect costs nothing."""
    log_bytes: int = 128 * 1024
    ring_bytes: int = 4 * 1024 * 1024
    """Newest records kept per partition, undecoded."""
    linger_s: float = 60.0
    """How long a series without subscribers stays warm."""
    max_idle_series: int = 256

    def snapshot_rows(self, channel: str) -> int:
        """Rows of a snapshot of ``bars`` or ``trades``."""
        return self.snapshot_bars if channel == "bars" else self.snapshot_trades


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiLimits:
    """Bounds of REST."""

    default_limit: int = 500
    max_limit_json: int = 5_000
    max_limit_bulk: int = 1_000_000
    """Arrow and CSV are streamed, so that a page may be long."""
    request_timeout_s: float = 15.0
    """Longest a query may take until its first byte."""
    ping_timeout_s: float = 2.0
    max_body_bytes: int = 64 * 1024
    max_target_bytes: int = 4 * 1024
    """Path and query together."""
    max_concurrent_queries: int = 32
    """Queries at ClickHouse at a time; others wait in line."""
    max_waiting_queries: int = 512
    """Beyond these a request is refused with 503 at once."""
    cache_ttl_s: float = 0.2
    """Identical reads within this time share one answer: as long as the sink takes to store a row, so nobody sees older data for it."""
    cache_bytes: int = 32 * 1024 * 1024
    catalogue_ttl_s: float = 2.0
    gzip_min_bytes: int = 1_024


@dataclass(frozen=True, kw_only=True, slots=True)
class Deps:
    """Everything ``create_app`` needs."""

    history: HistoryStore
    symbols: SymbolStore
    frames: FrameSource
    clock: Clock
    partitions: int
    """Partitions of ``trades`` and ``bars`` (``settings.kafka.partitions``)."""
    sessions: SessionStore = field(default_factory=NoSessions)
    limits: ApiLimits = field(default_factory=ApiLimits)
    stream: StreamLimits = field(default_factory=StreamLimits)
    coverage: CoverageReader = field(default_factory=NoCoverage)
    letters: LetterStates | None = None
    """PostgreSQL's decisions on dead letters; None: every letter is open."""
    version: str = "0.1.0"
    on_close: tuple[Callable[[], Awaitable[None]], ...] = ()
    """Called when the app ends, after the last request."""
    stuck: Callable[[], str] = str
    """Why the process should be started anew; empty: it should not. Asked on each ``/livez``."""
    progress: Callable[[], Mapping[str, Any]] = dict
    """What ``/progress`` shows: how far the live tail is."""
