"""The true Fisher: signals of targets drawn from the model's own predictions.

In: a tapped model, the likelihood of its outputs, and a key. Out: what each slot gathered.

The empirical Fisher squares the gradients of the targets in the batch. The true one squares those
of targets drawn from the predictive distribution, which takes a backward pass of its own:

    y ~ p(y | f(x)),    β = ∂(−ln p(y | f)) / ∂s

For the three likelihoods here the gradient at the outputs is prediction minus sample.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax

from optalr.signals.tapping.capture import Tapped
from optalr.signals.tapping.measuring import Dummies


def _softmax(outputs: jax.Array, key: jax.Array) -> jax.Array:
    """Return ``softmax(f) − onehot(y)`` for a class y drawn for each row of class scores."""
    classes = jax.random.categorical(key, outputs)
    return jax.nn.softmax(outputs) - jax.nn.one_hot(classes, outputs.shape[-1], dtype=outputs.dtype)


def _bernoulli(outputs: jax.Array, key: jax.Array) -> jax.Array:
    """Return ``sigmoid(f) − y`` for independent y drawn for each logit."""
    mean = jax.nn.sigmoid(outputs)
    return mean - jax.random.bernoulli(key, mean).astype(outputs.dtype)


def _gaussian(outputs: jax.Array, key: jax.Array) -> jax.Array:
    """Return ``f − y`` for ``y ~ N(f, I)``: minus a standard normal."""
    return -jax.random.normal(key, outputs.shape, outputs.dtype)


# By name: outputs and a key in, the gradient of −ln p(y | f) at the outputs out.
LIKELIHOODS: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = MappingProxyType(
    {"softmax": _softmax, "bernoulli": _bernoulli, "gaussian": _gaussian}
)


def draw_and_measure(tapped: Tapped, likelihood: str, key: jax.Array) -> dict[int, Dummies]:
    """Return what each slot gathered of the signals of sampled targets.

    A loss is taken to be the mean over all axes of the outputs but the last, and a sum over the
    last (classes, or components of the target).

    Args:
      tapped: the model, from parameters to outputs.
      likelihood: one of ``LIKELIHOODS``.
      key: draws the targets.
    """
    slots = tapped.zero_slots()
    if tapped.is_off:
        return slots
    # With the leaves held fixed the pull-back computes no gradient: only the slots are filled.
    outputs, pull_back = jax.vjp(lambda slots: tapped(tapped.traced.leaves, slots), slots)
    # Outputs of several heads are independent given the model: each draws with a key of its own.
    keys = jax.random.split(key, len(outputs))
    cotangents = [
        LIKELIHOODS[likelihood](output, key) / _num_predictions(output)
        for output, key in zip(outputs, keys, strict=True)
    ]
    (sums,) = pull_back(cotangents)
    return sums


def _num_predictions(output: jax.Array) -> int:
    # The gradient of a mean over this many rows. A vector of outputs is a row an entry: there is no
    # last axis left to sum over.
    return output.size // output.shape[-1] if output.ndim > 1 else max(output.size, 1)
