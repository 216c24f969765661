"""The work behind each command of the command line."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optalr.experiments.configs.config import Config, schema, to_table
from optalr.experiments.configs.files import load_config, override, to_toml
from optalr.experiments.configs.methods import PHASES, RECIPES, method_names
from optalr.experiments.configs.rates import SCHEDULES
from optalr.experiments.data import LOADERS
from optalr.experiments.errors import ExperimentError, warnings_log, writing
from optalr.experiments.models import MODELS
from optalr.experiments.records.exports import export_csv, export_tensorboard
from optalr.experiments.records.run_folder import METRICS, RunFolder, check_free
from optalr.experiments.records.writing import free_path, write_atomically
from optalr.experiments.reports.axes import to_png
from optalr.experiments.reports.console import console, print_table, progress
from optalr.experiments.reports.findings import noise_rows, write_findings
from optalr.experiments.reports.pictures import draw_selection
from optalr.experiments.reports.plots import plot_run
from optalr.experiments.reports.tables import write_report
from optalr.experiments.studies import compare, theory, tune
from optalr.experiments.studies.rate_range import suggest_for
from optalr.experiments.training.budget import scale_to_budget
from optalr.experiments.training.loop import open_unfinished, train
from optalr.experiments.training.objective import score_name_in
from optalr.experiments.training.trainer import Trainer

RUNS = Path("runs")


def train_config(
    config_path: Path,
    *,
    out: Path | None = None,
    budget: float = 1.0,
    overrides: tuple[str, ...] = (),
) -> None:
    """Train as a config says, into a new folder."""
    config = scale_to_budget(load_config(config_path, overrides), budget)
    default = RUNS / f"{_title(config_path)}-seed{config.train.seed}"
    check_free(free_path(default) if out is None else out)  # before anything is compiled
    trainer = Trainer(config)
    trainer.compile()
    # Looked for again, since another run may have taken the name meanwhile.
    folder = RunFolder.create(free_path(default) if out is None else out, config)
    _train_and_show(trainer, folder)


def compare_folder(
    folder: Path,
    *,
    num_seeds: int,
    out: Path | None = None,
    target: float = math.nan,
    budget: float = 1.0,
    overrides: tuple[str, ...] = (),
) -> None:
    """Train every config of a folder over seeds, and report."""
    configs = compare.read_configs(folder, overrides)
    configs = {name: scale_to_budget(config, budget) for name, config in configs.items()}
    out = out or free_path(RUNS / f"compare-{folder.resolve().name}")
    _run_and_report(compare.create(out, configs, num_seeds=num_seeds, target=target))


def tune_config(
    config_path: Path,
    *,
    num_seeds: int,
    out: Path | None = None,
    budget: float = 1.0,
    overrides: tuple[str, ...] = (),
) -> None:
    """Search a config's grid, and print its points, the best first."""
    config = scale_to_budget(load_config(config_path, overrides), budget)
    name = _title(config_path)
    out = out or RUNS / f"tune-{name}"
    rows = []
    for row in tune.tune(config, out, num_seeds):
        rows.append(row)
        numbers = f"validation loss {row['validation_loss']:.4f}"
        console.print(f"{_point(row)}: {numbers}", soft_wrap=True)
    winner = tune.best(rows)
    keys = [key for key in rows[0] if key not in ("point", "seeds")]
    ordered = sorted(rows, key=lambda row: (math.isnan(row[keys[1]]), row[keys[1]]))
    print_table(
        f"{name}: means over {num_seeds} seeds",
        ("point", *(key.replace("_", " ") for key in keys)),
        [(_point(row), *(f"{row[key]:.4f}" for key in keys)) for row in ordered],
    )
    best_file = out / "best.toml"
    write_atomically(best_file, to_toml(to_table(override(config, winner["point"]))))
    console.print(f"best: {_point(winner)}\nits config: {best_file}", soft_wrap=True)


def resume_folder(path: Path, *, force: bool = False) -> None:
    """Continue what was interrupted."""
    if (path / compare.SPECIFICATION).is_file():
        _run_and_report(compare.open_comparison(path), force=force)
        return
    trainer, folder = open_unfinished(path)
    trainer.compile()
    _train_and_show(trainer, folder, force=force)


def suggest_rate_for(
    config_path: Path,
    *,
    starts: tuple[float, ...],
    num_steps: int,
    out: Path | None = None,
    force: bool = False,
    overrides: tuple[str, ...] = (),
) -> None:
    """Suggest a learning rate for SGD on a config's problem."""
    config = load_config(config_path, overrides)
    out = _unused(out, RUNS / f"rate-{_title(config_path)}.png", force=force)
    found = suggest_for(config, starts=starts, num_steps=num_steps)
    console.print(str(found), soft_wrap=True, markup=False, highlight=False)
    axes = found.plot()
    axes.set_title(f"{config.model.name} on {config.data.name}, batch {config.train.batch_size}")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, to_png(axes.figure))
    console.print(f"picture: {out}", soft_wrap=True)


