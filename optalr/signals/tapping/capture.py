"""Differentiating a traced function with its layers tapped, and what comes of it.

In: a traced loss (or model), its layers, and what to measure (``Tapped``). Out: values, gradients,
and what each *slot* gathered. A slot belongs to a leaf, whose uses all add to it; the head has one
apart where its leaf has other uses too. ``assembly`` turns what was gathered into moments.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from optalr.arrays import wide_dtype
from optalr.sharding.spread import Spread
from optalr.signals.loss import Traced
from optalr.signals.moments import FactorStorage
from optalr.signals.tapping.budget import Budget
from optalr.signals.tapping.gauge import (
    Dummies,
    Gauge,
    Kept,
    Later,
    operands_are_smaller,
    sums_like,
    zeros_of,
)
from optalr.signals.tapping.rebuilding import rebuild
from optalr.signals.tapping.scattering import Sharing
from optalr.signals.tapping.taps import Recorder
from optalr.signals.tracing.jaxprs import as_function
from optalr.signals.tracing.layers import find_layers
from optalr.signals.tracing.site import Sampling, Site
from optalr.signals.tracing.walk import Layers

# The slot of the head where it has one apart. The others are leaf indices, and the keys of a dict
# that is a pytree must sort, so it is a number as well.
HEAD = -1


def layers_of(traced: Traced, *, num_outputs: int | None = 1) -> Layers:
    """Return the layers that the first ``num_outputs`` outputs of a traced loss feel."""
    shapes, num_held = traced.leaf_shapes, traced.num_held
    return find_layers(traced.closed, shapes, num_held=num_held, num_outputs=num_outputs)


@dataclasses.dataclass(frozen=True)
class Tapped:
    """A traced function whose layers are tapped while it is differentiated.

    Attributes:
      traced: the function.
      layers: its layers.
      flag: whether to measure; a Python bool, or a traced one.
      sampling: which examples and positions to look at, or what a sample may cost.
      storage: what the backward pass keeps of Gram matrices; None keeps all.
      spread: the devices that share the batch's examples; None where the compiler decides.
      outer_products: the leaves whose operands are handed on even if there is nothing to measure.
    """

    traced: Traced
    layers: Layers
    flag: bool | jax.Array
    sampling: Sampling | Budget
    storage: FactorStorage | None = None
    spread: Spread | None = None
    outer_products: frozenset[int] = frozenset()

    @property
    def is_off(self) -> bool:
        """Whether there is nothing to measure, as is known before anything runs."""
        return self.flag is False or not self.layers.sites

    def __call__(self, leaves: Any, slots: dict[int, Dummies]) -> list[Any]:
        """Evaluate the function; return its flat outputs."""
        arrays = self.traced.inputs[self.traced.num_leaves :]
        if not slots:
            return as_function(self.traced.closed)(*leaves, *arrays)
        # A twin takes the flag as an argument, in which a Python bool would become an array, and
        # a cond on it would stay in the program. None is no argument at all.
        flag = None if isinstance(self.flag, bool) else self.flag
        chosen = self._slot_chooser(), self.kept(), flag, self.samplings, self.sharing
        recorder = Recorder(slots, *chosen, rebuild=rebuild)
        return recorder.run(self.traced.closed, self.layers.plan, [*leaves, *arrays])

    def differentiate(self) -> tuple[list[Any], list[Any], dict[int, Dummies]]:
        """Return the flat outputs, the gradient's leaves, and what each slot gathered.

        The first output is the loss.
        """
        slots, leaves = self.zero_slots(), list(self.traced.leaves)
        filled = {leaf: slots[leaf] for leaf in self.outer_products} if self.is_off else slots

        def loss(leaves, slots):
            outputs = self(leaves, slots)
            return outputs[0], outputs

        if not filled:
            (_, outputs), grads = jax.value_and_grad(loss, has_aux=True)(leaves, filled)
            return outputs, grads, slots
        # One backward pass for both: the gradient costs what it costs without signals.
        both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, outputs), (grads, measured) = both(leaves, filled)
        return outputs, grads, slots | measured

    def zero_slots(self) -> dict[int, Dummies]:
        """Return the dummies, zero, of every captured leaf.

        A layer that is used once hands on its operands where they are smaller than what is measured
        of them. Whoever asks for its moments then says what to keep of them. If a traced flag is
        off, zeros are written once for the moments, and not once more for the sums.
        """
        like: dict[int, Dummies] = {}
        choose, late = self._slot_chooser(), self.measured_late()
        for site in self.layers.sites:
            if site.leaf in late:
                like[site.leaf] = site.operand_types()
            else:
                # Uses of one leaf share a slot: reverse mode adds their cotangents up.
                like.setdefault(choose(site), self.gauge(site).like)
        # Zeros, but no memory: the twins never read them, and XLA drops what is not read.
        return zeros_of(like)

    def kept(self) -> dict[int, Kept]:
        """Return what is kept of the Gram matrices of each captured leaf."""
        return {site.leaf: self._kept_of(site) for site in self.layers.sites}

    @property
    def sharing(self) -> Sharing | None:
        """Who shares the examples of the batch, and what of the sums will be kept."""
        # Nobody has asked yet. What is given was measured as it will be kept.
        kept = FactorStorage() if self.storage is None else None
        return None if self.spread is None else Sharing(self.spread, kept)

    @functools.cached_property
    def samplings(self) -> dict[int, Sampling]:
        """Which examples and positions of each captured leaf to look at."""
        # Whole moments are dear. What is summed up on the way is planned beside what methods ask.
        late, at_once = self.measured_late(), self._samplings(self.kept())
        return {
            leaf: at_once[leaf] if leaf in late else later.sampling
            for leaf, later in self.later.items()
        }

    @functools.cached_property
    def later(self) -> dict[int, Later]:
        """How leaves are measured whose moments are asked for in another form."""
        # Nobody has asked yet. Most methods keep what FactorStorage does if nothing is said.
        usual, late = FactorStorage(), self.measured_late()
        kept = self.kept()
        if self.storage is None:
            sites = [site for site in self.layers.sites if site.leaf in late]
            kept |= {site.leaf: self._kept_by(usual, site) for site in sites}
        samplings = self._samplings(kept)
        return {leaf: Later(samplings[leaf], kept[leaf].count) for leaf in kept}

    def gauge(self, site: Site) -> Gauge:
        """Return how a site is measured."""
        leaf = site.leaf
        kept = self.kept()[leaf]
        like = sums_like(site, kept, wide_dtype(self.traced.leaves[leaf]))
        like = like if self.sharing is None else self.sharing.typed(like, kept, site)
        how = self.samplings[leaf], like, kept, self.later[leaf]
        return Gauge(site, *how, sharing=self.sharing)

    def measured_late(self) -> set[int]:
        """Return the leaves whose only site hands on its operands."""
        # Operands of two uses, or of a loop's steps, cannot be added up as sums can.
        uses = collections.Counter(site.leaf for site in self.layers.sites)
        kept = self.kept()
        return {
            site.leaf
            for site in self.layers.plan.sites_run_once()
            if uses[site.leaf] == 1 and operands_are_smaller(site, kept[site.leaf])
        }

    def bias_of(self, leaf: int) -> str | None:
        """Return the key path of the bias that is added to the outputs of a leaf's layer."""
        biases = self.layers.biases
        return self.traced.paths[biases[leaf]] if leaf in biases else None

    def _kept_of(self, site: Site) -> Kept:
        return Kept.of(site, None) if self.storage is None else self._kept_by(self.storage, site)

    def _kept_by(self, storage: FactorStorage, site: Site) -> Kept:
        view = dataclasses.replace(site.leaf_view, bias=self.bias_of(site.leaf))
        return Kept.of(site, storage.sides(view, site.origin.leaf_shape))

    def _samplings(self, kept: Mapping[int, Kept]) -> dict[int, Sampling]:
        if isinstance(self.sampling, Budget):
            return self.sampling.samplings(self.layers.sites, kept)
        return {site.leaf: self.sampling for site in self.layers.sites}

    def _slot_chooser(self) -> Callable[[Site], int]:
        """Return the slot of a site: its leaf, or one apart for a head whose leaf is used again."""
        head = self.layers.head
        uses = sum(site.leaf == head.leaf for site in self.layers.sites) if head is not None else 0
        # A scanned head keeps its leaf's slot: its dummies are slices of it, taken step by step.
        apart = head is not None and not head.view.scanned and uses > 1
        return lambda site: HEAD if apart and site is head else site.leaf
