"""What a loss reveals on the way to its gradient: layer signals and curvature products."""

from optalr.signals.composite import (
    composite_loss,
    sigmoid_product,
    softmax_product,
    squared_error_product,
)
from optalr.signals.coverage import Coverage, coverage
from optalr.signals.extras import value_grad_and_extras
from optalr.signals.full_batch import curvature_products, full_batch
from optalr.signals.moments import LayerMoments, LeafView
from optalr.signals.preconditioner import kronecker_preconditioner
from optalr.signals.tracing.hand import tap_layer

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
