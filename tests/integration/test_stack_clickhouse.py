"""The ClickHouse engine behind its HTTP interface, through unmodified clickhouse-connect and by hand."""

from __future__ import annotations

import asyncio
import datetime
import gzip
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import clickhouse_connect
import lz4.frame
import numpy as np
import pyarrow as pa
import pytest
from clickhouse_connect.driver.exceptions import DatabaseError, StreamFailureError

from infra.stack.kafka import free_ports
from infra.stack.spec import probe
from tests.integration.conftest import RunningStack

ROWS = 10_000
NAMES = ["exchange", "symbol", "trade_id", "price", "time"]


@pytest.fixture(scope="module")
def port(stack: RunningStack) -> int:
    """Where the engine listens."""
    return stack.settings.ports.clickhouse


@pytest.fixture
def client(port: int) -> Iterator[clickhouse_connect.driver.Client]:
    """An unmodified synchronous client on a database of the test's own."""
    name = f"t{uuid.uuid4().hex[:8]}"
    with clickhouse_connect.get_client(host="127.0.0.1", port=port) as root:
        root.command(f"CREATE DATABASE {name}")
    connected = clickhouse_connect.get_client(host="127.0.0.1", port=port, database=name)
    connected.command(
        "CREATE TABLE t (exchange LowCardinality(String), symbol LowCardinality(String), trade_id Int64, price Float64, time DateTime64(6, 'UTC')) "
        "ENGINE = MergeTree ORDER BY (symbol, trade_id) SETTINGS non_replicated_deduplication_window = 100"
    )
    yield connected
    connected.command(f"DROP DATABASE {name}")
    connected.close()


def _arrow(first: int = 0, rows: int = ROWS) -> pa.Table:
    ids = np.arange(first, first + rows)
    return pa.table(
        {
            "exchange": pa.array(["binance"] * rows).dictionary_encode(),
            "symbol": pa.array([f"S{each % 50}-USDT" for each in ids]).dictionary_encode(),
            "trade_id": ids,
            "price": ids / 7,
            "time": pa.array(ids * 1000 + 1_700_000_000_000_000, pa.timestamp("us", "UTC")),
        }
    )


def _post(port: int, body: bytes, path: str = "/", **headers: str) -> tuple[int, dict[str, str], bytes]:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        link.request("POST", path, body=body, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = link.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        link.close()


def test_rows_come_back_as_they_went_in_by_every_road(client: clickhouse_connect.driver.Client) -> None:
    """Arrow in, numpy columns in; Arrow, numpy, streams and rows out."""
    table = _arrow()
    summary = client.insert_arrow("t", table)
    assert summary.written_rows == ROWS
    columns = [np.array(["binance"] * 5, dtype=object), np.array(["X-USDT"] * 5, dtype=object), np.arange(5), np.arange(5) / 3]
    client.insert("t", [*columns, [datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)] * 5], column_names=NAMES, column_oriented=True)
    back = client.query_arrow("SELECT * FROM t WHERE symbol != 'X-USDT' ORDER BY trade_id", use_strings=True)
    assert back["trade_id"].to_pylist() == table["trade_id"].to_pylist() and back["price"].to_pylist() == table["price"].to_pylist()
    assert np.array_equal(client.query_np("SELECT price FROM t WHERE symbol = 'X-USDT' ORDER BY trade_id").ravel(), np.arange(5) / 3)
    with client.query_arrow_stream("SELECT trade_id, symbol FROM t WHERE symbol != 'X-USDT'") as batches:
        assert sorted(each for batch in batches for each in batch["trade_id"].to_pylist()) == list(range(ROWS))
    with client.query_row_block_stream("SELECT trade_id FROM t WHERE symbol = 'X-USDT'") as blocks:
        assert sorted(row[0] for block in blocks for row in block) == list(range(5))


def test_a_result_of_many_chunks_is_one_arrow_stream(client: clickhouse_connect.driver.Client) -> None:
    """The engine's chunks are spliced: dictionaries and 1 M rows arrive whole."""
    with client.query_arrow_stream("SELECT number, toLowCardinality(toString(number % 100)) AS s FROM numbers(1000000)") as batches:
        rows = numbers = 0
        for batch in batches:
            rows += batch.num_rows
            numbers += pa.compute.sum(batch["number"]).as_py()
    assert (rows, numbers) == (1_000_000, 999_999 * 1_000_000 // 2)


def test_parameters_of_all_kinds_are_bound_on_the_server(client: clickhouse_connect.driver.Client) -> None:
    """Quotes, tabs, arrays and times arrive unchanged."""
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5, 678901)  # noqa: DTZ001 - the column has no zone either
    values = {"a": ["it's", "b\\c"], "s": "tab\tline\n'quote'", "d": moment, "n": None, "i": -5}
    query = "SELECT {a:Array(String)}, {s:String}, {d:DateTime64(6)}, {n:Nullable(Int32)}, {i:Int64}"
    assert client.query(query, parameters=values).result_rows[0] == (values["a"], values["s"], moment, None, -5)


