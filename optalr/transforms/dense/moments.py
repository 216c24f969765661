"""Dense second moments of gradient vectors, their roots, and the rule of when to take them.

Shared by the two exact but small structures: one matrix for all parameters, or one a leaf.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optalr.arguments import check_choice, check_count, check_interval, is_concrete
from optalr.arrays import all_finite
from optalr.linalg import inverse_root
from optalr.states import update_when

DAMPING_FORMS = ("relative", "absolute")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How moments are accumulated and what power of them is applied."""

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
        check_choice("damping_form", self.damping_form, DAMPING_FORMS)

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
        if self.damping_form == "absolute":
            return jnp.broadcast_to(damping, mean_eigenvalue.shape)
        # Without any gradient there is no scale: the root is then the identity.
        return jnp.where(mean_eigenvalue > 0, damping * mean_eigenvalue, 1)


def check_update_every(update_every: Any) -> None:
    """Raise unless ``update_every`` is a count."""
    check_count("update_every", update_every)


def is_due(count: jax.Array, root_age: jax.Array, update_every: Any) -> jax.Array:
    """Tell whether roots are due: at half the updates so far, up to every ``update_every``."""
    interval = jnp.clip(count // 2, 1, jnp.asarray(update_every, jnp.int32))
    return (count == 0) | (root_age >= interval)


def global_norm(tree: Any) -> jax.Array:
    """Return the norm of all numbers together, float32."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))


def multiply(matrix: jax.Array, other: jax.Array) -> jax.Array:
    """Return ``matrix @ other`` in full precision also where TF32 or bfloat16 is default."""
    return jnp.matmul(matrix, other, precision=jax.lax.Precision.HIGHEST)


def fold_vectors(
    rule: Rule, moments: Sequence[jax.Array], vectors: Sequence[jax.Array], weight: jax.Array
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Fold the outer product of each vector into its moment.

    Returns moments, their weight, and whether all that was finite; if not, nothing was folded in.
    """
    after = rule.next_weight(weight)
    folded = [
        rule.fold(moment, vector[:, None] * vector[None, :])
        for moment, vector in zip(moments, vectors, strict=True)
    ]
    # No entry of a sum of outer products exceeds its trace, and damping divides by that.
    good = all_finite([jnp.trace(moment) / after.astype(moment.dtype) for moment in folded])
    kept = [jnp.where(good, new, old) for new, old in zip(folded, moments, strict=True)]
    return kept, jnp.where(good, after, weight), good


def refresh_roots(
    rule: Rule, due: jax.Array, moments: Any, weight: jax.Array, kept: tuple[Any, jax.Array]
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Take roots where they are ``due``; ``kept`` are those in use, and their worst residual."""

    def take(carry, inputs):
        roots, residual, _ = carry
        moments, weight = inputs
        return take_roots(rule, moments, weight, roots, residual)

    return update_when(due, take, (*kept, jnp.int32(0)), (moments, weight))


def take_roots(
    rule: Rule,
    moments: Sequence[jax.Array],
    weight: jax.Array,
    roots: Sequence[jax.Array],
    last_residual: jax.Array,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Return new roots, the worst residual in use, and how many kept the old root instead.

    Of roots that are kept only the worst residual is known, and stands for each of them.
    """
    if is_concrete(rule.power) and float(rule.power) == 0:
        return list(roots), jnp.float32(0), jnp.int32(0)
    groups: dict[Any, list[int]] = {}
    for i, moment in enumerate(moments):
        if moment.size:
            groups.setdefault((moment.shape[0], moment.dtype), []).append(i)
    new, residual, failed = list(roots), jnp.float32(0), jnp.int32(0)
    for members in groups.values():
        stack = jnp.stack([moments[i] for i in members])
        stack = stack / jnp.where(weight > 0, weight, 1).astype(stack.dtype)
        mean = jnp.trace(stack, axis1=-2, axis2=-1) / stack.shape[-1]
        result = inverse_root(stack, -1 / rule.power, damping=rule.added(mean))
        for k, i in enumerate(members):
            new[i] = jnp.where(result.success[k], result.root[k], roots[i])
        in_use = jnp.where(result.success, result.residual.astype(jnp.float32), last_residual)
        residual = jnp.maximum(residual, jnp.max(in_use))
        failed += jnp.sum(~result.success, dtype=jnp.int32)
    return new, residual, failed
