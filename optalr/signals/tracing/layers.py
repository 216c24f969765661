"""Finding the layers of a model in its traced loss.

A jaxpr is walked once, following every parameter leaf (and every layer's output, up to its bias)
through reshapes, casts, inner functions and loops. What comes out is a *plan*: which equations to
tap, in which nested jaxpr, and for every leaf that no tap reaches, why.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from optalr.signals.moments import LeafView
from optalr.signals.tapping.hand import MARK
from optalr.signals.tracing import views
from optalr.signals.tracing.compat import open_jaxpr, scan_arity, varying_axes
from optalr.signals.tracing.convolutions import conv_site
from optalr.signals.tracing.jaxprs import extract, variables
from optalr.signals.tracing.plan import CALLS, Derivative, Layers, Plan
from optalr.signals.tracing.sites import HandSite, Site, Window, dot_site, hand_site
from optalr.signals.tracing.views import Joined, View

# Primitives whose output is their first operand, entry for entry.
_SAME = frozenset({
    "convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint", "name",
    "pvary", "pcast", "pbroadcast", "optimization_barrier", "mesh_cast", "reshard",
})  # fmt: skip
_REMAT = frozenset({"remat2", "checkpoint", "remat"})
_OPAQUE = {
    "while": "inside a while loop, which has no reverse derivative",
    "custom_jvp_call": "inside a custom_jvp function whose derivative could not be traced",
    "custom_vjp_call": "inside a custom_vjp function, whose derivative is the user's own",
    "custom_vjp_call_jaxpr": "inside a custom_vjp function, whose derivative is the user's own",
    "gather": "read by a table lookup (gather)",
    "dynamic_slice": "sliced before its product",
    "slice": "sliced before its product",
    "split": "split before its product",
    "concatenate": "concatenated before its product",
}


def find_layers(closed: Any, leaf_shapes: Sequence[tuple[int, ...]]) -> Layers:
    """Find the layers of a traced loss.

    Args:
      closed: the ``ClosedJaxpr`` of the loss; its first inputs are the parameter leaves.
      leaf_shapes: the leaves' shapes.

    Returns:
      The plan and what it covers.
    """
    finder = _Finder(tuple(leaf_shapes))
    inputs: list[Looks] = [None] * len(closed.jaxpr.invars)
    for leaf, shape in enumerate(leaf_shapes):
        inputs[leaf] = views.whole(leaf, shape)
    plan, _ = finder.walk(closed.jaxpr, inputs)
    return finder.settle(plan)


# What an intermediate array looks at.
Looks = View | Joined | None


class _Finder:
    """Walks jaxprs; collects sites, biases and other uses of the leaves."""

    def __init__(self, leaf_shapes: tuple[tuple[int, ...], ...]):
        self.leaf_shapes = leaf_shapes
        self.found: list[Site] = []
        self.bias_uses: list[tuple[Site, int]] = []
        self.mesh_sizes: dict[str, int] = {}  # axes of the shard_maps around the current jaxpr
        self.notes: dict[int, list[str]] = {leaf: [] for leaf in range(len(leaf_shapes))}

    def note(self, view: Looks, text: str) -> None:
        for part in views.parts_of(view):
            if part.is_parameter and text not in self.notes[part.source]:
                self.notes[part.source].append(text)

    def walk(self, jaxpr: Any, inputs: Sequence[Looks]) -> tuple[Plan, list[Looks]]:
        """Walk one jaxpr whose inputs look at the sources as ``inputs`` say."""
        plan = Plan()
        env: dict[Any, View | Joined] = {
            var: view for var, view in zip(jaxpr.invars, inputs, strict=True) if view is not None
        }
        for index, equation in enumerate(jaxpr.eqns):
            seen = [None if _is_literal(v) else env.get(v) for v in equation.invars]
            if not any(seen):
                continue
            outputs = self.step(jaxpr, plan, index, seen)
            for var, view in zip(equation.outvars, outputs, strict=False):
                if view is not None:
                    env[var] = view
        return plan, [None if _is_literal(v) else env.get(v) for v in jaxpr.outvars]

    def step(self, jaxpr: Any, plan: Plan, index: int, seen: list[Looks]) -> Sequence[Looks]:
        """Follow the views through one equation; return what its outputs look at."""
        equation = jaxpr.eqns[index]
        name = equation.primitive.name
        first = seen[0]
        if name in _SAME and first is not None:
            return [first]
        if name in views.REARRANGEMENTS and first is not None:
            moved = views.rearrange(name, equation.params, first)
            if moved is None:
                self.note(first, "reshaped across its axes before its product")
            return [moved]
        if name == "concatenate":
            joined = views.join(seen, equation.params["dimension"])
            if joined is not None:
                return [joined]
        if name in ("slice", "split"):
            parts = views.cut_parts(name, equation.params, first)
            if all(part is not None for part in parts):
                return parts
        if name in ("add", "add_any"):
            return [self.add(equation, seen)]
        if name in ("dot_general", "conv_general_dilated"):
            return [self.product(jaxpr, plan, index, seen)]
        if name in CALLS and equation.params.get("name", "").startswith(MARK):
            return [self.hand(jaxpr, plan, index, seen)]
        if name in CALLS or name in _REMAT or name in ("scan", "cond", "shard_map"):
            return self.nest(plan, index, equation, seen)
        if name == "custom_jvp_call" and any(v is not None and v.is_parameter for v in seen):
            return self.derivative(jaxpr, plan, index, seen)
        for view in seen:
            self.note(view, _OPAQUE.get(name, f"used by {name}"))
        return []

    def product(self, jaxpr: Any, plan: Plan, index: int, seen: list[Looks]) -> Looks:
        """Try to read a product of data and a parameter as a layer."""
        equation = jaxpr.eqns[index]
        kernels = [i for i, view in enumerate(seen) if view is not None and view.is_parameter]
        if len(kernels) != 1:
            for kernel in kernels:
                self.note(seen[kernel], "multiplied by another parameter")
            return None
        (kernel,) = kernels
        make = dot_site if equation.primitive.name == "dot_general" else conv_site
        sites: list[Site] = []
        whole = seen[kernel]
        starts = whole.starts() if isinstance(whole, Joined) else (0,)
        for view, start in zip(views.parts_of(whole), starts, strict=True):
            window = None
            if isinstance(whole, Joined):
                window = Window(whole.axis, start, view.shape[whole.axis])
            shape = self.leaf_shapes[view.source]
            site = make(jaxpr, equation, kernel, view, shape, window)
            if isinstance(site, Site) and not site.fits_its_cut(shape):
                site = "cut along one of several axes on a side of its product"
            if isinstance(site, str):
                self.note(view, site)
            else:
                sites.append(self.across_devices(site))
        if not sites:
            return None
        self.found.extend(sites)
        plan.taps[index] = tuple(sites)
        outputs = [site.output_view() for site in sites]
        full = tuple(equation.outvars[0].aval.shape)
        if outputs[0].shape == full:
            return outputs[0]
        differ = [i for i, size in enumerate(full) if size != outputs[0].shape[i]]
        joined = Joined(tuple(outputs), differ[0])
        return joined if joined.shape == full else None

    def hand(self, jaxpr: Any, plan: Plan, index: int, seen: list[Looks]) -> Looks:
        """Take a layer that the user declared."""
        equation = jaxpr.eqns[index]
        view = seen[2]
        if not isinstance(view, View) or not view.is_parameter or view.cut is not None:
            self.note(view, "tapped by hand, but not as a whole leaf")
            return seen[0]
        site = hand_site(jaxpr, equation, view, self.leaf_shapes[view.source])
        if isinstance(site, str):
            self.note(view, site)
            return seen[0]
        site = self.across_devices(site)
        self.found.append(site)
        plan.taps[index] = (site,)
        return site.output_view()

    def across_devices(self, site: Site) -> Site:
        """Return the site with the examples of all devices that hold a part of its input."""
        data, _ = site.operands(site.equation.invars)
        varying = varying_axes(data.aval)
        inside = math.prod(self.mesh_sizes[axis] for axis in varying if axis in self.mesh_sizes)
        outside = tuple(sorted(axis for axis in varying if axis not in self.mesh_sizes))
        return dataclasses.replace(
            site, num_examples=site.num_examples * inside, outer_axes=outside
        )

    def add(self, equation: Any, seen: list[Looks]) -> Looks:
        """Pair a layer's output with the bias added to it; other addends change nothing."""
        shape = tuple(equation.outvars[0].aval.shape)
        outputs = [v for v in seen if v is not None and not v.is_parameter and v.shape == shape]
        parameters = [v for v in seen if v is not None and v.is_parameter]
        for parameter in parameters:
            output = outputs[0] if outputs else None
            if not self.pair(output, parameter):
                self.note(parameter, "used by add")
        return outputs[0] if outputs else None

    def pair(self, output: Looks, parameter: View | Joined) -> bool:
        """Record that ``parameter`` is the bias of the layer of this ``output``, if it is."""
        if isinstance(output, Joined) and isinstance(parameter, Joined):
            offset = len(output.shape) - len(parameter.shape)
            if output.axis != parameter.axis + offset or output.starts() != parameter.starts():
                return False
        elif not isinstance(output, View) or not isinstance(parameter, View):
            return False
        pairs = list(zip(views.parts_of(output), views.parts_of(parameter), strict=True))
        if not all(self.is_bias(out, bias) for out, bias in pairs):
            return False
        self.bias_uses.extend((out.source, bias.source) for out, bias in pairs)
        return True

    def is_bias(self, output: View, parameter: View) -> bool:
        """Whether ``parameter`` has one entry for each feature of the layer's ``output``."""
        offset = len(output.dims) - len(parameter.dims)
        if parameter.cut is not None or output.source.view.cut is not None:
            return False
        if offset < 0 or parameter.scanned != tuple(range(len(output.source.view.scanned))):
            return False
        atoms: list[views.Atom] = []
        for axis, out_dim in enumerate(output.dims):
            dim = parameter.dims[axis - offset] if axis >= offset else ()
            features = [a for a in out_dim if a.axis >= 0]
            if features:
                if any(a.axis < 0 for a in (*dim, *out_dim)):
                    return False
                if [a.size for a in features if a.size > 1] != [a.size for a in dim if a.size > 1]:
                    return False
                atoms.extend(dim)
            elif any(a.axis >= 0 and a.size > 1 for a in dim):
                return False
        axes = set(views.axes_of(atoms)) | set(parameter.scanned)
        sizes = self.leaf_shapes[parameter.source]
        return all(axis in axes or size == 1 for axis, size in enumerate(sizes)) and bool(sizes)

    def derivative(self, jaxpr: Any, plan: Plan, index: int, seen: list[Looks]) -> Sequence[Looks]:
        """Walk the user's derivative of a custom_jvp call that holds a parameter."""
        equation = jaxpr.eqns[index]
        derivative = None if self.mesh_sizes else _trace_derivative(jaxpr, equation)
        if derivative is None:
            for view in seen:
                self.note(view, _OPAQUE["custom_jvp_call"])
            return []
        looks = {v: x for v, x in zip(equation.invars, seen, strict=True) if not _is_literal(v)}
        kept = [looks[derivative.variables[i]] for i in derivative.inputs]
        kept = [view if view is not None and view.is_parameter else None for view in kept]
        inner, _ = self.walk(derivative.closed.jaxpr, [*[None] * len(derivative.variables), *kept])
        if inner.taps or inner.nested:
            plan.nested[index] = (inner,)
            plan.derivatives[index] = derivative
        return []

    def nest(self, plan: Plan, index: int, equation: Any, seen: list[Looks]) -> Sequence[Looks]:
        """Walk the jaxprs inside an equation."""
        name, params = equation.primitive.name, equation.params
        kept = [view if view is not None and view.is_parameter else None for view in seen]
        if name in CALLS or name in _REMAT:
            inner, outputs = self.walk(open_jaxpr(params["jaxpr"]), seen)
            plans = (inner,)
        elif name == "scan":
            inner, outputs, plan.sliced[index] = self.walk_scan(equation, kept)
            plans = (inner,)
        elif name == "cond":
            results = [self.walk(open_jaxpr(b), kept[1:]) for b in params["branches"]]
            plans, outputs = tuple(plan for plan, _ in results), []
        else:
            for i, spec in enumerate(params["in_specs"]):
                if kept[i] is not None and any(entry is not None for entry in spec):
                    self.note(kept[i], "sharded over devices inside shard_map")
                    kept[i] = None
            around = self.mesh_sizes
            self.mesh_sizes = around | dict(params["mesh"].shape)
            inner, _ = self.walk(open_jaxpr(params["jaxpr"]), kept)
            self.mesh_sizes = around
            plans, outputs = (inner,), []
        if any(inner.taps or inner.nested for inner in plans):
            plan.nested[index] = plans
        return outputs

    def walk_scan(self, equation: Any, kept: list[Looks]) -> tuple[Plan, list, frozenset[int]]:
        """Walk a scan's body: constants whole, scanned leaves one slice, carries if unchanged."""
        num_consts, num_carry = scan_arity(equation)
        body = open_jaxpr(equation.params["jaxpr"])
        inputs: list[Looks] = list(kept[:num_consts])
        outputs: list[Looks] = []
        for i in range(num_consts, num_consts + num_carry):
            unchanged = body.outvars[i - num_consts] is body.invars[i]
            if not unchanged:
                self.note(kept[i], "changed by a loop that carries it")
            inputs.append(kept[i] if unchanged else None)
            outputs.append(kept[i] if unchanged else None)
        for view in kept[num_consts + num_carry :]:
            sliced = views.slice_leading(view) if isinstance(view, View) else None
            if sliced is None:
                self.note(view, "scanned along an axis that is not its own")
            inputs.append(sliced)
        inner, _ = self.walk(body, inputs)
        slices = inputs[num_consts + num_carry :]
        leaves = frozenset(part.source for view in slices for part in views.parts_of(view))
        return inner, outputs, leaves

    def settle(self, plan: Plan) -> Layers:
        """Keep the sites that agree on their leaf's view; pair biases; name the head."""
        chosen: dict[int, LeafView] = {}
        accepted: list[Site] = []
        by_hand = {site.leaf for site in self.found if isinstance(site, HandSite)}
        for leaf in by_hand:  # what the user declares stands in place of what was found
            self.notes[leaf].clear()
        for site in self.found:
            if site.leaf in by_hand and not isinstance(site, HandSite):
                continue
            view = chosen.setdefault(site.leaf, site.leaf_view)
            if view == site.leaf_view:
                accepted.append(site)
            else:
                self.notes[site.leaf].append("also used by a layer in another orientation")
        biases: dict[int, int] = {}
        owners: dict[int, int] = {}
        for site, bias in self.bias_uses:
            if site not in accepted and site.leaf not in by_hand:
                self.notes[bias].append("added to a layer that is not captured")
            elif owners.setdefault(bias, site.leaf) != site.leaf:
                self.notes[bias].append("added to the outputs of two layers")
                biases.pop(owners[bias], None)
            elif biases.setdefault(site.leaf, bias) != bias:
                self.notes[bias].append("a second bias of its layer")
        _drop(plan, set(accepted))
        head = accepted[-1] if accepted else None
        return Layers(plan, accepted, chosen, biases, self.notes, head)


