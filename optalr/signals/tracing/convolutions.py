"""Convolutions as layers: the input of one is the patch that each output position sees.

In: a ``conv_general_dilated`` of data and a parameter. Out: its site, or ``NotALayer`` with the
reason. Patches are the input many times over, so they are laid out a piece of the batch at a time.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optalr.signals.tracing.patches import Geometry, gather_patches, slice_patches
from optalr.signals.tracing.sampling import comb, pick, scatter
from optalr.signals.tracing.site import (
    Operands,
    Product,
    Sampling,
    Signals,
    Site,
    Sums,
    features,
    spread,
)
from optalr.signals.tracing.views import Atom, NotALayer, View, axes_of, identity_view, matrix_view

# Patches are laid out in pieces of about this many entries (or as many as the input has, if that is
# more), and in no more pieces than that: each is compiled on its own.
PIECE = 2**20
MOST_PIECES = 8


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ConvSite(Site):
    """A ``conv_general_dilated`` of data and a kernel.

    A grouped convolution's groups share one A: they count as further positions of the input.

    Attributes:
      stacked: number of layers that a ``vmap`` made the groups of one convolution, else 1.
    """

    stacked: int = 1

    @property
    def _numbers(self) -> Any:
        """Which dimension is which: ``lhs_spec`` (N, C, *spatial), ``rhs_spec`` (O, I, *spatial),
        ``out_spec`` (N, C, *spatial).
        """
        return self.equation.params["dimension_numbers"]

    def output_view(self) -> View:
        """Return the output as a view: the channels are the features."""
        shape = self.equation.outvars[0].aval.shape
        dims = [(Atom(-1 - axis, 1, size),) for axis, size in enumerate(shape)]
        dims[self._numbers.out_spec[1]] = self.view.dims[self._numbers.rhs_spec[0]]
        return identity_view(self, shape).with_dims(dims)

    def extent(self) -> tuple[int, int]:
        """Return the sizes of the batch and of the output."""
        shape, spec = self.equation.outvars[0].aval.shape, self._numbers.out_spec
        return shape[spec[0]], math.prod(shape[axis] for axis in spec[2:])

    def example_axes(self) -> tuple[int, int] | None:
        """Return the batch dimensions."""
        return self._numbers.lhs_spec[0], self._numbers.out_spec[0]

    def add_up(
        self, measure: Callable[[Operands], Sums], operands: Operands, sampling: Sampling
    ) -> Sums:
        """Add up the sums over pieces of the examples, one after the other in the same memory."""
        total: Sums | None = None
        for start, end in itertools.pairwise(self._piece_edges(operands, sampling)):
            if total is None:
                total = measure(self._piece(operands, start, end - start))
                continue
            # A piece must wait for the one before, or a scheduler lays them all out at once (the
            # CPU's does, and drops barriers first). Entries of a Gram diagonal are not negative,
            # so the start stays what it is, but not so that the compiler could tell.
            begin = start + (total.inputs[(0,) * total.inputs.ndim] < 0)
            piece = measure(self._piece(operands, begin, end - start))
            total = jax.tree.map(jnp.add, total, piece)
        return measure(operands) if total is None else total

    def _piece_edges(self, operands: Operands, sampling: Sampling) -> list[int]:
        """Return edges of pieces whose patches are about as large as the input, if several."""
        spec, (data, cotangent) = self._numbers, operands
        examples = data.shape[spec.lhs_spec[0]]
        positions = math.prod(cotangent.shape[axis] for axis in spec.out_spec[2:])
        # A sample is small, and would have to be drawn across the pieces.
        if sampling.counts(examples, positions) != (examples, positions):
            return []
        area = math.prod(self.view.shape[axis] for axis in spec.rhs_spec[2:])
        patches = examples * positions * area * data.shape[spec.lhs_spec[1]]
        number = min(-(-patches // max(PIECE, data.size)), MOST_PIECES, examples)
        return [examples * i // number for i in range(number + 1)] if number > 1 else []

    def _piece(self, operands: Operands, start: Any, size: int) -> Operands:
        """Return both sides of some examples; ``start`` may be traced."""
        spec, (data, cotangent) = self._numbers, operands
        return Operands(
            jax.lax.dynamic_slice_in_dim(data, start, size, axis=spec.lhs_spec[0]),
            jax.lax.dynamic_slice_in_dim(cotangent, start, size, axis=spec.out_spec[0]),
        )

    def signals(self, operands: Operands, take: tuple[Sampling, jax.Array]) -> Signals:
        """Lay out patches and cotangents, one row an example and output position."""
        sampling, seed = take
        data, cotangent = self._channels_last(operands)
        examples, *out_shape, _ = cotangent.shape
        positions = math.prod(out_shape)
        keep_examples, keep_positions = sampling.counts(examples, positions)
        if keep_examples < examples:
            index = comb(examples, keep_examples, seed)
            data, cotangent = pick(data, index, 0), pick(cotangent, index, 0)
        padded = self._pad(data)
        cotangent = cotangent.reshape(keep_examples, positions, -1)
        geometry = self._geometry(out_shape)
        if keep_positions < positions:
            index = scatter(positions, keep_positions, spread(seed))
            cotangent = pick(cotangent, index, 1)
            patches = gather_patches(padded, geometry, index)
        else:
            patches = slice_patches(padded, geometry)
        rows = keep_examples * keep_positions
        inputs, outputs = self._as_rows(patches, cotangent, geometry.kernel)
        return Signals(inputs, outputs, examples * positions / rows)

    def _channels_last(self, operands: Operands) -> Operands:
        lhs, out = self._numbers.lhs_spec, self._numbers.out_spec
        return Operands(
            jnp.transpose(operands.data, (lhs[0], *lhs[2:], lhs[1])),
            jnp.transpose(operands.cotangent, (out[0], *out[2:], out[1])),
        )

    def _geometry(self, out_shape: list[int]) -> Geometry:
        params = self.equation.params
        kernel = [self.view.shape[axis] for axis in self._numbers.rhs_spec[2:]]
        return Geometry(kernel, out_shape, params["window_strides"], params["rhs_dilation"])

    def _pad(self, data: jax.Array) -> jax.Array:
        """Pad around and, for a transposed convolution, between the entries of the data."""
        params = self.equation.params
        padding = [
            (low, high, dilation - 1)
            for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True)
        ]
        return jax.lax.pad(data, jnp.zeros((), data.dtype), [(0, 0, 0), *padding, (0, 0, 0)])

    def _as_rows(
        self, patches: jax.Array, cotangent: jax.Array, kernel: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Flatten examples and positions into rows, kernel positions and channels into features."""
        # (examples, positions, kernel positions, channels): a stacked layer's groups go to the
        # front, any other's count as further positions.
        rows = patches.shape[0] * patches.shape[1]
        spec, dims = self._numbers.rhs_spec, self.view.dims
        if self.stacked * self.groups > 1:
            patches = patches.reshape(*patches.shape[:3], self.stacked * self.groups, -1)
            patches = jnp.moveaxis(patches, 3, 0 if self.stacked > 1 else 2)
        patches = patches.reshape(self.stacked, rows * self.groups, *kernel, patches.shape[-1])
        patches = features(patches, 2, [dims[axis] for axis in (*spec[2:], spec[1])])
        if self.stacked > 1:
            cotangent = jnp.moveaxis(cotangent.reshape(rows, self.stacked, -1), 1, 0)
        else:
            cotangent = cotangent.reshape(1, rows, -1)
        outputs = dims[spec[0]][1 if self.stacked > 1 else 0 :]
        return patches, features(cotangent, 2, [outputs])


