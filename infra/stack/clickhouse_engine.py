"""The ClickHouse engine in this process (chdb): SQL in; result bytes, in bounded chunks, out.

Every statement runs on a connection of its own from a small pool, so reads never wait behind inserts: the engine releases the
interpreter while it works. A connection that was given settings serves only requests with the same ones, so nothing leaks.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from infra.errors import DataDirBrokenError, DataDirOwnedError
from infra.stack.arrow_stream import splice
from infra.stack.clickhouse_sql import first_word

logger = logging.getLogger(__name__)

IDLE_CONNECTIONS = 24
"""Kept open between requests; 0.26 ms each to open, so more buys nothing."""
_STREAMED = frozenset(
    {"native", "rowbinary", "csv", "tsv", "tabseparated", "tabseparatedraw", "tsvraw", "jsoneachrow", "jsoncompacteachrow", "arrowstream"}
)
_CODE = re.compile(r"Code: (\d+)")
_VOLATILE = frozenset({"insert_deduplication_token", "log_comment", "query_id"})
_STORAGE_CODES: Final = frozenset({49, 74, 75, 76, 84, 203, 241, 243, 252, 425, 1000, 1001, 1002})
"""What keeps rows from being stored: files that cannot be read, written, opened or made, memory, space, too many parts, the system."""
SYNTAX_ERROR, INCORRECT_DATA, READONLY, TOO_MANY_QUERIES, NOT_ALLOWED = 62, 117, 164, 202, 497


class EngineError(Exception):
    """The engine refused a statement: ClickHouse's ``code`` and its text."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


@dataclass(kw_only=True)
class Request:
    """One statement: ``settings`` and ``params`` as text by name."""

    sql: str
    format: str
    database: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    readonly: bool = False

    def key(self) -> tuple[str, frozenset[tuple[str, str]]]:
        """Requests with equal keys may share a connection."""
        return self.database, frozenset(self.settings.items())


@dataclass(kw_only=True)
class Summary:
    """What a statement did; ``elapsed_s`` seconds."""

    read_rows: int = 0
    read_bytes: int = 0
    written_rows: int = 0
    written_bytes: int = 0
    result_rows: int = 0
    elapsed_s: float = 0.0

    def header(self) -> str:
        """The value of ``X-ClickHouse-Summary``."""
        counts = {
            "read_rows": self.read_rows,
            "read_bytes": self.read_bytes,
            "written_rows": self.written_rows,
            "written_bytes": self.written_bytes,
            "total_rows_to_read": self.read_rows,
            "result_rows": self.result_rows,
            "elapsed_ns": int(self.elapsed_s * 1e9),
        }
        return json.dumps({name: str(count) for name, count in counts.items()}, separators=(",", ":"))


