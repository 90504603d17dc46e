"""A server's disk runs full under live trades and has room again later: nothing acknowledged is lost, everything arrives, by itself.

The server's folder lies on a file system of its own in memory, so that it alone is full. That takes the right to mount; where it is not
given the test is left out, with that reason. ``PROVE_CELLS=all`` fills the broker's disk too.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.stack.clickhouse_engine import Engine, EngineError, Request, Summary
from tests import tables
from tests.integration.fault_chain import figure
from tests.integration.fault_rig import rig, wait_for

SIZE_MB = 400
FULL_S = 6.0


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 400 MB in memory at ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m,mode=0777", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no right to mount a small disk here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(folder: Path) -> Path:
    """Take all that is left of the file system; the file that holds it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as out:
        try:
            while True:
                out.write(bytes(1 << 20))
        except OSError:
            pass
    with ballast.open("ab", buffering=0) as out:
        try:
            while True:
                out.write(bytes(4096))
        except OSError:
            pass
    os.sync()
    return ballast


@pytest.mark.timeout(240)
@pytest.mark.parametrize("server", ["kafka", "clickhouse"] if os.environ.get("PROVE_CELLS") == "all" else ["clickhouse"])
def test_a_full_disk_of_a_server_is_survived_once_there_is_room(server: str) -> None:
    """Filled for six seconds, then emptied; afterwards every trade is stored once and bars go on."""
    with rig(small_disk=(server, small_disk)) as running:
        folder = running.settings.data_dir / server
        ballast = fill(folder)
        begun = time.monotonic()
        time.sleep(FULL_S)
        ballast.unlink()
        emptied = time.monotonic()
        took = running.whole(90)
        wait_for(lambda: running.chain.ask("sink", "/readyz")[0] == 200, 30, "the sink is not ready again")
        figure("matrix", cell=f"{server}-disk-full", fault_s=emptied - begun, whole_again_s=took)


def test_an_insert_on_a_full_disk_is_refused_and_stored_when_there_is_room(tmp_path: Path) -> None:
    """The engine itself answers such an insert as if it were stored; ours says that there is no space, and the same insert again is stored."""

    def ask(sql: str) -> str:
        return b"".join(engine.run(Request(sql=sql, format="CSV"), Summary())).decode().strip()

    def insert(token: str) -> None:
        settings = {"insert_deduplication_token": token}
        engine.insert(Request(sql="INSERT INTO t", format="CSV", settings=settings), iter([b"1\n2\n3\n"]), Summary())

    tables.release()
    with small_disk(tmp_path / "disk") as disk:
        engine = Engine(disk / "clickhouse", memory_bytes=1 << 30, threads=1)
        try:
            ask("CREATE TABLE t (a Int64) ENGINE = MergeTree ORDER BY a SETTINGS non_replicated_deduplication_window = 100")
            insert("first")
            ballast = fill(disk)
            with pytest.raises(EngineError, match="not enough space"):
                insert("second")
            ballast.unlink()
            insert("second")
            insert("second")
            assert ask("SELECT count() FROM t") == "6"
        finally:
            engine.close()
