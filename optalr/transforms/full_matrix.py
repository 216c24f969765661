"""Preconditioning by a power of the full second moment of the gradient, over all leaves.

AdaGrad's sum of outer products or RMSProp's moving average, whole (Ida & Fujiwara 2020, eq. 2, 3
and 5). For long vectors the last r gradients stand for it, through their r × r Gram matrix.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_count
from optalr.linalg import lapack
from optalr.states import count_up
from optalr.transforms import _dense_moments as dense


class FullMatrixState(NamedTuple):
    """State of ``scale_by_full_matrix`` without a window, for P parameters."""

    # every update
    count: jax.Array  # () int32
    weight: jax.Array  # () float32, sum of the moving average's weights
    root_age: jax.Array  # () int32, updates since the root was taken
    failures: jax.Array  # () int32, roots kept back and updates not finite
    damping: jax.Array  # () float32
    update_norm: jax.Array  # () float32
    moment: jax.Array  # (P, P) float32
    # every refresh
    root_residual: jax.Array  # () float32
    root: jax.Array  # (P, P) float32


class WindowedState(NamedTuple):
    """State of ``scale_by_full_matrix`` with a window of r gradients."""

    count: jax.Array  # () int32
    num_gradients: jax.Array  # () int32, gradients taken in so far
    failures: jax.Array  # () int32, updates not finite
    damping: jax.Array  # () float32
    update_norm: jax.Array  # () float32
    gram: jax.Array  # (r, r) float32, inner products of the gradients kept
    gradients: Any  # (r, *shape) float32 a leaf; gradient t in row t mod r


def scale_by_full_matrix(
    power: Any = -0.5,
    *,
    decay: Any = 0.95,
    damping: Any = 1e-3,
    damping_form: str = "relative",
    window: int | None = None,
    update_every: Any = 1,
    bias_correction: bool = True,
    max_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale gradients by a power of their full second moment.

    Choose it for models of a few thousand parameters at most, or with ``window`` for longer ones.
    With g all gradients as one vector of P numbers,

        F ← decay·F + (1 − decay) g gᵀ   (``decay=None``: F ← F + g gᵀ),     u = (F + λI)^p g.

    With ``window=r``, F is that of the last r gradients alone, the columns of ``M`` times the root
    of their weights. From ``MᵀM = V diag(s) Vᵀ``,

        u = λ^p g + M V diag(((s + λ)^p − λ^p)/s) Vᵀ Mᵀ g.

    Args:
      power: p, in [−1, 0].
      decay: of the moving average, in [0, 1); None for AdaGrad's sum.
      damping: λ >= 0; a window without damping gives the power of a pseudo-inverse.
      damping_form: ``"relative"`` to the mean eigenvalue (with a window the mean over its at most r
        nonzero ones), or ``"absolute"``.
      window: r, how many gradients to keep, >= 1; None for the whole matrix.
      update_every: updates between roots, >= 1; with a window every update takes one.
      bias_correction: divide out the moving average's start at zero.
      max_size: the largest P accepted without a window.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; it needs no extras.

    Raises:
      ValueError: an argument is out of range; at ``init``, there are more than ``max_size``
        parameters and no window.

    Cost: ``4P²`` flops an update and some ``20 P³`` a refresh, ``2P²`` numbers. With a window
    ``6rP`` flops and ``20 r³`` an update, ``rP + r²`` numbers.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optalr.transforms.full_matrix import scale_by_full_matrix
      >>> tx = scale_by_full_matrix(decay=None, damping=1e-6, window=3)
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> updates, _ = tx.update({"w": jnp.array([30.0, 40.0])}, tx.init(params), params)
      >>> params = optax.apply_updates(params, jax.tree.map(lambda u: -u, updates))
      >>> bool(jnp.allclose(params["w"], jnp.array([2.4, 3.2]), atol=1e-2))  # one unit nearer
      True

    Reference: Yasutoshi Ida and Yasuhiro Fujiwara, "Improving Generalization Performance of
    Adaptive Learning Rate by Switching from Block Diagonal Matrix Preconditioning to SGD", 2020,
    eq. 2, 3 and 5. The window: Naman Agarwal et al., "Efficient Full-Matrix Adaptive
    Regularization", 2019, with any power and damping inside the root.
    """
    rule = dense.Rule(power, decay, damping, damping_form, bias_correction)
    dense.check_update_every(update_every)
    check_count("max_size", max_size)
    if window is None:
        return _whole(rule, update_every, max_size)
    check_count("window", window)
    return _windowed(rule, int(window))