def test_a_repeated_insert_with_its_token_is_stored_once(client: clickhouse_connect.driver.Client) -> None:
    """What the sink relies on after a crash; settings of one request do not reach the next."""
    for token, rows in (("a", ROWS), ("a", ROWS), ("b", 2 * ROWS)):
        client.insert_arrow("t", _arrow(), settings={"insert_deduplication_token": token})
        assert client.command("SELECT count() FROM t") == rows
    assert client.command("SELECT getSetting('insert_deduplication_token')") == ""


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("SELEC 1", 62),
        ("SELECT * FROM nowhere", 60),
        ("SELECT 1; SELECT 2", 62),
        ("SELECT throwIf(number = 900000) FROM numbers(1000000)", 395),
    ],
)
def test_errors_are_database_errors_with_clickhouses_code(client: clickhouse_connect.driver.Client, query: str, code: int) -> None:
    """Before the first row and in the middle of a result."""
    with pytest.raises((DatabaseError, StreamFailureError), match=f"(?i)code: {code}"):
        assert client.query(query).result_rows
    assert client.command("SELECT 1") == 1


async def test_the_async_client_works_and_twenty_queries_run_at_once(port: int, client: clickhouse_connect.driver.Client) -> None:
    """Insert, query, concurrency and errors through the asynchronous client."""
    connected = await clickhouse_connect.get_async_client(host="127.0.0.1", port=port, database=client.database)
    try:
        await connected.insert_arrow("t", _arrow())
        results = await asyncio.gather(*(connected.query("SELECT count() FROM t") for _ in range(20)))
        assert {result.result_rows[0][0] for result in results} == {ROWS}
        with pytest.raises(DatabaseError):
            await connected.query("SELECT nope")
    finally:
        await connected.close()


def test_reads_do_not_wait_behind_inserts(client: clickhouse_connect.driver.Client, port: int) -> None:
    """While one client inserts without pause, another is answered again and again between two of its inserts."""
    table, done, slowest = _arrow(rows=100_000), threading.Event(), 0.0
    inserted = 0

    def write() -> None:
        nonlocal inserted
        with clickhouse_connect.get_client(host="127.0.0.1", port=port, database=client.database) as writer:
            while not done.is_set():
                writer.insert_arrow("t", table, settings={"insert_deduplication_token": uuid.uuid4().hex})
                inserted += 1

    thread = threading.Thread(target=write)
    thread.start()
    reads = 0
    while inserted < 8:
        began = time.perf_counter()
        client.query("SELECT 1")
        slowest = max(slowest, time.perf_counter() - began)
        reads += 1
    done.set()
    thread.join()
    assert reads > 8, f"only {reads} reads in 8 inserts"


