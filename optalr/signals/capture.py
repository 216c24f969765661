"""Differentiating a traced loss with its layers tapped, and turning sums into moments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from optalr.signals import taps
from optalr.signals.layers import Layers
from optalr.signals.moments import LayerMoments
from optalr.signals.problem import Traced
from optalr.signals.sampling import Sampling
from optalr.signals.sites import Site
from optalr.signals.taps import Recorder, Sums

_HEAD = "head"


def differentiate(
    traced: Traced, layers: Layers, flag: Any, sampling: Sampling
) -> tuple[list[Any], list[Any], dict[Any, Sums]]:
    """Return the flat outputs, the gradient's leaves, and the measured sums of each slot.

    Args:
      traced: the traced loss, whose first output is the loss.
      layers: its layers.
      flag: whether to measure; a Python bool, or a traced one.
      sampling: which examples and positions to look at.
    """
    slots = zero_slots(traced, layers)

    def loss(leaves, slots):
        outputs = evaluate_tapped(traced, layers, leaves, slots, flag, sampling)
        return outputs[0], outputs

    leaves = list(traced.leaves)
    if flag is False or not slots:
        (_, outputs), grads = jax.value_and_grad(loss, has_aux=True)(leaves, slots)
        return outputs, grads, slots
    (_, outputs), (grads, sums) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        leaves, slots
    )
    return outputs, grads, sums


def evaluate_tapped(
    traced: Traced, layers: Layers, leaves: Any, slots: dict[Any, Sums], flag: Any, sampling: Any
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


def zero_slots(traced: Traced, layers: Layers) -> dict[Any, Sums]:
    """Return the dummies, zero, of every captured leaf."""
    slots: dict[Any, Sums] = {}
    choose = _slot_chooser(layers)
    for site in layers.sites:
        leaf = traced.leaves[site.leaf]
        dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
        slots.setdefault(choose(site), taps.zero_sums(site, jnp.shape(leaf), dtype))
    return slots


def assemble(
    traced: Traced,
    layers: Layers,
    sums: dict[Any, Sums],
    flag: Any,
    num_examples: int | None,
) -> tuple[list[LayerMoments | None], LayerMoments | None]:
    """Turn sums into moments, one entry a leaf, and those of the head."""
    first: dict[int, Site] = {}
    for site in layers.sites:
        first.setdefault(site.leaf, site)
    moments: list[LayerMoments | None] = [None] * traced.num_leaves
    head = None
    for leaf, site in first.items():
        total = sums.get(leaf)
        if layers.head is not None and layers.head.leaf == leaf and _HEAD in sums:
            own = sums[_HEAD]
            total = own if total is None else jax.tree.map(jnp.add, total, own)
        bias = traced.paths[layers.biases[leaf]] if leaf in layers.biases else None
        assert total is not None
        moments[leaf] = _normalize(site, total, flag, num_examples, bias)
    if layers.head is not None:
        head = moments[layers.head.leaf]
        if _HEAD in sums and head is not None:
            head = _normalize(layers.head, sums[_HEAD], flag, num_examples, head.bias)
    return moments, head


def _normalize(
    site: Site, sums: Sums, flag: Any, num_examples: int | None, bias: str | None
) -> LayerMoments:
    """Divide sums by what they count."""
    dtype = sums.total.dtype
    examples = jnp.asarray(_examples(site, num_examples), dtype)

    def divide(sums):
        total = jnp.maximum(sums.total, 1)
        inputs = sums.inputs / total[..., None, None]
        return inputs, sums.outputs * examples, sums.mean / total[..., None]

    def leave(sums):
        return sums.inputs, sums.outputs, sums.mean

    if isinstance(flag, bool):
        inputs, outputs, mean = divide(sums)
    else:  # a pass over zeros would cost as much as one over sums
        inputs, outputs, mean = jax.lax.cond(flag, divide, leave, sums)
    count = jnp.where(flag, examples, 0).astype(dtype)
    positions = jnp.where(flag, jnp.ravel(sums.total)[0] / examples, 0).astype(dtype)
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