def _whole(rule, update_every, max_size):
    def init_fn(params):
        leaves = jax.tree.leaves(params)
        size = sum(leaf.size for leaf in leaves)
        dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves))
        if size > max_size:
            raise ValueError(
                f"The full matrix of {size:,} parameters would take "
                f"{2 * size**2 * jnp.dtype(dtype).itemsize:,} bytes, and max_size={max_size:,} "
                "parameters are accepted. Use optalr.scale_by_kronecker, whose factors are small, "
                "pass window=, or raise max_size."
            )
        return FullMatrixState(
            count=jnp.zeros([], jnp.int32),
            weight=jnp.zeros([], jnp.float32),
            root_age=jnp.zeros([], jnp.int32),
            failures=jnp.zeros([], jnp.int32),
            damping=jnp.asarray(rule.damping, jnp.float32),
            update_norm=jnp.zeros([], jnp.float32),
            moment=jnp.zeros((size, size), dtype),
            root_residual=jnp.zeros([], jnp.float32),
            root=jnp.eye(size, dtype=dtype),
        )

    def update_fn(updates, state, params=None, **extras):
        del params, extras
        leaves, structure = jax.tree.flatten(updates)
        flat = [leaf.astype(state.moment.dtype).reshape(-1) for leaf in leaves]
        vector = jnp.concatenate([jnp.zeros(0, state.moment.dtype), *flat])
        good = dense.all_finite(vector)

        (moment,) = dense.fold_vectors(rule, [state.moment], [vector], good)
        weight = jnp.where(good, rule.next_weight(state.weight), state.weight)

        age = count_up(state.root_age)
        due = dense.is_due(state.count, age, update_every) & good & bool(leaves)
        (root,), residual, failed = jax.lax.cond(
            due,
            lambda root: dense.take_roots(rule, [moment], [root], weight),
            lambda root: ([root], state.root_residual, jnp.int32(0)),
            state.root,
        )

        new = root @ vector
        safe = dense.all_finite(new)
        new = jnp.where(safe, new, 0)
        ends = [0]
        for leaf in leaves:
            ends.append(ends[-1] + leaf.size)
        parts = [
            new[start:end].reshape(leaf.shape).astype(leaf.dtype)
            for start, end, leaf in zip(ends, ends[1:], leaves, strict=False)
        ]
        return structure.unflatten(parts), FullMatrixState(
            count=count_up(state.count),
            weight=weight,
            root_age=jnp.where(due, 0, age),
            failures=state.failures + failed + (~safe).astype(jnp.int32),
            damping=jnp.asarray(rule.damping, jnp.float32),
            update_norm=dense.global_norm(new),
            moment=moment,
            root_residual=residual,
            root=root,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _windowed(rule, size):
    def init_fn(params):
        return WindowedState(
            count=jnp.zeros([], jnp.int32),
            num_gradients=jnp.zeros([], jnp.int32),
            failures=jnp.zeros([], jnp.int32),
            damping=jnp.asarray(rule.damping, jnp.float32),
            update_norm=jnp.zeros([], jnp.float32),
            gram=jnp.zeros((size, size), jnp.float32),
            gradients=jax.tree.map(
                lambda x: jnp.zeros((size, *x.shape), dense.working_dtype(x)), params
            ),
        )

    def update_fn(updates, state, params=None, **extras):
        del params, extras
        leaves, structure = jax.tree.flatten(updates)
        kept = jax.tree.leaves(state.gradients)
        grads = [x.astype(k.dtype) for x, k in zip(leaves, kept, strict=True)]
        good = dense.all_finite(grads)

        row = state.num_gradients % size
        kept = [jnp.where(good, k.at[row].set(g), k) for k, g in zip(kept, grads, strict=True)]
        products = _inner_products(kept, grads, size)
        gram = state.gram.at[row].set(products).at[:, row].set(products)
        gram = jnp.where(good, gram, state.gram)
        taken = state.num_gradients + good.astype(jnp.int32)

        scales = jnp.sqrt(_weights(rule, taken, size))
        share, coefficients = _coefficients(rule, gram, scales, products)
        new = [
            share.astype(g.dtype) * g + jnp.tensordot(coefficients.astype(g.dtype), k, axes=(0, 0))
            for k, g in zip(kept, grads, strict=True)
        ]
        safe = good & dense.all_finite(new)
        new = [jnp.where(safe, u, 0).astype(x.dtype) for u, x in zip(new, leaves, strict=True)]
        return structure.unflatten(new), WindowedState(
            count=count_up(state.count),
            num_gradients=taken,
            failures=state.failures + (~safe).astype(jnp.int32),
            damping=jnp.asarray(rule.damping, jnp.float32),
            update_norm=dense.global_norm(new),
            gram=gram,
            gradients=structure.unflatten(kept),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _inner_products(kept: list[jax.Array], grads: list[jax.Array], size: int) -> jax.Array:
    """Return the inner products of the kept gradients with the new one, ``(r,)``."""
    total = jnp.zeros(size, jnp.float32)
    for k, g in zip(kept, grads, strict=True):
        total += (k.reshape(size, -1) @ g.reshape(-1)).astype(jnp.float32)
    return total


def _weights(rule: dense.Rule, taken: jax.Array, size: int) -> jax.Array:
    """Return the weight of each row of the window in F, 0 for empty rows."""
    age = jnp.mod(taken - 1 - jnp.arange(size), size)
    filled = age < taken
    if rule.decay is None:
        return filled.astype(jnp.float32)
    decay = jnp.asarray(rule.decay, jnp.float32)
    weights = jnp.where(filled, (1 - decay) * jnp.power(decay, age.astype(jnp.float32)), 0)
    if not rule.bias_correction:
        return weights
    total = jnp.sum(weights)
    return weights / jnp.where(total > 0, total, 1)


def _coefficients(
    rule: dense.Rule, gram: jax.Array, scales: jax.Array, products: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return what of g itself, and what of each kept gradient, makes up ``(F + λI)^p g``."""
    weighted = gram * scales[:, None] * scales[None, :]
    values, vectors = lapack.eigh(weighted)
    values = jnp.maximum(values, 0)
    rank = jnp.maximum(1, jnp.sum(scales > 0)).astype(jnp.float32)
    added = rule.added(jnp.sum(values) / rank)
    power = jnp.asarray(rule.power, jnp.float32)
    # Below this an eigenvalue is rounding, and its direction is not in the window.
    floor = jnp.finfo(jnp.float32).eps * scales.size * jnp.max(values)
    seen = values > floor
    safe = jnp.where(seen, values, 1)
    # Undamped, what is outside the window is left out: a pseudo-inverse.
    share = jnp.where((added > 0) | (power == 0), jnp.power(added, power), 0)
    gains = jnp.where(seen, (jnp.power(safe + added, power) - share) / safe, 0)
    return share, scales * (vectors @ (gains * (vectors.T @ (scales * products))))
