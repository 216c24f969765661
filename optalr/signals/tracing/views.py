"""Following one array through transposes, reshapes, broadcasts and slices.

A layer's kernel rarely reaches its product untouched: it is cast, transposed, reshaped. A ``View``
says, for each dimension of an intermediate array, which pieces (*atoms*) of which leaf axes it
holds, so that a product found downstream can be traced back to axes of the leaf. The same algebra
follows a layer's output to the place where its bias is added. Some models concatenate kernels (the
gates of a recurrent cell) and multiply once: a ``Joined`` is such an array, the views of its parts.

In: what an array looks at (``Seen``) and what an equation does to it. Out: what the result looks
at, or None where it is no rearrangement that atoms can describe. At the product, the sides on which
the atoms stand give the leaf's matrix view (``matrix_view``).

An example. A leaf of shape ``(6, 4)`` begins as ``((axis 0), (axis 1))``. Reshaped to
``(2, 3, 4)`` it is ``((axis 0, stride 3, size 2), (axis 0, stride 1, size 3), (axis 1))``, and
transposing swaps these three entries.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from optalr.signals.moments import LeafView


class Atom(NamedTuple):
    """A piece of one axis: ``size`` steps of ``stride`` elements along leaf axis ``axis``.

    A negative ``axis`` is a dimension that is no axis of the leaf (broadcast, or data).
    """

    axis: int
    stride: int
    size: int


Dims = tuple[tuple[Atom, ...], ...]


class Stretch(NamedTuple):
    """A part of an array along one of its axes: ``size`` entries from ``start`` on."""

    axis: int
    start: int
    size: int


class Scale(NamedTuple):
    """A number by which a parameter was multiplied, or divided, on its way.

    Fields:
      var: the variable, with one entry, or literal that holds it; None if it belongs to another
        jaxpr than the array, where no equation can read it.
      divides: whether the parameter was divided by it.
    """

    var: Any
    divides: bool


Scales = tuple[Scale, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """An intermediate array that holds the entries of one source, rearranged.

    Attributes:
      source: the index of a parameter leaf (int) or the site whose output this is.
      shape: the array's shape.
      dims: for each dimension the atoms it holds, major first; none for a dimension of size 1.
      scanned: leaf axes that an enclosing scan slices, outermost first.
      cut: the part of the source that this is, or None for all of it.
      scales: the numbers by which the entries were scaled, all of them alike.
    """

    source: Any
    shape: tuple[int, ...]
    dims: Dims
    scanned: tuple[int, ...] = ()
    cut: Stretch | None = None
    scales: Scales = ()

    @property
    def is_parameter(self) -> bool:
        """Whether the source is a parameter leaf rather than a layer's output."""
        return isinstance(self.source, int)

    def with_dims(self, dims: Sequence[tuple[Atom, ...]]) -> "View":
        """Return the view with other dimensions of the same source."""
        dims = tuple(dims)
        shape = tuple(math.prod(atom.size for atom in dim) for dim in dims)
        return dataclasses.replace(self, shape=shape, dims=dims)

    def is_whole_axis(self, dimension: int) -> bool:
        """Return whether a dimension is one axis of the leaf, which stands nowhere else."""
        atoms = self.dims[dimension]
        # A stride above 1 is the major part of a split axis: its minor part stands elsewhere.
        if len(atoms) != 1 or atoms[0].axis < 0 or atoms[0].stride != 1:
            return False
        return sum(atom.axis == atoms[0].axis for dim in self.dims for atom in dim) == 1


