"""From what the slots gathered to moments, at once or where somebody asks for them.

An ``Assembly`` holds no arrays: beside the slots it makes a ``Partial`` that may cross ``jit``.
Whoever asks may say what is to be kept of each layer. Layers that handed on their operands are then
measured in that shape. Of the others, whose sums exist, the part is taken that was asked for.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optalr.arrays import on_auto_axes
from optalr.linalg import spd
from optalr.linalg.structured import Full
from optalr.signals.moments import Form, LayerMoments, Sides
from optalr.signals.tapping.capture import HEAD, Tapped
from optalr.signals.tapping.gauge import Dummies, Gauge, Kept, side_sizes, zeros_of
from optalr.signals.tracing.site import Operands, Site, Sums


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What is known of a leaf's moments before anything is measured.

    Attributes:
      path: key path of the leaf.
      gauge: how the leaf's first site is measured, and the sums' shapes and dtypes.
      examples: N, over all devices that hold a part of the batch.
      bias: key path of its bias, or None.
    """

    path: str
    gauge: Gauge
    examples: Any
    bias: str | None

    def asked(self, sides: Sides | None) -> Gauge:
        """Return how the layer is measured if this is asked for; None asks for what is kept."""
        if sides is None:
            return self.gauge
        site = self.gauge.site
        kept, (m, n) = Kept.of(site, sides), side_sizes(site)
        if kept.inputs.size not in (m, m + 1) or kept.outputs.size != n:
            raise ValueError(
                f"keep describes {self.path} by forms of {sides[0].size} rows and {sides[1].size} "
                f"columns, but its input has {m} features and its output {n}. Give forms of these "
                "sizes, with one more on the input's side for a joint bias."
            )
        return self.gauge.keeping(kept)


# Compared by identity: the function of a Partial needs a hash, and a dict of layers has none.
@dataclasses.dataclass(frozen=True, eq=False)
class Assembly:
    """A function from what was measured to moments.

    Attributes:
      flag: whether to measure, where that is known while tracing; else None.
      layers: by leaf.
      head: the layer executed last, or None.
      treedef: the structure of the parameters.
    """

    flag: bool | None
    layers: dict[int, _Layer]
    head: _Layer | None
    treedef: Any

    @classmethod
    def of(cls, tapped: Tapped, num_examples: int | None) -> "Assembly":
        """Collect what assembling the moments of a tapped function takes."""

        def describe(site: Site) -> _Layer:
            gauge = tapped.gauge(site)
            path, bias = tapped.traced.paths[site.leaf], tapped.bias_of(site.leaf)
            return _Layer(path, gauge, _examples(site, num_examples), bias)

        first: dict[int, _Layer] = {}
        for site in tapped.layers.sites:
            first.setdefault(site.leaf, describe(site))
        head = None if tapped.layers.head is None else describe(tapped.layers.head)
        flag = tapped.flag if isinstance(tapped.flag, bool) else None
        return cls(flag, first, head, tapped.traced.treedef)

    def __call__(
        self, flag: Any, measured: dict[int, Dummies], keep: Mapping[str, Sides] | None = None
    ) -> Any:
        """Return the parameters' structure, with moments at captured leaves and None elsewhere.

        Args:
          flag: whether to measure; None where that was known while tracing.
          measured: what each slot gathered.
          keep: what is to be kept of layers, by key path, rows first. What is to be kept whole, and
            what is not named, comes as an array.
        """
        keep = keep or {}
        self._check_paths(keep)
        moments: list[LayerMoments | None] = [None] * self.treedef.num_leaves
        for leaf, layer in self.layers.items():
            gathered = flag, self._total(leaf, measured)
            moments[leaf] = self._moments(layer, gathered, keep.get(layer.path))
        return jax.tree.unflatten(self.treedef, moments)

    def head_moments(
        self, flag: Any, measured: dict[int, Dummies], keep: Sides | None = None
    ) -> LayerMoments | None:
        """Return the moments of the layer executed last."""
        if self.head is None:
            return None
        slot = HEAD if HEAD in measured else self.head.gauge.site.leaf
        return self._moments(self.head, (flag, measured[slot]), keep)

    def _check_paths(self, keep: Mapping[str, Sides]) -> None:
        known = {layer.path for layer in self.layers.values()}
        if not known.issuperset(keep):
            raise ValueError(
                f"keep names {', '.join(sorted(set(keep) - known))}, where no layer was captured. "
                f"Name some of {', '.join(sorted(known)) or 'none'}."
            )

    def _total(self, leaf: int, measured: dict[int, Dummies]) -> Dummies:
        """Return what all uses of a leaf gathered, the head among them."""
        holds_head = self.head is not None and self.head.gauge.site.leaf == leaf
        slots = [leaf, HEAD] if holds_head else [leaf]
        gathered = [measured[slot] for slot in slots if slot in measured]
        return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), gathered)

    def _moments(
        self, layer: _Layer, gathered: tuple[Any, Dummies], sides: Sides | None
    ) -> LayerMoments:
        given, dummies = gathered
        flag: Any = self.flag if given is None else given
        asked = layer.asked(sides)
        dtype = asked.like.total.dtype
        examples = jnp.asarray(layer.examples, dtype)
        means = _Means(layer, asked, examples)(flag, dummies)

        def if_measured(number: jax.Array) -> jax.Array:
            return number if flag is True else jnp.where(flag, number, 0).astype(dtype)

        count = if_measured(examples)
        # Layers of one stack have the same number of positions: the first speaks for all.
        positions = if_measured(jnp.ravel(means.total)[0] / examples)
        inputs = _held(asked.kept.inputs, means.inputs)
        outputs = _held(asked.kept.outputs, means.outputs)
        numbers = {"count": count, "positions": positions, "bias": layer.bias}
        numbers["samples"] = count * positions * asked.share
        if asked.site.leaf_view.input_side == "rows":
            return LayerMoments(inputs, outputs, means.mean, None, **numbers)
        return LayerMoments(outputs, inputs, None, means.mean, **numbers)


