"""What a task asks of a model's outputs: the loss, and what is reported beside it."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# ``(outputs, y)`` to one number per example.
Measure = Callable[[jax.Array, jax.Array], jax.Array]


class Objective(NamedTuple):
    """The loss of a task and the score that is reported beside it.

    Attributes:
      example_losses: ``(outputs, y)`` to one loss per example.
      example_scores: ``(outputs, y)`` to one score per example; the mean is reported.
      score_name: what the mean score is called.
    """

    example_losses: Measure
    example_scores: Measure
    score_name: str

    def loss(self, outputs: jax.Array, y: jax.Array) -> jax.Array:
        """Return the mean loss of a batch."""
        return jnp.mean(self.example_losses(outputs, y))

    def score(self, outputs: jax.Array, y: jax.Array) -> jax.Array:
        """Return the mean score of a batch."""
        return jnp.mean(self.example_scores(outputs, y))


def score_name_in(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the score's name in the metrics of a run whose task is not known."""
    names = [objective.score_name for objective in OBJECTIVES.values()]
    return next((name for name in names if rows and name in rows[0]), names[0])


def _cross_entropy(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), y)


def _hits(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return (jnp.argmax(outputs, axis=-1) == y).astype(jnp.float32)


def _per_sequence(function: Measure) -> Measure:
    """Return the mean of ``function`` over the symbols of each sequence."""
    return lambda outputs, y: jnp.mean(function(outputs, y), axis=-1)


def _squared_error(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((outputs - y) ** 2, axis=-1)


def _absolute_error(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.abs(outputs - y), axis=-1)


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "classification": Objective(_cross_entropy, _hits, "accuracy"),
        "language": Objective(_per_sequence(_cross_entropy), _per_sequence(_hits), "accuracy"),
        "regression": Objective(_squared_error, _absolute_error, "absolute_error"),
    }
)
