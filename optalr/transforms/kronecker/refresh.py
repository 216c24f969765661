"""Refreshing: new roots or eigenbases where they are due, all factors of a size in one call."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.arrays import as_vector
from optalr.clocks import REFRESH, REPAIR, chosen, is_barred, permitted, run_when
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
      missed: () int32, these and those for which an eigendecomposition stood in.
    """

    memories: list[LeafMemory]
    residual: jax.Array
    failed: jax.Array
    missed: jax.Array


def refresh(step: Step, memories: Sequence[LeafMemory], state: Any) -> tuple[list[LeafMemory], Any]:
    """Take new roots where they are due.

    An eigendecomposition beside each iteration would be most of a program for accelerators, and is
    hardly ever needed. So a program that is told what it may do has it where ``REPAIR`` says so:
    after a refresh in which an iteration missed its tolerance. The root that missed was not used.
    """
    state = state._replace(root_age=count_up(state.root_age))
    may = permitted(state.told, REFRESH)
    if is_barred(may):
        return list(memories), state
    due = state.clock.refreshes()

    def take(carry: Roots, inputs: Any) -> Roots:
        weight, first = inputs
        return take_roots(step, carry, weight=weight, first=first, repairs=repairs)

    # Where the clock is asked on the device, the program holds all that may be needed.
    repairs = not is_barred(permitted(state.told, REPAIR))
    carry = Roots(list(memories), state.root_residual, jnp.int32(0), state.missed)
    found = run_when(due, take, carry, inputs=(state.weight, state.num_refreshes == 0), may=may)
    due &= may
    return found.memories, state._replace(
        root_age=jnp.where(due, 0, state.root_age),
        root_residual=found.residual,
        failures=count_up(state.failures, found.failed),
        missed=found.missed,
        num_refreshes=count_up(state.num_refreshes, due),
    )


class _Side(NamedTuple):
    """One side of one kernel: what is decomposed, with what damping, and what is kept of it.

    The factor lacks what all have in common: the correction of their moving average.
    """

    factor: Structured
    damping: jax.Array  # (layers,), an entry for each of the stack axes
    memory: SideMemory


def take_roots(
    step: Step, last: Roots, *, weight: jax.Array, first: jax.Array, repairs: bool
) -> Roots:
    """Take new roots of all kernels.

    Args:
      step: what the leaves are, and how to decompose.
      last: the memories with the roots in use, and the worst residual of these. It stands for each
        leaf that keeps its old roots, because nothing closer is known of it.
      weight: the sum of the moving average's weights.
      first: whether there are no roots yet.
      repairs: whether an eigendecomposition stands in where an iteration misses.
    """
    kernels = {
        i: (leaf, memory)
        for i, (leaf, memory) in enumerate(zip(step.leaves, last.memories, strict=True))
        if isinstance(leaf, Kernel)
    }
    if not kernels:
        return Roots(list(last.memories), jnp.float32(0), jnp.int32(0), jnp.int32(0))
    # The moving average is corrected for its start at zero.
    scale = 1 / jnp.where(weight > 0, weight, 1)
    sides = _sides(step, list(kernels.values()), scale=scale)
    found = _decompose(step, sides, scale=scale, first=first, repairs=repairs)
    new = list(last.memories)
    # Both roots or neither: a new one beside an old one would have the wrong scale.
    pairs = [found[i : i + 2] for i in range(0, len(found), 2)]
    errors = as_vector([side.error for side in found])
    worst = jnp.max(errors[_places(pairs)], -1).astype(jnp.float32)
    successes = jnp.isfinite(worst)
    residual = jnp.max(jnp.where(successes, worst, last.residual))
    failed = jnp.sum(~jnp.isfinite(errors), dtype=jnp.int32)
    fell_back = [side.fell_back for side in found if side.fell_back is not None]
    missed = failed
    if fell_back:
        missed += jnp.sum(as_vector(fell_back), dtype=jnp.int32)
    for k, (i, (leaf, memory)) in enumerate(kernels.items()):
        pair, success = pairs[k], successes[k]
        new[i] = _kept(step.spectrum, leaf, memory, pair=pair, success=success, first=first)
    return Roots(new, residual, failed, missed)


def _places(pairs: Sequence[Sequence[Decomposition]]) -> np.ndarray:
    """Return where each kernel's matrices are among all, a row each; short rows repeat one."""
    ends = np.cumsum([sum(side.error.size for side in pair) for pair in pairs])
    spans = [np.arange(a, b, dtype=np.uint32) for a, b in itertools.pairwise([0, *ends])]
    length = max(map(len, spans))
    return np.stack([np.resize(span, length) for span in spans])


def _sides(
    step: Step, kernels: Sequence[tuple[Kernel, LeafMemory]], *, scale: jax.Array
) -> list[_Side]:
    """Return both sides of every kernel, one after the other."""
    factors = [factors_of(leaf, memory) for leaf, memory in kernels]
    dampings = step.spectrum.rule.dampings(factors, scale)
    return [
        _Side(*side)
        for pair, added, (_, memory) in zip(factors, dampings, kernels, strict=True)
        for side in zip(pair, added, memory.sides, strict=True)
    ]


def _decompose(
    step: Step, sides: Sequence[_Side], *, scale: jax.Array, first: jax.Array, repairs: bool
) -> list[Decomposition]:
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
            added = damping.reshape(factor.stack)
            exact = spectrum.of_diagonal(factor.scaled(scale), added, memory)
            found[i] = Decomposition(exact, jnp.zeros(1))
    solve = partial(spectrum.decompose, scale=scale, first=first, repairs=repairs)
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
