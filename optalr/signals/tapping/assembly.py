"""Turning what was measured into moments, at once or where somebody asks for them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optalr.arrays import wide_dtype
from optalr.signals.moments import LayerMoments
from optalr.signals.problem import Traced
from optalr.signals.tapping.measuring import (
    Dummies,
    Operands,
    Sums,
    measure,
    sums_like,
    zeros_of,
)
from optalr.signals.tracing.plan import Layers
from optalr.signals.tracing.sampling import Sampling
from optalr.signals.tracing.sites import Site

# The slot of the head where it has one apart; the others are leaf indices (keys must sort).
_HEAD = -1


def slot_chooser(layers: Layers) -> Callable[[Site], Any]:
    """Return the slot of a site: its leaf, or one apart for a head whose leaf has other uses."""
    head = layers.head
    uses = sum(site.leaf == head.leaf for site in layers.sites) if head is not None else 0
    apart = head is not None and not head.view.scanned and uses > 1
    return lambda site: _HEAD if apart and site is head else site.leaf


def leaf_sums(traced: Traced, site: Site) -> Sums:
    """Return shapes and dtypes of the sums of a site's leaf."""
    leaf = traced.leaves[site.leaf]
    dtype = wide_dtype(leaf)
    return sums_like(site, jnp.shape(leaf), dtype)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What is known of a leaf's moments before anything is measured.

    Attributes:
      site: the leaf's first site.
      like: shapes and dtypes of its sums.
      examples: N, over all devices that hold a part of the batch.
      bias: key path of its bias, or None.
    """

    site: Site
    like: Sums
    examples: Any
    bias: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class Assembly:
    """A function from what was measured to moments; it holds no arrays.

    Attributes:
      layers: by leaf.
      head: the layer executed last, or None.
      treedef: the structure of the parameters.
      sampling: which examples and positions were looked at.
    """

    layers: dict[int, _Layer]
    head: _Layer | None
    treedef: Any
    sampling: Sampling

    @classmethod
    def of(
        cls, traced: Traced, layers: Layers, sampling: Sampling, num_examples: int | None
    ) -> "Assembly":
        """Collect what assembling the moments of ``layers`` takes."""

        def describe(site: Site) -> _Layer:
            bias = traced.paths[layers.biases[site.leaf]] if site.leaf in layers.biases else None
            return _Layer(site, leaf_sums(traced, site), _examples(site, num_examples), bias)

        first: dict[int, _Layer] = {}
        for site in layers.sites:
            first.setdefault(site.leaf, describe(site))
        head = None if layers.head is None else describe(layers.head)
        return cls(first, head, traced.treedef, sampling)

    def __call__(self, flag: Any, measured: dict[Any, Dummies]) -> Any:
        """Return the parameters' structure, with moments at captured leaves and None elsewhere."""
        moments: list[LayerMoments | None] = [None] * self.treedef.num_leaves
        for leaf, layer in self.layers.items():
            total = measured.get(leaf)
            if self.head is not None and self.head.site.leaf == leaf and _HEAD in measured:
                own = measured[_HEAD]
                total = own if total is None else jax.tree.map(jnp.add, total, own)
            assert total is not None
            moments[leaf] = self._moments(layer, flag, total)
        return jax.tree.unflatten(self.treedef, moments)

    def head_moments(self, flag: Any, measured: dict[Any, Dummies]) -> LayerMoments | None:
        """Return the moments of the layer executed last."""
        if self.head is None:
            return None
        slot = _HEAD if _HEAD in measured else self.head.site.leaf
        return self._moments(self.head, flag, measured[slot])

    def _moments(self, layer: _Layer, flag: Any, dummies: Dummies) -> LayerMoments:
        dtype = layer.like.total.dtype
        examples = jnp.asarray(layer.examples, dtype)
        inputs, outputs, mean, total = self._means(layer, examples, flag, dummies)
        count = jnp.where(flag, examples, 0).astype(dtype)
        positions = jnp.where(flag, jnp.ravel(total)[0] / examples, 0).astype(dtype)
        if layer.site.leaf_view.input_side == "rows":
            return LayerMoments(inputs, outputs, mean, None, count, positions, layer.bias)
        return LayerMoments(outputs, inputs, None, mean, count, positions, layer.bias)

    def _means(self, layer: _Layer, examples: jax.Array, flag: Any, dummies: Dummies) -> Sums:
        """Divide sums by what they count; measure them first where that is still to be done."""

        def divide(sums: Sums) -> Sums:
            total = jnp.maximum(sums.total, 1)
            inputs = sums.inputs / total[..., None, None]
            return Sums(inputs, sums.outputs * examples, sums.mean / total[..., None], sums.total)

        if isinstance(dummies, Operands):
            return jax.lax.cond(
                flag,
                lambda both: divide(measure(layer.site, self.sampling, both, layer.like)),
                lambda both: zeros_of(layer.like),
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
        examples = examples * jax.lax.psum(1, axis)
    return examples
