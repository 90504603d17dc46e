"""The certificate of a parity: a report in, one self-contained HTML page out, which carries its own data and their SHA-256.

The page needs no network and no script. Its data stand in it as JSON, between the tags of ``<script id="data">``; :func:`read_certificate`
reads them back and checks the sum.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from infra.errors import InputFileError, IntegrityError
from infra.export import OutputFileError
from infra.parity import Report
from infra.parity_rows import Difference
from schemas.timeframes import NAME_BY_SECONDS, format_time_us

_DATA: Final = re.compile(r'<script id="data" type="application/json">(.*?)</script>', re.DOTALL)
_SUM: Final = re.compile(r'<code id="sum">([0-9a-f]{64})</code>')
_CELL_PX, _ROW_PX, _GAP_PX = 4, 18, 4
_KEPT_SETTINGS: Final = ("worker.timeframes", "worker.live_update_ms", "worker.count")

_STYLE: Final = """
:root{--ink:#16202a;--soft:#5b6b7a;--line:#dfe5ea;--page:#f6f8fa;--card:#fff;--good:#1a7f4b;--warn:#b7791f;--bad:#c0392b;--none:#e8edf1;
--good-soft:#e3f4ea;--bad-soft:#fbe6e3}
@media (max-width:760px){.tiles{grid-template-columns:repeat(2,1fr)!important}}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#93a1ae;--line:#2b3640;--page:#0e1419;--card:#161e25;--good:#3fb97a;--warn:#d9a441;
--bad:#ef6b5b;--none:#232d36;--good-soft:#12301f;--bad-soft:#3a1a17}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 28px 56px}header{display:flex;gap:24px;align-items:flex-start;justify-content:space-between}
h1{margin:0;font-size:27px;letter-spacing:-.01em}h1 small{display:block;font-size:13px;font-weight:500;color:var(--soft);letter-spacing:.02em}
h2{font-size:15px;margin:34px 0 10px;letter-spacing:.01em}p{margin:6px 0;color:var(--soft)}
.verdict{border-radius:10px;padding:12px 20px;font-weight:650;font-size:19px;text-align:right;white-space:nowrap}
.verdict small{display:block;font-weight:500;font-size:12.5px}.ok{background:var(--good-soft);color:var(--good)}
.no{background:var(--bad-soft);color:var(--bad)}.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:12px;margin-top:26px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:13px 16px}.tile b{display:block;font-size:22px;
font-variant-numeric:tabular-nums;letter-spacing:-.01em}.tile span{color:var(--soft);font-size:12.5px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px}th{font-weight:600;color:var(--soft);text-align:left;font-size:12px}
th,td{padding:7px 14px;border-bottom:1px solid var(--line);vertical-align:top}tr:last-child td{border-bottom:0}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}code{font:12px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace;
overflow-wrap:anywhere}.zero{color:var(--soft)}.bad{color:var(--bad);font-weight:600}.good{color:var(--good)}.warn{color:var(--warn)}
.strip{padding:14px 16px}svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font:11px system-ui,sans-serif}
.legend{display:flex;gap:18px;font-size:12px;color:var(--soft);margin-top:8px}.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;
margin-right:6px;vertical-align:-1px}footer{margin-top:38px;font-size:12.5px;color:var(--soft)}
"""


def write(path: Path, report: Report) -> str:
    """Write the certificate; the SHA-256 of its data. Raises OutputFileError."""
    text, checksum = certificate(report)
    try:
        path.write_text(text, "utf-8")
    except OSError as exc:
        raise OutputFileError(f"{path} cannot be written ({exc.strerror}): name another file with --html.") from exc
    return checksum


def read_certificate(path: Path) -> tuple[dict[str, Any], str]:
    """(data, their SHA-256) of a certificate. Raises InputFileError for another file, IntegrityError when the data were changed."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise InputFileError(f"{path} cannot be read as a certificate: {exc}") from exc
    data, stated = _DATA.search(text), _SUM.search(text)
    if data is None or stated is None:
        raise InputFileError(f"{path} is no certificate of `marketstream parity`.")
    checksum = hashlib.sha256(data[1].encode()).hexdigest()
    if checksum != stated[1]:
        raise IntegrityError(
            f"The data of {path} were changed: their SHA-256 is {checksum[:16]}..., the certificate states {stated[1][:16]}...."
        )
    found: dict[str, Any] = json.loads(data[1])
    return found, checksum


def certificate(report: Report) -> tuple[str, str]:
    """(the page, the SHA-256 of its data)."""
    value = report.value()
    data = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).replace("</", "<\\/")
    checksum = hashlib.sha256(data.encode()).hexdigest()
    body = "".join(
        (
            _header(value),
            _tiles(value),
            _differences(report.differences),
            _strips(value),
            _timeframes(value),
            _explained(value),
            _repaired(value),
            _outputs(value),
            _partitions(value),
            _how(value),
            f"<footer>SHA-256 of the data in this page: <code id='sum'>{checksum}</code><br>".replace("'", '"'),
            "Check it with <code>marketstream parity FILE.html</code>.</footer>",
        )
    )
    title = escape(f"Parity of run {report.run.id}")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><main>{body}</main>\n"
        f'<script id="data" type="application/json">{data}</script></body></html>\n'
    )
    return page, checksum


