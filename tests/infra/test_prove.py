"""The proof's own parts: the matrix and its page, steps and their verdicts, what is printed and kept."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from infra.cli.output import Output
from infra.cli.prove import ProofError, chosen, prove
from infra.errors import SettingsError
from infra.prove import lines, matrix, soak
from infra.prove.lines import LINES, Line, Step
from infra.prove.matrix import CELLS, FAULTS, Cell, missing_tests, page
from infra.prove.report import as_html, as_json, as_text
from infra.prove.run import run, run_step

# The matrix.


def test_the_page_is_what_the_matrix_says() -> None:
    """``docs/faults.md`` was generated from the table as it stands."""
    assert matrix.PAGE.read_text(encoding="utf-8") == page()


def test_the_matrix_has_forty_cells_and_every_kind_of_fault() -> None:
    """At least 40, each once, each with an outcome of one sentence."""
    assert len(CELLS) >= 40
    assert len({(cell.part, cell.fault, cell.what) for cell in CELLS}) == len(CELLS)
    assert {cell.fault for cell in CELLS} == set(FAULTS)
    assert all(cell.outcome.endswith(".") for cell in CELLS)


def test_every_test_the_matrix_names_exists() -> None:
    """File, function and parameter."""
    assert missing_tests() == []


@pytest.mark.parametrize(
    "test", ["tests/none.py::test_a", "tests/infra/test_prove.py::test_none", "tests/infra/test_prove.py::test_x[nowhere else]"]
)
def test_a_test_that_does_not_exist_is_found(test: str) -> None:
    """No file, no function, no such parameter."""
    assert missing_tests([Cell(part="a", fault="kill", what="b", outcome="c.", test=test)]) == [test]


def test_a_page_that_is_behind_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``--check`` is an exit code and a sentence; without it the page is written."""
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "faults.md")
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    assert matrix.main(["--check"]) == 1
    assert "python -m infra.prove.matrix" in capsys.readouterr().err
    assert matrix.main([]) == 0
    assert matrix.main(["--check"]) == 0


# Lines and steps.


def test_every_test_file_a_line_names_exists() -> None:
    """Files of tests; names of lines are unique."""
    assert len(set(lines.names())) == len(LINES)
    for line in LINES:
        for step in line.steps:
            assert [test for test in step.tests if not (matrix.ROOT / test.partition("::")[0]).is_file()] == []
            assert step.tests or step.argv


def _step(code: str, timeout_s: float = 20.0) -> Step:
    return Step(name="a step", argv=("-c", code), short={"SIZE": "1"}, full={"SIZE": "100"}, timeout_s=timeout_s)


WRITES = "import json, os; open(os.environ['PROVE_FIGURES'], 'a').write(json.dumps({'line': 'x', 'size': os.environ['SIZE'], 'took_s': 1.23456}))"


def test_a_step_runs_in_its_form_and_brings_figures() -> None:
    """Environment by form; figures as the command wrote them."""
    assert run_step(_step(WRITES), short=True).figures == [{"line": "x", "size": "1", "took_s": 1.23456}]
    result = run_step(_step(WRITES), short=False)
    assert (result.ok, result.figures[0]["size"]) == (True, "100")


def test_a_step_that_fails_says_why() -> None:
    """Exit code and the end of its output; one that hangs is ended."""
    result = run_step(_step("print('it broke'); raise SystemExit(3)"), short=True)
    assert (result.ok, result.reason, "it broke" in result.output) == (False, "exit code 3", True)
    assert run_step(_step("import time; time.sleep(30)", timeout_s=0.5), short=True).reason == "not done after 0 s"


def test_tests_that_are_left_out_do_not_count_as_shown(tmp_path: Path) -> None:
    """A skipped test, a failed one and none at all are each a reason."""
    for body, says in (("import pytest\n    pytest.skip('no disk')", "no disk"), ("assert 0", "1 of 1 tests failed"), ("pass", "")):
        path = tmp_path / "test_it.py"
        path.write_text(f"def test_it():\n    {body}\n")
        reason = run_step(Step(name="tests", tests=(f"{path}",)), short=True).reason
        assert says in reason if says else not reason


