"""The coverage ledger as one HTML page without outside resources: what `api.coverage` readers answer in; text of the page out.

A line a feed with its gaps shaded, tiles that add up, and a table of every gap with its evidence. Colours are those of the states in both
the light and the dark scheme; each is also named in words, so that nothing is told by colour alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any, Final

from schemas.timeframes import format_time_us

STATES: Final = ("complete", "filled", "open", "unfillable", "unknown")
MAX_GAPS: Final = 2_000
"""Gaps of the table; a page with more is no longer read."""
_WIDTH: Final = 1_000
_LEAST: Final = 2.0
"""Width of the narrowest mark, of ``_WIDTH``: a gap of a second is seen in a day."""
_STYLE: Final = """
:root{--bg:#fbfbfa;--fg:#1c1e21;--dim:#6a6f76;--line:#e2e3e1;--card:#fff;--complete:#2f8f6b;--filled:#8cc3e8;--open:#e8a33d;
--unfillable:#c8413b;--unknown:#d9dad8}
@media(prefers-color-scheme:dark){:root{--bg:#16181b;--fg:#e8e8e6;--dim:#9aa0a7;--line:#2c3035;--card:#1d2024;--complete:#3fa57e;
--filled:#4d86ad;--open:#e0a04a;--unfillable:#e0625b;--unknown:#3a3e44}}
*{box-sizing:border-box}body{margin:0;padding:2rem clamp(1rem,4vw,3rem);background:var(--bg);color:var(--fg);
font:14px/1.5 system-ui,sans-serif;font-variant-numeric:tabular-nums}
h1{font-size:1.5rem;margin:0 0 .25rem}h2{font-size:1.05rem;margin:2.25rem 0 .75rem}p{margin:0;color:var(--dim)}
.tiles{display:flex;flex-wrap:wrap;gap:.75rem;margin-top:1.25rem}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.6rem 1rem;min-width:8.5rem}
.tile b{display:block;font-size:1.35rem;font-weight:600}.tile span{color:var(--dim);font-size:.85rem}
.key{display:flex;flex-wrap:wrap;gap:1.1rem;margin:0 0 .75rem;color:var(--dim)}
.dot{display:inline-block;width:.75rem;height:.75rem;border-radius:2px;margin-right:.4rem;vertical-align:-.06rem}
.feed{display:grid;grid-template-columns:minmax(9rem,14rem) 1fr 5.5rem;gap:1rem;align-items:center;padding:.3rem 0;
border-top:1px solid var(--line)}.feed:last-of-type{border-bottom:1px solid var(--line)}
.feed svg{display:block;width:100%;height:22px}.share{text-align:right}.axis{display:grid;grid-template-columns:minmax(9rem,14rem) 1fr 5.5rem;
gap:1rem;color:var(--dim);font-size:.8rem}.axis div{display:flex;justify-content:space-between}
.wrap{overflow-x:auto}table{border-collapse:collapse;width:100%;background:var(--card);border:1px solid var(--line)}
th,td{padding:.4rem .7rem;text-align:left;border-top:1px solid var(--line);white-space:nowrap}th{color:var(--dim);font-weight:500}
td.n,th.n{text-align:right}.state{display:inline-flex;align-items:center}
""" + "".join(f".{state}{{fill:var(--{state});background:var(--{state})}}" for state in STATES)


def report(feeds: Sequence[dict[str, Any]], *, start_us: int, end_us: int, channel: str, written_us: int) -> str:
    """The page.

    Args:
        feeds: entries of CoverageReader.read.
        start_us, end_us: the range they were asked for.
        channel: of the feeds.
        written_us: when the page is made.
    """
    gaps = [(feed, gap) for feed in feeds for gap in feed["gaps"]]
    gaps.sort(key=lambda entry: (entry[1]["start_us"], entry[0]["exchange"], entry[0]["symbol"]))
    times = f"{_time(start_us)} to {_time(end_us)} UTC"
    body = [
        f"<h1>Coverage of {escape(channel)}</h1><p>{times}, as known {_time(written_us)}.</p>",
        _tiles(feeds, [gap for _, gap in gaps]),
        "<h2>Feeds</h2>",
        _key(),
        *(_feed(feed, start_us, end_us) for feed in sorted(feeds, key=_worst_first)),
        f"<div class=axis><span></span><div><span>{_time(start_us)}</span><span>{_time((start_us + end_us) // 2)}</span>"
        f"<span>{_time(end_us)}</span></div><span></span></div>",
        "<h2>Gaps</h2>",
        _table(gaps),
    ]
    if not feeds:
        body.append("<p>No feed was collected in this time.</p>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Coverage, {times}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _tiles(feeds: Sequence[dict[str, Any]], gaps: Sequence[dict[str, Any]]) -> str:
    states = Counter(gap["state"] for gap in gaps)
    lost = sum(gap["ids"] or 0 for gap in gaps if gap["state"] == "unfillable")
    share = sum(feed["covered"] for feed in feeds) / len(feeds) if feeds else 0.0
    whole = sum(feed["covered"] >= 1.0 for feed in feeds)
    tiles = [
        (f"{len(feeds):,}", "feeds"),
        (_percent(share), "of the time covered"),
        (f"{whole:,}", "feeds without a hole"),
        (f"{states['filled']:,}", "gaps filled"),
        (f"{states['open']:,}", "gaps open"),
        (f"{states['unfillable']:,}", "gaps lost for good"),
        (f"{lost:,}", "trades known to be lost"),
    ]
    return "<div class=tiles>" + "".join(f"<div class=tile><b>{value}</b><span>{name}</span></div>" for value, name in tiles) + "</div>"


def _key() -> str:
    words = {
        "complete": "complete",
        "filled": "missed, then filled",
        "open": "open",
        "unfillable": "lost for good",
        "unknown": "not watched",
    }
    return "<div class=key>" + "".join(f'<span><i class="dot {state}"></i>{words[state]}</span>' for state in STATES) + "</div>"


def _feed(feed: dict[str, Any], start_us: int, end_us: int) -> str:
    scale = _WIDTH / (end_us - start_us)
    marks = []
    # what is rare and matters is drawn last and never narrower than can be seen
    for state in ("unknown", "complete", "filled", "open", "unfillable"):
        for interval in feed["intervals"]:
            if interval["state"] != state:
                continue
            left, width = (interval["start_us"] - start_us) * scale, (interval["end_us"] - interval["start_us"]) * scale
            if state in ("filled", "open", "unfillable") and width < _LEAST:
                left, width = min(max(0.0, left - (_LEAST - width) / 2), _WIDTH - _LEAST), _LEAST
            why = f" ({', '.join(interval['evidence'])})" if interval["evidence"] else ""
            title = f"{state}{why}: {_time(interval['start_us'])} to {_time(interval['end_us'])}"
            marks.append(
                f'<rect class="{state}" x="{left:.2f}" y="0" width="{width:.2f}" height="22"><title>{escape(title)}</title></rect>'
            )
    name = escape(f"{feed['exchange']}:{feed['symbol']}")
    label = escape(f"{feed['exchange']}:{feed['symbol']} {_percent(feed['covered'])} covered")
    return (
        f'<div class=feed><span>{name}</span><svg viewBox="0 0 {_WIDTH} 22" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f"{''.join(marks)}</svg><span class=share>{_percent(feed['covered'])}</span></div>"
    )


def _worst_first(feed: dict[str, Any]) -> tuple[int, int, str, str]:
    """Sort key: feeds that lost trades, then those with open gaps, then those with filled ones, then by name."""
    states = [gap["state"] for gap in feed["gaps"]]
    rank = next((place for place, state in enumerate(("unfillable", "open", "filled")) if state in states), 3)
    return rank, -len(states), feed["exchange"], feed["symbol"]


def _table(gaps: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    if not gaps:
        return "<p>None.</p>"
    heads = ("Feed", "State", "Evidence", "From", "To", "Seconds", "First id", "Last id", "Ids", "Recovered")
    numbers = frozenset(heads[5:])
    head = "".join(f"<th{' class=n' if name in numbers else ''}>{name}</th>" for name in heads)
    rows = "".join(_row(feed, gap) for feed, gap in gaps[:MAX_GAPS])
    more = f"<p>The first {MAX_GAPS:,} of {len(gaps):,}.</p>" if len(gaps) > MAX_GAPS else ""
    return f"<div class=wrap><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{more}"


def _row(feed: dict[str, Any], gap: dict[str, Any]) -> str:
    end_us = gap["end_us"]
    seconds = "" if end_us is None else f"{(end_us - gap['start_us']) / 1e6:,.3f}"
    texts = (
        f"{feed['exchange']}:{feed['symbol']}",
        gap["state"],
        gap["evidence"],
        _time(gap["start_us"]),
        "" if end_us is None else _time(end_us),
    )
    cells = [escape(text) for text in texts]
    cells[1] = f'<span class=state><i class="dot {cells[1]}"></i>{cells[1]}</span>'
    figures = [
        seconds,
        *("" if gap[name] is None else f"{gap[name]}" for name in ("first_id", "last_id")),
        _count(gap["ids"]),
        _count(gap["recovered"]),
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "".join(f"<td class=n>{figure}</td>" for figure in figures) + "</tr>"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _percent(share: float) -> str:
    """Three digits, and 100 % only for the whole."""
    return "100 %" if share >= 1.0 else f"{min(share * 100, 99.999):.3f} %"


def _time(time_us: int) -> str:
    return format_time_us(time_us)[:19].replace("T", " ")
