"""Measuring one layer: the sums over its inputs and cotangents, in the shapes that are kept.

In: the two sides of a product, and what is kept of their Gram matrices (``Kept``). Out: ``Sums``.
A form that keeps a diagonal or blocks is summed up as such: the whole matrix is never formed.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arrays import on_auto_axes
from optalr.linalg import spd
from optalr.linalg.structured import Full
from optalr.signals.moments import Form, Sides
from optalr.signals.tapping.scattering import Sharing
from optalr.signals.tracing.jaxprs import vary, varying_axes
from optalr.signals.tracing.site import Operands, Sampling, Site, Sums, spread

# What a slot holds: zeros before the backward pass, then what was measured or is to be.
Dummies = Sums | Operands


class Kept(NamedTuple):
    """What is kept of the two Gram matrices of a layer: forms without arrays.

    Fields:
      inputs: of A. A form of one more row than the input has is of inputs with a 1 appended, which
        is what a joint bias multiplies.
      outputs: of B.
    """

    inputs: Form
    outputs: Form

    @classmethod
    def of(cls, site: Site, sides: Sides | None) -> "Kept":
        """Return what is kept of a site, given both sides of its leaf; None keeps all."""
        view = site.leaf_view
        _, m, n = view.matrix_shape(site.origin.leaf_shape)
        rows, cols = sides or (Full(m), Full(n))
        # What a 1 appended adds to a whole matrix is known from the mean.
        rows = Full(m) if isinstance(rows, Full) else rows
        cols = Full(n) if isinstance(cols, Full) else cols
        return cls(rows, cols) if view.input_side == "rows" else cls(cols, rows)

    @property
    def count(self) -> int:
        """How many numbers are kept per layer of a stack."""
        return self.inputs.count + self.outputs.count

    @property
    def is_whole(self) -> bool:
        """Whether both matrices are kept whole."""
        return isinstance(self.inputs, Full) and isinstance(self.outputs, Full)


def side_sizes(site: Site) -> tuple[int, int]:
    """Return how many features of the leaf meet the input, and how many the output."""
    _, m, n = site.leaf_view.matrix_shape(site.origin.leaf_shape)
    return (m, n) if site.leaf_view.input_side == "rows" else (n, m)


def sums_like(site: Site, kept: Kept, dtype: Any) -> Sums:
    """Return the shapes of what is summed for the leaf that ``site`` taps, with this dtype."""
    stack, *_ = site.leaf_view.matrix_shape(site.origin.leaf_shape)
    grams = ((*stack, *form.shape) for form in kept)
    shapes = (*grams, (*stack, side_sizes(site)[0]), stack)
    return Sums(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))


def zeros_of(like: Any) -> Any:
    """Return zeros in place of shapes and dtypes, sharded as these are on explicit axes."""
    return jax.tree.map(_zeros, like)


def _zeros(like: Any) -> jax.Array:
    zeros = jnp.zeros(like.shape, like.dtype)
    # Where a computation has been left to the compiler, the axes around it are not explicit.
    own, around = getattr(like.sharding, "mesh", None), jax.sharding.get_abstract_mesh()
    explicit = own is not None and jax.sharding.AxisType.Explicit in own.axis_types
    if not explicit or not (around.empty or jax.sharding.AxisType.Explicit in around.axis_types):
        return zeros
    return jax.sharding.reshard(zeros, like.sharding)


def operands_are_smaller(site: Site, kept: Kept) -> bool:
    """Return whether a product's two sides have fewer entries than what is kept of their sums."""
    data, cotangent = site.operand_types()
    # Cotangents of integers have a dtype of their own, and operands that differ between devices
    # cannot leave the shard_map by a dummy that is the same on all of them.
    if not jnp.issubdtype(data.dtype, jnp.floating) or varying_axes(data):
        return False
    stack, *_ = site.leaf_view.matrix_shape(site.origin.leaf_shape)
    return data.size + cotangent.size < math.prod(stack) * sum(form.count for form in kept)


class Later(NamedTuple):
    """How a layer is measured whose moments are asked for after the backward pass.

    Fields:
      sampling: which examples and positions to look at.
      count: what that is meant for: so many numbers kept, or fewer.
    """

    sampling: Sampling
    count: int


