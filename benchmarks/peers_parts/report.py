"""The page of the stored runs: what was reached, what it cost, where ours lose, what failed."""

import pathlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from ..untuned_parts.curves import STEP, TEST, Run
from ..untuned_parts.gathering import REFERENCE, Bench
from ..untuned_parts.goals import LEVEL, TIE, WORSE, compare, final_error, final_loss, loss_ratios
from ..untuned_parts.problems import PROBLEMS
from ..untuned_parts.running import NUM_GRID_POINTS, NUM_POINTS
from ..untuned_parts.storing import Record, Store
from ..untuned_parts.tables import (
    in_percent,
    is_regression,
    ratio,
    reached,
    score,
    spread,
    table,
)
from . import environments
from .methods import METHODS, Entry

OURS = ("untuned", "untuned_tuned", "tso_alra")
RULE = f"""\
* Every method tries twelve settings on one seed; the lowest final validation loss chooses one, and
  the table has its three seeds: means, ± the standard error. `untuned` tries nothing. A dagger (†)
  marks a choice at the edge of the grid: a wider one might have found better.
* All run on the same problem, first weights and batches, for the same number of steps.
* *Steps to Adam's best*: the share of a run's steps until tuned Adam's lowest validation loss.
* *ms a step* and *steps* are without compilation and evaluation. *Compiled* is what the first call
  takes beyond its steps, tracing and compilation together. All three are processor time of one
  core, which other work on the machine disturbs less than the clock; *clock* is the steps by the
  clock. Steps run in one compiled loop, where the method allows. Not so kfac-jax's own optimizer,
  which is called from Python at each step, as its documentation demands; and no method on
  convolutions.
* *State* are the bytes of the optimizer's state. *Peak* is what a process came to hold beyond what
  it held with the data loaded: compilation is most of it.
* `untuned` was made by looking at the problems of the role development: its claims stand on those
  of the role end.
* A difference within {TIE:g} standard errors of the paired differences is a tie."""


class Costs:
    """What a method's runs of a problem say of time and memory; NaN for what they don't."""

    def __init__(self, records: Iterable[Record]):
        records = [record for record in records if "error" not in record]
        reported = [r for r in records if r["num_points"] == NUM_POINTS]
        self.clock = _mean(r["seconds"] for r in reported)
        self.seconds = _mean(r.get("processor_seconds", np.nan) for r in reported)
        self.steps = _mean(r["curve"][-1][STEP] for r in reported)
        # Only the first run of each process tells these.
        self.compiled = _mean(r.get("compile_seconds", np.nan) for r in records)
        self.peak = _mean(r.get("peak_bytes", np.nan) for r in records)
        self.state = _mean(r.get("state_bytes", np.nan) for r in records)

    def cells(self) -> list[str]:
        """Return the columns of the table."""
        return [
            _shown(1e3 * self.seconds / self.steps),
            _shown(self.seconds),
            _shown(self.compiled),
            _shown(self.seconds + self.compiled),
            _shown(self.clock),
            _shown(self.state / 2**10),
            _shown(self.peak / 2**20),
        ]


COLUMNS = (
    "method",
    "chosen",
    "final test loss",
    "{score}",
    "steps to Adam's best",
    "ms a step",
    "steps, s",
    "compiled, s",
    "both, s",
    "clock, s",
    "state, KiB",
    "peak, MiB",
)


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else np.nan


def _shown(value: float) -> str:
    if not np.isfinite(value):
        return "?"
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def chosen_text(method: Entry, numbers: Mapping[str, float]) -> str:
    """Return the numbers of a method, with a dagger at each that is at the edge of its grid.

    Of two values each is an edge, so only the numbers with more are marked.
    """
    parts = []
    for name, number in numbers.items():
        tried = sorted({setting[name] for setting in method.grid})
        edge = len(tried) > 2 and number in (tried[0], tried[-1])
        parts.append(f"{name} {number:g}" + ("†" if edge else ""))
    return ", ".join(parts) or "nothing"


def row(bench: Bench, problem: str, method: Entry, costs: Costs) -> list[str]:
    """Return a method's row in a problem's table."""
    runs = bench.of(problem, method.name)
    numbers = next(iter(runs.values())).numbers
    validation = bench.share_until_validation(problem, method.name)
    fewer = f" ({len(runs)} seeds)" if len(runs) < 3 else ""
    return [
        f"`{method.name}`{fewer}",
        chosen_text(method, numbers),
        spread(run.final(TEST) for run in runs.values()),
        score(runs.values()),
        reached(validation, in_percent),
        *costs.cells(),
    ]


def problem_table(bench: Bench, problem: str, store: Store, methods: Mapping[str, Entry]) -> str:
    """Return the table of a problem, by final test loss."""

    def loss(name: str) -> float:
        return float(np.mean([run.final(TEST) for run in bench.of(problem, name).values()]))

    broken = errors(store)
    names = [n for n in methods if bench.of(problem, n) and n not in broken]
    all_runs: list[Run] = [run for n in names for run in bench.of(problem, n).values()]
    columns = [
        c.format(score="error" if is_regression(all_runs) else "accuracy %") for c in COLUMNS
    ]
    rows = []
    for name in sorted(names, key=loss):
        records = [r for r in store.runs.values() if r["method"] == name]
        rows.append(row(bench, problem, methods[name], Costs(records)))
    return table(columns, rows)


