"""Reporting which leaves the capture reaches, and why it misses the others."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from optalr.signals.loss.problem import Problem
from optalr.signals.loss.traced import Traced, trace
from optalr.signals.moments import Coverage, LeafTreatment
from optalr.signals.storage import FactorStorage
from optalr.signals.tracing.layers import find_layers
from optalr.signals.tracing.plan import Layers


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
    problem = Problem.of(loss_fn, params, args, has_aux=None)
    traced = trace(problem, params, None)
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
        state_bytes = itemsize * storage.count_numbers(stack, sides)
        reason = "; ".join(storage.notes(sides) + missed)
        return LeafTreatment(path, shape, "kronecker", view, state_bytes, reason)
    if leaf in layers.biases.values():
        kernel = next(k for k, bias in layers.biases.items() if bias == leaf)
        joint = [f"one more row of {traced.paths[kernel]}"] if storage.joint_bias else []
        return LeafTreatment(path, shape, "bias", None, 0, "; ".join(joint + missed))
    reason = "; ".join(reasons) or "not used by the loss"
    return LeafTreatment(path, shape, "diagonal", None, itemsize * math.prod(shape), reason)
