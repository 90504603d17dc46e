"""A venue, a broker or a database that cannot prove who it is: refused in one sentence, never spoken to in the clear instead."""

from __future__ import annotations

import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from collectors.connection import open_connection
from collectors.errors import WireError
from infra.provision import provision
from infra.seam import SystemClock
from infra.settings import Settings
from tests.integration.conftest import RunningStack
from tests.integration.fault_chain import ROOT, Chain, clean_environ, isolated, table
from tests.integration.fault_rig import exchange
from tests.integration.tcp_proxy import TcpProxy


def certificate(folder: Path, *, host: str = "localhost", start: str = "", end: str = "") -> tuple[Path, Path]:
    """A self-signed certificate for ``host`` and its key; ``start`` and ``end`` (YYYYMMDD) where it is not valid now."""
    pem, key, request = folder / "certificate.pem", folder / "key.pem", folder / "request.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key)]
    names = ["-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}" + (",IP:127.0.0.1" if host == "localhost" else "")]
    if not start:
        _run("openssl", "req", "-x509", *curve, *names, "-days", "2", "-out", str(pem))
        return pem, key
    config = folder / "ca.cnf"
    (folder / "index.txt").touch()
    (folder / "serial").write_text("01\n")
    config.write_text(
        f"[ca]\ndefault_ca=d\n[d]\ndatabase={folder}/index.txt\nserial={folder}/serial\nnew_certs_dir={folder}\ndefault_md=sha256\n"
        "policy=p\ncopy_extensions=copy\n[p]\ncommonName=supplied\n"
    )
    _run("openssl", "req", "-new", *curve, *names, "-out", str(request))
    dates = ["-startdate", f"{start}000000Z", "-enddate", f"{end}000000Z"]
    signing = ["-selfsign", "-keyfile", str(key), "-in", str(request), "-out", str(pem), "-notext"]
    _run("openssl", "ca", "-batch", "-config", str(config), *dates, *signing)
    return pem, key


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


BAD = {
    "self-signed": ({}, "self-signed certificate"),
    "wrong-host": ({"host": "other.example"}, "Hostname mismatch|IP address mismatch"),
    "expired": ({"start": "20200101", "end": "20200201"}, "certificate has expired"),
}


@pytest.mark.parametrize("kind", BAD)
async def test_a_feed_with_a_bad_certificate_is_refused_in_one_sentence(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says what is wrong with it; where the issuer is trusted, host and dates still decide."""
    made, says = BAD[kind]
    pem, key = certificate(tmp_path, **made)  # type: ignore[arg-type]
    if kind != "self-signed":
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    with exchange("--certificate", str(pem), "--key", str(key), log_dir=tmp_path) as url, pytest.raises(WireError, match=says) as caught:
        stream = url.replace("https", "wss") + "/stream"
        await open_connection(stream, clock=SystemClock(), on_messages=lambda *_: None, on_oversized=lambda *_: None)
    assert "\n" not in str(caught.value)


def test_a_collector_never_falls_back_to_the_clear(stack: RunningStack, topic_prefix: str, tmp_path: Path) -> None:
    """It is not ready, says that the certificate is why, publishes nothing, and ends on SIGTERM."""
    pem, key = certificate(tmp_path)
    with exchange("--certificate", str(pem), "--key", str(key), log_dir=tmp_path) as url:
        settings = isolated(
            stack,
            topic_prefix,
            MARKETSTREAM_COLLECTOR_REST_URL=url,
            MARKETSTREAM_COLLECTOR_WS_URL=url.replace("https", "wss"),
            MARKETSTREAM_COLLECTOR_SYMBOLS="BTC-USDT",
        )
        provision(settings)
        with Chain(settings, tmp_path) as chain:
            chain.start("collector")
            begun = time.monotonic()
            while chain.alive("collector") and "certificate" not in chain.ask("collector", "/readyz")[1] and time.monotonic() - begun < 30:
                time.sleep(0.1)
            log = chain.log("collector").read_text()
            said = log + chain.ask("collector", "/readyz")[1]
            assert "certificate verify failed" in said, said
            assert "Traceback" not in log
            assert not any("connected to ws" in line for line in log.splitlines())
            if chain.alive("collector"):
                assert chain.ask("collector", "/readyz")[0] == 503
                chain.stop("collector")
        assert len(table(settings, "SELECT 1 FROM trades")) == 0


@contextmanager
def tls_in_front(port: int, folder: Path) -> Iterator[int]:
    """A TLS port with a self-signed certificate in front of ``port``."""
    pem, key = certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key)
    with TcpProxy(port, tls=context) as proxy:
        yield proxy.port


def _ends(settings: Settings, module: str, **variables: str) -> tuple[int, str]:
    """Exit code and last line of a process of ours."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        env=clean_environ(settings) | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


def test_a_clickhouse_with_a_bad_certificate_is_refused(stack: RunningStack, topic_prefix: str, tmp_path: Path) -> None:
    """The sink ends with one sentence that names the address and the certificate."""
    settings = isolated(stack, topic_prefix)
    provision(settings)
    with tls_in_front(stack.settings.ports.clickhouse, tmp_path) as port:
        code, line = _ends(settings, "infra.sink", MARKETSTREAM_CLICKHOUSE_URL=f"https://127.0.0.1:{port}")
    assert code == 6, line
    assert "certificate" in line.lower(), line


def test_a_broker_with_a_bad_certificate_is_refused(stack: RunningStack, topic_prefix: str, tmp_path: Path) -> None:
    """The sink ends with one sentence that names the broker and the certificate."""
    settings = isolated(stack, topic_prefix)
    provision(settings)
    with tls_in_front(stack.settings.ports.kafka, tmp_path) as port:
        more = {"MARKETSTREAM_KAFKA_BOOTSTRAP": f"localhost:{port}", "MARKETSTREAM_KAFKA_SECURITY_PROTOCOL": "SSL"}
        code, line = _ends(settings, "infra.sink", **more)
    assert code == 6, line
    assert "certificate" in line.lower() or "ssl" in line.lower(), line


def test_a_postgres_without_the_certificate_asked_for_is_refused(stack: RunningStack, topic_prefix: str, tmp_path: Path) -> None:
    """``sslmode=verify-full`` against a server that cannot prove itself: the collector says so and does not talk in the clear."""
    settings = isolated(
        stack, topic_prefix, MARKETSTREAM_COLLECTOR_REST_URL="http://127.0.0.1:1", MARKETSTREAM_COLLECTOR_WS_URL="ws://127.0.0.1:1"
    )
    provision(settings)
    assert urlsplit(settings.postgres.dsn).scheme.startswith("postgres")
    pem, _ = certificate(tmp_path)
    more = {"MARKETSTREAM_POSTGRES_DSN": f"{settings.postgres.dsn}?sslmode=verify-full&sslrootcert={pem}"}
    with Chain(settings, tmp_path) as chain:
        chain.start("collector", **more)
        begun = time.monotonic()
        while chain.alive("collector") and time.monotonic() - begun < 15 and "SSL" not in chain.ask("collector", "/readyz")[1]:
            time.sleep(0.1)
        said = chain.log("collector").read_text() + chain.ask("collector", "/readyz")[1]
    assert "SSL" in said, said
    assert "Traceback" not in said