def errors(store: Store) -> dict[str, str]:
    """Return the methods that could not run on a problem, with what they said."""
    return {run["method"]: run["error"] for run in store.runs.values() if "error" in run}


def verdicts(bench: Bench, ours: str, methods: Iterable[str]) -> str:
    """Return one of our methods' final test losses over those of all others, by problem."""
    problems = [p for p in bench.roles if bench.of(p, ours)]
    rows = []
    for name in methods:
        if name == ours or not bench.problems(ours, name):
            continue
        ratios = loss_ratios(bench, ours, name)
        cells = []
        for problem in problems:
            both = [bench.values(problem, n, final_loss) for n in (ours, name)]
            level = problem in ratios and compare(*both).verdict == LEVEL
            cells.append(ratio(ratios.get(problem)) + (" (level)" if level else ""))
        rows.append([f"`{name}`", *cells])
    return table(["over", *problems], rows)


def losses(bench: Bench, methods: Iterable[str]) -> Iterator[str]:
    """Yield a line for each problem on which one of ours loses, in test loss or in score."""
    methods = list(methods)
    for problem in bench.roles:
        for ours in (name for name in OURS if bench.of(problem, name)):
            lost = {}
            for what, value in (("loss", final_loss), ("score", final_error)):
                mine = bench.values(problem, ours, value)
                theirs = {n: bench.values(problem, n, value) for n in methods if n not in OURS}
                lost[what] = [
                    f"`{name}`"
                    for name, found in theirs.items()
                    if set(found) & set(mine) and compare(mine, found).verdict == WORSE
                ]
            text = "; ".join(f"in {w} to {', '.join(names)}" for w, names in lost.items() if names)
            yield f"* {problem}, `{ours}`: {text or 'to none'}."


def page(folder: pathlib.Path, methods: Mapping[str, Entry] = METHODS) -> str:
    """Return the whole report in Markdown."""
    roles = {name: problem.role for name, problem in PROBLEMS.items()}
    bench = Bench.read(folder, roles, methods, points=(NUM_POINTS, NUM_GRID_POINTS))
    if not bench.problems(REFERENCE):
        return f"No reported runs of `{REFERENCE}` are stored yet: there is nothing to report.\n"
    measured = bench.problems(REFERENCE)
    stores = {problem: Store(problem, folder) for problem in measured}
    parts = [
        "# optalr beside its peers",
        "Made by `python benchmarks/peers.py --report` from the stored runs in `peers/`.",
        RULE,
        "## Methods",
        method_table(methods),
    ]
    for problem, store in stores.items():
        parts += [
            f"## {problem}",
            f"{PROBLEMS[problem].about}. Role: {roles[problem]}.",
            about_runs(store),
        ]
        parts.append(problem_table(bench, problem, store, methods))
        parts += [f"`{name}` did not run: {said}" for name, said in errors(store).items()]
        missing = [f"`{n}`" for n in methods if not bench.of(problem, n)]
        parts += [f"Not measured: {', '.join(missing)}."] if missing else []
    rest = [name for name in PROBLEMS if name not in measured]
    parts += ["## Where ours lose", "\n".join(losses(bench, methods))]
    for ours in (name for name in OURS if bench.problems(name)):
        parts += [
            f"## Final test loss of `{ours}` over the others'",
            verdicts(bench, ours, methods),
        ]
    parts += ["## Not measured", f"Problems: {', '.join(rest) or 'none'}."]
    return "\n\n".join(parts) + "\n"


def method_table(methods: Mapping[str, Entry]) -> str:
    """Return what each method is, the settings it tries and the packages that it runs with."""
    rows = []
    for method in methods.values():
        numbers: dict[str, list[float]] = {}
        for setting in method.grid:
            for name, number in setting.items():
                numbers.setdefault(name, []).append(number)
        tried = [
            "{} {}".format(n, ", ".join(f"{v:g}" for v in sorted({*found})))
            for n, found in numbers.items()
        ]
        packages = environments.versions(method.environment)
        rows.append([f"`{method.name}`", method.about, "; ".join(tried) or "nothing", packages])
    return table(("method", "what it is", "settings tried", "packages"), rows)


def about_runs(store: Store) -> str:
    """Return code, jax, machine and load of a problem's runs."""
    runs = [run for run in store.runs.values() if "error" not in run]
    named = {(r.get("code"), r.get("jax"), r.get("machine")) for r in runs}
    made = "; ".join(f"code {code}, jax {jax}, {machine}" for code, jax, machine in sorted(named))
    loads = [run["load"] for run in runs if "load" in run]
    shown = f"; load {min(loads):g} to {max(loads):g}" if loads else ""
    return f"{len(runs)} runs: {made}{shown}."


def write(folder: pathlib.Path) -> str:
    """Write the page beside the folder of runs, and return it."""
    text = page(folder)
    if folder.exists():
        folder.with_suffix(".md").write_text(text)
    return text
