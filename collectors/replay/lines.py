"""Chunks of bytes in, blocks of whole lines out, each with the number of its first line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from collectors.replay.bytesource import ByteSource
from collectors.replay.errors import FormatError, TruncatedError

BLOCK_BYTES: Final = 8 << 20
"""About 110,000 rows of a dump: large enough that polars costs per row and not per block (5.9 M rows/s), small enough for any machine."""
MAX_LINE_BYTES: Final = 64 << 20
"""The longest line met in a capture (Binance's exchangeInfo) has 2 MB; a longer one than this is no text file."""
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class LineBlock:
    """Whole lines, each ended by a newline (the file's last one may lack it)."""

    data: bytes
    first_line: int
    """1-based number in the decompressed file."""


def line_blocks(source: ByteSource, block_bytes: int = BLOCK_BYTES) -> Iterator[LineBlock]:
    """Blocks of about ``block_bytes`` (a longer line makes a longer block), in order, without a byte order mark.

    Raises what :meth:`ByteSource.chunks` does. Before TruncatedError every whole line read so far is given out; a line cut in the
    middle is not, because a cut number is a wrong number; the error then names the first missing line.
    """
    pending: list[bytes] = []
    size, line = 0, 1
    first = True
    try:
        for chunk in source.chunks():
            if first:
                chunk, first = chunk.removeprefix(_BOM), False
            pending.append(chunk)
            size += len(chunk)
            if size < block_bytes or b"\n" not in chunk:
                if size > MAX_LINE_BYTES + block_bytes:
                    raise FormatError(source.path, f"a line is longer than {MAX_LINE_BYTES >> 20} MiB: this is no text file.", line=line)
                continue
            data = b"".join(pending)
            cut = data.rfind(b"\n") + 1
            pending = [data[cut:]]
            size = len(pending[0])
            yield from (blocks := _split(data[:cut], line, block_bytes))[0]
            line = blocks[1]
    except TruncatedError as error:
        data = b"".join(pending)
        whole = data[: data.rfind(b"\n") + 1]
        blocks = _split(whole, line, block_bytes)
        yield from blocks[0]
        raise TruncatedError(source.path, error.what, line=blocks[1]) from error
    if rest := b"".join(pending):
        yield from _split(rest, line, block_bytes)[0]


def _split(data: bytes, line: int, block_bytes: int) -> tuple[list[LineBlock], int]:
    """``data`` cut at newlines into pieces of about ``block_bytes``, and the number of the line after it."""
    blocks: list[LineBlock] = []
    start = 0
    while start < len(data):
        end = len(data)
        if end - start > block_bytes:
            end = data.find(b"\n", start + block_bytes - 1) + 1 or len(data)
        piece = data[start:end] if start or end < len(data) else data
        blocks.append(LineBlock(data=piece, first_line=line))
        line += piece.count(b"\n")
        start = end
    return blocks, line


def without_header(blocks: Iterator[LineBlock]) -> Iterator[LineBlock]:
    """``blocks`` without the first line that is not blank."""
    waiting = True
    for block in blocks:
        if waiting:
            skipped, rest = _drop_first_line(block.data)
            waiting = rest is None
            if rest:
                yield replace(block, data=rest, first_line=block.first_line + skipped)
        else:
            yield block


def _drop_first_line(data: bytes) -> tuple[int, bytes | None]:
    """Lines dropped and what follows the first line with text; None when there is no such line in ``data``."""
    start, skipped = 0, 0
    while start < len(data):
        end = data.find(b"\n", start) + 1 or len(data)
        skipped += 1
        if data[start:end].strip():
            return skipped, data[end:]
        start = end
    return skipped, None
