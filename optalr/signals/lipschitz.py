"""Lipschitz constants of common losses with respect to the last layer's weights, and their rates.

In: the name of a loss, and activations or their norms. Out: the constant L, or the rate 1/L.

Yedida & Saha, "A novel adaptive learning rate scheduler for deep neural networks": the gradient is
largest in the last layer, where it is bounded by the norm of that layer's input times a factor that
the loss decides; the learning rate is one over that bound.

The values are those *at initialization*, where all classes are equally probable. They are no
maxima: the gradient of a confident wrong answer is up to twice (binary) or k/(k−1) times as large.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_choice, check_count, check_interval

LOSSES = ("softmax_cross_entropy", "binary_cross_entropy", "least_squares")
# What Keras, PyTorch and optax call them.
_OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "softmax": "softmax_cross_entropy",
        "cross_entropy": "softmax_cross_entropy",
        "categorical_crossentropy": "softmax_cross_entropy",
        "sigmoid": "binary_cross_entropy",
        "sigmoid_cross_entropy": "binary_cross_entropy",
        "binary_crossentropy": "binary_cross_entropy",
        "squared_error": "least_squares",
    }
)


class LipschitzRate(NamedTuple):
    """A learning rate and what it was computed from; float32 scalars.

    Attributes:
      learning_rate: η = 1/L.
      constant: L.
      activation_norm: K_z, the largest Frobenius norm of a minibatch of penultimate activations.
      weight_norm: max_l ‖W_l‖, the largest Frobenius norm of a weight.
    """

    learning_rate: jax.Array
    constant: jax.Array
    activation_norm: jax.Array
    weight_norm: jax.Array


def lipschitz_constant(
    loss: str,
    activation_norm: Any,
    batch_size: Any,
    *,
    num_classes: Any = None,
    output_norm: Any = None,
    target_norm: Any = None,
    weight_norm: Any = 0.0,
    weight_decay: Any = 0.0,
) -> jax.Array:
    """Compute the Lipschitz constant L of a loss from norms: the paper's arithmetic.

    Choose it if the norms are known already; ``lipschitz_rate`` takes arrays. In the paper's
    symbols, with m the batch size and k the number of classes:

        softmax cross-entropy   L = (k−1)/(k m) · K_z           eq. 20
        binary cross-entropy    L = K_z / (2m)                  eq. 15
        least squares           L = (K_a + ‖y‖) K_z / m         eq. 9, its sign corrected
        with L2 penalty         L + λ max_l ‖W_l‖               λ as in g + λw

    Args:
      loss: ``"softmax_cross_entropy"`` (the mean over the batch), ``"binary_cross_entropy"``
        (likewise) or ``"least_squares"`` (E = ‖a − y‖² / 2m; for a mean of squares without the
        half, L is twice as large).
      activation_norm: K_z, the largest Frobenius norm, over the minibatches of an epoch, of the
        penultimate activations a^[L−1] of a minibatch, an ``(m, d)`` matrix.
      batch_size: m, the examples of a minibatch (not of the data set).
      num_classes: k ≥ 2, for softmax cross-entropy.
      output_norm: K_a, the largest norm of a minibatch of outputs a^[L], for least squares.
      target_norm: ‖y‖, the norm of a minibatch of targets, for least squares.
      weight_norm: max_l ‖W_l‖, the largest Frobenius norm of a weight.
      weight_decay: λ ≥ 0.

    Returns:
      L, a float32 scalar. It is 1/η.

    Raises:
      ValueError: an argument is out of range, or one that the loss needs is missing.

    Cost: a few scalar operations.

    Examples:
      The paper's own numbers (CIFAR-10, batches of 128, λ = 1e-3).

      >>> import optalr
      >>> L = optalr.lipschitz_constant("softmax_cross_entropy", 206.695, 128, num_classes=10,
      ...                               weight_norm=43.257, weight_decay=1e-3)
      >>> round(float(1 / L), 3)
      0.668

    Reference: Yedida, Saha, "A novel adaptive learning rate scheduler for deep neural networks",
      eq. 9, 15, 20. Departure: eq. 8-9 have K_a − ‖y‖, which can make the rate negative; the
      triangle inequality gives the sum.
    """
    scale = lipschitz_scale(loss, num_classes)
    for name, value in (("weight_decay", weight_decay), ("weight_norm", weight_norm)):
        check_interval(name, value, 0.0)
    check_interval("batch_size", batch_size, 0.0, open_low=True)
    kind = jnp.float32
    bound = jnp.asarray(activation_norm, kind) * scale / jnp.asarray(batch_size, kind)
    if canonical_loss(loss) == "least_squares":
        for name, value in (("output_norm", output_norm), ("target_norm", target_norm)):
            if value is None:
                raise ValueError(f"{name} is needed for least squares: L = (K_a + ‖y‖) K_z / m.")
        bound = bound * (jnp.asarray(output_norm, kind) + jnp.asarray(target_norm, kind))
    return bound + jnp.asarray(weight_decay, kind) * jnp.asarray(weight_norm, kind)


def lipschitz_rate(
    loss: str,
    activations: Any,
    weights: Any = None,
    *,
    num_classes: Any = None,
    outputs: Any = None,
    targets: Any = None,
    weight_decay: Any = 0.0,
) -> LipschitzRate:
    """Compute the learning rate 1/L of a loss for given activations and weights.

    Choose it to look at a rate by hand, or to compute one for a training loop of your own;
    ``scale_by_lipschitz_rate`` does the same during training. The formulas are those of
    ``lipschitz_constant``.

    Args:
      loss: as in ``lipschitz_constant``.
      activations: a^[L−1], the inputs of the last layer: an array ``(m, ...)`` for one minibatch,
        or a list of these for several, of which the largest Frobenius norm is K_z.
      weights: W_l, a pytree; its leaves of two or more axes are the weights. Needed with
        ``weight_decay``.
      num_classes: k, for softmax cross-entropy.
      outputs: a^[L], for least squares; a list where ``activations`` is one.
      targets: y, for least squares; a list where ``activations`` is one.
      weight_decay: λ ≥ 0.

    Returns:
      ``LipschitzRate(learning_rate, constant, activation_norm, weight_norm)``.

    Raises:
      ValueError: an argument is out of range or missing, or the minibatches differ in size.

    Cost: one pass over the arrays.

    Examples:
      >>> import jax.numpy as jnp, optalr
      >>> found = optalr.lipschitz_rate("binary_cross_entropy", jnp.ones((8, 2)))
      >>> float(found.activation_norm), float(found.learning_rate)  # K_z = 4, η = 2m / K_z
      (4.0, 4.0)

    Reference: as ``lipschitz_constant``.
    """
    # Only a decay that is plainly zero needs no weights: a traced one has no value to compare.
    if weights is None and not (isinstance(weight_decay, int | float) and weight_decay == 0):
        raise ValueError("weights is needed with weight_decay: L has the term λ max‖W‖.")
    # L divides by the batch size, so a smaller last batch has another constant of its own.
    batches = _as_list(activations)
    sizes = {batch.shape[0] for batch in batches}
    if len(sizes) != 1:
        raise ValueError(
            f"activations must be minibatches of one size, got sizes {sorted(sizes)}. Leave out "
            "the last, smaller one."
        )
    norms = {}
    for name, value in (("output_norm", outputs), ("target_norm", targets)):
        if value is not None:
            norms[name] = _largest_norm(_as_list(value))
    K_z = _largest_norm(batches)
    max_W = jnp.zeros((), jnp.float32) if weights is None else largest_weight_norm(weights)
    constant = lipschitz_constant(
        loss,
        K_z,
        sizes.pop(),
        num_classes=num_classes,
        weight_norm=max_W,
        weight_decay=weight_decay,
        **norms,
    )
    return LipschitzRate(1 / constant, constant, K_z, max_W)


def canonical_loss(loss: str) -> str:
    """Return the loss's name in ``LOSSES``, refusing others."""
    name = _OTHER_NAMES.get(loss, loss) if isinstance(loss, str) else loss
    check_choice("loss", name, LOSSES)
    return name


