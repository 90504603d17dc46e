"""Import directions and the seam: read from every module's syntax tree, so that they hold without running anything."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "schemas": {"schemas"},
    "collectors": {"collectors", "schemas"},
    "processors": {"processors", "schemas"},
    "streams": {"streams", "processors", "schemas"},
    "api": {"api", "schemas"},
    "infra": {"api", "collectors", "infra", "processors", "schemas", "streams"},
}
OURS = set(ALLOWED) | {"tests"}
PURE = ("collectors", "processors", "streams")
SEAM = "infra/seam.py"
UNSEAMED = {
    SEAM: "the seam itself: the only module that asks the operating system for time, sleep and randomness",
    "infra/bootstrap.py": "runs before anything is installed, on the system's Python",
    "infra/settings.py": "reads the environment, once, for everybody",
    "infra/cli/": "commands at a person's terminal: they time themselves and wait for other processes",
    "infra/stack/": "starts and watches processes of the operating system, hands the environment on and names new clusters",
    "infra/prove/": "runs the proofs on the real stack and times them",
    "infra/simulation/world.py": "puts seeded randomness in the place of the process's own while a world runs",
}
"""Where a raw clock, sleep, random number or the environment is met outside the seam, each with its reason; folders end with a slash."""
# Reading a clock, drawing a number or sleeping anywhere but through `schemas.seam.Clock` cannot be replayed or simulated.
FORBIDDEN_CALLS = {
    "time": {
        *("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "sleep"),
        *("process_time", "process_time_ns", "thread_time", "thread_time_ns", "clock_gettime", "clock_gettime_ns", "localtime", "gmtime"),
    },
    "random": {"*"},
    "asyncio": {"sleep"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
    "os": {"urandom", "getrandom", "environ", "getenv"},
    "uuid": {"uuid1", "uuid4", "uuid6", "uuid7"},
    "secrets": {"*"},
}
NUMPY_RANDOM = ("np.random.", "numpy.random.")
SEEDED = {"Random", "Generator", "default_rng", "PCG64", "SFC64", "Philox", "MT19937", "SeedSequence"}
ALLOWED_FROM_RANDOM = {"Random"}  # a type, seeded by whoever owns the seam


def modules(package: str) -> list[Path]:
    """Every module of a package."""
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """``(line, top-level package)`` of every import, at any depth of the module; relative ones are the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, package if node.level else (node.module or "").partition(".")[0]


