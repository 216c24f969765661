"""Training into a run folder, and resuming after an interruption."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import optalr
from optalr.arrays import all_finite
from optalr.experiments.configs.files import override
from optalr.experiments.errors import ExperimentError, TrainingDivergedError
from optalr.experiments.processes import Team
from optalr.experiments.records.checkpoints import Checkpoints
from optalr.experiments.records.identity import Identity, check_same, from_json, identify
from optalr.experiments.records.onlooking import folder_of
from optalr.experiments.records.run_folder import EVALUATIONS, METRICS, RunFolder
from optalr.experiments.records.signals import StopRequest, handled
from optalr.experiments.training.divergence import diagnose
from optalr.experiments.training.segments import Segment
from optalr.experiments.training.steps import TrainState
from optalr.experiments.training.trainer import Trainer

Report = Callable[[dict[str, Any]], None]


def train(
    trainer: Trainer,
    folder: RunFolder,
    report: Report = lambda row: None,
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Train to the last epoch, from the newest intact checkpoint if there is one.

    The parameters, the method's state and every recorded number except the seconds are the same
    bits whether or not the run was interrupted. SIGINT and SIGTERM are noted; the run then saves a
    checkpoint after the steps under way, and leaves.

    Where a team of processes trains, each calls this. The first records, all write checkpoints, and
    what ends one ends all, after the same step.

    Args:
      trainer: the config made ready.
      folder: where the run is recorded, as ``folder_of(trainer.team)`` has it; the seed is that of
        its config.
      report: called after each segment with its last row of metrics.
      force: go on from a checkpoint of other settings as well.

    Returns:
      The result: final losses and scores, steps, seconds.

    Raises:
      TrainingDivergedError: a loss or parameter is not finite. The message is a diagnosis.
      ExperimentError: the folder is in use, its checkpoints are damaged or those of another run, or
        the system refuses to write.
      Interruption: a signal asked to stop.
    """
    team = trainer.team
    with team.one_fate():
        finished, seed = folder.result(), folder.config().train.seed
    if any(team.largest(finished is not None)):
        return finished or {}
    identity = identify(trainer.config, seed, trainer.dataset, processes=team.count)
    stop = StopRequest()
    with handled(stop), contextlib.ExitStack() as stack:
        with team.one_fate():
            stack.enter_context(folder.lock())
        checkpoints = Checkpoints(folder.path / "checkpoints", trainer.config.record.keep, team)
        run = _Run(trainer, folder, checkpoints=checkpoints, identity=identity, seed=seed)
        try:
            result = run.to_the_end(report, stop, force=force)
        except TrainingDivergedError:
            stop.raise_if_asked(f"interrupted; {folder.path} had diverged.")
            raise
        # A signal in the last moments is no reason to go on with what would follow.
        stop.raise_if_asked(f"interrupted; {folder.path} is finished.")
        return result