# What is shown and kept.


def _results(tmp_path: Path) -> list[Line]:
    good = Line(name="good", claim="This <holds>.", steps=(_step(WRITES),))
    return [good, Line(name="bad", claim="This does not.", steps=(_step("raise SystemExit(1)"),))]


def test_text_json_and_page_show_every_line(tmp_path: Path) -> None:
    """Verdict, figures and duration; the page escapes and needs nothing from elsewhere."""
    results = run(_results(tmp_path), short=True, on_step=lambda *_: None)
    text = as_text(results, short=True)
    assert text[0].startswith("ok     good")
    assert "size=1, took_s=1.235" in text[2]
    assert text[-1].startswith("1 ok, 1 FAILED (short form")
    found = as_json(results, short=True, machine="here")
    assert (found["ok"], [line["ok"] for line in found["lines"]]) == (False, [True, False])
    shown = as_html(results, short=True, machine="here")
    assert "This &lt;holds&gt;." in shown
    assert "http" not in shown


def test_the_command_keeps_both_and_fails_when_a_line_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``prove.json`` and ``prove.html`` in the data folder; the exception names the lines that do not hold."""
    monkeypatch.setattr("infra.cli.prove.LINES", tuple(_results(tmp_path)))
    monkeypatch.setattr("infra.cli.prove.names", lambda: ["good", "bad"])
    out = io.StringIO()
    with pytest.raises(ProofError, match="not proved: bad"):
        prove(Output(as_json=True, out=out, err=io.StringIO()), wanted=[], short=True, data_dir=tmp_path)
    assert json.loads(out.getvalue())["form"] == "short"
    assert json.loads((tmp_path / "prove" / "prove.json").read_text())["ok"] is False
    assert (tmp_path / "prove" / "prove.html").read_text().startswith("<!doctype html>")
    out = io.StringIO()
    prove(Output(as_json=False, out=out, err=io.StringIO()), wanted=["good"], short=True, data_dir=tmp_path)
    assert "1 ok, 0 FAILED" in out.getvalue()


def test_an_unknown_line_is_refused_with_what_there_is() -> None:
    """One sentence with the nearest name."""
    with pytest.raises(SettingsError, match="did you mean matrix"):
        chosen(["matrx"])
    assert [line.name for line in chosen(["gaps"])] == ["gaps"]


def test_help_names_the_lines() -> None:
    """``marketstream prove --help``."""
    shown = subprocess.run(
        [sys.executable, "-m", "infra.cli.main", "prove", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert all(line.name in shown for line in LINES)


# The soak.


def test_a_short_soak_stores_every_trade_in_order() -> None:
    """Block by block, ids and times moved on; nothing waits, nothing is dead-lettered."""
    figures = soak.soak(1_100_000, told=lambda _: None)
    assert soak.problems(figures) == []
    assert (figures["stored"], figures["waiting"], figures["dead_letters"]) == (1_100_000, 0, 0)
    assert "slope_mb_per_1e8" not in figures


def test_what_a_soak_must_not_be_is_told() -> None:
    """Lost or doubled trades, records that wait, memory that grows."""
    good = {"trades": 10, "stored": 10, "ids_out_of_order": 0, "waiting": 0, "dead_letters": 0, "slope_mb_per_1e8": 0.4}
    assert soak.problems(good) == []
    for name, value, says in (
        ("stored", 9, "9 of 10"),
        ("ids_out_of_order", 1, "out of order"),
        ("waiting", 2, "2 records"),
        ("dead_letters", 3, "3 dead letters"),
        ("slope_mb_per_1e8", 1.5, "1.50 MB"),
    ):
        assert says in soak.problems({**good, name: value})[0]
    assert soak.slope_mb([(number * 10**7, 10**9 + number * 10**5) for number in range(20)]) == pytest.approx(1.0)
