# The syntax of old Pythons (UP), and os.path because it starts faster than pathlib (PTH):
# ruff: noqa: UP008, UP031, UP032, PTH100, PTH101, PTH103, PTH110, PTH118, PTH119, PTH120, PTH123, PTH208
"""Sets the checkout up: a Python in, a `.venv` with the locked packages, the `marketstream` command and Kafka's jars out.

Runs on the standard library of any Python 3 (its syntax stays within 3.6), so that a Python that is too old is told so in one
sentence instead of a syntax error:

    python3 -I infra/bootstrap.py [run | dev | bench]

``run`` is what `make up` needs, ``dev`` adds the gates and the tests, ``bench`` adds the other programs that `make bench` measures
beside us, in `.venv-bench` (one of them pins an older Kafka client than ours). Everything is kept in the checkout; nothing is read from or written to the
home folder. Packages are checked against the hashes in `requirements/`. A stamp with the hash of the locks makes the next run return
at once (20 ms). Exit codes are those of `infra/errors.py`: 1 for a Python that cannot be used, 8 for no network, 11 for a wrong hash.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time

if False:  # for type checkers; importing typing costs a quarter of the 20 ms
    from collections.abc import Iterator

OLDEST = (3, 11)
NEWEST = (3, 13)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SETS = ("run", "dev", "bench")
EXIT_FAILED, EXIT_DISK, EXIT_NETWORK, EXIT_INTEGRITY, EXIT_STOPPED = 1, 5, 8, 11, 130
ENOSPC = 28
NEEDED_BYTES = 3 * 1024 * 1024 * 1024  # 1.7 GB of packages, 0.5 GB of their cache, 0.13 GB of jars, room to unpack

_NO_NETWORK = re.compile(
    r"NewConnectionError|ConnectTimeout|Retrying \(|name resolution|Network is unreachable|dns error|tcp connect|client error \(Connect\)"
    r"|error sending request|Failed to fetch|Could not connect|Connection refused|timed out|Max retries|UnknownHost|ConnectionError",
    re.IGNORECASE,
)
_WRONG_HASH = re.compile(r"hash mismatch|DO NOT MATCH THE HASHES|locked checksum", re.IGNORECASE)


class SetupError(Exception):
    """One sentence for the operator and the exit code."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super(SetupError, self).__init__(message)
        self.exit_code = exit_code


def main(argv: "list[str]") -> int:
    """Set up the set named in ``argv`` (default ``run``). Returns the exit status."""
    try:
        wanted = argv[0] if argv else "run"
        if wanted not in SETS or len(argv) > 1:
            raise SetupError("bootstrap.py sets up one of: {}; not '{}'.".format(", ".join(SETS), " ".join(argv)), 2)
        if not OLDEST <= sys.version_info[:2] <= NEWEST:
            return _run_under_another_python(argv)
        if is_ready(ROOT, wanted):
            return 0
        with _alone(ROOT):
            if not is_ready(ROOT, wanted):
                set_up(ROOT, wanted)
    except SetupError as error:
        sys.stderr.write("marketstream: {}\n".format(error))
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("marketstream: set-up was interrupted; run the same command again to go on.\n")
        return EXIT_STOPPED
    return 0


