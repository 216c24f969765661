"""SWATS: Adam until its steps, projected on the gradient, give a steady rate; SGD from there on."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_interval, is_concrete
from optalr.arrays import wide_dtype
from optalr.clocks import chosen
from optalr.states import count_up
from optalr.transforms.shared.gradient_watch import GradientWatch, admit, start_gradient_watch
from optalr.transforms.shared.making import transformation


class SwatsState(NamedTuple):
    """State of ``swats``.

    Attributes:
      count: int32 scalar, k, updates so far in either phase.
      moment: structure of params, float32 or wider: Adam's first moment, its bias corrected; after
        the switch SGD's velocity v.
      second_moment: structure of params, float32 or wider: Adam's second moment, its bias
        corrected; unchanged after the switch.
      projected_rate: float32 scalar, λ_k/(1 − β₂ᵏ), the running mean of the projected rates.
      learning_rate: float32 scalar, the rate of the last update, Adam's or SGD's.
      phase: float32 scalar, the phase of the next update: 0 Adam, 1 SGD.
      steps_since_switch: int32 scalar, updates by SGD so far.
      failures: int32 scalar, gradients that were not finite or out of proportion.
      gradients: what is remembered of the gradients' lengths.
    """

    count: jax.Array
    moment: Any
    second_moment: Any
    projected_rate: jax.Array
    learning_rate: jax.Array
    phase: jax.Array
    steps_since_switch: jax.Array
    failures: jax.Array
    gradients: GradientWatch


def swats(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    tolerance: jax.typing.ArrayLike = 1e-9,
    second_scale: optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Begin with Adam and switch to SGD, at a step and a rate found from Adam's own steps.

    Choose it to have the generalization of SGD without tuning its rate or the switch point. With
    ``p_k`` Adam's step and ``p_kᵀg_k ≠ 0``,

        γ_k = p_kᵀp_k / (−p_kᵀg_k),    λ_k = β₂ λ_{k−1} + (1 − β₂) γ_k,

    and once ``|λ_k/(1 − β₂ᵏ) − γ_k| < tolerance`` at some ``k > 1``, with ``Λ = λ_k/(1 − β₂ᵏ)``,

        v ← β₁ v + g,    w ← w − (1 − β₁) Λ v,    v = 0 at first.

    Args:
      learning_rate: Adam's rate, at least 0, or a schedule of the step count.
      b1: β₁, in [0, 1); also SGD's momentum.
      b2: β₂, in (0, 1).
      eps: added to the root of the second moment, at least 0.
      tolerance: how close the rate must come to its mean, at least 0. Differences of a few units in
        the last place of float32 count as none.
      second_scale: a schedule that multiplies Λ; its step counts the updates since the switch (0 at
        the first). None for 1.

    Returns:
      A transformation. ``state.learning_rate`` is Λ (times the scale) after the switch. A gradient
      that is not finite gives a zero update and leaves the moments unchanged. One more than ten
      times as long as any of late is shortened to those. Both count in ``failures``.

    Raises:
      TypeError: ``second_scale`` is neither a schedule nor None.
      ValueError: an argument lies outside its range.

    Cost: Adam's and two inner products; after the switch that of SGD with momentum. Memory: two
      copies of the parameters in float32.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> tx = optalr.swats(0.1)
      >>> params = jnp.array([3.0, 4.0])
      >>> gradient = jnp.array([1.0, 3.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):  # for a constant gradient γ = 0.1 · 2 / (1 + 3) in every step
      ...     updates, state = tx.update(gradient, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(state.phase), round(float(state.projected_rate), 6)
      (1.0, 0.05)
      >>> updates, state = tx.update(gradient, state, params)
      >>> bool(jnp.allclose(updates, -(1 - 0.9) * 0.05 * gradient))
      True

    Reference: Keskar, Socher, "Improving Generalization Performance by Switching from Adam to SGD",
    2017, Algorithm 1, which ``optalr.paper.swats`` runs as it is printed. Our departures: what the
    paper does; what we do, and why: what it changes (digits, five seeds; docs/lecture.md):

    * one ε = 1e-9 for Adam's division and the test; ours ``eps`` 1e-8, as in Adam's paper, and
      ``tolerance`` 1e-9, which is not measured: test loss 0.0686 to the letter and 0.0686 for ours
      at a tolerance of 1e-5, no seed of which switched in 400 steps; ours at 1e-3 0.0842, with all
      five switched after 3 to 109 steps.
    * ε added to the root of the uncorrected second moment; ours to that of the corrected one, as in
      Adam's paper: not measured alone.
    * any difference of the rates counts; ours none of a few units in the last place, since
      rounding decides at 1e-9 in float32: not measured alone.
    * a switch to any rate; ours to no negative or infinite one, since SGD would climb: not
      measured.
    * moments and the mean rate corrected when they are used; ours kept corrected, since float32
      loses no digits then: nothing in exact arithmetic, not measured in float32.
    * no guard; ours drops or shortens a bad gradient, since one batch must not end a run: not
      measured.

    ``second_scale`` is ours too, and off by default.
    """
    check_interval("learning_rate", learning_rate, 0.0)
    check_interval("b1", b1, 0.0, 1.0, open_high=True)
    check_interval("b2", b2, 0.0, 1.0, open_low=True, open_high=True)
    check_interval("eps", eps, 0.0)
    check_interval("tolerance", tolerance, 0.0)
    if second_scale is not None and not callable(second_scale):
        raise TypeError(f"second_scale must be a schedule or None, got {second_scale!r}.")

    rule = _Swats(
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        tolerance=tolerance,
        second_scale=second_scale,
    )
    return transformation("swats", rule.init, rule.update)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)  # hashed by jit: settings may be arrays
