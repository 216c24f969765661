"""Roots of many matrices of different sizes in few batched calls."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optalr.arguments import check_interval
from optalr.linalg import by_size, spd
from optalr.linalg.roots.inverse_root import InverseRoot, each_root
from optalr.linalg.roots.methods import checked_power
from optalr.linalg.roots.stacks import Asked, Manner, solve


def inverse_roots(
    matrices: Sequence[Any],
    p: Any = 2,
    *,
    damping: Any = 0.0,
    method: str = "auto",
    order: int = 3,
    tolerance: Any = None,
    padding: float = 0.0,
) -> list[InverseRoot]:
    """Compute the inverse roots of many matrices, those of equal size in one batched call.

    Choose it over a loop of ``inverse_root`` for the factors of a whole model: it compiles one
    iteration instead of one per matrix. Where a method iterates, its loop runs until the last
    matrix of any size has converged. The stacks exist only during the call.

    Args:
      matrices: each ``(..., n, n)``, of any sizes and leading dimensions.
      p: which root, as for ``inverse_root``.
      damping: one number for all, or a list or tuple with one entry per matrix, each a number or an
        array with the leading dimensions of its matrix.
      method: as for ``inverse_root``, except ``"eigenbasis"``.
      order: as for ``inverse_root``.
      tolerance: as for ``inverse_root``, a number.
      padding: how much a side may grow, relative to its size, to join the batch of a larger
        matrix: 0.1 lets 120 rows join a batch of 128. The added block is a multiple of the
        identity inside the spectrum, so neither the root nor the condition changes. Padding saves
        compilations and kernel launches and costs up to ``(1 + padding)³`` times the flops. That is
        worth it on an accelerator; on a CPU it only saves compile time.

    Returns:
      One ``InverseRoot`` per matrix, in the given order. The residual of a padded matrix is an
      upper bound, at most ``√(1 + padding)`` too high.

    Raises:
      TypeError: as for ``inverse_root``.
      ValueError: as for ``inverse_root``; or the dampings are not as many as the matrices.

    Cost: that of ``inverse_root`` for each size, and copies into and out of the stacks.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import inverse_roots
      >>> small, large = inverse_roots([4 * jnp.eye(3), 16 * jnp.eye(4)], padding=0.5)
      >>> bool(jnp.allclose(small.root, 0.5 * jnp.eye(3))), large.root.shape
      (True, (4, 4))
    """
    check_interval("padding", padding, 0)
    if method == "eigenbasis":
        raise ValueError(
            "method must not be 'eigenbasis' here, which needs a basis a matrix. Call inverse_root."
        )
    arrays = [spd.as_square_stack(f"matrices[{i}]", m) for i, m in enumerate(matrices)]
    dampings = list(damping) if isinstance(damping, (list, tuple)) else [damping] * len(arrays)
    if len(dampings) != len(arrays):
        raise ValueError(
            f"damping must be a number or one a matrix, got {len(dampings)} for {len(arrays)}."
        )
    dampings = [
        spd.broadcast_damping(f"damping[{i}]", each, array).reshape(-1)
        for i, (each, array) in enumerate(zip(dampings, arrays, strict=True))
    ]

    power = checked_power(p, method, order)
    manner = Manner(power, method, order)

    def take(kinds: Sequence[Sequence[Any]]) -> list[InverseRoot]:
        stacks, dampings = (list(parts) for parts in zip(*kinds, strict=True))
        damping = jnp.concatenate(dampings)
        every = functools.partial(jnp.full_like, damping)
        powers = None if power is not None else every(p)
        limits = None if tolerance is None else every(tolerance)
        asked = Asked(stacks, damping, power=powers, tolerance=limits)
        return each_root(solve(asked, manner), stacks)

    sizes = _joined_sizes(arrays, padding)
    stacks = [_padded_stack(array, size) for array, size in zip(arrays, sizes, strict=True)]
    solved = by_size.solve_by_size(take, list(zip(stacks, dampings, strict=True)))
    return [_unpad(result, array.shape) for result, array in zip(solved, arrays, strict=True)]


def _joined_sizes(arrays: Sequence[jax.Array], padding: float) -> list[int]:
    """Return the rows each array is padded to: a size joins the smallest one that is in reach."""
    kept: list[tuple[int, Any]] = []
    sizes = [array.shape[-1] for array in arrays]
    for i in sorted(range(len(arrays)), key=lambda i: -sizes[i]):
        reach = sizes[i] * (1 + padding)
        near = [size for size, dtype in kept if dtype == arrays[i].dtype and size <= reach]
        if near:
            sizes[i] = min(near)
        else:
            kept.append((sizes[i], arrays[i].dtype))
    return sizes


def _padded_stack(matrix: jax.Array, size: int) -> jax.Array:
    """Return ``(k, size, size)``: the matrices, and their mean eigenvalue on the added diagonal."""
    n = matrix.shape[-1]
    stack = matrix.reshape(-1, n, n)
    if size == n:
        return stack
    stack = jnp.pad(stack, ((0, 0), (0, size - n), (0, size - n)))
    added = jnp.diag(jnp.arange(size) >= n).astype(stack.dtype)
    mean = jnp.trace(stack, axis1=-2, axis2=-1) / n
    return stack + spd.column(mean) * added[None]


def _unpad(result: InverseRoot, shape: tuple[int, ...]) -> InverseRoot:
    """Cut a part of a batch down to matrices of ``shape``."""
    n, batch = shape[-1], shape[:-2]
    size = result.root.shape[-1]
    return InverseRoot(
        root=result.root[:, :n, :n].reshape(shape),
        residual=(result.residual * (size / n) ** 0.5).reshape(batch),
        success=result.success.reshape(batch),
        num_steps=result.num_steps.reshape(batch),
        fell_back=result.fell_back.reshape(batch),
    )
