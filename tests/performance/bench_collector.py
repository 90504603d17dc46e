"""Exchange frame -> columnar row, beside a bare msgspec decode and cryptofeed's Binance handler, on recorded messages and one core.

All take the same messages: recorded single trades of Binance in the form of aggregate trades (cryptofeed reads no others), spread over
300 symbols. ``bare decode`` is msgspec into a struct of the documented fields, the result kept; ``mapper`` ends with checked numpy columns;
``pipeline`` starts at the socket's bytes and ends with frames that are ready for Kafka: WebSocket frames split, duplicates and gaps looked for,
silence and watermarks kept, rows sorted into partitions. ``socket`` is the same through a real socket, per second of CPU.
"""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from collectors.batcher import Batcher, BatcherConfig
from collectors.binance.mapper import BinanceMapper
from collectors.connection import open_connection
from collectors.dedupe import Sequencer
from collectors.pipeline import Pipeline
from collectors.reader import FrameReader
from collectors.stale import StaleDetector
from collectors.stats import FeedStats
from collectors.watermark import Watermark
from collectors.wire import TRADE_DTYPES
from infra.cli.bench import PEER_PYTHON
from infra.seam import SystemClock
from tests.performance.captures import FILES, FOLDER, NoCapturesError
from tests.performance.statistics import ratio, summary

ROUNDS = int(os.environ.get("MARKETSTREAM_BENCH_ROUNDS", "5"))
SYMBOLS = 300
TRADES = 100_000
BATCH = 500
"""Messages a round of the mapper: what 50,000 trades a second give in a linger of 10 ms."""
CHUNK = 64 * 1024
SOCKET_TRADES = 600_000


class Documented(msgspec.Struct, tag_field="e", tag="aggTrade", gc=False):
    """The fields of an aggregate trade as the venue documents them."""

    E: int
    s: str
    a: int
    p: str
    q: str
    f: int
    l: int  # noqa: E741
    T: int
    m: bool


class Envelope(msgspec.Struct, gc=False):
    """A combined-stream message."""

    stream: str
    data: Documented


def messages() -> list[bytes]:
    """TRADES aggregate trades of SYMBOLS symbols, ids consecutive per symbol, times rising; prices and sizes are recorded ones."""
    path = FOLDER / FILES[0][1]
    if not path.is_file():
        raise NoCapturesError(f"the recorded capture {path.name} is not here; set MARKETSTREAM_RECORDED_DATA.")
    with gzip.open(path) as stream:
        trades = [json.loads(line.partition(b" ")[2])["data"] for line in stream if b"@trade" in line]
    found, start = [], trades[0]["T"]
    for number in range(TRADES):
        trade, symbol = trades[number % len(trades)], f"s{number % SYMBOLS:03d}usdt"
        at = start + number // 50
        found.append(
            f'{{"stream":"{symbol}@aggTrade","data":{{"e":"aggTrade","E":{at + 1},"s":"{symbol.upper()}","a":{number // SYMBOLS},'
            f'"p":"{trade["p"]}","q":"{trade["q"]}","f":{number},"l":{number},"T":{at},"m":{str(trade["m"]).lower()},"M":true}}}}'.encode()
        )
    return found


def websocket_bytes(payloads: list[bytes]) -> bytes:
    """The messages as a server's frames."""
    return b"".join(b"\x81" + (bytes([len(p)]) if len(p) < 126 else b"\x7e" + len(p).to_bytes(2, "big")) + p for p in payloads)


def timed(work: Callable[[], object]) -> float:
    """Seconds of CPU."""
    gc.collect()
    begin = time.process_time()
    work()
    return time.process_time() - begin


def bare(payloads: list[bytes]) -> None:
    """One msgspec call a message, batch by batch; results kept until the batch is done, as ours are."""
    decode = msgspec.json.Decoder(Envelope).decode
    for start in range(0, len(payloads), BATCH):
        [decode(payload) for payload in payloads[start : start + BATCH]]


def new_mapper() -> BinanceMapper:
    """A mapper that knows the symbols."""
    mapper = BinanceMapper("aggTrade")
    for code in range(SYMBOLS):
        mapper.bind(f"s{code:03d}usdt@aggTrade", code)
    return mapper


def mapped(payloads: list[bytes]) -> None:
    """Our mapper."""
    mapper, rows = new_mapper(), 0
    for start in range(0, len(payloads), BATCH):
        rows += mapper.parse(payloads[start : start + BATCH]).row_count
    if rows != len(payloads):
        raise AssertionError(f"{rows} rows of {len(payloads)} messages")


class NoLetters:
    """Nothing may be rejected here."""

    def put(self, **letter: Any) -> None:
        """See DeadLetters.put."""
        raise AssertionError(letter)


