"""Results of the proof for people and programs: text lines, one JSON object, one self-contained HTML page. Pure."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from infra.prove.run import LineResult, StepResult

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ddd;padding:.3em .6em;text-align:left;vertical-align:top}"
    ".ok{color:#137333}.failed{color:#b3261e;font-weight:600}pre{background:#f6f6f6;padding:.6em;overflow:auto}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}td,th{border-color:#444}pre{background:#222}"
    ".ok{color:#81c995}.failed{color:#f28b82}}"
)


def figure_text(figures: dict[str, Any]) -> str:
    """One object of figures as ``name=value`` words; the line's own name is left out."""
    words = [f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in figures.items() if name != "line"]
    return ", ".join(words)


def as_text(results: Sequence[LineResult], *, short: bool) -> list[str]:
    """The lines that are printed: each promise, its verdict, figures and duration; last the count."""
    found = []
    for result in results:
        found.append(f"{'ok    ' if result.ok else 'FAILED'} {result.name:<12} {result.seconds:8.1f} s  {result.claim}")
        for step in result.steps:
            found += _step_lines(step)
    good = sum(result.ok for result in results)
    found.append(
        f"{good} ok, {len(results) - good} FAILED" + (" (short form: fewer kills, seeds and trades than promised)" if short else "")
    )
    return found


def _step_lines(step: StepResult) -> list[str]:
    counted = f"{step.passed} tests, " if step.passed else ""
    verdict = "" if step.ok else f"; {step.reason}"
    return [f"         {step.name}: {counted}{step.seconds:.1f} s{verdict}", *(f"           {figure_text(item)}" for item in step.figures)]


def as_json(results: Sequence[LineResult], *, short: bool, machine: str) -> dict[str, Any]:
    """One object with everything."""
    lines = [
        {"name": item.name, "claim": item.claim, "ok": item.ok, "seconds": item.seconds, "steps": [asdict(step) for step in item.steps]}
        for item in results
    ]
    return {"ok": all(item.ok for item in results), "form": "short" if short else "full", "machine": machine, "lines": lines}


def as_html(results: Sequence[LineResult], *, short: bool, machine: str) -> str:
    """A page without anything from elsewhere."""
    rows = []
    for item in results:
        verdict = "ok" if item.ok else "failed"
        steps = "".join(_step_html(step) for step in item.steps)
        rows.append(
            f'<tr><td class="{verdict}">{verdict}</td><td><b>{html.escape(item.name)}</b><br>{html.escape(item.claim)}{steps}</td>'
            f"<td>{item.seconds:.0f} s</td></tr>"
        )
    good = sum(item.ok for item in results)
    form = "short form" if short else "full form"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Marketstream: proof</title><style>{_STYLE}</style><h1>Marketstream: proof</h1>"
        f"<p>{good} of {len(results)} lines hold ({form}), {html.escape(machine)}.</p><table>{''.join(rows)}</table></html>\n"
    )


def _step_html(step: StepResult) -> str:
    figures = "".join(f"<li>{html.escape(figure_text(item))}</li>" for item in step.figures)
    reason = "" if step.ok else f' <span class="failed">{html.escape(step.reason)}</span><pre>{html.escape(step.output)}</pre>'
    counted = f"{step.passed} tests, " if step.passed else ""
    return f"<p>{html.escape(step.name)}: {counted}{step.seconds:.1f} s{reason}</p><ul>{figures}</ul>"
