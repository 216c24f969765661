"""What a loss reveals on the way to its gradient: layer signals and curvature products."""

from optalr.signals.coverage import coverage
from optalr.signals.extras import composite_loss, value_grad_and_extras
from optalr.signals.moments import Coverage, LayerMoments, LeafView

__all__ = [
    "Coverage",
    "LayerMoments",
    "LeafView",
    "composite_loss",
    "coverage",
    "value_grad_and_extras",
]
