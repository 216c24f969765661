"""The length of an update: another method's norm, a bound, and zero where it is not finite."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optalr.arrays import as_vector, at_least_float32, like_parts
from optalr.clocks import asking
from optalr.signals.moments import default_view
from optalr.states import count_up, settle_like
from optalr.transforms.kronecker.leaves import Bias, Elementwise, Kernel, Leaf
from optalr.transforms.kronecker.memory import LeafMemory
from optalr.transforms.kronecker.spectrum import Step
from optalr.transforms.shared.gradient_watch import Admitted


def bound(
    leaves: Sequence[Leaf],
    memories: Sequence[LeafMemory],
    updates: Sequence[jax.Array],
    *,
    weight: jax.Array,
    max_update: float,
) -> tuple[list[jax.Array], jax.Array]:
    """Shrink each update so that it moves its layer's outputs by at most ``max_update`` RMS.

    What each leaf has one number of is computed for all leaves together, in few operations.

    Return the updates, and their norm. That is NaN if a number is not finite.
    """
    matrices = [_as_matrices(leaf, update) for leaf, update in zip(leaves, updates, strict=True)]
    if not matrices:
        return [], jnp.float32(0)
    limits = max_update * _limits(leaves, memories, matrices, weight=weight)
    # Norms in units of the largest number: the square of 1e20 overflows, that of 1e-23 underflows.
    unit = as_vector([_largest(m) for m in matrices])
    unit = jnp.where(unit == 0, 1, unit)
    each = zip(matrices, _to_each(unit, matrices), strict=True)
    square = as_vector([jnp.sum(jnp.square(m / part), (-2, -1)) for m, part in each])
    excess = jnp.sqrt(square) * (unit / limits)
    share = jnp.where(excess > 1, 1 / excess, 1)
    shrunk = [m * part for m, part in zip(matrices, _to_each(share, matrices), strict=True)]
    norm = _norm(jnp.where(excess > 1, 1, excess) * limits)
    return [_as_leaf(leaf, m, u) for leaf, m, u in zip(leaves, shrunk, updates, strict=True)], norm


def _largest(matrices: jax.Array) -> jax.Array:
    """Return the size of the largest entry of each matrix; 0 where there are none."""
    if not matrices.size:
        return jnp.zeros(matrices.shape[:-2], matrices.dtype)
    return jnp.max(jnp.abs(matrices), (-2, -1))


def _limits(
    leaves: Sequence[Leaf],
    memories: Sequence[LeafMemory],
    matrices: Sequence[jax.Array],
    *,
    weight: jax.Array,
) -> jax.Array:
    """Return the norm at which a matrix moves outputs by 1 RMS, for all matrices of all leaves."""
    outputs, traces, rows = [], [], []
    for leaf, memory, matrix in zip(leaves, memories, matrices, strict=True):
        trace: Any = np.ones(matrix.shape[:-2], np.float32)
        size = 0  # nothing is known of the inputs
        if isinstance(leaf, Kernel) and leaf.moments is not None:
            # With isotropic inputs of mean square tr(A)/m, outputs move by ‖U‖² tr(A)/m in all.
            side = 1 - leaf.output_side
            factor = leaf.sides[side].holding(memory.sides[side].factor)
            trace, size = factor.trace(), factor.padded_size
        traces.append(trace)
        outputs += [_num_outputs(leaf)] * trace.size
        rows += [size] * trace.size
    known = np.array(rows) > 0
    trace = as_vector(traces)
    weighted = np.maximum(rows, 1).astype(trace.dtype) * jnp.where(weight > 0, weight, 1)
    mean = jnp.where(known & (trace > 0), trace / weighted.astype(trace.dtype), 1)
    return jax.lax.rsqrt(mean) * np.sqrt(np.array(outputs, np.float32))


def _as_matrices(leaf: Leaf, update: jax.Array) -> jax.Array:
    """Return an update as the matrices that are bounded each, ``(*stack, m, n)``."""
    if isinstance(leaf, Kernel):
        return leaf.view.to_matrix(update)
    layer = leaf.layer if isinstance(leaf, Bias | Elementwise) else None
    return update.reshape(*(() if layer is None else layer.stack), 1, -1)


def _as_leaf(leaf: Leaf, matrices: jax.Array, like: jax.Array) -> jax.Array:
    """Undo ``_as_matrices``."""
    if isinstance(leaf, Kernel):
        return leaf.view.from_matrix(matrices, leaf.shape)
    return matrices.reshape(like.shape)


def _to_each(numbers: jax.Array, matrices: Sequence[jax.Array]) -> list[jax.Array]:
    """Return each leaf's part of a vector, in the shape of its matrices."""
    parts = like_parts(numbers, matrices, [matrix.shape[:-2] for matrix in matrices])
    return [part.astype(matrix.dtype) for part, matrix in zip(parts, matrices, strict=True)]


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


def finish(
    step: Step,
    new: Sequence[jax.Array],
    state: Any,
    *,
    norm: jax.Array,
    usable: jax.Array,
    empty: jax.Array,
) -> tuple[list[jax.Array], Any]:
    """Replace an update that is not finite by zero; note whether the next one wants signals.

    Args:
      step: what the update goes by.
      new: the update, leaf by leaf.
      state: the state so far.
      norm: of the update; not finite if that is not.
      usable: () bool, whether the gradient was finite; if not, that has been counted.
      empty: () bool, whether zeros came in place of one that was not, and was counted then. What
        was handed on beside it (outer products) is not finite still.
    """
    finite = usable & jnp.isfinite(norm)
    failed = usable & ~finite & ~empty
    new = [jnp.where(finite, u, 0) for u in new]
    count = count_up(state.count)
    return new, state._replace(
        count=count,
        failures=count_up(state.failures, failed),
        update_norm=jnp.where(finite, norm, 0).astype(jnp.float32),
        wants_signals=(step.signals is not None) & state._replace(count=count).clock.measures(),
        damping=step.spectrum.rule.damping,
        told=asking(),
    )


def norm_of(updates: Sequence[jax.Array]) -> jax.Array:
    """Return the norm of all leaves together."""
    norms = [_norm(update).astype(jnp.float32) for update in updates]
    return _norm(jnp.stack(norms)) if norms else jnp.float32(0)
