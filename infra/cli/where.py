"""`--where`: an expression over columns in, a test for one row out. A grammar of its own, nothing is evaluated as code.

    expression  = conjunction { "or" conjunction }
    conjunction = term { "and" term }
    term        = "not" term | "(" expression ")" | column operator value | column "in" "(" value { "," value } ")"
    operator    = "=" | "==" | "!=" | "<>" | "<" | "<=" | ">" | ">="
    value       = 'text' | "text" | a word (BTC-USDT, 1m, buy) | a number | a time for columns in us (2024-08-08T23:54:13Z)

Words are compared with case; keywords are not. Numbers compare with numbers, text with text; anything else is refused when the
expression is read, not when a row comes.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

from infra.errors import SettingsError
from infra.options import nearest
from schemas.timeframes import parse_time_us

Kind = Literal["text", "number", "time"]
"""What a column holds: text, a number, or microseconds since the epoch."""
Row = Mapping[str, Any]
Test = Callable[[Row], bool]

MAX_LENGTH: Final = 4096
"""Characters of an expression at most."""
MAX_DEPTH: Final = 64
"""Parentheses and `not` inside each other at most; bounds the recursion."""

_TOKEN: Final = re.compile(
    r"""\s*(?:
        (?P<text>'[^']*'|"[^"]*") |
        (?P<operator><=|>=|<>|!=|==|=|<|>) |
        (?P<mark>[(),]) |
        (?P<word>[A-Za-z0-9_.+:/-]+)
    )""",
    re.VERBOSE,
)
_OPERATORS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_KEYWORDS: Final = frozenset({"and", "or", "not", "in"})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Token:
    kind: str
    text: str
    at: int


def compile_where(text: str, columns: Mapping[str, Kind]) -> Test:
    """A test for rows that have ``columns``.

    Raises:
        SettingsError: the expression cannot be read (with the place), names an unknown column (with the nearest known one) or compares
            a column with a value of another kind.
    """
    if len(text) > MAX_LENGTH:
        raise SettingsError(f"--where has {len(text):,} characters, at most {MAX_LENGTH:,} are read")
    parser = _Parser(text, columns)
    test = parser.expression(0)
    parser.expect_end()
    return test


def _tokens(text: str) -> list[_Token]:
    found: list[_Token] = []
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            place = len(text) - len(text[position:].lstrip())
            raise SettingsError(f"--where: cannot read '{text[place : place + 12]}' at character {place + 1}")
        found.append(_Token(kind=match.lastgroup, text=match[match.lastgroup], at=match.start(match.lastgroup)))
        position = match.end()
    return found


class _Parser:
    def __init__(self, text: str, columns: Mapping[str, Kind]) -> None:
        self._text = text
        self._columns = columns
        self._tokens = _tokens(text)
        self._next = 0

    def expression(self, depth: int) -> Test:
        tests = [self._conjunction(depth)]
        while self._take_keyword("or"):
            tests.append(self._conjunction(depth))
        return tests[0] if len(tests) == 1 else lambda row: any(test(row) for test in tests)

    def _conjunction(self, depth: int) -> Test:
        tests = [self._term(depth)]
        while self._take_keyword("and"):
            tests.append(self._term(depth))
        return tests[0] if len(tests) == 1 else lambda row: all(test(row) for test in tests)

    def _term(self, depth: int) -> Test:
        if depth >= MAX_DEPTH:
            raise SettingsError(f"--where has more than {MAX_DEPTH} levels of parentheses and 'not'")
        if self._take_keyword("not"):
            inner = self._term(depth + 1)
            return lambda row: not inner(row)
        if self._take("mark", "("):
            inner = self.expression(depth + 1)
            if not self._take("mark", ")"):
                self._fail("a closing parenthesis")
            return inner
        return self._comparison()

    def _comparison(self) -> Test:
        name = self._column()
        if self._take_keyword("in"):
            return self._membership(name)
        token = self._peek()
        if token is None or token.kind != "operator":
            self._fail("one of = != < <= > >= in")
        self._next += 1
        compare, value = _OPERATORS[token.text], self._value(name)
        return lambda row: row[name] is not None and compare(row[name], value)

    def _membership(self, name: str) -> Test:
        if not self._take("mark", "("):
            self._fail("a list as in (BTC-USDT, ETH-USDT)")
        values = {self._value(name)}
        while self._take("mark", ","):
            values.add(self._value(name))
        if not self._take("mark", ")"):
            self._fail("a comma or a closing parenthesis")
        return lambda row: row[name] in values

    def _column(self) -> str:
        token = self._peek()
        if token is None or token.kind != "word" or token.text.lower() in _KEYWORDS:
            self._fail("a column")
        if token.text not in self._columns:
            known = list(self._columns)
            hint = nearest(token.text, known) or f"; known are {', '.join(known)}"
            raise SettingsError(f"--where: unknown column '{token.text}'{hint}")
        self._next += 1
        return token.text

    def _value(self, name: str) -> str | float | int:
        token = self._peek()
        if token is None or token.kind not in ("text", "word"):
            self._fail("a value")
        self._next += 1
        text = token.text[1:-1] if token.kind == "text" else token.text
        kind = self._columns[name]
        if kind == "text":
            return text
        number = _number(text)
        if number is not None:
            return number
        if kind == "time":
            try:
                return parse_time_us(text)
            except ValueError as exc:
                raise SettingsError(f"--where: column '{name}': {exc}") from None
        raise SettingsError(f"--where: column '{name}' holds numbers and cannot be compared with '{text}'")

    def _peek(self) -> _Token | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _take(self, kind: str, text: str) -> bool:
        token = self._peek()
        if token is None or token.kind != kind or token.text != text:
            return False
        self._next += 1
        return True

    def _take_keyword(self, word: str) -> bool:
        token = self._peek()
        if token is None or token.kind != "word" or token.text.lower() != word:
            return False
        self._next += 1
        return True

    def expect_end(self) -> None:
        if self._peek() is not None:
            self._fail("'and', 'or' or the end")

    def _fail(self, wanted: str) -> NoReturn:
        token = self._peek()
        found = f"'{token.text}' at character {token.at + 1}" if token is not None else "the end"
        raise SettingsError(f"--where: expected {wanted} but found {found} in: {self._text}")


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None
