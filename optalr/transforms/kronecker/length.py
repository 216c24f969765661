"""The length of an update: another method's norm, a bound, and zero where it is not finite."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optalr.arrays import all_finite, at_least_float32
from optalr.linalg import spd
from optalr.signals.moments import default_view
from optalr.states import count_up, settle_like
from optalr.transforms.kronecker.leaves import Bias, Elementwise, Kernel, Leaf
from optalr.transforms.kronecker.memory import LeafMemory, factors_of
from optalr.transforms.kronecker.spectrum import Step
from optalr.transforms.shared.gradient_watch import Admitted


def bound(
    leaves: Sequence[Leaf],
    memories: Sequence[LeafMemory],
    updates: Sequence[jax.Array],
    *,
    weight: jax.Array,
    max_update: float,
) -> list[jax.Array]:
    """Shrink each update so that it moves its layer's outputs by at most ``max_update`` RMS."""
    bounded = []
    for leaf, memory, update in zip(leaves, memories, updates, strict=True):
        limit = jnp.asarray(max_update * _num_outputs(leaf) ** 0.5, update.dtype)
        if not isinstance(leaf, Kernel):
            layer = leaf.layer if isinstance(leaf, Bias | Elementwise) else None
            stack = () if layer is None else layer.stack
            rows = update.reshape(*stack, 1, -1)
            bounded.append(_shrink(rows, limit).reshape(update.shape))
            continue
        if leaf.moments is not None:
            # With isotropic inputs of mean square tr(A)/m, outputs move by ‖U‖² tr(A)/m in all.
            mean = factors_of(leaf, memory, weight)[1 - leaf.output_side].mean()
            limit = limit * jax.lax.rsqrt(jnp.where(mean > 0, mean, 1))
        matrix = leaf.view.to_matrix(update)
        matrix = _shrink(matrix, spd.align(limit, matrix) if limit.ndim else limit)
        bounded.append(leaf.view.from_matrix(matrix, leaf.shape))
    return bounded


def _num_outputs(leaf: Leaf) -> int:
    """Return how many units a leaf feeds.

    That is about the squared norm of its usual initialization, so it bounds a leaf without a layer.
    """
    if isinstance(leaf, Kernel):
        outputs = leaf.sides[leaf.output_side].size
        return outputs if leaf.moments is not None else max(leaf.view.matrix_shape(leaf.shape)[1:])
    if isinstance(leaf, Bias | Elementwise) and leaf.layer is not None:
        return leaf.layer.sides[leaf.layer.output_side].size
    view = default_view(leaf.shape)
    if view is None:
        return max(1, math.prod(leaf.shape))
    return max(1, *view.matrix_shape(leaf.shape)[1:])


def _shrink(matrix: jax.Array, limit: jax.Array) -> jax.Array:
    """Scale each matrix of a stack to a Frobenius norm of at most ``limit``."""
    small, norm, largest = _scaled(matrix)
    return jnp.where(
        norm * largest <= limit, matrix, small * (limit / jnp.where(norm == 0, 1, norm))
    )


def _take_norms(updates: Sequence[jax.Array], others: Sequence[jax.Array]) -> list[jax.Array]:
    """Return each leaf of ``updates``, scaled to the norm that the leaf has in ``others``."""
    grafted = []
    for update, other in zip(updates, others, strict=True):
        small, size, _ = _scaled(update.reshape(1, -1))
        wanted = _norm(other).astype(update.dtype)
        turned = small * (wanted / jnp.where(size == 0, 1, size))
        grafted.append(turned.reshape(update.shape))
    return grafted


def _norm(array: jax.Array) -> jax.Array:
    """Return the norm of all numbers of an array, by squares that stay in its dtype's range."""
    _, small, largest = _scaled(array.reshape(1, -1))
    return (small * largest)[0, 0]


def _scaled(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return matrices over their largest entry, the norms of the quotients, and these entries.

    In float32 the square of 1e20 overflows, and that of 1e-23 underflows. The Frobenius norms are
    ``(..., 1, 1)``.
    """
    largest = jnp.max(jnp.abs(matrix), (-2, -1), keepdims=True, initial=0)
    largest = jnp.where(largest == 0, 1, largest)
    small = matrix / largest
    return small, jnp.sqrt(jnp.sum(jnp.square(small), (-2, -1), keepdims=True)), largest


def run_graft(
    transformation: optax.GradientTransformation,
    given: Admitted,
    state: Any,
    *,
    params: Any,
    extras: Mapping[str, Any],
) -> tuple[list[jax.Array], Any]:
    """Return what another method makes of the gradient, leaf by leaf, and the state after it."""
    other = optax.with_extra_args_support(transformation)
    wide, wide_params = at_least_float32(given.updates), at_least_float32(params)
    others, after = other.update(wide, state.graft, wide_params, **extras)
    after = settle_like(after, state.graft)
    # A bad gradient, of which only zeros are left, must not move the other method's moments.
    after = jax.tree.map(lambda x, old: jnp.where(given.bad, old, x), after, state.graft)
    return jax.tree.leaves(others), state._replace(graft=after)


def graft(
    new: Sequence[jax.Array], others: Sequence[jax.Array], *, started: jax.Array
) -> list[jax.Array]:
    """Return updates with the norms of another method's; before the first roots, that method's own.

    Norms are taken leaf by leaf.
    """
    others = [x.astype(u.dtype) for x, u in zip(others, new, strict=True)]
    grafted = _take_norms(new, others)
    return [jnp.where(started, u, x) for u, x in zip(grafted, others, strict=True)]


def finish(step: Step, new: Sequence[jax.Array], state: Any) -> tuple[list[jax.Array], Any]:
    """Replace an update that is not finite by zero; note whether the next one wants signals."""
    norms = [_norm(u).astype(jnp.float32) for u in new]
    total = _norm(jnp.stack(norms)) if norms else jnp.float32(0)
    finite = all_finite(new)
    new = [jnp.where(finite, u, 0) for u in new]
    count = count_up(state.count)
    return new, state._replace(
        count=count,
        failures=count_up(state.failures, ~finite),
        update_norm=jnp.where(finite, total, 0),
        wants_signals=(step.signals is not None) & step.clock.measures(state.signal_age, count),
        damping=step.spectrum.rule.damping,
    )
