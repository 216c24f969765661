"""Reporting which leaves the capture reaches, and why it misses the others."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from optalr.linalg.structured import Blocks, Diagonal
from optalr.signals.loss import Traced, pose
from optalr.signals.moments import FactorStorage, Form, LeafView
from optalr.signals.tracing.layers import find_layers
from optalr.signals.tracing.walk import Layers


@dataclasses.dataclass(frozen=True)
class LeafTreatment:
    """What a Kronecker-factored method does with one leaf, and why.

    Attributes:
      path: key path, ``jax.tree_util.keystr``.
      shape: the leaf's shape.
      treatment: ``"kronecker"`` (captured layer), ``"bias"`` (the columns' factor of its layer) or
        ``"diagonal"`` (fallback).
      view: how the leaf is seen as a matrix, for ``"kronecker"``.
      state_bytes: bytes that ``scale_by_kronecker`` keeps for the leaf, given the report as its
        ``layout`` and the same options.
      reason: why no layer was found, or why a factor is not kept whole; empty otherwise.
    """

    path: str
    shape: tuple[int, ...]
    treatment: str
    view: LeafView | None
    state_bytes: int
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What ``optalr.coverage`` returns: a printable report, and the ``layout=`` of a method.

    Attributes:
      leaves: one ``LeafTreatment`` a leaf, in the order of ``jax.tree_util.tree_leaves``.
    """

    leaves: tuple[LeafTreatment, ...]

    @property
    def treatment(self) -> dict[str, str]:
        """Map each leaf's key path to its treatment."""
        return {leaf.path: leaf.treatment for leaf in self.leaves}

    def __getitem__(self, path: str) -> LeafTreatment:
        for leaf in self.leaves:
            if leaf.path == path:
                return leaf
        raise KeyError(path)

    def __str__(self) -> str:
        header = ("leaf", "shape", "treatment", "state bytes", "reason")
        rows = [
            (leaf.path, str(leaf.shape), leaf.treatment, f"{leaf.state_bytes:,}", leaf.reason)
            for leaf in self.leaves
        ]
        total = sum(leaf.state_bytes for leaf in self.leaves)
        rows.append(("total", "", "", f"{total:,}", ""))
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in [header, tuple("-" * w for w in widths), *rows]
        ]
        return "\n".join(lines)

    __repr__ = __str__


def coverage(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    strict: bool = False,
    options: FactorStorage | None = None,
) -> Coverage:
    """Report, leaf by leaf, how a Kronecker-factored method will treat a model.

    Choose it before a long run, and where a method asks for a ``layout=``. The report prints as a
    table. Passed on as ``layout=``, it gives ``tso_alra`` and ``scale_by_kronecker`` the matrix
    view, the stacked axes and the bias of each leaf. Nothing is computed; the loss is only traced.

    Args:
      loss_fn: ``loss_fn(params, *args)``, which returns the loss or ``(loss, aux)``.
      params: the parameters, or their ``jax.ShapeDtypeStruct``s.
      *args: the loss's further arguments, as in training (shapes are enough here too).
      strict: whether to refuse a model in which some leaf has no layer.
      options: the method's ``KroneckerOptions``, if they are not the defaults. The table then shows
        blocks, size limits and joint biases, and the bytes that
        ``scale_by_kronecker(layout=..., options=options)`` allocates for each leaf.

    Returns:
      A ``Coverage``: printable, ``.treatment`` maps a leaf's key path to ``"kronecker"``,
      ``"bias"`` (the output factor of its layer) or ``"diagonal"``.

    Raises:
      ValueError: with ``strict``, a leaf has no layer; the message lists each with its reason.

    Cost: one trace of the loss.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda params, x: jnp.mean(jnp.tanh(x @ params["w"] + params["b"][None]))
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
      >>> coverage(loss_fn, params, jnp.ones((4, 3))).treatment
      {"['b']": 'bias', "['w']": 'kronecker'}
    """
    _, traced = pose(loss_fn, params, args, has_aux=None, axis_name=None)
    layers = find_layers(traced.closed, traced.leaf_shapes)
    storage = FactorStorage() if options is None else options
    leaves = range(traced.num_leaves)
    report = Coverage(tuple(_treatment(leaf, layers, traced, storage=storage) for leaf in leaves))
    missed = [leaf for leaf in report.leaves if leaf.treatment == "diagonal"]
    if strict and missed:
        listed = "; ".join(f"{leaf.path} ({leaf.reason})" for leaf in missed)
        raise ValueError(
            f"strict coverage: {len(missed)} of {len(report.leaves)} leaves fall back to diagonal "
            f"second moments: {listed}. Pass strict=False to accept this, or tap the layer by hand "
            "with optalr.tap_layer."
        )
    return report


def _treatment(
    leaf: int, layers: Layers, traced: Traced, *, storage: FactorStorage
) -> LeafTreatment:
    path, shape, reasons = traced.paths[leaf], traced.leaf_shapes[leaf], layers.notes[leaf]
    # Factors of half-precision leaves are float32.
    itemsize = max(4, jnp.dtype(traced.leaves[leaf].dtype).itemsize)
    missed = [f"not in the moments: {'; '.join(reasons)}"] if reasons else []
    if leaf in layers.views:
        bias = traced.paths[layers.biases[leaf]] if leaf in layers.biases else None
        view = dataclasses.replace(layers.views[leaf], bias=bias)
        stack, m, n = view.matrix_shape(shape)
        if bias is not None and storage.joint_bias:
            m, n = (m + 1, n) if view.input_side == "rows" else (m, n + 1)
        sides = storage.side(m), storage.side(n)
        state_bytes = itemsize * _count_numbers(storage, stack, sides)
        reason = "; ".join(_storage_notes(storage, sides) + missed)
        return LeafTreatment(path, shape, "kronecker", view, state_bytes, reason)
    if leaf in layers.biases.values():
        kernel = next(k for k, bias in layers.biases.items() if bias == leaf)
        joint = [f"one more row of {traced.paths[kernel]}"] if storage.joint_bias else []
        return LeafTreatment(path, shape, "bias", None, 0, "; ".join(joint + missed))
    reason = "; ".join(reasons) or "not used by the loss"
    return LeafTreatment(path, shape, "diagonal", None, itemsize * math.prod(shape), reason)


def _count_numbers(storage: FactorStorage, stack: Sequence[int], sides: Sequence[Form]) -> int:
    """Return how many numbers are kept for a kernel: factors, roots and what goes with them."""
    keeps_roots = storage.spectrum == "factored"
    keeps_bases = keeps_roots and storage.root_method == "eigenbasis"
    total = 0
    for side in sides:
        total += 2 * side.count
        if keeps_bases and not isinstance(side, Diagonal):
            total += side.count
        if not keeps_roots:
            total += side.padded_size
    if storage.spectrum == "measured":
        total += math.prod(side.padded_size for side in sides)
    return math.prod(stack) * total


def _storage_notes(storage: FactorStorage, sides: Sequence[Form]) -> list[str]:
    """Return which sides are not stored whole, and why."""
    notes = []
    for name, side in zip(("rows", "cols"), sides, strict=True):
        if isinstance(side, Diagonal):
            limit = f"{side.size} > max_factor_size={storage.max_factor_size}"
            notes.append(f"{name} keep a diagonal ({limit})")
        elif isinstance(side, Blocks):
            limit = f"{side.size} > block_size={storage.block_size}"
            notes.append(f"{name} in {side.num_blocks} blocks of {side.block} ({limit})")
    return notes
