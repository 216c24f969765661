"""The work behind the commands that train nothing."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.padding import Padding

from optalr.experiments.configs.config import schema
from optalr.experiments.configs.describing import describe
from optalr.experiments.configs.methods import PHASES, RECIPES, find_method, method_names
from optalr.experiments.configs.rates import SCHEDULES
from optalr.experiments.configs.starting import read_example, starter
from optalr.experiments.data import LOADERS
from optalr.experiments.errors import ExperimentError, suggest, writing
from optalr.experiments.models import MODELS
from optalr.experiments.records.exports import export_csv, export_tensorboard
from optalr.experiments.records.run_folder import METRICS, RunFolder, check_free
from optalr.experiments.records.writing import free_path, write_atomically
from optalr.experiments.reports.axes import to_png
from optalr.experiments.reports.console import console, print_table
from optalr.experiments.reports.pictures import draw_selection
from optalr.experiments.reports.plots import plot_run
from optalr.experiments.reports.tables import write_report
from optalr.experiments.studies import compare
from optalr.experiments.training.objective import score_name_in


def plot_folder(
    path: Path, *, configs: tuple[str, ...] = (), out: Path | None = None, force: bool = False
) -> None:
    """Draw a run's curves, report on a comparison as far as it has come, or draw part of it."""
    if out is not None:
        unused(out, out, force=force)
    if (path / compare.SPECIFICATION).is_file():
        comparison = compare.open_comparison(path)
        if configs:
            picture = out or path / "selection.png"
            write_atomically(picture, to_png(draw_selection(compare.select(comparison, configs))))
            console.print(f"picture: {picture}", soft_wrap=True)
        else:
            report_on(comparison)
        return
    if configs:
        raise ExperimentError(f"--configs chooses from a comparison, and {path} is none.")
    folder = RunFolder.open(path)
    picture = plot_run(folder, score_name_in(folder.rows(METRICS)))
    console.print(f"picture: {picture}", soft_wrap=True)


def report_on(comparison: compare.Comparison) -> None:
    """Print the table of a comparison, and write its files.

    Raises:
      ExperimentError: none of its runs is finished.
    """
    if not any(comparison.runs(name) for name in comparison.configs):
        raise ExperimentError(
            f"{comparison.path} has no finished run yet: go on with `optalr resume "
            f"{comparison.path}`."
        )
    print_table(*write_report(comparison))
    console.print(f"report: {comparison.path / 'report.html'}", soft_wrap=True)


def unused(out: Path | None, default: Path, *, force: bool) -> Path:
    """Return where to write, before anything is computed for it.

    Raises:
      ExperimentError: something is there already, and neither ``force`` is true nor was the name
        left to us; or the system refuses.
    """
    if out is None:
        out = free_path(default)
    if not force or not out.exists():
        check_free(out, remedy="name another place with --out, or overwrite it with --force")
    return out


def export_run(path: Path, *, tensorboard: bool) -> None:
    """Write a run's metrics in other formats."""
    folder = RunFolder.open(path)
    written = [*export_csv(folder), *([export_tensorboard(folder)] if tensorboard else [])]
    console.print("written: " + ", ".join(map(str, written)), soft_wrap=True)


def print_names() -> None:
    """Print the names that the sections of a config can take."""
    for key, names in _names([*method_names(), "any scale_by_* of optalr or optax"]).items():
        # Words are wrapped whole, whatever the width of the terminal.
        console.print(f"{key}:")
        console.print(Padding(", ".join(names), (0, 0, 0, 2)))
    console.print("`optalr list NAME` shows the options of one of these.")


def print_options(name: str) -> None:
    """Print the options of whatever a config calls ``name``.

    Raises:
      ExperimentError: nothing has this name.
    """
    found: list[tuple[str, Callable[..., Any]]] = [
        (key, choices[name])
        for key, choices in (
            ("data", LOADERS),
            ("model", MODELS),
            ("schedule", SCHEDULES),
            ("phase", PHASES),
        )
        if name in choices
    ]
    if name in method_names() or name.startswith("scale_by_"):
        found.append(("method", find_method(name)[0]))
    if not found:
        known = [entry for names in _names(method_names()).values() for entry in names]
        raise ExperimentError(f"nothing is called {name!r}: {suggest(name, known)}")
    for section, function in found:
        told = describe(function)
        console.print(f"[{section}] name = {name!r}: {told.summary}", soft_wrap=True)
        for option in told.options:
            console.print(f"  {option.name} = {option.default}", soft_wrap=True)
            if option.text:
                console.print(Padding(option.text, (0, 0, 0, 6)))


def write_config(path: Path, *, example: str = "") -> None:
    """Write a config to start from.

    Args:
      path: the file to be.
      example: a config that optalr ships; empty writes every key, with its meaning and default.

    Raises:
      ExperimentError: something is at ``path`` already, or there is no such example.
    """
    text = read_example(example) if example else starter()
    check_free(path, remedy="name another file")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    console.print(f"config: {path}; train with `optalr run {path}`", soft_wrap=True)


def print_schema() -> None:
    """Print the JSON schema of a config."""
    # Optax's names depend on its version, so an editor completes only ours and accepts the rest.
    names = _names(RECIPES)
    names["phase.name"] = ["", *names["phase.name"]]
    print(json.dumps(schema(names, others=["method.name"]), indent=1))


def _names(methods: Sequence[str]) -> dict[str, Sequence[str]]:
    return {
        "data.name": sorted(LOADERS),
        "model.name": sorted(MODELS),
        "method.name": methods,
        "schedule.name": sorted(SCHEDULES),
        "phase.name": tuple(PHASES),
    }
