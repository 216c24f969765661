"""Differentiating a traced function with its layers tapped.

In: a traced loss (or model), its layers, and what to measure. Out: values, gradients, and what each
*slot* gathered. A slot belongs to a leaf, whose uses all add to it; the head has one apart where
its leaf has other uses too.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from optalr.arrays import wide_dtype
from optalr.signals.loss.traced import Traced
from optalr.signals.tapping.measuring import (
    Dummies,
    Sums,
    operands_are_smaller,
    operands_like,
    sums_like,
    zeros_of,
)
from optalr.signals.tapping.taps import Recorder
from optalr.signals.tracing.plan import Layers
from optalr.signals.tracing.sampling import Sampling
from optalr.signals.tracing.sites.site import Site

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
        recorder = Recorder(slots, slot_chooser(self.layers), flag, self.sampling)
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
        choose = slot_chooser(self.layers)
        late = set() if isinstance(self.flag, bool) else self._measured_late()
        for site in self.layers.sites:
            if site.leaf in late:
                like[site.leaf] = operands_like(site)
            else:
                # Uses of one leaf share a slot: reverse mode adds their cotangents up.
                like.setdefault(choose(site), leaf_sums(self.traced, site))
        # Zeros, but no memory: the twins never read them, and XLA drops what is not read.
        return zeros_of(like)

    def _measured_late(self) -> set[int]:
        """Return the leaves whose only site hands on its operands."""
        # Operands of two uses, or of a loop's steps, cannot be added up as sums can.
        uses = collections.Counter(site.leaf for site in self.layers.sites)
        shapes = self.traced.leaf_shapes
        return {
            site.leaf
            for site in self.layers.plan.sites_run_once()
            if uses[site.leaf] == 1 and operands_are_smaller(site, shapes[site.leaf])
        }


def slot_chooser(layers: Layers) -> Callable[[Site], int]:
    """Return the slot of a site: its leaf, or one apart for a head whose leaf has other uses."""
    head = layers.head
    uses = sum(site.leaf == head.leaf for site in layers.sites) if head is not None else 0
    # A scanned head keeps its leaf's slot: its dummies are slices of it, taken step by step.
    apart = head is not None and not head.view.scanned and uses > 1
    return lambda site: HEAD if apart and site is head else site.leaf


def leaf_sums(traced: Traced, site: Site) -> Sums:
    """Return shapes and dtypes of the sums of a site's leaf."""
    leaf = traced.leaves[site.leaf]
    return sums_like(site, jnp.shape(leaf), wide_dtype(leaf))
