"""The damping λ of the flow: a power of the gradient's norm, or a rule that judges each step.

Both answer the same three questions. Which extras do you need? What is λ now? What do you make of
the step that was solved with it?
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_interval, from_fields
from optalr.arrays import wide_dtype
from optalr.linalg.minres.linear_solve import MinresResult
from optalr.linalg.minres.vectors import dot, where
from optalr.transforms.shared.lengths import value_at
from optalr.transforms.shared.loss_watch import LossWatch, watch_loss
from optalr.transforms.shared.subtrees import embed


class LevenbergMarquardt(NamedTuple):
    """A damping that follows how well the quadratic model predicts the loss.

    After each step the actual decrease ``L(w) − L(w − s v)`` is divided by the predicted one,
    ``s ∇ᵀv − s²/2 vᵀAv``. Below ``low`` (or where the loss is not finite, or curvature was not
    positive) the next λ is ``grow`` times larger, above ``high`` ``shrink`` times. The ratio judges
    a step by its own batch. Where steps that fit one batch each make the loss rise, above
    ``max_rise`` times the first one, λ never falls below ``initial`` again.

    Choose it in full-batch fitting, where the right λ changes during the fit. The rule sets the
    next λ only: a step that raises the loss is still taken, unless ``reject`` is set. The step that
    is judged is ``−s v``. A schedule, momentum or a learned rate after the flow moves the
    parameters by something else, and ``reject`` then guards a step that is not taken. Under
    ``optax.MultiSteps`` the gradient is the mean of the micro-batches, while ``value`` and
    ``value_fn`` are those of the last one: the ratio compares two different losses.

    Attributes:
      initial: λ of the first step, > 0.
      grow: factor, > 1.
      shrink: factor, in (0, 1).
      low: ratio below which λ grows, in (0, high].
      high: ratio above which λ shrinks, > 0.
      step_size: s, the step that is judged; the learning rate that follows in the chain, > 0.
      smallest: λ never falls below it, > 0.
      largest: λ never rises above it; at least ``smallest``.
      reject: whether a step whose actual decrease is not positive (or not finite) becomes a zero
        update while λ grows. Near a minimum, where decreases drown in rounding, nothing moves then.
      max_rise: see above, ≥ 0; infinity for never. A first loss L below zero may rise to
        L + (max_rise − 1)|L|. ``bounded_steps`` counts the updates whose λ it has held.

    A method that takes the rule raises a ValueError for a field out of range.

    Cost: one evaluation of the loss per step.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> loss = optalr.composite_loss(lambda w: 2 * w, lambda z: 0.5 * jnp.sum(z**2))
      >>> tx = optalr.edf(1.0, num_steps=2, damping=optalr.LevenbergMarquardt(initial=3.0))
      >>> w = jnp.array([1.0, -2.0])
      >>> value, grads, extras = optalr.value_grad_and_extras(loss)(w)
      >>> updates, state = tx.update(grads, tx.init(w), w, **extras)
      >>> bool(loss(optax.apply_updates(w, updates)) < value)
      True
      >>> bool(state[0].next_damping < 3.0)  # on a quadratic the model is exact
      True

    Reference: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", 1963;
      factors as in Martens, "Deep learning via Hessian-free optimization", 2010. ``reject`` is
      ours.
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
    max_rise: float = 1.5


class Trial(NamedTuple):
    """A step that was solved, before it is judged."""

    solved: MinresResult
    gradient: Any  # what was solved against, a pytree in float32 or wider
    direction: Any  # the step without its length, of the same structure
    descends: jax.Array  # () bool, whether the solve ended in a direction of descent
    damping: jax.Array  # () float32, λ of the solve
    scale: jax.Array  # () float32, what the gradient was multiplied by since the loss gave it


class Outlook(NamedTuple):
    """What the state remembers of the last judgement."""

    next_damping: jax.Array  # () float32, λ of the next solve
    reduction_ratio: jax.Array  # () float32, actual over predicted decrease, or 0 if meaningless
    watch: LossWatch  # what is remembered of the loss


class Verdict(NamedTuple):
    """What the damping makes of a step."""

    direction: Any  # the direction, or zeros where the step is refused
    outlook: Outlook
    rejected: jax.Array  # () bool, whether the step is refused
    bounded: jax.Array  # () bool, whether λ is held at its initial value


@dataclasses.dataclass(frozen=True)
class PowerOfNorm:
    """The damping ``λ = a ‖∇‖^b``, which takes every step as it is."""

    factor: Any  # a, a number or a schedule
    power: Any  # b

    @property
    def needs(self) -> tuple[str, ...]:
        """The extras that ``judge`` reads."""
        return ()

    @property
    def initial(self) -> float:
        """The ``next_damping`` before the first step."""
        return 0.0

    def value(self, count: jax.Array, norm: jax.Array, next_damping: jax.Array) -> jax.Array:
        """Return λ, float32, for a gradient of this norm after ``count`` updates."""
        del next_damping
        factor = jnp.asarray(value_at(self.factor, count))
        return (factor * norm ** jnp.asarray(self.power, norm.dtype)).astype(jnp.float32)

    def judge(self, trial: Trial, last: Outlook, extras: dict[str, Any]) -> Verdict:
        """Return the verdict that changes nothing."""
        del extras
        no = jnp.zeros((), bool)
        return Verdict(trial.direction, last, no, no)


