"""REST body of ``exchangeInfo``: what is listed, with tick and lot sizes. JSON text out."""

from __future__ import annotations

import json
from typing import Any

from collectors.simulated.exchange import Venue

ONBOARD_MS = 1_569_398_400_000
DELIVERY_MS = 4_133_404_800_000
"""Perpetuals carry this delivery date (25 December 2100)."""


def exchange_info(venue: Venue, codes: list[int] | None, now_ms: int) -> str:
    """The body of ``exchangeInfo``; ``codes``: only these symbols, None: all."""
    wanted = range(len(venue.wire.universe)) if codes is None else codes
    if venue.wire.spot:
        info: dict[str, Any] = {
            "timezone": "UTC",
            "serverTime": now_ms,
            "rateLimits": [
                _limit("REQUEST_WEIGHT", "MINUTE", 1, venue.limit.limit),
                _limit("ORDERS", "SECOND", 10, 100),
                _limit("ORDERS", "DAY", 1, 200_000),
                _limit("RAW_REQUESTS", "MINUTE", 5, 61_000),
            ],
            "exchangeFilters": [],
            "symbols": [_spot_symbol(venue, code) for code in wanted],
        }
    else:
        info = {
            "timezone": "UTC",
            "serverTime": now_ms,
            "futuresType": "U_MARGINED",
            "rateLimits": [_limit("REQUEST_WEIGHT", "MINUTE", 1, venue.limit.limit), _limit("ORDERS", "MINUTE", 1, 1_200)],
            "exchangeFilters": [],
            "assets": [{"asset": "USDT", "marginAvailable": True, "autoAssetExchange": "-10000"}],
            "symbols": [_perpetual(venue, code) for code in wanted],
        }
    return json.dumps(info, separators=(",", ":"))


def _limit(kind: str, interval: str, count: int, limit: int) -> dict[str, Any]:
    return {"rateLimitType": kind, "interval": interval, "intervalNum": count, "limit": limit}


def _spot_symbol(venue: Venue, code: int) -> dict[str, Any]:
    wire = venue.wire
    return {
        "symbol": wire.universe.symbols[code],
        "status": "TRADING",
        "baseAsset": wire.universe.bases[code],
        "baseAssetPrecision": 8,
        "quoteAsset": "USDT",
        "quotePrecision": 8,
        "quoteAssetPrecision": 8,
        "baseCommissionPrecision": 8,
        "quoteCommissionPrecision": 8,
        "orderTypes": ["LIMIT", "LIMIT_MAKER", "MARKET", "STOP_LOSS", "STOP_LOSS_LIMIT", "TAKE_PROFIT", "TAKE_PROFIT_LIMIT"],
        "icebergAllowed": True,
        "ocoAllowed": True,
        "otoAllowed": True,
        "quoteOrderQtyMarketAllowed": True,
        "allowTrailingStop": True,
        "cancelReplaceAllowed": True,
        "amendAllowed": True,
        "isSpotTradingAllowed": True,
        "isMarginTradingAllowed": True,
        "filters": [
            {
                "filterType": "PRICE_FILTER",
                "minPrice": wire.price(code, 1),
                "maxPrice": "1000000.00000000",
                "tickSize": wire.price(code, 1),
            },
            {"filterType": "LOT_SIZE", "minQty": wire.size(code, 1), "maxQty": "9000000.00000000", "stepSize": wire.size(code, 1)},
            {"filterType": "ICEBERG_PARTS", "limit": 10},
            {"filterType": "MAX_NUM_ORDERS", "maxNumOrders": 200},
        ],
        "permissions": [],
        "permissionSets": [["SPOT", "MARGIN"]],
        "defaultSelfTradePreventionMode": "EXPIRE_MAKER",
        "allowedSelfTradePreventionModes": ["EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH", "DECREMENT"],
    }


def _perpetual(venue: Venue, code: int) -> dict[str, Any]:
    wire, universe = venue.wire, venue.wire.universe
    tick, step = wire.price(code, int(universe.tick_units[code])), wire.size(code, 1)
    return {
        "symbol": universe.symbols[code],
        "pair": universe.symbols[code],
        "contractType": "PERPETUAL",
        "deliveryDate": DELIVERY_MS,
        "onboardDate": ONBOARD_MS,
        "status": "TRADING",
        "maintMarginPercent": "2.5000",
        "requiredMarginPercent": "5.0000",
        "baseAsset": universe.bases[code],
        "quoteAsset": "USDT",
        "marginAsset": "USDT",
        "pricePrecision": wire.price_places[code],
        "quantityPrecision": wire.size_places[code],
        "baseAssetPrecision": 8,
        "quotePrecision": 8,
        "underlyingType": "COIN",
        "underlyingSubType": [],
        "triggerProtect": "0.0500",
        "liquidationFee": "0.012500",
        "marketTakeBound": "0.05",
        "maxMoveOrderLimit": 10_000,
        "filters": [
            {"filterType": "PRICE_FILTER", "minPrice": tick, "maxPrice": "4529764", "tickSize": tick},
            {"filterType": "LOT_SIZE", "minQty": step, "maxQty": "1000000", "stepSize": step},
            {"filterType": "MARKET_LOT_SIZE", "minQty": step, "maxQty": "1000000", "stepSize": step},
            {"filterType": "MAX_NUM_ORDERS", "limit": 200},
            {"filterType": "MIN_NOTIONAL", "notional": "5"},
        ],
        "orderTypes": ["LIMIT", "MARKET", "STOP", "STOP_MARKET", "TAKE_PROFIT", "TAKE_PROFIT_MARKET", "TRAILING_STOP_MARKET"],
        "timeInForce": ["GTC", "IOC", "FOK", "GTX", "GTD"],
    }
