"""The accelerated flow of vanishing friction, ``ẅ + (α/t) ẇ = −v``, as Nesterov's scheme.

Su, Boyd & Candès, "A differential equation for modeling Nesterov's accelerated gradient method",
2014; "W2" of "Exponentially decaying flows for optimization in deep learning", eq. 25.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_interval
from optalr.arrays import all_finite, wide_dtype
from optalr.states import count_up


class NesterovFlowState(NamedTuple):
    """State of ``accelerate_by_nesterov_flow``.

    Attributes:
      count: int32 scalar, updates taken so far, which leaves out those that were dropped.
      failures: int32 scalar, updates that were not finite and left velocity and count as they were.
      velocity: like the parameters, float32 or wider: ``w_k − w_{k−1}``.
    """

    count: jax.Array
    failures: jax.Array
    velocity: Any


def accelerate_by_nesterov_flow(
    friction: float = 3.0,
) -> optax.GradientTransformationExtraArgs:
    """Accelerate finished updates by Nesterov's scheme with friction ``α/t``.

    Choose it as the last link of a chain for full-batch or low-noise training, where the vanishing
    friction pays; mini-batches want constant momentum (``optax.trace``) or a decayed rate. The
    parameters that the loop holds are the ``y_k`` of the scheme

        w_k = y_{k−1} + u_k        y_k = w_k + (k−1)/(k+α−1) (w_k − w_{k−1})

    where ``u_k = −η v(y_{k−1})`` is the update that arrives; the first one passes unchanged.
    One that is not finite is dropped, and the scheme goes on as if it had not arrived. A velocity
    that rests goes on as it is: under ``two_stage``, a phase set back to 0 resumes the old one.

    Args:
      friction: α, greater than 0; the theory wants at least 3.

    Returns:
      A transformation of updates with the learning rate already applied.

    Raises:
      ValueError: ``friction`` is out of range.

    Cost: two multiply-adds an element; memory of the parameters once.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = accelerate_by_nesterov_flow(3.0)
      >>> w = jnp.zeros(1)
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.ones(1), state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> float(w[0])  # y_1 = 1, w_2 = 2, y_2 = 2 + 1/4 (2 − 1)
      2.25

    Reference:
      Su, Boyd & Candès 2014, eq. 1 and 3.
    """
    check_interval("friction", friction, 0.0, open_low=True, open_high=True)

    def weight(k: jax.Array) -> jax.Array:
        k = jnp.maximum(k, 1).astype(jnp.float32)
        return (k - 1) / (k + jnp.asarray(friction, jnp.float32) - 1)

    def init_fn(params: Any) -> NesterovFlowState:
        def zeros(p: Any) -> jax.Array:
            return jnp.zeros(jnp.shape(p), wide_dtype(p))

        velocity = jax.tree.map(zeros, params)
        zero = jnp.zeros((), jnp.int32)
        return NesterovFlowState(zero, zero, velocity)

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        del params, extras
        before, now = weight(state.count), weight(state.count + 1)
        finite = all_finite(updates)
        velocity = jax.tree.map(
            lambda m, u: jnp.where(finite, before * m + u.astype(m.dtype), m),
            state.velocity,
            updates,
        )
        moved = jax.tree.map(
            lambda u, m: jnp.where(finite, u.astype(m.dtype) + now * m, 0.0).astype(u.dtype),
            updates,
            velocity,
        )
        failures = state.failures + (~finite).astype(jnp.int32)
        count = jnp.where(finite, count_up(state.count), state.count)
        return moved, NesterovFlowState(count, failures, velocity)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
