"""What is remembered of each leaf.

In a state each part of a memory, such as ``memory.rows.factor``, is a tree of the parameters'
structure with one array per leaf. So factors and roots are stored leaf by leaf, and not in stacks
of equal size. Nine steps in ten or more are plain: they only multiply by the roots, where these
lie. A refresh wants stacks, and copies the factors into some (``refresh.py``, the only module that
knows of stacks). A checkpoint then names each factor by its leaf, and a state shows by itself what
it holds.

A part that no leaf keeps with the options at hand is ``NOTHING`` as a whole. So states of different
spectra differ in structure, and what loads a checkpoint can tell them apart. Factors, roots and
what else has axes of its own stand without the boxes (of axis names, say) that the parameters
may be in.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from optalr.arrays import wide_dtype
from optalr.linalg.structured import Matrices, Structured
from optalr.sharding.spread import Spread
from optalr.states import boxed_like, unboxed
from optalr.transforms.kronecker.leaves import Kernel
from optalr.transforms.kronecker.rule import KroneckerClock, Periods
from optalr.transforms.shared.gradient_watch import GradientWatch

# Stands in place of what is not kept. It is a pytree node without leaves, so it takes no memory.
NOTHING = optax.MaskedNode()


class SideMemory(NamedTuple):
    """What is kept of one side of a kernel. Every shape begins with the kernel's stack axes.

    A side of n rows that is kept in blocks, or as a diagonal, has that shape in place of (n, n).
    """

    factor: Any = NOTHING  # (n, n), the moving average of Gram matrices, which starts from zero
    root: Any = NOTHING  # (n, n), the factor's root, or its eigenbasis
    eigenvalues: Any = NOTHING  # (n,), where eigenbases are kept
    basis: Any = NOTHING  # (n, n), where roots are taken from a basis that is refreshed


class LeafMemory(NamedTuple):
    """What is kept of a leaf: of a kernel two sides, of an elementwise leaf a second moment.

    In a state each part is a tree of the parameters' structure.
    """

    rows: SideMemory = SideMemory()
    cols: SideMemory = SideMemory()
    second_moment: Any = NOTHING  # an elementwise leaf: its shape
    # A kernel of matrix shape (m, n) with spectrum="measured": (m, n), the squared gradient in the
    # eigenbases, relative to the product of the largest row and column eigenvalue.
    eigen_moment: Any = NOTHING

    @property
    def sides(self) -> tuple[SideMemory, SideMemory]:
        """Rows and columns."""
        return self.rows, self.cols


class KroneckerState(NamedTuple):
    """Memory of ``scale_by_kronecker``.

    For a kernel of matrix shape (m, n) factors and roots take 2(m² + n²) numbers. Only
    ``root_method="eigenbasis"`` (m² + n² more: the bases) and ``spectrum="measured"`` (mn more)
    keep anything else of that order. A part that a leaf does not keep is ``optax.MaskedNode()``,
    and so is a whole tree that no leaf keeps with these options. ``optax.tree.map_params`` over
    further trees of the parameters' structure therefore takes
    ``is_leaf=lambda x: isinstance(x, optax.MaskedNode)``.
    """

    # every update
    count: jax.Array  # () int32, updates seen
    signal_age: jax.Array  # () int32, updates from the last measurement to the next update
    root_age: jax.Array  # () int32, updates since roots were last due (or since the start)
    wants_signals: jax.Array  # () bool, will the next update read signals?
    # () int32, roots kept back; gradients, measurements and updates not finite or out of proportion
    failures: jax.Array
    update_norm: jax.Array  # () float32, global norm of the last update
    damping: jax.Array  # () float32, as applied in the last update
    graft: Any  # state of options.graft
    gradients: GradientWatch  # what is remembered of the gradients' lengths
    # every measurement
    measurements: jax.Array  # () int32, batches measured
    samples: jax.Array  # () float32, samples per dimension of the factor that has the fewest
    weight: jax.Array  # () float32, sum of the moving average's weights (bias correction)
    # every refresh
    num_refreshes: jax.Array  # () int32
    missed: jax.Array  # () int32, matrices that in the last one had no root, or only one by eigh
    root_residual: jax.Array  # () float32, the worst among the roots in use (0: none yet)
    # Each of its parts is a tree of the parameters' structure. Factors and second moments change
    # with every measurement, roots with every refresh.
    memory: LeafMemory
    # for whoever runs a program made for one answer of the clock (optalr/clocks.py)
    told: jax.Array  # () int8, -1
    periods: Periods  # scalars

    @property
    def clock(self) -> KroneckerClock:
        """When to measure and when to take roots."""
        ages = self.count, self.signal_age, self.root_age
        return KroneckerClock(
            *ages,
            self.measurements,
            self.samples,
            self.num_refreshes,
            self.missed,
            self.periods,
        )


_PARTS = jax.tree.structure(LeafMemory(), is_leaf=lambda node: node is NOTHING)


def to_trees(memories: Sequence[LeafMemory], like: Any, kept: LeafMemory) -> LeafMemory:
    """Return one memory whose parts are trees, from those of the leaves.

    Args:
      memories: of the leaves of ``like``, in their order.
      like: a tree of the parameters' structure.
      kept: with ``NOTHING`` in place of each part that no leaf keeps.
    """
    structure = jax.tree.structure(unboxed(like))
    columns = zip(*map(_PARTS.flatten_up_to, memories), strict=True)
    columns = list(columns) or [()] * _PARTS.num_leaves
    trees = _PARTS.unflatten([structure.unflatten(column) for column in columns])
    # The only part with the parameters' own axes, to which their metadata apply.
    moments = boxed_like([memory.second_moment for memory in memories], like)
    trees = trees._replace(second_moment=structure.unflatten(moments))
    wanted = zip(_PARTS.flatten_up_to(kept), _PARTS.flatten_up_to(trees), strict=True)
    return _PARTS.unflatten([NOTHING if keep is NOTHING else tree for keep, tree in wanted])


def at_rest(
    memory: LeafMemory, spread: Spread | None, *, like: LeafMemory | None = None
) -> LeafMemory:
    """Return a memory whose factors and roots lie on the devices where they rest.

    Args:
      memory: parts that are trees.
      spread: the devices.
      like: the memory before, whose dtypes it takes. What was widened and not changed is the same.
    """
    if like is not None:
        memory = jax.tree.map(lambda new, old: new.astype(old.dtype), memory, like)
    if spread is None or not spread.rests:
        return memory
    return memory._replace(rows=spread.at_rest(memory.rows), cols=spread.at_rest(memory.cols))


def from_trees(trees: LeafMemory, like: Any) -> list[LeafMemory]:
    """Undo ``to_trees``; matrices that rest in a narrow dtype are widened."""
    structure = jax.tree.structure(unboxed(like))
    columns = [
        [NOTHING] * structure.num_leaves
        if isinstance(tree, optax.MaskedNode)
        else structure.flatten_up_to(unboxed(tree))
        for tree in _PARTS.flatten_up_to(trees)
    ]
    dtypes = [wide_dtype(leaf) for leaf in jax.tree.leaves(unboxed(like))]
    leaves = zip(dtypes, zip(*columns, strict=True), strict=True)
    return [
        jax.tree.map(lambda array, dtype=dtype: array.astype(dtype), _PARTS.unflatten(parts))
        for dtype, parts in leaves
    ]


def with_narrow_roots(memory: LeafMemory, leaf: Kernel, dtype: Any) -> LeafMemory:
    """Return a kernel's memory with its roots in the dtype that they rest in."""

    def narrow(form: Structured, side: SideMemory) -> SideMemory:
        # Diagonals and eigenvalues are small. A factor that is rounded is not positive any more.
        if not isinstance(form, Matrices):
            return side
        roots = side._replace(eigenvalues=NOTHING, factor=NOTHING)
        narrowed = jax.tree.map(lambda root: root.astype(dtype), roots)
        return narrowed._replace(eigenvalues=side.eigenvalues, factor=side.factor)

    rows, cols = (narrow(*pair) for pair in zip(leaf.sides, memory.sides, strict=True))
    return memory._replace(rows=rows, cols=cols)


def factors_of(leaf: Kernel, memory: LeafMemory) -> tuple[Structured, Structured]:
    """Return both factors, as the moving average holds them."""
    return leaf.rows.holding(memory.rows.factor), leaf.cols.holding(memory.cols.factor)


def roots_of(leaf: Kernel, memory: LeafMemory) -> tuple[Structured, Structured]:
    """Return both roots, or both eigenbases."""
    return leaf.rows.holding(memory.rows.root), leaf.cols.holding(memory.cols.root)
