"""Preconditioning by a power of the full second moment of the gradient, over all leaves.

AdaGrad's sum of outer products or RMSProp's moving average, whole (Ida & Fujiwara 2020, eq. 2, 3
and 5). For long vectors ``window`` lets the last r gradients stand for it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_count, check_flag, check_known
from optalr.transforms.dense.second_moment import (
    Memory,
    RootClock,
    SecondMoment,
    first_memory,
    precondition,
    working_dtype,
)
from optalr.transforms.dense.window import scale_by_window
from optalr.transforms.shared.gradient_watch import GradientWatch
from optalr.transforms.shared.lengths import length
from optalr.transforms.shared.making import transformation

# The state of 4096 parameters takes 128 MiB in float32, and a root 20·4096³ = 1.4e12 flops.
_MAX_SIZE = 4096
# A window has no matrix of that size and no root: 2·16384² numbers are 2 GiB in float32.
_MAX_SIZE_WINDOWED = 16384


class FullMatrixState(NamedTuple):
    """State of ``scale_by_full_matrix`` without a window, for P parameters."""

    # every update
    count: jax.Array  # () int32, updates so far
    weight: jax.Array  # () float32, sum of the moving average's weights
    root_age: jax.Array  # () int32, updates since a root was last due, whether taken or kept back
    failures: jax.Array  # () int32, roots kept back, gradients not finite or out of proportion
    bounded_steps: jax.Array  # () int32, updates shortened because their root was out of date
    gradients: GradientWatch  # what is remembered of the gradients' lengths
    damping: jax.Array  # () float32, λ as it was given
    update_norm: jax.Array  # () float32, of all leaves together
    moment: jax.Array  # (P, P) float32, or float64 where a leaf is
    # every refresh
    root_residual: jax.Array  # () float32, of the root in use
    root: jax.Array  # (P, P), as the moment
    # for whoever runs a program made for one answer of the clock (optalr/clocks.py)
    told: jax.Array  # () int8, -1
    period: jax.Array  # () int32, updates between roots

    @property
    def clock(self) -> RootClock:
        """When to take roots."""
        return RootClock(self.count, self.root_age, self.period)


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

    Choose it for models of a few thousand parameters at most, or with ``window`` for larger ones.
    With g the gradients of all leaves as one vector of P numbers,

        F ← decay·F + (1 − decay) g gᵀ   (``decay=None``: F ← F + g gᵀ),     u = (F + λI)^p g.

    With ``window=r``, F is that of the last r gradients alone. Its columns ``M`` are these
    gradients, each times the root of its weight in F. From ``MᵀM = V diag(s) Vᵀ``,

        u = λ^p g + M V diag(((s + λ)^p − λ^p)/s) Vᵀ Mᵀ g.

    A gradient that is not finite, or too large for g gᵀ to be finite, is not taken in; its update
    is 0.

    Args:
      power: p, in [−1, 0].
      decay: of the moving average, in [0, 1); None for AdaGrad's sum.
      damping: λ ≥ 0; a window without damping gives the power of a pseudo-inverse.
      damping_form: ``"relative"`` to the mean eigenvalue (with a window, the mean of its nonzero
        ones, at most r), or ``"absolute"``.
      window: r, how many gradients to keep, ≥ 1; None for the whole matrix.
      update_every: updates between roots, ≥ 1; with a window every update takes one.
      bias_correction: whether to divide out the moving average's start at zero.
      max_size: bound on the state, which may take ``2·max_size²`` numbers, ≥ 1; without a window it
        is the largest P. None stands for 4096, and with a window for 16384 (537 million numbers, 2
        GiB in float32).

    Returns:
      A transformation that needs no extras.

    Raises:
      ValueError: an argument is out of range; at ``init``, the matrix or the window would be larger
        than ``max_size`` says.

    Cost: ``4P²`` flops per update and some ``20 P³`` per refresh; the state has ``2P²`` numbers.
      With a window ``6rP + 20 r³`` flops per update; the state has ``rP + r²`` numbers.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> window = optalr.scale_by_full_matrix(decay=None, damping=1e-6, window=3)
      >>> tx = optax.chain(window, optax.scale(-1))
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> updates, _ = tx.update({"w": jnp.array([30.0, 40.0])}, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> bool(jnp.allclose(params["w"], jnp.array([2.4, 3.2]), atol=1e-2))  # one unit nearer
      True

    Reference: Yasutoshi Ida and Yasuhiro Fujiwara, "Improving Generalization Performance of
      Adaptive Learning Rate by Switching from Block Diagonal Matrix Preconditioning to SGD", 2020,
      eq. 2, 3 and 5. The window: Naman Agarwal et al., "Efficient Full-Matrix Adaptive
      Regularization", 2019, with any power and damping inside the root.
    """
    check_flag("bias_correction", bias_correction)
    rule = SecondMoment(power, decay, damping, damping_form, bias_correction)
    check_count("update_every", update_every)
    if max_size is None:
        max_size = _MAX_SIZE if window is None else _MAX_SIZE_WINDOWED
    check_known("max_size", max_size)
    check_count("max_size", max_size)
    if window is None:
        return _whole(rule, update_every, max_size)
    check_known("window", window)
    check_count("window", window)
    return scale_by_window(rule, int(window), max_size=max_size)


def _whole(
    rule: SecondMoment, update_every: Any, max_size: int
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation with the whole matrix."""

    def init_fn(params: Any) -> FullMatrixState:
        size, dtype = _checked_size(params, max_size)
        return FullMatrixState(
            **first_memory(update_every).shared(),
            damping=jnp.array(rule.damping, jnp.float32),
            update_norm=jnp.zeros([], jnp.float32),
            moment=jnp.zeros((size, size), dtype),
            root=jnp.eye(size, dtype=dtype),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extras: Any
    ) -> tuple[Any, FullMatrixState]:
        del params, extras
        leaves, structure = jax.tree.flatten(updates)
        flat = [leaf.astype(state.moment.dtype).reshape(-1) for leaf in leaves]
        vector = jnp.concatenate([jnp.zeros(0, state.moment.dtype), *flat])
        kept = Memory.of(state, [state.moment], [state.root])
        (new,), memory = precondition(rule, kept, [vector], update_every=update_every)
        return structure.unflatten(_split(new, leaves)), FullMatrixState(
            **memory.shared(),
            damping=jnp.asarray(rule.damping, jnp.float32),
            update_norm=length(new),
            moment=memory.moments[0],
            root=memory.roots[0],
        )

    return transformation("scale_by_full_matrix", init_fn, update_fn, on_auto=True)


def _split(vector: jax.Array, leaves: list[jax.Array]) -> list[jax.Array]:
    """Return the parts of the vector in the shapes and dtypes of the leaves."""
    parts, start = [], 0
    for leaf in leaves:
        end = start + leaf.size
        parts.append(vector[start:end].reshape(leaf.shape).astype(leaf.dtype))
        start = end
    return parts


def _checked_size(params: Any, max_size: int) -> tuple[int, Any]:
    """Return P and the dtype to work in; raise where the matrix would be too large."""
    leaves = jax.tree.leaves(params)
    size, dtype = sum(leaf.size for leaf in leaves), working_dtype(leaves)
    if size > max_size:
        raise ValueError(
            f"The full matrix of {size:,} parameters would take "
            f"{2 * size**2 * jnp.dtype(dtype).itemsize:,} bytes, and max_size={max_size:,} "
            "parameters are accepted. Use optalr.scale_by_kronecker, whose factors are small, "
            "pass window=, or raise max_size."
        )
    return size, dtype