def _drop(plan: Plan, accepted: set[Site]) -> None:
    kept = {i: tuple(s for s in sites if s in accepted) for i, sites in plan.taps.items()}
    plan.taps = {index: sites for index, sites in kept.items() if sites}
    for inner in plan.nested.values():
        for nested in inner:
            _drop(nested, accepted)


def _trace_derivative(jaxpr: Any, equation: Any) -> Derivative | None:
    """Trace the derivative of an equation, by whatever rule it has; None where that fails."""
    read = variables(equation)
    function = extract(jaxpr, [equation], read, equation.outvars)
    inputs = tuple(i for i, var in enumerate(read) if _has_tangent(var))
    outputs = tuple(i for i, var in enumerate(equation.outvars) if _has_tangent(var))

    def tangents_of(args, tangents):
        def moving(moved):
            at = dict(zip(inputs, moved, strict=True))
            results = function(*(at.get(i, arg) for i, arg in enumerate(args)))
            return [results[i] for i in outputs]

        return jax.jvp(moving, ([args[i] for i in inputs],), (tangents,))[1]

    shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in read]
    if not inputs or not outputs:
        return None
    closed = jax.make_jaxpr(tangents_of)(shapes, [shapes[i] for i in inputs])
    return Derivative(function, tuple(read), inputs, outputs, closed)


def _has_tangent(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.inexact)


def _is_literal(var: Any) -> bool:
    return isinstance(var, jex_core.Literal)
