"""The method in one sentence: scale each number by the root of its mean square.

What a reader should know before the code: the idea, the paper, the equations, and where this file
departs from them. Symbols here are the symbols of the code.

    v ← decay·v + (1 − decay) g²,    u = g / √(v/(1 − decay^t) + λ)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_interval
from optalr.arrays import all_finite, wide_dtype
from optalr.states import count_up
from optalr.transforms.shared.making import transformation


class SkeletonState(NamedTuple):
    """State of ``scale_by_skeleton``.

    Attributes:
      damping: float32 scalar, λ as the last update applied it.
      failures: int32 scalar, updates whose gradient was not finite, or too large to be squared.
      weight: float32 scalar, the sum of the moving average's weights, ``1 − decay^t``.
      second_moments: structure of params, float32 (float64 for float64 params): v.
    """

    # optalr.metrics shows the fields that REPORTED of optalr/reading/metrics.py lists.
    damping: jax.Array
    failures: jax.Array
    weight: jax.Array
    second_moments: Any


def scale_by_skeleton(
    decay: float = 0.99, *, damping: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Scale each number of a gradient by the root of its mean square.

    Choose it where the numbers of a gradient differ in size by orders of magnitude. With ``g`` the
    gradient and all operations element by element,

        v ← decay·v + (1 − decay) g²,    u = g / √(v/(1 − decay^t) + λ).

    The learning rate comes after it in the chain.

    Args:
      decay: of the moving average, in [0, 1).
      damping: λ, > 0, in units of g².

    Returns:
      A transformation. A gradient that is not finite, or too large to be squared, gives a zero
      update, leaves the average as it is and is counted in ``failures``.

    Raises:
      ValueError: an argument lies outside its range.

    Cost: a few operations a number. Memory: four bytes a number.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from tests.skeleton import method as optalr
      >>> tx = optax.chain(optalr.scale_by_skeleton(), optax.scale(-0.5))
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([1e3, -1e-2]), state, params)  # badly scaled
      >>> params = optax.apply_updates(params, updates)
      >>> bool(jnp.allclose(params, jnp.array([-0.5, 0.5]), atol=1e-3))
      True

    Reference: Authors, "Title", year, equation. We correct the average for its start.
    """
    # Checks judge concrete numbers, and let tracers and schedules pass.
    check_interval("decay", decay, 0.0, 1.0, open_high=True)
    check_interval("damping", damping, 0.0, open_low=True, remedy="1e-8 is a good start.")

    def init_fn(params: Any) -> SkeletonState:
        # Final shapes and dtypes, and an array of its own for each field: states are donated.
        return SkeletonState(
            damping=jnp.asarray(damping, jnp.float32),
            failures=jnp.zeros((), jnp.int32),
            weight=jnp.zeros((), jnp.float32),
            second_moments=jax.tree.map(lambda p: jnp.zeros(p.shape, wide_dtype(p)), params),
        )

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        # What a method needs beyond the gradient it takes by
        # optalr.arguments.require_extra(extras, "value_fn", "scale_by_skeleton").
        del params, extras

        # Measure.
        weight = decay * state.weight + (1 - decay)
        moments = jax.tree.map(
            lambda g, v: _fold_in(g.astype(v.dtype), v, decay), updates, state.second_moments
        )
        # A number that is not finite would never leave the average again.
        usable = all_finite((updates, moments))

        # Refresh: what is kept, such as a root that is not taken at every update.
        state = SkeletonState(
            damping=jnp.asarray(damping, jnp.float32),
            failures=jnp.where(usable, state.failures, count_up(state.failures)),
            weight=jnp.where(usable, weight, state.weight).astype(jnp.float32),
            second_moments=jax.tree.map(
                lambda new, old: jnp.where(usable, new, old), moments, state.second_moments
            ),
        )

        # Apply.
        def scaled(g: jax.Array, v: jax.Array) -> jax.Array:
            direction = _apply(g.astype(v.dtype), v, state.weight, state.damping)
            return jnp.where(usable, direction, 0).astype(g.dtype)

        return jax.tree.map(scaled, updates, state.second_moments), state

    return transformation("scale_by_skeleton", init_fn, update_fn)


def _fold_in(grad: jax.Array, moment: jax.Array, decay: Any) -> jax.Array:
    """Return the moving average with one more gradient in it, in the average's dtype."""
    return (decay * moment + (1 - decay) * jnp.square(grad)).astype(moment.dtype)


def _apply(grad: jax.Array, moment: jax.Array, weight: jax.Array, damping: jax.Array) -> jax.Array:
    """Return ``g / √(v/weight + λ)``; before the first gradient the weight is 0, and so is v."""
    mean_square = moment / jnp.where(weight > 0, weight, 1).astype(moment.dtype)
    return grad / jnp.sqrt(mean_square + damping.astype(moment.dtype))