def new_pipeline() -> Pipeline:
    """A shard's pipeline that knows the symbols."""

    def refuse(found: object) -> None:
        raise AssertionError(found)

    pipeline = Pipeline(
        exchange="binance",
        mapper=new_mapper(),
        sequencer=Sequencer(consecutive=True),
        watermark=Watermark(),
        batcher=Batcher("binance/ws/0", TRADE_DTYPES, BatcherConfig()),
        stale=StaleDetector(),
        dead_letters=NoLetters(),
        stats=FeedStats(),
        on_reply=refuse,
        on_gap=refuse,
    )
    for code in range(SYMBOLS):
        pipeline.add_symbol(f"binance:S{code:03d}-USDT", f"s{code:03d}usdt@aggTrade", 0)
    return pipeline


def piped(data: bytes) -> int:
    """Reader and pipeline over the socket's bytes; rows."""
    pipeline, reader, now = new_pipeline(), FrameReader(), 0
    for start in range(0, len(data), CHUNK):
        reader.feed(data[start : start + CHUNK])
        pipeline.receive(reader.messages, now)
        reader.clear()
        now += 10_000
        pipeline.take(now, now - 10_000)
    return pipeline.stats.trades


def _serve(data: bytes, trades: int, port: Any) -> None:
    """A server that sends ``data`` again and again until ``trades`` trades are out."""
    from websockets.asyncio.server import ServerConnection, serve

    async def send(connection: ServerConnection) -> None:
        for _ in range(trades // TRADES):
            connection.transport.write(data)
            await connection.drain()
            await asyncio.sleep(0)
        await asyncio.sleep(30)

    async def main() -> None:
        async with serve(send, "127.0.0.1", 0, compression=None) as server:
            port.put(server.sockets[0].getsockname()[1])
            await asyncio.sleep(600)

    asyncio.run(main())


async def _receive(port: int) -> float:
    """Seconds of CPU for SOCKET_TRADES trades through a socket, the reader, and the pipeline."""
    clock, pipeline, received = SystemClock(), new_pipeline(), 0
    pipeline.sequencer = Sequencer(consecutive=False)  # the same ids come again each time the server starts over
    for code in range(SYMBOLS):
        pipeline.sequencer.add(code)
    done = asyncio.Event()

    def take(found: list[bytes]) -> None:
        nonlocal received
        received += len(found)
        pipeline.receive(found, clock.now_us())
        if received >= SOCKET_TRADES:
            done.set()

    begin = time.process_time()
    connection = await open_connection(f"ws://127.0.0.1:{port}", clock=clock, on_messages=take, on_oversized=lambda head, size: None)
    previous = clock.monotonic_us()
    while not done.is_set():
        await asyncio.sleep(pipeline.batcher.linger_us / 1e6)
        now = clock.monotonic_us()
        pipeline.take(now, previous)
        previous = now
    used = time.process_time() - begin
    connection.cut()
    await connection.closed
    return used


def cryptofeed_seconds(payloads: list[bytes], folder: Path) -> float:
    """Its handler over the same messages, in its own environment."""
    source = folder / "messages.jsonl"
    if not source.exists():
        source.write_bytes(b"\n".join(payloads))
    script = Path(__file__).parent / "peers" / "cryptofeed_binance.py"
    done = subprocess.run([str(PEER_PYTHON), str(script), str(source)], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"the cryptofeed peer failed: {done.stderr[-1000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def run() -> dict[str, Any]:
    """Rounds of all, interleaved; ns a trade, trades a second, and ratios."""
    payloads = messages()
    data = websocket_bytes(payloads)
    mapped(payloads[:BATCH])  # load the compiled reader
    peer = PEER_PYTHON.is_file()
    notes = [] if peer else ["cryptofeed is left out: its environment is not set up (`make bench` does it)."]
    spent: dict[str, list[float]] = {name: [] for name in ("bare decode", "mapper", "pipeline", *(["cryptofeed"] if peer else []))}
    rates: list[float] = []
    context = multiprocessing.get_context("spawn")
    ports = context.Queue()
    server = context.Process(target=_serve, args=(data, SOCKET_TRADES, ports), daemon=True)
    server.start()
    port = ports.get(timeout=30)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(ROUNDS):
                spent["bare decode"].append(timed(lambda: bare(payloads)))
                spent["mapper"].append(timed(lambda: mapped(payloads)))
                spent["pipeline"].append(timed(lambda: piped(data)))
                rates.append(SOCKET_TRADES / asyncio.run(_receive(port)))
                if peer:
                    spent["cryptofeed"].append(cryptofeed_seconds(payloads, Path(folder)))
    finally:
        server.terminate()
        server.join()
    per_trade = {name: [seconds / TRADES * 1e9 for seconds in rounds] for name, rounds in spent.items()}
    figures = summary(per_trade, "ns a trade") | summary({"socket to frames": rates}, "trades a second of CPU")
    ratios = {
        "mapper / bare decode": ratio(spent["mapper"], spent["bare decode"]),
        "pipeline / bare decode": ratio(spent["pipeline"], spent["bare decode"]),
    }
    if peer:
        ratios["cryptofeed / mapper"] = ratio(spent["cryptofeed"], spent["mapper"])
    return {"figures": figures, "ratios": ratios, "notes": notes}


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
