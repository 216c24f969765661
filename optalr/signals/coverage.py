"""Reporting which leaves the capture reaches, and why it misses the others."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from optalr.linalg.blocks import Blocks
from optalr.linalg.structured import Diagonal, Full
from optalr.signals.extras import check_examples, check_loss, check_storage, checked_sampling
from optalr.signals.loss import pose
from optalr.signals.moments import FactorStorage, Form, LeafView, Sides
from optalr.signals.tapping.capture import Tapped, layers_of
from optalr.signals.tapping.effort import Effort, efforts, layer_gradient_flops
from optalr.signals.tapping.gauge import Kept


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
      sampled: which part of its examples and positions a measurement looks at, 0 to 1.
      measuring_cost: the flops of a measurement, over those of the gradients of all layers.
      refresh_cost: the flops of taking its roots, counted as ``20 d³`` for a factor of d rows (an
        eigendecomposition), over the same.
    """

    path: str
    shape: tuple[int, ...]
    treatment: str
    view: LeafView | None
    state_bytes: int
    reason: str = ""
    measuring_bytes: int = 0
    sampled: float = 0.0
    measuring_cost: float = 0.0
    refresh_cost: float = 0.0


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
        header = ("leaf", "shape", "treatment", "state bytes", "measuring bytes", "sampled")
        header = (*header, "measuring", "refresh", "reason")
        rows = [
            (
                leaf.path,
                str(leaf.shape),
                leaf.treatment,
                f"{leaf.state_bytes:,}",
                f"{leaf.measuring_bytes:,}",
                f"{100 * leaf.sampled:.3g} %" if leaf.sampled else "",
                *(f"{cost:.2f}" if leaf.sampled else "" for cost in _costs(leaf)),
                leaf.reason,
            )
            for leaf in self.leaves
        ]
        state = sum(leaf.state_bytes for leaf in self.leaves)
        measuring = sum(leaf.measuring_bytes for leaf in self.leaves)
        costs = (f"{sum(each):.2f}" for each in zip(*map(_costs, self.leaves), strict=True))
        rows.append(("total", "", "", f"{state:,}", f"{measuring:,}", "", *costs, ""))
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in [header, tuple("-" * w for w in widths), *rows]
        ]
        return "\n".join([*lines, _UNITS])

    __repr__ = __str__


_UNITS = (
    "measuring, refresh: flops of a measurement and of taking roots, over those of the layers' "
    "gradients"
)


def _costs(leaf: LeafTreatment) -> tuple[float, float]:
    return leaf.measuring_cost, leaf.refresh_cost


def coverage(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    strict: bool = False,
    options: FactorStorage | None = None,
    every: int | None = None,
    max_positions: int | None = None,
    max_cost: float | None = 0.25,
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
      max_cost: likewise.
      storage: likewise.

    Returns:
      A ``Coverage``: printable, ``.treatment`` maps a leaf's key path to ``"kronecker"``,
      ``"bias"`` (the output factor of its layer) or ``"diagonal"``.

    Raises:
      ValueError: with ``strict``, a leaf has no layer; the message lists each with its reason.
        ``every``, ``max_positions`` or ``max_cost`` is out of range.
      TypeError: ``options`` or ``storage`` says nothing of what is kept.

    Cost: one trace of the loss.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda params, x: jnp.mean(jnp.tanh(x @ params["w"] + params["b"][None]))
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
      >>> coverage(loss_fn, params, jnp.ones((4, 3))).treatment
      {"['b']": 'bias', "['w']": 'kronecker'}
    """
    check_loss(loss_fn)
    check_storage("options", options)
    check_storage("storage", storage)
    _, traced = pose(loss_fn, params, args, has_aux=None, axis_name=None)
    layers = layers_of(traced)
    check_examples(layers, loss_fn, args)
    sampling = checked_sampling(every, max_positions, max_cost)
    tapped = Tapped(traced, layers, True, sampling, storage)
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
      efforts: what measuring it takes.
      summed: what is kept of each leaf whose Gram matrices are summed up in the backward pass.
    """

    tapped: Tapped
    options: FactorStorage
    views: Mapping[int, LeafView]
    efforts: Mapping[int, Effort]
    summed: Mapping[int, Kept]

    @classmethod
    def by(cls, tapped: Tapped, options: FactorStorage) -> "_Treating":
        """Look at all layers of a loss."""
        shapes, found = tapped.traced.leaf_shapes, tapped.layers.views.items()
        views = {leaf: dataclasses.replace(view, bias=tapped.bias_of(leaf)) for leaf, view in found}
        sides = {leaf: options.sides(view, shapes[leaf]) for leaf, view in views.items()}
        late = tapped.measured_late()
        summed = {leaf: kept for leaf, kept in tapped.kept().items() if leaf not in late}
        return cls(tapped, options, views, efforts(tapped, sides), summed)

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
            state_bytes = _state_bytes(self.options, stack, sides, itemsize=itemsize)
            notes = _storage_notes(self.options, sides) + self._measuring_notes(leaf, sides)
            effort, gradient = self.efforts[leaf], layer_gradient_flops(self.tapped)
            return LeafTreatment(
                path,
                shape,
                "kronecker",
                view,
                state_bytes,
                reason="; ".join(notes + missed),
                measuring_bytes=effort.nbytes,
                sampled=effort.share,
                measuring_cost=effort.flops / gradient,
                refresh_cost=math.prod(stack) * sum(map(_root_flops, sides)) / gradient,
            )
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


def _state_bytes(
    storage: FactorStorage, stack: Sequence[int], sides: Sequence[Form], *, itemsize: int
) -> int:
    """Return the bytes that are kept for a kernel: factors, roots and what goes with them."""
    keeps_roots = storage.spectrum == "factored"
    keeps_bases = keeps_roots and storage.root_method == "eigenbasis"
    resting = itemsize if storage.root_dtype is None else jnp.dtype(storage.root_dtype).itemsize
    total = 0
    for side in sides:
        if isinstance(side, Diagonal):
            total += 2 * itemsize * side.count
        else:
            total += (itemsize + (2 if keeps_bases else 1) * resting) * side.count
        if not keeps_roots:
            total += itemsize * side.padded_size
    if storage.spectrum == "measured":
        total += itemsize * math.prod(side.padded_size for side in sides)
    return math.prod(stack) * total


def _root_flops(side: Form) -> int:
    """Return the flops of decomposing a factor."""
    if isinstance(side, Diagonal):
        return 0
    return 20 * side.block * side.count  # a block of b rows has b² of the numbers


def _storage_notes(storage: FactorStorage, sides: Sequence[Form]) -> list[str]:
    """Return which sides are not stored whole, and why."""
    notes = []
    for name, side in zip(("rows", "cols"), sides, strict=True):
        if isinstance(side, Diagonal):
            limit = f"{side.size} > max_factor_size={storage.max_factor_size}"
            notes.append(f"{name} keep a diagonal ({limit})")
        elif isinstance(side, Blocks):
            limit = f"{side.size} > block_size={storage.largest_block}"
            notes.append(f"{name} in {side.num_blocks} blocks of {side.block} ({limit})")
    return notes
