"""Differentiating a traced function with its layers tapped, and what comes of it.

In: a traced loss (or model), its layers, and what to measure (``Tapped``). Out: values, gradients,
and what each *slot* gathered. A slot belongs to a leaf, whose uses all add to it; the head has one
apart where its leaf has other uses too. An ``Assembly`` turns what was gathered into
``LayerMoments`` in the structure of the parameters, at once or where somebody asks for them.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from optalr.arrays import wide_dtype
from optalr.signals.loss import Traced
from optalr.signals.moments import LayerMoments
from optalr.signals.tapping.rebuilding import rebuild
from optalr.signals.tapping.taps import (
    Dummies,
    Gauge,
    Recorder,
    Sums,
    operands_are_smaller,
    sums_like,
    zeros_of,
)
from optalr.signals.tracing.site import Operands, Sampling, Site
from optalr.signals.tracing.walk import Layers

# The slot of the head where it has one apart. The others are leaf indices, and the keys of a dict
# that is a pytree must sort, so it is a number as well.
HEAD = -1


@dataclasses.dataclass(frozen=True)
class Tapped:
    """A traced function whose layers are tapped while it is differentiated.

    Attributes:
      traced: the function.
      layers: its layers.
      flag: whether to measure; a Python bool, or a traced one.
      sampling: which examples and positions to look at.
    """

    traced: Traced
    layers: Layers
    flag: bool | jax.Array
    sampling: Sampling

    @property
    def is_off(self) -> bool:
        """Whether there is nothing to measure, as is known before anything runs."""
        return self.flag is False or not self.layers.sites

    def __call__(self, leaves: Any, slots: dict[int, Dummies]) -> list[Any]:
        """Evaluate the function; return its flat outputs."""
        arrays = self.traced.inputs[self.traced.num_leaves :]
        if self.is_off:
            return jex_core.jaxpr_as_fun(self.traced.closed)(*leaves, *arrays)
        # A twin takes the flag as an argument, in which a Python bool would become an array, and
        # a cond on it would stay in the program. None is no argument at all.
        flag = None if isinstance(self.flag, bool) else self.flag
        recorder = Recorder(slots, self._slot_chooser(), flag, self.sampling, rebuild)
        return recorder.run(self.traced.closed, self.layers.plan, [*leaves, *arrays])

    def differentiate(self) -> tuple[list[Any], list[Any], dict[int, Dummies]]:
        """Return the flat outputs, the gradient's leaves, and what each slot gathered.

        The first output is the loss.
        """
        slots, leaves = self.zero_slots(), list(self.traced.leaves)

        def loss(leaves, slots):
            outputs = self(leaves, slots)
            return outputs[0], outputs

        if self.is_off:
            (_, outputs), grads = jax.value_and_grad(loss, has_aux=True)(leaves, slots)
            return outputs, grads, slots
        # One backward pass for both: the gradient costs what it costs without signals.
        both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, outputs), (grads, measured) = both(leaves, slots)
        return outputs, grads, measured

    def zero_slots(self) -> dict[int, Dummies]:
        """Return the dummies, zero, of every captured leaf.

        With a traced flag a layer that is used once hands on its operands where they are smaller
        than what is measured of them: if the flag is off, zeros are then written once for the
        moments, and not once more for the sums.
        """
        like: dict[int, Dummies] = {}
        choose = self._slot_chooser()
        late = set() if isinstance(self.flag, bool) else self._measured_late()
        for site in self.layers.sites:
            if site.leaf in late:
                like[site.leaf] = site.operand_types()
            else:
                # Uses of one leaf share a slot: reverse mode adds their cotangents up.
                like.setdefault(
                    choose(site), sums_like(site, wide_dtype(self.traced.leaves[site.leaf]))
                )
        # Zeros, but no memory: the twins never read them, and XLA drops what is not read.
        return zeros_of(like)

    def _slot_chooser(self) -> Callable[[Site], int]:
        """Return the slot of a site: its leaf, or one apart for a head whose leaf is used again."""
        head = self.layers.head
        uses = sum(site.leaf == head.leaf for site in self.layers.sites) if head is not None else 0
        # A scanned head keeps its leaf's slot: its dummies are slices of it, taken step by step.
        apart = head is not None and not head.view.scanned and uses > 1
        return lambda site: HEAD if apart and site is head else site.leaf

    def _measured_late(self) -> set[int]:
        """Return the leaves whose only site hands on its operands."""
        # Operands of two uses, or of a loop's steps, cannot be added up as sums can.
        uses = collections.Counter(site.leaf for site in self.layers.sites)
        return {
            site.leaf
            for site in self.layers.plan.sites_run_once()
            if uses[site.leaf] == 1 and operands_are_smaller(site)
        }


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What is known of a leaf's moments before anything is measured.

    Attributes:
      gauge: how the leaf's first site is measured, and the sums' shapes and dtypes.
      examples: N, over all devices that hold a part of the batch.
      bias: key path of its bias, or None.
    """

    gauge: Gauge
    examples: Any
    bias: str | None


