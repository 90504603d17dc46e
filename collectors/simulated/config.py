"""How the server behaves towards connections; what it simulates is :class:`~collectors.simulated.exchange.ExchangeConfig`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from collectors.simulated.errors import SimulationConfigError
from collectors.simulated.exchange import ExchangeConfig


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """One simulated exchange on one port.

    Attributes:
        exchange: the markets.
        host: a loopback address; nothing else is accepted, the exchange has no authentication.
        port: TCP port; 0: one the system gives.
        ping_interval_s: between server pings (Binance spot: 20 s; USD-M: 3 min, not told apart here).
        pong_timeout_s: a client that owes a pong this long is dropped (Binance: a minute).
        max_connection_s: life of a connection (Binance: 24 h).
        max_messages_a_second: incoming messages, pings and pongs included, per spot connection (Binance: 5); USD-M takes
            twice as many.
        max_buffer_bytes: unsent bytes per connection before a slow client is dropped; 16 MiB are 90,000 trades.
        max_connections: open sockets of all kinds.
        pace: trade in step with the clock; False: only :meth:`SimulatedExchange.advance` moves time.
        certificate: PEM file; the exchange then speaks TLS only.
        key: its private key, where the certificate's file has none.
        track_sent: remember every trade id written to a connection (:meth:`SimulatedExchange.sent_ids`); grows without bound, for tests.
    """

    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    host: str = "127.0.0.1"
    port: int = 0
    ping_interval_s: float = 20.0
    pong_timeout_s: float = 60.0
    max_connection_s: float = 86_400.0
    max_messages_a_second: int = 5
    max_buffer_bytes: int = 16 * 1024 * 1024
    max_connections: int = 1_000
    pace: bool = True
    certificate: Path | None = None
    key: Path | None = None
    track_sent: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be run, naming it."""
        try:
            loopback = ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            loopback = self.host == "localhost"
        if not loopback:
            raise SimulationConfigError(f"host={self.host}: the simulated exchange listens on loopback only; use 127.0.0.1")
        if not 0 <= self.port <= 65_535:
            raise SimulationConfigError(f"port={self.port}: must be within 0..65535")
        for name in (
            "ping_interval_s",
            "pong_timeout_s",
            "max_connection_s",
            "max_messages_a_second",
            "max_buffer_bytes",
            "max_connections",
        ):
            if getattr(self, name) <= 0:
                raise SimulationConfigError(f"{name}={getattr(self, name)}: must be positive")
