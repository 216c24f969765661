"""Differentiating a traced loss with its layers tapped, and turning sums into moments."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from optalr.signals import taps
from optalr.signals.measuring import (
    Dummies,
    Operands,
    Sums,
    measure,
    operands_are_smaller,
    zero_operands,
    zero_sums,
)
from optalr.signals.moments import LayerMoments
from optalr.signals.plan import Layers
from optalr.signals.problem import Traced
from optalr.signals.sampling import Sampling
from optalr.signals.sites import Site
from optalr.signals.taps import Recorder

_HEAD = "head"


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
    recorder = Recorder(slots, _slot_chooser(layers), traced_flag, sampling)
    return taps.run(traced.closed, layers, [*leaves, *arrays], recorder)


def _head_apart(layers: Layers) -> bool:
    """Whether the head's leaf is used by other sites too, so that it needs a slot of its own."""
    head = layers.head
    if head is None or head.view.scanned:
        return False
    return sum(site.leaf == head.leaf for site in layers.sites) > 1


def _slot_chooser(layers: Layers) -> Callable[[Site], Any]:
    apart = _head_apart(layers)
    return lambda site: _HEAD if apart and site is layers.head else site.leaf


def zero_slots(traced: Traced, layers: Layers, flag: Any) -> dict[Any, Dummies]:
    """Return the dummies, zero, of every captured leaf.

    With a traced ``flag`` a layer that is used once hands on its operands where they are smaller
    than what is measured of them: what is off then writes its moments' zeros once, not twice.
    """
    slots: dict[Any, Dummies] = {}
    choose = _slot_chooser(layers)
    late = {} if isinstance(flag, bool) else _measured_late(traced, layers)
    for site in layers.sites:
        if site.leaf in late:
            slots[site.leaf] = zero_operands(site)
        else:
            slots.setdefault(choose(site), _zero_sums(traced, site))
    return slots


def _measured_late(traced: Traced, layers: Layers) -> set[int]:
    """Return the leaves whose only site may hand on its operands, and had better."""
    uses = collections.Counter(site.leaf for site in layers.sites)
    return {
        site.leaf
        for site in layers.plan.sites_run_once(traced.closed.jaxpr)
        if uses[site.leaf] == 1 and operands_are_smaller(site, traced.leaf_shapes[site.leaf])
    }


def _zero_sums(traced: Traced, site: Site) -> Sums:
    leaf = traced.leaves[site.leaf]
    dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
    return zero_sums(site, jnp.shape(leaf), dtype)


def assemble(
    traced: Traced,
    layers: Layers,
    measured: dict[Any, Dummies],
    flag: Any,
    sampling: Sampling,
    num_examples: int | None,
) -> tuple[list[LayerMoments | None], LayerMoments | None]:
    """Turn what was measured into moments, one entry a leaf, and those of the head."""
    first: dict[int, Site] = {}
    for site in layers.sites:
        first.setdefault(site.leaf, site)

    def moments_of(site: Site, dummies: Dummies, bias: str | None) -> LayerMoments:
        like = _zero_sums(traced, site)
        examples = jnp.asarray(_examples(site, num_examples), like.total.dtype)
        means = _means(site, dummies, like, examples, flag, sampling)
        return _moments(site, means, flag, examples, bias)

    moments: list[LayerMoments | None] = [None] * traced.num_leaves
    for leaf, site in first.items():
        total = measured.get(leaf)
        if layers.head is not None and layers.head.leaf == leaf and _HEAD in measured:
            own = measured[_HEAD]
            total = own if total is None else jax.tree.map(jnp.add, total, own)
        bias = traced.paths[layers.biases[leaf]] if leaf in layers.biases else None
        assert total is not None
        moments[leaf] = moments_of(site, total, bias)
    if layers.head is None:
        return moments, None
    head = moments[layers.head.leaf]
    if _HEAD in measured and head is not None:
        head = moments_of(layers.head, measured[_HEAD], head.bias)
    return moments, head


def _means(
    site: Site, dummies: Dummies, like: Sums, examples: jax.Array, flag: Any, sampling: Sampling
) -> Sums:
    """Divide sums by what they count; measure them first where that is still to be done."""

    def divide(sums: Sums) -> Sums:
        total = jnp.maximum(sums.total, 1)
        inputs = sums.inputs / total[..., None, None]
        return Sums(inputs, sums.outputs * examples, sums.mean / total[..., None], sums.total)

    if isinstance(dummies, Operands):
        return jax.lax.cond(
            flag,
            lambda operands: divide(measure(site, sampling, operands, like)),
            lambda operands: jax.tree.map(jnp.zeros_like, like),
            dummies,
        )
    if isinstance(flag, bool):
        return divide(dummies)
    # A pass over zeros would cost as much as one over sums.
    return jax.lax.cond(flag, divide, lambda sums: sums, dummies)


def _moments(
    site: Site, means: Sums, flag: Any, examples: jax.Array, bias: str | None
) -> LayerMoments:
    dtype = means.total.dtype
    count = jnp.where(flag, examples, 0).astype(dtype)
    positions = jnp.where(flag, jnp.ravel(means.total)[0] / examples, 0).astype(dtype)
    inputs, outputs, mean, _ = means
    if site.leaf_view.input_side == "rows":
        return LayerMoments(inputs, outputs, mean, None, count, positions, bias)
    return LayerMoments(outputs, inputs, None, mean, count, positions, bias)


def _examples(site: Site, num_examples: int | None) -> Any:
    """Return N over all devices that hold a part of the batch."""
    if num_examples is not None:
        return num_examples
    examples: Any = site.num_examples
    for axis in site.outer_axes:
        examples = examples * jax.lax.psum(1, axis)
    return examples
