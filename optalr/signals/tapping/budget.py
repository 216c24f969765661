"""How much of a batch to measure, if that may cost a share of the gradient's flops.

In: the sites, and what is kept of each leaf. Out: a ``Sampling`` a leaf.

A Gram matrix of d rows needs a few times d samples, and its moving average holds those of many
batches. Convolutions and sequences offer a hundred times as many. With n samples the relative
error of a factor's eigenvalues goes like √(d/n). The sum of d/n over all factors, at a given cost
Σ c·n, is least where n is proportional to √(d/c): small factors get many samples per dimension, for
next to nothing.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from optalr.signals.tapping.gauge import Kept, side_sizes
from optalr.signals.tracing.site import Sampling, Site

# Flops of measuring that are not worth saving: on two cores of a CPU some five milliseconds.
LEAST = 1e8
# More samples per dimension than this tell a moving average nothing new: after twenty batches the
# eigenvalues of a factor are known to some 10 %.
ENOUGH = 8.0
# A small factor costs little, so that it can have the samples of this many dimensions. A batch's
# signals may come from a few of its examples.
SMALLEST = 256


@dataclasses.dataclass(frozen=True)
class Budget:
    """What measuring may cost.

    Attributes:
      max_cost: its flops over those of the layers' gradients, > 0.
    """

    max_cost: float

    def samplings(self, sites: Sequence[Site], kept: Mapping[int, Kept]) -> dict[int, Sampling]:
        """Return which examples and positions of each leaf to look at."""
        costs = [Cost.of(site, kept[site.leaf]) for site in sites]
        if sum(cost.per_row * cost.rows for cost in costs) <= LEAST:
            return {site.leaf: Sampling() for site in sites}
        level = _affordable(costs, max(LEAST, self.max_cost * gradient_flops(costs)))
        # Uses of one leaf have factors of one size, and so one limit.
        limits: dict[int, int] = {}
        for site, cost in zip(sites, costs, strict=True):
            limits[site.leaf] = max(limits.get(site.leaf, 1), cost.sample(level))
        return {leaf: Sampling(max_rows=limit) for leaf, limit in limits.items()}


class Cost(NamedTuple):
    """What measuring a site costs, and what it is worth.

    Fields:
      rows: positions of all examples.
      dimensions: of the larger of its factors.
      per_row: flops of measuring a position, in all layers of a stack.
      gradient: flops of the product and of its two derivatives.
    """

    rows: int
    dimensions: int
    per_row: int
    gradient: int

    @classmethod
    def of(cls, site: Site, kept: Kept) -> "Cost":
        """Count what a site costs whose leaf keeps this."""
        (m, n), rows = side_sizes(site), math.prod(site.extent())
        stack = math.prod(site.leaf_view.matrix_shape(site.origin.leaf_shape)[0])
        per_row = 2 * stack * (site.groups * kept.inputs.count + kept.outputs.count)
        return cls(rows, max(m, n), per_row, 6 * stack * rows * m * n)

    @property
    def worth(self) -> float:
        """√(d/c), to which the number of samples should be proportional."""
        return math.sqrt(self.dimensions / self.per_row)

    @property
    def enough(self) -> int:
        """How many positions are enough."""
        return min(self.rows, int(ENOUGH * max(self.dimensions, SMALLEST)))

    def sample(self, level: float) -> int:
        """Return how many positions are looked at: ``level`` times what it is worth."""
        return max(1, min(self.enough, int(level * self.worth)))


def gradient_flops(costs: Sequence[Cost]) -> float:
    """Return the flops of all products and of their derivatives, in the order of execution."""
    # The first one's input is data, of which nobody wants the derivative.
    return sum(cost.gradient for cost in costs) - costs[0].gradient / 3


def _affordable(costs: Sequence[Cost], budget: float) -> float:
    """Return the highest level of samples within a budget of flops, or one that is enough."""

    def is_affordable(level: float) -> bool:
        return sum(cost.per_row * cost.sample(level) for cost in costs) <= budget

    high = max((cost.enough + 1) / cost.worth for cost in costs)
    if is_affordable(high):
        return high
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_affordable(middle) else (low, middle)
    return low
