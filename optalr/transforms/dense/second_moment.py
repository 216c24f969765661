"""Dense second moments of gradient vectors, their roots, and the rule of when to take them.

Two exact but small structures share it: one matrix for all parameters, or one for each leaf.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_choice, check_interval, is_concrete
from optalr.arrays import all_finite, wide_dtype
from optalr.clocks import REFRESH, asking, larger, period_of, permitted, run_when, smaller
from optalr.linalg import inverse_roots, mean_eigenvalue, spd
from optalr.states import count_up
from optalr.transforms.shared.gradient_watch import GradientWatch, admit, start_gradient_watch

# By how much a root's rounding may exceed a bound.
_ROUNDING = 1.05


def _absolute(damping: jax.Array, mean_eigenvalue: jax.Array) -> jax.Array:
    """Return λ itself, for each matrix."""
    return jnp.broadcast_to(damping, mean_eigenvalue.shape)


def _relative(damping: jax.Array, mean_eigenvalue: jax.Array) -> jax.Array:
    """Return λ times the mean eigenvalue."""
    # Without any gradient there is no scale: the root is then the identity.
    return jnp.where(mean_eigenvalue > 0, damping * mean_eigenvalue, 1)


DAMPING_FORMS: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = MappingProxyType(
    {"relative": _relative, "absolute": _absolute}
)


@dataclasses.dataclass(frozen=True)
class SecondMoment:
    """How moments are accumulated and what power of them is applied; it checks its fields."""

    power: Any
    decay: Any
    damping: Any
    damping_form: str
    bias_correction: bool

    def __post_init__(self):
        check_interval("power", self.power, -1, 0)
        if self.decay is not None:
            check_interval("decay", self.decay, 0, 1, open_high=True)
        check_interval("damping", self.damping, 0)
        check_choice("damping_form", self.damping_form, tuple(DAMPING_FORMS))

    def next_weight(self, weight: jax.Array) -> jax.Array:
        """Return the sum of the weights of all gradients, after one more."""
        if self.decay is None or not self.bias_correction:
            return jnp.ones_like(weight)
        decay = jnp.asarray(self.decay, weight.dtype)
        return decay * weight + (1 - decay)

    def fold(self, moment: jax.Array, new: jax.Array) -> jax.Array:
        """Return the moment after one more gradient: AdaGrad's sum, or the moving average."""
        if self.decay is None:
            return moment + new
        decay = jnp.asarray(self.decay, moment.dtype)
        return decay * moment + (1 - decay) * new

    def added(self, mean_eigenvalue: jax.Array) -> jax.Array:
        """Return what damping adds to each eigenvalue."""
        damping = jnp.asarray(self.damping, mean_eigenvalue.dtype)
        return DAMPING_FORMS[self.damping_form](damping, mean_eigenvalue)

    def limit(self, vector: jax.Array, moment: jax.Array, weight: jax.Array) -> jax.Array:
        """Return a bound on ``‖(F + λI)^p g‖`` for any F that holds g with its weight s.

        With q = −p it is ``‖g‖^{1−2q} s^{−q}`` for q ≤ 1/2, and ``λ^{1/2−q} s^{−1/2}`` beyond,
        because F is at least s g gᵀ.
        """
        dtype = vector.dtype
        weight = jnp.where(weight > 0, weight, 1).astype(dtype)
        share = (1 if self.decay is None else 1 - jnp.asarray(self.decay, dtype)) / weight
        mean = jnp.trace(moment) / (weight * max(1, vector.size))
        q, added = -jnp.asarray(self.power, dtype), self.added(mean)
        norm = jnp.sqrt(jnp.sum(jnp.square(vector)))
        gentle = jnp.power(norm, jnp.maximum(1 - 2 * q, 0)) * jnp.power(share, -jnp.minimum(q, 0.5))
        damped = jnp.where(added > 0, added, 1)
        steep = jnp.where(added > 0, jnp.power(damped, jnp.minimum(0.5 - q, 0)), jnp.inf)
        return jnp.where(q > 0.5, steep * jnp.power(share, -0.5), gentle)


