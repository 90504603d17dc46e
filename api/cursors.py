"""Cursors: opaque text that says where a reader stands. Two kinds, both versioned and checked.

- LiveCursor: a place in a topic, (partition, offset, row). What stands before it was delivered, what follows was not. It is valid across
  restarts because it names the broker's own offsets; ``epoch`` names the incarnation of the topic they belong to.
- PageCursor: the next page of a history answer, with the range, the direction and the snapshot the first page was read from.

Text form: base64url of version, fields and a 4-byte checksum. The checksum finds damage and mix-ups, it is no protection against forgery:
a cursor gives access to nothing that its owner could not ask for directly.
"""

from __future__ import annotations

import struct
from base64 import urlsafe_b64decode
from binascii import b2a_base64, crc32
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from api.errors import CursorError

TOPIC_CODES: Final = {"bars": 1, "trades": 2}
_TOPICS: Final = {code: name for name, code in TOPIC_CODES.items()}
LEAST: Final = -(2**63)
"""``until_us`` of a cursor without a time bound."""
NOTHING_DUE: Final = 2**63 - 1
"""``floor_key`` of a cursor whose history was delivered to its end."""
MAX_CURSOR_CHARS: Final = 128

_LIVE_VERSION: Final = 1
_PAGE_VERSION: Final = 65
_KNOWN_PAGE_VERSION: Final = 66
"""A page cursor of an answer with ``known_at``; those without stay as they were, so that a reader survives an upgrade between two pages."""
_OPEN_PAGE_VERSION: Final = 67
"""A page cursor of a session's answer that runs to the virtual now; its fields are those of one with ``known_at``."""
_LIVE: Final = struct.Struct(">BBHqIQqq")
_PAGE: Final = struct.Struct(">BBBIqqqq")
_KNOWN_PAGE: Final = struct.Struct(">BBBIqqqqq")
_PAGES: Final = {_PAGE_VERSION: _PAGE, _KNOWN_PAGE_VERSION: _KNOWN_PAGE, _OPEN_PAGE_VERSION: _KNOWN_PAGE}
_CHECK_BYTES: Final = 4
_SALT: Final = 0x6D736375
_URL_SAFE: Final = bytes.maketrans(b"+/", b"-_")


