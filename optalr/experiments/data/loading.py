"""Loading data by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from optalr.experiments.configs.calling import accepted, call
from optalr.experiments.configs.config import DataConfig
from optalr.experiments.data import images, npz, svhn, tabular, text
from optalr.experiments.data.checks import checked
from optalr.experiments.data.dataset import Dataset, Raw, split
from optalr.experiments.data.sources import Search
from optalr.experiments.errors import ExperimentError, suggest

# A loader's parameters are the keys that [data] may have for it; `search` alone is handed in here.
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
        "npz": npz.npz,
        "python_docs": text.python_docs,
        "shakespeare": text.shakespeare,
        "svhn": svhn.svhn,
        "text": text.text,
    }
)


def load(config: DataConfig) -> Dataset:
    """Load and split the data that ``config`` names.

    Args:
      config: the ``[data]`` section; keys beyond the common ones go to the loader.

    Returns:
      The training, validation and test examples, and how to standardize them.

    Raises:
      ExperimentError: the name or an option is unknown, or a file is missing, cut short or unsafe.
    """
    if config.name not in LOADERS:
        raise ExperimentError(f"unknown data.name {config.name!r}: {suggest(config.name, LOADERS)}")
    loader = LOADERS[config.name]
    if config.folder and "search" not in accepted(loader):
        raise ExperimentError(
            f"data {config.name!r} comes with a package and reads no folder: remove data.folder."
        )
    search = Search(config.name, config.folder, config.download)
    try:
        raw = checked(config.name, call(loader, config.options, section="data", search=search))
    except MemoryError:
        raise ExperimentError(
            f"data {config.name!r} takes more memory than there is: take smaller files."
        ) from None
    if config.standardize:
        raw = raw._replace(standardize=config.standardize)
    return split(
        config.name,
        raw,
        test_fraction=config.test_fraction,
        validation_fraction=config.validation_fraction,
        split_seed=config.split_seed,
        limit=config.limit,
        fraction=config.fraction,
    )
