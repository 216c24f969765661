"""A loss given in two parts, a model and a loss of its outputs.

In: the two functions. Out: one function that is called like any loss, and whose parts the
Gauss-Newton products and the true Fisher can take apart again.

The closed forms of output losses' Hessians are for losses that can't be differentiated twice, and
where positive semidefiniteness must be certain. They go in as the ``output_product``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optalr.arrays import wide_dtype


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


def squared_error_product(outputs: jax.Array, u: jax.Array, *, scale: Any = 1.0) -> jax.Array:
    """Return ``H_L u = scale · u``, the closed form for ``scale/2 · Σ (outputs − targets)²``.

    Choose it in the ``output_product`` of a ``composite_loss`` with squared errors, to save the
    differentiation of the loss.

    Args:
      outputs: the model's outputs, any shape.
      u: a direction of the same shape.
      scale: the factor of the loss, ``1/N`` for a mean over N examples; an array of weights must
        have the rank of ``outputs``.

    Returns:
      ``H_L u``, with the shape and the dtype of ``outputs``.

    Cost: one pass over the outputs.

    Examples:
      >>> import jax.numpy as jnp
      >>> squared_error_product(jnp.zeros(2), jnp.array([1.0, 2.0]), scale=0.5).tolist()
      [0.5, 1.0]
    """
    return (scale * u).astype(outputs.dtype)


def softmax_product(outputs: jax.Array, u: jax.Array, *, scale: Any = 1.0) -> jax.Array:
    """Return ``H_L u = scale · (θ∘u − θ ⟨θ, u⟩)``, ``θ = softmax(outputs)`` over the last axis.

    Choose it in the ``output_product`` of a ``composite_loss`` with the softmax cross-entropy
    ``−scale · Σ y·ln θ``, where the product must be certain to be positive semidefinite. It is the
    closed form for all targets that sum to one; for others ``scale`` takes the paper's ``s_j/n``.

    Args:
      outputs: class scores, ``(..., classes)``.
      u: a direction of the same shape.
      scale: the factor of the loss, ``1/N`` for a mean over N rows; an array of weights (a mask of
        padded positions, say) must have the rank of ``outputs``.

    Returns:
      ``H_L u``, with the shape and the dtype of ``outputs``.

    Cost: a few passes over the outputs.

    Examples:
      >>> import jax.numpy as jnp
      >>> softmax_product(jnp.zeros(2), jnp.array([1.0, 0.0])).tolist()
      [0.25, -0.25]

    Reference: "Exponentially decaying flows for optimization in deep learning", eq. 29.
    """
    # Probabilities of half-precision scores would sum to one only up to their rounding, and the
    # product would lose its null space.
    theta = jax.nn.softmax(outputs.astype(wide_dtype(outputs)), axis=-1)
    weighted = theta * u
    product = weighted - theta * jnp.sum(weighted, axis=-1, keepdims=True)
    return (scale * product).astype(outputs.dtype)


def sigmoid_product(outputs: jax.Array, u: jax.Array, *, scale: Any = 1.0) -> jax.Array:
    """Return ``H_L u = scale · σ(1−σ)∘u``, ``σ = sigmoid(outputs)``.

    Choose it in the ``output_product`` of a ``composite_loss`` with the sigmoid (binary)
    cross-entropy, where the product must be certain to be positive semidefinite. It is the closed
    form for all targets.

    Args:
      outputs: scores, any shape.
      u: a direction of the same shape.
      scale: the factor of the loss, ``1/N`` for a mean over N scores; an array of weights must have
        the rank of ``outputs``.

    Returns:
      ``H_L u``, with the shape and the dtype of ``outputs``.

    Cost: a few passes over the outputs.

    Examples:
      >>> import jax.numpy as jnp
      >>> sigmoid_product(jnp.zeros(2), jnp.array([1.0, 2.0])).tolist()
      [0.25, 0.5]
    """
    scores = outputs.astype(wide_dtype(outputs))
    # σ(−x) is 1 − σ(x) without the cancellation that large scores would suffer.
    return (scale * jax.nn.sigmoid(scores) * jax.nn.sigmoid(-scores) * u).astype(outputs.dtype)
