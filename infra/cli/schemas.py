"""`marketstream schemas check` and `schemas freeze`: whether today's schemas fit the released ones; see ``infra/schema_evolution.py``."""

from __future__ import annotations

from infra.cli.output import Output
from infra.schema_evolution import SchemaEvolutionError, current, problems, released
from infra.schema_evolution import freeze as write


def check(output: Output) -> None:
    """Say what speaks against the schemas of this checkout. Raises SchemaEvolutionError when anything does."""
    found = problems(current(), released())
    if output.as_json:
        output.emit({"schemas": sorted(current()), "releases": list(released()), "problems": found})
    else:
        for problem in found:
            output.line(problem)
    if found:
        raise SchemaEvolutionError(f"{len(found)} problem(s) with the schemas, the first: {found[0]}")
    if not output.as_json:
        output.line(f"{len(current())} schemas fit those of {', '.join(released())}, forward and backward.")


def freeze(output: Output, *, version: str) -> None:
    """Make today's schemas those of a release. Raises SettingsError, SchemaEvolutionError."""
    written = write(version)
    if output.as_json:
        output.emit({"release": version, "files": [str(path) for path in written]})
        return
    output.line(f"{len(written)} schemas are those of release {version} from now on: commit {written[0].parent}.")
