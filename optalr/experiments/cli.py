"""The command line: ``optalr run``, ``compare``, ``tune``, ``suggest-rate``, ``list`` and more."""

import itertools
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

import optalr
from optalr.experiments import cli_tools
from optalr.experiments.endings import one_line_endings
from optalr.experiments.joining import ALONE, Processes
from optalr.experiments.parsing import one_line_warnings, parse
from optalr.experiments.records.signals import handled, leave_at_once

_Path = tyro.conf.Positional[Path]
# `--set A B`, `--set A --set B`, or both.
Set = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.arg(name="set", metavar="KEY=VALUE", help="override config keys"),
    tyro.conf.UseAppendAction,
]
Several = Annotated[Processes, tyro.conf.OmitArgPrefixes]

# The commands import what is slow to import (jax, flax, matplotlib) when they run. So help and
# mistakes in the arguments show at once.


def run(
    config: _Path,
    /,
    *,
    out: Path | None = None,
    seed: int | None = None,
    budget: float = 1.0,
    mesh: str = "",
    dry_run: bool = False,
    set_: Set = (),
    several: Several = ALONE,
) -> None:
    """Train as a config says, into a new run folder.

    Args:
      config: a TOML file, for example configs/digits/adam.toml.
      out: the run folder; by default runs/PROBLEM-METHOD-seedN.
      seed: overrides train.seed.
      budget: part of the config's work to do, for a laptop: 0.01 trains a tenth of the epochs on a
        tenth of the examples. Milestones stated in epochs shrink with the epochs.
      mesh: how many devices share each batch, as in data=8; by default what the config's section
        [mesh] says, or one device.
      dry_run: write nothing; say how the method treats each parameter, and what the run would take.
      set_: overrides, for example train.epochs=5.
      several: how the processes find each other, where several train this run.
    """
    from optalr.experiments import commands

    commands.train_config(
        config,
        out=out,
        overrides=_overrides(set_, seed),
        budget=budget,
        mesh=mesh,
        dry=dry_run,
        processes=several,
    )


def compare(
    folder: _Path,
    /,
    *,
    seeds: int = 3,
    out: Path | None = None,
    target: float = math.nan,
    budget: float = 1.0,
    jobs: int = 1,
    set_: Set = (),
) -> None:
    """Train every config of a folder over seeds; write a table, a picture, CSV and HTML.

    Args:
      folder: a folder of TOML files, for example configs/digits.
      seeds: how many seeds, from train.seed on.
      out: the folder to write; by default runs/compare-PROBLEM.
      target: training loss to reach; by default one that every method reaches in the end.
      budget: part of the configs' work to do, as in `optalr run`.
      jobs: runs at once, each in a process of its own, where there are cores or devices for them.
      set_: overrides for every config, for example train.epochs=5.
    """
    from optalr.experiments import commands

    commands.compare_folder(
        folder,
        num_seeds=seeds,
        out=out,
        target=target,
        budget=budget,
        overrides=_overrides(set_, None),
        jobs=jobs,
    )


def tune(
    config: _Path,
    /,
    *,
    seeds: int = 3,
    out: Path | None = None,
    budget: float = 1.0,
    set_: Set = (),
) -> None:
    """Train every point of a config's [tune] grid and name the best by validation loss.

    Args:
      config: a TOML file with a [tune] section.
      seeds: how many seeds each point is trained with.
      out: the folder to write; by default runs/tune-PROBLEM-METHOD. If it holds the same search,
        interrupted, the search goes on.
      budget: part of the config's work to do for each point, as in `optalr run`.
      set_: overrides, for example train.epochs=5.
    """
    from optalr.experiments import commands

    commands.tune_config(
        config, num_seeds=seeds, out=out, budget=budget, overrides=_overrides(set_, None)
    )


def resume(
    folder: _Path,
    /,
    *,
    force: bool = False,
    jobs: int = 1,
    mesh: str = "",
    several: Several = ALONE,
) -> None:
    """Continue an interrupted run or comparison, to the same bits as without the interruption.

    Args:
      folder: what `optalr run` or `optalr compare` made.
      force: go on even from a checkpoint of other settings, data or another seed.
      jobs: runs of a comparison at once.
      mesh: how many devices share each batch of a run from here on, as in data=4; by default as
        many as before. Only the last bits depend on it.
      several: how the processes find each other, where several go on with this run.
    """
    from optalr.experiments import commands

    commands.resume_folder(folder, force=force, jobs=jobs, mesh=mesh, processes=several)


def suggest_rate(
    config: _Path,
    /,
    *,
    starts: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    steps: int = 200,
    seed: int | None = None,
    out: Path | None = None,
    force: bool = False,
    set_: Set = (),
) -> None:
    """Suggest a learning rate for SGD: run the learned rate from several starts.

    Data, model, batch size and weight decay are the config's; its method is not used.

    Args:
      config: a TOML file, for example configs/digits/sgd.toml.
      starts: initial rates.
      steps: steps of each run.
      seed: overrides train.seed.
      out: the picture; by default runs/rate-PROBLEM-METHOD.png.
      force: overwrite it.
      set_: overrides, for example train.batch_size=256.
    """
    from optalr.experiments import commands

    commands.suggest_rate_for(
        config,
        starts=starts,
        num_steps=steps,
        out=out,
        force=force,
        overrides=_overrides(set_, seed),
    )


def theory(
    config: _Path,
    /,
    *,
    batches: int = 200,
    damping: float = 1e-3,
    seed: int | None = None,
    out: Path | None = None,
    force: bool = False,
    budget: float = 1.0,
    set_: Set = (),
) -> None:
    """Train, then draw the noise of directions (theorem 2) and the spectra of the factors.

    Compares the covariance of the gradient over minibatches with that of the diagonally and the
    Kronecker preconditioned gradient, at the end of training.

    Args:
      config: a TOML file of tso_alra, for example configs/digits/tso_alra.toml.
      batches: minibatches for the covariance.
      damping: added to the factors before their roots are taken, in mean eigenvalues.
      seed: overrides train.seed.
      out: the folder; by default runs/theory-PROBLEM-METHOD.
      force: write into it even if it exists.
      budget: part of the config's work to do, as in `optalr run`.
      set_: overrides, for example train.epochs=5.
    """
    from optalr.experiments import commands

    commands.examine_theory(
        config,
        num_batches=batches,
        damping=damping,
        out=out,
        force=force,
        budget=budget,
        overrides=_overrides(set_, seed),
    )


_DESCRIPTION = "Train with optalr's and optax's methods, and compare them."
COMMANDS = {
    "run": run,
    "compare": compare,
    "tune": tune,
    "suggest-rate": suggest_rate,
    "theory": theory,
    "resume": resume,
    "watch": cli_tools.watch,
    "plot": cli_tools.plot,
    "export": cli_tools.export,
    "init": cli_tools.init,
    "list": cli_tools.list_names,
    "schema": cli_tools.show_schema,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    A mistake gives one line and exit code 2, a divergence exit code 3, another process of the run
    that is gone 4, SIGINT 130, SIGTERM 143.
    """
    # jax logs which plugins it did not find, which says nothing about the experiment.
    logging.getLogger("jax").setLevel(logging.ERROR)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        print(f"optalr {optalr.__version__}")
        return
    with handled(leave_at_once), one_line_warnings(), one_line_endings():
        parse(COMMANDS, words, prog="optalr", description=_DESCRIPTION)()


def _overrides(texts: Sequence[Sequence[str]], seed: int | None) -> tuple[str, ...]:
    return (*itertools.chain(*texts), *(() if seed is None else (f"train.seed={seed}",)))
