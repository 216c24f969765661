"""Performance profiles: the share of problems that a method solves within a factor of the best.

Reference: Elizabeth D. Dolan, Jorge J. Moré, "Benchmarking optimization software with performance
profiles", 2002. A problem with one of its seeds counts as one of theirs here.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from .gathering import REFERENCE, Bench, BySeed
from .goals import final_loss


def profile(costs: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Return the share of problems that each method solves within each factor of the best.

    Args:
      costs: ``(problems, methods)``, infinity where a method does not solve a problem.
      factors: at least 1.

    Returns:
      ``(methods, factors)`` shares. A problem that no method solves counts against all.
    """
    # 0 of 0 is as good as the best, so zeros are made a little more.
    costs = np.maximum(costs, 1e-200)
    best = costs.min(axis=1, keepdims=True)
    ratios = costs / np.where(np.isfinite(best), best, 1.0)
    within = ratios[:, :, None] <= factors * (1 + 1e-12)
    return within.mean(axis=0)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What methods needed on all problems that are shown.

    Attributes:
      methods: the columns of ``values``.
      problems: those that are shown; each has a row for every seed.
      values: ``(problems and seeds, methods)``.
    """

    methods: list[str]
    problems: list[str]
    values: np.ndarray


def shown(bench: Bench, recipe: str) -> tuple[list[str], list[str]]:
    """Return the methods and problems of the profiles.

    The problems are those on which the recipe and tuned Adam have runs; where there are none, those
    of tuned Adam. The methods are those that have runs on all of them.
    """
    problems = bench.problems(recipe, REFERENCE) or bench.problems(REFERENCE)
    methods = [
        name
        for name, method in bench.methods.items()
        if not method.ablation and all(bench.of(problem, name) for problem in problems)
    ]
    return methods, problems


def costs(bench: Bench, recipe: str, measure: Callable[[str, str], BySeed]) -> Costs:
    """Gather what ``measure(problem, method)`` returns by seed."""
    methods, problems = shown(bench, recipe)
    rows = []
    for problem in problems:
        measured = [measure(problem, method) for method in methods]
        seeds = sorted(set.intersection(*map(set, measured))) if measured else []
        rows.extend([by_seed[seed] for by_seed in measured] for seed in seeds)
    return Costs(methods, problems, np.array(rows).reshape(-1, len(methods)))


def all_costs(bench: Bench, recipe: str) -> dict[str, Costs]:
    """Return steps and seconds until tuned Adam's lowest validation loss, and final test losses."""

    def seconds(problem: str, method: str) -> BySeed:
        shares = bench.share_until_validation(problem, method)
        return bench.in_seconds(problem, method, shares)

    def loss(problem: str, method: str) -> BySeed:
        return bench.values(problem, method, final_loss)

    measures = {"steps": bench.share_until_validation, "seconds": seconds, "test loss": loss}
    return {name: costs(bench, recipe, measure) for name, measure in measures.items()}
