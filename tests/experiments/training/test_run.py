"""The runner end to end: a run, its folder, interruptions, divergence."""

import json
import math
import shutil
import time

import jax
import numpy as np
import pytest

from optalr.experiments import cli
from optalr.experiments.configs.config import from_table
from optalr.experiments.configs.files import load_config
from optalr.experiments.errors import ExperimentError, TrainingDivergedError
from optalr.experiments.records.checkpoints import Checkpoints
from optalr.experiments.records.run_folder import EVALUATIONS, METRICS, RunFolder
from optalr.experiments.reports.plots import plot_run
from optalr.experiments.training.loop import open_unfinished, train
from optalr.experiments.training.trainer import Trainer
from optalr.reading.resuming import ConfigurationChangedWarning

SMALL = {
    "data": {"limit": 320},
    "model": {"hidden": [16]},
    "method": {"name": "adam", "learning_rate": 1e-2},
    "train": {"epochs": 4, "batch_size": 64},
    "record": {"checkpoint_every": 1},
}


def _config(**sections):
    return from_table({k: {**SMALL.get(k, {}), **sections.get(k, {})} for k in SMALL | sections})


def _trained(path, config):
    folder = RunFolder.create(path / "whole", config)
    trainer = Trainer(config)
    return trainer, folder, train(trainer, folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Train one small run to its end, epochs in a scan."""
    return _trained(tmp_path_factory.mktemp("runs"), _config())


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """Train the same run to its end, a step at a time."""
    return _trained(tmp_path_factory.mktemp("streamed"), _config(train={"loop": "step"}))


def _final_state(trainer, folder):
    with Checkpoints(folder.path / "checkpoints", 2) as checkpoints:
        return checkpoints.restore(checkpoints.latest(), trainer.init(0))[0]


def _without_seconds(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def _assert_same_run(trainer, folder, other):
    ours, theirs = _final_state(trainer, folder), _final_state(trainer, other)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for name in (METRICS, EVALUATIONS):
        left, right = (_without_seconds(f.rows(name)) for f in (folder, other))
        assert json.dumps(left) == json.dumps(right)


def test_a_run_learns_and_leaves_a_whole_folder(finished):
    trainer, folder, result = finished
    assert result["status"] == "finished"
    assert result["steps"] == trainer.total_steps == 20
    assert result["test_accuracy"] > 0.5
    rows = folder.rows(METRICS)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[0]["loss"] > rows[-1]["loss"]
    np.testing.assert_allclose(rows[0]["learning_rate"], 1e-2, rtol=1e-6)
    assert np.all(np.diff([row["seconds"] for row in rows]) > 0)
    evaluations = folder.rows(EVALUATIONS)
    assert [row["step"] for row in evaluations] == [0, 5, 10, 15, 20]
    assert load_config(folder.path / "config.toml") == trainer.config
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__
    assert plot_run(folder, "accuracy").read_bytes().startswith(b"\x89PNG")
    kept = [p for p in (folder.path / "checkpoints").iterdir() if p.name.isdigit()]
    assert len(kept) == trainer.config.record.keep


def test_the_streamed_loop_takes_the_same_steps_as_the_scanned_one(finished, streamed):
    assert finished[0].scans
    assert not streamed[0].scans
    ours, theirs = ([row["loss"] for row in run[1].rows(METRICS)] for run in (finished, streamed))
    # XLA fuses a scan's body otherwise than a step, so the last bits differ and then grow.
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_only_the_seed_decides(finished, tmp_path):
    trainer, folder, _ = finished
    again = RunFolder.create(tmp_path / "again", trainer.config)
    train(Trainer(trainer.config), again)
    _assert_same_run(trainer, folder, again)
    other = RunFolder.create(tmp_path / "other", _config(train={"seed": 1}))
    train(trainer, other)
    assert other.rows(METRICS)[0]["loss"] != folder.rows(METRICS)[0]["loss"]


@pytest.mark.parametrize("uninterrupted", ["finished", "streamed"])
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path, uninterrupted, monkeypatch, request):
    trainer, whole, _ = request.getfixturevalue(uninterrupted)
    halted = RunFolder.create(tmp_path / "halted", trainer.config)
    if not trainer.scans:  # checkpoints within an epoch as well
        halted_config = tmp_path / "halted" / "config.toml"
        text = halted_config.read_text()
        halted_config.write_text(text.replace("minutes = 10.0", "minutes = 0.0"))
        monkeypatch.setattr("optalr.experiments.training.segments._REPORT_SECONDS", 0.0)
    seen = []

    def interrupt(row):
        seen.append(row["step"])
        if row["step"] in (7, 10) and seen.count(row["step"]) == 1:
            raise KeyboardInterrupt

    for _ in range(5):
        try:
            train(*open_unfinished(halted.path), interrupt)
        except KeyboardInterrupt:
            continue
        break
    assert halted.result()["steps"] == 20
    assert len(seen) > len(set(seen)) or not trainer.scans
    _assert_same_run(trainer, whole, halted)


def test_a_finished_run_is_not_resumed(finished):
    with pytest.raises(ExperimentError, match="is finished"):
        open_unfinished(finished[1].path)


def test_two_processes_cannot_train_into_one_folder(finished, tmp_path):
    trainer, _, _ = finished
    folder = RunFolder.create(tmp_path / "held", trainer.config)
    with folder.lock(), pytest.raises(ExperimentError, match="in use by another process"):
        train(trainer, RunFolder(folder.path))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ExperimentError, match="holds no run"):
        open_unfinished(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(finished, tmp_path):
    _, folder, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder.path, copy)
    (copy / "result.json").unlink()
    text = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace("hidden = [16]", "hidden = [8]"))
    with (
        pytest.warns(ConfigurationChangedWarning, match=r"model\.hidden\.0: 16 -> 8"),
        pytest.raises(ExperimentError, match="does not fit this run"),
    ):
        train(*open_unfinished(copy), force=True)


def test_resuming_with_another_setting_is_refused_unless_told_and_names_it(finished, tmp_path):
    _, folder, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder.path, copy)
    (copy / "result.json").unlink()
    text = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace("epochs = 4", "epochs = 5"))
    with pytest.raises(ExperimentError, match=r"train\.epochs: 4 -> 5\. .* with --force"):
        train(*open_unfinished(copy))
    with pytest.warns(ConfigurationChangedWarning) as caught:
        result = train(*open_unfinished(copy), force=True)
    assert [str(w.message).split(": ", 1)[1] for w in caught] == ["train.epochs: 4 -> 5"]
    assert result["steps"] == 25


def test_a_later_divergence_names_the_last_good_checkpoint_and_leaves_it_there(tmp_path):
    config = _config(schedule={"name": "steps", "at_epochs": [2], "factor": 1e38})
    folder = RunFolder.create(tmp_path / "run", config)
    trainer = Trainer(config)
    with pytest.raises(TrainingDivergedError, match="the last good checkpoint is step 10"):
        train(trainer, folder)
    assert folder.result()["last_good_step"] == 10
    restored = _final_state(trainer, folder)
    assert int(restored.step) == 10
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.params))


def test_a_divergence_stops_with_a_diagnosis(tmp_path):
    config = _config(method={"name": "sgd", "learning_rate": 1e38})
    folder = RunFolder.create(tmp_path / "run", config)
    with pytest.raises(TrainingDivergedError, match=r"diverged at step \d+: .*learning rate"):
        train(Trainer(config), folder)
    result = folder.result()
    assert result["status"] == "diverged"
    assert np.isnan(folder.rows(METRICS)[-1]["loss"])
    with pytest.raises(ExperimentError, match="would again"):
        open_unfinished(folder.path)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_run_whose_last_evaluation_is_not_finite_has_diverged(tmp_path, monkeypatch, split):
    """Parameters of 1e38 are finite, and so may be the loss of the last batch."""
    config = _config()
    folder, trainer = RunFolder.create(tmp_path / "run", config), Trainer(config)
    evaluate = trainer.evaluate

    def overflowing(state, *names):
        found = evaluate(state, *names)
        return found | {f"{split}_loss": math.nan} if int(state.step) else found

    monkeypatch.setattr(trainer, "evaluate", overflowing)
    with pytest.raises(TrainingDivergedError, match=r"diverged at step \d+"):
        train(trainer, folder)
    assert folder.result()["status"] == "diverged"


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"train": {"batch_size": 5000}}, "batch_size 5000 is larger than the 320"),
        ({"data": {"name": "digit"}}, "did you mean 'digits'"),
        ({"data": {"nmae": "digits"}}, "unknown key 'data.nmae' for digits"),
        ({"model": {"name": "mpl"}}, "did you mean 'mlp'"),
        ({"model": {"widths": 3}}, "unknown key 'model.widths' for mlp"),
        ({"method": {"name": "scale_by_learning_rate"}}, "unknown method.name"),
    ],
)
def test_a_mistake_shows_before_training(sections, wanted):
    with pytest.raises(ExperimentError, match=wanted):
        Trainer(_config(**sections))


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing_and_change_nothing(tmp_path, processes):
    """A killed run goes on from its last checkpoint, and its folder is never damaged."""
    config = _config(train={"epochs": 60}, record={"checkpoint_every": 2})
    trainer = Trainer(config)
    whole = RunFolder.create(tmp_path / "whole", config)
    train(trainer, whole)
    killed = RunFolder.create(tmp_path / "killed", config)
    generator = np.random.default_rng(0)
    kills, lost = 0, 0
    while kills < 20:
        process = processes.Process(target=cli.main, args=(["resume", str(killed.path)],))
        process.start()
        before = _latest(killed)
        # Kill within the stretch in which it writes: some time after its first new line.
        size = _size(killed)
        while process.is_alive() and _size(killed) == size:
            time.sleep(0.002)
        time.sleep(generator.uniform(0.0, 0.08))
        process.kill()
        process.join()
        kills += 1
        assert _latest(killed) >= before
        assert all(row["step"] == i + 1 for i, row in enumerate(killed.rows(METRICS)))
        lost += len(killed.rows(METRICS)) - _latest(killed)
        if killed.result() is not None:
            # It got to its end between two kills; begin again with what is left of the twenty.
            shutil.rmtree(killed.path)
            killed = RunFolder.create(killed.path, config)
    assert lost > 0
    if killed.result() is None:
        train(*open_unfinished(killed.path))
    _assert_same_run(trainer, whole, killed)


def _latest(folder):
    names = [p.name for p in (folder.path / "checkpoints").glob("*") if p.name.isdigit()]
    return max(map(int, names), default=0)


def _size(folder):
    path = folder.path / METRICS
    return path.stat().st_size if path.exists() else 0
