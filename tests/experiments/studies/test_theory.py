"""The command that looks at the paper's arguments."""

import contextlib
import csv
import io

import numpy as np
import pytest

from optalr.experiments import cli
from optalr.experiments.configs.config import from_table
from optalr.experiments.errors import ExperimentError
from optalr.experiments.studies import theory
from optalr.experiments.training.trainer import Trainer

SMALL = {
    "data": {"limit": 640},
    "model": {"name": "mlp", "hidden": [8]},
    "method": {"name": "tso_alra", "learning_rate": 1e-2, "switch_at_epochs": 3},
    "train": {"epochs": 4, "batch_size": 64},
}


@pytest.fixture(scope="module")
def found():
    return theory.examine(Trainer(from_table(SMALL)), num_batches=60, damping=1e-3)


def test_preconditioned_noise_is_nearer_to_isotropic(found):
    ranks = {name: spectrum.effective_rank for name, spectrum in found.noise.items()}
    assert ranks[theory.GRADIENT] < ranks[theory.KRONECKER] < ranks[theory.ISOTROPIC] <= 59
    assert found.num_weights == 64 * 8 + 8 * 10


def test_the_factors_are_noted_over_training(found):
    epochs = [epoch for epoch, _ in found.spectra]
    assert epochs == sorted(set(epochs))
    assert epochs[-1] == 4
    rows, cols = found.spectra[0][1]["['Dense_0']['kernel']"]
    assert rows.shape == (64,)
    assert cols.shape == (8,)


def test_isotropic_noise_has_the_rank_of_its_samples():
    spectrum = theory.isotropic_spectrum(50, 10_000, seed=0)
    # n samples of P numbers: (Σλ)²/Σλ² is n P/(P + n) for a Wishart matrix.
    np.testing.assert_allclose(spectrum.effective_rank, 49 * 10_000 / 10_049, rtol=0.01)


def test_the_root_inverts_the_damped_factor():
    factor = np.diag([4.0, 1.0])
    root = theory.damped_root(factor, 0.1)
    np.testing.assert_allclose(root @ root @ (factor + 0.25 * np.eye(2)), np.eye(2), atol=1e-12)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Run the command once, with factors in blocks; return its folder and what it printed."""
    folder = tmp_path_factory.mktemp("theory")
    config = folder / "small.toml"
    config.write_text(
        '[data]\nlimit = 320\n[model]\nname = "linear"\n[method]\nname = "tso_alra"\n'
        "options = { block_size = 24 }\n[train]\nepochs = 2\nbatch_size = 64\n"
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.main(["theory", str(config), "--batches", "10", "--out", str(folder / "out")])
    return folder / "out", printed.getvalue()


def test_the_command_writes_pictures_and_tables(command):
    out, printed = command
    assert "Kronecker" in printed
    for name in ("noise.png", "factors.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    with open(out / "noise.csv", newline="") as file:
        assert {row["direction"] for row in csv.DictReader(file)} >= {theory.GRADIENT}


def test_factors_in_blocks_are_noted_without_their_padding(command):
    out, _ = command
    with open(out / "factors.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["epoch"] == "1"]
    assert {row["kernel"] for row in rows} == {"['Dense_0']['kernel']"}
    # Three blocks of 24 hold the 64 pixels; one holds the 10 classes.
    sides = [row["side"] for row in rows]
    assert (sides.count("rows"), sides.count("cols")) == (64, 10)


def test_mistakes_are_named():
    train = {"epochs": 1, "batch_size": 64}
    trainer = Trainer(from_table({**SMALL, "method": {"name": "sgd"}, "train": train}))
    with pytest.raises(ExperimentError, match="keeps no Kronecker factors"):
        theory.examine(trainer, num_batches=2, damping=1e-3)
    with pytest.raises(ExperimentError, match="--batches must be at least 2"):
        theory.examine(trainer, num_batches=1, damping=1e-3)
    with pytest.raises(ExperimentError, match="--damping must be above 0"):
        theory.examine(trainer, num_batches=2, damping=0.0)
