"""Several processes that train one run together: the numbers of one, and one end for all."""

import contextlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from optalr.experiments.configs.config import from_table, to_table
from optalr.experiments.configs.files import to_toml
from optalr.experiments.records.checkpoints import Checkpoints
from optalr.experiments.records.run_folder import EVALUATIONS, METRICS, RunFolder
from optalr.experiments.training.loop import open_unfinished, train
from optalr.experiments.training.trainer import Trainer
from tests.sharding import launching

SECONDS = 150
# What a clock says, and how exactly roots were found, which is all rounding.
NOT_COMPARED = {"seconds", "compile_seconds", "root_residual"}


def _config(epochs=4, loop="scan", **method):
    name = {
        "name": "tso_alra",
        "options": {"warmup": 0, "min_batches": 1, "sharded_factors": True},
        "update_every": 3,
        "damping": 1e-2,
    }
    return from_table(
        {
            "data": {"limit": 192},
            "model": {"hidden": [16]},
            "method": method or name,
            "train": {"epochs": epochs, "batch_size": 64, "loop": loop},
            "mesh": {"data": 8},
            "record": {"checkpoint_every": 1},
        }
    )


class Processes:
    """Two processes of a command, with their messages.

    Args:
      folder: for files of what they say.
      *words: a command, which both are given; a function of the process makes it where they differ.
      slurm: let jax find out by itself, as in a job of SLURM.
    """

    def __init__(self, folder, *words, slurm=False):
        self.files, port = [folder / f"process{i}.txt" for i in range(2)], launching.free_port()
        self.started = []
        for i, file in enumerate(self.files):
            own = [str(word(i)) if callable(word) else str(word) for word in words]
            named = [f"--coordinator=localhost:{port}", "--processes=2", f"--process={i}"]
            own += ["--coordinator=auto"] if slurm else named
            surroundings = launching.environment() | (_job(i, port) if slurm else {})
            with open(file, "wb") as output:
                self.started.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "optalr", *own, "--wait=60"],
                        stdout=output,
                        stderr=output,
                        env=surroundings,
                        cwd=launching.ROOT,
                    )
                )

    def codes(self):
        """Wait for the end of both, and return their exit codes."""
        try:
            return [process.wait(SECONDS) for process in self.started]
        finally:
            for process in self.started:
                process.kill()
                process.wait()

    def said(self, index):
        """Return what a process has printed, without what jax's collectives say on their own."""
        lines = self.files[index].read_text().splitlines()
        return "\n".join(line for line in lines if not line.startswith("[Gloo]"))

    def wait_for_rows(self, path, number):
        """Wait until a run has recorded so many steps."""
        began = time.monotonic()
        while time.monotonic() - began < SECONDS:
            with contextlib.suppress(FileNotFoundError):
                if path.joinpath(METRICS).read_bytes().count(b"\n") >= number:
                    return
            assert all(process.poll() is None for process in self.started), self.said(0)
            time.sleep(0.02)
        pytest.fail("no rows came")


