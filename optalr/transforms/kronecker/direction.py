"""Applying the power to all leaves, and keeping the update within bounds."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optalr.transforms.kronecker import factors
from optalr.transforms.kronecker import memory as store
from optalr.transforms.kronecker.leaves import Source


def apply(
    setup: store.Setup,
    memory: store.Memory,
    grads: Sequence[jax.Array],
    weight: jax.Array,
    ready: jax.Array,
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
            matrix = _apply_kernel(setup, memory, i, store.to_matrix(setup, grads, i), ready)
            _from_matrix(setup, updates, i, factors.unpad(plan, matrix))
    return updates


def _apply_kernel(
    setup: store.Setup, memory: store.Memory, i: int, matrix: jax.Array, ready: jax.Array
) -> jax.Array:
    plan = setup.plans[i]
    rows, cols = memory.row_roots[i], memory.col_roots[i]
    assert rows is not None
    assert cols is not None
    if setup.spectrum == "factored":
        return factors.apply_both(plan, rows, cols, matrix)
    turned = store.rotate(plan, memory, i, matrix)
    for gains in _gains(setup, memory, i):
        turned = turned * jnp.where(ready, gains, 1)
    return factors.apply_both(plan, rows, cols, turned)


def _gains(setup: store.Setup, memory: store.Memory, i: int) -> list[jax.Array]:
    """Return three arrays whose product, which may leave float32's range, is ``(v + λ)^p``."""
    row_unit, col_unit = store.units(setup, memory, i)
    values = memory.second_moments[i]
    if setup.spectrum == "exact":
        values = store.outer(setup, memory, i)
    if setup.damping_form == "relative":
        added = setup.damping * jnp.mean(values, (-2, -1), keepdims=True)
    else:
        # An absolute damping far above all eigenvalues is the unit itself.
        added = setup.damping / row_unit
        larger = jnp.maximum(col_unit, added)
        values, added = values * (col_unit / larger), added / larger
        col_unit = larger
    powers = [
        jnp.power(unit, jnp.asarray(setup.power, unit.dtype)) for unit in (row_unit, col_unit)
    ]
    return [factors.damped_power(values, added, setup.power), *powers]


def _apply_bias(
    setup: store.Setup, memory: store.Memory, source: Source, grad: jax.Array, ready: jax.Array
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


def _from_matrix(setup: store.Setup, updates: list[Any], i: int, matrix: jax.Array) -> None:
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
    setup: store.Setup,
    memory: store.Memory,
    weight: jax.Array,
    updates: Sequence[jax.Array],
    max_update: float,
) -> list[jax.Array]:
    """Shrink each leaf's update to move its layer's outputs by ``max_update`` RMS at most."""
    bounded = []
    for i, (plan, source) in enumerate(zip(setup.plans, setup.sources, strict=True)):
        captured = source.kind == "signals"
        layer = plan if source.kernel is None else setup.plans[source.kernel]
        known = captured or source.kernel is not None
        units = layer.sides[source.output_side].size if known else plan.num_outputs
        limit = jnp.asarray(max_update * units**0.5, updates[i].dtype)
        if plan.view is None or source.kernel is not None:
            matrix = updates[i].reshape(*layer.stack, 1, -1)
            bounded.append(_shrink(matrix, limit).reshape(updates[i].shape))
            continue
        if captured:
            which = 1 - source.output_side
            mean = factors.mean_eigenvalue(plan, which, store.corrected(memory, i, weight)[which])
            limit = limit * jax.lax.rsqrt(jnp.where(mean > 0, mean, 1))
        matrix = plan.view.to_matrix(updates[i])
        matrix = _shrink(matrix, factors.expand(limit, matrix.ndim if limit.ndim else 0))
        bounded.append(plan.view.from_matrix(matrix, plan.shape))
    return bounded


def _shrink(matrix: jax.Array, limit: jax.Array) -> jax.Array:
    """Scale each matrix of a stack to a Frobenius norm of at most ``limit``."""
    small, norm, largest = factors.scaled(matrix)
    return jnp.where(
        norm * largest <= limit, matrix, small * (limit / jnp.where(norm == 0, 1, norm))
    )


def graft(updates: Sequence[jax.Array], others: Sequence[jax.Array]) -> list[jax.Array]:
    """Give each leaf of ``updates`` the norm it has in ``others``."""
    grafted = []
    for update, other in zip(updates, others, strict=True):
        small, norm, _ = factors.scaled(update.reshape(1, -1))
        wanted = factors.norm(other).astype(update.dtype)
        turned = small * (wanted / jnp.where(norm == 0, 1, norm))
        grafted.append(turned.reshape(update.shape))
    return grafted
