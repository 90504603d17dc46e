"""Reading just enough SQL: where an INSERT's data begins, which format is asked for, what must not run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from infra.stack.arrow_stream import schema_length
from infra.stack.clickhouse_sql import first_word, output_format, read_insert, reads_files


@pytest.mark.parametrize(
    ("text", "sql", "name", "data"),
    [
        (b"INSERT INTO t FORMAT Native\n\x00\x01", "INSERT INTO t ", "Native", b"\x00\x01"),
        (b"insert into `format` (`a b`, format) format CSV\n1,2", "insert into `format` (`a b`, format) ", "CSV", b"1,2"),
        (b"INSERT INTO t (a) VALUES (1)", "INSERT INTO t (a) ", "Values", b" (1)"),
        (
            b"/* FORMAT x */ INSERT INTO t SETTINGS a='FORMAT y' FORMAT TSV;\n1",
            "/* FORMAT x */ INSERT INTO t SETTINGS a='FORMAT y' ",
            "TSV",
            b"1",
        ),
        (b"INSERT INTO t FORMAT JSONEachRow {}", "INSERT INTO t ", "JSONEachRow", b"{}"),
    ],
)
def test_an_inserts_text_ends_where_its_data_begins(text: bytes, sql: str, name: str, data: bytes) -> None:
    """Quotes, comments, brackets and columns named like keywords do not mislead."""
    found = read_insert(text)
    assert found is not None and (found.sql, found.format, text[found.data_start :]) == (sql, name, data)


@pytest.mark.parametrize(
    "text", [b"SELECT 1 FORMAT CSV", b"INSERT INTO t SELECT 1 FORMAT CSV", b"INSERT INTO t FROM INFILE 'x' FORMAT CSV", b"", b"INSERT"]
)
def test_other_statements_have_no_data(text: bytes) -> None:
    """They run whole."""
    assert read_insert(text) is None


def test_the_output_format_is_the_one_at_the_end() -> None:
    """Not one in a string or a sub-select."""
    assert output_format(b"SELECT 'FORMAT x', format(a) FROM t FORMAT JSON;") == "JSON"
    assert output_format(b"SELECT 1 FORMAT Native SETTINGS max_threads = 1") == "Native"
    assert output_format(b"SELECT 'a FORMAT CSV'") is None
    assert first_word(b" -- c\n( select 1)") == "SELECT"


def test_functions_that_touch_files_are_seen() -> None:
    """Columns of that name are not."""
    assert reads_files(b"SELECT * FROM file('/etc/passwd')") == "file" and reads_files(b"select 1 into outfile 'x'") == "outfile"
    assert reads_files(b"SELECT file, 'file(1)' FROM t") is None and reads_files(b"SELECT * FROM `file` ('x')") == "`file`"


@given(st.binary(max_size=300))
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_bytes_are_read_without_an_error(text: bytes) -> None:
    """Hostile statements reach the engine's parser, not a traceback of ours."""
    for function in (read_insert, output_format, reads_files, first_word):
        function(text)
        function(b"INSERT INTO t " + text)


def test_the_schema_message_of_an_arrow_stream_is_measured() -> None:
    """Against pyarrow's own writer."""
    import io

    import pyarrow as pa

    sink = io.BytesIO()
    schema = pa.schema([("a", pa.int64()), ("b", pa.dictionary(pa.int32(), pa.string()))])
    writer = pa.ipc.new_stream(sink, schema)
    whole = len(sink.getvalue())
    writer.close()
    assert schema_length(sink.getvalue()) == (whole or len(sink.getvalue()) - 8)
