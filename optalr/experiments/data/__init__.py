"""Loading data by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from optalr.experiments.arguments import call
from optalr.experiments.config import DataConfig
from optalr.experiments.data import tabular
from optalr.experiments.data.dataset import Dataset, Raw, Split, split
from optalr.experiments.errors import ExperimentError, suggest

LOADERS: Mapping[str, Callable[..., Raw]] = MappingProxyType(
    {
        "breast_cancer": tabular.breast_cancer,
        "diabetes": tabular.diabetes,
        "digits": tabular.digits,
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
    raw = call(LOADERS[config.name], config.options, section="data")
    return split(
        config.name,
        raw,
        test_fraction=config.test_fraction,
        validation_fraction=config.validation_fraction,
        split_seed=config.split_seed,
        limit=config.limit,
    )
