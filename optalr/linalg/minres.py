"""MINRES: the minimum residual method for symmetric systems, on pytrees.

After ``k`` steps the iterate minimizes ``‖b − (A + λI) x‖`` over the Krylov space
``span{b, Ab, …, A^{k−1}b}``. ``A`` is known by its products only, and may be indefinite or
singular. The Lanczos recurrence and the Givens rotations are those of Paige & Saunders; memory is
a fixed number of vectors whatever ``k`` is.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_count, check_interval, is_concrete

# Below this many roundings of ‖A‖ a Lanczos coefficient is noise and the Krylov space exhausted.
_ROUNDINGS = 10


class MinresResult(NamedTuple):
    """What ``minres`` returns.

    Attributes:
      solution: the last iterate, with the structure, shapes and dtypes of ``b``.
      residual_norms: ``(num_steps + 1,)``, float32 or wider: ``‖b‖``, then the norm of the residual
        after each step. It never increases; after an early stop it repeats its last value. With
        a preconditioner M the norm is ``√(rᵀ M r)``.
      residual: the residual vector ``b − (A + λI) x`` of ``solution``, by recurrence, at no further
        product; float32 or wider.
      trusted: ``solution`` if no direction of nonpositive curvature showed up, else the last
        iterate before it; if that was in the first step, the first iterate ``c b`` with the
        absolute value of ``c``. Always ``trustedᵀ b ≥ 0``.
      num_steps: int32, the steps that changed the solution.
      nonpositive_curvature: bool, whether ``rᵀ (A + λI) r ≤ 0`` for a residual r met on the way.
      failed: bool, whether a product or ``b`` was not finite, or the preconditioner not positive;
        ``solution`` is then the last finite iterate.
    """

    solution: Any
    residual_norms: jax.Array
    residual: Any
    trusted: Any
    num_steps: jax.Array
    nonpositive_curvature: jax.Array
    failed: jax.Array


class _Vectors(NamedTuple):
    """The vectors that one step reads and writes."""

    solution: Any
    trusted: Any
    residual: Any
    image: Any  # v_j = M p_j; None without a preconditioner, where v_j = p_j
    dual: Any  # p_j, in the residual's space; pᵀ v = 1
    dual_before: Any
    direction: Any
    direction_before: Any

    @property
    def lanczos(self) -> Any:
        return self.dual if self.image is None else self.image


class _Scalars(NamedTuple):
    """The scalars that one step reads and writes."""

    offdiagonal: jax.Array  # β_j of the Lanczos matrix; 0 at the start, where v_0 = 0
    cosine: jax.Array  # last rotation
    sine: jax.Array
    cosine_before: jax.Array  # the rotation before it
    sine_before: jax.Array
    residual: jax.Array  # signed norm of the residual
    scale: jax.Array  # lower bound on ‖A + λI‖: the largest column of the Lanczos matrix so far
    steps: jax.Array
    done: jax.Array
    nonpositive: jax.Array
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
    monotonically there, too, and on an inconsistent system it ends in a least-squares solution.

    The steps are unrolled. A run that is over early (residual ≤ ``tol·‖b‖``, Krylov space
    exhausted, least-squares solution reached) keeps its solution while the remaining steps go on
    without effect, so the number of steps can depend on the data without a second compilation; the
    remaining products still cost their time.

    Args:
      matvec: ``v ↦ A v``, linear and symmetric. It gets and returns the structure, shapes and
        dtypes of ``b``; everything else is computed in float32 or wider.
      b: right-hand side, a pytree of real floating arrays.
      num_steps: steps, a Python int of at least 1.
      damping: λ, added to the diagonal; any finite number, may be traced.
      tol: stop where ``‖r‖ ≤ tol ‖b‖``; in [0, 1), may be traced. Whatever it is, steps within
        rounding of the end are not taken, nor steps past a least-squares solution, where
        ``‖(A + λI) r‖ ≤ √ε ‖A + λI‖ ‖r‖``.
      preconditioner: ``r ↦ M r`` with ``M ≈ (A + λI)⁻¹`` linear, symmetric and positive definite,
        on trees in the dtype of the internal computation.

    Returns:
      A ``MinresResult``. For ``b = 0`` the solution is zero.

    Raises:
      TypeError: ``b`` is not floating and real, or ``num_steps`` not a Python int.
      ValueError: an argument lies outside its range, or ``matvec`` changes structure or shapes.

    Cost:
      A step is one product with ``A``, at most one with ``M``, some ten passes over the vectors.
      Memory: about ten vectors besides ``b`` and those of ``matvec``, whatever ``num_steps`` is.

    Examples:
      >>> import jax.numpy as jnp
      >>> A = jnp.array([[2.0, 1.0], [1.0, -3.0]])
      >>> result = minres(lambda v: A @ v, jnp.array([1.0, 4.0]), num_steps=2)
      >>> bool(jnp.allclose(result.solution, jnp.array([1.0, -1.0]), atol=1e-5))
      True

    Reference:
      Paige & Saunders, "Solution of sparse indefinite systems of linear equations", SIAM Journal on
      Numerical Analysis 12(4), 1975. Algorithm 1 of "Exponentially decaying flows for optimization
      in deep learning" adds ``λg`` to the product, which must be λ times the Lanczos vector.
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
    product = _shifted_product(matvec, b, jnp.asarray(damping, dtype), dtype)
    floor = jnp.maximum(jnp.asarray(tol, dtype), _ROUNDINGS * jnp.finfo(dtype).eps)

    vectors, scalars = _start(b, preconditioner, dtype)
    norms = [scalars.residual]
    for _ in range(num_steps):
        vectors, scalars = _step(product, preconditioner, floor, norms[0], vectors, scalars)
        norms.append(jnp.abs(scalars.residual))
    return MinresResult(
        solution=_cast_like(vectors.solution, b),
        residual_norms=jnp.stack(norms),
        residual=vectors.residual,
        trusted=_cast_like(vectors.trusted, b),
        num_steps=scalars.steps,
        nonpositive_curvature=scalars.nonpositive,
        failed=scalars.failed,
    )


def minres_step(matvec: Callable[[Any], Any], b: Any, *, damping: Any = 0.0) -> MinresResult:
    """Take one MINRES step from zero in closed form.

    The iterate is ``c b`` with ``c = ⟨b, u⟩/⟨u, u⟩`` and ``u = (A + λI) b``: what ``minres`` gives
    for ``num_steps=1``, with fewer passes over the vectors and no rounding in a rotation.

    Args:
      matvec: ``v ↦ A v``, symmetric.
      b: right-hand side, a pytree of real floating arrays.
      damping: λ, may be traced.

    Returns:
      A ``MinresResult`` with two residual norms; its solution is zero where ``u`` is.

    Reference:
      "Exponentially decaying flows for optimization in deep learning", Algorithm 2.
    """
    dtype = _internal_dtype(b)
    rhs = jax.tree.map(lambda x: x.astype(dtype), b)
    top = _largest(rhs)
    unit = _divide(rhs, top)
    u = _shifted_product(matvec, b, jnp.asarray(damping, dtype), dtype)(unit)
    size = _largest(u)
    u = _divide(u, size)  # both at most one, so that no square leaves the range
    along, norm2, square = _dot(unit, u), _dot(unit, unit), _dot(u, u)
    failed = ~(jnp.isfinite(top) & jnp.isfinite(size) & jnp.isfinite(along))
    zero = jnp.zeros((), dtype)
    factor = jnp.where(failed, zero, along / _nonzero(square))
    norms = top * jnp.sqrt(jnp.stack([norm2, jnp.maximum(norm2 - factor * along, 0.0)]))
    c = jnp.where(failed, zero, factor / _nonzero(size))

    def times(c: jax.Array) -> Any:
        return _cast_like(_where(c == 0, jax.tree.map(jnp.zeros_like, rhs), _scale(rhs, c)), b)

    return MinresResult(
        solution=times(c),
        residual_norms=norms,
        residual=jax.tree.map(lambda x, v: x - factor * top * v, rhs, u),
        trusted=times(jnp.abs(c)),
        num_steps=(c != 0).astype(jnp.int32),
        nonpositive_curvature=~failed & (square > 0) & (along <= 0),
        failed=failed,
    )


def _shifted_product(matvec: Any, b: Any, shift: jax.Array, dtype: Any) -> Callable[[Any], Any]:
    """Return ``v ↦ A v + λ v``, the product in the dtypes of ``b`` and the rest in ``dtype``."""

    def product(v: Any) -> Any:
        av = matvec(_cast_like(v, b))
        _check_like(av, b, "matvec")
        return jax.tree.map(lambda a, x: a.astype(dtype) + shift * x, av, v)

    return product


def _start(b: Any, preconditioner: Any, dtype: Any) -> tuple[_Vectors, _Scalars]:
    # Dividing by the largest entry first keeps the squares of tiny and huge entries in range.
    rhs = jax.tree.map(lambda x: x.astype(dtype), b)
    top = _largest(rhs)
    unit = _divide(rhs, top)
    image, norm2 = _precondition(preconditioner, unit, b)
    failed = ~(jnp.isfinite(norm2) & jnp.isfinite(top)) | (norm2 < 0)
    norm = jnp.sqrt(jnp.maximum(norm2, 0.0))
    dual = _divide(unit, norm)
    zeros = jax.tree.map(jnp.zeros_like, rhs)
    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    vectors = _Vectors(
        solution=zeros,
        trusted=zeros,
        residual=rhs,
        image=None if preconditioner is None else _divide(image, norm),
        dual=dual,
        dual_before=zeros,
        direction=zeros,
        direction_before=zeros,
    )
    scalars = _Scalars(
        offdiagonal=zero,
        cosine=one,
        sine=zero,
        cosine_before=one,
        sine_before=zero,
        residual=top * norm,
        scale=zero,
        steps=jnp.zeros((), jnp.int32),
        done=failed | (norm == 0),
        nonpositive=jnp.zeros((), bool),
        failed=failed,
    )
    return vectors, scalars


class _Coefficients(NamedTuple):
    """What one step multiplies its vectors by."""

    active: jax.Array
    rho1: jax.Array
    rho2: jax.Array
    rho3: jax.Array
    advance: jax.Array  # along the new direction
    keep: jax.Array  # of the old residual
    gain: jax.Array  # of the new Lanczos vector in the residual
    beta: jax.Array


def _step(
    product: Any, preconditioner: Any, floor: Any, norm: Any, old: _Vectors, was: _Scalars
) -> tuple[_Vectors, _Scalars]:
    u = product(old.lanczos)
    # The product stays outside: on a CPU a convolution's gradient is slow inside control flow.
    return _unless_over(preconditioner, u, floor, norm, old, was)


@functools.partial(jax.jit, static_argnums=0)
def _unless_over(
    preconditioner: Any, u: Any, floor: Any, norm: Any, old: _Vectors, was: _Scalars
) -> tuple[_Vectors, _Scalars]:
    # The branch makes a run that is over cost its products only, and it keeps the compiler from
    # putting off all updates of the solution to the end, with every direction alive until then.
    def go() -> tuple[_Vectors, _Scalars]:
        return _advance(u, preconditioner, floor, norm, old, was)

    def stay() -> tuple[_Vectors, _Scalars]:
        return old._replace(dual_before=None, direction_before=None), was

    new, now = jax.lax.cond(was.done, stay, go)
    return new._replace(dual_before=old.dual, direction_before=old.direction), now


def _advance(
    u: Any, preconditioner: Any, floor: Any, norm: Any, old: _Vectors, was: _Scalars
) -> tuple[_Vectors, _Scalars]:
    # Lanczos: A v_j = β_{j+1} p_{j+1} + α_j p_j + β_j p_{j−1}
    alpha = _dot(old.lanczos, u)
    u = jax.tree.map(
        lambda x, p, q: x - alpha * p - was.offdiagonal * q, u, old.dual, old.dual_before
    )
    image, beta2 = _precondition(preconditioner, u, u)
    now, by = _rotate(was, alpha, beta2, floor, norm)

    direction = jax.tree.map(
        lambda v, d, e: (v - by.rho2 * d - by.rho3 * e) / by.rho1,
        old.lanczos,
        old.direction,
        old.direction_before,
    )
    dual = _divide(u, by.beta)
    solution = _where(by.active, _add(old.solution, by.advance, direction), old.solution)
    residual = jax.tree.map(lambda r, p: by.keep * r + by.gain * p, old.residual, dual)
    return _Vectors(
        solution=solution,
        trusted=_where(
            now.nonpositive,
            _where(was.steps == 0, _scale(solution, -1.0), old.trusted),
            solution,
        ),
        residual=_where(by.active, residual, old.residual),
        image=None if preconditioner is None else _divide(image, by.beta),
        dual=dual,
        dual_before=None,
        direction=direction,
        direction_before=None,
    ), now


def _rotate(
    was: _Scalars, alpha: Any, beta2: Any, floor: Any, norm: Any
) -> tuple[_Scalars, _Coefficients]:
    beta = jnp.sqrt(jnp.maximum(beta2, 0.0))
    # Two old rotations turn the new column of the Lanczos matrix into (ρ₃, ρ₂, δ, β_{j+1}) ...
    rho3 = was.sine_before * was.offdiagonal
    rho2 = was.sine * alpha + was.cosine_before * was.cosine * was.offdiagonal
    delta = was.cosine * alpha - was.cosine_before * was.sine * was.offdiagonal
    # ... and a new one removes β_{j+1}.
    rho1 = _nonzero(jnp.hypot(delta, beta))
    cosine, sine = delta / rho1, beta / rho1

    scale = jnp.maximum(was.scale, jnp.hypot(jnp.hypot(alpha, beta), was.offdiagonal))
    rounding = _ROUNDINGS * jnp.finfo(beta.dtype).eps * scale
    # ‖A r‖/‖r‖ of the residual before this step: nearly zero where it is a least-squares solution
    # already. Half the digits, because the next step would divide noise by that number.
    stationary = jnp.hypot(delta, was.cosine * beta) <= jnp.finfo(beta.dtype).eps ** 0.5 * scale
    sound = jnp.isfinite(alpha) & jnp.isfinite(beta2) & jnp.isfinite(rho1)
    sound &= beta2 >= -rounding * scale
    active = sound & ~stationary
    residual = jnp.where(active, -sine * was.residual, was.residual)
    now = _Scalars(
        offdiagonal=beta,
        cosine=cosine,
        sine=sine,
        cosine_before=was.cosine,
        sine_before=was.sine,
        residual=residual,
        scale=scale,
        steps=was.steps + active.astype(jnp.int32),
        done=~active | (beta <= rounding) | (jnp.abs(residual) <= floor * norm),
        nonpositive=was.nonpositive | (active & (was.cosine * delta <= 0)),
        failed=was.failed | ~sound,
    )
    by = _Coefficients(
        active=active,
        rho1=rho1,
        rho2=rho2,
        rho3=rho3,
        advance=cosine * was.residual,
        keep=sine**2,
        gain=cosine * residual,
        beta=_nonzero(beta),
    )
    return now, by


def _precondition(preconditioner: Any, r: Any, like: Any) -> tuple[Any, jax.Array]:
    """Return ``M r`` and ``rᵀ M r``."""
    if preconditioner is None:
        return r, _dot(r, r)
    image = preconditioner(r)
    _check_like(image, like, "preconditioner")
    image = jax.tree.map(lambda x, y: x.astype(y.dtype), image, r)
    return image, _dot(r, image)


def _internal_dtype(b: Any) -> Any:
    leaves = jax.tree.leaves(b)
    if not leaves:
        raise ValueError("b has no leaves: pass a pytree with at least one array.")
    for leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"b must hold real floating arrays, got one of {jnp.result_type(leaf)}. Cast it, "
                "or leave integer leaves out."
            )
    return jnp.result_type(jnp.float32, *leaves)


def _check_like(tree: Any, like: Any, name: str) -> None:
    got, expected = jax.tree.structure(tree), jax.tree.structure(like)
    if got != expected:
        raise ValueError(f"{name} must keep the structure of b, {expected}; it returned {got}.")
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f"{name} must keep the shapes of b: it returned {jnp.shape(x)} for {jnp.shape(y)}."
            )


def _dot(x: Any, y: Any) -> jax.Array:
    products = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), x, y))
    return jnp.sum(jnp.stack(products))


def _largest(tree: Any) -> jax.Array:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]))


def _scale(tree: Any, factor: Any) -> Any:
    return jax.tree.map(lambda x: factor * x, tree)


def _divide(tree: Any, by: jax.Array) -> Any:
    return jax.tree.map(lambda x: x / _nonzero(by), tree)


def _add(x: Any, factor: jax.Array, y: Any) -> Any:
    return jax.tree.map(lambda a, b: a + factor * b, x, y)


def _where(condition: jax.Array, x: Any, y: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def _cast_like(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)


def _nonzero(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, jnp.ones_like(x), x)
