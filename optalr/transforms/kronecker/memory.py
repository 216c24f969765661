"""What the Kronecker form remembers of all leaves, and how a batch is folded into it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.signals.storage import FactorStorage
from optalr.transforms.kronecker import factors
from optalr.transforms.kronecker.leaves import LeafPlan, Source

Leaves = list[Any]


class Memory(NamedTuple):
    """What is remembered, one list entry a leaf; None where a leaf keeps no such thing."""

    row_factors: Leaves
    col_factors: Leaves
    row_roots: Leaves
    col_roots: Leaves
    row_eigenvalues: Leaves
    col_eigenvalues: Leaves
    second_moments: Leaves
    row_bases: Leaves
    col_bases: Leaves


@dataclasses.dataclass(frozen=True)
class Setup:
    """What stays fixed during one update."""

    plans: Sequence[LeafPlan]
    sources: Sequence[Source]
    statistics: str
    spectrum: str
    damping_form: str
    root_method: str
    power: Any
    decay: Any
    damping: jax.Array

    @property
    def exponent(self) -> Any:
        """The power each factor takes: half for Shampoo's statistics."""
        return self.power / 2 if self.statistics == "gradient" else self.power

    def kernels(self) -> list[int]:
        """Indices of the leaves that keep factors."""
        return [i for i, plan in enumerate(self.plans) if plan.treatment == "kronecker"]


def init_memory(plans: Sequence[LeafPlan], dtypes: Sequence[Any], storage: FactorStorage) -> Memory:
    """Return empty factors, and roots that change nothing."""
    memory = Memory(*([None] * len(plans) for _ in Memory._fields))
    for i, (plan, dtype) in enumerate(zip(plans, dtypes, strict=True)):
        if plan.treatment == "diagonal":
            memory.second_moments[i] = jnp.zeros(plan.shape, dtype)
        if plan.treatment != "kronecker":
            continue
        stack = plan.stack
        memory.row_factors[i], memory.col_factors[i] = (
            factors.zeros(side, stack, dtype) for side in plan.sides
        )
        memory.row_roots[i], memory.col_roots[i] = (
            factors.identity(side, stack, dtype) for side in plan.sides
        )
        if storage.keeps_bases:
            memory.row_bases[i], memory.col_bases[i] = (
                None if side.form == "diagonal" else factors.identity(side, stack, dtype)
                for side in plan.sides
            )
        if storage.spectrum != "factored":
            sizes = [side.padded_size for side in plan.sides]
            memory.row_eigenvalues[i], memory.col_eigenvalues[i] = (
                jnp.ones((*stack, size), dtype) for size in sizes
            )
        if storage.spectrum == "measured":
            memory.second_moments[i] = jnp.ones((*stack, *sizes), dtype)
    return memory


def to_matrix(setup: Setup, grads: Sequence[jax.Array], i: int) -> jax.Array:
    """Return the padded matrix view of leaf ``i``, its joint bias included."""
    plan = setup.plans[i]
    assert plan.view is not None
    matrix = plan.view.to_matrix(grads[i])
    if plan.partner is not None:
        axis = -2 if plan.output_side == 1 else -1
        bias = grads[plan.partner].reshape(*plan.stack, -1)
        matrix = jnp.concatenate([matrix, jnp.expand_dims(bias, axis).astype(matrix.dtype)], axis)
    return factors.pad(plan, matrix)


