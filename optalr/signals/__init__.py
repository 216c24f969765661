"""What a loss reveals on the way to its gradient: layer signals and curvature products."""

from optalr.signals.coverage import coverage
from optalr.signals.curvature.preconditioner import kronecker_preconditioner
from optalr.signals.curvature.products import (
    sigmoid_product,
    softmax_product,
    squared_error_product,
)
from optalr.signals.extras import value_grad_and_extras
from optalr.signals.full_batch import curvature_products, full_batch
from optalr.signals.loss.composite import composite_loss
from optalr.signals.moments import Coverage, LayerMoments, LeafView
from optalr.signals.tracing.sites.hand import tap_layer

__all__ = [
    "Coverage",
    "LayerMoments",
    "LeafView",
    "composite_loss",
    "coverage",
    "curvature_products",
    "full_batch",
    "kronecker_preconditioner",
    "sigmoid_product",
    "softmax_product",
    "squared_error_product",
    "tap_layer",
    "value_grad_and_extras",
]