def _header(value: Mapping[str, Any]) -> str:
    run = value["run"]
    good = value["unexplained"] == 0
    word = "Parity" if good else "Difference"
    detail = "0 unexplained rows" if good else f"{value['unexplained']:,} unexplained"
    end = (
        f"to {_when(run['ended_us'])}, {run['state']}"
        if run["ended_us"]
        else f"on, still running when compared at {_when(value['finished_us'])}"
    )
    return (
        f"<header><h1><small>Marketstream parity certificate</small>{escape(run['id'])}</h1>"
        f'<div class="verdict {"ok" if good else "no"}">{word}<small>{detail}</small></div></header>'
        f"<p>From {_when(run['started_us'])} {escape(end)}; source: {escape(run['source'])}. "
        "Its trades were read from the topic and run through the worker's own code again; every row of bars the run had published was "
        "compared with what came out, bit for bit. What the repair had published was compared with bars made anew of the trades stored.</p>"
    )


def _when(time_us: int) -> str:
    return format_time_us(time_us)[:19].replace("T", " ") + " UTC"


def _of(part: int, whole: int) -> str:
    return f"{part:,}" if part == whole else f"{part:,} of {whole:,}"


def _tiles(value: Mapping[str, Any]) -> str:
    bars, stored = value["bars"], value["clickhouse"]
    explained = sum(bars["explained"].values())
    tiles = [
        (f"{bars['rows']:,}", "rows of bars compared", ""),
        (f"{bars['equal']:,}", "equal, bit for bit", "good"),
        (f"{explained:,}", "explained", "warn" if explained else "zero"),
        (f"{value['unexplained']:,}", "unexplained", "bad" if value["unexplained"] else "zero"),
        (_of(bars["identical_records"], bars["records"]), "bars records identical, byte for byte", ""),
        (_of(stored["equal"], stored["rows"]), "final rows equal in ClickHouse", ""),
        (f"{bars['trades']:,}", "trades replayed", ""),
        (f"{value['trades_per_s']:,}/s", f"trades replayed and compared, {value['seconds']:,.1f} s", ""),
    ]
    cells = "".join(
        f'<div class="tile"><b class="{kind}">{escape(number)}</b><span>{escape(what)}</span></div>' for number, what, kind in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _strips(value: Mapping[str, Any]) -> str:
    """One row a partition: the run's trades from left to right, coloured by what their bars came to."""
    parts = value["partitions"]
    width, left = 0, 84
    shapes: list[str] = []
    for row, part in enumerate(parts):
        top = row * (_ROW_PX + _GAP_PX)
        shapes.append(f'<text x="0" y="{top + 13}">partition {part["partition"]}</text>')
        for cell, (equal, explained, unexplained) in enumerate(part["strip"]):
            colour = "bad" if unexplained else "warn" if explained else "good" if equal else "none"
            title = f"{equal:,} equal, {explained:,} explained, {unexplained:,} unexplained"
            x = left + cell * _CELL_PX
            width = max(width, x + _CELL_PX)
            shapes.append(
                f'<rect x="{x}" y="{top}" width="{_CELL_PX - 0.6}" height="{_ROW_PX}" rx="1" fill="var(--{colour})"><title>{title}</title></rect>'
            )
    height = len(parts) * (_ROW_PX + _GAP_PX)
    legend = "".join(
        f'<span><i style="background:var(--{colour})"></i>{word}</span>'
        for colour, word in (("good", "equal"), ("warn", "explained"), ("bad", "unexplained"), ("none", "no rows"))
    )
    return (
        f'<h2>The run from its first trade to its last</h2><div class="card strip"><svg viewBox="0 0 {width} {height}" role="img">'
        f'{"".join(shapes)}</svg><div class="legend">{legend}</div></div>'
    )


def _table(head: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; ``head``: (title, whether it holds numbers)."""
    numeric = [number for _, number in head]
    titles = "".join(f'<th class="n">{escape(name)}</th>' if number else f"<th>{escape(name)}</th>" for name, number in head)
    lines = "".join(
        "<tr>"
        + "".join(f'<td class="n">{cell}</td>' if number else f"<td>{cell}</td>" for cell, number in zip(row, numeric, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="card"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def _count(number: int, kind: str = "") -> str:
    return f'<span class="{kind if number else "zero"}">{number:,}</span>'


def _timeframes(value: Mapping[str, Any]) -> str:
    rows = [
        (
            NAME_BY_SECONDS.get(int(seconds), f"{seconds}s"),
            _count(sum(counts.values())),
            _count(counts.get("equal", 0), "good"),
            _count(counts.get("explained", 0), "warn"),
            _count(counts.get("unexplained", 0), "bad"),
        )
        for seconds, counts in value["bars"]["by_timeframe"].items()
    ]
    head = (("timeframe", False), ("rows", True), ("equal", True), ("explained", True), ("unexplained", True))
    return "<h2>By timeframe</h2>" + _table(head, rows)


def _repaired(value: Mapping[str, Any]) -> str:
    part = value["repaired"]
    if not part["bars"] and not part["pending"]:
        return ""
    explained = sum(part["explained"].values())
    row = (
        _count(part["bars"]),
        _count(part["equal"], "good"),
        _count(explained, "warn"),
        _count(part["pending"], "warn"),
        _count(part["unexplained"], "bad"),
    )
    head = (
        ("bars", True),
        ("equal to those of their trades", True),
        ("explained", True),
        ("not done or stored", True),
        ("unexplained", True),
    )
    return "<h2>What the repair published, beside the trades stored</h2>" + _table(head, [row])


def _outputs(value: Mapping[str, Any]) -> str:
    rows = [
        (
            escape(part["topic"]),
            _count(part["records"]),
            _count(part["equal"], "good"),
            _count(sum(part["explained"].values()), "warn"),
            _count(part["pending"], "warn"),
            _count(part["unexplained"], "bad"),
        )
        for part in value["outputs"]
    ]
    if not rows:
        return ""
    head = (
        ("topic", False),
        ("records of the replay, or series", True),
        ("equal in the run", True),
        ("explained", True),
        ("not sent before it ended", True),
        ("unexplained", True),
    )
    return "<h2>What the worker publishes beside bars</h2>" + _table(head, rows)


def _explained(value: Mapping[str, Any]) -> str:
    bars = value["bars"]
    rows = [(escape(reason), _count(count)) for reason, count in bars["explained"].items()]
    rows += [(f"a repaired bar: {escape(reason)}", _count(count)) for reason, count in value["repaired"]["explained"].items()]
    rows += [
        (f"{part['topic']}: {escape(reason)}", _count(count)) for part in value["outputs"] for reason, count in part["explained"].items()
    ]
    if bars["pending"]:
        rows.append(("trades records that the run had not yet turned into bars", _count(bars["pending"])))
    if value["not_retained_records"]:
        rows.append(("trades records of the run that the topics no longer hold", _count(value["not_retained_records"])))
    if value["clickhouse"]["pending"]:
        rows.append(("final rows that the sink had not yet stored", _count(value["clickhouse"]["pending"])))
    if not rows:
        return ""
    return "<h2>Explained, and not compared</h2>" + _table((("reason", False), ("number", True)), rows)


def _differences(found: Sequence[Difference]) -> str:
    if not found:
        return ""
    rows = []
    for item in found:
        bar = ""
        if item.key is not None:
            name = NAME_BY_SECONDS.get(item.key.timeframe_s, f"{item.key.timeframe_s}s")
            bar = f"{escape(item.key.instrument)} {name}<br>{format_time_us(item.key.open_time_us)[:19]}Z, revision {item.key.revision}"
        columns = "<br>".join(f"<code>{escape(name)}: {live!r} / {again!r}</code>" for name, (live, again) in item.columns.items())
        rows.append(
            (
                f"{item.partition}",
                f"{item.bars_offset}",
                f"{item.input_offset}",
                bar,
                f'<span class="bad">{escape(item.what)}</span>',
                columns,
            )
        )
    head = (
        ("partition", True),
        ("bars at", True),
        ("trades at", True),
        ("bar", False),
        ("what", False),
        ("column: in the run / otherwise", False),
    )
    return "<h2>Unexplained</h2>" + _table(head, rows)


def _partitions(value: Mapping[str, Any]) -> str:
    rows = []
    for part in value["partitions"]:
        sums = "<br>".join(
            f"<code title='{part[key]}'>{word} {part[key][:32]}</code>"
            for word, key in (("trades", "inputs_sha256"), ("run&nbsp;&nbsp;&nbsp;", "run_sha256"), ("replay", "replay_sha256"))
        )
        rows.append(
            (
                f"{part['partition']}",
                f"{part['replayed_from']:,}",
                f"{part['first']:,} to {part['stop']:,}",
                f"{part['trades']:,}",
                f"{part['records']:,}",
                f"{part['rows']:,}",
                sums,
            )
        )
    head = (
        ("partition", True),
        ("replayed from", True),
        ("trades of the run", True),
        ("trades", True),
        ("bars records", True),
        ("rows", True),
    )
    return "<h2>Partitions, offsets and hashes</h2>" + _table((*head, ("SHA-256 of record values", False)), rows)


def _how(value: Mapping[str, Any]) -> str:
    machine = value["machine"]
    rows = [(escape(name), f"<code>{escape(text)}</code>") for name, text in value["run"]["settings"].items() if name in _KEPT_SETTINGS]
    rows += [
        ("compared at", f"<code>{format_time_us(value['finished_us'])[:19]}Z</code>"),
        ("on", f"<code>{escape(machine['system'])}, {machine['cores']} cores, Python {machine['python']}</code>"),
    ]
    return "<h2>What was run</h2>" + _table((("setting", False), ("value", False)), rows)
