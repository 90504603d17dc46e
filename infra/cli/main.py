"""The console script `marketstream`: arguments in, a call of the module that does the work, an exit code out.

Every command takes ``--json`` (results and errors as JSON) and ``--debug`` (tracebacks). Exit codes are those of ``infra/errors.py``.
Modules are imported inside the commands: `marketstream --help` answers in 0.2 s, numpy and Kafka alone would cost another 0.4 s.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from infra.cli.output import EXIT_PIPE_CLOSED, Output, report, translate
from infra.errors import StoppedError

app = typer.Typer(
    name="marketstream",
    help="Market data as an event stream: trades to exact bars to clients, on real Kafka, ClickHouse and PostgreSQL.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: rich would import its markdown and syntax parsers for it, 0.2 s
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 other, 2 setting or argument, 3 port in use, 4 data folder, 5 disk full, 6 server unreachable, "
    "7 input file, 8 no network, 9 not started, 10 not running, 11 checksum, 130 interrupted.",
)
config_app = typer.Typer(help="Settings: what they are and where they came from.", no_args_is_help=True)
export_app = typer.Typer(help="Write stored rows into a file.", no_args_is_help=True)
sessions_app = typer.Typer(help="Sessions of the time machine; `replay --as-of` makes one.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(sessions_app, name="sessions")
app.add_typer(export_app, name="export")
repair_app = typer.Typer(help="Bars of the past made anew where their trades changed.", no_args_is_help=True)
app.add_typer(repair_app, name="repair")
deadletter_app = typer.Typer(help="What could not be processed, and what is done about it.", no_args_is_help=True)
app.add_typer(deadletter_app, name="deadletter")
quarantine_app = typer.Typer(help="Suspect trades that are held back from the bars, and what is done about them.", no_args_is_help=True)
app.add_typer(quarantine_app, name="quarantine")
schemas_app = typer.Typer(help="Schemas of the topics, and whether releases can live side by side.", no_args_is_help=True)
app.add_typer(schemas_app, name="schemas")


class Source(StrEnum):
    """Where `up` takes trades from."""

    auto = "auto"
    live = "live"
    sim = "sim"
    none = "none"


class FileFormat(StrEnum):
    """What `export` writes."""

    csv = "csv"
    parquet = "parquet"
    arrow = "arrow"


Json = Annotated[bool, typer.Option("--json", help="Answer in JSON; errors too.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Data folder of the stack; it isolates one stack from another.")]
Exchange = Annotated[str, typer.Option("--exchange", help="Venue, e.g. binance, binance-usdm.")]
Symbol = Annotated[str, typer.Option("--symbol", help="Canonical symbol, e.g. BTC-USDT.")]
Start = Annotated[str | None, typer.Option("--start", help="From this time on: ISO 8601 or epoch number.")]
End = Annotated[str | None, typer.Option("--end", help="Up to but without this time.")]
KnownAt = Annotated[str | None, typer.Option("--known-at", help="What was known at this time: without later trades and revisions.")]
SessionId = Annotated[str | None, typer.Option("--session", help="What a session of the time machine sees at its virtual now.")]
Format = Annotated[FileFormat, typer.Option("--format", help="Format of the file.")]
OutFile = Annotated[Path, typer.Option("--output", "-o", help="File to write.")]


def _version(value: bool) -> None:
    if value:
        from infra.cli.version import version

        print(f"marketstream {version()}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")] = False,
) -> None:
    """Market data as an event stream: trades to exact bars to clients, on real Kafka, ClickHouse and PostgreSQL."""


@app.command()
def up(
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when everything is ready and leave it running.")] = False,
    source: Annotated[Source | None, typer.Option(help="auto: the live venue where it answers, else the simulated exchange.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Start everything; show a live table until Ctrl-C stops it again."""
    from infra.cli.up import up as run

    run(Output(as_json=as_json), data_dir=data_dir, source=None if source is None else source.value, detach=detach)


@app.command()
def down(data_dir: DataDir = None, as_json: Json = False, debug: Debug = False) -> None:
    """Stop everything `up` started; the data stays."""
    from infra.cli.up import down as run

    run(Output(as_json=as_json), data_dir=data_dir)


@app.command()
def status(data_dir: DataDir = None, as_json: Json = False, debug: Debug = False) -> None:
    """What runs where, and how far behind each stage is."""
    from infra.cli.status import status as run

    run(Output(as_json=as_json), data_dir=data_dir)