def _job(index, port):
    """Return what SLURM tells a process of a job."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "JAX_COORDINATOR_PORT": str(port),
    }


def _write(folder, config):
    path = folder / "config.toml"
    path.write_text(to_toml(to_table(config)))
    return path


def _records(path):
    """Return all numbers that a run recorded, column by column."""
    folder, found = RunFolder(path), {}
    for name in (METRICS, EVALUATIONS):
        for row in folder.rows(name):
            for key, value in row.items():
                if key not in NOT_COMPARED:
                    found.setdefault(f"{name} {key}", []).append(value)
    for key, value in folder.result().items():
        if isinstance(value, float | int) and key not in NOT_COMPARED:
            found[f"result {key}"] = value
    return found


def _assert_same(path, other, rtol=1e-5):
    found, expected = _records(path), _records(other)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=rtol, atol=1e-6, err_msg=key)


def _alone(path, config):
    train(Trainer(config), RunFolder.create(path, config))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "slurm"),
    [
        (_config(), False),
        (_config(loop="step", name="untuned", options={"sharded_factors": True}), True),
    ],
    ids=["tso_alra", "untuned"],
)
def test_two_processes_record_what_one_does(tmp_path, config, slurm):
    both, words = tmp_path / "both", ["run", _write(tmp_path, config), "--out"]
    processes = Processes(tmp_path, *words, both, slurm=slurm)
    assert processes.codes() == [0, 0], processes.said(0) + processes.said(1)
    assert "loss" in processes.said(0)
    assert "loss" not in processes.said(1)
    _assert_same(both, _alone(tmp_path / "alone", config))
    # Each wrote what it held, and one process reads it.
    (latest, *_) = sorted((both / "checkpoints").iterdir(), key=lambda p: -int(p.name))
    names = {path.name for path in latest.iterdir()}
    assert names == {"state-0-of-2.npz", "state-1-of-2.npz", "meta.json", "SHA256SUMS"}
    trainer = Trainer(config)
    states = [
        Checkpoints(path / "checkpoints", 2).restore(int(latest.name), trainer.init(0))[0]
        for path in (both, tmp_path / "alone")
    ]
    for one, other in zip(*(jax.tree.leaves(state.params) for state in states), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def _interrupted(tmp_path, config, end, rows):
    """Start two processes, let ``end`` have them after so many rows, and return them."""
    processes = Processes(tmp_path, "run", _write(tmp_path, config), "--out", tmp_path / "cut")
    processes.wait_for_rows(tmp_path / "cut", rows)
    end(processes.started)
    return processes


@pytest.mark.slow
def test_a_process_is_killed_and_both_go_on(tmp_path):
    config = _config(epochs=30)
    processes = _interrupted(tmp_path, config, lambda started: started[1].kill(), 12)
    codes = processes.codes()
    assert codes[1] == -signal.SIGKILL
    # The other says so, unless jax ends it first.
    assert codes[0] in (4, -signal.SIGABRT)
    said = "another process of this run has ended" if codes[0] == 4 else "another task died"
    assert said in processes.said(0)
    cut = tmp_path / "cut"
    assert RunFolder(cut).result() is None
    # Each gives half of its devices from here on.
    again = Processes(tmp_path, "resume", cut, "--mesh=data=4")
    assert again.codes() == [0, 0], again.said(0) + again.said(1)
    _assert_same(cut, _alone(tmp_path / "alone", config), rtol=1e-4)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_with_a_save(tmp_path):
    config = _config(epochs=30, loop="step")
    ask = signal.SIGTERM
    processes = _interrupted(tmp_path, config, lambda started: started[1].send_signal(ask), 8)
    assert processes.codes() == [143, 143], processes.said(0) + processes.said(1)
    for index in range(2):
        assert "which is saved; go on with `optalr resume" in processes.said(index)
    # One process goes on, on half the devices.
    trainer, folder = open_unfinished(tmp_path / "cut", {"mesh": {"data": 4}})
    train(trainer, folder)
    _assert_same(tmp_path / "cut", _alone(tmp_path / "alone", config), rtol=1e-4)


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_began(tmp_path):
    def interrupt(row):
        if row["step"] == 6:
            raise KeyboardInterrupt

    config, cut = _config(), tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        train(Trainer(config), RunFolder.create(cut, config), interrupt)
    processes = Processes(tmp_path, "resume", cut)
    assert processes.codes() == [0, 0], processes.said(0) + processes.said(1)
    assert "processes: (absent) -> 2" in processes.said(0)
    _assert_same(cut, _alone(tmp_path / "alone", config))


@pytest.mark.slow
def test_processes_with_other_settings_are_told(tmp_path):
    config = _write(tmp_path, _config())
    seed = [lambda index: f"--seed={index}"]
    processes = Processes(tmp_path, "run", config, "--out", tmp_path / "run", *seed)
    assert processes.codes() == [2, 2]
    assert not (tmp_path / "run").exists()
    for index in range(2):
        assert "differ in their run: 'train.seed = 0' and 'train.seed = 1'" in processes.said(index)
