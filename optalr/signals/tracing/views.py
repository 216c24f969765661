"""Following a parameter through reshapes, transposes and casts.

A layer's kernel rarely reaches its product untouched: it is cast, transposed, reshaped. A ``View``
says, for each dimension of an intermediate array, which pieces (*atoms*) of which leaf axes it
holds, so that a product found downstream can be traced back to axes of the leaf. The same algebra
follows a layer's output to the place where its bias is added.
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


def whole(source: Any, shape: tuple[int, ...]) -> View:
    """Return the identity view of a source of this ``shape``."""
    dims = tuple((Atom(axis, 1, size),) for axis, size in enumerate(shape))
    return View(source, tuple(shape), dims)


def transpose(view: View, permutation: Sequence[int]) -> View:
    """Permute dimensions."""
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
            dims.append((Atom(-1 - axis, 1, size),) if size > 1 else ())
    return dataclasses.replace(view, shape=tuple(shape), dims=tuple(dims))


def reshape(view: View, shape: Sequence[int]) -> View | None:
    """Regroup atoms into ``shape``, splitting an atom where a new dimension ends inside it.

    Returns None where a new dimension would end inside an atom that does not divide.
    """
    shape = tuple(shape)
    if shape == view.shape:
        return view
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


def parts_of(view: "View | Joined | None") -> tuple[View, ...]:
    """Return the plain views in ``view``."""
    if view is None:
        return ()
    return view.parts if isinstance(view, Joined) else (view,)


def join(seen: Sequence["View | Joined | None"], axis: int) -> Joined | None:
    """Concatenate views of parameters; None if something else is among them."""
    parts = tuple(view for view in seen if isinstance(view, View) and view.is_parameter)
    return Joined(parts, axis) if len(parts) == len(seen) else None


def cut_parts(name: str, params: dict[str, Any], view: View | Joined | None) -> list[View | None]:
    """Follow a parameter through a ``slice`` or ``split``: what each output holds of it.

    Only whole axes of a leaf can be cut, once and without gaps; None for other parts.
    """
    if not isinstance(view, View) or not view.is_parameter:
        return [None]
    if name == "split":
        sizes, axis = params["sizes"], params["axis"]
        return [_cut(view, axis, sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    starts, limits = params["start_indices"], params["limit_indices"]
    strided = any(stride != 1 for stride in params["strides"] or ())
    narrowed = [a for a, size in enumerate(view.shape) if (starts[a], limits[a]) != (0, size)]
    if strided or len(narrowed) > 1:
        return [None]
    if not narrowed:
        return [view]
    (axis,) = narrowed
    return [_cut(view, axis, starts[axis], limits[axis] - starts[axis])]


def _cut(view: View, dimension: int, start: int, size: int) -> View | None:
    atoms = view.dims[dimension]
    if view.cut is not None or len(atoms) != 1 or atoms[0].axis < 0 or atoms[0].stride != 1:
        return None
    axis = atoms[0].axis
    if sum(atom.axis == axis for dim in view.dims for atom in dim) != 1:
        return None
    dims = list(view.dims)
    dims[dimension] = (Atom(axis, 1, size),)
    return dataclasses.replace(view.with_dims(dims), cut=Cut(axis, start, size))


REARRANGEMENTS = frozenset({"transpose", "squeeze", "reshape", "broadcast_in_dim"})


def rearrange(name: str, params: dict[str, Any], view: View | Joined) -> View | Joined | None:
    """Follow a view through one of ``REARRANGEMENTS``; None where it cannot be followed."""
    if isinstance(view, Joined):
        return _rearrange_joined(name, params, view)
    if name == "transpose":
        return transpose(view, params["permutation"])
    if name == "squeeze":
        return squeeze(view, params["dimensions"])
    if name == "reshape":
        if params["dimensions"] is not None:
            view = transpose(view, params["dimensions"])
        return reshape(view, params["new_sizes"])
    return broadcast(view, params["shape"], tuple(params["broadcast_dimensions"]))


def _rearrange_joined(name: str, params: dict[str, Any], joined: Joined) -> Joined | None:
    """Rearrange each part; the joint must stay one whole dimension."""
    if params.get("dimensions") is not None and name == "reshape":
        return None
    old, sizes = joined.axis, joined.shape
    field = "shape" if name == "broadcast_in_dim" else "new_sizes"
    if name == "transpose":
        new = list(params["permutation"]).index(old)
    elif name == "squeeze":
        new = old - sum(axis < old for axis in params["dimensions"])
    elif name == "broadcast_in_dim":
        new = params["broadcast_dimensions"][old]
    else:
        before = math.prod(sizes[:old])
        fits = [
            axis
            for axis, size in enumerate(params["new_sizes"])
            if size == sizes[old] and math.prod(params["new_sizes"][:axis]) == before
        ]
        if not fits:
            return None
        new = fits[0]
    parts = []
    for part in joined.parts:
        changed = dict(params)
        if field in params:
            shape = list(params[field])
            shape[new] = part.shape[old]
            changed[field] = tuple(shape)
        parts.append(rearrange(name, changed, part))
    if any(part is None for part in parts):
        return None
    return Joined(tuple(parts), new)


def slice_leading(view: View) -> View | None:
    """Return what one step of a scan sees of a scanned view: the view without its first axis."""
    if len(view.dims[0]) != 1 or view.dims[0][0].axis < 0:
        return None
    axis, stride, _ = view.dims[0][0]
    if stride != 1 or sum(a.axis == axis for dim in view.dims for a in dim) != 1:
        return None
    if view.cut is not None and view.cut.axis == axis:
        return None
    return dataclasses.replace(
        view, shape=view.shape[1:], dims=view.dims[1:], scanned=(*view.scanned, axis)
    )


def leaf_order(atoms: Sequence[Atom]) -> list[int]:
    """Return the permutation that puts ``atoms`` into the leaf's own (row-major) order."""
    return sorted(range(len(atoms)), key=lambda i: (atoms[i].axis, -atoms[i].stride))


def axes_of(atoms: Sequence[Atom]) -> tuple[int, ...]:
    """Return the leaf axes that ``atoms`` touch, ascending."""
    return tuple(sorted({atom.axis for atom in atoms}))


class Sides(NamedTuple):
    """Which leaf axes lie on which side of a product."""

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def split_sides(
    rank: int,
    scanned: tuple[int, ...],
    stack: Sequence[Atom],
    inputs: Sequence[Atom],
    outputs: Sequence[Atom],
) -> Sides | str:
    """Sort the leaf's axes by the side of the product they stand on.

    Axes of size 1 that a reshape dropped join the input's side, or an output's side left empty.

    Returns:
      The sides, or a sentence that says why the leaf cannot be seen as a matrix here.
    """
    groups = [axes_of(stack), axes_of(inputs), axes_of(outputs)]
    if any(axis < 0 for group in groups for axis in group):
        return "broadcast before its product"
    flat = [axis for group in groups for axis in group]
    if len(flat) != len(set(flat)):
        return "an axis is split between the input and the output of its product"
    dropped = [axis for axis in range(rank) if axis not in flat and axis not in scanned]
    if dropped and not groups[2]:
        groups[2] = (dropped.pop(),)
    groups[1] = tuple(sorted((*groups[1], *dropped)))
    if not groups[1] or not groups[2]:
        return "a vector or scalar, not a matrix"
    return Sides((*scanned, *groups[0]), groups[1], groups[2])