@dataclasses.dataclass(frozen=True)
class JudgedDamping:
    """The damping that a Levenberg-Marquardt rule sets from step to step."""

    rule: LevenbergMarquardt

    @property
    def needs(self) -> tuple[str, ...]:
        """The extras that ``judge`` reads."""
        return ("value", "value_fn", "point")

    @property
    def initial(self) -> float:
        """The ``next_damping`` before the first step."""
        return self.rule.initial

    def value(self, count: jax.Array, norm: jax.Array, next_damping: jax.Array) -> jax.Array:
        """Return the λ of the last verdict."""
        del count, norm
        return next_damping

    def judge(self, trial: Trial, last: Outlook, extras: dict[str, Any]) -> Verdict:
        """Compare the loss after the step with the quadratic model."""
        rule, still = self.rule, dot(trial.gradient, trial.direction) == 0
        actual, predicted = self._decreases(trial, extras)
        ratio = actual / jnp.where(predicted == 0, 1.0, predicted)
        trusted = jnp.isfinite(ratio) & trial.descends & (predicted > 0)
        ratio = jnp.where(trusted, ratio, 0.0).astype(jnp.float32)
        shrunk = jnp.where(ratio > rule.high, rule.shrink, 1.0)
        factor = jnp.where(ratio < rule.low, rule.grow, shrunk)
        watch = watch_loss(last.watch, extras["value"], rule.max_rise)
        following = jnp.clip(trial.damping * factor, rule.smallest, rule.largest)
        too_small = watch.risen & (following < rule.initial)
        following = jnp.where(too_small, rule.initial, following)
        # Negated, so that a decrease of NaN is refused too.
        refused = ~(actual > 0) if rule.reject else jnp.asarray(False)
        zeros = jax.tree.map(jnp.zeros_like, trial.direction)
        # A zero gradient says nothing about the model.
        outlook = Outlook(
            next_damping=jnp.where(still, trial.damping, following).astype(jnp.float32),
            reduction_ratio=jnp.where(still, last.reduction_ratio, ratio),
            watch=watch,
        )
        taken = where(refused, zeros, trial.direction)
        return Verdict(taken, outlook, refused & ~still, bounded=too_small & ~still)

    def _decreases(self, trial: Trial, extras: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        """Return the actual decrease of the loss along the step, and the predicted one."""
        step, direction = self.rule.step_size, trial.direction
        moved = jax.tree.map(
            lambda p, v: (p - step * v.astype(wide_dtype(p))).astype(p.dtype),
            extras["point"],
            embed(direction, extras["point"]),
        )
        slope = dot(trial.gradient, direction)
        # vᵀ(A + λI)v = vᵀ(∇ − r), without a further product.
        damped = slope - dot(direction, trial.solved.residual)
        curved = damped - trial.damping * dot(direction, direction)
        predicted = (step * slope - 0.5 * step**2 * curved) / trial.scale
        return extras["value"] - extras["value_fn"](moved), predicted


Damping = PowerOfNorm | JudgedDamping


def refuse_schedule(name: str, value: Any, remedy: str = "") -> None:
    """Raise a TypeError that names ``name`` where ``value`` is a function of the step."""
    if callable(value):
        raise TypeError(f"{name} must be a number, got {value!r}.{remedy}")


def resolve_damping(given: tuple[Any, Any] | LevenbergMarquardt | Mapping[str, Any]) -> Damping:
    """Check ``damping`` as the user gave it, and return the rule that it stands for.

    Raises:
      ValueError: a number is out of range.
      TypeError: ``given`` is neither a pair nor a rule, or its power is a schedule.
    """
    given = from_fields("damping", given, LevenbergMarquardt)
    if isinstance(given, LevenbergMarquardt):
        _check_rule(given)
        return JudgedDamping(given)
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise TypeError(
            f"damping must be a pair (a, b) for a * norm(gradient)**b, or a LevenbergMarquardt "
            f"rule or a mapping of its fields, got {given!r}. Pass (value, 0) for a constant."
        )
    factor, power = given
    refuse_schedule("damping[1]", power, " Only damping[0] may be a schedule.")
    check_interval("damping[0]", factor, 0.0, open_high=True)
    check_interval("damping[1]", power, 0.0, open_high=True)
    return PowerOfNorm(factor, power)


def _check_rule(rule: LevenbergMarquardt) -> None:
    """Raise if a field is out of range. A named tuple has no place to check itself."""
    check_interval("damping.initial", rule.initial, 0.0, open_low=True)
    check_interval("damping.grow", rule.grow, 1.0, open_low=True)
    check_interval("damping.shrink", rule.shrink, 0.0, 1.0, open_low=True, open_high=True)
    check_interval("damping.high", rule.high, 0.0, open_low=True)
    check_interval("damping.low", rule.low, 0.0, rule.high, open_low=True)
    check_interval("damping.step_size", rule.step_size, 0.0, open_low=True)
    check_interval("damping.smallest", rule.smallest, 0.0, open_low=True)
    check_interval("damping.largest", rule.largest, rule.smallest)
    check_interval("damping.max_rise", rule.max_rise, 0.0)
