"""Reporting which leaves the capture reaches, and why it misses the others."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from optalr.linalg.blocks import Blocks
from optalr.linalg.structured import Diagonal, Full
from optalr.signals.extras import check_storage, checked_sampling
from optalr.signals.loss import pose
from optalr.signals.moments import FactorStorage, Form, LeafView, Sides
from optalr.signals.tapping.capture import Tapped, layers_of
from optalr.signals.tapping.gauge import Kept
from optalr.signals.tapping.memory import measuring_bytes


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
      measuring_bytes: bytes that measuring the layer takes meanwhile: inputs and cotangents laid
        out in rows (of a convolution its patches), and sums in the shapes that are kept.
    """

    path: str
    shape: tuple[int, ...]
    treatment: str
    view: LeafView | None
    state_bytes: int
    reason: str = ""
    measuring_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What ``optalr.coverage`` returns: a printable report, and the ``layout=`` of a method.

    Attributes:
      leaves: one ``LeafTreatment`` a leaf, in the order of ``jax.tree_util.tree_leaves``. The total
        of their measuring bytes is what measuring all layers at once takes.
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
        header = ("leaf", "shape", "treatment", "state bytes", "measuring bytes", "reason")
        rows = [
            (
                leaf.path,
                str(leaf.shape),
                leaf.treatment,
                f"{leaf.state_bytes:,}",
                f"{leaf.measuring_bytes:,}",
                leaf.reason,
            )
            for leaf in self.leaves
        ]
        state = sum(leaf.state_bytes for leaf in self.leaves)
        measuring = sum(leaf.measuring_bytes for leaf in self.leaves)
        rows.append(("total", "", "", f"{state:,}", f"{measuring:,}", ""))
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
    every: int = 1,
    max_positions: int | None = None,
    storage: FactorStorage | None = None,
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
      every: as passed to ``value_grad_and_extras``; it decides what measuring takes.
      max_positions: likewise.
      storage: likewise.

    Returns:
      A ``Coverage``: printable, ``.treatment`` maps a leaf's key path to ``"kronecker"``,
      ``"bias"`` (the output factor of its layer) or ``"diagonal"``.

    Raises:
      ValueError: with ``strict``, a leaf has no layer; the message lists each with its reason.
        ``every`` or ``max_positions`` is out of range.
      TypeError: ``options`` or ``storage`` says nothing of what is kept.

    Cost: one trace of the loss.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda params, x: jnp.mean(jnp.tanh(x @ params["w"] + params["b"][None]))
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
      >>> coverage(loss_fn, params, jnp.ones((4, 3))).treatment
      {"['b']": 'bias', "['w']": 'kronecker'}
    """
    check_storage("options", options)
    check_storage("storage", storage)
    _, traced = pose(loss_fn, params, args, has_aux=None, axis_name=None)
    layers = layers_of(traced)
    tapped = Tapped(traced, layers, True, checked_sampling(every, max_positions), storage)
    treat = _Treating.by(tapped, FactorStorage() if options is None else options)
    report = Coverage(tuple(treat(leaf) for leaf in range(traced.num_leaves)))
    missed = [leaf for leaf in report.leaves if leaf.treatment == "diagonal"]
    if strict and missed:
        listed = "; ".join(f"{leaf.path} ({leaf.reason})" for leaf in missed)
        raise ValueError(
            f"strict coverage: {len(missed)} of {len(report.leaves)} leaves fall back to diagonal "
            f"second moments: {listed}. Pass strict=False to accept this, or tap the layer by hand "
            "with optalr.tap_layer."
        )
    return report


@dataclasses.dataclass(frozen=True)
class _Treating:
    """From a leaf to what a method does with it.

    Attributes:
      tapped: the loss and its layers.
      options: what the method keeps.
      views: the matrix view of each captured leaf, with its bias.
      measuring: the bytes that measuring it takes.
      summed: what is kept of each leaf whose Gram matrices are summed up in the backward pass.
    """

    tapped: Tapped
    options: FactorStorage
    views: Mapping[int, LeafView]
    measuring: Mapping[int, int]
    summed: Mapping[int, Kept]

    @classmethod
    def by(cls, tapped: Tapped, options: FactorStorage) -> "_Treating":
        """Look at all layers of a loss."""
        shapes, found = tapped.traced.leaf_shapes, tapped.layers.views.items()
        views = {leaf: dataclasses.replace(view, bias=tapped.bias_of(leaf)) for leaf, view in found}
        sides = {leaf: options.sides(view, shapes[leaf]) for leaf, view in views.items()}
        late = tapped.measured_late()
        summed = {leaf: kept for leaf, kept in tapped.kept().items() if leaf not in late}
        return cls(tapped, options, views, measuring_bytes(tapped, sides), summed)

    def __call__(self, leaf: int) -> LeafTreatment:
        traced, layers = self.tapped.traced, self.tapped.layers
        path, shape, reasons = traced.paths[leaf], traced.leaf_shapes[leaf], layers.notes[leaf]
        missed = [f"not in the moments: {'; '.join(reasons)}"] if reasons else []
        # Factors of half-precision leaves are float32.
        itemsize = max(4, jnp.dtype(traced.leaves[leaf].dtype).itemsize)
        if leaf in self.views:
            view = self.views[leaf]
            sides = self.options.sides(view, shape)
            stack, *_ = view.matrix_shape(shape)
            state_bytes = itemsize * _count_numbers(self.options, stack, sides)
            notes = _storage_notes(self.options, sides) + self._measuring_notes(leaf, sides)
            reason, taken = "; ".join(notes + missed), self.measuring[leaf]
            return LeafTreatment(path, shape, "kronecker", view, state_bytes, reason, taken)
        if leaf in layers.biases.values():
            kernel = next(k for k, bias in layers.biases.items() if bias == leaf)
            joint = [f"one more row of {traced.paths[kernel]}"] if self.options.joint_bias else []
            return LeafTreatment(path, shape, "bias", None, 0, "; ".join(joint + missed))
        reason = "; ".join(reasons) or "not used by the loss"
        return LeafTreatment(path, shape, "diagonal", None, itemsize * math.prod(shape), reason)

    def _measuring_notes(self, leaf: int, sides: Sides) -> list[str]:
        """Return which sides are summed up whole in the backward pass, though a part is kept."""
        if leaf not in self.summed:
            return []
        kept = self.summed[leaf]
        held = kept if self.views[leaf].input_side == "rows" else reversed(kept)
        return [
            f"{name} measured whole (pass storage= to value_grad_and_extras)"
            for name, form, wanted in zip(("rows", "cols"), held, sides, strict=True)
            if isinstance(form, Full) and not isinstance(wanted, Full)
        ]


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
