"""`marketstream prove`: run lines of the proof, print each with its figures, keep the results as JSON and as an HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from infra.cli.bench import machine
from infra.cli.output import Output
from infra.errors import MarketstreamError, SettingsError
from infra.options import nearest
from infra.prove.lines import LINES, Line, Step, names
from infra.prove.report import as_html, as_json, as_text
from infra.prove.run import ROOT, run


class ProofError(MarketstreamError):
    """At least one line of the proof does not hold."""


def chosen(wanted: Sequence[str]) -> list[Line]:
    """The lines to run: all when none is named. Raises SettingsError."""
    for name in wanted:
        if name not in names():
            raise SettingsError(f"unknown line '{name}'{nearest(name, names()) or '; known are ' + ', '.join(names())}")
    return [line for line in LINES if not wanted or line.name in wanted]


def prove(output: Output, *, wanted: Sequence[str], short: bool, data_dir: Path) -> None:
    """Run, show, keep. Raises ProofError when a line does not hold, SettingsError for an unknown name."""
    todo = chosen(wanted)
    if not (ROOT / "tests").is_dir():
        raise MarketstreamError(f"the tests are not in {ROOT}: run `make prove` in a checkout of the project.")
    results = []
    for line in todo:

        def told(_: Line, step: Step, line: Line = line) -> None:
            output.note(f"{line.name}: {step.name} ...")

        (result,) = run([line], short=short, on_step=told)
        results.append(result)
        if not output.as_json:
            for text in as_text([result], short=short)[:-1]:
                output.line(text)
    folder = data_dir / "prove"
    folder.mkdir(parents=True, exist_ok=True)
    found = as_json(results, short=short, machine=machine())
    (folder / "prove.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (folder / "prove.html").write_text(as_html(results, short=short, machine=machine()), encoding="utf-8")
    if output.as_json:
        output.emit(found)
    else:
        output.line(as_text(results, short=short)[-1])
        output.line(f"{folder / 'prove.html'} and prove.json beside it")
    bad = [item.name for item in results if not item.ok]
    if bad:
        raise ProofError(f"not proved: {', '.join(bad)}; the reasons stand in {folder / 'prove.html'}")
