"""Reporting which leaves the capture reaches, and why it misses the others."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from optalr.signals.layers import Layers, find_layers
from optalr.signals.moments import Coverage, LeafTreatment
from optalr.signals.problem import Problem, trace


def coverage(
    loss_fn: Callable[..., Any], params: Any, *args: Any, strict: bool = False
) -> Coverage:
    """Report, leaf by leaf, how a Kronecker-factored method will treat a model.

    Choose it before a long run, and where a method asks for a ``layout=``: what is returned prints
    as a table and tells ``tso_alra`` and ``scale_by_kronecker`` each leaf's matrix view, stacked
    axes and bias. Nothing is computed; the loss is only traced.

    Args:
      loss_fn: ``loss_fn(params, *args)``, which returns the loss or ``(loss, aux)``.
      params: the parameters, or their ``jax.ShapeDtypeStruct``s.
      *args: the loss's further arguments, as in training (shapes are enough here too).
      strict: refuse a model in which some leaf has no layer.

    Returns:
      A ``Coverage``: printable, ``.treatment`` maps a leaf's key path to ``"kronecker"``,
      ``"bias"`` (the output factor of its layer) or ``"diagonal"``.

    Raises:
      ValueError: ``strict`` and a leaf falls back; the message lists each with its reason.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda params, x: jnp.mean(jnp.tanh(x @ params["w"] + params["b"][None]))
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
      >>> coverage(loss_fn, params, jnp.ones((4, 3))).treatment
      {"['b']": 'bias', "['w']": 'kronecker'}
    """
    problem = Problem.of(loss_fn, None, params, args)
    traced = trace(problem, params, None)
    layers = find_layers(traced.closed, traced.leaf_shapes)
    report = Coverage(
        tuple(
            _treatment(leaf, layers, traced.paths, shape)
            for leaf, shape in enumerate(traced.leaf_shapes)
        )
    )
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
    leaf: int, layers: Layers, paths: tuple[str, ...], shape: tuple[int, ...]
) -> LeafTreatment:
    notes = "; ".join(layers.notes[leaf])
    if leaf in layers.views:
        bias = paths[layers.biases[leaf]] if leaf in layers.biases else None
        view = dataclasses.replace(layers.views[leaf], bias=bias)
        stack, m, n = view.matrix_shape(shape)
        state_bytes = 2 * 4 * math.prod(stack) * (m * m + n * n)
        reason = f"not in the moments: {notes}" if notes else ""
        return LeafTreatment(paths[leaf], shape, "kronecker", view, state_bytes, reason)
    if leaf in layers.biases.values():
        reason = f"not in the moments: {notes}" if notes else ""
        return LeafTreatment(paths[leaf], shape, "bias", None, 0, reason)
    reason = notes or "not used by the loss"
    return LeafTreatment(paths[leaf], shape, "diagonal", None, 4 * math.prod(shape), reason)
