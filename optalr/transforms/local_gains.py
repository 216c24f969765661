"""One gain for every weight: larger while its gradient keeps its sign, smaller when it flips."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_interval
from optalr.arrays import wide_dtype
from optalr.states import count_up
from optalr.transforms.shared.gradient_watch import GradientWatch, admit, start_gradient_watch
from optalr.transforms.shared.making import transformation


class LocalGainsState(NamedTuple):
    """State of ``scale_by_local_gains``; the trees have the structure of the parameters."""

    # every update
    gains: Any  # float32 (float64 of such leaves), the gain of each weight
    signs: Any  # int8, the signs of the previous gradient; 0 before the first
    failures: jax.Array  # () int32, gradients that were not finite or out of proportion
    gradients: GradientWatch  # what is remembered of the gradients' lengths


def scale_by_local_gains(
    beta: float = 0.05, *, min_gain: float = 0.1, max_gain: float = 10.0
) -> optax.GradientTransformationExtraArgs:
    """Scale each weight's gradient by a gain that grows while its sign persists.

    Choose it with full or large batches, where a change of sign says something about the weight
    and not about the batch. With ``g`` the gradient, element by element,

        gain ← gain + β        where g·g_previous > 0
        gain ← gain·(1 − β)    where g·g_previous < 0
        u = gain · g

    The gain stays where the product is zero, as it is in the first step. Gains start at 1. They
    grow by addition and shrink by a factor, so that large ones fall fast when a weight begins to
    oscillate. The learning rate comes after this transformation in the chain.

    Args:
      beta: β in [0, 1), what a gain grows by and the share that it loses.
      min_gain: lower bound of the gains, in [0, 1].
      max_gain: upper bound of the gains, at least 1; ``float("inf")`` for none.

    Returns:
      A transformation. A gradient that is not finite gives a zero update and leaves the gains as
      they are. One more than ten times as long as any of late is shortened to those. Both count in
      ``failures``.

    Raises:
      ValueError: an argument lies outside its range.

    Cost: a few operations per weight. Memory: five bytes per weight.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> tx = optax.chain(optalr.scale_by_local_gains(0.5), optax.sgd(1.0))
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for gradient in (jnp.array([1.0, 1.0]), jnp.array([1.0, -1.0])):
      ...     updates, state = tx.update(gradient, state)
      ...     params = optax.apply_updates(params, updates)
      >>> params.tolist()  # first −1 each; then −1.5 with the sign kept, +0.5 with the sign lost
      [-2.5, -0.5]

    Reference: Raschka, "Common Optimization Algorithms", STAT 479 lecture 12, 2019, after Jacobs,
      "Increased rates of convergence through learning rate adaptation", 1988. The bounds are ours.
    """
    check_interval("beta", beta, 0.0, 1.0, open_high=True)
    check_interval("min_gain", min_gain, 0.0, 1.0)
    check_interval("max_gain", max_gain, 1.0, remedy="Gains start at 1.")

    def init_fn(params: Any) -> LocalGainsState:
        return LocalGainsState(
            gains=jax.tree.map(lambda p: jnp.ones_like(p, dtype=wide_dtype(p)), params),
            signs=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.int8), params),
            failures=jnp.zeros((), jnp.int32),
            gradients=start_gradient_watch(),
        )

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        del params, extras
        given = admit(updates, state.gradients, squares=False)
        updates, usable = given.updates, ~given.bad

        def next_gain(g: jax.Array, gain: jax.Array, sign: jax.Array) -> jax.Array:
            # By signs, because the product of two tiny gradients underflows to zero.
            agreement = jnp.sign(g).astype(jnp.int8) * sign
            grown = jnp.where(agreement > 0, gain + beta, gain)
            moved = jnp.where(agreement < 0, gain * (1 - beta), grown)
            return jnp.where(usable, jnp.clip(moved, min_gain, max_gain), gain).astype(gain.dtype)

        def next_sign(g: jax.Array, sign: jax.Array) -> jax.Array:
            return jnp.where(usable, jnp.sign(g).astype(jnp.int8), sign)

        def scaled(g: jax.Array, gain: jax.Array) -> jax.Array:
            return jnp.where(usable, gain * g.astype(gain.dtype), 0).astype(g.dtype)

        gains = jax.tree.map(next_gain, updates, state.gains, state.signs)
        signs = jax.tree.map(next_sign, updates, state.signs)
        failures = count_up(state.failures, given.failed)
        new_state = LocalGainsState(gains, signs, failures, given.watch)
        return jax.tree.map(scaled, updates, gains), new_state

    return transformation("scale_by_local_gains", init_fn, update_fn)
