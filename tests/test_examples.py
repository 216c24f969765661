"""Every example is a whole program that learns, and is well typed from a user's side."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# With the packages of the environment that runs the tests, whether it is activated or not.
PYRIGHT = (sys.executable, "-m", "pyright", "--pythonpath", sys.executable)
PROGRAMS = sorted((ROOT / "examples").glob("*.py"))
PAGE = (ROOT / "docs" / "frameworks.md").read_text()


def as_a_user(*command, cwd=ROOT):
    """Run a program without the flags and settings of the test suite."""
    user = {name: value for name, value in os.environ.items() if not name.startswith("XLA_")}
    user |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=user, cwd=cwd, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_learns(program):
    done = as_a_user(sys.executable, str(program))
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(re.search(r"test accuracy ([\d.]+)", done.stdout)[1]) > 0.96


def test_the_guide_shows_every_example_as_it_stands():
    assert [p.name for p in PROGRAMS if f'--8<-- "examples/{p.name}"' not in PAGE] == []


@pytest.mark.slow
def test_examples_are_well_typed():
    done = as_a_user(*PYRIGHT, "-p", "examples")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_type_checker_knows_the_signature_of_the_loss(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import jax, optalr\n"
        "def loss_fn(params: dict[str, jax.Array], x: jax.Array, y: int = 0) -> jax.Array: ...\n"
        "evaluate, w, x = optalr.value_grad_and_extras(loss_fn), {'w': jax.Array()}, jax.Array()\n"
        "value, grads, extras = evaluate(w, x, signals=True)\n"
        "reveal_type(value); reveal_type(grads)\n"
        "evaluate(w, x); evaluate(w, x=x); evaluate(w, x, 1)\n"
        "evaluate(w)  # too few\n"
        "evaluate(w, 'x')  # a string\n"
        "evaluate(x, x, signals=True)  # no parameters\n"
    )
    done = as_a_user(*PYRIGHT, str(program))
    assert 'Type of "value" is "Array"' in done.stdout
    assert 'Type of "grads" is "dict[str, Array]"' in done.stdout
    # The class of arrays is abstract, which is an error in line 3.
    wrong = {int(line) for line in re.findall(r"program\.py:(\d+):\d+ - error", done.stdout)}
    assert wrong - {3} == {7, 8, 9}, done.stdout
