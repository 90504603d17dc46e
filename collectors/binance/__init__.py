"""Binance spot and USD-M futures: wire messages, the pure mapper, URLs and subscriptions, REST, and the collector over them."""
