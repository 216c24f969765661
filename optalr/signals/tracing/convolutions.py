"""Convolutions as layers: the input of one is the patch of each position, laid out in pieces."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.signals.tracing.sampling import comb, sampled_counts, scatter, spread
from optalr.signals.tracing.sites import Site, Window, features
from optalr.signals.tracing.views import Atom, View, axes_of, split_sides, whole

# Patches are laid out in pieces of about this many entries (or as many as the input has, if that is
# more), and in no more pieces than that: each is compiled on its own.
PIECE = 2**20
MOST_PIECES = 8


class ConvSite(Site):
    """A ``conv_general_dilated`` of data and a kernel; the input is the receptive-field patch.

    A grouped convolution's groups share one A: they count as further positions of the input.
    """

    @property
    def _numbers(self) -> Any:
        return self.equation.params["dimension_numbers"]

    def output_view(self) -> View:
        shape = self.equation.outvars[0].aval.shape
        dims = [(Atom(-1 - axis, 1, size),) for axis, size in enumerate(shape)]
        dims[self._numbers.out_spec[1]] = self.view.dims[self._numbers.rhs_spec[0]]
        return whole(self, shape).with_dims(dims)

    def piece_edges(self, data, cotangent, sampling):
        # A convolution's patches are its input many times over: lay out a part at a time.
        spec = self._numbers
        examples = data.shape[spec.lhs_spec[0]]
        positions = math.prod(cotangent.shape[axis] for axis in spec.out_spec[2:])
        if sampled_counts(examples, positions, sampling) != (examples, positions):
            return None
        area = math.prod(self.view.shape[axis] for axis in spec.rhs_spec[2:])
        patches = examples * positions * area * data.shape[spec.lhs_spec[1]]
        number = min(-(-patches // max(PIECE, data.size)), MOST_PIECES, examples)
        return [examples * i // number for i in range(number + 1)] if number > 1 else None

    def piece(self, data, cotangent, start, size):
        spec = self._numbers
        return (
            jax.lax.dynamic_slice_in_dim(data, start, size, axis=spec.lhs_spec[0]),
            jax.lax.dynamic_slice_in_dim(cotangent, start, size, axis=spec.out_spec[0]),
        )

    def signals(self, data, cotangent, sampling, seed):
        params = self.equation.params
        spec = self._numbers
        kernel_shape = [self.view.shape[axis] for axis in spec.rhs_spec[2:]]
        data = jnp.transpose(data, (spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1]))
        cotangent = jnp.transpose(
            cotangent, (spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])
        )
        examples, *out_shape, _ = cotangent.shape
        positions = math.prod(out_shape)
        keep_examples, keep_positions = sampled_counts(examples, positions, sampling)
        if keep_examples < examples:
            index = comb(examples, keep_examples, seed)
            data, cotangent = data[index], cotangent[index]
        padding = [
            (low, high, dilation - 1)
            for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True)
        ]
        data = jax.lax.pad(data, jnp.zeros((), data.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
        cotangent = cotangent.reshape(keep_examples, positions, -1)
        geometry = _Geometry(
            kernel_shape, out_shape, params["window_strides"], params["rhs_dilation"]
        )
        if keep_positions < positions:
            index = scatter(positions, keep_positions, spread(seed))
            cotangent = cotangent[:, index]
            patches = _gather_patches(data, geometry, index)
        else:
            patches = _slice_patches(data, geometry)
        # (examples, positions, kernel positions, channels): a stacked layer's groups go to the
        # front, any other's count as further positions.
        rows = keep_examples * keep_positions
        patches = patches.reshape(*patches.shape[:3], self.stacked * self.groups, -1)
        patches = jnp.moveaxis(patches, 3, 0 if self.stacked > 1 else 2)
        patches = patches.reshape(
            self.stacked, rows * self.groups, *kernel_shape, patches.shape[-1]
        )
        dims = [self.view.dims[axis] for axis in (*spec.rhs_spec[2:], spec.rhs_spec[1])]
        patches = features(patches, 2, dims)
        cotangent = jnp.moveaxis(cotangent.reshape(rows, self.stacked, -1), 1, 0)
        outputs = self.view.dims[spec.rhs_spec[0]][1 if self.stacked > 1 else 0 :]
        cotangent = features(cotangent, 2, [outputs])
        return patches, cotangent, examples * positions / rows


class _Geometry(NamedTuple):
    """Where a convolution's window stands: all per spatial axis."""

    kernel: Sequence[int]
    out: Sequence[int]
    strides: Sequence[int]
    dilation: Sequence[int]