class _Run:
    """One run under way."""

    def __init__(
        self,
        trainer: Trainer,
        folder: RunFolder,
        *,
        checkpoints: Checkpoints,
        identity: Identity,
        seed: int,
    ):
        self.trainer, self.folder, self.checkpoints = trainer, folder, checkpoints
        self.team = trainer.team
        self.identity, self.seed = identity, seed
        self.record = trainer.config.record
        self.seconds = 0.0
        self.validation_loss = math.nan
        # Noted in checkpoints, so that a lost row of the evaluations does not change the result.
        self.lowest_test_loss = math.nan
        self.saved_at = time.monotonic()

    def to_the_end(self, report: Report, stop: StopRequest, *, force: bool) -> dict[str, Any]:
        """Train what is left, and return the result."""
        trainer = self.trainer
        state = self._start(force)
        self._save_or_leave(stop, state)
        while (step := int(state.step)) < trainer.total_steps:
            if step % trainer.steps_per_epoch == 0:
                self._evaluate_if_due(state)
            for segment in trainer.segments(state, self.seed, self.validation_loss):
                state = segment.state
                report(self._record(segment))
                self._save_or_leave(stop, state)
            # Only one step gets it, the first after it was measured.
            self.validation_loss = math.nan
        return self._finish(state)

    def _start(self, force: bool) -> TrainState:
        """Return the state to go on from, and cut off what was recorded after it."""
        state, noted = self.trainer.init(self.seed), {}
        latest = self.checkpoints.latest()
        if latest is not None:
            # Compared first: a change of the config may make it impossible to read the state.
            where = self.checkpoints.path / str(latest)
            with self.team.one_fate():
                saved = from_json(self.checkpoints.meta(latest)["identity"])
                if self.team.writes:
                    check_same(saved, self.identity, where=where, force=force)
            with self.team.one_fate():
                state, meta = self.checkpoints.restore(latest, state)
                if self.team.writes:
                    self.checkpoints.set_damaged_aside()
            self.seconds, noted = meta["seconds"], meta["records"]
            self.lowest_test_loss = _number(meta["lowest_test_loss"])
        step = int(state.step)
        self.folder.run = self.identity.name
        with self.team.one_fate():
            self.folder.reopen()
            self.folder.cut(METRICS, step, noted=noted.get(METRICS))
            # The evaluation at this very step is made again, with the same numbers.
            self.folder.cut(EVALUATIONS, step - 1, noted=noted.get(EVALUATIONS))
        return state

    def _save_or_leave(self, stop: StopRequest, state: TrainState) -> None:
        """Save what there is if it is time; raise as well, if a signal has asked to stop.

        A signal may have reached one process of several, and each has its own clock.
        """
        step, total = int(state.step), self.trainer.total_steps
        waited = time.monotonic() - self.saved_at > 60 * self.record.checkpoint_minutes
        number, late = self.team.largest(stop.number or 0, waited)
        epoch, within = divmod(step, self.trainer.steps_per_epoch)
        due = within == 0 and (epoch % self.record.checkpoint_every == 0 or step == total)
        if step and (due or late or number):
            self._save(state)
            (number,) = self.team.largest(stop.number or 0)
        if number:
            stop.number = number
            stop.raise_if_asked(
                f"interrupted at step {step}, which is saved; go on with "
                f"`optalr resume {self.folder.path}`."
            )

    def _record(self, segment: Segment) -> dict[str, Any]:
        """Record a row for each step of a segment, up to the first loss that is not finite.

        Returns:
          What to report of the last.
        """
        rows = segment.rows(self.trainer.steps_per_epoch, self.seconds)
        pace = segment.seconds / len(segment.measured["loss"])
        self.seconds += segment.seconds
        with self.team.one_fate():
            self.folder.append(METRICS, rows)
        if not math.isfinite(rows[-1]["loss"]):
            self._diverged(rows[-1]["step"])
        return rows[-1] | {"total_steps": self.trainer.total_steps, "pace": pace}

    def _save(self, state: TrainState) -> None:
        # The last loss may be finite where the parameters after it are not.
        if not bool(jax.jit(all_finite)(state.params)):
            self._diverged(int(state.step))
        with self.team.one_fate():
            self.folder.check_place()
            # Rows reach the disk first, so that no checkpoint is ahead of them.
            self.folder.sync()
        meta = {
            "seconds": self.seconds,
            "lowest_test_loss": self.lowest_test_loss,
            "records": self.folder.standing(),
            "identity": self.identity._asdict(),
        }
        self.checkpoints.save(int(state.step), state, meta)
        self.saved_at = time.monotonic()

    def _evaluate_if_due(self, state: TrainState) -> None:
        epoch = int(state.step) // self.trainer.steps_per_epoch
        if epoch % self.trainer.config.train.evaluate_every == 0:
            found = self._evaluate(state, "validation", "test")
            self.validation_loss = found["validation_loss"]

    def _evaluate(self, state: TrainState, *names: str) -> dict[str, float]:
        found = self.trainer.evaluate(state, *names)
        step = int(state.step)
        row = {"step": step, "epoch": step / self.trainer.steps_per_epoch}
        with self.team.one_fate():
            self.folder.append(EVALUATIONS, [row | {"seconds": self.seconds} | found])
        # NaN where there is none yet, which `fmin` passes over.
        self.lowest_test_loss = float(np.fmin(self.lowest_test_loss, found["test_loss"]))
        return found

    def _finish(self, state: TrainState) -> dict[str, Any]:
        found = self._evaluate(state, "train", "validation", "test")
        data = self.trainer.dataset
        splits = {"train": data.train, "validation": data.validation, "test": data.test}
        # The last batches may have finite losses where a whole split has none.
        if not all(math.isfinite(found[f"{name}_loss"]) for name in splits if len(splits[name])):
            self._diverged(int(state.step))
        result = {
            "status": "finished",
            **found,
            "lowest_test_loss": self.lowest_test_loss,
            "steps": int(state.step),
            "epochs": self.trainer.config.train.epochs,
            "seconds": self.seconds,
            "compile_seconds": self.trainer.compile_seconds,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "optimizer_bytes": optalr.state_bytes(state.opt_state),
        }
        with self.team.one_fate():
            self.folder.finish(result)
        return result

    def _diverged(self, step: int) -> None:
        """Record the divergence with its diagnosis, and raise it."""
        latest = self.checkpoints.latest()
        rows = self.folder.rows(METRICS) if self.team.writes else []
        (diagnosis, *_) = self.team.texts(diagnose(rows, step))
        kept = (
            f"the last good checkpoint is step {latest} in {self.folder.path / 'checkpoints'}"
            if latest is not None
            else "there is no earlier checkpoint"
        )
        message = f"training diverged at step {step}: {diagnosis} ({kept})."
        with self.team.one_fate():
            self.folder.finish(
                {
                    "status": "diverged",
                    "diagnosis": message,
                    "steps": step,
                    "last_good_step": latest,
                    "seconds": self.seconds,
                }
            )
        error = TrainingDivergedError(message)
        error.shared = True
        raise error


def open_unfinished(
    path: str | Path, overrides: Mapping[str, Any] | None = None, team: Team | None = None
) -> tuple[Trainer, RunFolder]:
    """Return what ``train`` needs to continue the run in a folder.

    Args:
      path: the folder.
      overrides: dotted keys of the config to new values, such as ``mesh.data``.
      team: the processes that continue it together; by default one.

    Raises:
      ExperimentError: the folder holds no run, or one that has nothing left to do.
    """
    team = team or Team()
    folder = folder_of(team).open(path)
    result = folder.result()
    if result is not None and result["status"] == "diverged":
        raise ExperimentError(
            f"{folder.path} diverged and would again: {result['diagnosis']} Start a new run with a "
            "smaller method.learning_rate."
        )
    if result is not None:
        raise ExperimentError(
            f"{folder.path} is finished ({result['steps']} steps): nothing to resume. To train "
            "longer, run its config.toml with --set train.epochs=..."
        )
    return Trainer(override(folder.config(), overrides or {}), team=team), folder


def _number(value: float | None) -> float:
    """Return a number of a checkpoint's JSON, which has no NaN."""
    return math.nan if value is None else value
