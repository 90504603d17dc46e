"""The stack's tables in the ClickHouse engine in this process, behind what readers ask of a client and of a history store."""

from __future__ import annotations

import atexit
import io
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from infra.clickhouse.schema import TABLES
from infra.stack.clickhouse_engine import Engine, Request, Summary

_DATABASE = "tables"


class Tables:
    """Every table, empty when made by :func:`empty_tables`. A blocking client and a history store at once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def insert(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Store rows; columns they do not name are 0."""
        lines = "\n".join(json.dumps(row) for row in rows).encode()
        request = Request(sql=f"INSERT INTO {table} ", format="JSONEachRow", database=_DATABASE)
        self._engine.insert(request, [lines], Summary())

    def answer(self, sql: str, parameters: Mapping[str, Any] | None = None, fmt: str = "JSONEachRow") -> bytes:
        """The result of a statement."""
        params = {name: str(value) for name, value in (parameters or {}).items()}
        return b"".join(self._engine.run(Request(sql=sql, format=fmt, database=_DATABASE, params=params), Summary()))

    # what a clickhouse-connect client has

    def query_arrow(self, sql: str, parameters: Mapping[str, Any] | None = None, use_strings: bool = True) -> Any:
        """The result as an Arrow table."""
        return pa.ipc.open_stream(io.BytesIO(self.answer(sql, parameters, "ArrowStream"))).read_all()

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> Any:
        """The result as rows."""
        table = self.query_arrow(sql, parameters)
        rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
        return SimpleNamespace(result_rows=rows, named_results=table.to_pylist)

    def close(self) -> None:
        """Nothing: the engine is there for the next test."""

    # what api.deps.HistoryStore has

    async def fetch(self, sql: str, parameters: Mapping[str, Any], fmt: str) -> bytes:
        """See HistoryStore."""
        return self.answer(sql, parameters, fmt)


@cache
def _tables() -> Tables:
    """One for the process: the engine opens one folder at a time."""
    folder = Path(tempfile.mkdtemp(prefix="marketstream-tables-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    engine = Engine(folder, memory_bytes=1_000_000_000, threads=2)
    atexit.register(engine.close)
    found = Tables(engine)
    for statement in (f"CREATE DATABASE {_DATABASE}", *(table.ddl(_DATABASE) for table in TABLES.values())):
        b"".join(engine.run(Request(sql=statement, format="TSV"), Summary()))
    return found


def release() -> None:
    """Close the engine, for a test that opens one of its own in this process: it has one folder at a time."""
    if _tables.cache_info().currsize:
        _tables()._engine.close()
        _tables.cache_clear()


def empty_tables() -> Tables:
    """The tables without a row."""
    found = _tables()
    for name in TABLES:
        found.answer(f"TRUNCATE TABLE {name}", fmt="TSV")
    return found
