"""Carrying a fault out: what a :class:`~collectors.simulated.faults.FaultRequest` does to markets, limits and connections."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from collectors.simulated.errors import UnknownFaultError
from collectors.simulated.exchange import Exchange, Venue
from collectors.simulated.faults import FaultRequest
from collectors.simulated.peer import Peer
from collectors.simulated.wire import frame


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
    if request.fault == "clear":
        _clear(exchange)
        return
    venue = next((venue for kind, venue in exchange.venues.items() if kind == request.market), None)
    if venue is None:
        raise UnknownFaultError(f"{request.fault}: market {request.market} is not simulated here")
    if request.fault in ("drop", "duplicate", "reorder", "hole", "pause"):
        code = venue.market.code(request.symbol)
        if code is None:
            raise UnknownFaultError(f"{request.fault}: symbol {request.symbol} is not listed on {request.market}")
        _on_symbol(request, venue, code)
    elif request.fault == "rate_limit":
        venue.limit.force(request.status, wall_ms + int(request.seconds * 1_000))
    elif request.fault == "skew":
        exchange.skew_ms = request.milliseconds
    else:
        _on_connections(request, connections)


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


def _on_connections(request: FaultRequest, connections: Sequence[Peer]) -> None:
    chosen = [peer for peer in connections if peer.kind == request.market and not peer.half_open]
    if request.fault == "malformed":
        for peer in chosen:
            peer.write(frame(request.text.encode()) * request.count)
        return
    for peer in chosen[: request.connections or None]:
        if request.fault == "half_open":
            peer.half_open = True
        elif request.fault == "close":
            peer.abort()
        else:
            peer.close(1001, "connection is valid for 24 hours")


def _clear(exchange: Exchange) -> None:
    exchange.skew_ms = 0
    for venue in exchange.venues.values():
        venue.faults.clear()
        venue.limit.clear()
        for code in np.flatnonzero(venue.market.paused).tolist():
            venue.resume(code)
