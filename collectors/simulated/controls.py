"""The exchange's own routes: status, faults, rate and ground truth under ``/sim``, and health.

==========================  =========================================================================================
``GET /sim/status``         time, rates, connections, faults and the ids they touched
``POST /sim/faults``        begin a fault (:mod:`collectors.simulated.faults`); ``{"fault": "clear"}`` ends all
``POST /sim/script``        begin a timed sequence of faults (:mod:`collectors.simulated.scripts`)
``POST /sim/rate``          ``{"rate": 5000, "market": "spot"}``: trades a second from now on
``GET /sim/truth``          ``symbol``, ``from``, ``to`` (ids, [from, to)), ``market``: the trades the market made, as columns
``GET /livez``, ``/readyz``  200 while it runs; readyz is 503 once ``max_trades`` are made
``GET /metrics``            Prometheus text
==========================  =========================================================================================
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from collectors.simulated.errors import SimulationConfigError, UnknownFaultError
from collectors.simulated.http import Request, Response, as_json

if TYPE_CHECKING:
    from collectors.simulated.exchange import Venue
    from collectors.simulated.server import SimulatedExchange


def answer(exchange: SimulatedExchange, request: Request) -> Response | None:
    """The reply to one of these routes; None for any other path.

    Raises:
        UnknownFaultError, SimulationConfigError: the request asks for something that does not exist; a 400.
    """
    route = (request.method, request.path)
    if route == ("GET", "/sim/status"):
        return as_json(exchange.status())
    if route == ("POST", "/sim/faults"):
        return as_json(exchange.inject(_body(request)).describe())
    if route == ("POST", "/sim/script"):
        return as_json(exchange.play_json(_body(request)).describe())
    if route == ("POST", "/sim/rate"):
        return _rate(exchange, _body(request))
    if route == ("GET", "/sim/truth"):
        return _truth(exchange, request)
    if route == ("GET", "/livez"):
        return as_json({"status": "ok"})
    if route == ("GET", "/readyz"):
        return _readiness(exchange)
    if route == ("GET", "/metrics"):
        return Response(body=_metrics(exchange), content_type="text/plain; version=0.0.4")
    return None


def _readiness(exchange: SimulatedExchange) -> Response:
    if exchange.failure is not None:
        return as_json({"status": "failed", "reasons": [f"the market stopped: {exchange.failure}"]}, status=503)
    if exchange.finished.is_set():
        return as_json({"status": "finished", "reasons": ["max_trades were made"]}, status=503)
    return as_json({"status": "ok", "reasons": []})


def _body(request: Request) -> Any:
    try:
        return json.loads(request.body)
    except (ValueError, RecursionError) as error:
        raise UnknownFaultError(f"the body is no JSON: {error}") from error


def _venue(exchange: SimulatedExchange, name: Any) -> Venue:
    venues: dict[Any, Venue] = {**exchange.exchange.venues}
    if name not in venues:
        raise SimulationConfigError(f"market={name!r} is not simulated here; markets: {', '.join(venues)}")
    return venues[name]


def _rate(exchange: SimulatedExchange, body: Any) -> Response:
    rate = body.get("rate") if isinstance(body, dict) else None
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise SimulationConfigError('send {"rate": <trades a second>, "market": "spot"}')
    venue = _venue(exchange, body.get("market", "spot"))
    venue.market.set_rate(float(rate))
    return as_json({"rate": venue.market.rate})


def _truth(exchange: SimulatedExchange, request: Request) -> Response:
    venue = _venue(exchange, request.params.get("market", "spot"))
    symbol = request.params.get("symbol", "").upper()
    code = venue.market.code(symbol)
    if code is None:
        raise SimulationConfigError(f"symbol={symbol!r} is not listed")
    bounds = []
    for name in ("from", "to"):
        text = request.params.get(name)
        if text is not None and not text.isdecimal():
            raise SimulationConfigError(f"{name}={text!r} must be a trade id")
        bounds.append(None if text is None else int(text))
    trades = venue.ring.of_symbol(code)
    first = 0 if bounds[0] is None else int(trades.trade_id.searchsorted(bounds[0]))
    last = len(trades) if bounds[1] is None else int(trades.trade_id.searchsorted(bounds[1]))
    trades = trades.cut(first, max(first, last))
    wire = venue.wire
    return as_json(
        {
            "symbol": symbol,
            "id": trades.trade_id.tolist(),
            "price": [wire.price(code, price) for price in trades.price.tolist()],
            "qty": [wire.size(code, size) for size in trades.size.tolist()],
            "time": trades.time_ms.tolist(),
            "isBuyerMaker": trades.buyer_is_maker.tolist(),
            "aggId": trades.agg_id.tolist(),
        }
    )


def _metrics(exchange: SimulatedExchange) -> str:
    status = exchange.status()
    lines = [f"simulated_exchange_connections {status['connections']}", f"simulated_exchange_skipped_ms {status['skipped_ms']}"]
    for kind, market in status["markets"].items():
        lines += [f'simulated_exchange_{name}{{market="{kind}"}} {market[name]}' for name in ("trades", "messages_sent", "rate")]
    return "\n".join(lines) + "\n"