def conv_site(product: Product) -> Site:
    """Return the site of a ``conv_general_dilated``.

    Raises:
      NotALayer: the product is no layer.
    """
    equation, view = product.equation, product.view
    if product.window is not None:
        raise NotALayer("concatenated before its convolution")
    if product.kernel != 1:
        raise NotALayer("a parameter in the place of a convolution's input")
    if equation.params["batch_group_count"] != 1:
        raise NotALayer("a convolution with batch groups")
    numbers = equation.params["dimension_numbers"]
    outputs = view.dims[numbers.rhs_spec[0]]
    inputs = [atom for axis in numbers.rhs_spec[1:] for atom in view.dims[axis]]
    groups, stacked = equation.params["feature_group_count"], 1
    stack: tuple[Atom, ...] = ()
    # Under vmap over the kernel jax makes the batch axis the major part of the output channels and
    # counts it as groups. Such a group is a layer of its own, with its own input and factors.
    if groups > 1 and len(axes_of(outputs)) > 1:
        if outputs[0].size != groups:
            raise NotALayer("grouped convolutions stacked by vmap")
        stack, outputs, groups, stacked = outputs[:1], outputs[1:], 1, groups
    return ConvSite(
        origin=product,
        leaf_view=matrix_view(
            product.leaf_shape, view, stack=stack, inputs=inputs, outputs=outputs
        ),
        num_examples=product.data.shape[numbers.lhs_spec[0]],
        groups=groups,
        stacked=stacked,
    )
