"""Following several parameters that were concatenated into one array.

Some models concatenate kernels (the gates of a recurrent cell) and multiply once. A ``Joined`` is
such an array: the views of its parts and the dimension along which they follow one another.

In: what an array looks at (``Seen``) and what an equation does to it. Out: what the result looks
at, or None where it can no longer be followed.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from optalr.signals.tracing import views
from optalr.signals.tracing.views import View


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


def parameter_or_none(seen: Seen) -> Seen:
    """Return ``seen`` if it is a parameter, else None."""
    return seen if seen is not None and seen.is_parameter else None


def join_parameters(seen: Sequence[Seen], axis: int) -> Joined | None:
    """Concatenate views of parameters; None if something else is among them."""
    parts = tuple(view for view in seen if isinstance(view, View) and view.is_parameter)
    return Joined(parts, axis) if len(parts) == len(seen) else None


Params = Mapping[str, Any]


class _Rearrangement(NamedTuple):
    """What one primitive does to a view, and to the joint of a ``Joined``.

    Fields:
      apply: the view of the result.
      move_joint: the dimension at which the joint of a ``Joined`` ends up, or None if it does not
        stay one whole dimension.
      with_shape: the equation's parameters with another size of the given dimension.
    """

    apply: Callable[[View, Params], View | None]
    move_joint: Callable[[Joined, Params], int | None]
    with_shape: Callable[[Params, int, int], Params] = lambda params, dimension, size: params


def _resized(field: str) -> Callable[[Params, int, int], Params]:
    def with_shape(params: Params, dimension: int, size: int) -> Params:
        shape = list(params[field])
        shape[dimension] = size
        return {**params, field: tuple(shape)}

    return with_shape


def _apply_reshape(view: View, params: Params) -> View | None:
    if params["dimensions"] is not None:
        view = views.permute(view, params["dimensions"])
    return views.reshape(view, params["new_sizes"])


def _joint_after_squeeze(joined: Joined, params: Params) -> int:
    return joined.axis - sum(axis < joined.axis for axis in params["dimensions"])


def _joint_after_reshape(joined: Joined, params: Params) -> int | None:
    if params["dimensions"] is not None:
        return None
    # The joint survives where a new dimension has its size and as many entries stand before it.
    length, sizes = joined.shape[joined.axis], params["new_sizes"]
    before = math.prod(joined.shape[: joined.axis])
    fits = (i for i, n in enumerate(sizes) if n == length and math.prod(sizes[:i]) == before)
    return next(fits, None)


# By primitive. Casts and copies are no rearrangements: they leave a view as it is.
_KINDS: Mapping[str, _Rearrangement] = MappingProxyType({
    "transpose": _Rearrangement(
        lambda view, params: views.permute(view, params["permutation"]),
        lambda joined, params: list(params["permutation"]).index(joined.axis),
    ),
    "squeeze": _Rearrangement(
        lambda view, params: views.squeeze(view, params["dimensions"]), _joint_after_squeeze
    ),
    "reshape": _Rearrangement(_apply_reshape, _joint_after_reshape, _resized("new_sizes")),
    "broadcast_in_dim": _Rearrangement(
        lambda view, params: views.broadcast(
            view, params["shape"], tuple(params["broadcast_dimensions"])
        ),
        lambda joined, params: params["broadcast_dimensions"][joined.axis],
        _resized("shape"),
    ),
})  # fmt: skip

# The primitives that ``rearrange`` knows.
REARRANGEMENTS = frozenset(_KINDS)


def rearrange(name: str, params: Params, seen: View | Joined) -> Seen:
    """Follow an array through one of ``REARRANGEMENTS``; None where it cannot be followed."""
    rule = _KINDS[name]
    if isinstance(seen, View):
        return rule.apply(seen, params)
    joint = rule.move_joint(seen, params)
    if joint is None:
        return None
    parts: list[View] = []
    # All or nothing: with one part lost the others' places in the whole mean nothing.
    for part in seen.parts:
        # The equation is written for the whole; each part has its own length along the joint.
        own = rule.with_shape(params, joint, part.shape[seen.axis])
        moved = rule.apply(part, own)
        if moved is None:
            return None
        parts.append(moved)
    return Joined(tuple(parts), joint)
