"""The true Fisher: signals of targets drawn from the model's own predictions.

The empirical Fisher squares the gradients of the targets in the batch. The true one squares those
of targets drawn from the predictive distribution, which takes a backward pass of its own:

    y ~ p(y | f(x)),    β = ∂(−ln p(y | f)) / ∂s

For the three likelihoods here the gradient at the outputs is prediction minus sample.
"""

from collections.abc import Callable
from typing import Any

import jax

from optalr.signals.problem import Problem, Traced, trace_predictions
from optalr.signals.tapping.capture import evaluate_tapped, zero_slots
from optalr.signals.tapping.measuring import Dummies
from optalr.signals.tracing.layers import find_layers
from optalr.signals.tracing.plan import Layers
from optalr.signals.tracing.sampling import Sampling


def softmax(outputs: jax.Array, key: jax.Array) -> jax.Array:
    """Return ``softmax(f) − onehot(y)`` for a class y drawn for each row of logits."""
    classes = jax.random.categorical(key, outputs)
    return jax.nn.softmax(outputs) - jax.nn.one_hot(classes, outputs.shape[-1], dtype=outputs.dtype)


def bernoulli(outputs: jax.Array, key: jax.Array) -> jax.Array:
    """Return ``sigmoid(f) − y`` for independent y drawn for each logit."""
    mean = jax.nn.sigmoid(outputs)
    return mean - jax.random.bernoulli(key, mean).astype(outputs.dtype)


def gaussian(outputs: jax.Array, key: jax.Array) -> jax.Array:
    """Return ``f − y`` for ``y ~ N(f, I)``: minus a standard normal."""
    return -jax.random.normal(key, outputs.shape, outputs.dtype)


LIKELIHOODS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "softmax": softmax,
    "bernoulli": bernoulli,
    "gaussian": gaussian,
}


def sampled_sums(
    problem: Problem, params: Any, likelihood: str, key: jax.Array, flag: Any, sampling: Sampling
) -> tuple[Traced, Layers, dict[Any, Dummies]]:
    """Return the model's layers and the sums of signals of sampled targets.

    A loss is taken to be the mean over all axes of the outputs but the last, and a sum over the
    last (classes, or components of the target).
    """
    traced = trace_predictions(problem, params)
    layers = find_layers(traced.closed, traced.leaf_shapes)
    slots = zero_slots(traced, layers, flag)
    if flag is False or not slots:
        return traced, layers, slots

    def predict(slots):
        return evaluate_tapped(traced, layers, traced.leaves, slots, flag, sampling)

    outputs, pull_back = jax.vjp(predict, slots)
    keys = jax.random.split(key, len(outputs))
    cotangents = [
        LIKELIHOODS[likelihood](output, key) / _num_predictions(output)
        for output, key in zip(outputs, keys, strict=True)
    ]
    (sums,) = pull_back(cotangents)
    return traced, layers, sums


def _num_predictions(output: jax.Array) -> int:
    return output.size // output.shape[-1] if output.ndim > 1 else max(output.size, 1)
