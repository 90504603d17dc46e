"""Runs one of our processes with a clock that is wrong: ``python -m tests.integration.shifted SECONDS MODULE [ARGUMENTS]``.

The seam's wall clock and Python's own are shifted, so everything in the process that asks for the time gets the wrong one.
"""

from __future__ import annotations

import runpy
import sys
import time

_real_time, _real_time_ns = time.time, time.time_ns


def main() -> None:
    """Shift, then run the module as ``__main__``."""
    shift_s = float(sys.argv[1])
    time.time = lambda: _real_time() + shift_s
    time.time_ns = lambda: _real_time_ns() + int(shift_s * 1e9)
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
