"""Two processes of four devices each, as one: numbers, checkpoints, an end all at once."""

import subprocess
import sys

import numpy as np
import pytest

from tests.sharding import launching, process, run

pytestmark = pytest.mark.slow

SECONDS = 100


def launch(**options):
    """Start two processes and return their exit codes; when one has died, the other is ended."""
    port = launching.free_port()
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "tests.sharding.process", "--processes=2", f"--port={port}"]
    surroundings = {"cwd": launching.ROOT, "env": launching.environment()}
    started = [
        subprocess.Popen([*command, f"--process={i}", *words], **surroundings) for i in range(2)
    ]
    try:
        codes = [started[1].wait(SECONDS)]
        if codes[0] == 0:
            codes.insert(0, started[0].wait(SECONDS))
    finally:
        for each in started:
            each.kill()
            each.wait()
    return codes


def trained(training, carry, start):
    for step in range(start, process.END):
        carry = training.advance(carry, step)
    return run.numbers(carry[0])


def assert_same(found, expected):
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def alone():
    training = run.Training(None)
    return trained(training, training.start(), 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return what two processes wrote before one of them died."""
    path = tmp_path_factory.mktemp("two") / "checkpoint"
    assert launch(mesh="8", save=path, dies=1) == [9]
    return path


def test_two_processes_go_on_after_one_has_died_as_if_it_had_not(tmp_path, checkpoint, alone):
    result = tmp_path / "result.npz"
    assert launch(mesh="8", restore=checkpoint, result=result) == [0, 0]
    assert_same(np.load(result), alone)


@pytest.mark.parametrize("mesh", ["1", "8", "4,2"])
def test_one_process_goes_on_from_the_checkpoint_of_two(mesh, checkpoint, alone):
    training = run.Training(run.mesh_of(mesh))
    assert_same(trained(training, training.restored(checkpoint), process.CUT), alone)


def test_two_processes_on_another_mesh_go_on_from_the_checkpoint_of_one(tmp_path, alone):
    training = run.Training(None)
    carry = training.start()
    for step in range(process.CUT):
        carry = training.advance(carry, step)
    checkpoint, result = tmp_path / "checkpoint", tmp_path / "result.npz"
    training.save(checkpoint, carry)
    assert launch(mesh="2,4", restore=checkpoint, result=result) == [0, 0]
    assert_same(np.load(result), alone)
