"""Refreshing: new roots or eigenbases where they are due, all factors of a size in one call."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arrays import as_vector
from optalr.clocks import REFRESH, chosen, is_barred, permitted, run_when
from optalr.linalg.structured import Diagonal, Matrices, Structured
from optalr.sharding.solving import solve_over
from optalr.states import count_up
from optalr.transforms.kronecker.leaves import Kernel
from optalr.transforms.kronecker.memory import (
    NOTHING,
    LeafMemory,
    SideMemory,
    factors_of,
)
from optalr.transforms.kronecker.spectrum import Decomposition, Spectrum, Step


class Roots(NamedTuple):
    """What a refresh leaves behind.

    Attributes:
      memories: of all leaves, with their new roots.
      residual: () float32, the worst among the roots in use.
      failed: () int32, matrices whose root was not good enough.
    """

    memories: list[LeafMemory]
    residual: jax.Array
    failed: jax.Array


def refresh(step: Step, memories: Sequence[LeafMemory], state: Any) -> tuple[list[LeafMemory], Any]:
    """Take new roots where they are due."""
    state = state._replace(root_age=count_up(state.root_age))
    may = permitted(state.told, REFRESH)
    if is_barred(may):
        return list(memories), state
    due = state.clock.refreshes()

    def take(carry: Roots, inputs: Any) -> Roots:
        weight, first = inputs
        return take_roots(step, carry, weight=weight, first=first)

    carry = Roots(list(memories), state.root_residual, jnp.int32(0))
    found = run_when(due, take, carry, inputs=(state.weight, state.num_refreshes == 0), may=may)
    due &= may
    return found.memories, state._replace(
        root_age=jnp.where(due, 0, state.root_age),
        root_residual=found.residual,
        failures=count_up(state.failures, found.failed),
        num_refreshes=count_up(state.num_refreshes, due),
    )


class _Side(NamedTuple):
    """One side of one kernel: what is decomposed, with what damping, and what is kept of it."""

    factor: Structured
    damping: jax.Array  # (*stack,)
    memory: SideMemory


def take_roots(step: Step, last: Roots, *, weight: jax.Array, first: jax.Array) -> Roots:
    """Take new roots of all kernels.

    Args:
      step: what the leaves are, and how to decompose.
      last: the memories with the roots in use, and the worst residual of these. It stands for each
        leaf that keeps its old roots, because nothing closer is known of it.
      weight: the sum of the moving average's weights.
      first: whether there are no roots yet.
    """
    kernels = {
        i: (leaf, memory)
        for i, (leaf, memory) in enumerate(zip(step.leaves, last.memories, strict=True))
        if isinstance(leaf, Kernel)
    }
    sides = [
        side
        for leaf, memory in kernels.values()
        for side in _sides(step, leaf, memory, weight=weight)
    ]
    found = _decompose(step, sides, first)
    new = list(last.memories)
    if not kernels:
        return Roots(new, jnp.float32(0), jnp.int32(0))
    # Both roots or neither: a new one beside an old one would have the wrong scale.
    pairs = [found[i : i + 2] for i in range(0, len(found), 2)]
    sides_of = [as_vector([side.success for side in pair]) for pair in pairs]
    worst_of = [as_vector([side.residual for side in pair]) for pair in pairs]
    successes = _rows(sides_of, True).all(-1)
    worst = _rows(worst_of, 0.0).max(-1).astype(jnp.float32)
    residual = jnp.max(jnp.where(successes, worst, last.residual))
    failed = jnp.sum(~as_vector(sides_of), dtype=jnp.int32)
    for k, (i, (leaf, memory)) in enumerate(kernels.items()):
        pair, success = pairs[k], successes[k]
        new[i] = _kept(step.spectrum, leaf, memory, pair=pair, success=success, first=first)
    return Roots(new, residual, failed)


def _rows(vectors: Sequence[jax.Array], filling: Any) -> jax.Array:
    """Return vectors as the rows of a matrix, the shorter ones filled up."""
    length = max(vector.size for vector in vectors)
    filled = [
        vector
        if vector.size == length
        else jnp.pad(vector, (0, length - vector.size), constant_values=filling)
        for vector in vectors
    ]
    return jnp.concatenate(filled).reshape(-1, length)


def _sides(
    step: Step, leaf: Kernel, memory: LeafMemory, *, weight: jax.Array
) -> tuple[_Side, _Side]:
    rows, cols = factors_of(leaf, memory, weight)
    row_damping, col_damping = step.spectrum.rule.dampings(rows, cols)
    return _Side(rows, row_damping, memory.rows), _Side(cols, col_damping, memory.cols)


def _decompose(step: Step, sides: Sequence[_Side], first: jax.Array) -> list[Decomposition]:
    """Return what is found for each side, in the shapes of its memory."""
    spectrum = step.spectrum
    requests: dict[int, Any] = {}
    found: dict[int, Decomposition] = {}
    for i, (factor, damping, memory) in enumerate(sides):
        if isinstance(factor, Matrices):
            matrices, last = factor.matrices(), spectrum.last_basis(memory)
            last = None if last is None else last.reshape(matrices.shape)
            requests[i] = (matrices, factor.spread(damping), last)
        elif isinstance(factor, Diagonal):
            exact = spectrum.of_diagonal(factor, damping, memory)
            found[i] = Decomposition(exact, jnp.zeros(()), jnp.bool_(True))
    solve = partial(spectrum.decompose, first=first)
    solved = solve_over(step.spread, solve, list(requests.values()))
    found.update(zip(requests, solved, strict=True))
    return [_shaped(found[i], side.memory) for i, side in enumerate(sides)]


def _shaped(new: Decomposition, memory: SideMemory) -> Decomposition:
    """Return a decomposition with its arrays in the shapes that they rest in."""
    found, kept = (side._replace(factor=NOTHING) for side in (new.found, memory))
    found = jax.tree.map(lambda a, b: a.reshape(b.shape), found, kept)
    return new._replace(found=found._replace(factor=memory.factor))


def _kept(
    spectrum: Spectrum,
    leaf: Kernel,
    memory: LeafMemory,
    *,
    pair: Sequence[Decomposition],
    success: jax.Array,
    first: jax.Array,
) -> LeafMemory:
    """Return the memory with a new pair of roots, or as it was where either failed."""
    sides = zip(pair, memory.sides, strict=True)
    rows, cols = (chosen(success, side.found, old) for side, old in sides)
    after = memory._replace(rows=rows, cols=cols)
    carried = spectrum.carry(leaf, memory, after, first=first)
    return after._replace(eigen_moment=chosen(success, carried, memory.eigen_moment))
