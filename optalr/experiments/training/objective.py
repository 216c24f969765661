"""What a task asks of a model's outputs: the loss, and what is reported beside it."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Problem(NamedTuple):
    """The loss of a task.

    Attributes:
      example_losses: ``(outputs, y)`` to one loss an example.
      example_scores: ``(outputs, y)`` to one score an example; the mean is reported.
      score_name: what the mean score is called.
    """

    example_losses: Callable[[jax.Array, jax.Array], jax.Array]
    example_scores: Callable[[jax.Array, jax.Array], jax.Array]
    score_name: str

    def loss(self, outputs: jax.Array, y: jax.Array) -> jax.Array:
        """Return the mean loss of a batch."""
        return jnp.mean(self.example_losses(outputs, y))

    def score(self, outputs: jax.Array, y: jax.Array) -> jax.Array:
        """Return the mean score of a batch."""
        return jnp.mean(self.example_scores(outputs, y))


def _cross_entropy(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), y)


def _hits(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return (jnp.argmax(outputs, axis=-1) == y).astype(jnp.float32)


def _per_sequence(function: Callable[[jax.Array, jax.Array], jax.Array]):
    return lambda outputs, y: jnp.mean(function(outputs, y), axis=-1)


def _squared_error(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((outputs - y) ** 2, axis=-1)


def _absolute_error(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.abs(outputs - y), axis=-1)


PROBLEMS: Mapping[str, Problem] = MappingProxyType(
    {
        "classification": Problem(_cross_entropy, _hits, "accuracy"),
        "language": Problem(_per_sequence(_cross_entropy), _per_sequence(_hits), "accuracy"),
        "regression": Problem(_squared_error, _absolute_error, "absolute_error"),
    }
)
