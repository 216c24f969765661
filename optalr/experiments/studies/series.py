"""A run's rows as arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """Return one number of every row, NaN where a row lacks it."""
    return np.array([row.get(name, np.nan) for row in rows], np.float64)


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the last ``window`` values at each place; at the start, of fewer."""
    if not len(values):
        return values
    window = max(1, min(window, len(values)))
    # By differences of running sums, whose time does not grow with the window.
    total = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)
