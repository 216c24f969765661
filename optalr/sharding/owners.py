"""Who takes which matrices: a plan made from costs alone, the same on every device.

A root costs n³, and the two products of a direction cost ``mn(m + n)``, so a list of sizes is a
list of jobs. The jobs go out longest first, each to the device that has least to do so far (Graham
1969). No device then has more than the mean and one job, and never more than 4/3 of what the best
of all plans gives its busiest device. Sizes are planned together: a device without a share of the
few large matrices takes more of the small ones.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Share(NamedTuple):
    """Which matrices of one size each device takes.

    Attributes:
      counts: ``(num_devices,)``, how many.
      starts: ``(num_devices,)``, the place of the first in the stack; the others follow it.
    """

    counts: np.ndarray
    starts: np.ndarray


def share_out(sizes: Sequence[int], numbers: Sequence[int], num_devices: int) -> list[Share]:
    """Return the share of each device in the roots of matrices of each size.

    Args:
      sizes: n, the rows of each kind of matrix.
      numbers: how many there are of each kind.
      num_devices: D, >= 1.
    """
    return share_out_jobs([size**3 for size in sizes], numbers, num_devices)


def share_out_jobs(costs: Sequence[int], numbers: Sequence[int], num_devices: int) -> list[Share]:
    """Return the share of each device in the jobs of each kind.

    Args:
      costs: of one job of each kind, in any unit.
      numbers: how many there are of each kind.
      num_devices: D, >= 1.
    """
    counts = np.zeros((len(costs), num_devices), np.int64)
    loads = [(0, device) for device in range(num_devices)]  # a heap: the least to do comes first
    for kind in sorted(range(len(costs)), key=lambda kind: -costs[kind]):
        for _ in range(numbers[kind]):
            load, device = heapq.heappop(loads)
            counts[kind, device] += 1
            heapq.heappush(loads, (load + costs[kind], device))
    # Neighbours in a stack go to one device, so that its share is one slice.
    starts = np.cumsum(counts, axis=1) - counts
    return [Share(*pair) for pair in zip(counts, starts, strict=True)]
