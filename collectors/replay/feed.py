"""A replay put together: file -> checked rows -> without repeats -> by time -> frames, with a count of what became of every row."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from collectors.replay.bytesource import access_error
from collectors.replay.detect import Reader
from collectors.replay.errors import ReplayError, StrictError, TruncatedError
from collectors.replay.order import WINDOW_ROWS, Columns, LookAhead, Ordered
from collectors.replay.pacing import MAX_FRAME_ROWS, Pacing, paced
from collectors.replay.rows import Block, Rejected
from collectors.replay.seen import SeenIds
from schemas.frames import END_OF_SOURCE, Frame
from schemas.seam import Clock
from schemas.symbols import Instrument

_HASH_PIECES: Final = 16
_HASH_PIECE_BYTES: Final = 1 << 18


@dataclass(kw_only=True, slots=True)
class ReplayStats:
    """What became of the rows so far; ``rows == published + duplicates + rejected`` once the replay has ended."""

    rows: int = 0
    published: int = 0
    duplicates: int = 0
    rejected: int = 0
    skipped: int = 0
    """Trades of other symbols, or of the other kind of event, in a capture: not asked for."""
    late: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Rejected rows by reason."""
    first_id: int = -1
    last_id: int = -1
    """Smallest and largest published id; -1 before the first row."""
    first_time_us: int = 0
    last_time_us: int = 0
    problem: TruncatedError | None = None
    """Why the file ended early, where it did: the rows before were replayed."""


class Replay:
    """One replay of one file for one instrument.

    Pull :meth:`frames` to the end; what is rejected goes to ``on_rejected`` block by block. Reading the next block overlaps with what
    the caller does with the frames of this one (it runs in a thread; polars and zlib let go of the interpreter).
    """

    def __init__(
        self,
        path: Path,
        instrument: Instrument,
        *,
        format_name: str = "auto",
        speed: float | None = None,
        clock: Clock,
        on_rejected: Callable[[Sequence[Rejected]], Awaitable[None]],
        max_frame_rows: int = MAX_FRAME_ROWS,
        window_rows: int = WINDOW_ROWS,
    ) -> None:
        """Recognise the file. Raises ReplayError or VocabularyError when it cannot be replayed; nothing has been given out then."""
        self.reader = Reader(path, instrument, format_name)
        self.instrument = instrument
        self.source = f"replay/{instrument.exchange}/{instrument.symbol}/{content_hash(path)}"
        self.stats = ReplayStats()
        self._pacing = Pacing(source=self.source, key=instrument.key, speed=speed, max_frame_rows=max_frame_rows)
        self._clock = clock
        self._watermark_us = 0
        self._seen = SeenIds()
        self._look_ahead = LookAhead(window_rows)
        self._on_rejected = on_rejected

    @property
    def format(self) -> str:
        """The format recognised."""
        return self.reader.format

    def refuse_bad_rows(self) -> None:
        """Read the whole file once; raises StrictError at the first bad row, TruncatedError when it ends early. Nothing is given out."""
        for block in self.reader.blocks():
            if block.rejected:
                first = block.rejected[0]
                what = f"{first.detail} Correct the row, or replay without --strict to dead-letter it."
                raise StrictError(self.reader.path, what, line=first.line)

    async def frames(self) -> AsyncIterator[Frame]:
        """Frames in time, the last with END_OF_SOURCE.

        A file that ends early is replayed up to there and closed as any other; ``stats.problem`` then says where.
        Raises ReplayError (NoRowsError when nothing was published).
        """
        async for frame in paced(self._groups(), self._pacing, self._clock):
            self.stats.published += frame.row_count
            self._watermark_us = frame.watermark_us
            yield frame

    def end_frame(self) -> Frame:
        """What ends the source when :meth:`frames` was not pulled to its end: an abandoned source would hold back the bars of its symbol."""
        return Frame(source=self.source, watermark_us=self._watermark_us, symbols=(self.instrument.key,), flags=END_OF_SOURCE)

    async def _groups(self) -> AsyncIterator[Ordered]:
        steps = self._steps()
        ahead = asyncio.ensure_future(asyncio.to_thread(next, steps, None))
        try:
            while (step := await ahead) is not None:
                ahead = asyncio.ensure_future(asyncio.to_thread(next, steps, None))
                rejected, groups = step
                if rejected:
                    await self._on_rejected(rejected)
                for group in groups:
                    yield group
        finally:
            # the thread cannot be cancelled: wait for it, or it reads on into a closed file
            await asyncio.wait([ahead])
            if not ahead.cancelled():
                ahead.exception()

    def _steps(self) -> Iterator[tuple[Sequence[Rejected], list[Ordered]]]:
        """One step a block: what is rejected and what is in order by now."""
        try:
            for block in self.reader.blocks():
                yield block.rejected, list(self._look_ahead.push(self._fresh(block)))
        except ReplayError as error:  # a break, or damage first met in the middle
            if not self.stats.rows:
                raise
            self.stats.problem = self._say_what_is_missing(error)
        yield (), list(self._look_ahead.finish())
        self.stats.late = self._look_ahead.late_rows

    def _say_what_is_missing(self, error: ReplayError) -> TruncatedError:
        here = "this line" if error.line else "there"
        what = f"{error.what.rstrip('.')}: {self.stats.rows:,} rows before were read, everything from {here} on is missing; get the file again."
        return TruncatedError(error.path, what, line=error.line)

    def _fresh(self, block: Block) -> Columns:
        """Count the block; its rows without repeats."""
        stats, columns = self.stats, block.columns
        stats.rows += block.rows
        stats.skipped += block.skipped
        if block.rejected:
            stats.rejected += len(block.rejected)
            stats.reasons.update(item.reason for item in block.rejected)
        fresh = self._seen.new(columns["trade_id"])
        if fresh is not None:
            stats.duplicates += int(len(fresh) - fresh.sum())
            columns = {name: column[fresh] for name, column in columns.items()}
        ids, times = columns["trade_id"], columns["exchange_time_us"]
        if len(ids):
            first = stats.first_id < 0
            stats.first_id = int(ids.min()) if first else min(stats.first_id, int(ids.min()))
            stats.last_id = max(stats.last_id, int(ids.max()))
            stats.first_time_us = int(times.min()) if first else min(stats.first_time_us, int(times.min()))
            stats.last_time_us = max(stats.last_time_us, int(times.max()))
        return columns


def content_hash(path: Path) -> str:
    """Eight hex digits of the file's size and of 16 pieces spread over it (4 MiB at most, so that 10 GB cost nothing).

    The same content under another name has the same hash: replaying it again is the same source. Raises FileAccessError.
    """
    try:
        size = path.stat().st_size
        digest = hashlib.blake2b(str(size).encode(), digest_size=4)
        with path.open("rb") as file:
            last = max(size - _HASH_PIECE_BYTES, 0)
            for start in sorted({last * piece // (_HASH_PIECES - 1) for piece in range(_HASH_PIECES)}):
                file.seek(start)
                digest.update(file.read(_HASH_PIECE_BYTES))
    except OSError as exc:
        raise access_error(path, exc) from exc
    return digest.hexdigest()
