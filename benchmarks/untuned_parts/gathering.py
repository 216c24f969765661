"""All reported runs of the bench, and what each says beside tuned Adam's run of the same seed."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from .curves import STEP, TRAIN, VALIDATION, Run
from .methods import Method
from .storing import Store, chosen

# What all others are measured by.
REFERENCE = "adam"
BySeed = dict[int, float]


def reported(store: Store, method: Method, *, points: tuple[int, int]) -> dict[int, Run]:
    """Return a method's runs by seed; of a tuned method those with the numbers chosen now.

    Args:
      store: the runs of a problem.
      method: whose runs.
      points: how many points a reported run has, and one in a grid.
    """
    numbers = method.grid[0]
    if method.tuned:
        grid = store.of(method.name, points[1])
        if not grid:
            return {}
        numbers = chosen(grid)
    runs = store.of(method.name, points[0])
    return {run["seed"]: Run.of(run) for run in runs if run["numbers"] == numbers}


@dataclasses.dataclass(frozen=True)
class Bench:
    """Reported runs.

    Attributes:
      roles: problem -> ``"development"`` or ``"end"``, for all problems.
      methods: name -> method, for all methods.
      runs: problem and method -> seed -> run, for those that have runs.
    """

    roles: Mapping[str, str]
    methods: Mapping[str, Method]
    runs: Mapping[tuple[str, str], dict[int, Run]]

    @classmethod
    def read(
        cls,
        folder: pathlib.Path,
        roles: Mapping[str, str],
        methods: Mapping[str, Method],
        *,
        points: tuple[int, int],
    ) -> "Bench":
        """Read the stored runs of a folder."""
        runs = {}
        for problem in roles:
            store = Store(problem, folder)
            for name, method in methods.items():
                if found := reported(store, method, points=points):
                    runs[problem, name] = dict(sorted(found.items()))
        return cls(roles, methods, runs)

    def of(self, problem: str, method: str) -> dict[int, Run]:
        """Return the runs of a method on a problem by seed, none where there are none."""
        return self.runs.get((problem, method), {})

    def problems(self, *methods: str) -> list[str]:
        """Return the problems on which all of some methods have runs of a seed in common."""
        return [p for p in self.roles if self.seeds(p, methods)]

    def seeds(self, problem: str, methods: Iterable[str]) -> list[int]:
        """Return the seeds that all of some methods have run on a problem."""
        sets = [set(self.of(problem, method)) for method in methods]
        return sorted(set.intersection(*sets))

    def values(self, problem: str, method: str, value: Callable[[Run], float]) -> BySeed:
        """Return a number of each run of a method on a problem."""
        return {seed: value(run) for seed, run in self.of(problem, method).items()}

    @functools.cached_property
    def missing(self) -> dict[str, list[str]]:
        """Method -> the problems without a run of it, methods that lack nothing left out."""
        lacking = {
            name: [p for p in self.roles if not self.of(p, name)]
            for name, method in self.methods.items()
            if not method.ablation
        }
        return {name: problems for name, problems in lacking.items() if problems}

    # Beside tuned Adam's run of the same seed.

    def paired(self, problem: str, method: str, value: Callable[[Run, Run], float]) -> BySeed:
        """Return a number of each run and of tuned Adam's run of its seed."""
        ours, reference = self.of(problem, method), self.of(problem, REFERENCE)
        seeds = self.seeds(problem, (method, REFERENCE))
        return {seed: value(ours[seed], reference[seed]) for seed in seeds}

    def share_until_training(self, problem: str, method: str) -> BySeed:
        """Return the share of steps until tuned Adam's final training loss."""
        return self.paired(
            problem,
            method,
            lambda run, adam: run.share_until(TRAIN, adam.final(TRAIN), total_steps(adam)),
        )

    def share_until_validation(self, problem: str, method: str) -> BySeed:
        """Return the share of steps until tuned Adam's lowest validation loss."""
        return self.paired(
            problem,
            method,
            lambda run, adam: run.share_until(
                VALIDATION, adam.lowest(VALIDATION), total_steps(adam)
            ),
        )

    def in_seconds(self, problem: str, method: str, shares: BySeed) -> BySeed:
        """Return the seconds that shares of a method's runs took."""
        runs = self.of(problem, method)
        return {seed: share * runs[seed].seconds for seed, share in shares.items()}

    def relative_seconds(self, problem: str, method: str) -> float:
        """Return what a run takes over what a run of tuned Adam takes."""
        ratios = self.paired(problem, method, lambda run, adam: run.seconds / adam.seconds)
        return float(np.mean(list(ratios.values()))) if ratios else np.nan


def total_steps(run: Run) -> float:
    """Return the steps of a run."""
    return float(run.curve[-1, STEP])
