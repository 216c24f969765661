"""Data sets by name: where they come from, and how they are split."""

from optalr.experiments.data.dataset import Dataset, Raw, Split, split
from optalr.experiments.data.loading import LOADERS, load

__all__ = ["LOADERS", "Dataset", "Raw", "Split", "load", "split"]
