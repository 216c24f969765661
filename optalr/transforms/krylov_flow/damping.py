"""The damping λ of the flow: a power of the gradient's norm, or a rule that judges each step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_interval
from optalr.arrays import wide_dtype
from optalr.linalg.minres.linear_solve import MinresResult
from optalr.linalg.minres.vectors import dot, where
from optalr.transforms.subtrees import embed


class LevenbergMarquardt(NamedTuple):
    """A damping that follows how well the quadratic model predicts the loss.

    After each step the actual decrease ``L(w) − L(w − s v)`` is divided by the predicted one,
    ``s ∇ᵀv − s²/2 vᵀAv``. Below ``low`` (or where the loss is not finite, or curvature was not
    positive) the next λ is ``grow`` times larger, above ``high`` ``shrink`` times.

    The rule sets the next λ only: a step that raises the loss is taken all the same, unless
    ``reject`` is set. What is judged is ``−s v``; a schedule, momentum or a learned rate after the
    flow moves the parameters by something else, and ``reject`` then guards a step not taken. Under
    ``optax.MultiSteps`` the gradient is the mean of the micro-batches, while ``value`` and
    ``value_fn`` are those of the last one: the ratio compares two different losses.

    Attributes:
      initial: λ of the first step, > 0.
      grow: factor, > 1.
      shrink: factor, in (0, 1).
      low: ratio below which λ grows, in (0, high].
      high: ratio above which λ shrinks.
      step_size: s, the step that is judged; the learning rate that follows in the chain, > 0.
      smallest: λ never falls below it, > 0.
      largest: λ never rises above it.
      reject: whether a step whose actual decrease is not positive (or not finite) becomes a zero
        update while λ grows. Near a minimum, where decreases drown in rounding, nothing moves then.

    Reference:
      Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", 1963; factors
      as in Martens, "Deep learning via Hessian-free optimization", 2010.
    """

    initial: float = 1.0
    grow: float = 1.5
    shrink: float = 2 / 3
    low: float = 0.25
    high: float = 0.75
    step_size: float = 1.0
    smallest: float = 1e-8
    largest: float = 1e8
    reject: bool = False


class Verdict(NamedTuple):
    """What a Levenberg-Marquardt rule makes of a step.

    Attributes:
      direction: the direction, or zeros where the step is refused.
      damping: float32 scalar, λ of the next solve.
      reduction_ratio: float32 scalar, actual over predicted decrease, 0 where that says nothing.
      rejected: bool scalar, whether the step is refused.
    """

    direction: Any
    damping: jax.Array
    reduction_ratio: jax.Array
    rejected: jax.Array


def refuse_schedule(name: str, value: Any, remedy: str = "") -> None:
    """Raise a TypeError that names ``name`` where ``value`` is a function of the step."""
    if callable(value):
        raise TypeError(f"{name} must be a number, got {value!r}.{remedy}")


def damping_rule(damping: Any) -> Callable[[Any, Any, Any], jax.Array]:
    """Check ``damping`` and return ``(count, gradient norm, λ of the rule) ↦ λ``.

    Raises:
      ValueError: a number is out of range.
      TypeError: neither a pair nor a rule, or a schedule for the power.
    """
    if isinstance(damping, LevenbergMarquardt):
        check_interval("damping.initial", damping.initial, 0.0, open_low=True)
        check_interval("damping.grow", damping.grow, 1.0, open_low=True)
        check_interval("damping.shrink", damping.shrink, 0.0, 1.0, open_low=True, open_high=True)
        check_interval("damping.high", damping.high, 0.0, open_low=True)
        check_interval("damping.low", damping.low, 0.0, damping.high, open_low=True)
        check_interval("damping.step_size", damping.step_size, 0.0, open_low=True)
        check_interval("damping.smallest", damping.smallest, 0.0, open_low=True)
        check_interval("damping.largest", damping.largest, damping.smallest)
        return lambda count, norm, following: following
    if not isinstance(damping, tuple | list) or len(damping) != 2:
        raise TypeError(
            f"damping must be a pair (a, b) for a * norm(gradient)**b, or a LevenbergMarquardt "
            f"rule or a mapping of its fields, got {damping!r}. Pass (value, 0) for a constant."
        )
    factor, power = damping
    refuse_schedule("damping[1]", power, " Only damping[0] may be a schedule.")
    check_interval("damping[0]", factor, 0.0, open_high=True)
    check_interval("damping[1]", power, 0.0, open_high=True)

    def rule(count: Any, norm: Any, following: Any) -> jax.Array:
        del following
        scale = factor(count) if callable(factor) else factor
        return (jnp.asarray(scale) * norm ** jnp.asarray(power, norm.dtype)).astype(jnp.float32)

    return rule


def judge(
    rule: LevenbergMarquardt,
    solved: MinresResult,
    gradient: Any,
    direction: Any,
    *,
    descends: Any,
    damping: Any,
    last_ratio: Any,
    extras: dict[str, Any],
) -> Verdict:
    """Compare the loss after the step with the quadratic model; set the next λ, refuse the step.

    Args:
      rule: the rule.
      solved: the solve that ``direction`` is from.
      gradient: what was solved against, a pytree in float32 or wider.
      direction: the step over ``−rule.step_size``, of the same structure.
      descends: bool scalar, whether the solve ended in a direction of descent.
      damping: λ of the solve.
      last_ratio: the ratio to report after a zero gradient, which says nothing about the model.
      extras: the update's, with ``value``, ``value_fn`` and ``point``.
    """
    step = rule.step_size
    moved = jax.tree.map(
        lambda p, v: (p - step * v.astype(wide_dtype(p))).astype(p.dtype),
        extras["point"],
        embed(direction, extras["point"]),
    )
    actual = extras["value"] - extras["value_fn"](moved)
    slope = dot(gradient, direction)
    # vᵀ(A + λI)v = vᵀ(∇ − r), at no further product.
    curved = slope - dot(direction, solved.residual) - damping * dot(direction, direction)
    predicted = step * slope - 0.5 * step**2 * curved
    ratio = actual / jnp.where(predicted == 0, 1.0, predicted)
    trusted = jnp.isfinite(ratio) & descends & (predicted > 0)
    ratio = jnp.where(trusted, ratio, 0.0).astype(jnp.float32)
    factor = jnp.where(ratio < rule.low, rule.grow, jnp.where(ratio > rule.high, rule.shrink, 1.0))
    following = jnp.clip(damping * factor, rule.smallest, rule.largest)
    still = slope == 0
    refused = ~(actual > 0) if rule.reject else jnp.asarray(False)  # also where it is not finite
    return Verdict(
        direction=where(refused, jax.tree.map(jnp.zeros_like, direction), direction),
        damping=jnp.where(still, damping, following).astype(jnp.float32),
        reduction_ratio=jnp.where(still, last_ratio, ratio),
        rejected=refused & ~still,
    )