@app.command()
def doctor(data_dir: DataDir = None, as_json: Json = False, debug: Debug = False) -> None:
    """Check everything the stack needs; one line each with its remedy. Exit code 0 only when all is well."""
    from infra.cli.doctor import doctor as run

    raise typer.Exit(run(Output(as_json=as_json), data_dir=data_dir))


@app.command()
def provision(data_dir: DataDir = None, as_json: Json = False, debug: Debug = False) -> None:
    """Create topics, schemas and tables on the servers the settings name; `up` does it by itself."""
    from infra.cli.doctor import provision as run

    run(Output(as_json=as_json), data_dir=data_dir)


@app.command()
def tail(
    topic: Annotated[str, typer.Argument(help="Topic without prefix, e.g. trades, bars, bars.rows, deadletter.")],
    begin: Annotated[str, typer.Option("--from", help="latest, earliest, an offset, or how long ago: 10m.")] = "latest",
    where: Annotated[str | None, typer.Option(help="Rows to show, e.g. 'symbol=BTC-USDT and price>60000'.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after that many rows.")] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Go on with new rows, or stop at the end.")] = True,
    session: Annotated[
        str | None, typer.Option("--session", help="Show trades or bars as a session of the time machine sees them.")
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the rows of a topic as they come; one JSON object a row with --json."""
    if session is not None:
        from infra.cli.session_tail import tail as run_session

        run_session(Output(as_json=as_json), data_dir=data_dir, topic=topic, session=session, where=where, limit=limit, follow=follow)
        return
    from infra.cli.tail import tail as run

    run(Output(as_json=as_json), data_dir=data_dir, topic=topic, begin=begin, where=where, limit=limit, follow=follow)


@app.command()
def replay(
    file: Annotated[Path | None, typer.Argument(help="Recorded trades: public dump (csv, gz, zip) or raw WebSocket capture.")] = None,
    exchange: Annotated[str | None, typer.Option("--exchange", help="Venue of a FILE's trades, e.g. binance, binance-usdm.")] = None,
    symbol: Annotated[str | None, typer.Option("--symbol", help="Canonical symbol of a FILE's trades, e.g. BTC-USDT.")] = None,
    file_format: Annotated[str, typer.Option("--format", help="auto, or the kind of file where it cannot be told.")] = "auto",
    speed: Annotated[
        str | None, typer.Option(help="max, 1 (as recorded), 60 (a minute a second); default max of a FILE, 1 as of a time.")
    ] = None,
    as_of: Annotated[
        str | None, typer.Option("--as-of", help="Instead of a FILE: make a session that replays what is stored from then on.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", help="Where a session ends; default: now.")] = None,
    clock: Annotated[
        str, typer.Option("--clock", help="What paces a session: known (when rows were known), market (when they happened).")
    ] = "auto",
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Publish recorded trades and return when their bars are final; or, with --as-of, make a session of the time machine."""
    if as_of is not None:
        if file is not None or exchange is not None or symbol is not None:
            raise typer.BadParameter("--as-of replays what is stored: leave FILE, --exchange and --symbol out")
        from infra.cli.sessions import create

        create(Output(as_json=as_json), data_dir=data_dir, as_of=as_of, until=until, speed=speed or "1", clock=clock)
        return
    if file is None or exchange is None or symbol is None:
        raise typer.BadParameter("name a FILE with --exchange and --symbol, or a time with --as-of")
    from infra.cli.data import replay as run

    output = Output(as_json=as_json)
    run(output, data_dir=data_dir, file=file, exchange=exchange, symbol=symbol, file_format=file_format, speed=speed or "max")


@sessions_app.command("list")
def sessions_list(data_dir: DataDir = None, as_json: Json = False, debug: Debug = False) -> None:
    """Every session of the stack, with its virtual now."""
    from infra.cli.sessions import listed

    listed(Output(as_json=as_json), data_dir=data_dir)


@sessions_app.command("stop")
def sessions_stop(
    name: Annotated[str, typer.Argument(help="Id of the session.")], data_dir: DataDir = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Stop a session: from now on it is unknown to everybody."""
    from infra.cli.sessions import stop

    stop(Output(as_json=as_json), data_dir=data_dir, name=name)


@export_app.command("bars")
def export_bars(
    exchange: Exchange,
    symbol: Symbol,
    output: OutFile,
    timeframe: Annotated[str, typer.Option(help="1s 1m 5m 15m 30m 1h 4h 1d")] = "1m",
    start: Start = None,
    end: End = None,
    known_at: KnownAt = None,
    session: SessionId = None,
    file_format: Format = FileFormat.csv,
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bars of one symbol and timeframe, the newest revision of each, by open time."""
    from infra.cli.data import export as run

    run(
        Output(as_json=as_json),
        data_dir=data_dir,
        what="bars",
        exchange=exchange,
        symbol=symbol,
        timeframe=timeframe,
        start=start,
        end=end,
        known_at=known_at,
        session=session,
        file_format=file_format.value,
        file=output,
    )


@export_app.command("trades")
def export_trades(
    exchange: Exchange,
    symbol: Symbol,
    output: OutFile,
    start: Start = None,
    end: End = None,
    known_at: KnownAt = None,
    session: SessionId = None,
    file_format: Format = FileFormat.csv,
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Trades of one symbol, by trade id."""
    from infra.cli.data import export as run

    run(
        Output(as_json=as_json),
        data_dir=data_dir,
        what="trades",
        exchange=exchange,
        symbol=symbol,
        timeframe=None,
        start=start,
        end=end,
        known_at=known_at,
        session=session,
        file_format=file_format.value,
        file=output,
    )


@app.command()
def runs(data_dir: DataDir = None, as_json: Json = False, debug: Debug = False) -> None:
    """What ran here: every run of the stack with its stretch of the topics; `parity` replays one."""
    from infra.cli.parity import runs as run

    run(Output(as_json=as_json), data_dir=data_dir)


@app.command()
def parity(
    run: Annotated[str, typer.Argument(help="Id of a run, its beginning, or 'last'; see `marketstream runs`.")],
    html: Annotated[Path | None, typer.Option("--html", help="Write a certificate into this file.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Replay a recorded run from its topics and compare every bar; exit code 1 when a row differs and nothing explains it."""
    from infra.cli.parity import parity as work

    raise typer.Exit(work(Output(as_json=as_json), data_dir=data_dir, run=run, html=html))


@app.command()
def backfill(
    exchange: Exchange,
    symbol: Symbol,
    start: Annotated[str, typer.Option("--start", help="From this time on: ISO 8601 or epoch number.")],
    end: Annotated[str, typer.Option("--end", help="Up to but without this time.")],
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch past trades from the venue; return when they are stored and their bars made. Run again, it goes on where it was ended."""
    from infra.cli.backfill import backfill as run

    run(Output(as_json=as_json), data_dir=data_dir, exchange=exchange, symbol=symbol, start=start, end=end)


@repair_app.command("list")
def repair_list(
    state: Annotated[str | None, typer.Option(help="pending, running or done.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Newest so many.")] = 20,
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What the repair did and has to do, newest first."""
    from infra.cli.repair import list_jobs as run

    run(Output(as_json=as_json), data_dir=data_dir, state=state, limit=limit)


@repair_app.command("show")
def repair_show(
    job: Annotated[int, typer.Argument(help="Number of the job.")], data_dir: DataDir = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Everything known of one job."""
    from infra.cli.repair import show as run

    run(Output(as_json=as_json), data_dir=data_dir, job=job)


@repair_app.command("run")
def repair_run(
    exchange: Exchange,
    symbol: Symbol,
    start: Annotated[str, typer.Option("--start", help="From this time on: ISO 8601 or epoch number.")],
    end: Annotated[str, typer.Option("--end", help="Up to but without this time.")],
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare the bars of a range with its stored trades and publish those that differ."""
    from infra.cli.repair import order as run

    run(Output(as_json=as_json), data_dir=data_dir, exchange=exchange, symbol=symbol, start=start, end=end)


@app.command()
def topics(data_dir: DataDir = None, as_json: Json = False, debug: Debug = False) -> None:
    """The catalogue of topics with partitions, offsets, sizes and retention."""
    from infra.cli.catalogue import topics as run

    run(Output(as_json=as_json), data_dir=data_dir)


@config_app.command("show")
def config_show(data_dir: DataDir = None, as_json: Json = False, debug: Debug = False) -> None:
    """Every setting, its value and where it came from; secrets are masked."""
    from infra.cli.catalogue import config_show as run

    run(Output(as_json=as_json), data_dir=data_dir)


@deadletter_app.command("list")
def deadletter_list(
    reason: Annotated[str | None, typer.Option(help="Only of this reason, e.g. too_late.")] = None,
    exchange: Annotated[str | None, typer.Option(help="Only of this venue.")] = None,
    symbol: Annotated[str | None, typer.Option(help="Only of this symbol.")] = None,
    component: Annotated[str | None, typer.Option(help="Only what this one gave up: collector, worker, sink, replay.")] = None,
    since: Annotated[str | None, typer.Option(help="Published since this time, or how long ago: 10m.")] = None,
    state: Annotated[str | None, typer.Option(help="open, retried, dropped or repaired.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most that many, the newest.")] = 50,
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List dead letters with their state, newest first."""
    from infra.cli.deadletter import list_letters as run

    run(
        Output(as_json=as_json),
        data_dir=data_dir,
        reason=reason,
        exchange=exchange,
        symbol=symbol,
        component=component,
        since=since,
        state=state,
        limit=limit,
    )


LetterIds = Annotated[list[int] | None, typer.Argument(min=0, help="Ids, as `deadletter list` shows them.")]
LetterReason = Annotated[str | None, typer.Option("--reason", help="All open ones of this reason, instead of ids.")]


@deadletter_app.command("show")
def deadletter_show(
    letter: Annotated[int, typer.Argument(min=0, help="Id, as `deadletter list` shows it.")],
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """One dead letter with its bytes."""
    from infra.cli.deadletter import show as run

    run(Output(as_json=as_json), data_dir=data_dir, letter=letter)


@deadletter_app.command("retry")
def deadletter_retry(
    letters: LetterIds = None, reason: LetterReason = None, data_dir: DataDir = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Try dead letters again, the normal way; bars they belong to are made anew. Exit code 1 when one failed again."""
    from infra.cli.deadletter import retry as run

    raise typer.Exit(run(Output(as_json=as_json), data_dir=data_dir, letters=letters or [], reason=reason))


@deadletter_app.command("drop")
def deadletter_drop(
    letters: LetterIds = None, reason: LetterReason = None, data_dir: DataDir = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Decide that nothing more is done about dead letters; they stay stored."""
    from infra.cli.deadletter import drop as run

    raise typer.Exit(run(Output(as_json=as_json), data_dir=data_dir, letters=letters or [], reason=reason))


@app.command()
def quality(
    symbol: Annotated[str | None, typer.Argument(help="Canonical symbol, e.g. BTC-USDT; none: all.")] = None,
    exchange: Annotated[str | None, typer.Option(help="Only of this venue.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=8_640, help="Sum up so many scores of ten seconds each.")] = 60,
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """How good each feed is: score, anomalies and the band of its prices, worst first."""
    from infra.cli.quality import quality as run

    run(Output(as_json=as_json), data_dir=data_dir, symbol=symbol, exchange=exchange, limit=limit)


@app.command()
def coverage(
    exchange: Annotated[str | None, typer.Option(help="Only of this venue.")] = None,
    symbol: Annotated[str | None, typer.Option(help="Only of this symbol of the venue.")] = None,
    channel: Annotated[str, typer.Option(help="trades, quotes, funding or open_interest.")] = "trades",
    start: Start = None,
    end: End = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page for the browser into this file.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What of each feed was collected and what is missing, with evidence; the last 24 hours unless said otherwise."""
    from infra.cli.coverage import coverage as run

    run(
        Output(as_json=as_json),
        data_dir=data_dir,
        exchange=exchange,
        symbol=symbol,
        channel=channel,
        start=start,
        end=end,
        html=html,
    )


SuspectExchange = Annotated[str | None, typer.Option("--exchange", help="Only of this venue.")]
SuspectSymbol = Annotated[str | None, typer.Option("--symbol", help="Only of this symbol.")]
SuspectReason = Annotated[str | None, typer.Option("--reason", help="price or time.")]
SuspectIds = Annotated[list[int] | None, typer.Argument(min=0, help="Trade ids, as `quarantine list` shows them.")]


@quarantine_app.command("list")
def quarantine_list(
    exchange: SuspectExchange = None,
    symbol: SuspectSymbol = None,
    reason: SuspectReason = None,
    state: Annotated[str | None, typer.Option(help="held, confirmed, released or discarded.")] = None,
    since: Annotated[str | None, typer.Option(help="Traded since this time, or how long ago: 10m.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most that many, the newest.")] = 50,
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List suspect trades with their state, newest first."""
    from infra.cli.quarantine import list_suspects as run

    run(
        Output(as_json=as_json),
        data_dir=data_dir,
        exchange=exchange,
        symbol=symbol,
        reason=reason,
        state=state,
        since=since,
        limit=limit,
    )


@quarantine_app.command("show")
def quarantine_show(
    trade_id: Annotated[int, typer.Argument(min=0, help="Trade id.")],
    exchange: SuspectExchange = None,
    symbol: SuspectSymbol = None,
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """One suspect with what it was held against."""
    from infra.cli.quarantine import show as run

    run(Output(as_json=as_json), data_dir=data_dir, trade_id=trade_id, exchange=exchange, symbol=symbol)


@quarantine_app.command("release")
def quarantine_release(
    trade_ids: SuspectIds = None,
    exchange: SuspectExchange = None,
    symbol: SuspectSymbol = None,
    reason: SuspectReason = None,
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let suspects into the bars; those they belong to are made anew."""
    from infra.cli.quarantine import release as run

    how = {"trade_ids": trade_ids or [], "exchange": exchange, "symbol": symbol, "reason": reason}
    raise typer.Exit(run(Output(as_json=as_json), data_dir=data_dir, **how))


@quarantine_app.command("discard")
def quarantine_discard(
    trade_ids: SuspectIds = None,
    exchange: SuspectExchange = None,
    symbol: SuspectSymbol = None,
    reason: SuspectReason = None,
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Keep suspects out of the bars for good; bars that hold one are made anew."""
    from infra.cli.quarantine import discard as run

    how = {"trade_ids": trade_ids or [], "exchange": exchange, "symbol": symbol, "reason": reason}
    raise typer.Exit(run(Output(as_json=as_json), data_dir=data_dir, **how))


@schemas_app.command("check")
def schemas_check(as_json: Json = False, debug: Debug = False) -> None:
    """Whether today's schemas are fully compatible with every released one."""
    from infra.cli.schemas import check as run

    run(Output(as_json=as_json))


@schemas_app.command("freeze")
def schemas_freeze(
    version: Annotated[str, typer.Argument(help="Release whose schemas these are from now on, e.g. 0.2.0.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Copy schemas/avro to schemas/released/VERSION: on the commit that is released, once."""
    from infra.cli.schemas import freeze as run

    run(Output(as_json=as_json), version=version)


@app.command()
def simulate(
    seed: Annotated[int | None, typer.Option(min=0, help="The world to run; the same seed is the same world, event by event.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Many worlds: A..B, as in 1..1000.")] = None,
    kills: Annotated[int | None, typer.Option(min=0, help="Kill points of each world; by default the seed decides.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Nothing goes wrong: five minutes as fast as they go.")] = False,
    plant: Annotated[str | None, typer.Option(help="Plant this bug and stop at the first world that finds it.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Print every event.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the pipeline in a seeded world whose network, broker, store and processes fail; exit code 1 when an invariant breaks."""
    from infra.cli.simulate import run

    raise typer.Exit(run(Output(as_json=as_json), seed=seed, seeds=seeds, kills=kills, plain=plain, plant=plant, trace=trace))


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="engine, box, bars, collector, latency, ...; none: all.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure, each figure beside other programs in the same interleaved run."""
    from infra.cli.bench import bench as run

    run(Output(as_json=as_json), names=names or [])


@app.command()
def prove(
    names: Annotated[list[str] | None, typer.Argument(help="simulation, kills, gaps, day, matrix, bugs, soak, parity; none: all.")] = None,
    short: Annotated[bool, typer.Option("--short", help="Minutes instead of hours: few kills, few seeds, a slice of the day.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show that what is promised holds: each line with its figures, and a page that keeps them."""
    from infra.cli.context import settings_of
    from infra.cli.prove import prove as run

    run(Output(as_json=as_json), wanted=names or [], short=short, data_dir=settings_of(data_dir).data_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code; prints at most one line about an error unless ``--debug`` is given."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json, debug = "--json" in arguments, "--debug" in arguments
    if not debug:  # what libraries have to say goes to the logs of the processes; a command says one sentence
        logging.getLogger().addHandler(logging.NullHandler())
    try:
        status = app(arguments, prog_name="marketstream", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except typer.TyperException as exc:
        message = exc.format_message().rstrip(".") + ". See `marketstream --help`."
        if type(exc).__name__ == "NoArgsIsHelpError":
            print(exc.format_message())
            return exc.exit_code
        return report("UsageError", exc.exit_code, message, as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        return report("StoppedError", StoppedError.exit_code, "interrupted", as_json=as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes at its end
        return EXIT_PIPE_CLOSED
    except Exception as exc:
        if debug:
            raise
        known = translate(exc)
        if known is None:
            message = f"internal error: {type(exc).__name__}: {exc}; run the command again with --debug and report what it prints."
            return report("InternalError", 1, message, as_json=as_json)
        return report(type(known).__name__, known.exit_code, known.message, as_json=as_json)


if __name__ == "__main__":
    sys.exit(main())