class Engine:
    """One data folder, opened by one process.

    Raises:
        DataDirOwnedError: another process has the folder open.
        DataDirBrokenError: the folder cannot be opened.
    """

    def __init__(self, folder: Path, *, memory_bytes: int, threads: int) -> None:
        self._lock_file = lock_folder(folder)
        config = folder / "config.xml"
        config.write_text(config_xml(memory_bytes=memory_bytes))
        engine: Any = importlib.import_module("chdb._chdb")  # here: 0.1 s and 200 MB that only this process should pay
        self._connect: Callable[[], Any] = lambda: engine.connect(f"{folder / 'data'}?config-file={config}")
        self._threads = threads
        self._idle: OrderedDict[tuple[str, frozenset[tuple[str, str]]], list[Any]] = OrderedDict()
        self._count = 0
        self._guard = threading.Lock()
        try:
            self._root = self._connect()  # keeps the engine open while no request runs
            self.version = str(self._root.query("SELECT version()", "TabSeparatedRaw").bytes(), "utf-8").strip()
            self.timezone = str(self._root.query("SELECT timezone()", "TabSeparatedRaw").bytes(), "utf-8").strip()
        except RuntimeError as exc:
            first = str(exc).splitlines()[0][:300]
            raise DataDirBrokenError(f"the ClickHouse engine cannot open {folder}: {first}; move the folder away to start empty") from exc
        engine.reset_signal_handlers()  # importing chdb installs its own; ours decide how the process ends

    def close(self) -> None:
        """Closes every idle connection and the engine."""
        with self._guard:
            for connections in self._idle.values():
                for connection in connections:
                    connection.close()
            self._idle.clear()
        self._root.close()
        self._lock_file.close()

    def run(self, request: Request, summary: Summary) -> Iterator[bytes]:
        """The result in chunks of at most some MB where the format allows, whole otherwise. Fills ``summary``.

        Raises:
            EngineError: the statement was refused, before or between chunks.
        """
        connection, reusable = self._take(request)
        try:
            kind = self._admit(connection, request)
            if kind == "READ_ONLY" and request.format.lower() in _STREAMED and first_word(request.sql.encode()) in ("SELECT", "WITH"):
                yield from _stream(connection, request, summary)
            else:
                yield _whole(connection, request, summary)
                reusable = reusable and kind != "CONTROL"
        except BaseException:
            reusable = False
            raise
        finally:
            self._give(request, connection, reusable)

    def insert(self, request: Request, chunks: Iterable[bytes], summary: Summary) -> None:
        """Writes rows encoded in ``request.format``. Nothing is kept when it raises before the first block was complete.

        Raises:
            EngineError: the statement or its data was refused.
        """
        connection, reusable = self._take(request)
        try:
            before = _storage_errors(connection)
            handle = connection.send_insert(request.sql, request.format)
            _append_all(connection, handle, chunks)
            result = connection.insert_done(handle)
            _check_stored(before, _storage_errors(connection))
            summary.written_rows, summary.written_bytes = result.rows_written(), result.bytes_written()
            summary.elapsed_s = result.elapsed()
        except RuntimeError as exc:
            reusable = False
            raise as_engine_error(exc) from exc
        except BaseException:
            reusable = False
            raise
        finally:
            self._give(request, connection, reusable)

    def _admit(self, connection: Any, request: Request) -> str:
        found = connection.classify_query(request.sql)
        kind = str(found["query_class"].name)
        if found["statement_count"] > 1:
            raise EngineError(SYNTAX_ERROR, "Code: 62. DB::Exception: Multi-statements are not allowed. (SYNTAX_ERROR)")
        if kind == "CONTROL" and re.search(r"\bSYSTEM\s+(SHUTDOWN|KILL)\b", request.sql, re.IGNORECASE):
            raise EngineError(NOT_ALLOWED, "Code: 497. DB::Exception: Stop the server with its supervisor. (ACCESS_DENIED)")
        if request.readonly and kind not in ("READ_ONLY", "UNKNOWN"):
            raise EngineError(READONLY, "Code: 164. DB::Exception: Cannot execute query in readonly mode: use POST. (READONLY)")
        return kind

    def _take(self, request: Request) -> tuple[Any, bool]:
        key = request.key()
        with self._guard:
            waiting = self._idle.get(key)
            if waiting:
                self._count -= 1
                self._idle.move_to_end(key)
                return waiting.pop(), not self._is_volatile(request)
        connection = self._connect()
        try:
            self._prepare(connection, request)
        except RuntimeError as exc:
            connection.close()
            raise as_engine_error(exc) from exc
        return connection, not self._is_volatile(request)

    @staticmethod
    def _is_volatile(request: Request) -> bool:
        return not _VOLATILE.isdisjoint(request.settings)

    def _prepare(self, connection: Any, request: Request) -> None:
        connection.query(f"SET max_threads = {self._threads}, max_insert_threads = 1, date_time_input_format = 'best_effort'")
        if request.settings:
            pairs = ", ".join(f"{name} = {_quoted(value)}" for name, value in request.settings.items())
            connection.query(f"SET {pairs}")
        if request.database:
            connection.query(f"USE `{request.database.replace('`', '')}`")

    def _give(self, request: Request, connection: Any, reusable: bool) -> None:
        if not reusable:
            connection.close()
            return
        extra = []
        with self._guard:
            self._idle.setdefault(request.key(), []).append(connection)
            self._count += 1
            while self._count > IDLE_CONNECTIONS:
                key, oldest = next(iter(self._idle.items()))
                if oldest:
                    extra.append(oldest.pop(0))
                    self._count -= 1
                if not oldest:
                    del self._idle[key]
        for each in extra:
            each.close()


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def as_engine_error(exc: BaseException) -> EngineError:
    """The typed form of chdb's RuntimeError, which carries ClickHouse's text; the code is in it."""
    text = str(exc)
    found = _CODE.search(text)
    return EngineError(int(found.group(1)) if found else 1002, text if found else f"Code: 1002. DB::Exception: {text} (UNKNOWN_EXCEPTION)")


def _storage_errors(connection: Any) -> dict[int, tuple[int, str]]:
    """How often each error of :data:`_STORAGE_CODES` happened in this engine, and what was said last."""
    codes = ", ".join(map(str, sorted(_STORAGE_CODES)))
    rows = bytes(connection.query(f"SELECT code, value, last_error_message FROM system.errors WHERE code IN ({codes})", "TSVRaw").bytes())
    found = (line.split("\t", 2) for line in rows.decode("utf-8", "replace").splitlines() if line.count("\t") >= 2)
    return {int(code): (int(value), text) for code, value, text in found}


def _check_stored(before: Mapping[int, tuple[int, str]], after: Mapping[int, tuple[int, str]]) -> None:
    """Raise what kept the rows of an insert from being stored.

    chdb 26.9 answers an insert whose last step failed (no space left, too many parts) with the number of rows it was given and no error, and
    nothing is stored. Another statement's failure at the same time is taken for ours: an insert that is tried again carries its token and is
    stored once, one that is not tried again would be lost.
    """
    for code, (count, text) in after.items():
        if count > before.get(code, (0, ""))[0]:
            raise EngineError(code, f"Code: {code}. DB::Exception: {text}")