class Position(NamedTuple):
    """A place in one partition: everything before row ``row`` of the record at ``offset``. A tuple, as comparing it is a hot path."""

    offset: int
    row: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveCursor:
    """Where a stream goes on."""

    topic: str
    """``bars`` or ``trades``."""
    partition: int
    offset: int
    """Offset of the next record to deliver, >= 0."""
    row: int = 0
    """Rows of that record that were delivered already."""
    epoch: int = 0
    """Incarnation of the topic, 64 bit unsigned."""
    floor_key: int = NOTHING_DUE
    until_us: int = LEAST
    """A page ended before the present: rows stored before ``offset`` are still due where their key (open time, trade id) is above
    ``floor_key`` and their time not before ``until_us``."""

    @property
    def position(self) -> Position:
        """Its place."""
        return Position(self.offset, self.row)

    def encode(self) -> str:
        """The text of it."""
        return _seal(
            _LIVE.pack(
                _LIVE_VERSION,
                TOPIC_CODES[self.topic],
                self.partition,
                self.offset,
                self.row,
                self.epoch,
                self.floor_key,
                self.until_us,
            )
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PageCursor:
    """Where the next page of a history answer begins."""

    topic: str
    series: int
    """:func:`series_code` of what is read; a page cursor is good for nothing else."""
    backward: bool
    """Pages run from new to old."""
    start_us: int
    end_us: int
    """The range ``[start, end)`` of the first page."""
    snapshot_offset: int
    """Rows of later offsets are not part of this answer: all pages show one state. -1: nothing was stored."""
    last: int
    """Key of the outermost row delivered: open_time_us of a bar, trade_id of a trade."""
    known_at_us: int | None = None
    """The pages show what was known then; None: what is known now."""
    open_end: bool = False
    """Beside ``known_at_us``: ``end_us`` is where the virtual now of a session was, so its stream goes on behind the last page."""

    def encode(self) -> str:
        """The text of it."""
        fields = (TOPIC_CODES[self.topic], self.backward, self.series, self.start_us, self.end_us, self.snapshot_offset, self.last)
        if self.known_at_us is None:
            return _seal(_PAGE.pack(_PAGE_VERSION, *fields))
        return _seal(_KNOWN_PAGE.pack(_OPEN_PAGE_VERSION if self.open_end else _KNOWN_PAGE_VERSION, *fields, self.known_at_us))


def series_code(topic: str, exchange: str, symbol: str, timeframe_s: int = 0) -> int:
    """32-bit check of what a page cursor belongs to."""
    return crc32(f"{topic}|{exchange}|{symbol}|{timeframe_s}".encode())


def decode_live(text: str) -> LiveCursor:
    """The live cursor in ``text``. Raises CursorError."""
    _, code, partition, offset, row, epoch, floor_key, until_us = _LIVE.unpack(_open(text, {_LIVE_VERSION: _LIVE}, "stream"))
    if code not in _TOPICS or offset < 0:
        raise _broken(text)
    return LiveCursor(topic=_TOPICS[code], partition=partition, offset=offset, row=row, epoch=epoch, floor_key=floor_key, until_us=until_us)


def decode_page(text: str) -> PageCursor:
    """The page cursor in ``text``. Raises CursorError."""
    payload = _open(text, _PAGES, "page")
    known_at_us: int | None = None
    if payload[0] != _PAGE_VERSION:
        *_, known_at_us = _KNOWN_PAGE.unpack(payload)
    _, code, backward, series, start, end, snapshot, last = _PAGE.unpack_from(payload)
    if code not in _TOPICS or backward > 1:
        raise _broken(text)
    return PageCursor(
        topic=_TOPICS[code],
        series=series,
        backward=bool(backward),
        start_us=start,
        end_us=end,
        snapshot_offset=snapshot,
        last=last,
        known_at_us=known_at_us,
        open_end=payload[0] == _OPEN_PAGE_VERSION,
    )


def encode_place(topic_code: int, partition: int, offset: int, row: int, epoch: int) -> str:
    """The text of a LiveCursor that owes no history; 1 us, as every message carries one."""
    return _seal(_LIVE.pack(_LIVE_VERSION, topic_code, partition, offset, row, epoch, NOTHING_DUE, LEAST))


def _check(payload: bytes) -> bytes:
    return crc32(payload, _SALT).to_bytes(_CHECK_BYTES, "big")


def _seal(payload: bytes) -> str:
    return b2a_base64(payload + _check(payload), newline=False).translate(_URL_SAFE, b"=").decode()


def _open(text: str, layouts: Mapping[int, struct.Struct], kind: str) -> bytes:
    """The checked payload of ``text``, of one of the versions in ``layouts``."""
    if len(text) > MAX_CURSOR_CHARS:
        raise _broken(text)
    try:
        raw = urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except (ValueError, UnicodeEncodeError):
        raise _broken(text) from None
    payload, check = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
    if not payload or check != _check(payload):
        raise _broken(text)
    if payload[0] not in layouts:
        names = {_LIVE_VERSION: "a stream cursor"} | dict.fromkeys(_PAGES, "a page cursor")
        other = names.get(payload[0], f"of version {payload[0]}")
        raise CursorError("invalid_cursor", f"The cursor '{text[:40]}' is {other}, wanted is a {kind} cursor: start again without one.")
    if len(payload) != layouts[payload[0]].size:
        raise _broken(text)
    return payload


def _broken(text: str) -> CursorError:
    shown = text if len(text) <= 40 else text[:40] + "..."
    return CursorError("invalid_cursor", f"The cursor '{shown}' is damaged or none of ours: use one as it was given, or start without.")
