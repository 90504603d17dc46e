"""Arrays indexed by symbol code that grow as symbols are added."""

from __future__ import annotations

from typing import Any

import numpy as np


def grown(array: np.ndarray[Any, Any], size: int, fill: Any) -> np.ndarray[Any, Any]:
    """``array`` with at least ``size`` entries, new ones set to ``fill``; grows by a quarter so that adding symbols stays linear."""
    if len(array) >= size:
        return array
    larger = np.full(max(size, len(array) + len(array) // 4 + 16), fill, array.dtype)
    larger[: len(array)] = array
    return larger
