"""The accelerated flow of vanishing friction, ``ẅ + (α/t) ẇ = −v``, as Nesterov's scheme.

Su, Boyd & Candès, "A differential equation for modeling Nesterov's accelerated gradient method",
2014; "W2" of "Exponentially decaying flows for optimization in deep learning", eq. 25.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_interval
from optalr.arrays import wide_dtype
from optalr.states import count_up
from optalr.transforms.shared.gradient_watch import GradientWatch, admit, start_gradient_watch
from optalr.transforms.shared.making import transformation


class NesterovFlowState(NamedTuple):
    """State of ``accelerate_by_nesterov_flow``."""

    count: jax.Array  # () int32, updates taken so far; those that were dropped do not count
    failures: jax.Array  # () int32, updates that were not finite (dropped) or too long (shortened)
    velocity: Any  # like the parameters, float32 or wider: w_k − w_{k−1}
    gradients: GradientWatch  # what is remembered of the updates' lengths


def accelerate_by_nesterov_flow(friction: float = 3.0) -> optax.GradientTransformationExtraArgs:
    """Accelerate finished updates by Nesterov's scheme with friction ``α/t``.

    Choose it as the last link of a chain for full-batch or low-noise training, where the vanishing
    friction pays; mini-batches want constant momentum (``optax.trace``) or a decayed rate. The
    parameters that the loop holds are the ``y_k`` of the scheme

        w_k = y_{k−1} + u_k        y_k = w_k + (k−1)/(k+α−1) (w_k − w_{k−1})

    where ``u_k = −η v(y_{k−1})`` is the update that arrives; the first one passes unchanged. An
    update that is not finite is dropped, and the scheme goes on as if it had not arrived. A
    velocity that has rested is not reset: where ``two_stage`` goes back to a stage with this link,
    the scheme resumes with its old velocity.

    Args:
      friction: α > 0; the theory wants at least 3.

    Returns:
      A transformation of updates to which the learning rate has been applied.

    Raises:
      ValueError: ``friction`` is out of range.

    Cost: two multiply-adds for each number; the memory of the parameters once.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> tx = optalr.accelerate_by_nesterov_flow(3.0)
      >>> w = jnp.zeros(1)
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.ones(1), state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> float(w[0])  # y_1 = 1, w_2 = 2, y_2 = 2 + 1/4 (2 − 1)
      2.25

    Reference: Su, Boyd & Candès, "A differential equation for modeling Nesterov's accelerated
      gradient method", 2014, eq. 1 and 3. Dropping what is not finite,
      and shortening what is out of proportion, is ours.
    """
    check_interval("friction", friction, 0.0, open_low=True, open_high=True)

    def weight(k: jax.Array) -> jax.Array:
        """Return (k−1)/(k+α−1), the share of the velocity that the k-th update adds."""
        k = jnp.maximum(k, 1).astype(jnp.float32)
        return (k - 1) / (k + jnp.asarray(friction, jnp.float32) - 1)

    def init_fn(params: Any) -> NesterovFlowState:
        def zeros(p: Any) -> jax.Array:
            return jnp.zeros_like(p, dtype=wide_dtype(p))

        velocity = jax.tree.map(zeros, params)
        count, failures = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return NesterovFlowState(count, failures, velocity, start_gradient_watch())

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        del params, extras
        before, now = weight(state.count), weight(count_up(state.count))
        given = admit(updates, state.gradients, squares=False)
        updates, finite = given.updates, ~given.bad

        # w_k − w_{k−1} = u_k + (y_{k−1} − w_{k−1}), and the bracket was added by the last update.
        def next_velocity(m: jax.Array, u: jax.Array) -> jax.Array:
            return jnp.where(finite, before * m + u.astype(m.dtype), m)

        def moved(u: jax.Array, m: jax.Array) -> jax.Array:
            return jnp.where(finite, u.astype(m.dtype) + now * m, 0.0).astype(u.dtype)

        velocity = jax.tree.map(next_velocity, state.velocity, updates)
        failures = count_up(state.failures, given.failed)
        count = jnp.where(finite, count_up(state.count), state.count)
        new_state = NesterovFlowState(count, failures, velocity, given.watch)
        return jax.tree.map(moved, updates, velocity), new_state

    return transformation("accelerate_by_nesterov_flow", init_fn, update_fn)
