"""A loss given in two parts, a model and a loss of its outputs.

In: the two functions. Out: one function that is called like any loss, and whose parts the
Gauss-Newton products and the true Fisher can take apart again.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class CompositeLoss:
    """A loss given in two parts; see ``composite_loss``."""

    # A dataclass rather than a closure: equal losses compare equal, and jit does not retrace.
    predict_fn: Callable[..., Any]
    output_loss: Callable[..., jax.Array]
    has_aux: bool = False
    output_product: Callable[..., Any] | None = None

    def __call__(self, params: Any, *args: Any) -> Any:
        """Return the loss, or ``(loss, aux)``."""
        if self.has_aux:
            outputs, aux = self.predict_fn(params, *args)
            return self.output_loss(outputs, *args), aux
        return self.output_loss(self.predict_fn(params, *args), *args)


def composite_loss(
    predict_fn: Callable[..., Any],
    output_loss: Callable[..., jax.Array],
    *,
    has_aux: bool = False,
    output_product: Callable[..., Any] | None = None,
) -> CompositeLoss:
    """Join a model and a loss of its outputs, so that Gauss-Newton products are defined.

    Choose it when a method reads ``extras["gauss_newton"]`` or ``extras["outputs"]`` (``edf``), or
    for the true Fisher. Everything else works with a plain loss function as well.

    Args:
      predict_fn: ``predict_fn(params, *args) -> outputs``; with ``has_aux`` ``(outputs, aux)``,
        where aux is, for example, the new batch statistics.
      output_loss: ``output_loss(outputs, *args) -> scalar``, the mean over the batch.
      has_aux: whether ``predict_fn`` returns aux. Pass ``has_aux=True`` to
        ``value_grad_and_extras`` too.
      output_product: ``output_product(outputs, u, *args) -> H_L u``, the product with the Hessian
        of ``output_loss`` in the outputs, used in ``gauss_newton`` instead of differentiating
        ``output_loss`` twice: for an output loss whose second derivative does not exist or is not
        certain to be positive semidefinite. ``softmax_product``, ``sigmoid_product`` and
        ``squared_error_product`` are closed forms; give them the ``scale`` of the mean.

    Returns:
      A callable loss, ``loss(params, *args)``.

    Cost: none; the parts are called one after the other.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss = composite_loss(lambda w, x, y: x @ w, lambda z, x, y: jnp.mean((z - y) ** 2))
      >>> float(loss(jnp.zeros((2, 1)), jnp.ones((3, 2)), jnp.ones((3, 1))))
      1.0

      With a closed form of the output loss's Hessian:

      >>> from optalr import squared_error_product
      >>> def closed_form(z, u, x, y):
      ...     return squared_error_product(z, u, scale=2 / z.size)
      >>> loss = composite_loss(
      ...     lambda w, x, y: x @ w,
      ...     lambda z, x, y: jnp.mean((z - y) ** 2),
      ...     output_product=closed_form,
      ... )

    Reference: the split is that of Schraudolph, "Fast curvature matrix-vector products for
      second-order gradient descent", Neural Computation 14(7), 2002.
    """
    return CompositeLoss(predict_fn, output_loss, has_aux, output_product)