# Compared by identity: the function of a Partial needs a hash, and a dict of layers has none.
@dataclasses.dataclass(frozen=True, eq=False)
class Assembly:
    """A function from what was measured to moments; it holds no arrays.

    Attributes:
      layers: by leaf.
      head: the layer executed last, or None.
      treedef: the structure of the parameters.
    """

    layers: dict[int, _Layer]
    head: _Layer | None
    treedef: Any

    @classmethod
    def of(cls, tapped: Tapped, num_examples: int | None) -> "Assembly":
        """Collect what assembling the moments of a tapped function takes."""
        traced, layers = tapped.traced, tapped.layers

        def describe(site: Site) -> _Layer:
            bias = traced.paths[layers.biases[site.leaf]] if site.leaf in layers.biases else None
            gauge = Gauge(
                site, tapped.sampling, sums_like(site, wide_dtype(traced.leaves[site.leaf]))
            )
            return _Layer(gauge, _examples(site, num_examples), bias)

        first: dict[int, _Layer] = {}
        for site in layers.sites:
            first.setdefault(site.leaf, describe(site))
        head = None if layers.head is None else describe(layers.head)
        return cls(first, head, traced.treedef)

    def __call__(self, flag: Any, measured: dict[int, Dummies]) -> Any:
        """Return the parameters' structure, with moments at captured leaves and None elsewhere."""
        moments: list[LayerMoments | None] = [None] * self.treedef.num_leaves
        for leaf, layer in self.layers.items():
            moments[leaf] = _layer_moments(layer, flag, self._total(leaf, measured))
        return jax.tree.unflatten(self.treedef, moments)

    def head_moments(self, flag: Any, measured: dict[int, Dummies]) -> LayerMoments | None:
        """Return the moments of the layer executed last."""
        if self.head is None:
            return None
        slot = HEAD if HEAD in measured else self.head.gauge.site.leaf
        return _layer_moments(self.head, flag, measured[slot])

    def _total(self, leaf: int, measured: dict[int, Dummies]) -> Dummies:
        """Return what all uses of a leaf gathered, the head among them."""
        holds_head = self.head is not None and self.head.gauge.site.leaf == leaf
        slots = [leaf, HEAD] if holds_head else [leaf]
        gathered = [measured[slot] for slot in slots if slot in measured]
        return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), gathered)


def _layer_moments(layer: _Layer, flag: Any, dummies: Dummies) -> LayerMoments:
    dtype = layer.gauge.like.total.dtype
    examples = jnp.asarray(layer.examples, dtype)
    inputs, outputs, mean, total = _means(layer.gauge, examples, (flag, dummies))
    count = jnp.where(flag, examples, 0).astype(dtype)
    # Layers of one stack have the same number of positions: the first speaks for all.
    positions = jnp.where(flag, jnp.ravel(total)[0] / examples, 0).astype(dtype)
    if layer.gauge.site.leaf_view.input_side == "rows":
        return LayerMoments(inputs, outputs, mean, None, count, positions, layer.bias)
    return LayerMoments(outputs, inputs, None, mean, count, positions, layer.bias)


def _means(gauge: Gauge, examples: jax.Array, gathered: tuple[Any, Dummies]) -> Sums:
    """Divide sums by what they count; measure them first where that is still to be done."""
    flag, dummies = gathered

    def divide(sums: Sums) -> Sums:
        # At least 1: a branch that was not taken counted nothing, and 0/0 is NaN.
        total = jnp.maximum(sums.total, 1)
        inputs = sums.inputs / total[..., None, None]
        # Cotangents are those of the mean loss, β/N. Σ (β/N)(β/N)ᵀ times N is Σ ββᵀ/N.
        return Sums(inputs, sums.outputs * examples, sums.mean / total[..., None], sums.total)

    if isinstance(dummies, Operands):
        return jax.lax.cond(
            flag,
            lambda both: divide(gauge.read(both)),
            lambda both: zeros_of(gauge.like),
            dummies,
        )
    if isinstance(flag, bool):
        return divide(dummies)
    # A pass over zeros would cost as much as one over sums.
    return jax.lax.cond(flag, divide, lambda sums: sums, dummies)


def _examples(site: Site, num_examples: int | None) -> Any:
    """Return N over all devices that hold a part of the batch."""
    if num_examples is not None:
        return num_examples
    examples: Any = site.num_examples
    for axis in site.outer_axes:
        # A sum of ones over an axis is its size, known when the program is traced.
        examples = examples * jax.lax.psum(1, axis)
    return examples