def identity_view(source: Any, shape: tuple[int, ...]) -> View:
    """Return the view of a source of this ``shape`` that nothing has rearranged yet."""
    dims = tuple((Atom(axis, 1, size),) for axis, size in enumerate(shape))
    return View(source, tuple(shape), dims)


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several views of one kind (all parameters, or all layers' outputs), concatenated.

    Attributes:
      parts: the views, in order; they agree in every dimension but ``axis``.
      axis: the dimension along which they follow one another.
    """

    parts: tuple[View, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def is_parameter(self) -> bool:
        """Whether the parts are parameter leaves rather than layers' outputs."""
        return self.parts[0].is_parameter

    def starts(self) -> tuple[int, ...]:
        """Return where each part begins along ``axis``."""
        sizes = [part.shape[self.axis] for part in self.parts]
        return tuple(sum(sizes[:i]) for i in range(len(sizes)))


# What an intermediate array looks at; None if it is neither a parameter nor a layer's output.
Seen = View | Joined | None


def parts_of(seen: Seen) -> tuple[View, ...]:
    """Return the plain views in ``seen``."""
    if seen is None:
        return ()
    return seen.parts if isinstance(seen, Joined) else (seen,)


def change_scales(seen: View | Joined, change: Callable[[Scales], Scales]) -> View | Joined:
    """Return ``seen`` with the scales of each view in it changed."""
    parts = tuple(dataclasses.replace(x, scales=change(x.scales)) for x in parts_of(seen))
    return Joined(parts, seen.axis) if isinstance(seen, Joined) else parts[0]


Params = Mapping[str, Any]


def rearrange(equation: Any, seen: View | Joined) -> Seen:
    """Follow an array through one of ``REARRANGEMENTS``; None where it cannot be followed."""
    apply, params = REARRANGEMENTS[equation.primitive.name], equation.params
    shape = equation.outvars[0].aval.shape
    if isinstance(seen, View):
        return apply(seen, params, shape)
    # Where the joint ends up, if it stays one whole dimension, is read off a view of the whole.
    whole = apply(identity_view(None, seen.shape), params, shape)
    joint = (Atom(seen.axis, 1, seen.shape[seen.axis]),)
    if whole is None or joint not in whole.dims:
        return None
    axis = whole.dims.index(joint)
    parts: list[View] = []
    # All or nothing: with one part lost the others' places in the whole mean nothing.
    for part in seen.parts:
        # The equation is written for the whole; each part has its own length along the joint.
        own = (*shape[:axis], part.shape[seen.axis], *shape[axis + 1 :])
        moved = apply(part, params, own)
        if moved is None:
            return None
        parts.append(moved)
    return Joined(tuple(parts), axis)


def _reshape(view: View, params: Params, shape: tuple[int, ...]) -> View | None:
    """Regroup atoms into ``shape``, splitting an atom where a new dimension ends inside it.

    Returns None where a new dimension would end inside an atom that does not divide.
    """
    if params["dimensions"] is not None:
        view = view.with_dims([view.dims[axis] for axis in params["dimensions"]])
    if shape == view.shape:
        return view
    # Row-major order: the atoms, major first, spell out the array whatever its dimensions are.
    pending = [atom for dim in view.dims for atom in dim if atom.size > 1]
    dims: list[tuple[Atom, ...]] = []
    for size in shape:
        taken: list[Atom] = []
        missing = size
        while missing > 1:
            if not pending:
                return None
            atom = pending.pop(0)
            if missing % atom.size == 0:
                taken.append(atom)
                missing //= atom.size
            elif atom.size % missing == 0:
                minor = atom.size // missing
                taken.append(Atom(atom.axis, atom.stride * minor, missing))
                pending.insert(0, Atom(atom.axis, atom.stride, minor))
                missing = 1
            else:
                return None
        dims.append(tuple(taken))
    return dataclasses.replace(view, shape=shape, dims=tuple(dims))


def _broadcast(view: View, params: Params, shape: tuple[int, ...]) -> View:
    placed = params["broadcast_dimensions"]
    dims: list[tuple[Atom, ...]] = []
    for axis, size in enumerate(shape):
        source = placed.index(axis) if axis in placed else None
        if source is not None and view.shape[source] == size:
            dims.append(view.dims[source])
        else:
            # A new dimension gets an axis of its own, -1, -2, ..., which is none of the leaf's:
            # a product that reaches across it is recognized as broadcast.
            dims.append((Atom(-1 - axis, 1, size),) if size > 1 else ())
    return dataclasses.replace(view, shape=shape, dims=tuple(dims))


# By primitive: the view of the result, given a view, the equation's parameters and the result's
# shape. Casts and copies are no rearrangements: they leave a view as it is.
REARRANGEMENTS: Mapping[str, Callable[[View, Params, tuple[int, ...]], View | None]] = (
    MappingProxyType({
        "transpose": lambda view, params, shape: view.with_dims(
            [view.dims[axis] for axis in params["permutation"]]
        ),
        "squeeze": lambda view, params, shape: view.with_dims(
            [dim for axis, dim in enumerate(view.dims) if axis not in params["dimensions"]]
        ),
        "reshape": _reshape,
        "broadcast_in_dim": _broadcast,
    })
)  # fmt: skip


class NotALayer(Exception):  # noqa: N818  (an answer, not an error)
    """A product of data and a parameter is no layer; the message is the reason to report."""


Atoms = Sequence[Atom]


def matrix_view(
    leaf_shape: tuple[int, ...], view: View, *, stack: Atoms, inputs: Atoms, outputs: Atoms
) -> LeafView:
    """Return the leaf's matrix view, given which of its atoms stand on which side of a product.

    Axes of size 1 that a reshape dropped join the input's side, or an output's side left empty.
    Axes that an enclosing scan slices become stacked.

    Args:
      leaf_shape: the leaf's shape.
      view: how the product sees the leaf.
      stack: atoms over which the leaf is a stack of independent layers.
      inputs: atoms that meet the layer's input.
      outputs: atoms of the layer's output.

    Raises:
      NotALayer: the leaf is no matrix here; the message is the reason to report.
    """
    stacked, ins, outs = axes_of(stack), axes_of(inputs), axes_of(outputs)
    flat = [*stacked, *ins, *outs]
    if any(axis < 0 for axis in flat):
        raise NotALayer("broadcast before its product")
    if len(flat) != len(set(flat)):
        # Half of an axis on each side is no partition of axes: no matrix view has it.
        raise NotALayer("an axis is split between the input and the output of its product")
    # An axis of size 1 holds no choice: either side gives the same matrix.
    dropped = [axis for axis in range(len(leaf_shape)) if axis not in {*flat, *view.scanned}]
    if dropped and not outs:
        outs = (dropped.pop(),)
    ins = tuple(sorted((*ins, *dropped)))
    if not ins or not outs:
        raise NotALayer("a vector or scalar, not a matrix")
    stacked = (*view.scanned, *stacked)
    # The side with the leaf's earlier axes gives the rows, so that the view of a plain matrix is
    # the matrix itself, whichever way round it is applied.
    if ins[0] < outs[0]:
        return LeafView(stacked, ins, outs, "rows")
    return LeafView(stacked, outs, ins, "cols")


def axes_of(atoms: Atoms) -> tuple[int, ...]:
    """Return the leaf axes that ``atoms`` touch, ascending."""
    return tuple(sorted({atom.axis for atom in atoms}))