def seam_breaks(tree: ast.Module) -> list[tuple[int, str]]:
    """``(line, what)`` of every use of a clock, randomness, sleep or environment that does not come in as an argument."""
    found: list[tuple[int, str]] = []
    # only what a module imports is that module: `random` may be an argument as well
    aliases: dict[str, set[str]] = {module: set() for module in FORBIDDEN_CALLS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "datetime":
                    aliases["date"].add("date")  # datetime.date.today()
                if alias.name in aliases:
                    aliases[alias.name].add(alias.asname or alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN_CALLS and not node.level:
            names = {alias.name for alias in node.names}
            forbidden = FORBIDDEN_CALLS[node.module]
            classes = {name: name for name in ("datetime", "date") if name in names and node.module == "datetime"}
            for name in classes:
                aliases[name].add(name)
            bad = names - ALLOWED_FROM_RANDOM if "*" in forbidden else names & forbidden
            found.extend((node.lineno, f"from {node.module} import {name}") for name in sorted(bad))
    yields = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and len(node.args) == 1 and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0
    }
    owner = {alias: module for module, names in aliases.items() for alias in names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or (node.attr == "sleep" and id(node) in yields):
            continue  # `sleep(0)` waits for nothing: it lets the other tasks run
        base = node.value.id if isinstance(node.value, ast.Name) else node.value.attr if isinstance(node.value, ast.Attribute) else ""
        module = owner.get(base, "")
        if isinstance(node.value, ast.Attribute) and module not in ("datetime", "date"):
            continue  # `self.time.x`, `clock.random.random()`: what came in as an argument
        forbidden = FORBIDDEN_CALLS.get(module, set())
        if node.attr in forbidden or ("*" in forbidden and node.attr not in ALLOWED_FROM_RANDOM):
            found.append((node.lineno, f"{base}.{node.attr}"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        # numpy's one global generator, and any generator that is given no seed and so takes one from the system
        if called.startswith(NUMPY_RANDOM) and called.count(".") == 2 and called.rpartition(".")[2] not in SEEDED:
            found.append((node.lineno, called))
        elif called.rpartition(".")[2] in SEEDED and not node.args and not node.keywords:
            found.append((node.lineno, f"{called}()"))
    return found


def exempt(name: str) -> str:
    """The entry of UNSEAMED that a module falls under, empty for none."""
    return next((entry for entry in UNSEAMED if name == entry or (entry.endswith("/") and name.startswith(entry))), "")


@pytest.mark.parametrize("package", ALLOWED)
def test_package_imports_only_what_lies_upstream_of_it(package: str) -> None:
    """No module of a package imports one of ours that its layer may not know."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(package)
        for line, name in imported(ast.parse(path.read_text("utf-8")), package)
        if name in OURS and name not in ALLOWED[package]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PURE)
def test_pure_package_takes_clock_randomness_and_sleep_as_arguments(package: str) -> None:
    """No module of a pure package reads a clock, sleeps, draws a number or reads the environment by itself."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} uses {what}"
        for path in modules(package)
        for line, what in seam_breaks(ast.parse(path.read_text("utf-8")))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["api", "infra"])
def test_shell_takes_clock_randomness_and_sleep_from_the_seam(package: str) -> None:
    """Nor does a shell, but for the modules listed with their reasons: what it cannot take as an argument it takes from the seam."""
    wrong = [
        f"{name}:{line} uses {what}: take it from infra.seam or as an argument"
        for path in modules(package)
        if not exempt(name := path.relative_to(ROOT).as_posix())
        for line, what in seam_breaks(ast.parse(path.read_text("utf-8")))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_exception_from_the_seam_is_one() -> None:
    """A module that no longer needs its exception loses it."""
    used = {
        entry
        for package in ("api", "infra")
        for path in modules(package)
        if (entry := exempt(path.relative_to(ROOT).as_posix())) and seam_breaks(ast.parse(path.read_text("utf-8")))
    }
    assert used == set(UNSEAMED), f"not needed any more: {sorted(set(UNSEAMED) - used)}"


@pytest.mark.parametrize("package", ALLOWED)
def test_every_module_says_what_it_is(package: str) -> None:
    """Each module opens with a docstring."""
    silent = [str(path.relative_to(ROOT)) for path in modules(package) if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert not silent, f"without a docstring: {silent}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import time\ntime.time()", ["time.time"]),
        ("import time as t\nt.monotonic()", ["t.monotonic"]),
        ("from time import time", ["from time import time"]),
        ("import random\nrandom.random()", ["random.random"]),
        ("def f(random): random.random()", []),
        ("from random import Random\ndef f(r: Random): r.random()", []),
        ("import asyncio\nasync def f(): await asyncio.sleep(1)", ["asyncio.sleep"]),
        ("import asyncio\nasync def f(): await asyncio.sleep(0)", []),
        ("from datetime import datetime\ndatetime.now()", ["datetime.now"]),
        ("import datetime\ndatetime.datetime.now()", ["datetime.now"]),
        ("async def f(clock): clock.random.random(); await clock.sleep(1); clock.now_us()", []),
        ("import os\nos.environ['A']", ["os.environ"]),
        ("from datetime import datetime\ndatetime.fromtimestamp(0)", []),
        ("import os\nos.getrandom(8)", ["os.getrandom"]),
        ("import time\ntime.clock_gettime(0)", ["time.clock_gettime"]),
        ("import numpy as np\nnp.random.shuffle(a)", ["np.random.shuffle"]),
        ("import numpy as np\nnp.random.default_rng()", ["np.random.default_rng()"]),
        ("import numpy as np\nnp.random.Generator(np.random.PCG64(seed))", []),
        ("from random import Random\nRandom()", ["Random()"]),
        ("from random import Random\nRandom(7)", []),
    ],
)
def test_seam_check_finds_what_it_should(source: str, expected: list[str]) -> None:
    """The check itself: known breaks are found and uses of an argument are not."""
    assert [what for _, what in seam_breaks(ast.parse(source))] == expected
