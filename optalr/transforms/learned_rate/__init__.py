"""Learning the learning rate from the loss along the step."""

from optalr.transforms.learned_rate.transform import (
    RateSafeguards,
    SuccessiveGradients,
    scale_by_learned_rate,
)

__all__ = ["RateSafeguards", "SuccessiveGradients", "scale_by_learned_rate"]
