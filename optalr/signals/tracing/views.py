"""Following one array through transposes, reshapes, broadcasts and slices.

A layer's kernel rarely reaches its product untouched: it is cast, transposed, reshaped. A ``View``
says, for each dimension of an intermediate array, which pieces (*atoms*) of which leaf axes it
holds, so that a product found downstream can be traced back to axes of the leaf. The same algebra
follows a layer's output to the place where its bias is added.

In: a view and what an equation does to it. Out: the view of the result, or None where the result
is no rearrangement that atoms can describe.

An example. A leaf of shape ``(6, 4)`` begins as ``((axis 0), (axis 1))``. Reshaped to
``(2, 3, 4)`` it is ``((axis 0, stride 3, size 2), (axis 0, stride 1, size 3), (axis 1))``, and
transposing swaps these three entries.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Atom(NamedTuple):
    """A piece of one axis: ``size`` steps of ``stride`` elements along leaf axis ``axis``.

    A negative ``axis`` is a dimension that is no axis of the leaf (broadcast, or data).
    """

    axis: int
    stride: int
    size: int


Dims = tuple[tuple[Atom, ...], ...]


class Cut(NamedTuple):
    """The part of a leaf that was cut out along one of its axes.

    Fields:
      axis: the leaf axis.
      start: where the part begins.
      size: how far it goes.
    """

    axis: int
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class View:
    """An intermediate array that holds the entries of one source, rearranged.

    Attributes:
      source: the index of a parameter leaf (int) or the site whose output this is.
      shape: the array's shape.
      dims: for each dimension the atoms it holds, major first; none for a dimension of size 1.
      scanned: leaf axes that an enclosing scan slices, outermost first.
      cut: the part of the source that this is, or None for all of it.
    """

    source: Any
    shape: tuple[int, ...]
    dims: Dims
    scanned: tuple[int, ...] = ()
    cut: Cut | None = None

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


def permute(view: View, permutation: Sequence[int]) -> View:
    """Put the dimensions into another order."""
    return view.with_dims([view.dims[axis] for axis in permutation])


def squeeze(view: View, dimensions: Sequence[int]) -> View:
    """Drop dimensions of size 1."""
    return view.with_dims([dim for axis, dim in enumerate(view.dims) if axis not in dimensions])


def broadcast(view: View, shape: Sequence[int], dimensions: Sequence[int]) -> View:
    """Place dimension ``i`` at ``dimensions[i]`` of ``shape``; the others are new."""
    dims: list[tuple[Atom, ...]] = []
    for axis, size in enumerate(shape):
        source = dimensions.index(axis) if axis in dimensions else None
        if source is not None and view.shape[source] == size:
            dims.append(view.dims[source])
        else:
            # A new dimension gets an axis of its own, -1, -2, ..., which is none of the leaf's:
            # a product that reaches across it is recognized as broadcast.
            dims.append((Atom(-1 - axis, 1, size),) if size > 1 else ())
    return dataclasses.replace(view, shape=tuple(shape), dims=tuple(dims))


def reshape(view: View, shape: Sequence[int]) -> View | None:
    """Regroup atoms into ``shape``, splitting an atom where a new dimension ends inside it.

    Returns None where a new dimension would end inside an atom that does not divide.
    """
    shape = tuple(shape)
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


def cut_out(view: View, part: Cut) -> View | None:
    """Return the part of a view along dimension ``part.axis``, or None if it cannot be named."""
    # A second cut of a cut would need two starts, and part of an axis has no single start.
    if view.cut is not None or not view.is_whole_axis(part.axis):
        return None
    axis = view.dims[part.axis][0].axis
    dims = list(view.dims)
    dims[part.axis] = (Atom(axis, 1, part.size),)
    return dataclasses.replace(view.with_dims(dims), cut=Cut(axis, part.start, part.size))


def split_parts(view: View, sizes: Sequence[int], axis: int) -> list[View | None]:
    """Return the parts of a view that was split into pieces of these ``sizes``."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [cut_out(view, Cut(axis, start, n)) for start, n in zip(starts, sizes, strict=True)]


def slice_part(view: View, starts: Sequence[int], limits: Sequence[int]) -> View | None:
    """Return the part of a view between ``starts`` and ``limits``; None if several axes are cut."""
    narrowed = [a for a, size in enumerate(view.shape) if (starts[a], limits[a]) != (0, size)]
    if not narrowed:
        return view
    if len(narrowed) > 1:
        return None
    (axis,) = narrowed
    return cut_out(view, Cut(axis, starts[axis], limits[axis] - starts[axis]))


def scan_slice(view: View) -> View | None:
    """Return what one step of a scan sees of a scanned view: the view without its first axis."""
    if not view.is_whole_axis(0):
        return None
    axis = view.dims[0][0].axis
    # Steps of a scan over part of a stack would be numbered from the wrong layer.
    if view.cut is not None and view.cut.axis == axis:
        return None
    return dataclasses.replace(
        view, shape=view.shape[1:], dims=view.dims[1:], scanned=(*view.scanned, axis)
    )
