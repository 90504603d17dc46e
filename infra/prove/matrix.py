"""The fault matrix: every fault of every part, what happens then, and the test that shows it.

One table, :data:`CELLS`. ``python -m infra.prove.matrix`` writes ``docs/faults.md`` from it (``--check`` only compares). Everywhere "whole"
means: every trade the market made is stored once, bars go on, and nobody did anything by hand.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "faults.md"

FAULTS: Final = (
    "kill", "pause", "partition", "slow disk", "disk full", "clock", "schema change", "poison record", "bad certificate", "venue",
)  # fmt: skip
"""Kinds of faults; ``venue``: what only an exchange does (bans, restarts, silence)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One fault of one part.

    Attributes:
        part: collector, worker, sink, ...
        fault: one of :data:`FAULTS`.
        what: what exactly is done to it.
        outcome: what happens, in one sentence.
        test: the pytest node that shows it.
    """

    part: str
    fault: str
    what: str
    outcome: str
    test: str


CELLS_FILE: Final = "tests/integration/test_fault_cells.py"
_CELLS = CELLS_FILE + "::test_a_fault_of_one_part_is_survived_without_a_hand"
FORM_FILES: Final = (CELLS_FILE, "tests/integration/test_fault_kills.py", "tests/integration/test_fault_disks.py")
"""Files with fewer tests in the short form."""
_CUT_OFF = CELLS_FILE + "::test_a_process_that_the_network_cuts_off_from_the_broker_goes_on_where_it_was"
_EXCHANGE = "tests/integration/test_collector_exchange.py::"
_REFUSALS = "tests/integration/test_collector_refusals.py::"
_CERTIFICATES = "tests/integration/test_fault_certificates.py::"
_DISKS = "tests/integration/test_fault_disks.py::"
_CHAOS = "tests/integration/test_chaos.py::test_killed_in_the_middle_of_a_replay"
_KILLS = "tests/integration/test_fault_kills.py::test_a_killed_process_loses_and_doubles_nothing"
_GAPS = "tests/integration/test_fault_gaps.py::test_trades_lost_in_more_than_twenty_ways_are_named_fetched_and_in_their_bars"
_REFUSED_FEED = _CERTIFICATES + "test_a_feed_with_a_bad_certificate_is_refused_in_one_sentence"


def _cell(part: str, fault: str, what: str, outcome: str, test: str) -> Cell:
    return Cell(part=part, fault=fault, what=what, outcome=outcome, test=test)


CELLS: Final[tuple[Cell, ...]] = (
    # Collector.
    _cell("collector", "kill", "kill -9", "It is started again, continues after the last published trade of each symbol and fetches what was missed.", f"{_KILLS}[collector]"),
    _cell("collector", "kill", "kill -9 in the middle of a hole", "The hole and the time it was dead are named in the ledger and filled.", _GAPS),
    _cell("collector", "pause", "SIGSTOP for 4 s", "Its feed is taken for silent, connected anew, and what was missed is fetched.", f"{_CELLS}[collector-pause]"),
    _cell("collector", "partition", "no bytes to or from the venue for 4 s", "The silence is found within 3 s; after the reconnect everything missed is fetched.", f"{_CELLS}[collector-partition-venue]"),
    _cell("collector", "partition", "PostgreSQL out of reach for 4 s", "It goes on with the symbols it has.", f"{_CELLS}[collector-partition-postgres]"),
    _cell("collector", "partition", "the broker is away", "Frames wait on disk in order, are sent oldest first, and memory stays bounded.", "tests/infra/test_spool.py::test_a_broker_that_is_away_costs_disk_and_everything_arrives_in_order"),
    _cell("collector", "partition", "no bytes to or from the broker, which lives, for 12 s", "It publishes nothing and loses nothing: everything arrives once after; whole.", f"{_CUT_OFF}[collector]"),
    _cell("collector", "slow disk", "writes of 30 ms and syncs of half a second under the spool", "What is spooled waits for the disk, in order and in bounded memory; the event loop does not.", "tests/infra/test_spool.py::test_a_slow_disk_delays_what_is_spooled_and_nothing_else"),
    _cell("collector", "slow disk", "power is lost while writes wait for a sync", "A torn tail of the spool is cut, what was acknowledged stays, later records are kept.", "tests/infra/test_spool.py::test_after_power_loss_a_prefix_is_left_that_holds_what_was_synced"),
    _cell("collector", "disk full", "no room for the spool", "Reading from the venue stops and readiness says why; nothing taken is dropped.", "tests/infra/test_spool.py::test_a_full_spool_makes_senders_wait_and_goes_on_in_order"),
    _cell("collector", "clock", "its clock is 5 minutes ahead", "Times come from the venue: every trade is stored, and its bars are those of a batch; whole.", f"{_CELLS}[collector-clock-ahead]"),
    _cell("collector", "clock", "its clock is 5 minutes behind", "Times come from the venue: every trade is stored, and its bars are those of a batch; whole.", f"{_CELLS}[collector-clock-behind]"),
    _cell("collector", "poison record", "malformed messages of the venue", "Each is dead-lettered with its bytes; the connection stays.", _EXCHANGE + "test_garbage_is_dead_lettered_with_its_bytes"),
    _cell("collector", "schema change", "fields missing, of another type or beyond 64 bits", "The message alone is dead-lettered; those around it pass.", _REFUSALS + "test_hostile_messages_among_good_ones_cost_only_themselves"),
    _cell("collector", "bad certificate", "the venue's certificate is self-signed", "Refused in one sentence; never spoken to in the clear.", f"{_REFUSED_FEED}[self-signed]"),
    _cell("collector", "bad certificate", "the certificate is another host's", "Refused in one sentence that names the mismatch.", f"{_REFUSED_FEED}[wrong-host]"),
    _cell("collector", "bad certificate", "the certificate has expired", "Refused in one sentence that says so.", f"{_REFUSED_FEED}[expired]"),
    _cell("collector", "bad certificate", "REST and stream of the whole process", "Not ready, with the certificate as the reason; nothing is published.", _CERTIFICATES + "test_a_collector_never_falls_back_to_the_clear"),
    # The venue.
    _cell("exchange", "venue", "connections break (1006), also in holes", "Connected again within a second and jitter; what was missed is fetched.", _GAPS),
    _cell("exchange", "venue", "half-open and stalled connections", "Found within 3 s; the ledger names what was not sent; it is fetched.", _GAPS),
    _cell("exchange", "venue", "one stream says nothing while its symbol trades", "Found within 3 s for a busy symbol; the ledger doubts that symbol alone while it lasts; its trades are fetched.", _EXCHANGE + "test_a_single_frozen_symbol_on_a_live_feed_is_noticed_within_three_seconds_and_fetched"),
    _cell("exchange", "venue", "the cut at 24 hours", "Reconnected; the hole is fetched before the watermark passes it.", _EXCHANGE + "test_a_lost_connection_costs_no_trade"),
    _cell("exchange", "venue", "429 and 418 with Retry-After", "The wait is obeyed, then holes are filled.", _GAPS),
    _cell("exchange", "venue", "REST slow, failing (503), with short or cut pages", "Asked again within limits; holes are filled.", _GAPS),
    _cell("exchange", "venue", "trades nobody has any more, ids that never were", "The ledger says unfillable with exactly these ids; bars they touch have complete = false.", _GAPS),
    _cell("exchange", "venue", "duplicates, reordering, late trades", "Stored once; what came late is not a loss.", _GAPS),
    _cell("exchange", "kill", "away for 2 s, ids go on", "Reconnected; what it traded meanwhile is fetched.", f"{_CELLS}[exchange-restart]"),
    _cell("exchange", "kill", "restarted with its ids reset", "The new numbering is taken from its first trade; nothing of it is taken for a duplicate.", "tests/integration/test_fault_reset.py::test_a_venue_that_numbers_anew_is_followed"),
    _cell("exchange", "clock", "its clock is 5 minutes ahead, then right", "All trades are stored; bars behind the watermark are made by the repair, and equal a batch within minutes.", f"{_CELLS}[exchange-clock-ahead]"),
    _cell("exchange", "clock", "its clock is 5 minutes behind, then right", "All trades are stored; bars behind the watermark are made by the repair, and equal a batch within minutes.", f"{_CELLS}[exchange-clock-behind]"),
    # Worker.
    _cell("worker", "kill", "kill -9 under a replay", "Started again from its snapshot; tables equal an undisturbed run.", f"{_CHAOS}[worker-0]"),
    _cell("worker", "kill", "kill -9 under live trades", "Started again from its snapshot; whole.", f"{_KILLS}[worker]"),
    _cell("worker", "pause", "SIGSTOP until its session is over", "The broker takes its partitions; it gets them back and goes on; whole.", f"{_CELLS}[worker-pause]"),
    _cell("worker", "partition", "no bytes to or from the broker, which lives, for 12 s", "Its session ends and it makes no bar; it gets its partitions back and goes on; whole.", f"{_CUT_OFF}[worker]"),
    _cell("worker", "pause", "a worker that lives and answers waits for ever in the middle of a record", "Its liveness says that nothing was applied while records wait; it is ended and started again, and every bar is made once.", "tests/integration/test_stack_supervisor.py::test_a_worker_whose_input_offset_stands_still_is_started_again"),
    _cell("worker", "clock", "its clock is 5 minutes ahead", "Bars close on watermarks, not on its clock, and are those of a batch; whole.", f"{_CELLS}[worker-clock-ahead]"),
    _cell("worker", "schema change", "workers of two releases side by side", "Both read what both write; bars are the same.", "tests/integration/test_rolling_upgrade.py::test_an_upgrade_rolls_through_the_workers_while_two_releases_write"),
    _cell("worker", "poison record", "bytes that are no frame in trades", "Each is dead-lettered once with topic, partition and offset; the partition goes on; whole.", f"{_CELLS}[worker-poison]"),
    _cell("worker", "poison record", "a frame that cannot be decoded", "One dead letter a record; offsets behind it are processed.", "tests/integration/test_worker.py::test_a_poison_record_is_dead_lettered_and_stops_nothing"),
    # Sink.
    _cell("sink", "kill", "kill -9 under a replay", "It goes on after the offsets the tables hold; no row twice.", f"{_CHAOS}[sink]"),
    _cell("sink", "kill", "kill -9 under live trades", "It goes on after the offsets the tables hold; whole.", f"{_KILLS}[sink]"),
    _cell("sink", "pause", "SIGSTOP for 4 s", "It catches up; whole.", f"{_CELLS}[sink-pause]"),
    _cell("sink", "partition", "no bytes to or from ClickHouse for 4 s", "The insert under way is sent again where its answer was lost, and stored once.", f"{_CELLS}[sink-partition-clickhouse]"),
    _cell("sink", "partition", "no bytes to or from the broker, which lives, for 12 s", "It stores nothing meanwhile and goes on where it was; whole.", f"{_CUT_OFF}[sink]"),
    _cell("sink", "clock", "its clock is 5 minutes behind", "What is stored does not depend on it: known_at_us is when the broker says that the record was published; whole.", f"{_CELLS}[sink-clock-behind]"),
    _cell("sink", "schema change", "records of two releases", "Both are stored; columns an older writer lacks get their fill.", "tests/integration/test_rolling_upgrade.py::test_sink_and_api_read_both_releases"),
    _cell("sink", "poison record", "bytes that are no frame in bars", "Passed over and dead-lettered once each with topic, partition and offset; everything else is stored.", f"{_CELLS}[sink-poison]"),
    _cell("sink", "poison record", "bytes that are no frame in gaps", "Passed over and dead-lettered once each with topic, partition and offset; everything else is stored.", f"{_CELLS}[gaps-poison]"),
    _cell("sink", "bad certificate", "ClickHouse with a self-signed certificate", "The sink ends with one sentence and exit code 6.", _CERTIFICATES + "test_a_clickhouse_with_a_bad_certificate_is_refused"),
    # Broker.
    _cell("kafka", "kill", "kill -9 under a replay", "Started again within seconds; everything acknowledged is there; tables equal an undisturbed run.", f"{_CHAOS}[kafka]"),
    _cell("kafka", "kill", "kill -9 under live trades", "Producers keep and resend, consumers go on; whole.", f"{_CELLS}[kafka-kill]"),
    _cell("kafka", "pause", "SIGSTOP for 4 s", "Everybody waits and goes on; whole.", f"{_CELLS}[kafka-pause]"),
    _cell("kafka", "slow disk", "every sync takes 0.4 s, and the broker is killed between them (in simulation)", "What was not acknowledged comes again; tables equal an undisturbed run.", "tests/simulation/test_world.py::test_broker_with_slow_syncs_leaves_the_tables_of_an_undisturbed_run"),
    _cell("kafka", "disk full", "no byte left for its log", "It stops, is started again until there is room, and nothing acknowledged is lost; whole.", _DISKS + "test_a_full_disk_of_a_server_is_survived_once_there_is_room[kafka]"),
    _cell("kafka", "bad certificate", "a broker with a self-signed certificate", "Refused with one sentence that names the certificate.", _CERTIFICATES + "test_a_broker_with_a_bad_certificate_is_refused"),
    _cell("registry", "schema change", "an incompatible schema of a topic", "The registry refuses it.", "tests/integration/test_stack_registry.py::test_the_protocol_from_registration_to_deletion"),
    _cell("worker", "schema change", "a planted incompatible change of a schema", "The compatibility check names it before anything is released.", "tests/schemas/test_evolution.py::test_a_planted_break_is_found"),
    _cell("collector", "kill", "kill -9 while frames wait on disk", "The next process sends what the first had spooled, in order.", "tests/infra/test_spool.py::test_killed_anywhere_the_next_process_sends_what_the_first_had_spooled"),
    # ClickHouse.
    _cell("clickhouse", "kill", "kill -9 under live trades", "Started again; the sink waits, then writes what is missing, each row once.", f"{_CELLS}[clickhouse-kill]"),
    _cell("clickhouse", "kill", "kill -9 right after an insert was acknowledged", "The rows are there.", "tests/integration/test_stack_clickhouse.py::test_acknowledged_inserts_survive_kill_9"),
    _cell("clickhouse", "pause", "SIGSTOP for 4 s", "The sink waits; whole.", f"{_CELLS}[clickhouse-pause]"),
    _cell("clickhouse", "slow disk", "inserts take two seconds and more", "The sink waits for each and stores all rows once; whole while it lasts, too.", f"{_CELLS}[clickhouse-slow]"),
    _cell("clickhouse", "disk full", "no byte left for its tables", "Inserts fail, the sink says so and tries again; with room everything arrives; whole.", _DISKS + "test_a_full_disk_of_a_server_is_survived_once_there_is_room[clickhouse]"),
    _cell("clickhouse", "disk full", "an insert while no byte is left", "It is refused, though the engine itself answers as if it were stored; tried again it is stored once.", _DISKS + "test_an_insert_on_a_full_disk_is_refused_and_stored_when_there_is_room"),
    _cell("clickhouse", "schema change", "tables of an earlier release", "They get the new columns; rows stored before have the fill.", "tests/integration/test_rolling_upgrade.py::test_rows_stored_before_the_upgrade_get_the_fill_of_new_columns"),
    # PostgreSQL, registry.
    _cell("postgres", "kill", "kill -9", "Started again; collecting does not stop.", f"{_CELLS}[postgres-kill]"),
    _cell("postgres", "pause", "SIGSTOP for 4 s", "Collecting does not stop.", f"{_CELLS}[postgres-pause]"),
    _cell("postgres", "bad certificate", "verify-full against a server without TLS", "Refused by name; nothing is said in the clear.", _CERTIFICATES + "test_a_postgres_without_the_certificate_asked_for_is_refused"),
    _cell("registry", "kill", "kill -9", "Running processes know their schemas; it comes back with every subject, id and text it had; whole.", f"{_CELLS}[registry-kill]"),
    _cell("registry", "pause", "SIGSTOP for 4 s", "Running processes know their schemas; whole.", f"{_CELLS}[registry-pause]"),
    # API.
    _cell("api", "kill", "kill -9", "Started again; history answers; whole.", f"{_KILLS}[api]"),
    _cell("api", "kill", "kill -9 and SIGTERM under open streams", "Clients that come back with their cursor resume where they were: history and stream give every row once.", "tests/integration/test_api_stack.py::test_history_and_stream_join_exactly_once_through_disconnects_and_restarts"),
    _cell("api", "pause", "SIGSTOP for 4 s", "It answers again at once.", f"{_CELLS}[api-pause]"),
    _cell("api", "partition", "no server answers", "503 that names who is away, within seconds; alive all the while.", "tests/integration/test_api_outages.py::test_without_any_server_everything_is_a_503_that_names_who_is_away"),
    _cell("api", "kill", "the broker is killed under open streams", "Streams go on by themselves, exactly once.", "tests/integration/test_api_stack.py::test_the_stream_goes_on_by_itself_after_kill_9_of_the_broker"),
    # Supervisor.
    _cell("supervisor", "kill", "kill -9 of the supervisor", "No process of it survives; the next start works and continues from the data.", "tests/integration/test_stack_supervisor.py::test_no_process_survives_kill_9_of_the_supervisor_and_the_next_up_works"),
    _cell("supervisor", "disk full", "less than 512 MB free at the start", "Nothing is started; one sentence with the folder and the bytes.", "tests/infra/test_datadir.py::test_too_little_space_is_refused_before_anything_starts"),
    _cell("supervisor", "pause", "a worker is stopped (SIGSTOP) for good", "It answers nobody, and is ended and started again for that.", "tests/integration/test_supervision.py::test_a_worker_that_is_stopped_is_found_and_started_again"),
    _cell("kafka", "partition", "the broker is stopped for a while (minutes in the full form)", "Collectors spool, everybody names the broker, nobody is restarted, all of it arrives in order after.", "tests/integration/test_supervision.py::test_a_broker_that_is_away_costs_no_trade"),
    _cell("clickhouse", "partition", "ClickHouse is away for as long", "Topics hold what the sink cannot store; the sink and the API name it, the others go on.", "tests/integration/test_supervision.py::test_a_clickhouse_that_is_away_costs_no_row"),
    _cell("collector", "kill", "kill -9 and SIGTERM while the broker is away", "The spool is sent first, what nobody listened to is fetched.", "tests/integration/test_supervision.py::test_ends_while_the_broker_is_away_lose_nothing"),
    _cell("collector", "disk full", "a spool of 1 MB under 6,000 trades/s without a broker", "Reading stops, readiness says so, memory stays; in the end no id is missing.", "tests/integration/test_spool_stack.py::test_a_full_spool_stops_reading_and_what_was_missed_is_fetched"),
    _cell("collector", "kill", "kill -9 in the middle of a long fetch", "The next process goes on from there.", "tests/integration/test_collector_ledger.py::test_a_long_gap_is_fetched_further_by_the_process_after_a_kill"),
    _cell("repair", "kill", "kill -9 between publishing and done", "The next process finds what was published, compares, and publishes nothing twice.", "tests/integration/test_repair.py::test_killed_between_publishing_and_done_it_publishes_nothing_twice"),
    _cell("repair", "venue", "a trade too late for the worker", "It is stored and dead-lettered; its bar is made anew with it.", "tests/integration/test_repair.py::test_a_trade_too_late_for_the_worker_is_in_its_bar_in_the_end"),
    _cell("backfill", "kill", "kill -9 in the middle", "Run again it goes on where the broker had acknowledged; each trade is stored once.", "tests/integration/test_backfill.py::test_killed_in_the_middle_and_run_again_it_stores_each_trade_once_and_makes_its_bars"),
    _cell("every consumer", "poison record", "records of every kind that cannot be read, in every topic", "What follows them is processed by everybody.", "tests/integration/test_poison.py::test_what_follows_a_poison_record_is_processed_by_every_consumer"),
    _cell("every consumer", "poison record", "well-formed frames that say what cannot be", "They pass worker, sink, repair and API; what follows is stored.", "tests/integration/test_poison.py::test_frames_that_say_what_cannot_be_stop_nobody"),
    _cell("registry", "poison record", "damaged records in its topic", "They are skipped; those around them are known after a start.", "tests/integration/test_poison.py::test_the_registry_reads_on_past_damaged_schema_records"),
    _cell("worker", "poison record", "damaged records in the topic of its snapshots", "The newest whole snapshot is found behind them.", "tests/integration/test_poison.py::test_a_snapshot_is_found_behind_damaged_state_records"),
)  # fmt: skip


def named_tests(cells: Sequence[Cell] = CELLS) -> tuple[str, ...]:
    """Every test the matrix names, each once, in its order."""
    return tuple(dict.fromkeys(cell.test for cell in cells))


def missing_tests(cells: Sequence[Cell] = CELLS, root: Path = ROOT) -> list[str]:
    """Named tests that do not exist: no such file, no such function, or a parameter that stands nowhere in the file."""
    found = []
    for test in named_tests(cells):
        name, _, rest = test.partition("::")
        function, _, parameter = rest.partition("[")
        path = root / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        tree = ast.parse(text)
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        literals = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        if function not in functions or (parameter and parameter.removesuffix("]") not in literals):
            found.append(test)
    return found


def page(cells: Sequence[Cell] = CELLS) -> str:
    """The text of ``docs/faults.md``."""
    parts = list(dict.fromkeys(cell.part for cell in cells))
    lines = [
        "# What happens when something breaks",
        "",
        "Generated by `python -m infra.prove.matrix` from `infra/prove/matrix.py`; a test compares. Every cell is shown by the test it names, and",
        "`make prove ARGS=matrix` runs them all. *Whole* means: every trade the market made is stored once, bars go on, nobody did anything by hand.",
        "",
        f"{len(cells)} cells.",
        "",
        "| | " + " | ".join(FAULTS) + " |",
        "| --- |" + " --- |" * len(FAULTS),
    ]
    for part in parts:
        counts = [sum(cell.part == part and cell.fault == fault for cell in cells) for fault in FAULTS]
        lines.append(f"| **{part}** | " + " | ".join(str(count) if count else "" for count in counts) + " |")
    for part in parts:
        lines += ["", f"## {part}", "", "| fault | what is done | what happens | shown by |", "| --- | --- | --- | --- |"]
        for cell in cells:
            if cell.part == part:
                lines.append(f"| {cell.fault} | {cell.what} | {cell.outcome} | `{cell.test.replace('tests/', '').replace('::', ' ')}` |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the page; with ``--check`` say whether it is up to date."""
    text = page()
    if "--check" in arguments:
        current = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
        if current != text:
            print(f"{PAGE.relative_to(ROOT)} is not what the matrix says: run python -m infra.prove.matrix", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    print(f"{len(CELLS)} cells in {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
