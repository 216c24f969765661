"""Ctrl-C and SIGTERM at any moment: what is being written is finished, and the run can go on."""

import gc
import os
import signal
import sys
import time

import numpy as np
import pytest

from optalr.experiments import cli
from optalr.experiments.configs.config import to_table
from optalr.experiments.configs.files import to_toml
from optalr.experiments.records import checkpoints
from optalr.experiments.records.run_folder import RunFolder
from optalr.experiments.records.signals import handled, leave_at_once
from optalr.experiments.training.loop import open_unfinished, train
from optalr.experiments.training.trainer import Trainer
from tests.experiments.records.faults import SMALL, snapshot

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Train without an interruption."""
    trainer = Trainer(SMALL)
    folder = RunFolder.create(tmp_path_factory.mktemp("whole") / "run", SMALL)
    train(trainer, folder)
    return trainer, snapshot(trainer, folder)


def _write_config(path):
    path.write_text(to_toml(to_table(SMALL)))
    return str(path)


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, "checkpoint"),
        pytest.param(signal.SIGINT, "append", marks=pytest.mark.slow),
        (signal.SIGINT, "garbage"),
    ],
)
def test_a_signal_while_something_is_written(tmp_path, monkeypatch, capsys, whole, number, moment):
    """It waits for the write, also in a garbage collector's callback, which drops exceptions."""
    trainer, wanted = whole
    out, asked = tmp_path / "run", []

    def ask(*_):
        if not asked:
            asked.append(number)
            signal.raise_signal(number)

    def collect():
        gc.callbacks.append(ask)
        gc.collect()
        gc.callbacks.remove(ask)

    before = collect if moment == "garbage" else ask
    module, name = (checkpoints, "sums_of") if moment == "checkpoint" else (RunFolder, "append")
    write = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: (before(), write(*arguments))[1])
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", _write_config(tmp_path / "small.toml"), "--out", str(out)])
    assert caught.value.code == CODES[number]
    shown = capsys.readouterr().err
    assert "which is saved; go on with `optalr resume" in shown
    assert "Traceback" not in shown
    monkeypatch.undo()
    train(trainer, RunFolder.open(out))
    assert snapshot(trainer, RunFolder(out)) == wanted


def _child(ready, shown, words):
    """Run the command line as the console script does, with its messages in a file."""
    for stream in (1, 2):
        os.dup2(os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    with handled(leave_at_once):
        ready.set()
        cli.main(words)
        sys.stdout.flush()
        os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_a_signal_at_a_hundred_moments(tmp_path, whole, processes, part):
    """Each ends the process with its code, at once or after a write, and no run is damaged.

    In four parts, since a hundred processes take a while to start.
    """
    trainer, wanted = whole
    config = _write_config(tmp_path / "small.toml")
    generator = np.random.default_rng(part)
    began = time.monotonic()
    assert _interrupted(processes, tmp_path, config, None) == 0
    length = time.monotonic() - began
    codes = []
    for i in range(25):
        number = list(CODES)[i % 2]
        out = tmp_path / f"run{i}"
        delay = float(generator.uniform(0, length))
        code = _interrupted(processes, out, config, (number, delay))
        assert code in (0, CODES[number]), (i, number, delay)
        codes.append(code)
        assert "Traceback" not in (tmp_path / f"run{i}.txt").read_text()
        if out.exists():
            folder = RunFolder.open(out)
            if folder.result() is None:
                train(trainer, open_unfinished(out)[1])
            assert snapshot(trainer, folder) == wanted, (i, number, delay)
    assert len([code for code in codes if code]) > 4


def _interrupted(processes, out, config, asked):
    """Run a config in a process, signal it after a delay, and return its exit code."""
    ready = processes.Event()
    if out.is_dir():
        out = out / "run"
    words = ["run", config, "--out", str(out)]
    process = processes.Process(target=_child, args=(ready, f"{out}.txt", words))
    process.start()
    ready.wait()
    if asked is not None:
        number, delay = asked
        time.sleep(delay)
        if process.is_alive():
            os.kill(process.pid, number)
    process.join()
    return process.exitcode
