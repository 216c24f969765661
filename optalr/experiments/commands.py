"""The work behind each command of the command line."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from optalr.experiments.configs.config import Config, to_table
from optalr.experiments.configs.files import load_config, override, to_toml
from optalr.experiments.errors import ExperimentError, warnings_log, writing
from optalr.experiments.joining import ALONE, Processes, joined_by
from optalr.experiments.records.exports import export_tensorboard
from optalr.experiments.records.identity import identify
from optalr.experiments.records.onlooking import check_seen, made_in
from optalr.experiments.records.run_folder import RunFolder, check_free
from optalr.experiments.records.writing import free_path, write_atomically
from optalr.experiments.reports.axes import to_png
from optalr.experiments.reports.console import console, print_table, progress
from optalr.experiments.reports.findings import noise_rows, write_findings
from optalr.experiments.reports.plots import plot_run
from optalr.experiments.studies import compare, theory, tune
from optalr.experiments.studies.rate_range import suggest_for
from optalr.experiments.tools import report_on, unused
from optalr.experiments.training.budget import scale_to_budget
from optalr.experiments.training.devices import mesh_table
from optalr.experiments.training.estimate import estimate
from optalr.experiments.training.loop import open_unfinished, train
from optalr.experiments.training.trainer import Trainer

RUNS = Path("runs")


def train_config(
    config_path: Path,
    *,
    out: Path | None = None,
    budget: float = 1.0,
    overrides: tuple[str, ...] = (),
    mesh: str = "",
    dry: bool = False,
    processes: Processes = ALONE,
) -> None:
    """Train as a config says, into a new folder; or only say what that would take."""
    if dry and processes.coordinator:
        raise ExperimentError("--dry-run tries a run in one process: leave --coordinator out.")
    with joined_by(processes) as team:
        with team.one_fate():
            config = scale_to_budget(load_config(config_path, overrides), budget)
            if mesh:
                config = override(config, {"mesh": mesh_table(mesh)})
            default = RUNS / f"{_title(config_path)}-seed{config.train.seed}"
            if team.writes:  # before anything is compiled
                check_free(free_path(default) if out is None else out)
            trainer = Trainer(config, team=team)
        if dry:
            _show_estimate(trainer)
            return
        _compile(trainer)
        # Looked for again, since another run may have taken the name meanwhile.
        folder = made_in(
            team, lambda: RunFolder.create(free_path(default) if out is None else out, config)
        )
        _train_and_show(trainer, folder)


def compare_folder(
    folder: Path,
    *,
    num_seeds: int,
    out: Path | None = None,
    target: float = math.nan,
    budget: float = 1.0,
    overrides: tuple[str, ...] = (),
    jobs: int = 1,
) -> None:
    """Train every config of a folder over seeds, and report."""
    configs = compare.read_configs(folder, overrides)
    configs = {name: scale_to_budget(config, budget) for name, config in configs.items()}
    out = out or free_path(RUNS / f"compare-{folder.resolve().name}")
    comparison = compare.create(out, configs, num_seeds=num_seeds, target=target)
    _run_and_report(comparison, jobs=jobs)


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


def resume_folder(
    path: Path,
    *,
    force: bool = False,
    jobs: int = 1,
    mesh: str = "",
    processes: Processes = ALONE,
) -> None:
    """Continue what was interrupted."""
    if (path / compare.SPECIFICATION).is_file():
        if processes.coordinator:
            raise ExperimentError(
                f"{path} is a comparison, each of whose runs is in one process: leave "
                "--coordinator out, or resume one of its runs."
            )
        _run_and_report(compare.open_comparison(path), force=force, jobs=jobs)
        return
    with joined_by(processes) as team:
        with team.one_fate():
            changed = {"mesh": mesh_table(mesh)} if mesh else None
            trainer, folder = open_unfinished(path, changed, team)
        check_seen(team, folder.path)
        _compile(trainer)
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
    out = unused(out, RUNS / f"rate-{_title(config_path)}.png", force=force)
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
    out = unused(out, RUNS / f"theory-{_title(config_path)}", force=force)
    found = theory.examine(Trainer(config), num_batches=num_batches, damping=damping)
    written = write_findings(found, out)
    print_table(
        f"Covariance over {num_batches} batches, {found.num_weights} weights",
        ("direction", "effective rank", "largest / median", "share of the largest tenth"),
        noise_rows(found.noise),
    )
    console.print("written: " + ", ".join(map(str, written)), soft_wrap=True)


def _title(config_path: Path) -> str:
    """Return ``FOLDER-CONFIG``, which starts the names of what a command writes."""
    return f"{config_path.resolve().parent.name}-{config_path.stem}"


def _run_and_report(comparison: compare.Comparison, *, force: bool = False, jobs: int = 1) -> None:
    compare.run_all(comparison, progress, force=force, jobs=jobs)
    report_on(comparison)


def _point(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in row["point"].items())


def _compile(trainer: Trainer) -> None:
    """Compile the training step, once it is known that all processes have the same."""
    team, config = trainer.team, trainer.config
    if team.count > 1:
        identify(config, config.train.seed, trainer.dataset).check_same_in(team)
    with team.one_fate():
        trainer.compile()


def _train_and_show(trainer: Trainer, folder: RunFolder, *, force: bool = False) -> None:
    if not trainer.team.writes:
        train(trainer, folder, force=force)
        return
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


def _show_estimate(trainer: Trainer) -> None:
    found = estimate(trainer)
    console.print(found.coverage, soft_wrap=True)
    config = trainer.config
    rows = [
        ("steps", f"{trainer.total_steps}"),
        ("steps an epoch", f"{trainer.steps_per_epoch}"),
        ("training examples", f"{len(trainer.dataset.train)}"),
        ("parameters", f"{found.parameters}"),
        ("bytes of data", f"{trainer.dataset.train.x.nbytes + trainer.dataset.train.y.nbytes}"),
        ("bytes of parameters", f"{found.parameter_bytes}"),
        ("bytes of the method's state", f"{found.optimizer_bytes}"),
        ("seconds of compilation", f"{trainer.compile_seconds:.1f}"),
        ("seconds of training, about", f"{found.seconds:.1f}"),
    ]
    title = f"{config.method.name} on {config.data.name}, tried for {found.tried} steps"
    print_table(title, ("what", "how much"), rows)


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
