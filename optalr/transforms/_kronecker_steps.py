"""The three acts of the Kronecker form over all leaves: measure, refresh, apply."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import is_concrete
from optalr.linalg import eigenbasis, inverse_root
from optalr.transforms import _kronecker_factors as factors
from optalr.transforms._kronecker_plan import LeafPlan, Source

# Of an eigendecomposition ‖AQ − QΛ‖_F/‖A‖_F must stay below this, in units of √n ε.
_EIGH_TOLERANCE = 100.0

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


def init_memory(plans: Sequence[LeafPlan], dtypes: Sequence[Any], spectrum: str) -> Memory:
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
        if spectrum != "factored":
            sizes = [side.num_blocks * side.block for side in plan.sides]
            memory.row_eigenvalues[i], memory.col_eigenvalues[i] = (
                jnp.ones((*stack, size), dtype) for size in sizes
            )
        if spectrum == "measured":
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
    setup: Setup, memory: Memory, grads: Sequence[jax.Array], num_examples: jax.Array
) -> tuple[Memory, jax.Array]:
    """Fold one batch into the statistics; tell whether it was finite (if not, nothing changes)."""
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
            rotated = _rotate(plan, memory, i, to_matrix(setup, grads, i))
            fresh.second_moments[i] = num_examples * jnp.square(rotated)
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


class Outcome(NamedTuple):
    """What a batched decomposition gives for each matrix of a stack."""

    matrix: jax.Array  # (k, b, b), the root or the eigenbasis
    values: jax.Array  # (k, b), eigenvalues; of a root ones
    residual: jax.Array  # (k,)
    success: jax.Array  # (k,)


def refresh(
    setup: Setup, memory: Memory, weight: jax.Array, first: jax.Array
) -> tuple[Memory, jax.Array, jax.Array]:
    """Take new roots; return also the worst residual in use and the number of roots that failed."""
    requests, small = [], {}
    for i in setup.kernels():
        if setup.sources[i].kind == "bias":
            continue
        plan = setup.plans[i]
        pair = corrected(memory, i, weight)
        dampings = factors.factor_dampings(plan, *pair, setup.damping, setup.damping_form)
        for which, side in enumerate(plan.sides):
            if side.form == "diagonal":
                small[i, which] = _diagonal_root(setup, pair[which], dampings[which])
                continue
            each = pair[which].reshape(-1, side.block, side.block)
            spread = factors.expand(dampings[which], dampings[which].ndim + 1)
            copies = jnp.broadcast_to(spread, (*plan.stack, side.num_blocks))
            requests.append(((i, which), each, copies.reshape(-1)))
    outcomes = _by_size(requests, lambda a, d: _decompose(setup, a, d))
    results = list(memory)
    rooted = Memory(*(list(leaves) for leaves in results))
    residual, failed = jnp.float32(0), jnp.int32(0)
    for i in sorted({key[0] for key in [*outcomes, *small]}):
        pair = [outcomes.get((i, which)) for which in (0, 1)]
        found = [outcome for outcome in pair if outcome is not None]
        # Both or neither: half a pair would have the wrong scale.
        success = jnp.bool_(True)
        for outcome in found:
            success &= outcome.success.all()
            failed += jnp.sum(~outcome.success, dtype=jnp.int32)
            usable = jnp.where(outcome.success, outcome.residual, 0)
            residual = jnp.maximum(residual, jnp.max(usable).astype(jnp.float32))
        _store(setup, rooted, i, pair, small, success, first)
    return rooted, residual, failed


def _by_size(requests: list[Any], decompose: Callable[..., Outcome]) -> dict[Any, Outcome]:
    """Decompose matrices of equal size and type in one batched call each."""
    groups: dict[Any, list[Any]] = {}
    for request in requests:
        groups.setdefault((request[1].shape[-1], request[1].dtype), []).append(request)
    outcomes = {}
    for group in groups.values():
        matrices = jnp.concatenate([matrix for _, matrix, _ in group])
        dampings = jnp.concatenate([damping for _, _, damping in group])
        whole, start = decompose(matrices, dampings), 0
        for key, matrix, _ in group:
            stop = start + matrix.shape[0]
            outcomes[key] = Outcome(*(part[start:stop] for part in whole))
            start = stop
    return outcomes


def _decompose(setup: Setup, matrices: jax.Array, dampings: jax.Array) -> Outcome:
    ones = jnp.ones(matrices.shape[:-1], matrices.dtype)
    if setup.spectrum == "factored" and is_concrete(setup.exponent) and float(setup.exponent) == 0:
        eye = jnp.broadcast_to(jnp.eye(matrices.shape[-1], dtype=matrices.dtype), matrices.shape)
        return Outcome(eye, ones, jnp.zeros_like(dampings), jnp.ones(dampings.shape, bool))
    if setup.spectrum == "factored":
        result = inverse_root(
            matrices, -1 / setup.exponent, damping=dampings, method=setup.root_method
        )
        return Outcome(result.root, ones, result.residual, result.success)
    basis = eigenbasis(matrices)
    limit = _EIGH_TOLERANCE * jnp.finfo(matrices.dtype).eps * matrices.shape[-1] ** 0.5
    values = jnp.maximum(basis.values, 0)
    # A factor that is zero is no failure: any basis is one of its bases.
    zero = (matrices == 0).all((-2, -1))
    success = (basis.residual <= limit) | zero
    return Outcome(basis.vectors, values, jnp.where(zero, 0, basis.residual), success)


def _diagonal_root(setup: Setup, diagonal: jax.Array, damping: jax.Array) -> jax.Array:
    if setup.spectrum != "factored":
        return diagonal
    spread = factors.expand(damping, diagonal.ndim)
    return factors.damped_power(diagonal, spread, setup.exponent)


def _store(
    setup: Setup,
    rooted: Memory,
    i: int,
    pair: list[Outcome | None],
    small: dict[Any, jax.Array],
    success: jax.Array,
    first: jax.Array,
) -> None:
    """Write the new roots of leaf ``i`` into ``rooted``, keeping the old ones on failure."""
    plan = setup.plans[i]
    old = [rooted.row_roots[i], rooted.col_roots[i]]
    new = list(old)
    values = [rooted.row_eigenvalues[i], rooted.col_eigenvalues[i]]
    for which, outcome in enumerate(pair):
        if outcome is not None:
            new[which] = jnp.where(success, outcome.matrix.reshape(old[which].shape), old[which])
            fresh = outcome.values
        elif setup.spectrum == "factored":
            new[which] = jnp.where(success, small[i, which], old[which])
            continue
        else:
            fresh = small[i, which]
        if setup.spectrum != "factored":
            shaped = factors.flat_values(plan, fresh)
            values[which] = jnp.where(success, shaped, values[which])
    rooted.row_roots[i], rooted.col_roots[i] = new
    rooted.row_eigenvalues[i], rooted.col_eigenvalues[i] = values
    if setup.spectrum == "measured":
        start = _outer(setup, values[0], values[1])
        moved = _move_moment(plan, old, new, rooted.second_moments[i])
        moment = jnp.where(first, start, moved)
        rooted.second_moments[i] = jnp.where(success, moment, rooted.second_moments[i])


def _move_moment(plan: LeafPlan, old: list[Any], new: list[Any], moment: Any) -> jax.Array:
    """Carry a second moment to a new basis: the diagonal of the same matrix seen from there."""
    turns = []
    for side, before, after in zip(plan.sides, old, new, strict=True):
        if side.form == "diagonal":
            turns.append(before)
        else:
            turns.append(jnp.square(jnp.swapaxes(after, -1, -2) @ before))
    return factors.apply_both(plan, turns[0], turns[1], moment)


def _outer(setup: Setup, rows: jax.Array, cols: jax.Array) -> jax.Array:
    """Return the eigenvalues of the Kronecker product, ``(*stack, m, n)``."""
    product = rows[..., :, None] * cols[..., None, :]
    return jnp.sqrt(product) if setup.statistics == "gradient" else product


def _rotate(plan: LeafPlan, memory: Memory, i: int, matrix: jax.Array) -> jax.Array:
    rows = factors.transpose(plan.rows, memory.row_roots[i])
    cols = factors.transpose(plan.cols, memory.col_roots[i])
    return factors.apply_both(plan, rows, cols, matrix)


def apply(
    setup: Setup, memory: Memory, grads: Sequence[jax.Array], weight: jax.Array, ready: jax.Array
) -> list[jax.Array]:
    """Return ``F^p g`` leaf by leaf; the gradient itself until there are roots (``ready``)."""
    updates: list[Any] = list(grads)
    for i, (plan, source) in enumerate(zip(setup.plans, setup.sources, strict=True)):
        if source.kind == "bias":
            assert source.kernel is not None
            updates[i] = _apply_bias(setup, memory, source, grads[i], ready)
        elif plan.treatment == "diagonal":
            moment = memory.second_moments[i]
            assert moment is not None
            scale = (1 / jnp.where(weight > 0, weight, 1)).astype(moment.dtype)
            direction = factors.diagonal_update(
                grads[i], moment * scale, setup.damping, setup.power, setup.damping_form
            )
            updates[i] = jnp.where(ready, direction, grads[i])
        elif plan.treatment == "kronecker":
            matrix = _apply_kernel(setup, memory, i, to_matrix(setup, grads, i), ready)
            _from_matrix(setup, updates, i, factors.unpad(plan, matrix))
    return updates


def _apply_kernel(
    setup: Setup, memory: Memory, i: int, matrix: jax.Array, ready: jax.Array
) -> jax.Array:
    plan = setup.plans[i]
    rows, cols = memory.row_roots[i], memory.col_roots[i]
    assert rows is not None
    assert cols is not None
    if setup.spectrum == "factored":
        return factors.apply_both(plan, rows, cols, matrix)
    values = _outer(setup, memory.row_eigenvalues[i], memory.col_eigenvalues[i])
    if setup.spectrum == "measured":
        values = memory.second_moments[i]
    if setup.damping_form == "relative":
        added = setup.damping * jnp.mean(values, (-2, -1), keepdims=True)
    else:
        added = setup.damping
    gains = factors.damped_power(values, added, setup.power)
    turned = _rotate(plan, memory, i, matrix) * jnp.where(ready, gains, 1)
    return factors.apply_both(plan, rows, cols, turned)


def _apply_bias(
    setup: Setup, memory: Memory, source: Source, grad: jax.Array, ready: jax.Array
) -> jax.Array:
    kernel, which = source.kernel, source.output_side
    assert kernel is not None
    plan = setup.plans[kernel]
    side = plan.sides[which]
    root = (memory.row_roots, memory.col_roots)[which][kernel]
    assert root is not None
    column = grad.reshape(*plan.stack, -1, 1)
    size = column.shape[-2]
    padding = side.num_blocks * side.block - size
    if side.form == "blocks" and padding:
        column = jnp.pad(column, [(0, 0)] * len(plan.stack) + [(0, padding), (0, 0)])
    if setup.spectrum == "factored":
        column = factors.apply_to_rows(side, root, column)
    else:
        values = (memory.row_eigenvalues, memory.col_eigenvalues)[which][kernel]
        added = setup.damping
        if setup.damping_form == "relative":
            added = added * jnp.mean(values, -1, keepdims=True)
        gains = jnp.where(ready, factors.damped_power(values, added, setup.exponent), 1)
        turned = factors.apply_to_rows(side, factors.transpose(side, root), column)
        column = factors.apply_to_rows(side, root, turned * gains[..., :, None])
    return column[..., :size, 0].reshape(grad.shape).astype(grad.dtype)


def _from_matrix(setup: Setup, updates: list[Any], i: int, matrix: jax.Array) -> None:
    """Write the matrix of leaf ``i`` back, and its joint bias to the bias leaf."""
    plan = setup.plans[i]
    assert plan.view is not None
    if plan.partner is not None:
        bias = updates[plan.partner]
        if plan.output_side == 1:
            matrix, last = matrix[..., :-1, :], matrix[..., -1, :]
        else:
            matrix, last = matrix[..., :-1], matrix[..., -1]
        updates[plan.partner] = last.reshape(bias.shape).astype(bias.dtype)
    updates[i] = plan.view.from_matrix(matrix, plan.shape)


def bound(
    setup: Setup,
    memory: Memory,
    weight: jax.Array,
    updates: Sequence[jax.Array],
    max_update: float,
) -> list[jax.Array]:
    """Shrink each leaf's update to move its layer's outputs by ``max_update`` RMS at most."""
    bounded = []
    for i, (plan, source) in enumerate(zip(setup.plans, setup.sources, strict=True)):
        captured = source.kind == "signals"
        units = plan.sides[source.output_side].size if captured else plan.num_outputs
        limit = jnp.asarray(max_update * units**0.5, updates[i].dtype)
        if plan.view is None:
            stack = setup.plans[source.kernel].stack if source.kernel is not None else ()
            matrix = updates[i].reshape(*stack, 1, -1)
            bounded.append(_shrink(matrix, limit).reshape(updates[i].shape))
            continue
        if captured:
            which = 1 - source.output_side
            mean = factors.mean_eigenvalue(plan, which, corrected(memory, i, weight)[which])
            limit = limit * jax.lax.rsqrt(jnp.where(mean > 0, mean, 1))
        matrix = plan.view.to_matrix(updates[i])
        matrix = _shrink(matrix, factors.expand(limit, matrix.ndim if limit.ndim else 0))
        bounded.append(plan.view.from_matrix(matrix, plan.shape))
    return bounded


def _shrink(matrix: jax.Array, limit: jax.Array) -> jax.Array:
    """Scale each matrix of a stack to a Frobenius norm of at most ``limit``."""
    norm = jnp.sqrt(jnp.sum(jnp.square(matrix), (-2, -1), keepdims=True))
    return matrix * jnp.minimum(1, limit / jnp.maximum(norm, jnp.finfo(matrix.dtype).tiny))


def graft(updates: Sequence[jax.Array], others: Sequence[jax.Array]) -> list[jax.Array]:
    """Give each leaf of ``updates`` the norm it has in ``others``."""
    grafted = []
    for update, other in zip(updates, others, strict=True):
        norm, wanted = (jnp.sqrt(jnp.sum(jnp.square(x))) for x in (update, other))
        ratio = wanted / jnp.where(norm > 0, norm, 1)
        grafted.append(update * jnp.where(norm > 0, ratio, 1).astype(update.dtype))
    return grafted


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
