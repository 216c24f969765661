"""SWATS as Keskar & Socher print it in Algorithm 1."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_interval
from optalr.arrays import moving_average, wide_dtype
from optalr.clocks import chosen
from optalr.states import count_up
from optalr.transforms.published.precision import real_dtype
from optalr.transforms.shared.lengths import value_at
from optalr.transforms.shared.making import transformation


class PublishedSwatsState(NamedTuple):
    """State of ``scale_by_published_swats``; scalars in float32, float64 beside such parameters."""

    count: jax.Array  # () int32, k
    moment: Any  # m_k; after the switch SGD's velocity v_k; like the parameters
    second_moment: Any  # a_k, like the parameters
    projected_rate: jax.Array  # (), λ_k, its bias not corrected
    second_rate: jax.Array  # (), Λ; 0 before the switch
    learning_rate: jax.Array  # () float32, the rate of the last update
    phase: jax.Array  # () float32, of the next update: 0 Adam, 1 SGD
    steps_since_switch: jax.Array  # () int32


def scale_by_published_swats(
    learning_rate: Any = 1e-3,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-9,
) -> optax.GradientTransformationExtraArgs:
    """Run Adam until its projected rate agrees with its mean, then SGD at that rate.

    Choose it through ``optalr.paper.swats``.
    """
    check_interval("learning_rate", learning_rate, 0.0)
    check_interval("b1", b1, 0.0, 1.0, open_high=True)
    check_interval("b2", b2, 0.0, 1.0, open_high=True)
    check_interval("eps", eps, 0.0)
    rule = _Algorithm(learning_rate, b1, b2, eps)
    return transformation("paper.swats", rule.init, rule.update)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by jit: settings may be arrays
class _Algorithm:
    """Algorithm 1 for one choice of arguments."""

    learning_rate: Any
    b1: Any
    b2: Any
    eps: Any

    def init(self, params: Any) -> PublishedSwatsState:
        def zeros() -> Any:  # buffers of their own, so that states can be donated
            return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p)), params)

        kind = real_dtype(params)
        first = jnp.asarray(value_at(self.learning_rate, jnp.zeros((), jnp.int32)))
        return PublishedSwatsState(
            count=jnp.zeros((), jnp.int32),
            moment=zeros(),
            second_moment=zeros(),
            projected_rate=jnp.zeros((), kind),
            second_rate=jnp.zeros((), kind),
            learning_rate=jnp.array(first, jnp.float32),
            phase=jnp.zeros((), jnp.float32),
            steps_since_switch=jnp.zeros((), jnp.int32),
        )

    def update(self, updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        del params, extras
        g = jax.tree.map(lambda u, m: u.astype(m.dtype), updates, state.moment)
        state = state._replace(count=count_up(state.count))
        step, state = chosen(state.phase < 1, self._adam(g, state), self._sgd(g, state))
        return jax.tree.map(lambda s, u: s.astype(u.dtype), step, updates), state

    def _adam(self, g: Any, state: Any) -> Any:
        """Return the step and the state of the phase Adam."""
        kind = state.projected_rate.dtype
        b1, b2, eps = (jnp.asarray(x, kind) for x in (self.b1, self.b2, self.eps))
        k = state.count.astype(kind)
        m = jax.tree.map(lambda m, g: moving_average(m, g, b1), state.moment, g)
        squares = jax.tree.map(jnp.square, g)
        a = jax.tree.map(lambda a, s: moving_average(a, s, b2), state.second_moment, squares)
        rate = jnp.asarray(value_at(self.learning_rate, state.count - 1)).astype(kind)
        corrected = rate * jnp.sqrt(1 - b2**k) / (1 - b1**k)
        p = jax.tree.map(lambda m, a: -corrected * m / (jnp.sqrt(a) + eps), m, a)

        projection = _inner(p, g)
        defined = projection != 0
        gamma = _inner(p, p) / jnp.where(defined, -projection, 1)
        averaged = moving_average(state.projected_rate, gamma, b2)
        mean = jnp.where(defined, averaged, state.projected_rate)
        second_rate = mean / (1 - b2**k)
        settled = defined & (state.count > 1) & (jnp.abs(second_rate - gamma) < eps)
        return p, state._replace(
            moment=jax.tree.map(lambda m: jnp.where(settled, 0, m), m),  # v_k = 0
            second_moment=a,
            projected_rate=mean,
            second_rate=jnp.where(settled, second_rate, 0),
            learning_rate=rate.astype(jnp.float32),
            phase=settled.astype(jnp.float32),
        )

    def _sgd(self, g: Any, state: Any) -> Any:
        """Return the step and the state of the phase SGD."""
        b1 = jnp.asarray(self.b1, state.second_rate.dtype)
        v = jax.tree.map(lambda v, g: b1 * v + g, state.moment, g)
        p = jax.tree.map(lambda v: -(1 - b1) * state.second_rate * v, v)
        return p, state._replace(
            moment=v,
            learning_rate=state.second_rate.astype(jnp.float32),
            steps_since_switch=count_up(state.steps_since_switch),
        )


def _inner(a: Any, b: Any) -> jax.Array:
    """Return the inner product of two trees."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return jax.tree.reduce(jnp.add, products, jnp.zeros((), jnp.float32))
