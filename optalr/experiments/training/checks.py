"""What a config's parts must have in common before anything is trained."""

import jax

from optalr.experiments.configs.config import Config
from optalr.experiments.data import Dataset
from optalr.experiments.data.augment import Augmentation, build_augmentation
from optalr.experiments.errors import ExperimentError
from optalr.experiments.models import Model

# States count their steps as int32.
_MOST_STEPS = 2**31 - 1


def steps_per_epoch(config: Config, dataset: Dataset) -> int:
    """Return how many batches an epoch has.

    Raises:
      ExperimentError: there are too few examples for one, or more steps than a state can count.
    """
    size, number = config.train.batch_size, len(dataset.train)
    if size > number:
        raise ExperimentError(
            f"train.batch_size {size} is larger than the {number} training examples of "
            f"{dataset.name!r}: set train.batch_size to at most {number}."
        )
    steps, epochs = number // size, config.train.epochs
    if epochs * steps > _MOST_STEPS:
        raise ExperimentError(
            f"train.epochs {epochs} of {steps} steps are more than the {_MOST_STEPS} steps that "
            "32 bits can count: lower train.epochs."
        )
    return steps


def reads_validation(config: Config, dataset: Dataset) -> bool:
    """Return whether the config's phase follows the validation loss.

    Raises:
      ExperimentError: it does, and there are no validation examples.
    """
    if config.phase.name != "switch_on_plateau":
        return False
    if not len(dataset.validation):
        raise ExperimentError(
            "phase 'switch_on_plateau' reads the validation loss and there are no validation "
            "examples: set data.validation_fraction."
        )
    return True


def augmentation(config: Config, dataset: Dataset) -> Augmentation | None:
    """Return the random changes of images that the config names.

    Raises:
      ExperimentError: the examples are no images.
    """
    augment = build_augmentation(config.data.augment)
    shape = dataset.train.x.shape
    if augment is not None and len(shape) != 4:
        raise ExperimentError(
            f"data.augment changes images, and {dataset.name!r} has examples of shape "
            f"{shape[1:]}: leave it out."
        )
    return augment


def scans_epochs(config: Config, dataset: Dataset, model: Model) -> bool:
    """Return whether an epoch is one program, or each step."""
    loop = config.train.loop
    if loop != "auto":
        return loop == "scan"
    if dataset.train.x.nbytes > config.train.resident_bytes:
        return False
    # Inside a scan, XLA's gradients of convolutions are some 20 times slower on a CPU.
    return jax.default_backend() != "cpu" or not model.has_convolutions()
