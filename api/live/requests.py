"""Requests of the WebSocket stream: text in, a checked request out, or a ``Refused`` with a stable code and one sentence."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from api.cursors import MAX_CURSOR_CHARS, LiveCursor, decode_live
from api.errors import CursorError
from api.live.series import SeriesKey
from schemas.errors import VocabularyError, nearest
from schemas.timeframes import timeframe_seconds

CHANNELS: Final = ("bars", "trades")
OPS: Final = ("subscribe", "unsubscribe", "list", "ping")
_MAX_ID_CHARS: Final = 64


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What a client may say."""

    op: str
    id: int | str | None = None
    channel: str | None = None
    exchange: str | None = None
    symbol: str | None = None
    timeframe: str | None = None
    from_: str | None = msgspec.field(default=None, name="from")
    limit: int | None = None
    session: str | None = None


class _Loose(msgspec.Struct):
    """As much of a request as an error needs to name it."""

    id: int | str | None = None


class Refused(Exception):
    """A request that is not granted."""

    def __init__(self, code: str, detail: str, **extra: object) -> None:
        self.code = code
        self.detail = detail
        self.extra = extra
        super().__init__(detail)


_strict: Final = msgspec.json.Decoder(Request)
_loose: Final = msgspec.json.Decoder(_Loose)


def request_id(text: str | bytes) -> int | str | None:
    """The id of a request that may be wrong in other ways."""
    try:
        found = _loose.decode(text).id
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None
    return found if not isinstance(found, str) or len(found) <= _MAX_ID_CHARS else None


def parse_request(text: str | bytes) -> Request:
    """The request in a message. Raises Refused ``invalid_request``."""
    try:
        request = _strict.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as exc:
        raise Refused("invalid_request", f"The message is no request: {exc}. Write {{'op':'subscribe','id':1,...}} as JSON.") from None
    if isinstance(request.id, str) and len(request.id) > _MAX_ID_CHARS:
        raise Refused("invalid_request", f"'id' has {len(request.id)} characters, {_MAX_ID_CHARS} are allowed.")
    if request.op not in OPS:
        guess = nearest(request.op[:60], OPS)
        hint = f"did you mean '{guess}'?" if guess else f"known are: {', '.join(OPS)}."
        raise Refused("unknown_op", f"Unknown op '{request.op[:60]}': {hint}", nearest=guess)
    return request


def series_of(request: Request) -> SeriesKey:
    """The series a request names. Raises Refused."""
    if request.channel not in CHANNELS:
        word = str(request.channel)[:60]
        guess = nearest(word, CHANNELS)
        raise Refused("unknown_channel", f"Unknown channel '{word}': use {' or '.join(CHANNELS)}.", nearest=guess)
    for name in ("exchange", "symbol"):
        value = getattr(request, name)
        if not value or len(value) > 80:
            raise Refused("missing_parameter", f"'{name}' is missing or too long: name it, as in binance, BTC-USDT.")
    assert request.exchange is not None
    assert request.symbol is not None
    if request.channel == "trades":
        if request.timeframe is not None:
            raise Refused("unknown_parameter", "Channel 'trades' has no timeframe: leave it out.")
        return SeriesKey("trades", request.exchange, request.symbol)
    if request.timeframe is None:
        raise Refused("missing_parameter", "'timeframe' is missing: bars need one, as in 1m.")
    try:
        return SeriesKey("bars", request.exchange, request.symbol, timeframe_seconds(request.timeframe))
    except VocabularyError as exc:
        raise Refused("unknown_timeframe", str(exc), nearest=exc.nearest) from None


def cursor_of(request: Request, key: SeriesKey, partition: int) -> LiveCursor | None:
    """The checked cursor of a subscribe, None without one. Raises Refused."""
    if request.from_ is None:
        return None
    if len(request.from_) > MAX_CURSOR_CHARS:
        raise Refused("invalid_cursor", "The cursor is too long: use one as it was given, or subscribe without.")
    try:
        cursor = decode_live(request.from_)
    except CursorError as exc:
        raise Refused(exc.code, exc.detail) from None
    if cursor.topic != key.channel or cursor.partition != partition:
        raise Refused("cursor_mismatch", f"The cursor is of channel '{cursor.topic}', of another series: subscribe without a cursor.")
    return cursor


Kind = Literal["ack", "error"]


def reply(kind: Kind, id_: int | str | None, body: dict[str, object]) -> bytes:
    """The text of an ack or error."""
    return msgspec.json.encode({"type": kind, "id": id_, "data": body})
