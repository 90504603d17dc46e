"""Where a venue that we collect gives a sign of life."""

from __future__ import annotations

_PING = {
    "binance": ("https://api.binance.com", "/api/v3/ping"),
    "binance-usdm": ("https://fapi.binance.com", "/fapi/v1/ping"),
}


def ping_url(exchange: str, rest_url: str = "") -> str | None:
    """The cheapest REST call of a venue, at ``rest_url`` where one is set; None for a venue without a collector."""
    known = _PING.get(exchange)
    return None if known is None else (rest_url.rstrip("/") or known[0]) + known[1]
