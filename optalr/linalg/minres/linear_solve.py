"""MINRES: the minimum residual method for symmetric systems, on pytrees.

After ``k`` steps the iterate minimizes ``‖b − (A + λI) x‖`` over the Krylov space
``span{b, Ab, …, A^{k−1}b}``. ``A`` is known by its products only, and may be indefinite or
singular. The Lanczos recurrence and the Givens rotations are those of Paige & Saunders. Memory is a
fixed number of vectors, whatever ``k`` is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_count, check_interval, is_concrete
from optalr.arrays import wide_dtype
from optalr.linalg.minres.recurrence import ROUNDINGS, System, check_like, start, step
from optalr.linalg.minres.vectors import cast_like, divide, dot, largest, multiply, nonzero, where


class MinresResult(NamedTuple):
    """What ``minres`` returns.

    Attributes:
      solution: the last iterate, with the structure, shapes and dtypes of ``b``.
      residual_norms: ``(num_steps + 1,)``, float32 or wider: ``‖b‖``, then the norm of the residual
        after each step. It never increases. After an early stop it repeats its last value. With
        a preconditioner M the norm is ``√(rᵀ M r)``.
      residual: the residual vector ``b − (A + λI) x`` of ``solution``, by the recurrence, without
        a further product; float32 or wider.
      trusted: ``solution`` if no direction of nonpositive curvature appeared, else the last iterate
        before one did. If one appeared in the first step, it is the first iterate ``c b`` with the
        absolute value of ``c``. Always ``trustedᵀ b ≥ 0``.
      num_steps: int32, the steps that changed the solution.
      nonpositive_curvature: bool, whether ``rᵀ (A + λI) r ≤ 0`` for a residual r on the way.
      failed: bool, whether a product or ``b`` was not finite, or the preconditioner not positive.
        ``solution`` is then the last finite iterate.
    """

    solution: Any
    residual_norms: jax.Array
    residual: Any
    trusted: Any
    num_steps: jax.Array
    nonpositive_curvature: jax.Array
    failed: jax.Array


def minres(
    matvec: Callable[[Any], Any],
    b: Any,
    *,
    num_steps: int,
    damping: Any = 0.0,
    tol: Any = 0.0,
    preconditioner: Callable[[Any], Any] | None = None,
) -> MinresResult:
    """Solve ``(A + λI) x = b`` for a symmetric ``A`` by ``num_steps`` steps from zero.

    Choose it over conjugate gradients where ``A`` may be indefinite or singular: its residual falls
    monotonically there too, and on an inconsistent system it ends in a least-squares solution.

    The steps are unrolled. A run may be over early, where the residual is ≤ ``tol·‖b‖``, the Krylov
    space is exhausted or a least-squares solution is reached. It then keeps its solution, and the
    remaining steps have no effect. So the number of steps can depend on the data without a second
    compilation, but the remaining products still cost their time.

    Args:
      matvec: ``v ↦ A v``, linear and symmetric. It gets and returns the structure, shapes and
        dtypes of ``b``. Everything else is computed in float32 or wider.
      b: right-hand side, a pytree of real floating arrays.
      num_steps: steps, a Python int of at least 1.
      damping: λ, added to the diagonal: any finite number; it may be traced.
      tol: in [0, 1); it may be traced. The run is over where ``‖r‖ ≤ tol ‖b‖``. Whatever tol is, no
        step is taken within rounding of the end or past a least-squares solution. Such a solution
        is reached where ``‖(A + λI) r‖ ≤ √ε ‖A + λI‖ ‖r‖`` and the next step would lower ‖r‖ by
        less than 0.05 %, or where ``‖(A + λI) r‖`` is below a hundred roundings.
      preconditioner: ``r ↦ M r`` with ``M ≈ (A + λI)⁻¹`` linear, symmetric and positive definite,
        on trees in the dtype of the internal computation.

    Returns:
      A ``MinresResult``. For ``b = 0`` the solution is zero.

    Raises:
      TypeError: ``b`` is not floating and real, or ``num_steps`` not a Python int.
      ValueError: an argument lies outside its range, or ``matvec`` changes structure or shapes.

    Cost:
      A step takes one product with ``A``, at most one with ``M``, and some ten passes over the
      vectors. Memory: about ten vectors besides ``b`` and those of ``matvec``, whatever
      ``num_steps`` is.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import minres
      >>> A = jnp.array([[2.0, 1.0], [1.0, -3.0]])
      >>> result = minres(lambda v: A @ v, jnp.array([1.0, 4.0]), num_steps=2)
      >>> bool(jnp.allclose(result.solution, jnp.array([1.0, -1.0]), atol=1e-5))
      True

    Reference:
      Paige & Saunders, "Solution of sparse indefinite systems of linear equations", SIAM Journal on
      Numerical Analysis 12(4), 1975. Algorithm 1 of "Exponentially decaying flows for optimization
      in deep learning" adds ``λg`` to the product; right is λ times the Lanczos vector, as here.
      Nonpositive curvature: Liu & Roosta, "MINRES: from negative curvature detection to
      monotonicity properties", SIAM Journal on Optimization 32(4), 2022.
    """
    if not isinstance(num_steps, int) or isinstance(num_steps, bool):
        raise TypeError(
            f"num_steps must be a Python int, got {num_steps!r}: the steps are unrolled. Make it a "
            "static argument of jit, or bound it and stop early with tol."
        )
    check_count("num_steps", num_steps)
    check_interval("tol", tol, 0.0, 1.0, open_high=True)
    if is_concrete(damping):
        check_interval("damping", damping, open_low=True, open_high=True)
    dtype = _internal_dtype(b)
    product = _shifted_product(matvec, b, damping=jnp.asarray(damping, dtype))
    floor = jnp.maximum(jnp.asarray(tol, dtype), ROUNDINGS * jnp.finfo(dtype).eps)

    state = start(b, preconditioner, dtype)
    norms = [state.scalars.residual]
    system = System(product, preconditioner, limit=floor * norms[0])
    for _ in range(num_steps):
        state = step(system, state)
        norms.append(jnp.abs(state.scalars.residual))
    vectors, scalars = state
    return MinresResult(
        solution=cast_like(vectors.solution, b),
        residual_norms=jnp.stack(norms),
        residual=vectors.residual,
        trusted=cast_like(vectors.trusted, b),
        num_steps=scalars.steps,
        nonpositive_curvature=scalars.nonpositive,
        failed=scalars.failed,
    )


def minres_step(matvec: Callable[[Any], Any], b: Any, *, damping: Any = 0.0) -> MinresResult:
    """Take one MINRES step from zero in closed form.

    Choose it over ``minres`` with ``num_steps=1``: it returns the same iterate with fewer passes
    over the vectors, and no rotation rounds. The iterate is ``c b`` with ``c = ⟨b, u⟩/⟨u, u⟩`` and
    ``u = (A + λI) b``.

    Args:
      matvec: ``v ↦ A v``, symmetric.
      b: right-hand side, a pytree of real floating arrays.
      damping: λ, added to the diagonal; it may be traced.

    Returns:
      A ``MinresResult`` with two residual norms. Its solution is zero where ``u`` is.

    Raises:
      TypeError: ``b`` is not floating and real.
      ValueError: ``matvec`` changes structure or shapes.

    Cost: one product with ``A`` and a few passes over the vectors.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import minres_step
      >>> result = minres_step(lambda v: jnp.array([1.0, 2.0]) * v, jnp.ones(2))
      >>> bool(jnp.allclose(result.solution, 0.6))  # A b = (1, 2), so c = 3/5
      True

    Reference:
      "Exponentially decaying flows for optimization in deep learning", Algorithm 2.
    """
    dtype = _internal_dtype(b)
    rhs = jax.tree.map(lambda x: x.astype(dtype), b)
    top = largest(rhs)
    unit = divide(rhs, top)
    u = _shifted_product(matvec, b, damping=jnp.asarray(damping, dtype))(unit)
    size = largest(u)
    u = divide(u, size)  # now both are at most one, so that no square leaves the range
    along, norm2, square = dot(unit, u), dot(unit, unit), dot(u, u)
    failed = ~(jnp.isfinite(top) & jnp.isfinite(size) & jnp.isfinite(along))
    zero = jnp.zeros((), dtype)
    factor = jnp.where(failed, zero, along / nonzero(square))
    norms = top * jnp.sqrt(jnp.stack([norm2, jnp.maximum(norm2 - factor * along, 0.0)]))
    c = jnp.where(failed, zero, factor / nonzero(size))

    def times(c: jax.Array) -> Any:
        return cast_like(where(c == 0, jax.tree.map(jnp.zeros_like, rhs), multiply(rhs, c)), b)

    return MinresResult(
        solution=times(c),
        residual_norms=norms,
        residual=jax.tree.map(lambda x, v: x - factor * top * v, rhs, u),
        trusted=times(jnp.abs(c)),
        num_steps=(c != 0).astype(jnp.int32),
        nonpositive_curvature=~failed & (square > 0) & (along <= 0),
        failed=failed,
    )


def _shifted_product(matvec: Any, b: Any, *, damping: jax.Array) -> Callable[[Any], Any]:
    """Return ``v ↦ A v + λ v``, the product in the dtypes of ``b``, the rest in that of λ."""

    def product(v: Any) -> Any:
        av = matvec(cast_like(v, b))
        check_like(av, b, "matvec")
        return jax.tree.map(lambda a, x: a.astype(damping.dtype) + damping * x, av, v)

    return product


def _internal_dtype(b: Any) -> Any:
    """Return the dtype to compute in; raise if ``b`` is no pytree of real floating arrays."""
    leaves = jax.tree.leaves(b)
    if not leaves:
        raise ValueError("b has no leaves: pass a pytree with at least one array.")
    for leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"b must hold real floating arrays, got one of {jnp.result_type(leaf)}. Cast it, "
                "or leave integer leaves out."
            )
    return wide_dtype(*leaves)
