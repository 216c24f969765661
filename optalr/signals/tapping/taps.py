"""Recording Gram matrices of inputs and cotangents during the ordinary backward pass.

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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from optalr.signals.tapping.measuring import Dummies, Operands, measure_if
from optalr.signals.tracing.compat import manual_axes, scan_arity, vary, varying_axes
from optalr.signals.tracing.jaxprs import extract
from optalr.signals.tracing.plan import Derivative, Layers, Plan
from optalr.signals.tracing.sampling import Sampling
from optalr.signals.tracing.sites import HandSite, Site


@dataclasses.dataclass(frozen=True)
class Recorder:
    """What the twins need: where to put what they measure, and whether to measure.

    Attributes:
      slots: the dummies of each slot (a leaf's index, or ``HEAD``).
      slot_of: maps a site to its slot.
      flag: None to measure always, else a traced bool.
      sampling: which examples and positions to look at.
    """

    slots: dict[Any, Dummies]
    slot_of: Callable[[Site], Any]
    flag: jax.Array | None
    sampling: Sampling

    def with_slots(self, slots: dict[Any, Dummies]) -> "Recorder":
        """Return the recorder with other dummies."""
        return dataclasses.replace(self, slots=slots)

    def slots_in(self, plan: Plan) -> dict[Any, Dummies]:
        """Return the dummies of the sites of one plan."""
        own = {self.slot_of(site) for site in plan.all_sites()}
        return {slot: dummies for slot, dummies in self.slots.items() if slot in own}


def run(closed: Any, layers: Layers, args: Sequence[Any], recorder: Recorder) -> list[Any]:
    """Evaluate a traced loss with its layers tapped; return its flat outputs."""
    return _run(closed.jaxpr, layers.plan, closed.consts, args, recorder)


def _run(jaxpr: Any, plan: Plan, consts: Sequence[Any], args: Sequence[Any], recorder: Recorder):
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    last_use = {v: i for i, e in enumerate(jaxpr.eqns) for v in e.invars if _is_var(v)}
    last_use.update({v: len(jaxpr.eqns) for v in jaxpr.outvars if _is_var(v)})

    def read(var):
        return env[var] if _is_var(var) else var.val

    start = 0
    for index, equation in enumerate(jaxpr.eqns):
        if index not in plan.taps and index not in plan.nested:
            continue
        _stretch(jaxpr, start, index, last_use, env)
        values = [read(var) for var in equation.invars]
        if index in plan.taps:
            outputs = [_tap(plan.taps[index], values, recorder)]
        else:
            outputs = _nest(equation, plan, index, values, recorder)
        env.update(zip(equation.outvars, outputs, strict=True))
        start = index + 1
    _stretch(jaxpr, start, len(jaxpr.eqns), last_use, env)
    return [read(var) for var in jaxpr.outvars]


def _stretch(jaxpr: Any, start: int, end: int, last_use: dict, env: dict) -> None:
    """Evaluate equations without a tap as one closed jaxpr, and store what is used later."""
    equations = jaxpr.eqns[start:end]
    if not equations:
        return
    defined = dict.fromkeys(v for e in equations for v in e.outvars)
    used = (v for e in equations for v in e.invars if _is_var(v) and v not in defined)
    inputs = list(dict.fromkeys(used))
    outputs = [v for v in defined if last_use.get(v, -1) >= end]
    values = extract(jaxpr, equations, inputs, outputs)(*(env[v] for v in inputs))
    env.update(zip(outputs, values, strict=True))


def _nest(equation: Any, plan: Plan, index: int, values: list[Any], recorder: Recorder):
    """Rebuild an equation that holds jaxprs, with the inner plans applied."""
    name, params = equation.primitive.name, equation.params
    plans = plan.nested[index]
    if name == "scan":
        return _scan(equation, plans[0], plan.sliced[index], values, recorder)
    if name == "cond":
        branches = [
            lambda *args, b=branch, p=plan: tuple(_run(b.jaxpr, p, b.consts, args, recorder))
            for branch, plan in zip(params["branches"], plans, strict=True)
        ]
        chosen, *operands = values
        return jax.lax.switch(chosen, branches, *operands)
    if name == "shard_map":
        return _shard_map(params, plans[0], values, recorder)
    if name == "custom_jvp_call":
        return _custom_jvp(equation, plan.derivatives[index], plans[0], values, recorder)
    inner = params["jaxpr"]
    jaxpr, consts = (
        (inner.jaxpr, inner.consts) if isinstance(inner, jex_core.ClosedJaxpr) else (inner, ())
    )
    if "policy" in params:  # remat

        def body(slots, *args):
            return _run(jaxpr, plans[0], consts, args, recorder.with_slots(slots))

        return jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])(
            recorder.slots_in(plans[0]), *values
        )
    return _run(jaxpr, plans[0], consts, values, recorder)


def _scan(
    equation: Any,
    plan: Plan,
    sliced: frozenset[int],
    values: list[Any],
    recorder: Recorder,
):
    """Rebuild a scan; leaves that it slices bring their dummies along, sliced likewise."""
    params = equation.params
    inner = params["jaxpr"]
    num_consts, num_carry = scan_arity(equation)
    consts = values[:num_consts]
    init = tuple(values[num_consts : num_consts + num_carry])
    scanned = tuple(values[num_consts + num_carry :])
    stacked = {site.leaf for site in plan.all_sites() if site.view.scanned}
    own = {leaf: recorder.slots[leaf] for leaf in sliced & stacked}

    def body(carry, step):
        xs, slots = step
        inside = recorder.with_slots({**recorder.slots, **slots})
        outputs = _run(inner.jaxpr, plan, inner.consts, [*consts, *carry, *xs], inside)
        return tuple(outputs[:num_carry]), tuple(outputs[num_carry:])

    carry, ys = jax.lax.scan(
        body,
        init,
        (scanned, own),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _shard_map(params: dict[str, Any], plan: Plan, values: list[Any], recorder: Recorder):
    """Rebuild a shard_map; the dummies enter replicated, so their sums come back summed."""
    replicated = jax.sharding.PartitionSpec()

    def body(slots, *args):
        return tuple(_run(params["jaxpr"], plan, (), args, recorder.with_slots(slots)))

    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=(replicated, *params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=manual_axes(params),
    )(recorder.slots_in(plan), *values)


def _custom_jvp(
    equation: Any, derivative: Derivative, plan: Plan, values: list[Any], recorder: Recorder
):
    """Evaluate a custom_jvp function; its user's derivative is transposed with its layers tapped.

    The derivative is a linear function of tangents. In it a layer is a product of data and the
    *tangent* of a parameter, and the cotangent of that product is the layer's β.
    """
    read = {v: x for v, x in zip(equation.invars, values, strict=True) if _is_var(v)}
    args = [read[var] for var in derivative.variables]
    slots = recorder.slots_in(plan)
    axes = frozenset().union(*(varying_axes(jax.typeof(arg)) for arg in args))
    slots = jax.tree.map(lambda dummy: vary(dummy, axes), slots)

    @jax.custom_vjp
    def call(slots, flag, *args):
        del slots, flag
        return derivative.function(*args)

    def forward(slots, flag, *args):
        return derivative.function(*args), (slots, flag, args)

    def backward(residuals, cotangents):
        slots, flag, args = residuals
        tangents = [jnp.zeros_like(args[i]) for i in derivative.inputs]

        def tangent_map(slots, tangents):
            inside = dataclasses.replace(recorder, slots=slots, flag=flag)
            closed = derivative.closed
            return _run(closed.jaxpr, plan, closed.consts, [*args, *tangents], inside)

        _, pull = jax.vjp(tangent_map, slots, tangents)
        slots_bar, tangents_bar = pull([cotangents[i] for i in derivative.outputs])
        args_bar: list[Any] = [None] * len(args)
        for i, bar in zip(derivative.inputs, tangents_bar, strict=True):
            args_bar[i] = bar
        return slots_bar, None, *args_bar

    call.defvjp(forward, backward)
    return call(slots, recorder.flag, *args)


def _tap(sites: tuple[Site, ...], values: list[Any], recorder: Recorder) -> jax.Array:
    """Evaluate a product by its twin; it is a site of each leaf that its kernel holds."""
    data, kernel = sites[0].operands(values)
    if isinstance(sites[0], HandSite):  # its value does not depend on the declared inputs
        data = jax.lax.stop_gradient(data)
    dummies = tuple(recorder.slots[recorder.slot_of(site)] for site in sites)
    axes = varying_axes(jax.typeof(data)) | varying_axes(jax.typeof(kernel))
    dummies = jax.tree.map(lambda dummy: vary(dummy, axes), dummies)
    like = jax.tree.map(lambda dummy: jax.ShapeDtypeStruct(dummy.shape, dummy.dtype), dummies)
    return _twin(sites, recorder.sampling, like)(data, kernel, dummies, recorder.flag)


def _twin(
    sites: tuple[Site, ...], sampling: Sampling, like: tuple[Dummies, ...]
) -> Callable[..., jax.Array]:
    """Return the product of ``sites``; its backward pass also gives what the dummies ask for."""
    product = sites[0].product()

    @jax.custom_vjp
    def twin(data, kernel, dummies, flag):
        del dummies, flag
        return product(data, kernel)

    def forward(data, kernel, dummies, flag):
        del dummies
        return product(data, kernel), (data, kernel, flag)

    def backward(residuals, cotangent):
        data, kernel, flag = residuals
        data_bar, kernel_bar = sites[0].pull_back(data, kernel, cotangent)
        both = Operands(data, cotangent)
        measured = tuple(
            both
            if isinstance(dummies, Operands)
            else measure_if(flag, site, sampling, both, dummies)
            for site, dummies in zip(sites, like, strict=True)
        )
        return data_bar, kernel_bar, measured, None

    twin.defvjp(forward, backward)
    return twin


def _is_var(var: Any) -> bool:
    return not isinstance(var, jex_core.Literal)
