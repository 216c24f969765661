"""Preconditioning by a power of the exact block-diagonal second moment, one block for each leaf.

The block of a leaf holds all correlations within it, and none with other leaves (Ida & Fujiwara
2020, eq. 12-13). It is exact where the Kronecker form approximates, and for small leaves only: a
leaf of k numbers takes k².
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_count, check_flag, check_known
from optalr.arrays import wide_dtype
from optalr.states import unboxed
from optalr.transforms.dense.second_moment import (
    Memory,
    RootClock,
    SecondMoment,
    first_memory,
    precondition,
)
from optalr.transforms.shared.gradient_watch import GradientWatch
from optalr.transforms.shared.lengths import length
from optalr.transforms.shared.making import transformation


class BlockDiagonalState(NamedTuple):
    """State of ``scale_by_block_diagonal``; the trees have the structure of the parameters."""

    # every update
    count: jax.Array  # () int32
    weight: jax.Array  # () float32, sum of the moving average's weights
    root_age: jax.Array  # () int32, updates since roots were last due, whether taken or kept back
    failures: jax.Array  # () int32, roots kept back, gradients not finite or out of proportion
    bounded_steps: jax.Array  # () int32, updates shortened because their root was out of date
    gradients: GradientWatch  # what is remembered of the gradients' lengths
    damping: jax.Array  # () float32, λ as it was given
    update_norm: jax.Array  # () float32, of all leaves together
    moments: Any  # (k, k) float32 (float64 of such leaves) for a leaf of k numbers
    # every refresh
    root_residual: jax.Array  # () float32, the worst among the roots in use
    roots: Any  # (k, k), as the moments
    # for whoever runs a program made for one answer of the clock (optalr/clocks.py)
    told: jax.Array  # () int8, -1
    period: jax.Array  # () int32, updates between roots

    @property
    def clock(self) -> RootClock:
        """When to take roots."""
        return RootClock(self.count, self.root_age, self.period)


def scale_by_block_diagonal(
    power: Any = -0.5,
    *,
    decay: Any = 0.95,
    damping: Any = 1e-3,
    damping_form: str = "relative",
    update_every: Any = 1,
    bias_correction: bool = True,
    max_size: int = 2048,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale gradients by a power of the second moment of each leaf, exactly.

    Choose it for small models, and as the reference that the Kronecker form is judged by. With
    ``g`` a leaf's gradient as a vector,

        F ← decay·F + (1 − decay) g gᵀ   (``decay=None``: F ← F + g gᵀ),     u = (F + λI)^p g.

    A gradient that is not finite, or too large for g gᵀ to be finite, is not folded in; its update
    is 0. A fresh F contains g itself, so ``|u|² ≤ 1/(1 − decay)`` at p = −1/2, whatever the
    damping. ``scale_by_kronecker`` estimates the Fisher matrix of one example. Where g is the mean
    over a batch of N examples, F is N times smaller, and at p = −1/2 this update is √N times
    longer.

    Args:
      power: p, in [−1, 0].
      decay: of the moving average, in [0, 1); None for AdaGrad's sum.
      damping: λ ≥ 0.
      damping_form: ``"relative"`` to the mean eigenvalue of each block, or ``"absolute"``.
      update_every: updates between roots, ≥ 1. Early in training roots are taken when they are as
        old as half the updates so far.
      bias_correction: whether to divide out the moving average's start at zero.
      max_size: the largest leaf that is accepted, in numbers, ≥ 1.

    Returns:
      A transformation that needs no extras.

    Raises:
      ValueError: an argument is out of range; at ``init``, a leaf is larger than ``max_size``.

    Cost: for a leaf of k numbers, ``4k²`` flops per update and some ``20 k³`` per refresh; the
      state has ``2k²`` numbers.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> tx = optax.chain(optalr.scale_by_block_diagonal(decay=0.0, damping=0.0), optax.scale(-1))
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> updates, _ = tx.update({"w": jnp.array([30.0, 40.0])}, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> bool(jnp.allclose(params["w"], jnp.array([2.4, 3.2]), atol=1e-2))  # one unit nearer
      True

    Reference: Yasutoshi Ida and Yasuhiro Fujiwara, "Improving Generalization Performance of
      Adaptive Learning Rate by Switching from Block Diagonal Matrix Preconditioning to SGD", 2020,
      eq. 5, 12 and 13. Bias correction and relative damping are ours.
    """
    check_flag("bias_correction", bias_correction)
    rule = SecondMoment(power, decay, damping, damping_form, bias_correction)
    check_count("update_every", update_every)
    check_known("max_size", max_size)
    check_count("max_size", max_size)

    def init_fn(params: Any) -> BlockDiagonalState:
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
            _refuse_large(path, leaf, max_size)
        return _first_state(params, damping, update_every)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extras: Any
    ) -> tuple[Any, BlockDiagonalState]:
        del params, extras
        leaves, structure = jax.tree.flatten(updates)
        bare = jax.tree.structure(unboxed(updates))
        vectors = [leaf.astype(wide_dtype(leaf)).reshape(-1) for leaf in leaves]
        kept = Memory.of(state, jax.tree.leaves(state.moments), jax.tree.leaves(state.roots))
        new, memory = precondition(rule, kept, vectors, update_every=update_every)
        shaped = [u.reshape(x.shape).astype(x.dtype) for u, x in zip(new, leaves, strict=True)]
        return structure.unflatten(shaped), BlockDiagonalState(
            **memory.shared(),
            damping=jnp.asarray(damping, jnp.float32),
            update_norm=length(new),
            moments=bare.unflatten(memory.moments),
            roots=bare.unflatten(memory.roots),
        )

    return transformation("scale_by_block_diagonal", init_fn, update_fn, on_auto=True)


def _first_state(params: Any, damping: Any, update_every: Any) -> BlockDiagonalState:
    """Return the state before the first update."""
    params = unboxed(params)  # a block has none of the axes that a box names
    return BlockDiagonalState(
        **first_memory(update_every).shared(),
        damping=jnp.array(damping, jnp.float32),
        update_norm=jnp.zeros([], jnp.float32),
        moments=jax.tree.map(lambda x: jnp.zeros((x.size,) * 2, wide_dtype(x)), params),
        roots=jax.tree.map(lambda x: jnp.eye(x.size, dtype=wide_dtype(x)), params),
    )


def _refuse_large(path: Any, leaf: Any, max_size: int) -> None:
    """Raise an error with the bytes and the way out if the block of a leaf is too large."""
    if leaf.size <= max_size:
        return
    needed = 2 * leaf.size**2 * jnp.dtype(wide_dtype(leaf)).itemsize
    raise ValueError(
        f"The block of leaf {jax.tree_util.keystr(path)} with {leaf.size:,} numbers would take "
        f"{needed:,} bytes, and max_size={max_size:,} numbers are accepted. Use "
        "optalr.scale_by_kronecker, whose factors are small, or raise max_size."
    )
