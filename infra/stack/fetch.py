"""First-time set-up of the local stack: ``python -m infra.stack.fetch`` downloads Kafka's locked jars and prepares a fast start.

Idempotent; the second run takes 0.1 s. Exit codes: 0, 8 no network, 11 a checksum is wrong.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from infra.errors import MarketstreamError
from infra.stack import kafka
from infra.stack.jars import CACHE_DIR, Progress, exclusive, fetch, read_lock, relock


def ensure(cache: Path = CACHE_DIR, progress: Progress | None = None) -> bool:
    """Everything the broker needs is there afterwards; returns whether something had to be done.

    Raises:
        NetworkError: the network does not answer.
        IntegrityError: a download is not what was locked.
    """
    fetched = fetch(read_lock(), cache, progress)
    if kafka.aot_cache(cache).exists():
        return fetched > 0
    with exclusive(cache):
        if not kafka.aot_cache(cache).exists():
            if progress is not None:
                progress("class cache", 0, 1)
            kafka.train_aot_cache(cache)
    return True


def main(argv: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m infra.stack.fetch", description=__doc__)
    parser.add_argument("--relock", metavar="VERSION", help="maintainers: resolve this Kafka version and write the lock")
    parser.add_argument("--cache", type=Path, default=CACHE_DIR, help="folder for downloads (default: .cache/kafka of the checkout)")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if options.relock:
            print(f"locked {len(relock(options.relock, cache=options.cache))} jars")
        ensure(options.cache, lambda what, done, total: print(f"{what} {done}/{total}", file=sys.stderr))
    except MarketstreamError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