def _append_all(connection: Any, handle: Any, chunks: Iterable[bytes]) -> None:
    """Feeds an insert; when the feed breaks off, nothing more of it is stored.

    A pipeline that saw the end of its rows before the end of the data must be finished, never cancelled: cancelling it aborts the process
    (chdb 26.9). An append tells the two apart.
    """
    try:
        for chunk in chunks:
            connection.insert_append(handle, chunk)
    except RuntimeError:
        connection.insert_done(handle)  # raises what was wrong with the data, when that is what stopped the pipeline
        raise EngineError(INCORRECT_DATA, "Code: 117. DB::Exception: Data goes on after the end of the rows. (INCORRECT_DATA)") from None
    except BaseException:
        try:
            connection.insert_append(handle, b"")
        except RuntimeError:
            with contextlib.suppress(RuntimeError):
                connection.insert_done(handle)
        else:
            connection.insert_cancel(handle)
        raise


def _count_read(summary: Summary, result: Any) -> None:
    summary.read_rows += result.storage_rows_read()
    summary.read_bytes += result.storage_bytes_read()
    summary.result_rows += result.rows_read()
    summary.elapsed_s = result.elapsed()


def _whole(connection: Any, request: Request, summary: Summary) -> bytes:
    try:
        result = connection.query(request.sql, request.format, params=dict(request.params))
    except RuntimeError as exc:
        raise as_engine_error(exc) from exc
    _count_read(summary, result)
    summary.written_rows, summary.written_bytes = result.rows_written(), result.bytes_written()
    return bytes(result.bytes())


def _stream(connection: Any, request: Request, summary: Summary) -> Iterator[bytes]:
    chunks = _chunks(connection, request, summary)
    first = next(chunks, None)
    if first is None:
        yield _whole(connection, request, summary)  # no rows: only the whole form writes the format's header
        return
    if request.format.lower() == "arrowstream":
        yield from splice(first, chunks)
        return
    yield first
    yield from chunks


def _chunks(connection: Any, request: Request, summary: Summary) -> Iterator[bytes]:
    handle = None
    try:
        handle = connection.send_query(request.sql, request.format, params=dict(request.params))
        while True:
            result = connection.streaming_fetch_result(handle)
            if result is None or result.rows_read() == 0:
                handle = None
                return
            _count_read(summary, result)
            yield bytes(result.bytes())
    except RuntimeError as exc:
        handle = None
        raise as_engine_error(exc) from exc
    finally:
        if handle is not None:  # the client went away in the middle
            connection.streaming_cancel_query(handle)


def lock_folder(folder: Path) -> BinaryIO:
    """Takes the folder for this process; the system gives it back when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / "lock").open("wb")
    except OSError as exc:
        raise DataDirBrokenError(f"cannot write the ClickHouse folder {folder}: {exc.strerror}") from exc
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        stream.close()
        raise DataDirOwnedError(
            f"the ClickHouse folder {folder} is in use by another process; stop that one or choose another folder"
        ) from exc
    return stream


def config_xml(*, memory_bytes: int) -> str:
    """The engine's configuration: caches and background threads for a small machine (defaults are for 100 GB servers)."""
    values: dict[str, int] = {
        "max_server_memory_usage": memory_bytes,
        "mark_cache_size": 32 * 1024 * 1024,
        "index_mark_cache_size": 8 * 1024 * 1024,
        "uncompressed_cache_size": 0,
        "index_uncompressed_cache_size": 0,
        "mmap_cache_size": 64,
        "background_pool_size": 2,
        "background_schedule_pool_size": 2,
        "background_move_pool_size": 1,
        "background_fetches_pool_size": 1,
        "background_common_pool_size": 1,
        "background_buffer_flush_schedule_pool_size": 1,
        "background_message_broker_schedule_pool_size": 1,
        "background_distributed_schedule_pool_size": 1,
        "max_thread_pool_size": 200,
        "max_thread_pool_free_size": 16,
    }
    lines = "".join(f"<{name}>{value}</{name}>" for name, value in values.items())
    # With two background threads the defaults (8, 20, 25 free slots) would never allow a large merge or a mutation.
    merge = "".join(
        f"<{name}>1</{name}>"
        for name in (
            "number_of_free_entries_in_pool_to_execute_mutation",
            "number_of_free_entries_in_pool_to_lower_max_size_of_merge",
            "number_of_free_entries_in_pool_to_execute_optimize_entire_partition",
        )
    )
    return f"<clickhouse>{lines}<merge_tree>{merge}</merge_tree></clickhouse>\n"
