"""Preconditioning by a power of the full second moment of the gradient, over all leaves.

AdaGrad's sum of outer products or RMSProp's moving average, whole (Ida & Fujiwara 2020, eq. 2, 3
and 5). For long vectors the last r gradients stand for it, through their r × r Gram matrix.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_count
from optalr.arrays import all_finite, wide_dtype
from optalr.linalg import lapack
from optalr.states import count_up
from optalr.transforms.dense import moments as dense


class FullMatrixState(NamedTuple):
    """State of ``scale_by_full_matrix`` without a window, for P parameters."""

    # every update
    count: jax.Array  # () int32
    weight: jax.Array  # () float32, sum of the moving average's weights
    root_age: jax.Array  # () int32, updates since a root was last due, taken or kept back
    failures: jax.Array  # () int32, roots kept back and updates not finite
    damping: jax.Array  # () float32
    update_norm: jax.Array  # () float32
    moment: jax.Array  # (P, P) float32, or float64 where a leaf is
    # every refresh
    root_residual: jax.Array  # () float32, of the root in use
    root: jax.Array  # (P, P), as the moment


class WindowedState(NamedTuple):
    """State of ``scale_by_full_matrix`` with a window of r gradients."""

    count: jax.Array  # () int32
    num_gradients: jax.Array  # () int32, gradients taken in so far
    failures: jax.Array  # () int32, updates not finite
    damping: jax.Array  # () float32
    update_norm: jax.Array  # () float32
    gram: jax.Array  # (r, r) float32, or float64 where a leaf is: products of the gradients kept
    gradients: Any  # (r, *shape) float32 (float64 of such leaves) a leaf; gradient t in row t mod r


def scale_by_full_matrix(
    power: Any = -0.5,
    *,
    decay: Any = 0.95,
    damping: Any = 1e-3,
    damping_form: str = "relative",
    window: int | None = None,
    update_every: Any = 1,
    bias_correction: bool = True,
    max_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale gradients by a power of their full second moment.

    Choose it for models of a few thousand parameters at most, or with ``window`` for longer ones.
    With g all gradients as one vector of P numbers,

        F ← decay·F + (1 − decay) g gᵀ   (``decay=None``: F ← F + g gᵀ),     u = (F + λI)^p g.

    With ``window=r``, F is that of the last r gradients alone, the columns of ``M`` times the root
    of their weights. From ``MᵀM = V diag(s) Vᵀ``,

        u = λ^p g + M V diag(((s + λ)^p − λ^p)/s) Vᵀ Mᵀ g.

    A gradient that is not finite, or too large for g gᵀ to be, is not taken in; its update is 0.

    Args:
      power: p, in [−1, 0].
      decay: of the moving average, in [0, 1); None for AdaGrad's sum.
      damping: λ >= 0; a window without damping gives the power of a pseudo-inverse.
      damping_form: ``"relative"`` to the mean eigenvalue (with a window the mean over its at most r
        nonzero ones), or ``"absolute"``.
      window: r, how many gradients to keep, >= 1; None for the whole matrix.
      update_every: updates between roots, >= 1; with a window every update takes one.
      bias_correction: divide out the moving average's start at zero.
      max_size: the state may take ``2·max_size²`` numbers: the largest P without a window is this.
        None for 4096, and with a window for 16384 (537 million numbers, 2 GiB in float32).

    Returns:
      An ``optax.GradientTransformationExtraArgs``; it needs no extras.

    Raises:
      ValueError: an argument is out of range; at ``init``, the matrix or the window would be larger
        than ``max_size`` says.

    Cost: ``4P²`` flops an update and some ``20 P³`` a refresh, ``2P²`` numbers. With a window
    ``6rP`` flops and ``20 r³`` an update, ``rP + r²`` numbers.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optalr.transforms.dense.full_matrix import scale_by_full_matrix
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
    if max_size is None:
        max_size = _MAX_SIZE if window is None else _MAX_SIZE_WINDOWED
    check_count("max_size", max_size)
    if window is None:
        return _whole(rule, update_every, max_size)
    check_count("window", window)
    return _windowed(rule, int(window), max_size)


_MAX_SIZE, _MAX_SIZE_WINDOWED = 4096, 16384


def _whole(rule, update_every, max_size):
    def init_fn(params):
        leaves = jax.tree.leaves(params)
        size = sum(leaf.size for leaf in leaves)
        dtype = _working_dtype(leaves)
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

        moments, weight, good = dense.fold_vectors(rule, [state.moment], [vector], state.weight)

        age = count_up(state.root_age)
        due = dense.is_due(state.count, age, update_every) & good
        kept = [state.root], state.root_residual
        (root,), residual, failed = dense.refresh_roots(rule, due, moments, weight, kept)

        new = dense.multiply(root, vector)
        safe = good & all_finite(new)
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
            moment=moments[0],
            root_residual=residual,
            root=root,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _windowed(rule, size, max_size):
    def init_fn(params):
        leaves = jax.tree.leaves(params)
        _refuse_large(leaves, size, max_size)
        return WindowedState(
            count=jnp.zeros([], jnp.int32),
            num_gradients=jnp.zeros([], jnp.int32),
            failures=jnp.zeros([], jnp.int32),
            damping=jnp.asarray(rule.damping, jnp.float32),
            update_norm=jnp.zeros([], jnp.float32),
            gram=jnp.zeros((size, size), _working_dtype(leaves)),
            gradients=jax.tree.map(lambda x: jnp.zeros((size, *x.shape), wide_dtype(x)), params),
        )

    def update_fn(updates, state, params=None, **extras):
        del params, extras
        leaves, structure = jax.tree.flatten(updates)
        kept = jax.tree.leaves(state.gradients)
        grads = [x.astype(k.dtype) for x, k in zip(leaves, kept, strict=True)]

        row = state.num_gradients % size
        filled = [k.at[row].set(g) for k, g in zip(kept, grads, strict=True)]
        products = _inner_products(filled, grads, state.gram)
        gram = state.gram.at[row].set(products).at[:, row].set(products)
        # No inner product exceeds the trace, the sum of all squares.
        good = jnp.isfinite(jnp.trace(gram))
        kept = [jnp.where(good, new, old) for new, old in zip(filled, kept, strict=True)]
        gram = jnp.where(good, gram, state.gram)
        taken = state.num_gradients + good.astype(jnp.int32)

        scales = jnp.sqrt(_weights(rule, taken, gram))
        share, coefficients = _coefficients(rule, gram, scales, products)
        new = [
            share.astype(g.dtype) * g
            + dense.multiply(coefficients.astype(g.dtype), k.reshape(size, g.size)).reshape(g.shape)
            for k, g in zip(kept, grads, strict=True)
        ]
        safe = good & all_finite(new)
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


def _working_dtype(leaves: list[Any]) -> Any:
    """Return float32, or float64 where a leaf is."""
    return jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves))


def _refuse_large(leaves: list[Any], size: int, max_size: int) -> None:
    """Raise where a window takes more than ``2·max_size²`` numbers."""
    count = sum(leaf.size for leaf in leaves)
    if size * (count + size) <= 2 * max_size**2:
        return
    itemsize = jnp.dtype(_working_dtype(leaves)).itemsize
    needed = size**2 * itemsize
    needed += sum(size * x.size * jnp.dtype(wide_dtype(x)).itemsize for x in leaves)
    raise ValueError(
        f"window={size:,} gradients of {count:,} parameters would take {needed:,} bytes, and "
        f"max_size={max_size:,} accepts {2 * max_size**2 * itemsize:,}. Pass a smaller window=, "
        "use optalr.scale_by_kronecker, whose factors are small, or raise max_size."
    )


def _inner_products(kept: list[jax.Array], grads: list[jax.Array], gram: jax.Array) -> jax.Array:
    """Return the inner products of the kept gradients with the new one, ``(r,)``."""
    total = jnp.zeros(gram.shape[0], gram.dtype)
    for k, g in zip(kept, grads, strict=True):
        rows, column = k.reshape(gram.shape[0], g.size), g.reshape(-1)
        total += dense.multiply(rows.astype(gram.dtype), column.astype(gram.dtype))
    return total


def _weights(rule: dense.Rule, taken: jax.Array, gram: jax.Array) -> jax.Array:
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
    rule: dense.Rule, gram: jax.Array, scales: jax.Array, products: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return what of g itself, and what of each kept gradient, makes up ``(F + λI)^p g``."""
    weighted = gram * scales[:, None] * scales[None, :]
    values, vectors = lapack.eigh(weighted)
    values = jnp.maximum(values, 0)
    rank = jnp.maximum(1, jnp.sum(scales > 0)).astype(gram.dtype)
    added = rule.added(jnp.sum(values) / rank)
    power = jnp.asarray(rule.power, gram.dtype)
    # Below this an eigenvalue is rounding, and its direction is not in the window.
    floor = jnp.finfo(gram.dtype).eps * scales.size * jnp.max(values)
    seen = values > floor
    safe = jnp.where(seen, values, 1)
    # Undamped, what is outside the window is left out: a pseudo-inverse.
    share = jnp.where((added > 0) | (power == 0), jnp.power(added, power), 0)
    gains = jnp.where(seen, jnp.power(safe + added, power) - share, 0)
    # Divided by the eigenvalues first: gains/s underflows for large gradients.
    turned = dense.multiply(vectors.T, scales * products) / safe
    return share, scales * dense.multiply(vectors, gains * turned)
