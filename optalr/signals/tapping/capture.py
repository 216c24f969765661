"""Differentiating a traced loss with its layers tapped."""

import collections
from typing import Any

import jax
from jax.extend import core as jex_core

from optalr.signals.problem import Traced
from optalr.signals.tapping import taps
from optalr.signals.tapping.assembly import leaf_sums, slot_chooser
from optalr.signals.tapping.measuring import (
    Dummies,
    operands_are_smaller,
    operands_like,
    zeros_of,
)
from optalr.signals.tapping.taps import Recorder
from optalr.signals.tracing.plan import Layers
from optalr.signals.tracing.sampling import Sampling


def differentiate(
    traced: Traced, layers: Layers, flag: Any, sampling: Sampling
) -> tuple[list[Any], list[Any], dict[Any, Dummies]]:
    """Return the flat outputs, the gradient's leaves, and what each slot measured.

    Args:
      traced: the traced loss, whose first output is the loss.
      layers: its layers.
      flag: whether to measure; a Python bool, or a traced one.
      sampling: which examples and positions to look at.
    """
    slots = zero_slots(traced, layers, flag)

    def loss(leaves, slots):
        outputs = evaluate_tapped(traced, layers, leaves, slots, flag, sampling)
        return outputs[0], outputs

    leaves = list(traced.leaves)
    if flag is False or not slots:
        (_, outputs), grads = jax.value_and_grad(loss, has_aux=True)(leaves, slots)
        return outputs, grads, slots
    (_, outputs), (grads, measured) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        leaves, slots
    )
    return outputs, grads, measured


def evaluate_tapped(
    traced: Traced, layers: Layers, leaves: Any, slots: dict[Any, Dummies], flag: Any, sampling: Any
) -> list[Any]:
    """Evaluate a traced function, tapped unless ``flag`` is a plain False."""
    arrays = traced.inputs[traced.num_leaves :]
    if flag is False or not slots:
        return jex_core.jaxpr_as_fun(traced.closed)(*leaves, *arrays)
    traced_flag = None if flag is True else flag
    recorder = Recorder(slots, slot_chooser(layers), traced_flag, sampling)
    return taps.run(traced.closed, layers, [*leaves, *arrays], recorder)


def zero_slots(traced: Traced, layers: Layers, flag: Any) -> dict[Any, Dummies]:
    """Return the dummies, zero, of every captured leaf.

    With a traced ``flag`` a layer that is used once hands on its operands where they are smaller
    than what is measured of them: what is off then writes its moments' zeros once, not twice.
    """
    like: dict[Any, Dummies] = {}
    choose = slot_chooser(layers)
    late = set() if isinstance(flag, bool) else _measured_late(traced, layers)
    for site in layers.sites:
        if site.leaf in late:
            like[site.leaf] = operands_like(site)
        else:
            like.setdefault(choose(site), leaf_sums(traced, site))
    return zeros_of(like)


def _measured_late(traced: Traced, layers: Layers) -> set[int]:
    """Return the leaves whose only site may hand on its operands, and had better."""
    uses = collections.Counter(site.leaf for site in layers.sites)
    return {
        site.leaf
        for site in layers.plan.sites_run_once(traced.closed.jaxpr)
        if uses[site.leaf] == 1 and operands_are_smaller(site, traced.leaf_shapes[site.leaf])
    }