@dataclasses.dataclass(frozen=True)
class _Means:
    """Sums divided by what they count, in the shapes that are asked for.

    Attributes:
      layer: the layer as its slot was filled.
      asked: how it is to be measured.
      examples: N, as an array.
    """

    layer: _Layer
    asked: Gauge
    examples: jax.Array

    def __call__(self, flag: Any, dummies: Dummies) -> Sums:
        """Divide; measure first where that is still to be done."""
        if flag is False:
            return self.zeros(dummies)
        if flag is True:
            return self._take(dummies)
        as_it_is = isinstance(dummies, Sums) and self.asked is self.layer.gauge
        # A pass over zeros would cost as much as one over sums.
        skip = (lambda sums: sums) if as_it_is else self.zeros
        return jax.lax.cond(flag, self._take, skip, dummies)

    def zeros(self, dummies: Dummies) -> Sums:
        """Return what is handed on where nothing was measured."""
        del dummies
        return zeros_of(self.asked.like)

    def _take(self, dummies: Dummies) -> Sums:
        def of(dummies: Dummies, examples: jax.Array) -> Sums:
            means = dataclasses.replace(self, examples=examples)
            if isinstance(dummies, Operands):
                return means.of_operands(dummies)
            return means.of_sums(dummies)

        # A part of what lies in rows on explicit axes lies as the compiler has it.
        return on_auto_axes(of, dummies, self.examples, like=self.asked.like)

    def of_operands(self, operands: Any) -> Sums:
        """Measure what was put off."""
        return self._divide(self.asked.read(operands))

    def of_sums(self, sums: Any) -> Sums:
        """Take the part that is asked for."""
        means = self._divide(sums)
        held, asked = self.layer.gauge.kept, self.asked.kept
        path = self.layer.path
        return means._replace(
            inputs=_part(means.inputs, held.inputs, asked.inputs, mean=means.mean, path=path),
            outputs=_part(means.outputs, held.outputs, asked.outputs, mean=None, path=path),
        )

    def _divide(self, sums: Sums) -> Sums:
        # At least 1: a branch that was not taken counted nothing, and 0/0 is NaN.
        total = jnp.maximum(sums.total, 1)
        inputs = sums.inputs / spd.align(total, sums.inputs)
        # Cotangents are those of the mean loss, β/N. Σ (β/N)(β/N)ᵀ times N is Σ ββᵀ/N.
        outputs = sums.outputs * self.examples
        return Sums(inputs, outputs, sums.mean / total[..., None], sums.total)


def _part(array: jax.Array, held: Form, asked: Form, *, mean: jax.Array | None, path: str) -> Any:
    """Return what ``asked`` keeps of a Gram matrix that is held in another form."""
    if held.is_like(asked):
        return array
    if not isinstance(held, Full):
        raise ValueError(
            f"keep asks for a {asked.label} of {path}, of which storage= keeps a {held.label}. "
            "Pass value_grad_and_extras(..., storage=) the options of the method that reads it."
        )
    if mean is not None and asked.size > held.size:
        array = spd.with_ones(array, mean)
    return asked.of_gram(array).stored


def _held(form: Form, array: jax.Array) -> Any:
    """Return a whole matrix as an array, and anything less as a form that holds it."""
    return array if isinstance(form, Full) else form.holding(array)


def _examples(site: Site, num_examples: int | None) -> Any:
    """Return N over all devices that hold a part of the batch."""
    if num_examples is not None:
        return num_examples
    examples: Any = site.num_examples
    for axis in site.outer_axes:
        # A sum of ones over an axis is its size, known when the program is traced.
        examples = examples * jax.lax.psum(1, axis)
    return examples
