"""Entry point of the simulated exchange: arguments in, a running server out.

``python -m infra.simulated_exchange --port 0 --symbols 300 --rate 2000 --seed 1``. Prints one line of JSON with its addresses once it is ready,
and stops on SIGINT or SIGTERM, or by itself after ``--max-trades``. Exit codes: 0 stopped as asked, 2 a setting that cannot be used.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from collectors.simulated.config import ServerConfig
from collectors.simulated.errors import SimulationError
from collectors.simulated.exchange import ExchangeConfig
from collectors.simulated.regimes import MarketConfig
from collectors.simulated.scripts import Script, read_script
from collectors.simulated.server import serve
from infra.seam import SystemClock

EXIT_SETTINGS = 2

logger = logging.getLogger("simulated_exchange")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="simulated_exchange", description="A seeded market on Binance's wire format, on loopback.")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="loopback address to listen on")
    add("--port", type=int, default=0, help="port; 0: one the system gives (it is printed)")
    add("--health", type=int, default=None, metavar="PORT", help="also answer /livez and /readyz on this port")
    add("--symbols", type=int, default=300, help="spot symbols listed")
    add("--rate", type=float, default=2_000.0, help="spot trades a second over all symbols, long-run")
    add("--usdm-symbols", type=int, default=30, help="perpetuals listed; 0: no USD-M market")
    add("--usdm-rate", type=float, default=200.0, help="perpetual trades a second over all symbols")
    add("--seed", type=int, default=1, help="same seed, same market")
    add("--step-ms", type=int, default=40, help="resolution of generation; a trade reaches the wire at most this late")
    add("--history", type=int, default=500_000, help="trades kept per market for REST and /sim/truth")
    add("--warmup-s", type=float, default=30.0, help="market time traded before the start")
    add("--max-trades", type=int, default=None, help="stop after this many trades per market")
    add("--linger-s", type=float, default=5.0, help="keep serving this long after --max-trades")
    add("--max-connection-s", type=float, default=86_400.0, help="life of a WebSocket (Binance: 24 h)")
    add("--weight-limit", type=int, default=None, help="REST request weight a minute; default: Binance's (6,000 spot, 2,400 USD-M)")
    add("--script", type=Path, default=None, help='JSON file with faults and when they begin, e.g. [{"at_s": 2, "fault": "close"}]')
    add("--certificate", type=Path, default=None, help="PEM file; the exchange then speaks TLS only")
    add("--key", type=Path, default=None, help="PEM file of the certificate's private key")
    add("--ready-file", type=Path, default=None, help="write the JSON line with the addresses there, too")
    add("--log-level", default="WARNING", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    return parser


def build_config(arguments: argparse.Namespace) -> ServerConfig:
    """The server's config from the command line.

    Raises:
        SimulationConfigError: a value is out of range.
    """
    usdm = None
    if arguments.usdm_symbols:
        symbols = min(arguments.usdm_symbols, arguments.symbols)
        usdm = MarketConfig(kind="usdm", symbols=symbols, rate=arguments.usdm_rate, seed=arguments.seed, step_ms=arguments.step_ms)
    spot = MarketConfig(symbols=arguments.symbols, rate=arguments.rate, seed=arguments.seed, step_ms=arguments.step_ms)
    exchange = ExchangeConfig(
        spot=spot,
        usdm=usdm,
        history=arguments.history,
        warmup_s=arguments.warmup_s,
        max_trades=arguments.max_trades,
        weight_limit=arguments.weight_limit,
    )
    return ServerConfig(
        exchange=exchange,
        host=arguments.host,
        port=arguments.port,
        max_connection_s=arguments.max_connection_s,
        certificate=arguments.certificate,
        key=arguments.key,
    )


async def run(
    config: ServerConfig, *, health_port: int | None, ready_file: Path | None, linger_s: float, script: Script | None = None
) -> None:
    """Serve, playing ``script``, until a signal comes or ``max_trades`` are made and ``linger_s`` have passed."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with serve(config, SystemClock(), extra_port=health_port) as exchange:
        if script is not None:
            exchange.play(script)
        ready = json.dumps({"rest_url": exchange.rest_url, "ws_url": exchange.ws_url, "usdm_ws_url": exchange.usdm_ws_url})
        if ready_file is not None:
            ready_file.write_text(ready + "\n", encoding="utf-8")
        print(ready, flush=True)
        finished = asyncio.create_task(exchange.finished.wait())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((finished, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), linger_s)
        for task in (finished, stopping):
            task.cancel()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the simulated exchange; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=arguments.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        config = build_config(arguments)
        script = read_script(arguments.script) if arguments.script is not None else None
        uvloop.run(run(config, health_port=arguments.health, ready_file=arguments.ready_file, linger_s=arguments.linger_s, script=script))
    except SimulationError as error:
        print(f"simulated exchange: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    return 0


if __name__ == "__main__":
    sys.exit(main())
