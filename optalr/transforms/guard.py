"""Any optax transformation, made to keep this library's promises on precision and faults."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arrays import all_finite, at_least_float32
from optalr.states import count_up, settle, settle_like, update_when
from optalr.transforms.shared.making import transformation


class GuardState(NamedTuple):
    """State of ``guard``."""

    failures: jax.Array  # () int32, gradients that were not finite
    inner_state: Any  # the state of the guarded transformation, in float32 or wider


def guard(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run a transformation in float32, and not at all on a gradient that is not finite.

    Choose it around optax's rules where parameters are bfloat16 or float16, or where one bad batch
    must not end a run. (A decay of 0.999 is 1 in bfloat16, and an eps of 1e-8 is 0 in float16.)
    With ``g`` the gradient in float32 or wider and ``s`` the state,

        u, s ← inner(g, s)    where g is finite,    else    u = 0

    Args:
      inner: any gradient transformation.

    Returns:
      A transformation whose updates have the dtypes they came in. A gradient that is not finite
      gives a zero update, leaves the state and is counted in ``failures``.

    Raises:
      TypeError: ``inner`` is not a gradient transformation.

    Cost: that of ``inner`` and one pass over the gradient. The state of ``inner`` is in float32, so
      it takes twice the memory where parameters are in half precision.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> tx = optalr.guard(optax.adam(0.1))
      >>> params = jnp.ones(2, jnp.bfloat16)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([jnp.nan, 1.0], jnp.bfloat16), state, params)
      >>> optax.apply_updates(params, updates).tolist(), int(optalr.metrics(state)["failures"])
      ([1.0, 1.0], 1)
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optax.GradientTransformation, got {inner!r}.")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> GuardState:
        return GuardState(jnp.zeros((), jnp.int32), settle(inner.init(at_least_float32(params))))

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        usable = all_finite(updates)

        def run(carry: Any, inputs: Any) -> Any:
            wide, inner_state = carry
            # optax lets dtypes drift (a float32 rate on bfloat16); a loop's carry may not.
            new_updates, new_state = inner.update(wide, inner_state, inputs[0], **inputs[1])
            return settle_like(new_updates, wide), settle_like(new_state, inner_state)

        # A bad gradient does not run inner at all. So no NaN arises inside it, and a donated state
        # stays where it is.
        inputs = (at_least_float32(params), extras)
        carry = (at_least_float32(updates), state.inner_state)
        new_updates, inner_state = update_when(usable, run, carry, inputs)
        new_updates = jax.tree.map(
            lambda new, old: jnp.where(usable, new, 0).astype(old.dtype), new_updates, updates
        )
        failures = jnp.where(usable, state.failures, count_up(state.failures))
        return new_updates, GuardState(failures, inner_state)

    return transformation("guard", init_fn, update_fn, keeps_leaves=False)