class _Swats:
    """The settings of ``swats``, and what its two phases do with them."""

    learning_rate: optax.ScalarOrSchedule
    b1: Any
    b2: Any
    eps: Any
    tolerance: Any
    second_scale: optax.Schedule | None

    def init(self, params: Any) -> SwatsState:
        return SwatsState(
            count=jnp.zeros((), jnp.int32),
            moment=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p)), params),
            second_moment=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p)), params),
            projected_rate=jnp.zeros((), jnp.float32),
            learning_rate=jnp.array(self._adam_rate(jnp.zeros((), jnp.int32))),
            phase=jnp.zeros((), jnp.float32),
            steps_since_switch=jnp.zeros((), jnp.int32),
            failures=jnp.zeros((), jnp.int32),
            gradients=start_gradient_watch(),
        )

    def update(
        self, updates: Any, state: Any, params: Any = None, **extras: Any
    ) -> tuple[Any, SwatsState]:
        del params, extras
        given = admit(updates, state.gradients)
        usable, in_adam = ~given.bad, state.phase < 1
        failures = count_up(state.failures, given.failed)
        carry = given.updates, state._replace(failures=failures, gradients=given.watch)
        # Both are computed and one is chosen, without a branch: the two read and write nearly the
        # same arrays.
        carry_on = chosen(in_adam, self._adam_step(carry), self._sgd_step(carry))
        return chosen(usable, carry_on, carry)

    def _adam_rate(self, count: jax.Array) -> jax.Array:
        rate = self.learning_rate
        return jnp.asarray(rate(count) if callable(rate) else rate).astype(jnp.float32)

    def _adam_step(self, carry: Any) -> Any:
        updates, state = carry
        g = jax.tree.map(lambda u, m: u.astype(m.dtype), updates, state.moment)
        count = count_up(state.count)
        moment = jax.tree.map(partial(_mean, _share(self.b1, count)), state.moment, g)
        squares = jax.tree.map(jnp.square, g)
        second = jax.tree.map(partial(_mean, _share(self.b2, count)), state.second_moment, squares)
        rate = self._adam_rate(state.count)
        step = jax.tree.map(lambda m, a: -rate * m / (jnp.sqrt(a) + self.eps), moment, second)
        mean_rate, settled = self._project(step, g, state._replace(count=count))
        # SGD's velocity takes the first moment's place, and begins at zero.
        moment = jax.tree.map(lambda m: jnp.where(settled, 0, m), moment)
        return _like(step, updates), state._replace(
            count=count,
            moment=moment,
            second_moment=second,
            projected_rate=mean_rate,
            learning_rate=rate,
            phase=settled.astype(jnp.float32),
        )

    def _project(self, step: Any, gradient: Any, state: SwatsState) -> tuple[jax.Array, jax.Array]:
        """Return the mean of the projected rates, and whether the newest agrees with it."""
        rate = _inner(step, step) / -_inner(step, gradient)
        defined = jnp.isfinite(rate)  # p = 0, and pᵀg = 0, give NaN or infinity
        share, mean_rate = _share(self.b2, state.count), state.projected_rate
        # Without a rate of its own a step only moves the bias correction, from 1 − β₂ᵏ⁻¹ on.
        silent = mean_rate * (1 - share)
        mean_rate = jnp.where(defined, mean_rate + share * (rate - mean_rate), silent)
        # Two float32 numbers that should be equal may differ by a few units in the last place.
        slack = self.tolerance + 4 * jnp.finfo(jnp.float32).eps * jnp.abs(mean_rate)
        agreed = defined & (jnp.abs(mean_rate - rate) < slack) & (mean_rate > 0) & (state.count > 1)
        return mean_rate.astype(jnp.float32), agreed

    def _sgd_step(self, carry: Any) -> Any:
        updates, state = carry
        velocity = jax.tree.map(lambda v, u: self.b1 * v + u.astype(v.dtype), state.moment, updates)
        scale = 1.0 if self.second_scale is None else self.second_scale(state.steps_since_switch)
        rate = jnp.asarray(state.projected_rate * scale).astype(jnp.float32)
        step = jax.tree.map(lambda v: -(1 - self.b1) * rate * v, velocity)
        return _like(step, updates), state._replace(
            count=count_up(state.count),
            moment=velocity,
            learning_rate=rate,
            steps_since_switch=count_up(state.steps_since_switch),
        )


def _share(decay: Any, count: jax.Array) -> jax.Array:
    """Return ``(1 − β) / (1 − βᵏ)``, the weight of the newest value in a corrected mean."""
    if is_concrete(decay):
        log_decay = math.log(float(decay)) if float(decay) > 0 else -math.inf
        complement = 1 - float(decay)
    else:
        complement = 1 - decay
        log_decay = jnp.log1p(-complement)
    # By expm1, because 1 − βᵏ itself loses digits in float32 while βᵏ is near 1.
    return jnp.asarray(complement / -jnp.expm1(count.astype(jnp.float32) * log_decay), jnp.float32)


def _mean(share: jax.Array, mean: jax.Array, value: jax.Array) -> jax.Array:
    """Return the corrected mean that includes ``value``."""
    return (mean + share * (value - mean)).astype(mean.dtype)


def _inner(a: Any, b: Any) -> jax.Array:
    """Return the inner product of two pytrees in float32."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    total = jax.tree.reduce(jnp.add, products, jnp.float32(0))
    return total.astype(jnp.float32)


def _like(step: Any, updates: Any) -> Any:
    """Return ``step`` in the dtypes of ``updates``."""
    return jax.tree.map(lambda s, u: s.astype(u.dtype), step, updates)
