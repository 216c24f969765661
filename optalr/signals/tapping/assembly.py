"""Turning what was measured into moments, at once or where somebody asks for them.

In: what each slot gathered, and whether it was measured (the flag). Out: ``LayerMoments`` in the
structure of the parameters.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from optalr.signals.moments import LayerMoments
from optalr.signals.tapping.capture import HEAD, Tapped, leaf_sums
from optalr.signals.tapping.measuring import Dummies, Gauge, Sums, zeros_of
from optalr.signals.tracing.sites.site import Operands, Site


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

    @property
    def site(self) -> Site:
        """The leaf's first site."""
        return self.gauge.site


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
            gauge = Gauge(site, tapped.sampling, leaf_sums(traced, site))
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
        slot = HEAD if HEAD in measured else self.head.site.leaf
        return _layer_moments(self.head, flag, measured[slot])

    def _total(self, leaf: int, measured: dict[int, Dummies]) -> Dummies:
        """Return what all uses of a leaf gathered, the head among them."""
        holds_head = self.head is not None and self.head.site.leaf == leaf
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
    if layer.site.leaf_view.input_side == "rows":
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
