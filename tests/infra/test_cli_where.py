"""`--where`: what it selects, what it refuses, and that no text makes it do anything else."""

import operator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.cli.where import MAX_DEPTH, Kind, compile_where
from infra.errors import SettingsError

COLUMNS: dict[str, Kind] = {"symbol": "text", "side": "text", "price": "number", "size": "number", "exchange_time_us": "time"}
ROW = {"symbol": "BTC-USDT", "side": "buy", "price": 60_500.5, "size": 0.25, "exchange_time_us": 1_723_161_253_000_000}


def selects(text: str, row: dict[str, Any] = ROW) -> bool:
    """Whether the expression selects the row."""
    return compile_where(text, COLUMNS)(row)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("symbol=BTC-USDT", True),
        ("symbol = 'BTC-USDT' and price>60000", True),
        ("symbol=BTC-USDT and price>61000", False),
        ("symbol=ETH-USDT or price >= 60500.5", True),
        ("symbol=ETH-USDT or side=buy and price<1", False),
        ("(symbol=ETH-USDT or side=buy) and price>1", True),
        ("not side=sell", True),
        ("NOT (side=sell OR size<0.1)", True),
        ("symbol in (ETH-USDT, BTC-USDT)", True),
        ("price in (1, 60500.5)", True),
        ("not symbol in (ETH-USDT)", True),
        ("symbol != BTC-USDT", False),
        ("symbol <> ETH-USDT", True),
        ("size==0.25", True),
        ("price>6e4", True),
        ("price>-1", True),
        ("exchange_time_us >= 2024-08-08T23:54:13Z", True),
        ("exchange_time_us < 2024-08-08T23:54:13Z", False),
        ("exchange_time_us = 1723161253000000", True),
        ('side="buy"', True),
    ],
)
def test_expression_selects(text: str, expected: bool) -> None:
    """An expression means what it reads like; `and` binds closer than `or`."""
    assert selects(text) is expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "expected a column but found the end"),
        ("price", "expected one of = != < <= > >= in but found the end"),
        ("price >", "expected a value but found the end"),
        ("pric > 1", "unknown column 'pric'; did you mean price?"),
        ("price > abc", "holds numbers and cannot be compared with 'abc'"),
        ("exchange_time_us > yesterday", "is not a time"),
        ("(price > 1", "a closing parenthesis"),
        ("price > 1 2", "expected 'and', 'or' or the end but found '2' at character 11"),
        ("price > 1 ; drop", "cannot read '; drop' at character 11"),
        ("price in 1", "a list"),
        ("price in (1", "a comma or a closing parenthesis"),
        ("and price > 1", "expected a column but found 'and'"),
        ("__import__('os')", "unknown column '__import__'"),
        ("not " * (MAX_DEPTH + 1) + "price > 1", "levels"),
        ("(" * 2000 + "price > 1" + ")" * 2000, "levels"),
        ("x" * 5000, "characters"),
    ],
)
def test_unreadable_expression_is_refused_with_its_place(text: str, part: str) -> None:
    """What cannot be read is a SettingsError that says where and what was expected."""
    with pytest.raises(SettingsError) as caught:
        compile_where(text, COLUMNS)
    assert part in caught.value.message


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_text_gives_a_test_or_a_settings_error(text: str) -> None:
    """No text makes the parser raise anything else or run away."""
    try:
        test = compile_where(text, COLUMNS)
    except SettingsError:
        return
    assert test(ROW) in (True, False)


OPERATORS = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
comparison = st.tuples(st.sampled_from(["price", "size"]), st.sampled_from(sorted(OPERATORS)), st.integers(-3, 3))
tree = st.recursive(
    comparison,
    lambda inner: st.one_of(st.tuples(st.just("not"), inner), st.tuples(inner, st.sampled_from(["and", "or"]), inner)),
    max_leaves=8,
)


def text_of(node: Any) -> str:
    """The expression of a tree, with every parenthesis."""
    if node[0] == "not":
        return f"not ({text_of(node[1])})"
    if isinstance(node[0], str):
        return "{} {} {}".format(*node)
    return f"({text_of(node[0])}) {node[1]} ({text_of(node[2])})"


def truth_of(node: Any, row: dict[str, float]) -> bool:
    """What a tree is worth for a row, computed without the parser."""
    if node[0] == "not":
        return not truth_of(node[1], row)
    if isinstance(node[0], str):
        return bool(OPERATORS[node[1]](row[node[0]], node[2]))
    left, right = truth_of(node[0], row), truth_of(node[2], row)
    return (left and right) if node[1] == "and" else (left or right)


@given(tree, st.integers(-3, 3), st.integers(-3, 3))
@settings(max_examples=100, deadline=None)
def test_expression_is_worth_what_its_tree_is(node: Any, price: int, size: int) -> None:
    """Whatever the nesting, the compiled test and a plain evaluation of the same tree agree."""
    row = {"price": float(price), "size": float(size)}
    assert compile_where(text_of(node), COLUMNS)(row) is truth_of(node, row)


def test_missing_value_is_never_selected_by_a_comparison() -> None:
    """A null compares as false instead of raising."""
    assert not selects("price > 1", {**ROW, "price": None})
