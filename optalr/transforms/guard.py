"""Any optax transformation, made to keep this library's promises on precision and faults."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_transformation
from optalr.arrays import all_finite, at_least_float32
from optalr.states import count_up, settle, settle_like
from optalr.transforms.shared.gradient_watch import GradientWatch, admit, start_gradient_watch
from optalr.transforms.shared.making import taking_extras, transformation


class GuardState(NamedTuple):
    """State of ``guard``."""

    failures: jax.Array  # () int32, gradients and updates that were not finite or out of proportion
    gradients: GradientWatch  # what is remembered of the gradients' lengths
    inner_state: Any  # the state of the guarded transformation, in float32 or wider


def guard(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run a transformation in float32, and keep broken gradients from it.

    Choose it around optax's rules where parameters are bfloat16 or float16, or where one bad batch
    must not end a run. (A decay of 0.999 is 1 in bfloat16, and an eps of 1e-8 is 0 in float16.)
    With ``g`` the gradient in float32 or wider, ``s`` the state, ``n = ‖g‖`` and ``m`` the largest
    norm of late (0.999 of it is kept from step to step),

        g ← g m / n  where n > 10 m,
        u, s ← inner(g, s)  where n² and u are finite,  else  u = 0

    Args:
      inner: any gradient transformation.

    Returns:
      A transformation whose updates have the dtypes they came in. A gradient whose squared norm is
      not finite gives a zero update and leaves the state. One that is more than ten times as long
      as any of late is shortened to those. Both count in ``failures``. A first gradient that is too
      long cannot be told. Where the scale has really changed, each gradient in a row lets the
      next be half as long again: after 12 one a thousand times as long is the usual one.

    Raises:
      TypeError: ``inner`` is not a gradient transformation.

    Cost: that of ``inner`` and two passes over the gradient. The state of ``inner`` is in float32,
      so it takes twice the memory where parameters are in half precision.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> tx = optalr.guard(optax.adam(0.1))
      >>> params = jnp.ones(2, jnp.bfloat16)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([jnp.nan, 1.0], jnp.bfloat16), state, params)
      >>> optax.apply_updates(params, updates).tolist(), int(optalr.metrics(state)["failures"])
      ([1.0, 1.0], 1)
    """
    check_transformation("inner", inner)
    inner = taking_extras(inner)

    def init_fn(params: Any) -> GuardState:
        inner_state = settle(inner.init(at_least_float32(params)))
        return GuardState(jnp.zeros((), jnp.int32), start_gradient_watch(), inner_state)

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        given = admit(at_least_float32(updates), state.gradients)
        wide_params = at_least_float32(params)
        # Zeros stand for a bad gradient, so no NaN arises inside; what comes of them is dropped.
        new, after = inner.update(given.updates, state.inner_state, wide_params, **extras)
        good = ~given.bad & all_finite(new)
        # optax lets dtypes drift (a float32 rate on bfloat16); a state may not.
        after = settle_like(after, state.inner_state)
        after = jax.tree.map(lambda x, old: jnp.where(good, x, old), after, state.inner_state)
        new = jax.tree.map(lambda u, g: jnp.where(good, u, 0).astype(g.dtype), new, updates)
        failures = count_up(state.failures, given.failed | ~good)
        return new, GuardState(failures, given.watch, after)

    return transformation("guard", init_fn, update_fn, holds=GuardState)
