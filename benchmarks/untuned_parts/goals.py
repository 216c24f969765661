"""One method against its rivals: on how many problems it is better, level or worse."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from .curves import TEST, Run, mean_and_error
from .gathering import REFERENCE, Bench, BySeed

BETTER, LEVEL, WORSE = "better", "level", "worse"
# A difference within this many standard errors counts as no loss for either side.
TIE = 0.5
# Adam's best validation loss should be reached within this share of the steps.
EARLY = 0.75


class Comparison(NamedTuple):
    """Two methods on one problem, by a number of which less is better.

    Attributes:
      difference: the mean over seeds of ours less theirs.
      error: its standard error.
    """

    difference: float
    error: float

    @property
    def verdict(self) -> str:
        """Whether ours is better; level if the difference is within half a standard error."""
        if abs(self.difference) <= TIE * self.error:
            return LEVEL
        return BETTER if self.difference < 0 else WORSE


def compare(ours: BySeed, theirs: BySeed) -> Comparison:
    """Compare two methods on the seeds that both have run."""
    seeds = sorted(set(ours) & set(theirs))
    # Two runs that both broke off are equal.
    differences = [0.0 if ours[s] == theirs[s] else ours[s] - theirs[s] for s in seeds]
    if np.inf in differences and -np.inf in differences:
        return Comparison(0.0, 0.0)
    return Comparison(*mean_and_error(differences))


def final_loss(run: Run) -> float:
    """Return the final test loss."""
    return run.final(TEST)


def final_error(run: Run) -> float:
    """Return the final test score with a minus."""
    return run.error


@dataclasses.dataclass(frozen=True)
class Tally:
    """Verdicts by problem.

    Attributes:
      verdicts: problem -> verdict, where there are runs.
      roles: problem -> role, for all problems.
    """

    verdicts: Mapping[str, str]
    roles: Mapping[str, str]

    def count(self, verdict: str, role: str | None = None) -> int:
        """Return how many problems have a verdict, all or those of a role."""
        return sum(v == verdict and role in (None, self.roles[p]) for p, v in self.verdicts.items())

    def shown(self, role: str | None = None) -> str:
        """Return the three counts: better, level, worse."""
        return " / ".join(str(self.count(v, role)) for v in (BETTER, LEVEL, WORSE))

    @property
    def num_missing(self) -> int:
        """How many problems have no verdict yet."""
        return len(self.roles) - len(self.verdicts)


def tally(bench: Bench, ours: str, theirs: str, *, value: Callable[[Run], float]) -> Tally:
    """Compare two methods on every problem on which both have runs."""
    verdicts = {
        problem: compare(
            bench.values(problem, ours, value), bench.values(problem, theirs, value)
        ).verdict
        for problem in bench.problems(ours, theirs)
    }
    return Tally(verdicts, bench.roles)


def tally_early(bench: Bench, method: str, *, of_adams: bool) -> Tally:
    """Judge whether tuned Adam's lowest validation loss is reached early, on every seed.

    Args:
      bench: all runs.
      method: which method to judge.
      of_adams: whether the steps are compared with those that Adam took until there, not with the
        steps of a run.
    """
    verdicts = {}
    for problem in bench.problems(method, REFERENCE):
        shares = bench.share_until_validation(problem, method)
        adams = bench.share_until_validation(problem, REFERENCE)
        allowed = np.mean([adams[seed] for seed in shares]) if of_adams else 1.0
        early = np.mean(list(shares.values())) <= EARLY * allowed
        verdicts[problem] = BETTER if early else WORSE
    return Tally(verdicts, bench.roles)


class Goal(NamedTuple):
    """What a method should attain.

    Attributes:
      text: what is counted.
      needed: on how many problems.
      counted: the verdicts.
      ties_meet: whether a level problem attains it as it is stated.
    """

    text: str
    needed: int
    counted: Tally
    ties_meet: bool = False

    @property
    def result(self) -> str:
        """``met``, ``met with ties``, ``missed`` or ``open``, while problems are missing."""
        better, level = self.counted.count(BETTER), self.counted.count(LEVEL)
        if better + (level if self.ties_meet else 0) >= self.needed:
            return "met"
        if better + level >= self.needed:
            return "met with ties"
        possible = better + level + self.counted.num_missing
        return "open" if possible >= self.needed and self.counted.num_missing else "missed"


def peers(bench: Bench, recipe: str) -> list[str]:
    """Return the other methods without tuning that have runs, ablations left out."""
    return [
        name
        for name, method in bench.methods.items()
        if not (method.tuned or method.ablation or name == recipe) and bench.problems(name)
    ]


def rivals(bench: Bench, recipe: str) -> list[str]:
    """Return all other methods that have runs, tuned ones first, ablations left out."""
    tuned = [n for n, m in bench.methods.items() if m.tuned and n != recipe and bench.problems(n)]
    return [*tuned, *peers(bench, recipe)]


def goals(bench: Bench, recipe: str) -> list[Goal]:
    """Return all goals of a method with what was counted for them, save those against itself."""

    def loss(rival: str) -> Tally:
        return tally(bench, recipe, rival, value=final_loss)

    accuracy = tally(bench, recipe, REFERENCE, value=final_error)
    of_run = tally_early(bench, recipe, of_adams=False)
    of_adams = tally_early(bench, recipe, of_adams=True)
    early = "best validation loss of tuned `adam` within three quarters of"
    against_adam = [
        Goal("final test loss lower than tuned `adam`'s", 9, loss(REFERENCE)),
        Goal("accuracy no lower than tuned `adam`'s", 9, accuracy, ties_meet=True),
        Goal(f"{early} a run's steps", 8, of_run),
        Goal(f"{early} the steps that it took itself", 8, of_adams),
    ]
    against_adamw = [Goal("final test loss lower than tuned `adamw`'s", 7, loss("adamw"))]
    return [
        *(against_adam if recipe != REFERENCE else ()),
        *(against_adamw if recipe != "adamw" else ()),
        *(
            Goal(f"final test loss lower than `{peer}`'s", 8, loss(peer))
            for peer in peers(bench, recipe)
        ),
    ]


def loss_ratios(bench: Bench, ours: str, theirs: str) -> dict[str, float]:
    """Return our final test loss over theirs by problem: means over the seeds that both have.

    A ratio to a method that broke off is NaN.
    """
    ratios = {}
    for problem in bench.problems(ours, theirs):
        seeds = bench.seeds(problem, (ours, theirs))
        above, below = (
            np.mean([final_loss(bench.of(problem, name)[seed]) for seed in seeds])
            for name in (ours, theirs)
        )
        ratios[problem] = float(above / below) if np.isfinite(below) else np.nan
    return ratios


def geometric_mean(ratios: Iterable[float]) -> float:
    """Return the geometric mean of positive numbers, NaNs left out; NaN for none."""
    logarithms = [np.log(ratio) for ratio in ratios if not np.isnan(ratio)]
    return float(np.exp(np.mean(logarithms))) if logarithms else np.nan
