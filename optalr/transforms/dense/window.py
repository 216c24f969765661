"""The second moment of the last r gradients, without forming the matrix.

A power of ``M Mᵀ``, for r columns ``M``, follows from their r × r Gram matrix ``MᵀM`` (Agarwal et
al. 2019). ``scale_by_full_matrix``, which takes the window, documents the recurrence.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arrays import all_finite, wide_dtype
from optalr.linalg import spd
from optalr.linalg.roots.decompositions import eigh
from optalr.states import count_up, unboxed
from optalr.transforms.dense.second_moment import SecondMoment, working_dtype
from optalr.transforms.shared.gradient_watch import GradientWatch, admit, start_gradient_watch
from optalr.transforms.shared.lengths import length
from optalr.transforms.shared.making import transformation


class WindowedState(NamedTuple):
    """State of ``scale_by_full_matrix`` with a window of r gradients."""

    # every update
    count: jax.Array  # () int32, updates so far
    num_gradients: jax.Array  # () int32, gradients taken in so far
    failures: jax.Array  # () int32, gradients not finite or out of proportion
    watch: GradientWatch  # what is remembered of the gradients' lengths
    damping: jax.Array  # () float32, λ as it was given
    update_norm: jax.Array  # () float32, of all leaves together
    gram: jax.Array  # (r, r) float32, or float64 where a leaf is: products of the gradients kept
    gradients: Any  # (r, *shape) float32 (float64 of such leaves) a leaf; gradient t in row t mod r


class Window(NamedTuple):
    """The gradients that are kept, after one more."""

    gradients: list[jax.Array]  # (r, *shape), one for each leaf
    gram: jax.Array  # (r, r), their inner products
    taken: jax.Array  # () int32, gradients taken in so far
    products: jax.Array  # (r,), the inner products with the new gradient
    good: jax.Array  # () bool, whether the new one is finite; if not, it was not taken in


def scale_by_window(
    rule: SecondMoment, size: int, *, max_size: int
) -> optax.GradientTransformationExtraArgs:
    """Return ``scale_by_full_matrix`` with a window of ``size`` gradients."""

    def init_fn(params: Any) -> WindowedState:
        _refuse_large(jax.tree.leaves(params), size, max_size)
        return _first_state(params, size, rule.damping)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extras: Any
    ) -> tuple[Any, WindowedState]:
        del params, extras
        given = admit(updates, state.watch)
        leaves, structure = jax.tree.flatten(given.updates)
        kept = jax.tree.leaves(state.gradients)
        grads = [x.astype(k.dtype) for x, k in zip(leaves, kept, strict=True)]

        # Measure.
        window = _take_in(state, kept, grads, usable=~given.bad)

        # Refresh.
        scales = jnp.sqrt(_weights(rule, window.taken, window.gram))
        share, coefficients = _coefficients(rule, window, scales)

        # Apply.
        new = [
            share.astype(g.dtype) * g
            + spd.matmul(coefficients.astype(g.dtype), k.reshape(size, g.size)).reshape(g.shape)
            for k, g in zip(window.gradients, grads, strict=True)
        ]
        safe = window.good & all_finite(new)
        new = [jnp.where(safe, u, 0).astype(x.dtype) for u, x in zip(new, leaves, strict=True)]
        return structure.unflatten(new), WindowedState(
            count=count_up(state.count),
            num_gradients=window.taken,
            failures=count_up(state.failures, given.failed | ~safe),
            watch=given.watch,
            damping=jnp.asarray(rule.damping, jnp.float32),
            update_norm=length(new),
            gram=window.gram,
            gradients=jax.tree.unflatten(jax.tree.structure(unboxed(updates)), window.gradients),
        )

    return transformation("scale_by_full_matrix", init_fn, update_fn, on_auto=True)


def _first_state(params: Any, size: int, damping: Any) -> WindowedState:
    """Return the state before the first update, an empty window."""
    return WindowedState(
        count=jnp.zeros([], jnp.int32),
        num_gradients=jnp.zeros([], jnp.int32),
        failures=jnp.zeros([], jnp.int32),
        watch=start_gradient_watch(),
        damping=jnp.array(damping, jnp.float32),
        update_norm=jnp.zeros([], jnp.float32),
        gram=jnp.zeros((size, size), working_dtype(jax.tree.leaves(params))),
        gradients=jax.tree.map(
            # Stacked copies of zeros like the leaf, so that they are sharded as that is.
            lambda x: jnp.stack([jnp.zeros_like(x, dtype=wide_dtype(x))] * size),
            unboxed(params),
        ),
    )


def _take_in(
    state: WindowedState, kept: list[jax.Array], grads: list[jax.Array], *, usable: jax.Array
) -> Window:
    """Return the window after one more gradient, which takes the place of the oldest."""
    row = state.num_gradients % state.gram.shape[0]
    filled = [k.at[row].set(g) for k, g in zip(kept, grads, strict=True)]
    products = _inner_products(filled, grads, state.gram)
    gram = state.gram.at[row].set(products).at[:, row].set(products)
    # No inner product exceeds the trace, the sum of all squares.
    good = usable & jnp.isfinite(jnp.trace(gram))
    return Window(
        gradients=[jnp.where(good, new, old) for new, old in zip(filled, kept, strict=True)],
        gram=jnp.where(good, gram, state.gram),
        taken=_before_overflow(state.num_gradients, state.gram.shape[0]) + good.astype(jnp.int32),
        products=products,
        good=good,
    )


def _refuse_large(leaves: list[Any], size: int, max_size: int) -> None:
    """Raise if a window takes more than ``2·max_size²`` numbers."""
    count = sum(leaf.size for leaf in leaves)
    if size * (count + size) <= 2 * max_size**2:
        return
    itemsize = jnp.dtype(working_dtype(leaves)).itemsize
    needed = size**2 * itemsize
    needed += sum(size * x.size * jnp.dtype(wide_dtype(x)).itemsize for x in leaves)
    raise ValueError(
        f"window={size:,} gradients of {count:,} parameters would take {needed:,} bytes, and "
        f"max_size={max_size:,} accepts {2 * max_size**2 * itemsize:,}. Pass a smaller window=, "
        "use optalr.scale_by_kronecker, whose factors are small, or raise max_size."
    )


def _before_overflow(taken: jax.Array, size: int) -> jax.Array:
    """Return a count that has room for one more, the same modulo the size of the window.

    A count that stops at its end would overwrite one gradient of a full window for ever.
    """
    end = jnp.iinfo(taken.dtype).max
    return jnp.where(taken == end, taken - (end // size - 1) * size, taken)


def _inner_products(kept: list[jax.Array], grads: list[jax.Array], gram: jax.Array) -> jax.Array:
    """Return the inner products of the kept gradients with the new one, ``(r,)``."""
    total = jnp.zeros(gram.shape[0], gram.dtype)
    for k, g in zip(kept, grads, strict=True):
        rows, column = k.reshape(gram.shape[0], g.size), g.reshape(-1)
        total += spd.matmul(rows.astype(gram.dtype), column.astype(gram.dtype))
    return total


def _weights(rule: SecondMoment, taken: jax.Array, gram: jax.Array) -> jax.Array:
    """Return the weight of each row of the window in F, 0 for empty rows."""
    size, dtype = gram.shape[0], gram.dtype
    age = jnp.mod(taken - 1 - jnp.arange(size), size)
    filled = age < taken
    if rule.decay is None:
        return filled.astype(dtype)
    decay = jnp.asarray(rule.decay, dtype)
    weights = jnp.where(filled, (1 - decay) * jnp.power(decay, age.astype(dtype)), 0)
    if not rule.bias_correction:
        return weights
    total = jnp.sum(weights)
    return weights / jnp.where(total > 0, total, 1)


def _coefficients(
    rule: SecondMoment, window: Window, scales: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return how much of g itself, and of each kept gradient, makes up ``(F + λI)^p g``."""
    gram = window.gram
    weighted = gram * scales[:, None] * scales[None, :]
    values, vectors = eigh(weighted)
    values = jnp.maximum(values, 0)
    rank = jnp.maximum(1, jnp.sum(scales > 0)).astype(gram.dtype)
    added = rule.added(jnp.sum(values) / rank)
    power = jnp.asarray(rule.power, gram.dtype)
    # Below this an eigenvalue is rounding, and its direction is not in the window.
    floor = jnp.finfo(gram.dtype).eps * scales.size * jnp.max(values)
    seen = values > floor
    safe = jnp.where(seen, values, 1)
    # Without damping, directions outside the window are left out: the power of a pseudo-inverse.
    share = jnp.where((added > 0) | (power == 0), jnp.power(added, power), 0)
    gains = jnp.where(seen, jnp.power(safe + added, power) - share, 0)
    # The products are divided by the eigenvalues first: gains/s underflows for large gradients.
    turned = spd.matmul(vectors.T, scales * window.products) / safe
    return share, scales * spd.matmul(vectors, gains * turned)
