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
from tests.experiments.data.files import (
    cifar10_files,
    cifar100_files,
    write_mnist,
    write_svhn,
    write_tree,
)

CONFIGS = Path(__file__).parents[3] / "configs"
NAMES = [
    "cifar10_alexnet/paper",
    "cifar10_lenet/second_order",
    "cifar10_resnet18/second_order_validation",
    "cifar10_resnet20/paper_adaptive",
    "cifar10_resnet20/paper_fixed",
    "cifar10_vgg/adam",
    "cifar100_alexnet/sgd",
    "cifar100_resnet164/lipschitz",
    "cifar100_resnet18/second_order",
    "cifar100_vgg/amsgrad",
    "edf_cifar10/edf_g_k1_w2",
    "edf_cifar10_augmented/edf_g_k1",
    "edf_cifar10_fit/edf_g_k02",
    "edf_cifar100/edf_g_k1_w1",
    "edf_cifar100/edf_g_k1_w1_contradictions",
    "edf_cifar100_augmented/edf_g_k1",
    "edf_mnist_batches/stochastic_k1",
    "mnist_logistic_full/paper",
    "mnist_table1/lipschitz",
    "svhn_alexnet/adam",
    "svhn_vgg/paper",
]
# The smallest net of the same kind: deep and wide ones compile for minutes.
SMALLEST = {
    "alexnet": {"width": 8, "dense": 16},
    "resnet": {"depth": 8},
    "vgg": {"width": 0.125},
}


def generated(name, folder):
    """Write files of this name's format; return where they are."""
    if name == "mnist":
        return write_mnist(folder)
    if name == "svhn":
        return write_svhn(folder)
    return write_tree(
        folder, cifar10_files(False) if name == "cifar10" else cifar100_files(False, 20)[0]
    )


def smallest(model):
    """Return what makes of a config's model the smallest of its kind."""
    if model.name == "resnet" and (model.model_extra or {}).get("version") == 2:
        return {"depth": 11}
    return SMALLEST.get(model.name, {})


def test_every_folder_whose_data_we_do_not_have_is_tried():
    lacking = {
        path.parent.name
        for path in CONFIGS.rglob("*.toml")
        if "data not available" in load_config(path).expected
    }
    assert {name.split("/")[0] for name in NAMES} == lacking


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_config_runs_on_generated_files_of_its_format(name, tmp_path):
    config = load_config(CONFIGS / f"{name}.toml")
    folder = generated(config.data.name, tmp_path / "data")
    config = config.model_copy(
        update={
            "data": config.data.model_copy(
                update={"folder": str(folder), "validation_fraction": 0.4}
            ),
            "model": config.model.model_copy(update=smallest(config.model)),
            "train": config.train.model_copy(update={"epochs": 2, "batch_size": 4}),
        }
    )
    found = train(Trainer(config), RunFolder.create(tmp_path / "run", config))
    assert np.isfinite(found["train_loss"])
