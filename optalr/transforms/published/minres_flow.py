"""EDF's Algorithms 1 and 2, and its two accelerations, as they are printed but for one erratum.

"Exponentially decaying flows for optimization in deep learning", appendix A and eq. 25.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import SUPPLY, check_choice, check_count, check_interval, require_extra
from optalr.arrays import wide_dtype
from optalr.linalg.minres.vectors import add, dot, multiply
from optalr.states import count_up
from optalr.transforms.shared.making import transformation
from optalr.transforms.shared.subtrees import restrict

_NAME = "paper.edf"
_REMEDY = SUPPLY.format(loss="optalr.composite_loss(predict_fn, output_loss)")


class MinresFlowState(NamedTuple):
    """State of ``scale_by_minres_flow``; both change with every update."""

    count: jax.Array  # () int32, updates so far
    damping: jax.Array  # () float32, λ of the last solve; before, 0


class FrictionState(NamedTuple):
    """State of ``accelerate_by_vanishing_friction``."""

    count: jax.Array  # () int32, k
    velocity: Any  # w_k − w_{k−1}, like the parameters, float32 or wider


def scale_by_minres_flow(
    *, curvature: str = "gauss_newton", num_steps: int = 1, damping: tuple[Any, Any] = (1.0, 1.0)
) -> optax.GradientTransformationExtraArgs:
    """Replace the gradient by k steps of MINRES, without any guard.

    Choose it through ``optalr.paper.edf``.
    """
    check_choice("curvature", curvature, ("gauss_newton", "hessian"))
    check_count("num_steps", num_steps)
    if not isinstance(damping, tuple | list) or len(damping) != 2:
        raise TypeError(f"damping must be a pair (a, b) for λ = a ‖∇‖^b, got {damping!r}.")
    a, b = damping
    check_interval("damping", a, 0.0)
    check_interval("damping", b, 0.0)
    solve = _algorithm_2 if num_steps == 1 else _algorithm_1

    def init_fn(params: Any) -> MinresFlowState:
        del params
        return MinresFlowState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        del params
        remedy = _REMEDY if curvature == "gauss_newton" else ""
        product = require_extra(extras, curvature, _NAME, remedy)
        updates, point = jax.tree.map(jnp.asarray, (updates, extras.get("point")))
        if not jax.tree.leaves(updates):
            return updates, state._replace(count=count_up(state.count))
        g = jax.tree.map(lambda u: u.astype(wide_dtype(u)), updates)
        restricted = restrict(product, updates, point)

        def matvec(v: Any) -> Any:
            return jax.tree.map(lambda x, y: x.astype(y.dtype), restricted(v), v)

        s = jnp.sqrt(dot(g, g))
        shift = jnp.asarray(a, s.dtype) * s ** jnp.asarray(b, s.dtype)
        v = solve(matvec, g, num_steps=num_steps, shift=shift, norm=s)
        new = jax.tree.map(lambda x, u: x.astype(u.dtype), v, updates)
        return new, MinresFlowState(count_up(state.count), shift.astype(jnp.float32))

    return transformation(_NAME, init_fn, update_fn, holds=MinresFlowState)


def _algorithm_2(matvec: Callable[[Any], Any], g: Any, *, shift: jax.Array, **others: Any) -> Any:
    """Return ``c g`` with ``c = ⟨g, u⟩/⟨u, u⟩`` and ``u = A g + λ g``."""
    del others
    u = add(matvec(g), shift, g)
    return multiply(g, dot(g, u) / dot(u, u))


class _Solve(NamedTuple):
    """The variables of Algorithm 1, by its letters, between two turns of its loop."""

    v: Any
    v0: Any
    v1: Any
    q0: Any
    q1: Any
    beta: Any
    xi: Any
    gamma: tuple[Any, Any]
    sigma: tuple[Any, Any]


def _algorithm_1(
    matvec: Callable[[Any], Any], g: Any, *, num_steps: int, shift: jax.Array, norm: jax.Array
) -> Any:
    """Return the k-th iterate of MINRES from zero for ``(A + λI) v = g``."""
    zeros = jax.tree.map(jnp.zeros_like, g)
    one, zero = jnp.ones_like(norm), jnp.zeros_like(norm)
    now = _Solve(zeros, zeros, g, zeros, zeros, norm, norm, (one, one), (zero, zero))
    for _ in range(num_steps):
        now = _turn(matvec, now, shift)
    return now.v


def _turn(matvec: Callable[[Any], Any], now: _Solve, shift: jax.Array) -> _Solve:
    """Do what stands in the loop of Algorithm 1."""
    (gamma0, gamma1), (sigma0, sigma1), beta = now.gamma, now.sigma, now.beta
    v1 = multiply(now.v1, 1 / beta)
    u = add(matvec(v1), shift, v1)  # printed: u + λg
    alpha = dot(v1, u)
    u = add(add(u, -alpha, v1), -beta, now.v0)
    delta = gamma1 * alpha - gamma0 * sigma1 * beta
    rho2 = sigma1 * alpha + gamma0 * gamma1 * beta
    rho3 = sigma0 * beta
    beta = jnp.sqrt(dot(u, u))
    rho1 = jnp.sqrt(delta**2 + beta**2)
    gamma, sigma = (gamma1, delta / rho1), (sigma1, beta / rho1)
    q1 = multiply(add(add(v1, -rho2, now.q1), -rho3, now.q0), 1 / rho1)
    v = add(now.v, gamma[1] * now.xi, q1)
    return _Solve(v, v1, u, now.q1, q1, beta, -sigma[1] * now.xi, gamma, sigma)


def accelerate_by_vanishing_friction(
    friction: float = 3.0,
) -> optax.GradientTransformationExtraArgs:
    """Add Nesterov's velocity with friction α/t to finished updates, without any guard.

    Choose it through ``optalr.paper.edf(acceleration="W2")``.
    """
    check_interval("friction", friction, 0.0, open_low=True)

    def init_fn(params: Any) -> FrictionState:
        velocity = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p)), params)
        return FrictionState(jnp.zeros((), jnp.int32), velocity)

    def weight(k: jax.Array, dtype: Any) -> jax.Array:
        k = jnp.maximum(k, 1).astype(dtype)
        return (k - 1) / (k + jnp.asarray(friction, dtype) - 1)

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        del params, extras
        count = count_up(state.count)

        # w_k − w_{k−1} = u_k + (y_{k−1} − w_{k−1}), and the last update added the bracket.
        def moved(u: jax.Array, m: jax.Array) -> jax.Array:
            return weight(state.count, jnp.finfo(m.dtype).dtype) * m + u.astype(m.dtype)

        def shown(u: jax.Array, m: jax.Array) -> jax.Array:
            share = weight(count, jnp.finfo(m.dtype).dtype)
            return (u.astype(m.dtype) + share * m).astype(u.dtype)

        velocity = jax.tree.map(moved, updates, state.velocity)
        return jax.tree.map(shown, updates, velocity), FrictionState(count, velocity)

    return transformation(_NAME, init_fn, update_fn)


# The two frictions of eq. 25, by the names of the paper.
ACCELERATIONS: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {"W1": lambda: optax.trace(0.9), "W2": accelerate_by_vanishing_friction}
)
