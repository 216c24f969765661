"""Tables of the bench in Markdown: a table for each problem, the ablations, what is missing."""

from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from .curves import TEST, TEST_SCORE, Run, mean_and_error
from .gathering import REFERENCE, Bench, BySeed
from .goals import WORSE, final_loss, geometric_mean, loss_ratios, tally

COLUMNS = (
    "method",
    "numbers chosen",
    "final test loss",
    "lowest test loss",
    "{score}",
    "steps until Adam's training loss",
    "seconds",
    "steps until Adam's best validation loss",
    "seconds",
    "seconds of a run over Adam's",
)


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Iterable[float], *, digits: int = 3) -> str:
    """Return mean ± standard error, and how many runs broke off."""
    values = list(values)
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return "broke off"
    mean, error = mean_and_error(finite)
    text = f"{mean:#.{digits}g} ± {error:.1g}"
    return text if len(finite) == len(values) else f"{text} ({len(values) - len(finite)} broke off)"


def reached(by_seed: BySeed, form: Callable[[float], str]) -> str:
    """Return the mean over the seeds that reached something, and how many did; or never."""
    values = list(by_seed.values())
    finite = [value for value in values if np.isfinite(value)]
    if not values:
        return "?"
    if not finite:
        return "never"
    text = form(float(np.mean(finite)))
    return text if len(finite) == len(values) else f"{text} ({len(finite)} of {len(values)} seeds)"


def in_percent(share: float) -> str:
    """Return a share of a run."""
    return f"{100 * share:.0f} %"


def in_seconds(seconds: float) -> str:
    """Return seconds with two digits."""
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def is_regression(runs: Iterable[Run]) -> bool:
    """Return whether runs are of a regression: their scores are below zero."""
    return any((run.curve[:, TEST_SCORE] < 0).any() for run in runs)


def score(runs: Collection[Run]) -> str:
    """Return the accuracy in percent; of a regression the mean squared error."""
    if is_regression(runs):
        return spread(run.error for run in runs)
    ended = [-100 * run.error for run in runs if np.isfinite(run.error)]
    if not ended:
        return "broke off"
    mean, error = mean_and_error(ended)
    return f"{mean:.1f} ± {error:.1f}"


def row(bench: Bench, problem: str, method: str) -> list[str]:
    """Return a method's row in a problem's table."""
    runs = bench.of(problem, method)
    numbers = next(iter(runs.values())).numbers
    training = bench.share_until_training(problem, method)
    validation = bench.share_until_validation(problem, method)
    fewer = len(runs) < len(bench.of(problem, REFERENCE))
    return [
        f"`{method}`" + (f" ({len(runs)} of the seeds)" if fewer else ""),
        ", ".join(f"{name} {number:g}" for name, number in numbers.items()) or "none",
        spread(run.final(TEST) for run in runs.values()),
        spread(run.lowest(TEST) for run in runs.values()),
        score(runs.values()),
        reached(training, in_percent),
        reached(bench.in_seconds(problem, method, training), in_seconds),
        reached(validation, in_percent),
        reached(bench.in_seconds(problem, method, validation), in_seconds),
        f"{bench.relative_seconds(problem, method):.2f}",
    ]


def problem_table(bench: Bench, problem: str) -> str:
    """Return the table of a problem: a row for each method that has runs."""
    names = [name for name in bench.methods if bench.of(problem, name)]
    regression = any(is_regression(bench.of(problem, name).values()) for name in names)
    shown = "squared error" if regression else "accuracy %"
    return table(
        (column.format(score=shown) for column in COLUMNS),
        (row(bench, problem, name) for name in names),
    )


def ratio(value: float | None) -> str:
    """Return a ratio with two digits, ? where there is no run, – where the other one broke off."""
    if value is None:
        return "?"
    return "–" if np.isnan(value) else f"{value:.2f}"


def ratio_table(bench: Bench, pairs: Mapping[str, tuple[str, str]], *, first: str) -> str:
    """Return final test losses as ratios, a row for each pair of methods, a column a problem.

    Args:
      bench: all runs.
      pairs: heading of a row -> two methods; the first one's loss is divided by the second one's.
      first: the heading of the first column.
    """
    rows = []
    for name, (ours, theirs) in pairs.items():
        ratios = loss_ratios(bench, ours, theirs)
        cells = [ratio(ratios.get(problem)) for problem in bench.roles]
        worse = tally(bench, ours, theirs, value=final_loss).count(WORSE)
        mean = f"{geometric_mean(ratios.values()):.3f}"
        rows.append([f"`{name}`", mean, f"{worse} of {len(ratios)}", *cells])
    problems = [problem.replace("_", " ") for problem in bench.roles]
    return table([first, "geometric mean", "worse on", *problems], rows)


def ablation_table(bench: Bench, recipe: str) -> str:
    """Return the recipe without each of its parts: final test losses over the whole's."""
    wholes = {n: m.whole or recipe for n, m in bench.methods.items() if m.ablation}
    pairs = {n: (n, whole) for n, whole in wholes.items() if bench.problems(n, whole)}
    if not pairs:
        return f"No runs of `{recipe}` without a part are stored yet."
    return ratio_table(bench, pairs, first="recipe")


def missing_text(bench: Bench) -> str:
    """Return which methods lack which problems."""
    if not bench.missing:
        return "Every method has runs on every problem."
    total = len(bench.roles)
    lines = [
        f"* `{name}`: {total - len(problems)} of {total} problems; missing {', '.join(problems)}."
        for name, problems in bench.missing.items()
    ]
    return "\n".join(lines)
