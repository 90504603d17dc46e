"""Just enough SQL reading to serve ClickHouse's HTTP interface: where an INSERT's text ends and its data begins, which format is asked.

A scanner over words, quotes and comments; everything else is left to the engine's own parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# One alternative per thing in which a keyword must not be looked for, then words, then any other character.
_TOKEN = re.compile(
    rb"""(?P<space>\s+|--[^\n]*(?:\n|$)|\#[!\ ][^\n]*(?:\n|$)|/\*.*?\*/)
    |(?P<quoted>'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.|"")*"|`(?:[^`\\]|\\.|``)*`)
    |(?P<word>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
HEAD_LIMIT = 256 * 1024
"""Bytes within which an INSERT's text must end: ClickHouse's own max_query_size."""
FILE_FUNCTIONS = frozenset({"file", "filecluster", "executable", "executablepool", "python", "sqlite"})


@dataclass(frozen=True, kw_only=True)
class Insert:
    """An INSERT whose data follows: ``sql`` without its FORMAT clause, the ``format``, and where the data begins."""

    sql: str
    format: str
    data_start: int


@dataclass(frozen=True)
class _Token:
    kind: str
    text: bytes
    start: int
    end: int


def _tokens(text: bytes) -> Iterator[_Token]:
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or "other"
        if kind != "space":
            yield _Token(kind, match.group(), match.start(), match.end())


def first_word(text: bytes) -> str:
    """The statement's first keyword in upper case, comments skipped; empty when there is none."""
    for token in _tokens(text[:HEAD_LIMIT]):
        if token.kind == "word":
            return token.text.decode().upper()
        if token.text != b"(":
            break
    return ""


def read_insert(head: bytes) -> Insert | None:
    """The INSERT that ``head`` begins with when its data is sent along; None for any other statement.

    ``INSERT ... SELECT``, ``INSERT ... FROM INFILE`` are None: the engine runs them whole. ``VALUES`` is a format like the others.
    ``data_start`` is the first byte after the format's name and one line end, as in ClickHouse.
    """
    depth = 0
    previous: _Token | None = None
    begun = False
    for token in _tokens(head[:HEAD_LIMIT]):
        if not begun:
            if token.kind != "word" or token.text.upper() != b"INSERT":
                return None
            begun = True
        elif token.kind == "other":
            depth += (token.text == b"(") - (token.text == b")")
        elif token.kind == "word" and depth == 0:
            word = token.text.upper()
            if previous is not None and previous.text.upper() == b"FORMAT":
                return Insert(
                    sql=head[: previous.start].decode(errors="replace"), format=token.text.decode(), data_start=_after(head, token.end)
                )
            if word == b"VALUES":
                return Insert(sql=head[: token.start].decode(errors="replace"), format="Values", data_start=token.end)
            if word in (b"SELECT", b"WITH", b"INFILE", b"WATCH"):
                return None
        previous = token
    return None


def _after(head: bytes, end: int) -> int:
    while end < len(head) and head[end : end + 1] in (b" ", b"\t", b"\r", b";"):
        end += 1
    return end + 1 if head[end : end + 1] == b"\n" else end


def output_format(sql: bytes) -> str | None:
    """The name in a trailing ``FORMAT`` clause, None without one."""
    tail: list[_Token] = [token for token in _tokens(sql) if token.text != b";"][-400:]
    depth = 0
    for at in range(len(tail) - 1, 0, -1):
        depth += (tail[at].text == b")") - (tail[at].text == b"(")
        if depth == 0 and tail[at].kind == "word" and tail[at - 1].kind == "word" and tail[at - 1].text.upper() == b"FORMAT":
            return tail[at].text.decode()
    return None


def reads_files(sql: bytes) -> str | None:
    """The name of a function or clause in ``sql`` that would touch this machine's files or start programs, None when there is none."""
    previous: _Token | None = None
    for token in _tokens(sql):
        if token.text == b"(" and previous is not None and previous.text.strip(b'`"').decode(errors="replace").lower() in FILE_FUNCTIONS:
            return previous.text.decode(errors="replace")
        if token.kind == "word" and token.text.upper() in (b"INFILE", b"OUTFILE"):
            return token.text.decode()
        previous = token
    return None
