"""Carrying a fault out: what a :class:`~collectors.simulated.faults.FaultRequest` does to markets, limits and connections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from collectors.simulated.errors import UnknownFaultError
from collectors.simulated.exchange import Exchange, Venue
from collectors.simulated.faults import FAULTS_ON_TRADES, FaultRequest
from collectors.simulated.limits import RestTrouble
from collectors.simulated.peer import Peer
from collectors.simulated.wire import frame

_REST_FAULTS: Final = ("slow_rest", "rest_error", "short_pages", "cut_pages")

FOR_EVER_MS: Final = 2**62
"""A stall without an end lasts until a ``clear``."""


def carry_out(request: FaultRequest, exchange: Exchange, connections: Sequence[Peer], *, wall_ms: int) -> None:
    """Begin a fault.

    Args:
        request: what to do; ids that are touched at once are noted in it.
        exchange: the markets.
        connections: open WebSockets, oldest first.
        wall_ms: the clock, for refusals that end by themselves.

    Raises:
        UnknownFaultError: its market or symbol does not exist; nothing was changed.
    """
    request.begun_ms = exchange.time_ms
    if request.fault == "clear":
        _clear(exchange)
        for peer in connections:
            peer.stalled_until_ms = 0
        return
    venue, code = target_of(request, exchange)
    if code is not None:
        _on_symbol(request, venue, code)
    elif request.fault == "rate_limit":
        venue.limit.force(request.status, wall_ms + int(request.seconds * 1_000))
    elif request.fault == "skew":
        exchange.skew_ms = request.milliseconds
    elif request.fault == "restart":
        exchange.go_down(request.seconds, reset_ids=request.reset_ids)
        for peer in connections:
            peer.abort()
    elif request.fault in _REST_FAULTS:
        _on_rest(request, venue, wall_ms + int(request.seconds * 1_000))
    elif request.fault != "refuse":  # the server's own doors: it shuts them itself
        _on_connections(request, exchange.time_ms, connections)


def target_of(request: FaultRequest, exchange: Exchange) -> tuple[Venue, int | None]:
    """The market a fault is for, and the code of its symbol where it has one.

    Raises:
        UnknownFaultError: market or symbol do not exist.
    """
    venue = next((venue for kind, venue in exchange.venues.items() if kind == request.market), None)
    if venue is None:
        raise UnknownFaultError(f"{request.fault}: market {request.market} is not simulated here")
    if request.fault not in (*FAULTS_ON_TRADES, "hole", "pause"):
        return venue, None
    code = venue.market.code(request.symbol)
    if code is None:
        raise UnknownFaultError(f"{request.fault}: symbol {request.symbol} is not listed on {request.market}")
    return venue, code


def _on_rest(request: FaultRequest, venue: Venue, until_ms: int) -> None:
    trouble = venue.trouble
    if request.fault == "slow_rest":
        trouble.delay_s, trouble.delay_until_ms = request.delay_s, until_ms
    elif request.fault == "rest_error":
        trouble.error_status, trouble.error_until_ms = request.status, until_ms
    elif request.fault == "short_pages":
        trouble.page_rows, trouble.pages_until_ms = request.count, until_ms
    else:
        trouble.cuts = request.count


def _on_symbol(request: FaultRequest, venue: Venue, code: int) -> None:
    if request.fault == "hole":
        first = int(venue.market.next_trade_id[code])
        request.touched.extend(range(first, first + request.count))
        venue.market.skip_ids(code, request.count)
    elif request.fault == "pause":
        venue.market.paused[code] = True
        if request.seconds:
            venue.pauses[code] = venue.market.time_ms + int(request.seconds * 1_000)
    else:
        venue.faults.add(request, code)


def _on_connections(request: FaultRequest, time_ms: int, connections: Sequence[Peer]) -> None:
    chosen = [peer for peer in connections if peer.kind == request.market and not peer.half_open]
    if request.fault == "malformed":
        for peer in chosen:
            peer.write(frame(request.text.encode()) * request.count)
        return
    for peer in chosen[: request.connections or None]:
        if request.fault == "half_open":
            peer.half_open = True
        elif request.fault == "stall":
            peer.stalled_until_ms = time_ms + int(request.seconds * 1_000) if request.seconds else FOR_EVER_MS
        elif request.fault == "close":
            peer.abort()
        else:
            peer.close(1001, "connection is valid for 24 hours")


def _clear(exchange: Exchange) -> None:
    exchange.skew_ms = 0
    for venue in exchange.venues.values():
        venue.faults.clear()
        venue.limit.clear()
        venue.trouble = RestTrouble()
        for code in np.flatnonzero(venue.market.paused).tolist():
            venue.resume(code)
