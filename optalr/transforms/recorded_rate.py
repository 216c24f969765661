"""A learning rate, a number or a schedule, that can be read in the state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_interval
from optalr.states import count_up
from optalr.transforms.shared.lengths import follow, value_at
from optalr.transforms.shared.making import transformation

# A learning rate: a number, or a schedule of the updates so far.
Rate = float | Callable[[jax.Array], Any]


class RecordedRateState(NamedTuple):
    """State of ``scale_by_recorded_rate``; every field changes at every update."""

    count: jax.Array  # () int32, updates so far
    learning_rate: jax.Array  # () float32, the rate applied last; before, the first one


def scale_by_recorded_rate(
    learning_rate: Rate,
) -> optax.GradientTransformationExtraArgs:
    """Multiply by minus the learning rate, and keep the rate where it can be read.

    Choose it as the last link of a chain instead of ``optax.scale_by_learning_rate``. That one
    hides the rate in a closure, and turns bfloat16 updates into float32 ones where the rate is an
    array. The update is ``u ← −η u``, computed in float32 or wider and returned in the dtype it
    came in.

    Args:
      learning_rate: η ≥ 0, a number or a schedule, which is a function of the updates so far.

    Returns:
      A transformation whose state holds ``learning_rate``.

    Raises:
      ValueError: ``learning_rate`` is negative.

    Cost: one multiplication for each number of the update.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> rate = optalr.scale_by_recorded_rate(lambda step: 0.5 / (1 + step))
      >>> tx = optax.chain(optax.trace(0.9), rate)
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state)
      >>> optax.apply_updates(params, updates).tolist()
      [0.5, 0.5]
      >>> float(optalr.metrics(state)["learning_rate"])
      0.5
    """
    check_interval("learning_rate", learning_rate, 0.0, remedy="The sign is flipped for you.")

    def rate_at(count: jax.Array) -> jax.Array:
        return jnp.asarray(value_at(learning_rate, count)).astype(jnp.float32)

    def init_fn(params: Any) -> RecordedRateState:
        del params
        count = jnp.zeros((), jnp.int32)
        # A copy: an injected rate would share its buffer with the state, which may be donated.
        return RecordedRateState(count, jnp.array(rate_at(count)))

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        del params, extras
        rate = rate_at(state.count)
        return follow(updates, rate), RecordedRateState(count_up(state.count), rate)

    return transformation("scale_by_recorded_rate", init_fn, update_fn, holds=RecordedRateState)
