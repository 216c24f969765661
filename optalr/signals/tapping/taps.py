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
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optalr.signals.tracing.jaxprs import Replacement, replay, vary, varying_axes
from optalr.signals.tracing.site import Operands, Sampling, Site, Sums, spread
from optalr.signals.tracing.walk import Nested, Plan

# What a slot holds: zeros before the backward pass, then what was measured or is to be.
Dummies = Sums | Operands


def sums_like(site: Site, dtype: Any) -> Sums:
    """Return the shapes of what is summed for the leaf that ``site`` taps, with this dtype."""
    view = site.leaf_view
    stack, m, n = view.matrix_shape(site.origin.leaf_shape)
    if view.input_side == "cols":
        m, n = n, m
    shapes = ((*stack, m, m), (*stack, n, n), (*stack, m), stack)
    return Sums(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))


def zeros_of(like: Any) -> Any:
    """Return zeros in place of shapes and dtypes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)


def operands_are_smaller(site: Site) -> bool:
    """Return whether a product's two sides have fewer entries than their Gram matrices."""
    data, cotangent = site.operand_types()
    # Cotangents of integers have a dtype of their own, and operands that differ between devices
    # cannot leave the shard_map by a dummy that is the same on all of them.
    if not jnp.issubdtype(data.dtype, jnp.floating) or varying_axes(data):
        return False
    stack, m, n = site.leaf_view.matrix_shape(site.origin.leaf_shape)
    return data.size + cotangent.size < math.prod(stack) * (m * m + n * n)


@dataclasses.dataclass(frozen=True)
class Gauge:
    """How one site is measured.

    Attributes:
      site: the layer's product.
      sampling: which examples and positions to look at.
      like: arrays, or shapes and dtypes, of the sums.
    """

    site: Site
    sampling: Sampling
    like: Sums

    def read_if(self, flag: jax.Array | None, operands: Operands) -> Sums:
        """Measure, or return zeros where a traced ``flag`` is off; None measures always."""
        if flag is None:
            return self.read(operands)
        axes = varying_axes(jax.typeof(operands.cotangent))

        def skip(operands: Operands) -> Sums:
            del operands
            # Both branches of a cond must vary over the same mesh axes.
            return jax.tree.map(lambda zero: vary(zero, axes), zeros_of(self.like))

        # Nothing but the Gram products sits in the cond. On a CPU, XLA runs the gradient of a
        # convolution inside a cond (or a loop) many times slower than outside.
        return jax.lax.cond(flag, self.read, skip, operands)

    def read(self, operands: Operands) -> Sums:
        """Return the site's four sums, each an estimate of the sum over all positions."""
        operands = _refuse_derivatives(operands)
        # Where a sample starts is hashed from the cotangent, so that it varies from step to step
        # with no key to pass. Of absolute values: a softmax's cotangents sum to zero.
        size = jnp.sum(jnp.abs(operands.cotangent.astype(jnp.float32)))
        seed = spread(jax.lax.bitcast_convert_type(size, jnp.uint32))
        total = self.site.add_up(lambda part: self._sums(part, seed), operands, self.sampling)
        axes = varying_axes(jax.typeof(operands.cotangent))
        placed = self._place_in_leaf(total)
        # A site stacks the layers of a vmap in one axis. The leaf may have several, or none.
        return jax.tree.map(lambda x, shape: vary(x.reshape(shape.shape), axes), placed, self.like)

    def _sums(self, piece: Operands, seed: jax.Array) -> Sums:
        """Compute the sums over all examples, or over a piece of them."""
        dtype = self.like.total.dtype
        inputs, outputs, scale = self.site.signals(piece, (self.sampling, seed))
        inputs, outputs = inputs.astype(dtype), outputs.astype(dtype)
        # Groups of a convolution are further rows of the inputs, but no further positions.
        per_group = scale / self.site.groups
        return Sums(
            _gram(inputs) * per_group,
            _gram(outputs) * scale,
            jnp.sum(inputs, axis=1) * per_group,
            jnp.full(inputs.shape[0], outputs.shape[1] * scale, dtype),
        )

    def _place_in_leaf(self, sums: Sums) -> Sums:
        """Place the sums of a part that was cut out of its leaf; the rest of the leaf saw zeros."""
        cut = self.site.view.cut
        if cut is None:
            return sums
        view = self.site.leaf_view
        on_inputs = cut.axis in (view.rows if view.input_side == "rows" else view.cols)
        whole = (self.like.inputs if on_inputs else self.like.outputs).shape[-1]
        room = (cut.start, whole - cut.start - cut.size)  # what comes before the part, and after
        if on_inputs:
            return sums._replace(
                inputs=jnp.pad(sums.inputs, ((0, 0), room, room)),
                mean=jnp.pad(sums.mean, ((0, 0), room)),
            )
        return sums._replace(outputs=jnp.pad(sums.outputs, ((0, 0), room, room)))


def _gram(rows: jax.Array) -> jax.Array:
    """Return ``Σ_r x_r x_rᵀ`` of ``(S, R, d)``, in full precision also where TF32 is default."""
    return jnp.einsum("srd,sre->sde", rows, rows, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def _refuse_derivatives(signals):
    """Pass signals on, and refuse to be differentiated: the sums are quadratic in them."""
    return signals


@_refuse_derivatives.defjvp
def _refuse(primals, tangents):
    raise TypeError(
        "value_grad_and_extras cannot be differentiated while it captures signals: their Gram "
        "matrices are quadratic in the cotangent, so a second derivative through them would be "
        "wrong. Pass signals=False, or use the matvecs extras['hessian'] and "
        "extras['gauss_newton']."
    )


@dataclasses.dataclass(frozen=True)
class Recorder:
    """Evaluates traced functions with their layers tapped.

    Attributes:
      slots: the dummies of each slot.
      slot_of: maps a site to its slot.
      flag: None to measure always, else a traced bool.
      sampling: which examples and positions to look at.
      rebuild: evaluates an equation that holds jaxprs, with the layers inside them tapped.
    """

    slots: dict[int, Dummies]
    slot_of: Callable[[Site], int]
    flag: jax.Array | None
    sampling: Sampling
    rebuild: Callable[[Nested, list[Any], "Recorder"], Sequence[Any]]

    def run(self, closed: Any, plan: Plan, args: Sequence[Any]) -> list[Any]:
        """Evaluate a jaxpr with its plan applied; return its flat outputs."""
        replacements: dict[int, Replacement] = {
            index: functools.partial(self._tap, sites) for index, sites in plan.taps.items()
        }
        for index, nested in plan.nested.items():
            replacements[index] = functools.partial(self._enter, nested)
        also_reads = {
            index: [scale.var for site in sites for scale in site.view.scales]
            for index, sites in plan.taps.items()
        }
        return replay(closed, args, replacements, also_reads=also_reads)

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
        like = jax.tree.map(lambda dummy: jax.ShapeDtypeStruct(dummy.shape, dummy.dtype), dummies)
        measures = [
            _hand_on if isinstance(own, Operands) else Gauge(site, self.sampling, own).read_if
            for site, own in zip(sites, like, strict=True)
        ]
        return [_twin(sites[0], measures)((data, kernel), dummies, (self.flag, gains))]


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