def _run_under_another_python(argv: "list[str]") -> int:
    """Hand over to a Python of a usable version, where this machine has one under its usual name."""
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        path = shutil.which("python3.%d" % minor)
        # version managers leave shims of that name that only print an error: ask before handing over
        if path and subprocess.call([path, "-I", "-S", "-c", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0:
            return subprocess.call([path, "-I", os.path.abspath(__file__)] + argv)
    raise SetupError(
        "Marketstream needs Python {}.{} to {}.{}, but {} is {}.{} and no other is installed; "
        "install one of them and run the same command again.".format(*OLDEST + NEWEST, sys.executable, *sys.version_info[:2])
    )


def lock_files(wanted: str) -> "list[str]":
    """The files, relative to the checkout, whose content decides what is installed for that set."""
    return ["requirements/bootstrap.txt", "requirements/{}.txt".format(wanted), "pyproject.toml", "infra/bootstrap.py"]


def fingerprint(root: str, wanted: str) -> str:
    """Hash over the locks of that set and over this Python's version; a change of either sets up again."""
    digest = hashlib.sha256(repr(sys.version_info[:2]).encode())
    for name in lock_files(wanted):
        with open(os.path.join(root, name), "rb") as stream:
            digest.update(stream.read())
    digest.update(root.encode())  # scripts in a venv hold its path: a moved checkout is set up again
    return digest.hexdigest()


def venv_of(root: str, wanted: str) -> str:
    """Folder of the virtual environment for that set."""
    return os.path.join(root, ".venv-bench" if wanted == "bench" else ".venv")


def is_ready(root: str, wanted: str) -> bool:
    """Whether that set, or one that includes it, was set up completely from these very locks."""
    for candidate in {"run": ("run", "dev")}.get(wanted, (wanted,)):
        try:
            with open(os.path.join(venv_of(root, candidate), "ready." + candidate), "rb") as stream:
                if stream.read().decode() == fingerprint(root, candidate):
                    return True
        except OSError:
            continue
    return False


def set_up(root: str, wanted: str) -> None:
    """Create or complete the environment of that set. Raises SetupError."""
    started = time.time()
    _check_disk(root)
    venv = venv_of(root, wanted)
    environ = _environ(root)
    say("Setting up {} with Python {}.{} (once; about a minute)".format(os.path.basename(venv), *sys.version_info[:2]))
    _make_venv(venv, environ)
    python = os.path.join(venv, "bin", "python")
    _install(root, python, venv, wanted, environ)
    if wanted != "bench":
        link_project(root, python)
        compiling = _compile_kernels(root, python, environ)
        _fetch_jars(root, python, environ)
        compiling.wait()  # without success the worker compiles for itself, later
    with open(os.path.join(venv, "ready." + wanted), "w") as stream:
        stream.write(fingerprint(root, wanted))
    say("Set up in %.0f s" % (time.time() - started))


@contextlib.contextmanager
def _alone(root: str) -> "Iterator[None]":
    """One set-up at a time in a checkout; a second one waits for the first."""
    os.makedirs(os.path.join(root, ".cache"), exist_ok=True)
    with open(os.path.join(root, ".cache", "setup.lock"), "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """Progress goes to stderr, so that the output of a command stays its own."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _check_disk(root: str) -> None:
    free = shutil.disk_usage(root).free
    if free < NEEDED_BYTES:
        raise SetupError(
            "set-up needs %.1f GB free where %s lies, %.1f GB are; free some and run the same command again."
            % (NEEDED_BYTES / 1e9, root, free / 1e9),
            EXIT_DISK,
        )


def _environ(root: str) -> "dict[str, str]":
    """Variables for the installers: caches in the checkout, no questions, short time-outs, the user's own package index kept."""
    environ = dict(os.environ)
    cache = os.path.join(root, ".cache")
    environ.setdefault("UV_CACHE_DIR", os.path.join(cache, "uv"))
    environ.setdefault("PIP_CACHE_DIR", os.path.join(cache, "pip"))
    if not environ.get("HOME"):
        environ["HOME"] = cache
    environ.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PIP_RETRIES="2", PIP_DEFAULT_TIMEOUT="20")
    environ.update(UV_NO_CONFIG="1", UV_NO_PROGRESS="1", UV_PYTHON_DOWNLOADS="never", UV_LINK_MODE=environ.get("UV_LINK_MODE", "hardlink"))
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL"):
        environ.pop(name, None)
    return environ


def _make_venv(venv: str, environ: "dict[str, str]") -> None:
    python = os.path.join(venv, "bin", "python")
    same = "import sys; sys.exit(sys.version_info[:2] != %r)" % (tuple(sys.version_info[:2]),)
    if os.path.exists(python) and _output([python, "-I", "-S", "-c", same], environ)[0] == 0:
        return
    done = _output([sys.executable, "-I", "-m", "venv", "--clear", venv], environ)
    if done[0] == 0:
        return
    if "ensurepip" in done[1]:
        raise SetupError(
            "this Python ({}) cannot make virtual environments; install its venv package "
            "(on Debian: python{}.{}-venv) and run again.".format(sys.executable, *sys.version_info[:2])
        )
    raise SetupError("cannot create %s: %s" % (venv, _last_line(done[1])), _code_of(done[1]))


def _install(root: str, python: str, venv: str, wanted: str, environ: "dict[str, str]") -> None:
    """The locked packages, by uv where it can be had (6 s instead of 40 s), by pip otherwise."""
    lock = os.path.join(root, "requirements", wanted + ".txt")
    by_pip = [python, "-I", "-m", "pip", "install", "--quiet", "--require-hashes", "--only-binary", ":all:"]
    own = os.path.join(root, "requirements", "bootstrap.txt")
    done = _output(by_pip + ["-r", own], environ)
    if done[0] != 0 and _NO_NETWORK.search(done[1]) and "Retrying" in done[1]:
        _refuse_offline()
    if done[0] == 0:
        uv = os.path.join(venv, "bin", "uv")
        _follow_pip_configuration(python, environ)
        say("Installing %s" % os.path.relpath(lock, root))
        done = _output([uv, "pip", "install", "--quiet", "--python", python, "--require-hashes", "--compile-bytecode", "-r", lock], environ)
        if done[0] == 0:
            return
        if _WRONG_HASH.search(done[1]):
            raise SetupError("a downloaded package does not have the locked hash: %s" % _last_line(done[1]), EXIT_INTEGRITY)
    say("Installing %s with pip" % os.path.relpath(lock, root))
    done = _output(by_pip[:-2] + ["-r", lock], environ)
    if done[0] != 0:
        if _NO_NETWORK.search(done[1]):
            _refuse_offline()
        raise SetupError("cannot install %s: %s" % (os.path.relpath(lock, root), _last_line(done[1])), _code_of(done[1]))


def _follow_pip_configuration(python: str, environ: "dict[str, str]") -> None:
    """Give uv the package index and certificates that pip is configured with; it reads no pip configuration."""
    done = _output([python, "-I", "-m", "pip", "config", "list"], environ)
    found = dict(re.findall(r"^(?:global|install|user|site|:env:)\.([a-z-]+)='(.*)'$", done[1], re.MULTILINE))
    if found.get("index-url"):
        environ.setdefault("UV_DEFAULT_INDEX", found["index-url"])
    if found.get("cert"):
        environ.setdefault("SSL_CERT_FILE", found["cert"])


def link_project(root: str, python: str) -> None:
    """Make the checkout importable in its environment and give it the `marketstream` command; needs no build and no network."""
    site = _output([python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], dict(os.environ))[1].strip()
    with open(os.path.join(root, "pyproject.toml"), encoding="utf-8") as stream:
        text = stream.read()
    version = re.findall(r'^version = "(.+)"$', text, re.MULTILINE)[0]
    script, module, function = re.findall(r'^(\S+) = "([\w.]+):(\w+)"$', text, re.MULTILINE)[0]
    files = {
        "marketstream.pth": root + "\n",
        "marketstream-{}.dist-info/METADATA".format(version): "Metadata-Version: 2.1\nName: marketstream\nVersion: {}\n".format(version),
        "marketstream-{}.dist-info/INSTALLER".format(version): "bootstrap\n",
        "marketstream-{}.dist-info/entry_points.txt".format(version): "[console_scripts]\n{} = {}:{}\n".format(script, module, function),
    }
    for old in os.listdir(site):
        if old.startswith("marketstream-") and old.endswith(".dist-info"):
            shutil.rmtree(os.path.join(site, old))
    record = "marketstream-{}.dist-info/RECORD".format(version)
    files[record] = "".join(name + ",,\n" for name in sorted(files)) + record + ",,\n"
    for name, content in files.items():
        path = os.path.join(site, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(content)
    command = os.path.join(os.path.dirname(python), script)
    with open(command, "w", encoding="utf-8") as stream:
        # guarded: a process that multiprocessing spawns imports this file again
        stream.write(
            "#!{}\nimport sys\n\nfrom {} import {}\n\nif __name__ == '__main__':\n    sys.exit({}())\n".format(
                python, module, function, function
            )
        )
    os.chmod(command, 0o755)


def _compile_kernels(root: str, python: str, environ: "dict[str, str]") -> "subprocess.Popen[bytes]":
    """Numba's kernels, beside the download of the jars."""
    say("Compiling kernels")
    environ = dict(environ, PYTHONPATH=root)
    return subprocess.Popen(
        [python, "-m", "infra.warm"], cwd=root, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _fetch_jars(root: str, python: str, environ: "dict[str, str]") -> None:
    """Kafka's jars, checked against their locked sums; skipped where they are already there."""
    if not os.path.exists(os.path.join(root, "infra", "stack", "fetch.py")):
        return
    say("Fetching Kafka")
    environ = dict(environ, PYTHONPATH=root)
    done = _output([python, "-m", "infra.stack.fetch"], environ)
    if done[0] != 0:
        if done[0] == EXIT_NETWORK or _NO_NETWORK.search(done[1]):
            _refuse_offline()
        raise SetupError("cannot fetch Kafka: %s" % _last_line(done[1]), done[0])


def _refuse_offline() -> None:
    raise SetupError(
        "the first set-up downloads its packages and the package index does not answer; connect to the network, "
        "or set PIP_INDEX_URL to an index that can be reached, and run the same command again.",
        EXIT_NETWORK,
    )


def _code_of(text: str) -> int:
    return EXIT_DISK if "No space left" in text or "os error %d" % ENOSPC in text else EXIT_FAILED


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it failed without saying why"


def _output(command: "list[str]", environ: "dict[str, str]") -> "tuple[int, str]":
    """Exit status and everything printed by a command."""
    try:
        child = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        return 1, str(error)
    try:
        out = child.communicate()[0]
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    return child.returncode, out.decode("utf-8", "replace")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
