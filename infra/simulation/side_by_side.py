"""Worlds side by side, one a core: a function and what to call it with in, results in the order of the calls out.

A world is one thread's work, and a sweep is thousands of worlds that know nothing of each other. Results do not depend on the number of
cores: they are handed out in order, and whoever asks for more calls has seen the same results before.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import Final, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")

AHEAD: Final = 4
"""Calls that are begun before the first of them is handed out, whatever the number of cores: more would be in vain where a sweep ends early."""


def side_by_side(work: Callable[[_T], _R], calls: Iterable[_T]) -> Iterator[tuple[_T, _R]]:
    """(call, ``work(call)``) in the order of ``calls``, which is advanced ``AHEAD`` calls at most before a result is handed out.

    Args:
        work: a function of a module; calls and results are pickled. What it raises is raised here in its turn.
        calls: may look at what became of earlier ones; its end is the end.
    """
    # a child of its own making: what this process has compiled and started (threads of polars and numba) does not survive a fork
    with ProcessPoolExecutor(min(AHEAD, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        begun: deque[tuple[_T, Future[_R]]] = deque()
        waiting = iter(calls)
        try:
            while True:
                for call in islice(waiting, AHEAD - len(begun)):
                    begun.append((call, pool.submit(work, call)))
                if not begun:
                    return
                call, future = begun.popleft()
                yield call, future.result()
        finally:
            for _, future in begun:
                future.cancel()