class RootClock(NamedTuple):
    """When roots are due: when as old as half the updates so far, at most every ``period``.

    Early on moments change by a large share at every update, and a root is soon out of date.
    """

    count: Any  # () int32, updates so far
    root_age: Any  # () int32, updates since roots were last due
    period: Any  # () int32

    @property
    def is_certain(self) -> Any:
        """Whether the period is known: it is not in some states that an older release saved."""
        return self.period > 0

    def is_due(self) -> Any:
        """Return whether an update that has aged the roots takes new ones."""
        interval = smaller(larger(self.count // 2, 1), self.period)
        return (self.count == 0) | (self.root_age >= interval)

    def needs(self) -> Any:
        """Return whether the next update takes roots."""
        return REFRESH * self._replace(root_age=self.root_age + 1).is_due()

    def after(self, told: Any) -> "RootClock":
        """Return the clock after an update that was told so."""
        aged = self._replace(root_age=self.root_age + 1)
        due = aged.is_due() & permitted(told, REFRESH)
        return aged._replace(count=self.count + 1, root_age=aged.root_age * (1 - due))


class Memory(NamedTuple):
    """What is remembered between updates: one moment and one root per vector, in their order."""

    told: jax.Array  # () int8, -1; see optalr/clocks.py
    period: jax.Array  # () int32, updates between roots
    count: jax.Array  # () int32, updates so far
    weight: jax.Array  # () float32, sum of the moving average's weights
    root_age: jax.Array  # () int32, updates since roots were last due
    failures: jax.Array  # () int32, roots kept back, gradients not finite or out of proportion
    bounded_steps: jax.Array  # () int32, updates shortened because their root was out of date
    gradients: GradientWatch  # what is remembered of the gradients' lengths
    moments: Sequence[jax.Array]  # (k, k) for a vector of k numbers
    root_residual: jax.Array  # () float32, the worst among the roots in use
    roots: Sequence[jax.Array]  # (k, k), as the moments

    @classmethod
    def of(cls, state: Any, moments: Sequence[jax.Array], roots: Sequence[jax.Array]) -> "Memory":
        """Return what a method's state remembers, given its matrices as lists."""
        shared = {name: getattr(state, name) for name in _SHARED}
        return cls(moments=moments, roots=roots, **shared)

    def shared(self) -> dict[str, Any]:
        """Return the fields that the methods' states have too, by name."""
        return {name: getattr(self, name) for name in _SHARED}


# Everything but the matrices, which each method keeps in a structure of its own.
_SHARED = tuple(name for name in Memory._fields if name not in ("moments", "roots"))


def first_memory(update_every: Any) -> Memory:
    """Return the memory before the first update, without matrices."""
    return Memory(
        told=asking(),
        period=period_of(update_every),
        count=jnp.zeros([], jnp.int32),
        weight=jnp.zeros([], jnp.float32),
        root_age=jnp.zeros([], jnp.int32),
        failures=jnp.zeros([], jnp.int32),
        bounded_steps=jnp.zeros([], jnp.int32),
        gradients=start_gradient_watch(),
        moments=(),
        root_residual=jnp.zeros([], jnp.float32),
        roots=(),
    )


def precondition(
    rule: SecondMoment, memory: Memory, vectors: Sequence[jax.Array], *, update_every: Any
) -> tuple[list[jax.Array], Memory]:
    """Return each vector under its root, or all zeros, and the memory after this update.

    A root that is a few updates old has not seen this gradient, and may make it longer than any
    fresh root would. The update is shortened to what a fresh one could make of it.

    Args:
      rule: how moments are accumulated.
      memory: what was known before this update.
      vectors: the gradients, in the dtypes of their moments.
      update_every: updates between roots.
    """
    # Measure.
    given = admit(list(vectors), memory.gradients)
    vectors = given.updates
    moments, weight, good = _fold_vectors(rule, memory, vectors, usable=~given.bad)

    # Refresh.
    age = count_up(memory.root_age)
    may = permitted(memory.told, REFRESH)
    period = period_of(update_every)
    due = RootClock(memory.count, age, period).is_due() & good & may
    memory = memory._replace(moments=moments, weight=weight)
    roots, residual, kept_back = _refresh_roots(rule, memory, due, may=may)

    # Apply.
    new = [spd.matmul(root, vector) for root, vector in zip(roots, vectors, strict=True)]
    limits = [rule.limit(g, moment, weight) for g, moment in zip(vectors, moments, strict=True)]
    new, cut = _shortened(new, limits)
    safe = good & all_finite(new)
    failed = given.failed | ~safe
    return [jnp.where(safe, u, 0) for u in new], memory._replace(
        told=asking(),
        period=period,
        count=count_up(memory.count),
        root_age=jnp.where(due, 0, age),
        failures=count_up(count_up(memory.failures, kept_back), failed),
        bounded_steps=count_up(memory.bounded_steps, cut & safe),
        gradients=given.watch,
        root_residual=residual,
        roots=roots,
    )


def _shortened(
    updates: Sequence[jax.Array], limits: Sequence[jax.Array]
) -> tuple[list[jax.Array], jax.Array]:
    """Return updates within their limits, and whether any was cut."""
    kept, cut = [], jnp.zeros((), bool)
    for update, limit in zip(updates, limits, strict=True):
        norm = jnp.sqrt(jnp.sum(jnp.square(update)))
        # A fresh root may reach the limit itself, up to its rounding.
        over = jnp.isfinite(norm) & (norm > _ROUNDING * limit)
        kept.append(jnp.where(over, update * (limit / jnp.where(over, norm, 1)), update))
        cut |= over
    return kept, cut


def working_dtype(leaves: Sequence[Any]) -> Any:
    """Return the dtype that holds all leaves in one vector: float32, or float64 where a leaf is."""
    return wide_dtype(jnp.float32, *(leaf.dtype for leaf in leaves))


def _fold_vectors(
    rule: SecondMoment, memory: Memory, vectors: Sequence[jax.Array], *, usable: jax.Array
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Fold the outer product of each vector into its moment.

    Return the moments, their weight, and whether all was finite; if not, nothing was folded in.
    """
    after = rule.next_weight(memory.weight)
    folded = [
        rule.fold(moment, vector[:, None] * vector[None, :])
        for moment, vector in zip(memory.moments, vectors, strict=True)
    ]
    # No entry of a sum of outer products exceeds its trace, and damping divides by that.
    means = [jnp.trace(moment) / after.astype(moment.dtype) for moment in folded]
    good = usable & all_finite(means)
    kept = [jnp.where(good, new, old) for new, old in zip(folded, memory.moments, strict=True)]
    return kept, jnp.where(good, after, memory.weight), good


def _refresh_roots(
    rule: SecondMoment, memory: Memory, due: jax.Array, *, may: Any
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Return as ``_take_roots`` does: new roots where they are ``due``, else those in use."""

    def take(carry: Any, inputs: Any) -> Any:
        roots, residual, _ = carry
        moments, weight = inputs
        using = memory._replace(moments=moments, weight=weight, roots=roots, root_residual=residual)
        return _take_roots(rule, using)

    carry = list(memory.roots), memory.root_residual, jnp.int32(0)
    return run_when(due, take, carry, inputs=(list(memory.moments), memory.weight), may=may)


def _take_roots(rule: SecondMoment, memory: Memory) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Return new roots, the worst residual in use, and how many kept the old root instead.

    Of roots that are kept only the worst residual is known. It stands for each of them.
    """
    if is_concrete(rule.power) and float(rule.power) == 0:
        return list(memory.roots), jnp.float32(0), jnp.int32(0)
    weight = jnp.where(memory.weight > 0, memory.weight, 1)
    means = {i: m / weight.astype(m.dtype) for i, m in enumerate(memory.moments) if m.size}
    dampings = [rule.added(mean_eigenvalue(matrix)) for matrix in means.values()]
    results = inverse_roots(list(means.values()), -1 / rule.power, damping=dampings)
    new, residual, failed = list(memory.roots), jnp.float32(0), jnp.int32(0)
    for i, result in zip(means, results, strict=True):
        new[i] = jnp.where(result.success, result.root, memory.roots[i])
        in_use = jnp.where(
            result.success, result.residual.astype(jnp.float32), memory.root_residual
        )
        residual = jnp.maximum(residual, in_use)
        failed += (~result.success).astype(jnp.int32)
    return new, residual, failed
