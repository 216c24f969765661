"""Finding the layers of a model in its traced loss.

A jaxpr is walked once, following every parameter leaf (and every layer's output, up to its bias)
through reshapes, casts, inner functions and loops. What comes out is a *plan*: which equations to
tap, in which nested jaxpr, and for every leaf that no tap reaches, why.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core as jex_core

from optalr.signals import views
from optalr.signals.compat import open_jaxpr, scan_arity, varying_axes
from optalr.signals.moments import LeafView
from optalr.signals.sites import Site, conv_site, dot_site
from optalr.signals.views import View

# Primitives whose output is their first operand, entry for entry.
_SAME = frozenset({
    "convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint", "name",
    "pvary", "pcast", "pbroadcast", "optimization_barrier", "mesh_cast", "reshard",
})  # fmt: skip
_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
_REMAT = frozenset({"remat2", "checkpoint", "remat"})
_OPAQUE = {
    "while": "inside a while loop, which has no reverse derivative",
    "custom_jvp_call": "inside a custom_jvp function, whose derivative is the user's own",
    "custom_vjp_call": "inside a custom_vjp function, whose derivative is the user's own",
    "custom_vjp_call_jaxpr": "inside a custom_vjp function, whose derivative is the user's own",
    "gather": "read by a table lookup (gather)",
    "dynamic_slice": "sliced before its product",
    "slice": "sliced before its product",
    "split": "split before its product",
    "concatenate": "concatenated before its product",
}


@dataclasses.dataclass
class Plan:
    """What to tap in one jaxpr.

    Attributes:
      taps: sites by equation index.
      nested: plans of the jaxprs inside an equation, by equation index.
      sliced: for a scan, by equation index, the leaves of which it takes one slice a step.
    """

    taps: dict[int, Site] = dataclasses.field(default_factory=dict)
    nested: dict[int, tuple["Plan", ...]] = dataclasses.field(default_factory=dict)
    sliced: dict[int, frozenset[int]] = dataclasses.field(default_factory=dict)

    def all_sites(self) -> Iterator[Site]:
        """Iterate over the sites of this jaxpr and of those inside it."""
        yield from self.taps.values()
        for plans in self.nested.values():
            for inner in plans:
                yield from inner.all_sites()


@dataclasses.dataclass
class Layers:
    """The layers of one traced loss.

    Attributes:
      plan: what to tap where.
      sites: the accepted sites, in the order of execution.
      views: for each captured leaf, its matrix view (with its bias by leaf index in ``biases``).
      biases: maps a captured leaf to the leaf that is its bias.
      notes: for each leaf, how it is used other than by a tapped layer.
      head: the layer executed last, or None.
    """

    plan: Plan
    sites: list[Site]
    views: dict[int, LeafView]
    biases: dict[int, int]
    notes: dict[int, list[str]]
    head: Site | None


def find_layers(closed: Any, leaf_shapes: Sequence[tuple[int, ...]]) -> Layers:
    """Find the layers of a traced loss.

    Args:
      closed: the ``ClosedJaxpr`` of the loss; its first inputs are the parameter leaves.
      leaf_shapes: the leaves' shapes.

    Returns:
      The plan and what it covers.
    """
    finder = _Finder(tuple(leaf_shapes))
    inputs: list[View | None] = [None] * len(closed.jaxpr.invars)
    for leaf, shape in enumerate(leaf_shapes):
        inputs[leaf] = views.whole(leaf, shape)
    plan, _ = finder.walk(closed.jaxpr, inputs)
    return finder.settle(plan)


class _Finder:
    """Walks jaxprs; collects sites, biases and other uses of the leaves."""

    def __init__(self, leaf_shapes: tuple[tuple[int, ...], ...]):
        self.leaf_shapes = leaf_shapes
        self.found: list[Site] = []
        self.bias_uses: list[tuple[Site, int]] = []
        self.mesh_sizes: dict[str, int] = {}  # axes of the shard_maps around the current jaxpr
        self.notes: dict[int, list[str]] = {leaf: [] for leaf in range(len(leaf_shapes))}

    def note(self, view: View | None, text: str) -> None:
        if view is not None and view.is_parameter and text not in self.notes[view.source]:
            self.notes[view.source].append(text)

    def walk(self, jaxpr: Any, inputs: Sequence[View | None]) -> tuple[Plan, list[View | None]]:
        """Walk one jaxpr whose inputs look at the sources as ``inputs`` say."""
        plan = Plan()
        env: dict[Any, View] = {
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

    def step(self, jaxpr: Any, plan: Plan, index: int, seen: list[View | None]) -> list:
        """Follow the views through one equation; return what its outputs look at."""
        equation = jaxpr.eqns[index]
        name = equation.primitive.name
        first = seen[0]
        if name in _SAME and first is not None:
            return [first]
        if name == "transpose" and first is not None:
            return [views.transpose(first, equation.params["permutation"])]
        if name == "squeeze" and first is not None:
            return [views.squeeze(first, equation.params["dimensions"])]
        if name == "reshape" and first is not None and equation.params["dimensions"] is None:
            reshaped = views.reshape(first, equation.params["new_sizes"])
            if reshaped is None:
                self.note(first, "reshaped across its axes before its product")
            return [reshaped]
        if name == "broadcast_in_dim" and first is not None:
            shape, dims = equation.params["shape"], equation.params["broadcast_dimensions"]
            return [views.broadcast(first, shape, tuple(dims))]
        if name in ("add", "add_any"):
            return [self.add(equation, seen)]
        if name in ("dot_general", "conv_general_dilated"):
            return [self.product(jaxpr, plan, index, seen)]
        if name in _CALLS or name in _REMAT or name in ("scan", "cond", "shard_map"):
            return self.nest(plan, index, equation, seen)
        for view in seen:
            self.note(view, _OPAQUE.get(name, f"used by {name}"))
        return []

    def product(self, jaxpr: Any, plan: Plan, index: int, seen: list[View | None]) -> View | None:
        """Try to read a product of data and a parameter as a layer."""
        equation = jaxpr.eqns[index]
        kernels = [i for i, view in enumerate(seen) if view is not None and view.is_parameter]
        if len(kernels) != 1:
            for kernel in kernels:
                self.note(seen[kernel], "multiplied by another parameter")
            return None
        (kernel,) = kernels
        view = seen[kernel]
        assert view is not None
        make = dot_site if equation.primitive.name == "dot_general" else conv_site
        site = make(jaxpr, equation, kernel, view, self.leaf_shapes[view.source])
        if isinstance(site, str):
            self.note(view, site)
            return None
        varying = varying_axes(equation.invars[1 - kernel].aval)
        inside = math.prod(self.mesh_sizes[axis] for axis in varying if axis in self.mesh_sizes)
        outside = tuple(sorted(axis for axis in varying if axis not in self.mesh_sizes))
        site = dataclasses.replace(
            site, num_examples=site.num_examples * inside, outer_axes=outside
        )
        self.found.append(site)
        plan.taps[index] = site
        return site.output_view()

    def add(self, equation: Any, seen: list[View | None]) -> View | None:
        """Pair a layer's output with the bias added to it; other addends change nothing."""
        shape = tuple(equation.outvars[0].aval.shape)
        outputs = [v for v in seen if v is not None and not v.is_parameter and v.shape == shape]
        parameters = [v for v in seen if v is not None and v.is_parameter]
        for parameter in parameters:
            if outputs and self.is_bias(outputs[0], parameter):
                self.bias_uses.append((outputs[0].source, parameter.source))
            else:
                self.note(parameter, "used by add")
        return outputs[0] if outputs else None

    def is_bias(self, output: View, parameter: View) -> bool:
        """Whether ``parameter`` has one entry for each feature of the layer's ``output``."""
        offset = len(output.dims) - len(parameter.dims)
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

    def nest(self, plan: Plan, index: int, equation: Any, seen: list[View | None]) -> list:
        """Walk the jaxprs inside an equation."""
        name, params = equation.primitive.name, equation.params
        kept = [view if view is not None and view.is_parameter else None for view in seen]
        if name in _CALLS or name in _REMAT:
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

    def walk_scan(
        self, equation: Any, kept: list[View | None]
    ) -> tuple[Plan, list, frozenset[int]]:
        """Walk a scan's body: constants whole, scanned leaves one slice, carries if unchanged."""
        num_consts, num_carry = scan_arity(equation)
        body = open_jaxpr(equation.params["jaxpr"])
        inputs: list[View | None] = list(kept[:num_consts])
        outputs: list[View | None] = []
        for i in range(num_consts, num_consts + num_carry):
            unchanged = body.outvars[i - num_consts] is body.invars[i]
            if not unchanged:
                self.note(kept[i], "changed by a loop that carries it")
            inputs.append(kept[i] if unchanged else None)
            outputs.append(kept[i] if unchanged else None)
        for view in kept[num_consts + num_carry :]:
            sliced = None if view is None else views.slice_leading(view)
            if sliced is None:
                self.note(view, "scanned along an axis that is not its own")
            inputs.append(sliced)
        inner, _ = self.walk(body, inputs)
        slices = inputs[num_consts + num_carry :]
        leaves = frozenset(view.source for view in slices if view is not None)
        return inner, outputs, leaves

    def settle(self, plan: Plan) -> Layers:
        """Keep the sites that agree on their leaf's view; pair biases; name the head."""
        chosen: dict[int, LeafView] = {}
        accepted: list[Site] = []
        for site in self.found:
            view = chosen.setdefault(site.leaf, site.leaf_view)
            if view == site.leaf_view:
                accepted.append(site)
            else:
                self.notes[site.leaf].append("also used by a layer in another orientation")
        biases: dict[int, int] = {}
        owners: dict[int, int] = {}
        for site, bias in self.bias_uses:
            if site not in accepted:
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
    plan.taps = {index: site for index, site in plan.taps.items() if site in accepted}
    for inner in plan.nested.values():
        for nested in inner:
            _drop(nested, accepted)


def _is_literal(var: Any) -> bool:
    return isinstance(var, jex_core.Literal)
