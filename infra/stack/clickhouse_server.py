"""``python -m infra.stack.clickhouse_server``: the ClickHouse engine on a folder, served over HTTP on loopback until SIGTERM.

Reads ``MARKETSTREAM_*`` settings; ``--path`` and ``--port`` override. Exit codes: 0 stopped, 2 settings, 3 port in use, 4 folder in use
by another process or broken.
"""

from __future__ import annotations

import argparse
import errno
import logging
import signal
import sys
import threading
from pathlib import Path

from infra.errors import MarketstreamError, PortInUseError
from infra.settings import Settings, load_settings
from infra.stack.clickhouse_engine import Engine
from infra.stack.clickhouse_http import ClickHouseServer

logger = logging.getLogger(__name__)


def build(settings: Settings, path: Path, port: int) -> tuple[Engine, ClickHouseServer]:
    """The opened engine and its listening server, not yet serving.

    Raises:
        DataDirError: the folder is in use or broken.
        PortInUseError: the port is taken.
    """
    options = settings.clickhouse
    engine = Engine(path, memory_bytes=options.memory_mb * 1024 * 1024, threads=options.threads)
    try:
        server = ClickHouseServer(
            engine,
            ("127.0.0.1", port),
            user=options.user,
            password=options.password,
            max_body_bytes=options.max_body_mb * 1024 * 1024,
        )
    except OSError as exc:
        engine.close()
        if exc.errno == errno.EADDRINUSE:
            raise PortInUseError(f"port {port} is in use; set MARKETSTREAM_PORT_CLICKHOUSE to a free one", port=port) from exc
        raise
    return engine, server


def serve(settings: Settings, path: Path, port: int) -> None:
    """Serves until SIGTERM or SIGINT; running statements are given up, which loses nothing that was acknowledged."""
    engine, server = build(settings, path, port)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown, daemon=True).start())
    logger.info("ClickHouse engine %s serves %s on port %s", engine.version, path, server.server_address[1])
    server.serve_forever(poll_interval=0.25)  # bounds how late a shutdown is noticed; four wake-ups a second cost 0.03 % of a core
    server.server_close()
    engine.close()


def main(argv: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m infra.stack.clickhouse_server", description=__doc__)
    parser.add_argument("--path", type=Path, help="data folder (default: clickhouse in the data folder)")
    parser.add_argument("--port", type=int, help="port (default: from the settings)")
    options = parser.parse_args(argv)
    try:
        settings = load_settings()
        logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        serve(settings, options.path or settings.data_dir / "clickhouse", options.port or settings.ports.clickhouse)
    except MarketstreamError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