@dataclasses.dataclass(frozen=True)
class Gauge:
    """How one site is measured.

    Attributes:
      site: the layer's product.
      sampling: which examples and positions to look at.
      like: arrays, or shapes and dtypes, of the sums.
      kept: what is kept of the Gram matrices.
      later: how it is measured if another form is asked for; None for the same sampling.
      sharing: who shares the examples, and then has some rows of the sums; None where the compiler
        decides.
    """

    site: Site
    sampling: Sampling
    like: Sums
    kept: Kept
    later: Later | None = None
    sharing: Sharing | None = None

    @property
    def share(self) -> float:
        """Which part of the rows is looked at."""
        examples, positions = self.site.extent()
        parts = self._num_parts
        return self.sampling.of_each(parts).share(examples // parts, positions)

    @property
    def _num_parts(self) -> int:
        return 1 if self.sharing is None else self.sharing.num_parts(self.site)

    def keeping(self, kept: Kept) -> "Gauge":
        """Return how the site is measured if this is asked for."""
        like = sums_like(self.site, kept, self.like.total.dtype)
        sharing = self.sharing and dataclasses.replace(self.sharing, storage=None)
        asked = dataclasses.replace(self, like=like, kept=kept, later=None, sharing=sharing)
        if self.later is None or kept.count > self.later.count:
            return asked
        # What costs less is seen of more rows.
        sampling = self.later.sampling.stretched(self.later.count / kept.count)
        return dataclasses.replace(asked, sampling=sampling)

    def read_if(self, flag: jax.Array | None, operands: Operands) -> Sums:
        """Measure, or return zeros where a traced ``flag`` is off; None measures always."""
        if flag is None:
            return self.read(operands)
        axes = varying_axes(jax.typeof(operands.cotangent))

        def skip(operands: Operands) -> Sums:
            del operands
            # Both branches of a cond must vary over the same mesh axes.
            return jax.tree.map(lambda zero: vary(zero, axes), zeros_of(self.like))

        # Nothing but the Gram products sits in the cond. On a CPU, XLA runs the gradient of a
        # convolution inside a cond (or a loop) many times slower than outside.
        return jax.lax.cond(flag, self.read, skip, operands)

    def read(self, operands: Operands) -> Sums:
        """Return the site's four sums, each an estimate of the sum over all positions."""
        return on_auto_axes(self._read, _refuse_derivatives(operands), like=self.like)

    def _read(self, operands: Operands) -> Sums:
        parts = self._num_parts
        if self.sharing is not None and parts > 1:
            sampling, specs = self.sampling.of_each(parts), self.sharing.specs(self.like, self.kept)
            own = dataclasses.replace(self, sampling=sampling, sharing=None)
            return self.sharing.add_up(own._read, operands, self.site, specs=specs)
        # Where a sample starts is hashed from the cotangent, so that it varies from step to step
        # with no key to pass. Of absolute values: a softmax's cotangents sum to zero.
        size = jnp.sum(jnp.abs(operands.cotangent.astype(jnp.float32)))
        seed = spread(jax.lax.bitcast_convert_type(size, jnp.uint32))
        total = self.site.add_up(lambda part: self.sums(part, seed), operands, self.sampling)
        axes = varying_axes(jax.typeof(operands.cotangent))
        placed = self._place_in_leaf(total)
        # A site stacks the layers of a vmap in one axis. The leaf may have several, or none.
        return jax.tree.map(lambda x, shape: vary(x.reshape(shape.shape), axes), placed, self.like)

    def sums(self, piece: Operands, seed: jax.Array) -> Sums:
        """Compute the sums over all examples, or over a piece of them."""
        dtype = self.like.total.dtype
        inputs, outputs, scale = self.site.signals(piece, (self.sampling, seed))
        inputs, outputs = inputs.astype(dtype), outputs.astype(dtype)
        # Groups of a convolution are further rows of the inputs, but no further positions.
        per_group = scale / self.site.groups
        at_inputs, at_outputs = self._rooms()
        return Sums(
            _times(_gram(inputs, self.kept.inputs, room=at_inputs), per_group),
            _times(_gram(outputs, self.kept.outputs, room=at_outputs), scale),
            _times(jnp.sum(inputs, axis=1), per_group),
            jnp.full(inputs.shape[0], outputs.shape[1] * scale, dtype),
        )

    def _rooms(self) -> tuple["_Room", "_Room"]:
        """Return the room around the site's features among the leaf's: the input's, the output's.

        There is none unless the site's kernel is a part that was cut out of its leaf.
        """
        cut, view, nothing = self.site.view.cut, self.site.leaf_view, (0, 0)
        if cut is None:
            return nothing, nothing
        m, n = side_sizes(self.site)
        if cut.axis in (view.rows if view.input_side == "rows" else view.cols):
            return (cut.start, m - cut.start - cut.size), nothing
        return nothing, (cut.start, n - cut.start - cut.size)

    def _place_in_leaf(self, sums: Sums) -> Sums:
        """Place what is kept whole of a part among the leaf's features; the rest saw zeros."""
        at_inputs, at_outputs = self._rooms()
        return Sums(
            _pad_whole(sums.inputs, self.kept.inputs, at_inputs),
            _pad_whole(sums.outputs, self.kept.outputs, at_outputs),
            jnp.pad(sums.mean, ((0, 0), at_inputs)) if any(at_inputs) else sums.mean,
            sums.total,
        )


# How many features of a leaf come before those of a part, and how many after them.
_Room = tuple[int, int]


def _gram(rows: jax.Array, form: Form, *, room: _Room) -> jax.Array:
    """Return what a form keeps of ``Σ_r x_r x_rᵀ``, of ``(S, R, d)``."""
    if isinstance(form, Full):
        return jnp.einsum("srd,sre->sde", rows, rows)
    # The blocks of a part are not the leaf's, so its features take their places before.
    rows = jnp.pad(rows, ((0, 0), (0, 0), room))
    if form.size > rows.shape[-1]:
        rows = jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], -1)
    return form.gram(spd.transpose(rows)).stored


def _times(array: jax.Array, number: float) -> jax.Array:
    """Return a multiple, without a pass over the array where it is the array itself."""
    return array if number == 1 else array * number


def _pad_whole(gram: jax.Array, form: Form, room: _Room) -> jax.Array:
    padded = isinstance(form, Full) and any(room)
    return jnp.pad(gram, ((0, 0), room, room)) if padded else gram


@jax.custom_jvp
def _refuse_derivatives(signals):
    """Pass signals on, and refuse to be differentiated: the sums are quadratic in them."""
    return signals


@_refuse_derivatives.defjvp
def _refuse(primals, tangents):
    raise TypeError(
        "value_grad_and_extras cannot be differentiated while it captures signals: their Gram "
        "matrices are quadratic in the cotangent, so a second derivative through them would be "
        "wrong. Pass signals=False, or use the matvecs extras['hessian'] and "
        "extras['gauss_newton']."
    )