def _slice_patches(padded: jax.Array, geometry: _Geometry) -> jax.Array:
    """Return every patch, ``(N, T, K, C)``, by one strided slice a kernel position."""
    pieces = []
    for flat in range(math.prod(geometry.kernel)):
        offset = _unravel(flat, geometry.kernel)
        start = [o * d for o, d in zip(offset, geometry.dilation, strict=True)]
        limit = [
            s + (out - 1) * stride + 1
            for s, out, stride in zip(start, geometry.out, geometry.strides, strict=True)
        ]
        piece = jax.lax.slice(
            padded,
            (0, *start, 0),
            (padded.shape[0], *limit, padded.shape[-1]),
            (1, *geometry.strides, 1),
        )
        pieces.append(piece.reshape(padded.shape[0], -1, padded.shape[-1]))
    return jnp.stack(pieces, axis=2)


def _gather_patches(padded: jax.Array, geometry: _Geometry, index: jax.Array) -> jax.Array:
    """Return the patches at the flat output positions ``index``, ``(N, P, K, C)``."""
    size = math.prod(padded.shape[1:-1])
    corner = jnp.zeros_like(index)
    rest = index
    pitch = size
    pitches = []
    for axis in range(len(geometry.out)):
        pitch //= padded.shape[1 + axis]
        pitches.append(pitch)
    for axis in reversed(range(len(geometry.out))):
        corner = corner + (rest % geometry.out[axis]) * geometry.strides[axis] * pitches[axis]
        rest = rest // geometry.out[axis]
    window = [
        sum(
            o * d * p
            for o, d, p in zip(
                _unravel(flat, geometry.kernel), geometry.dilation, pitches, strict=True
            )
        )
        for flat in range(math.prod(geometry.kernel))
    ]
    flat_data = padded.reshape(padded.shape[0], size, padded.shape[-1])
    places = corner[:, None] + jnp.array(window, corner.dtype)[None, :]
    return jnp.take(flat_data, places, axis=1, mode="clip")


def _unravel(flat: int, shape: Sequence[int]) -> list[int]:
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return index[::-1]


def conv_site(
    parent: Any,
    equation: Any,
    kernel: int,
    view: View,
    leaf_shape: tuple[int, ...],
    window: Window | None = None,
) -> Site | str:
    """Return the site of a ``conv_general_dilated`` whose kernel is a parameter, or why not."""
    if window is not None:
        return "concatenated before its convolution"
    if kernel != 1:
        return "a parameter in the place of a convolution's input"
    if equation.params["batch_group_count"] != 1:
        return "a convolution with batch groups"
    spec = equation.params["dimension_numbers"].rhs_spec
    outputs = view.dims[spec[0]]
    inputs = [atom for axis in spec[1:] for atom in view.dims[axis]]
    groups, stacked = equation.params["feature_group_count"], 1
    stack: tuple[Atom, ...] = ()
    if groups > 1 and len(axes_of(outputs)) > 1:  # layers under vmap are groups to jax
        if outputs[0].size != groups:
            return "grouped convolutions stacked by vmap"
        stack, outputs, groups, stacked = outputs[:1], outputs[1:], 1, groups
    sides = split_sides(len(leaf_shape), view.scanned, stack, inputs, outputs)
    if isinstance(sides, str):
        return sides
    data = equation.invars[0].aval
    num_examples = data.shape[equation.params["dimension_numbers"].lhs_spec[0]]
    return ConvSite(
        int(view.source),
        parent,
        equation,
        kernel,
        view,
        sides,
        num_examples,
        groups,
        stacked=stacked,
    )