def lipschitz_scale(loss: str, num_classes: Any) -> float | jax.Array:
    """Return the factor of ``K_z / m`` in L: (k−1)/k, 1/2, or 1 for least squares."""
    name = canonical_loss(loss)
    if name != "softmax_cross_entropy":
        return 0.5 if name == "binary_cross_entropy" else 1.0
    if num_classes is None:
        raise ValueError("num_classes is needed for softmax cross-entropy: L = (k−1)/(km) K_z.")
    check_count("num_classes", num_classes, 2, remedy="One output is a binary_cross_entropy.")
    return (num_classes - 1) / num_classes


def largest_weight_norm(weights: Any) -> jax.Array:
    """Return max_l ‖W_l‖_F over the leaves of two or more axes (of all, if there are none)."""
    # The paper's W_l are the weight matrices; biases and norm scales have one axis.
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(weights)]
    return _largest_norm([leaf for leaf in leaves if leaf.ndim >= 2] or leaves)


def _largest_norm(arrays: list[Any]) -> jax.Array:
    # Squares of half-precision activations overflow (float16) or round (bfloat16) in their dtype.
    norms = [jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)))) for x in arrays]
    return jnp.max(jnp.stack(norms))


def _as_list(arrays: Any) -> list[jax.Array]:
    return (
        [jnp.asarray(x) for x in arrays]
        if isinstance(arrays, list | tuple)
        else [jnp.asarray(arrays)]
    )
