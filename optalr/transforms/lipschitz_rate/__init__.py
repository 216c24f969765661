"""The learning rate as the inverse of a Lipschitz constant."""

from optalr.transforms.lipschitz_rate.guards import LipschitzGuards
from optalr.transforms.lipschitz_rate.transform import scale_by_lipschitz_rate

__all__ = ["LipschitzGuards", "scale_by_lipschitz_rate"]
