"""What is made of the stored runs: a page with all tables, two pictures, a summary to print."""

import pathlib

import numpy as np

from . import pictures
from .gathering import REFERENCE, Bench
from .goals import TIE, Goal, final_error, final_loss, goals, rivals, tally
from .methods import METHODS
from .problems import PROBLEMS
from .running import NUM_GRID_POINTS, NUM_POINTS
from .tables import ablation_table, missing_text, problem_table, ratio_table, table

RULE = f"""\
* Losses and accuracies are means over the seeds, ± the standard error. A regression has its mean
  squared error in place of the accuracy.
* Two methods are compared on the seeds that both have run. A difference within {TIE:g} standard
  errors of the paired differences is a tie: level, and no loss for either. A goal that says "lower"
  and is attained only if ties count is "met with ties".
* Targets are those of tuned Adam's run of the same seed. Straight lines between the points of a
  curve tell when they are reached. A target that one seed never reaches is not reached in time.
* A ratio of losses is "?" where there are no runs, and "–" where a run of the other method broke
  off.
* The recipe was made by looking at the problems of the role development. Claims stand on those of
  the role end."""


def read(folder: pathlib.Path) -> Bench:
    """Read all reported runs of a folder."""
    roles = {name: problem.role for name, problem in PROBLEMS.items()}
    return Bench.read(folder, roles, METHODS, points=(NUM_POINTS, NUM_GRID_POINTS))


def goal_table(found: list[Goal]) -> str:
    """Return the goals: how often better, level and worse, and whether they are met."""
    rows = []
    for goal in found:
        counted = goal.counted
        total, known = len(counted.roles), len(counted.verdicts)
        rows.append(
            [
                goal.text,
                f"{goal.needed} of {total}",
                counted.shown() + (f" ({known} of {total} problems)" if known < total else ""),
                counted.shown("development"),
                counted.shown("end"),
                goal.result,
            ]
        )
    columns = ("goal", "needed", "better / level / worse", "development", "end", "result")
    return table(columns, rows)


def rival_table(bench: Bench, recipe: str) -> str:
    """Return how a method does against each other one, in test loss and in accuracy."""
    rows = []
    for rival in rivals(bench, recipe):
        losses = tally(bench, recipe, rival, value=final_loss)
        errors = tally(bench, recipe, rival, value=final_error)
        both = f"{len(losses.verdicts)} of {len(bench.roles)}"
        by_role = [losses.shown(role) for role in ("development", "end")]
        rows.append([f"`{rival}`", both, losses.shown(), *by_role, errors.shown()])
    columns = ("against", "problems", "test loss: better / level / worse", "development", "end")
    return table([*columns, "accuracy: better / level / worse"], rows)


def summary(bench: Bench, recipe: str) -> str:
    """Return the goals and rivals of a method, or that it has no runs to judge."""
    if not bench.problems(recipe, REFERENCE):
        return f"No runs of `{recipe}` beside tuned `{REFERENCE}` are stored yet."
    pairs = {rival: (recipe, rival) for rival in rivals(bench, recipe)}
    return "\n\n".join(
        (
            f"### Goals of `{recipe}`",
            goal_table(goals(bench, recipe)),
            f"### `{recipe}` against each other method",
            rival_table(bench, recipe),
            f"### Final test loss of `{recipe}` over that of each other method",
            ratio_table(bench, pairs, first="over"),
        )
    )


def made_by(bench: Bench) -> str:
    """Return which code made the runs, on what, under which load, and how many it made."""
    loads: dict[tuple[str, ...], list[float]] = {}
    for by_seed in bench.runs.values():
        for run in by_seed.values():
            loads.setdefault(tuple(run.made_by.values()), []).append(run.load)
    rows = []
    for names, found in loads.items():
        known = [load for load in found if np.isfinite(load)]
        shown = f"{min(known):g} to {max(known):g}" if known else "unknown"
        rows.append([str(len(found)), *names, shown])
    return table(("runs", "code", "jax", "machine", "load"), rows)


def page(bench: Bench, recipe: str) -> str:
    """Return the whole report in Markdown."""
    parts = [
        "# A default without a rate beside tuned optimizers",
        "Made by `python benchmarks/untuned.py --report` from the stored runs in `untuned/`.",
        RULE,
        "## Summary",
        summary(bench, recipe),
        "## Without each part",
        "Final test loss over that of the whole recipe, on the seeds that both have; above 1 the "
        "part pays. What was added, was added to `untuned_first` and is compared with that.",
        ablation_table(bench, recipe),
        "## Problems",
    ]
    for name, problem in PROBLEMS.items():
        parts.append(f"### {name}\n\n{problem.about}. Role: {problem.role}.")
        parts.append(problem_table(bench, name) if bench.of(name, REFERENCE) else "No runs yet.")
    parts += ["## Runs that are missing", missing_text(bench), "## Who made the runs"]
    return "\n\n".join([*parts, made_by(bench)]) + "\n"


def write(folder: pathlib.Path, images: pathlib.Path, *, recipe: str) -> str:
    """Write the page beside the folder of runs and the pictures into ``images``.

    Returns:
      A summary to print.
    """
    bench = read(folder)
    if not bench.problems(REFERENCE):
        return (
            f"No reported runs of tuned `{REFERENCE}` are stored yet: there is nothing to report."
        )
    target = folder.with_suffix(".md")
    target.write_text(page(bench, recipe))
    images.mkdir(parents=True, exist_ok=True)
    pictures.draw_profiles(bench, recipe).savefig(images / "untuned_profiles.png")
    pictures.draw_curves(bench, recipe).savefig(images / "untuned_curves.png")
    return f"{summary(bench, recipe)}\n\nThe whole report: {target}"
