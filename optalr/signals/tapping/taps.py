"""Recording Gram matrices of inputs and cotangents during the ordinary backward pass.

In: a traced function, its plan, and zeros in a *slot* for each captured leaf. Out: the function's
outputs, with a derivative that fills the slots.

The traced loss is evaluated as it stands, except that each layer's product is replaced by a twin
with the same value and the same derivative, whose backward pass also hands the sums

    Σ α αᵀ,  Σ β βᵀ,  Σ α,  the number of α

to four arguments of the twin that are otherwise unused (all zeros), as if these were their
cotangents; or, where that is less, input and output cotangent as they are. One ``jax.grad`` over
parameters and these dummies then returns gradients and sums. Reverse mode adds the sums up over
repeated uses and time steps, stacks them over scanned layers, and passes through remat, vmap and
inner functions, with no bookkeeping of ours.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from optalr.arrays import explicit_sharding
from optalr.signals.tapping.gauge import Dummies, Gauge, Kept
from optalr.signals.tapping.scattering import Sharing
from optalr.signals.tracing.jaxprs import Replacement, replay, vary, varying_axes
from optalr.signals.tracing.site import Operands, Sampling, Site
from optalr.signals.tracing.walk import Nested, Plan


@dataclasses.dataclass(frozen=True)
class Recorder:
    """Evaluates traced functions with their layers tapped.

    Attributes:
      slots: the dummies of each slot. Layers without one are left as they are.
      slot_of: maps a site to its slot.
      kept: what is kept of the Gram matrices of each leaf.
      flag: None to measure always, else a traced bool.
      samplings: which examples and positions of each leaf to look at.
      sharing: who shares the examples of the batch; None where the compiler decides.
      rebuild: evaluates an equation that holds jaxprs, with the layers inside them tapped.
    """

    slots: dict[int, Dummies]
    slot_of: Callable[[Site], int]
    kept: Mapping[int, Kept]
    flag: jax.Array | None
    samplings: Mapping[int, Sampling]
    sharing: Sharing | None
    rebuild: Callable[[Nested, list[Any], "Recorder"], Sequence[Any]]

    def run(self, closed: Any, plan: Plan, args: Sequence[Any]) -> list[Any]:
        """Evaluate a jaxpr with its plan applied; return its flat outputs."""
        taps = {index: self._tapped(sites) for index, sites in plan.taps.items()}
        taps = {index: sites for index, sites in taps.items() if sites}
        replacements: dict[int, Replacement] = {
            index: functools.partial(self._tap, sites) for index, sites in taps.items()
        }
        for index, nested in plan.nested.items():
            if any(self._tapped(all_sites(inner)) for inner in nested.plans):
                replacements[index] = functools.partial(self._enter, nested)
        also_reads = {
            index: [scale.var for site in sites for scale in site.view.scales]
            for index, sites in taps.items()
        }
        return replay(closed, args, replacements, also_reads=also_reads)

    def _tapped(self, sites: Iterable[Site]) -> tuple[Site, ...]:
        """Return the sites that have a slot."""
        return tuple(site for site in sites if self.slot_of(site) in self.slots)

    def _enter(self, nested: Nested, values: list[Any]) -> Sequence[Any]:
        return self.rebuild(nested, values, self)

    def _tap(self, sites: tuple[Site, ...], values: list[Any]) -> list[jax.Array]:
        """Evaluate a product by its twin; it is a site of each leaf that its kernel holds."""
        num_inputs = len(sites[0].equation.invars)
        data, kernel = sites[0].operands(values[:num_inputs])
        numbers = iter(values[num_inputs:])
        gains = tuple(site.gain(numbers) for site in sites)
        if sites[0].by_hand:  # its value does not depend on the declared inputs
            data = jax.lax.stop_gradient(data)
        dummies = tuple(self.slots[self.slot_of(site)] for site in sites)
        # A cotangent has the type of its argument. Inside a shard_map the sums vary over devices,
        # so the dummies must be marked so; the transpose of the mark sums over the devices.
        axes = varying_axes(jax.typeof(data)) | varying_axes(jax.typeof(kernel))
        dummies = jax.tree.map(lambda dummy: vary(dummy, axes), dummies)
        like = jax.tree.map(_shape_of, dummies)
        measures = [self._measure_of(site, own) for site, own in zip(sites, like, strict=True)]
        return [_twin(sites[0], measures)((data, kernel), dummies, (self.flag, gains))]

    def _measure_of(self, site: Site, like: Dummies) -> "_Measure":
        """Return what a site's backward pass does to fill a slot of this kind."""
        if isinstance(like, Operands):
            return _hand_on
        how = self.samplings[site.leaf], like, self.kept[site.leaf]
        return Gauge(site, *how, sharing=self.sharing).read_if


def all_sites(plan: Plan) -> Iterator[Site]:
    """Iterate over the sites of a plan and of those inside it."""
    for sites in plan.taps.values():
        yield from sites
    for nested in plan.nested.values():
        for inner in nested.plans:
            yield from all_sites(inner)


def _shape_of(dummy: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dummy.shape, dummy.dtype, sharding=explicit_sharding(dummy))


# What a twin's backward pass puts into a slot, given the flag and the two sides of the product.
_Measure = Callable[[Any, Operands], Dummies]


def _hand_on(flag: Any, operands: Operands) -> Operands:
    """Put off the measurement: both sides go into the slot as they are."""
    del flag
    return operands


def _twin(site: Site, measures: Sequence[_Measure]) -> Callable[..., jax.Array]:
    """Return a site's product; its backward pass also fills the dummies."""
    product = site.product()

    # Flag and gains are arguments rather than closures, because a custom_vjp must not close over
    # tracers of the transformations around it.
    @jax.custom_vjp
    def twin(operands, dummies, given):
        del dummies, given
        return product(*operands)

    def forward(operands, dummies, given):
        del dummies
        return product(*operands), (operands, given)

    def backward(residuals, cotangent):
        (data, kernel), (flag, gains) = residuals
        # All sites of one product share its equation; the first one speaks for all.
        operands_bar = site.pull_back(data, kernel, cotangent)
        measured = tuple(
            measure(flag, Operands(data, _amplify(cotangent, gain)))
            for measure, gain in zip(measures, gains, strict=True)
        )
        return operands_bar, measured, None

    twin.defvjp(forward, backward)
    return twin


def _amplify(cotangent: jax.Array, gain: jax.Array | None) -> jax.Array:
    """Return the cotangent of what a product would be with the leaf itself for its kernel."""
    # The leaf W enters as cW, and a change of W moves the output by c times as much.
    return cotangent if gain is None else (cotangent * gain).astype(cotangent.dtype)
