"""AMSGrad's direction as Reddi, Kale & Kumar print it: no bias correction, no ε."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_interval
from optalr.arrays import moving_average, wide_dtype
from optalr.transforms.shared.making import transformation


class AmsgradState(NamedTuple):
    """State of ``scale_by_published_amsgrad``; trees like the parameters, float32 or wider."""

    moment: Any  # m_t
    second_moment: Any  # v_t
    largest: Any  # v̂_t, the largest v so far, entry by entry


def scale_by_published_amsgrad(
    b1: Any = 0.9, b2: Any = 0.999
) -> optax.GradientTransformationExtraArgs:
    """Divide the first moment by the root of the largest second moment so far.

    Choose it through ``optalr.paper.amsgrad``.
    """
    check_interval("b1", b1, 0.0, 1.0, open_high=True)
    check_interval("b2", b2, 0.0, 1.0, open_high=True)

    def init_fn(params: Any) -> AmsgradState:
        def zeros() -> Any:  # buffers of their own, so that states can be donated
            return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p)), params)

        return AmsgradState(zeros(), zeros(), zeros())

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        del params, extras

        def first(m: jax.Array, g: jax.Array) -> jax.Array:
            return moving_average(m, g, b1)

        def second(v: jax.Array, g: jax.Array) -> jax.Array:
            return moving_average(v, jnp.square(g.astype(v.dtype)), b2)

        moment = jax.tree.map(first, state.moment, updates)
        second_moment = jax.tree.map(second, state.second_moment, updates)
        largest = jax.tree.map(jnp.maximum, state.largest, second_moment)
        new = jax.tree.map(_quotient, moment, largest, updates)
        return new, AmsgradState(moment, second_moment, largest)

    return transformation("paper.amsgrad", init_fn, update_fn)


def _quotient(moment: jax.Array, largest: jax.Array, like: jax.Array) -> jax.Array:
    """Return ``m/√v̂``, and 0 for 0/0: a weight whose gradients were all zero stays."""
    root = jnp.sqrt(jnp.where(largest == 0, 1, largest))
    return jnp.where(largest == 0, 0, moment / root).astype(like.dtype)