def measure(
    setup: Setup,
    memory: Memory,
    grads: Sequence[jax.Array],
    num_examples: jax.Array,
    started: jax.Array,
) -> tuple[Memory, jax.Array]:
    """Fold one batch into the statistics; tell whether it was finite (if not, nothing changes).

    Second moments in the eigenbases are only measured once there are any (``started``).
    """
    fresh = Memory(*([None] * len(setup.plans) for _ in Memory._fields))
    seen: list[jax.Array] = [jnp.bool_(True)] * len(setup.plans)
    for i, (plan, source) in enumerate(zip(setup.plans, setup.sources, strict=True)):
        if plan.treatment == "diagonal" and source.kind == "diagonal":
            fresh.second_moments[i] = num_examples * jnp.square(grads[i])
        if plan.treatment != "kronecker" or source.kind == "bias":
            continue
        if source.kind == "signals":
            assert source.moments is not None
            pair = factors.signal_statistics(plan, source.moments, plan.partner is not None)
            seen[i] = source.moments.count > 0
        else:
            normalize = setup.statistics == "signals"
            matrix = to_matrix(setup, grads, i)
            matrix = factors.unpad(plan, matrix)
            pair = factors.gradient_statistics(plan, matrix, num_examples, normalize)
        fresh.row_factors[i], fresh.col_factors[i] = pair
        if setup.spectrum == "measured":
            row_unit, col_unit = units(setup, memory, i)
            rotated = rotate(plan, memory, i, to_matrix(setup, grads, i))
            rotated = rotated / jnp.sqrt(row_unit) / jnp.sqrt(col_unit)
            squares = num_examples * jnp.square(rotated)
            fresh.second_moments[i] = jnp.where(started, squares, 0)
    good = all_finite(fresh)

    def blend(i: int, old: Any, new: Any) -> Any:
        if new is None:
            return old
        decay = jnp.asarray(setup.decay, old.dtype)
        blended = decay * old + (1 - decay) * new.astype(old.dtype)
        return jnp.where(good & seen[i], blended, old)

    merged = [
        [blend(i, old, new) for i, (old, new) in enumerate(zip(olds, news, strict=True))]
        for olds, news in zip(memory, fresh, strict=True)
    ]
    return Memory(*merged), good


def all_finite(tree: Any) -> jax.Array:
    """Tell whether every number of a pytree is finite."""
    parts = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(parts).all() if parts else jnp.bool_(True)


def corrected(memory: Memory, i: int, weight: jax.Array) -> factors.Pair:
    """Return the factors of leaf ``i`` without the moving average's start at zero."""
    rows, cols = memory.row_factors[i], memory.col_factors[i]
    assert rows is not None
    assert cols is not None
    scale = 1 / jnp.where(weight > 0, weight, 1)
    return rows * scale.astype(rows.dtype), cols * scale.astype(cols.dtype)


def units(setup: Setup, memory: Memory, i: int) -> factors.Pair:
    """Return the largest eigenvalues of both sides of leaf ``i``, ``(*stack, 1, 1)``.

    Eigenvalues of the Kronecker product, and second moments, are kept relative to their product,
    which itself leaves float32's range for tiny or huge factors.
    """
    return _unit(setup, memory.row_eigenvalues[i]), _unit(setup, memory.col_eigenvalues[i])


def _unit(setup: Setup, values: jax.Array) -> jax.Array:
    largest = jnp.max(values, -1)[..., None, None]
    largest = jnp.where(largest > 0, largest, 1)
    return jnp.sqrt(largest) if setup.statistics == "gradient" else largest


def outer(setup: Setup, memory: Memory, i: int) -> jax.Array:
    """Return the eigenvalues of the Kronecker product in its units, ``(*stack, m, n)``."""
    rows, cols = memory.row_eigenvalues[i][..., :, None], memory.col_eigenvalues[i][..., None, :]
    if setup.statistics == "gradient":
        rows, cols = jnp.sqrt(rows), jnp.sqrt(cols)
    row_unit, col_unit = units(setup, memory, i)
    return (rows / row_unit) * (cols / col_unit)


def rotate(plan: LeafPlan, memory: Memory, i: int, matrix: jax.Array) -> jax.Array:
    """Return the coordinates of a padded matrix in the eigenbases of leaf ``i``."""
    rows = factors.transpose(plan.rows, memory.row_roots[i])
    cols = factors.transpose(plan.cols, memory.col_roots[i])
    return factors.apply_both(plan, rows, cols, matrix)


def evidence(setup: Setup) -> jax.Array:
    """Return how many samples a dimension one batch adds, to the factor that gets the fewest.

    A batch adds N·T samples to the factors of a captured layer, and at most as many directions as
    the shorter side has to those made from a gradient.
    """
    added = []
    for i in setup.kernels():
        plan, source = setup.plans[i], setup.sources[i]
        largest = max([side.block for side in plan.sides if side.form != "diagonal"], default=0)
        if largest == 0 or source.kind == "bias":
            continue
        if source.moments is not None:
            samples = source.moments.count * source.moments.positions
        else:
            samples = min(side.size for side in plan.sides)
        added.append(jnp.asarray(samples, jnp.float32) / largest)
    return jnp.min(jnp.stack(added)) if added else jnp.float32(jnp.inf)