def test_by_hand_get_post_ping_formats_and_headers(port: int) -> None:
    """What curl, Grafana and other drivers use."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    for path, expected in (("/ping", b"Ok.\n"), ("/replicas_status", b"Ok.\n"), ("/?query=SELECT%201%20FORMAT%20TSV", b"1\n")):
        link.request("GET", path)
        response = link.getresponse()
        assert (response.status, response.read()) == (200, expected)
    link.close()
    status, headers, body = _post(port, b"SELECT {x:String} AS a", "/?param_x=it%27s&default_format=JSONEachRow&query_id=q1")
    assert (status, body) == (200, b'{"a":"it\'s"}\n')
    assert headers["x-clickhouse-query-id"] == "q1" and headers["x-clickhouse-format"] == "JSONEachRow"
    assert {"x-clickhouse-summary", "x-clickhouse-timezone", "x-clickhouse-server-display-name"} <= headers.keys()
    status, headers, body = _post(port, b"SELEC 1")
    assert status == 400 and headers["x-clickhouse-exception-code"] == "62" and b"Syntax error" in body


@pytest.mark.parametrize("encoding", ["", "gzip", "lz4", "zstd", "deflate"])
def test_bodies_are_taken_and_given_in_every_encoding(port: int, encoding: str, client: clickhouse_connect.driver.Client) -> None:
    """Inserts and statements may come compressed; answers are when they are asked to be."""
    import zlib

    from backports import zstd

    pack = {"": bytes, "gzip": gzip.compress, "lz4": lz4.frame.compress, "zstd": zstd.compress, "deflate": zlib.compress}[encoding]
    unpack = {"": bytes, "gzip": gzip.decompress, "lz4": lz4.frame.decompress, "deflate": zlib.decompress, "zstd": bytes}[encoding]
    rows = b"".join(b'{"symbol":"A","trade_id":%d}\n' % number for number in range(5000))
    head = {"Content_Encoding": encoding} if encoding else {}
    status, headers, body = _post(
        port, pack(b"INSERT INTO t (symbol, trade_id) FORMAT JSONEachRow\n" + rows), f"/?database={client.database}", **head
    )
    assert status == 200, body
    assert '"written_rows":"5000"' in headers["x-clickhouse-summary"]
    path = f"/?database={client.database}&enable_http_compression=1&default_format=TSV"
    status, headers, body = _post(
        port, pack(b"SELECT trade_id FROM t ORDER BY trade_id"), path, Accept_Encoding=encoding or "identity", **head
    )
    assert unpack(body) == b"".join(b"%d\n" % number for number in range(5000))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/?query=INSERT%20INTO%20t%20(trade_id)%20FORMAT%20CSV", b"1\n2\n3\n"),
        ("/?query=INSERT%20INTO%20t%20(trade_id)%20VALUES", b"(1),(2),(3)"),
        ("/", b"INSERT INTO t (trade_id) VALUES (1), (2), (3)"),
        ("/", b"insert into t (trade_id) select number + 1 from numbers(3)"),
        (
            "/",
            b'-- FORMAT in a comment\nINSERT INTO `t` (trade_id, symbol) FORMAT JSONEachRow {"trade_id":1} {"trade_id":2} {"trade_id":3}',
        ),
        ("/?query=INSERT%20INTO%20t%20(trade_id)%20FORMAT%20RowBinary", b"".join(n.to_bytes(8, "little") for n in (1, 2, 3))),
    ],
)
def test_inserts_in_every_shape(port: int, client: clickhouse_connect.driver.Client, path: str, body: bytes) -> None:
    """Statement in the URL or the body, data behind either, values, selects."""
    status, _, answer = _post(port, body, f"{path}{'&' if '?' in path else '?'}database={client.database}")
    assert status == 200, answer
    assert client.query("SELECT trade_id FROM t ORDER BY trade_id").result_columns == [[1, 2, 3]]


def test_hostile_requests_are_refused_with_a_status_and_a_sentence(port: int, client: clickhouse_connect.driver.Client) -> None:
    """Too large, broken, bombs, files, writes by link: 4xx each, and the server goes on."""
    large = 100 * 1024 * 1024
    bomb = gzip.compress(bytes(large))
    insert = f"/?database={client.database}&query=INSERT%20INTO%20t%20FORMAT%20Native"
    cases = [
        (413, _raw(port, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % large)),
        (400, _raw(port, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n")),
        (400, _raw(port, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")),
        (400, _post(port, bomb, insert, Content_Encoding="gzip")[0]),
        (400, _post(port, b"not gzip at all", insert, Content_Encoding="gzip")[0]),
        (415, _post(port, b"x", insert, Content_Encoding="rar")[0]),
        (403, _post(port, b"SELECT * FROM file('/etc/passwd', 'LineAsString')")[0]),
        (403, _post(port, b"SELECT 1 INTO OUTFILE '/tmp/x'")[0]),
        (403, _post(port, b"SYSTEM SHUTDOWN")[0]),
        (400, _post(port, b"")[0]),
        (400, _post(port, b"SELECT '\xff\xfe'")[0]),
        (413, _post(port, b"SELECT '" + b"x" * 5_000_000 + b"'")[0]),
        (404, _post(port, b"SELECT 1", "/nowhere")[0]),
        (404, _post(port, b"SELECT 1", "/?no_such_setting=1")[0]),
        (403, _raw(port, b"GET /?query=CREATE%20DATABASE%20x HTTP/1.1\r\nHost: x\r\n\r\n")),
        (403, _post(port, b"SELECT 1", "/?user=root&password=x")[0]),
    ]
    assert [(want, got) for want, got in cases if want != got] == []
    assert _post(port, b"SELECT 1 FORMAT TSV")[2] == b"1\n"


def _raw(port: int, head: bytes) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as link:
        link.sendall(head)
        return int(link.recv(1000).split()[1])


def test_a_broken_insert_stores_nothing_and_the_next_one_works(port: int, client: clickhouse_connect.driver.Client) -> None:
    """Garbage in Native, and a body that ends in the middle."""
    path = f"/?database={client.database}&query=INSERT%20INTO%20t%20FORMAT%20Native"
    assert _post(port, b"garbage" * 1000, path)[0] in range(400, 600)
    good = client.raw_query("SELECT 'b' AS exchange, 'A' AS symbol, toInt64(number) AS trade_id FROM numbers(1000)", fmt="Native")
    with socket.create_connection(("127.0.0.1", port), timeout=10) as link:
        target = f"/?database={client.database}&query=INSERT%20INTO%20t%20(exchange,symbol,trade_id)%20FORMAT%20Native"
        link.sendall(f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(good)}\r\n\r\n".encode() + good[: len(good) // 2])
    time.sleep(0.2)
    assert client.command("SELECT count() FROM t") == 0
    assert _post(port, good, target)[0] == 200
    assert client.command("SELECT count() FROM t") == 1000


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[tuple[Path, int, dict[str, str]]]:
    """Folder, port and environment for servers this test starts itself."""
    (number,) = free_ports(1)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MARKETSTREAM_")}
    yield (
        tmp_path / "ch",
        number,
        environ | {"MARKETSTREAM_CONFIG": "", "MARKETSTREAM_DATA_DIR": str(tmp_path), "MARKETSTREAM_PORT_CLICKHOUSE": str(number)},
    )


def _start(folder: Path, number: int, environ: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "infra.stack.clickhouse_server", "--path", str(folder), "--port", str(number)]
    server = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, start_new_session=True)
    until = time.monotonic() + 20
    while probe(f"http://127.0.0.1:{number}/ping") is not None:
        assert server.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    return server


def _end(server: subprocess.Popen[bytes], number: int) -> None:
    server.send_signal(number)
    server.wait(20)
    assert server.stderr is not None
    server.stderr.close()


def test_acknowledged_inserts_survive_kill_9(own_server: tuple[Path, int, dict[str, str]]) -> None:
    """Killed right behind an acknowledgement, three times over."""
    folder, number, environ = own_server
    for round_number in range(3):
        server = _start(folder, number, environ)
        try:
            _post(number, b"CREATE TABLE IF NOT EXISTS default.k (a Int64) ENGINE = MergeTree ORDER BY a")
            assert _post(number, b"SELECT count() FROM default.k FORMAT TSV")[2] == b"%d\n" % (round_number * 1000)
            assert _post(number, b"INSERT INTO default.k SELECT number FROM numbers(1000)")[0] == 200
        finally:
            _end(server, signal.SIGKILL)


def test_a_second_server_on_the_folder_or_port_says_so_and_ends(own_server: tuple[Path, int, dict[str, str]], tmp_path: Path) -> None:
    """One sentence, exit code 4 for the folder and 3 for the port; SIGTERM ends the first with 0."""
    folder, number, environ = own_server
    server = _start(folder, number, environ)
    try:
        for path, other, code, word in (
            (folder, free_ports(1)[0], 4, "in use by another process"),
            (tmp_path / "other", number, 3, "PORT_CLICKHOUSE"),
        ):
            command = [sys.executable, "-m", "infra.stack.clickhouse_server", "--path", str(path), "--port", str(other)]
            second = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)
            assert second.returncode == code and word in second.stderr and second.stderr.count("\n") == 1, second.stderr
    finally:
        _end(server, signal.SIGTERM)
    assert server.returncode == 0


def test_a_password_is_asked_for_when_one_is_set(own_server: tuple[Path, int, dict[str, str]]) -> None:
    """By header, basic authentication or URL; wrong or missing is 403 with code 516."""
    folder, number, environ = own_server
    server = _start(folder, number, environ | {"MARKETSTREAM_CLICKHOUSE_USER": "me", "MARKETSTREAM_CLICKHOUSE_PASSWORD": "geheim"})
    try:
        assert _post(number, b"SELECT 1")[0] == 403
        assert _post(number, b"SELECT 1", X_ClickHouse_User="me", X_ClickHouse_Key="wrong")[1]["x-clickhouse-exception-code"] == "516"
        assert _post(number, b"SELECT 1", "/?user=me&password=geheim")[0] == 200
        with clickhouse_connect.get_client(host="127.0.0.1", port=number, username="me", password="geheim") as right:
            assert right.command("SELECT 1") == 1
        with pytest.raises(DatabaseError):
            clickhouse_connect.get_client(host="127.0.0.1", port=number, username="me", password="falsch")
    finally:
        _end(server, signal.SIGTERM)