def examine_theory(
    config_path: Path,
    *,
    num_batches: int,
    damping: float,
    out: Path | None = None,
    force: bool = False,
    budget: float = 1.0,
    overrides: tuple[str, ...] = (),
) -> None:
    """Train as a config says, then draw what theorem 2 of the paper is about."""
    config = scale_to_budget(load_config(config_path, overrides), budget)
    out = _unused(out, RUNS / f"theory-{_title(config_path)}", force=force)
    found = theory.examine(Trainer(config), num_batches=num_batches, damping=damping)
    written = write_findings(found, out)
    print_table(
        f"Covariance over {num_batches} batches, {found.num_weights} weights",
        ("direction", "effective rank", "largest / median", "share of the largest tenth"),
        noise_rows(found.noise),
    )
    console.print("written: " + ", ".join(map(str, written)), soft_wrap=True)


def plot_folder(
    path: Path, *, configs: tuple[str, ...] = (), out: Path | None = None, force: bool = False
) -> None:
    """Draw a run's curves, report on a comparison as far as it has come, or draw part of it."""
    if out is not None:
        _unused(out, out, force=force)
    if (path / compare.SPECIFICATION).is_file():
        comparison = compare.open_comparison(path)
        if configs:
            picture = out or path / "selection.png"
            write_atomically(picture, to_png(draw_selection(compare.select(comparison, configs))))
            console.print(f"picture: {picture}", soft_wrap=True)
        else:
            _report(comparison)
        return
    if configs:
        raise ExperimentError(f"--configs chooses from a comparison, and {path} is none.")
    folder = RunFolder.open(path)
    picture = plot_run(folder, score_name_in(folder.rows(METRICS)))
    console.print(f"picture: {picture}", soft_wrap=True)


def export_run(path: Path, *, tensorboard: bool) -> None:
    """Write a run's metrics in other formats."""
    folder = RunFolder.open(path)
    written = [*export_csv(folder), *([export_tensorboard(folder)] if tensorboard else [])]
    console.print("written: " + ", ".join(map(str, written)), soft_wrap=True)


def print_names() -> None:
    """Print the names that the sections of a config can take."""
    names = _names([*method_names(), "any scale_by_* of optalr or optax"])
    print_table("Names", ("key", "names"), [(key, ", ".join(v)) for key, v in names.items()])


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


def _unused(out: Path | None, default: Path, *, force: bool) -> Path:
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


def _title(config_path: Path) -> str:
    """Return ``FOLDER-CONFIG``, which starts the names of what a command writes."""
    return f"{config_path.resolve().parent.name}-{config_path.stem}"


def _run_and_report(comparison: compare.Comparison, *, force: bool = False) -> None:
    compare.run_all(comparison, progress, force=force)
    _report(comparison)


def _report(comparison: compare.Comparison) -> None:
    if not any(comparison.runs(name) for name in comparison.configs):
        raise ExperimentError(
            f"{comparison.path} has no finished run yet: go on with `optalr resume "
            f"{comparison.path}`."
        )
    print_table(*write_report(comparison))
    console.print(f"report: {comparison.path / 'report.html'}", soft_wrap=True)


def _point(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in row["point"].items())


def _train_and_show(trainer: Trainer, folder: RunFolder, *, force: bool = False) -> None:
    config, score_name = trainer.config, trainer.objective.score_name
    if trainer.dataset.note:
        console.print(f"note: {trainer.dataset.note}", soft_wrap=True)
    with progress(config.method.name, score_name) as report:
        result = train(trainer, folder, report, force=force)
    _closing_table(config, result, score_name)
    console.print(f"run folder: {folder.path}", soft_wrap=True)
    # The run is finished and recorded: what is made of its records can be made again.
    with _attempt(f"the picture could not be drawn; try `optalr plot {folder.path}`"):
        console.print(f"picture: {plot_run(folder, score_name)}", soft_wrap=True)
    if config.record.tensorboard:
        again = f"`optalr export {folder.path} --tensorboard`"
        with _attempt(f"the TensorBoard events could not be written; try {again}"):
            export_tensorboard(folder)


@contextlib.contextmanager
def _attempt(remedy: str) -> Iterator[None]:
    """Turn whatever goes wrong into a warning with its remedy."""
    try:
        yield
    except Exception as error:
        warnings_log.warning("%s (%s).", remedy, str(error) or type(error).__name__)


def _closing_table(config: Config, result: Mapping[str, Any], score_name: str) -> None:
    rows = []
    for split in ("train", "validation", "test"):
        loss, score = result[f"{split}_loss"], result[f"{split}_{score_name}"]
        if math.isfinite(loss):
            rows.append((split, f"{loss:.4f}", f"{score:.4f}"))
    title = (
        f"{config.method.name} on {config.data.name}: {result['steps']} steps, "
        f"{result['seconds']:.1f} s of training, {result['compile_seconds']:.1f} s of compilation"
    )
    print_table(title, ("split", "loss", score_name.replace("_", " ")), rows)
