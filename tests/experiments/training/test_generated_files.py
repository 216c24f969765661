"""Configs whose data we do not have, on small files that are generated here in the exact format.

The images are noise. That a run goes through is all that this shows; no loss of it says anything.
"""

from pathlib import Path

import numpy as np
import pytest

from optalr.experiments.configs.files import load_config
from optalr.experiments.records.run_folder import RunFolder
from optalr.experiments.training.loop import train
from optalr.experiments.training.trainer import Trainer
from tests.experiments.data.files import cifar10_files, write_mnist, write_tree

CONFIGS = Path(__file__).parents[3] / "configs"
NAMES = [
    "cifar10_resnet20/paper_adaptive",
    "cifar10_resnet20/paper_fixed",
    "cifar10_resnet18/second_order_validation",
    "edf_cifar10/edf_g_k1_w2",
    "edf_cifar10_augmented/edf_g_k1",
    "edf_cifar10_fit/edf_g_k02",
    "edf_mnist_batches/stochastic_k1",
    "mnist_logistic_full/paper",
]


def generated(name, folder):
    """Write files of this name's format; return where they are."""
    return write_mnist(folder) if name == "mnist" else write_tree(folder, cifar10_files(False))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_config_runs_on_generated_files_of_its_format(name, tmp_path):
    config = load_config(CONFIGS / f"{name}.toml")
    folder = generated(config.data.name, tmp_path / "data")
    # The shallowest net of the same kind: deep ones compile for minutes.
    depth = {"depth": 8} if config.model.name == "resnet" else {}
    config = config.model_copy(
        update={
            "data": config.data.model_copy(
                update={"folder": str(folder), "validation_fraction": 0.4}
            ),
            "model": config.model.model_copy(update=depth),
            "train": config.train.model_copy(update={"epochs": 2, "batch_size": 4}),
        }
    )
    found = train(Trainer(config), RunFolder.create(tmp_path / "run", config))
    assert np.isfinite(found["train_loss"])
