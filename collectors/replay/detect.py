"""The first bytes of a file in, the reader for it out. Content decides, never the name; ``--format`` only says what is expected."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from collectors.replay.bytesource import ByteSource
from collectors.replay.capture import CaptureReader
from collectors.replay.columnar import ARROW_MAGIC, PARQUET_MAGIC, ColumnarReader
from collectors.replay.csv_reader import read_csv
from collectors.replay.errors import FormatError, NoRowsError
from collectors.replay.kraken_rest import MAX_BYTES, parse_kraken
from collectors.replay.layout import AGG_TRADES, MARKETSTREAM, TRADES, find_layout
from collectors.replay.lines import BLOCK_BYTES, LineBlock, line_blocks, without_header
from collectors.replay.rows import Block
from schemas.errors import VocabularyError
from schemas.symbols import Instrument

CAPTURE: Final = "binance-ws"
KRAKEN: Final = "kraken-rest"
FORMATS: Final = ("auto", TRADES, AGG_TRADES, CAPTURE, MARKETSTREAM, KRAKEN)
"""What ``--format`` may say."""

_HEAD_BYTES: Final = 1 << 20
_LAYOUT_BYTES: Final = 1 << 16
_STAMPED: Final = re.compile(rb"\d{9,20}(\.\d+)?:? [{\[]")
_CONNECTION: Final = (b"configuration: {", b"wss://", b"ws://", b"https://", b"http://")
_EVENT: Final = re.compile(rb'\{\s*"(stream|e|data)"\s*:')
_SYMBOLS_SHOWN: Final = 20


class Reader:
    """One recognised file. :meth:`blocks` may be called more than once and reads it from the start each time.

    Attributes:
        path: the file.
        format: one of ``FORMATS`` but ``auto``.
        symbols_seen: symbols passed over, as the file spells them; at most 1,000.
    """

    def __init__(self, path: Path, instrument: Instrument, format_name: str = "auto", *, block_bytes: int = BLOCK_BYTES) -> None:
        """Recognise ``path``.

        Raises:
            VocabularyError: no such format.
            FileAccessError: it cannot be opened.
            FormatError: it is of no known format, or of another one than ``format_name``.
            NoRowsError: it is empty.
        """
        if format_name not in FORMATS:
            raise VocabularyError("format", format_name, FORMATS)
        self.path = path
        self.instrument = instrument
        self.symbols_seen: set[str] = set()
        self._block_bytes = block_bytes
        self._base_sizes = instrument.exchange == "binance-coinm"
        self._source = ByteSource(path)
        self._columnar: ColumnarReader | None = None
        self._head = self._source.head(_HEAD_BYTES)
        self.format = self._recognise()
        if format_name not in ("auto", self.format):
            raise FormatError(path, f"is not {format_name} but looks like {self.format}: leave --format out or name that one.")

    @property
    def size_bytes(self) -> int:
        """Bytes of the file on disk."""
        return self._source.size_bytes

    @property
    def position_bytes(self) -> int:
        """Bytes of it read so far, for progress."""
        return self._source.position_bytes

    def blocks(self) -> Iterator[Block]:
        """Blocks of checked trades in the file's order.

        Raises TruncatedError after the last block that could be read; NoRowsError when there was no trade of the instrument.
        """
        rows = 0
        for block in self._blocks():
            rows += block.rows
            yield block
        if not rows:
            raise NoRowsError(self.path, self._nothing())

    def read_line(self, raw: bytes, line: int) -> Block:
        """One line parsed as one of this file's. Raises FormatError where the file has no lines: columnar, or one whole reply."""
        if self._columnar is not None or self.format == KRAKEN:
            raise FormatError(self.path, f"is {self.format} without lines, so none can be parsed again: replay a corrected file.")
        lines = [LineBlock(data=raw, first_line=line)]
        if self.format == CAPTURE:
            reader = CaptureReader(self.path, self.instrument, prefers_trades=b'"aggTrade"' not in raw, on_symbol=self._note_symbol)
            return next(reader.read(lines))
        return next(read_csv(lines, self._layout, self.instrument, self._note_symbol))

    def _blocks(self) -> Iterator[Block]:
        if self._columnar is not None:
            yield from self._columnar.read(self.instrument, self._note_symbol)
            self._source.position_bytes = self.size_bytes
        elif self.format == KRAKEN:
            yield parse_kraken(self.path, self._whole(), self.instrument, self._note_symbol)
        elif self.format == CAPTURE:
            prefers_trades = re.search(rb'"e"\s*:\s*"trade"', self._head) is not None
            reader = CaptureReader(self.path, self.instrument, prefers_trades=prefers_trades, on_symbol=self._note_symbol)
            yield from reader.read(line_blocks(self._source, self._block_bytes))
        else:
            lines = line_blocks(self._source, self._block_bytes)
            yield from read_csv(
                without_header(lines) if self._layout.has_header else lines, self._layout, self.instrument, self._note_symbol
            )

    def _recognise(self) -> str:
        head = self._head
        if not head.strip():
            raise NoRowsError(self.path, "is empty; record or download it again.")
        if head.startswith((PARQUET_MAGIC, ARROW_MAGIC)):
            if self._source.compression:
                raise FormatError(self.path, f"holds a {head[:4].decode()} file inside {self._source.compression}; unpack it first.")
            self._columnar = ColumnarReader(self.path, is_parquet=head.startswith(PARQUET_MAGIC), base_sizes=self._base_sizes)
            return self._columnar.layout.format
        if b"\0" in head.lstrip().split(b"\n", 1)[0][:4096]:
            raise FormatError(self.path, f"is no text (first bytes {head[:8].hex(' ')}): give a CSV, a capture, Parquet or Arrow.")
        text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        first = text.split(b"\n", 1)[0]
        if _STAMPED.match(first) or first.startswith(_CONNECTION) or _EVENT.match(first):
            return CAPTURE
        if text[:1] in b"{[":
            if text.startswith(b"{") and re.match(rb'\{\s*"(error|result)"\s*:', text):
                return KRAKEN
            raise FormatError(self.path, "is JSON of no known kind: of REST replies only Kraken's Trades are read.", line=1)
        if b"," not in first and not any(b"," in line for line in text.split(b"\n")[:50]):
            shown = ascii(first[:60].decode("utf-8", "replace"))
            raise FormatError(self.path, f"begins with {shown}, which is no CSV and no capture of trades.", line=1)
        cut = text.rfind(b"\n", 0, _LAYOUT_BYTES) + 1
        self._layout = find_layout(self.path, text[:cut] or text[:_LAYOUT_BYTES], base_sizes=self._base_sizes)
        return self._layout.format

    def _whole(self) -> bytes:
        parts, size = [], 0
        for chunk in self._source.chunks():
            parts.append(chunk)
            size += len(chunk)
            if size > MAX_BYTES:
                raise FormatError(self.path, f"is a reply of more than {MAX_BYTES >> 20} MiB; cut it into single replies.")
        return b"".join(parts)

    def _note_symbol(self, name: str) -> None:
        if len(self.symbols_seen) < 1_000:  # a hostile file must not fill the memory with names
            self.symbols_seen.add(name[:64])

    def _nothing(self) -> str:
        if not self.symbols_seen:
            return "holds no trade at all; was it recorded without a trade stream?"
        names = sorted(self.symbols_seen)
        shown = ", ".join(names[:_SYMBOLS_SHOWN]) + (f" and {len(names) - _SYMBOLS_SHOWN} more" if len(names) > _SYMBOLS_SHOWN else "")
        return f"holds no trade of {self.instrument.symbol}; it has {shown}: name one of them with --symbol."
