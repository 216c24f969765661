"""The recurrence of MINRES: one step from the last, in vectors and in scalars.

A step hands ``Vectors`` and ``Scalars`` to the next. The rotations need scalars alone, and so do
the decisions to stop, to distrust and to give up. ``_rotate`` makes them all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.linalg.minres.vectors import add, divide, dot, largest, multiply, nonzero, where

# Below this many roundings of ‖A‖ a Lanczos coefficient is noise: the Krylov space is exhausted.
ROUNDINGS = 10
# Below this many roundings of ‖A‖, ‖A r‖/‖r‖ is noise. Found by experiment: with 20, inconsistent
# systems that have an eigenvalue 1e4 times the others went on into noise in float32.
STATIONARY = 100
# The rotation's cosine of a step that gains next to nothing. Noise has cosines above 1e-4.
IDLE = 0.03


class Vectors(NamedTuple):
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
        """The Lanczos vector ``v_j``."""
        return self.dual if self.image is None else self.image


class Scalars(NamedTuple):
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


class State(NamedTuple):
    """What one step hands to the next."""

    vectors: Vectors
    scalars: Scalars


class System(NamedTuple):
    """The products that a step takes, and where it stops."""

    product: Callable[[Any], Any]  # v ↦ (A + λI) v
    preconditioner: Callable[[Any], Any] | None  # r ↦ M r
    limit: jax.Array  # the residual norm at which the run is over


def start(b: Any, preconditioner: Any, dtype: Any) -> State:
    """Return what the first step reads, for the right-hand side ``b``."""
    # Dividing by the largest entry first keeps the squares of tiny and huge entries in range.
    rhs = jax.tree.map(lambda x: x.astype(dtype), b)
    top = largest(rhs)
    unit = divide(rhs, top)
    image, norm = _precondition(preconditioner, unit, b)
    failed = ~(jnp.isfinite(norm) & jnp.isfinite(top)) | (norm < 0)
    norm = jnp.maximum(norm, 0.0)
    dual = divide(unit, norm)
    zeros = jax.tree.map(jnp.zeros_like, rhs)
    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    vectors = Vectors(
        solution=zeros,
        trusted=zeros,
        residual=rhs,
        image=None if preconditioner is None else divide(image, norm),
        dual=dual,
        dual_before=zeros,
        direction=zeros,
        direction_before=zeros,
    )
    scalars = Scalars(
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
    return State(vectors, scalars)


def step(system: System, state: State) -> State:
    """Take one step, or leave all as it was where the run is over."""
    u = system.product(state.vectors.lanczos)
    # The product stays outside: on a CPU a convolution's gradient is slow inside control flow.
    if system.preconditioner is None:
        return _traced_once(u, state, system.limit)
    # A step with a preconditioner cannot share a trace: each update makes a new one, over the
    # arrays of its own trace.
    return _unless_over(u, state, limit=system.limit, preconditioner=system.preconditioner)


@jax.jit
def _traced_once(u: Any, state: State, limit: jax.Array) -> State:
    """Take the rest of a step; all unrolled steps of a program share one trace of it."""
    return _unless_over(u, state, limit=limit, preconditioner=None)


def _unless_over(u: Any, state: State, *, limit: jax.Array, preconditioner: Any) -> State:
    """Take the rest of a step from the product ``u``, unless the run is over."""
    old, was = state

    # With the branch, a run that is over costs its products only. It also keeps the compiler from
    # putting off all updates of the solution to the end, with every direction in memory until then.
    def go() -> State:
        return _advance(u, state, limit=limit, preconditioner=preconditioner)

    def stay() -> State:
        return State(old._replace(dual_before=None, direction_before=None), was)

    new, now = jax.lax.cond(was.done, stay, go)
    # Set outside the branch, where they need no copy.
    return State(new._replace(dual_before=old.dual, direction_before=old.direction), now)


def _advance(u: Any, state: State, *, limit: jax.Array, preconditioner: Any) -> State:
    old, was = state
    # Lanczos: A v_j = β_{j+1} p_{j+1} + α_j p_j + β_j p_{j−1}
    alpha = dot(old.lanczos, u)
    u = jax.tree.map(
        lambda x, p, q: x - alpha * p - was.offdiagonal * q, u, old.dual, old.dual_before
    )
    image, beta = _precondition(preconditioner, u, u)
    now, by = _rotate(was, _Column(alpha, beta), limit)

    direction = jax.tree.map(
        lambda v, d, e: (v - by.rho2 * d - by.rho3 * e) / by.rho1,
        old.lanczos,
        old.direction,
        old.direction_before,
    )
    dual = divide(u, by.beta)
    solution = where(by.active, add(old.solution, by.advance, direction), old.solution)
    residual = jax.tree.map(lambda r, p: by.keep * r + by.gain * p, old.residual, dual)
    vectors = Vectors(
        solution=solution,
        trusted=where(
            now.nonpositive,
            where(was.steps == 0, multiply(solution, -1.0), old.trusted),
            solution,
        ),
        residual=where(by.active, residual, old.residual),
        image=None if preconditioner is None else divide(image, by.beta),
        dual=dual,
        dual_before=None,
        direction=direction,
        direction_before=None,
    )
    return State(vectors, now)


class _Column(NamedTuple):
    """The new column of the Lanczos matrix, from the diagonal down."""

    alpha: jax.Array
    signed_beta: jax.Array  # negative where the preconditioner is not positive


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


def _rotate(was: Scalars, column: _Column, limit: jax.Array) -> tuple[Scalars, _Coefficients]:
    """Return the next scalars, and what the step multiplies its vectors by."""
    alpha, beta = column.alpha, jnp.maximum(column.signed_beta, 0.0)
    # Two old rotations turn the new column of the Lanczos matrix into (ρ₃, ρ₂, δ, β_{j+1}) ...
    rho3 = was.sine_before * was.offdiagonal
    rho2 = was.sine * alpha + was.cosine_before * was.cosine * was.offdiagonal
    delta = was.cosine * alpha - was.cosine_before * was.sine * was.offdiagonal
    # ... and a new one removes β_{j+1}.
    rho1 = nonzero(jnp.hypot(delta, beta))
    cosine, sine = delta / rho1, beta / rho1

    scale = jnp.maximum(was.scale, jnp.hypot(jnp.hypot(alpha, beta), was.offdiagonal))
    # ‖A r‖/‖r‖ of the residual before this step.
    image_ratio = jnp.hypot(delta, was.cosine * beta)
    stationary = _is_stationary(image_ratio, cosine, scale)
    sound = _is_sound(column, rho1, scale)
    active = sound & ~stationary
    residual = jnp.where(active, -sine * was.residual, was.residual)
    exhausted = beta <= ROUNDINGS * jnp.finfo(beta.dtype).eps * scale
    now = Scalars(
        offdiagonal=beta,
        cosine=cosine,
        sine=sine,
        cosine_before=was.cosine,
        sine_before=was.sine,
        residual=residual,
        scale=scale,
        steps=was.steps + active.astype(jnp.int32),
        done=~active | exhausted | (jnp.abs(residual) <= limit),
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
        beta=nonzero(beta),
    )
    return now, by


def _is_stationary(image_ratio: jax.Array, cosine: jax.Array, scale: jax.Array) -> jax.Array:
    """Return whether the residual belongs to a least-squares solution already.

    ``image_ratio`` is ``‖A r‖/‖r‖``. There it is as good as zero, and the next step would divide
    noise by noise. But a large eigenvalue makes it small beside ‖A‖ too. So where it has lost half
    the digits or more, the step must also gain next to nothing: it lowers the residual by the share
    cosine²/2.
    """
    eps = jnp.finfo(scale.dtype).eps
    stationary = image_ratio <= STATIONARY * eps * scale
    return stationary | ((image_ratio <= eps**0.5 * scale) & (jnp.abs(cosine) <= IDLE))


def _is_sound(column: _Column, rho1: jax.Array, scale: jax.Array) -> jax.Array:
    """Return whether all is finite and the preconditioner, up to rounding, positive."""
    eps = jnp.finfo(scale.dtype).eps
    sound = jnp.isfinite(column.alpha) & jnp.isfinite(column.signed_beta) & jnp.isfinite(rho1)
    return sound & (column.signed_beta >= -((ROUNDINGS * eps) ** 0.5) * scale)


def _precondition(preconditioner: Any, r: Any, like: Any) -> tuple[Any, jax.Array]:
    """Return ``M r`` and ``√(rᵀ M r)``, negative (minus the root of minus) where M is not positive.

    In small or large units squares would leave float32's range. So those of r are taken relative to
    its largest entry.
    """
    top = largest(r)
    unit = divide(r, top)
    if preconditioner is None:
        return r, top * jnp.sqrt(dot(unit, unit))
    image = preconditioner(unit)
    check_like(image, like, "preconditioner")
    image = jax.tree.map(lambda x, y: x.astype(y.dtype), image, r)
    square = dot(unit, image)
    return multiply(image, top), top * jnp.sign(square) * jnp.sqrt(jnp.abs(square))


def check_like(tree: Any, like: Any, name: str) -> None:
    """Raise unless two pytrees have the same structure, and their leaves the same shapes."""
    got, expected = jax.tree.structure(tree), jax.tree.structure(like)
    if got != expected:
        raise ValueError(f"{name} must keep the structure of b, {expected}; it returned {got}.")
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f"{name} must keep the shapes of b: it returned {jnp.shape(x)} for {jnp.shape(y)}."
            )
