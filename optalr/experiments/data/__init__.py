"""Loading data by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from optalr.experiments.configs.calling import call
from optalr.experiments.configs.config import DataConfig
from optalr.experiments.data import arrays, images, tabular, text
from optalr.experiments.data.dataset import Dataset, Raw, Split, split
from optalr.experiments.data.sources import Search
from optalr.experiments.errors import ExperimentError, suggest

LOADERS: Mapping[str, Callable[..., Raw]] = MappingProxyType(
    {
        "boston": tabular.boston,
        "breast_cancer": tabular.breast_cancer,
        "cifar10": images.cifar10,
        "cifar100": images.cifar100,
        "diabetes": tabular.diabetes,
        "digits": tabular.digits,
        "fashion_mnist": images.fashion_mnist,
        "mnist": images.mnist,
        "mnist1d": tabular.mnist1d,
        "mnist_5k": tabular.mnist_5k,
        "npz": arrays.npz,
        "python_docs": text.python_docs,
        "shakespeare": text.shakespeare,
        "svhn": images.svhn,
        "text": text.text,
    }
)

__all__ = ["LOADERS", "Dataset", "Raw", "Split", "load", "split"]


def load(config: DataConfig) -> Dataset:
    """Load and split the data that ``config`` names.

    Raises:
      ExperimentError: an unknown name or option, a missing, truncated or malicious file.
    """
    if config.name not in LOADERS:
        raise ExperimentError(f"unknown data.name {config.name!r}: {suggest(config.name, LOADERS)}")
    search = Search(config.name, config.folder, config.download)
    raw = call(LOADERS[config.name], config.options, section="data", search=search)
    return split(
        config.name,
        raw,
        test_fraction=config.test_fraction,
        validation_fraction=config.validation_fraction,
        split_seed=config.split_seed,
        limit=config.limit,
        fraction=config.fraction,
    )
