"""The environments of the peers: one each, with versions pinned here and nowhere else.

All have the same jax, so that seconds can be compared. It is the newest on which the released
kfac-jax runs: on jax 0.9 its tracing fails. psgd-jax imports private parts of optax that 0.2.7 and
later no longer have. What the peers bring along is pinned in ``constraints.txt`` beside this file.

optalr is in none of them: workers take it from the checkout, as they take the problems.
"""

import hashlib
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
CONSTRAINTS = HERE / "constraints.txt"
FOLDER = HERE.parents[1] / ".peers"
VARIABLE = "OPTALR_PEERS"

JAX = ("jax==0.8.3", "jaxlib==0.8.3", "flax==0.12.0")
# What the problems need for their data and nets.
DATA = ("scikit-learn", "mlxtend", "mnist1d", "pooch", "pydantic", "tomlkit", "filelock")
ENVIRONMENTS = {
    "optax": (*JAX, "optax==0.2.8"),  # ours as well
    "kfac": (*JAX, "optax==0.2.8", "kfac-jax==0.0.8"),
    "psgd": (*JAX, "optax==0.2.6", "psgd-jax==0.2.9"),
    "somax": (*JAX, "optax==0.2.8", "python-somax==1.0.1"),
}


class InstallError(Exception):
    """An environment cannot be made; the message says why."""


def folder() -> pathlib.Path:
    """Return where environments are kept if no option says so."""
    return pathlib.Path(os.environ.get(VARIABLE, FOLDER))


def versions(name: str) -> str:
    """Return what an environment is made of beyond jax, as a reader of the table wants it."""
    return ", ".join(wanted.replace("==", " ") for wanted in ENVIRONMENTS[name][len(JAX) :])


def _mark(name: str) -> str:
    """Return what an environment was made from: others are made anew."""
    wanted = "\n".join((*ENVIRONMENTS[name], *DATA, CONSTRAINTS.read_text(), sys.version))
    return hashlib.sha256(wanted.encode()).hexdigest()


def make(name: str, where: pathlib.Path) -> pathlib.Path:
    """Make an environment if it is not there, and return its python.

    Raises:
      InstallError: pip refuses; its last lines are the message.
    """
    target = where / name
    python = target / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = target / "made_from"
    if done.exists() and done.read_text() == _mark(name):
        return python
    print(f"making the environment {name} in {target}", flush=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", target],
        [*pip, "--constraint", CONSTRAINTS, *ENVIRONMENTS[name], *DATA],
    ):
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode:
            last = [line for line in found.stderr.splitlines() if line.strip()][-3:]
            raise InstallError(" ".join(last) or f"{command[0]} ended with {found.returncode}")
    # Written last, so that an environment that was interrupted is made again.
    done.write_text(_mark(name))
    return python
