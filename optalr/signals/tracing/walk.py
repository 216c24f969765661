"""Walking a jaxpr: what each array on the way looks at, and what to tap.

In: a jaxpr and what its inputs look at. Out: the plan of what to tap in it, and what its outputs
look at; on the side, sites and notes gather in ``Findings``, which are settled in the end: every
leaf then has one matrix view at most, and every layer one bias at most. How one equation is
followed is decided by the *rule* of its primitive.

A ``Plan`` has the shape of the traced loss: equations that hold jaxprs have plans of their own for
these (``Nested``). ``Layers`` is the settled plan with what it covers, leaf by leaf; ``tapping``
follows it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from optalr.signals.moments import LeafView
from optalr.signals.tracing.jaxprs import is_literal, varying_axes
from optalr.signals.tracing.site import Site
from optalr.signals.tracing.views import Scales, Seen, change_scales, parts_of


@dataclasses.dataclass
class Plan:
    """What to tap in one jaxpr.

    Attributes:
      taps: sites by equation index; several if the equation's kernel joins several leaves.
      nested: by equation index, equations that hold jaxprs with something to tap.
      scalings: by equation index, equations that scale parameters by one number.
    """

    taps: dict[int, tuple[Site, ...]] = dataclasses.field(default_factory=dict)
    nested: dict[int, "Nested"] = dataclasses.field(default_factory=dict)
    scalings: dict[int, "Scaling"] = dataclasses.field(default_factory=dict)

    def sites_run_once(self) -> Iterator[Site]:
        """Iterate over the sites outside loops, branches and remat."""
        for sites in self.taps.values():
            yield from sites
        # A remat's inside runs twice, a branch perhaps not at all, a shard_map's on every device.
        for nested in self.nested.values():
            if nested.runs_once:
                yield from nested.plans[0].sites_run_once()

    def keep(self, accepted: set[Site]) -> None:
        """Drop the sites that are not accepted."""
        # Emptied inner plans stay: their equations are rebuilt to the same effect.
        kept = {i: tuple(s for s in sites if s in accepted) for i, sites in self.taps.items()}
        self.taps = {index: sites for index, sites in kept.items() if sites}
        for nested in self.nested.values():
            for inner in nested.plans:
                inner.keep(accepted)


class Scaling(NamedTuple):
    """Which input of an equation is a number, and which leaves it scales."""

    operand: int
    leaves: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Nested:
    """An equation that holds jaxprs, and a plan for each of them.

    Each subclass (``inner``) is one way in which an equation runs its jaxprs, and so one way to
    rebuild it.

    Attributes:
      equation: the equation.
      plans: the plans, in the order of the jaxprs.
      runs_once: whether it has one jaxpr, which runs once as it stands.
    """

    equation: Any
    plans: Sequence[Plan]
    runs_once: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of one traced loss.

    Attributes:
      plan: what to tap where.
      sites: the accepted sites, in the order of execution.
      views: for each captured leaf, its matrix view (with its bias by leaf index in ``biases``).
      biases: maps a captured leaf to the leaf that is its bias.
      notes: for each leaf, how it is used other than by a tapped layer.
    """

    plan: Plan
    sites: list[Site]
    # Keyed by leaf index, as everything in tracing is: key paths are looked up for printing only.
    views: dict[int, LeafView]
    biases: dict[int, int]
    notes: dict[int, list[str]]

    @property
    def head(self) -> Site | None:
        """The layer executed last, or None."""
        return self.sites[-1] if self.sites else None


# Why a parameter is lost in some primitives; in all others it is "used by" them.
_REASONS: Mapping[str, str] = MappingProxyType({
    "while": "inside a while loop, which has no reverse derivative",
    "custom_jvp_call": "inside a custom_jvp function whose derivative could not be traced",
    "custom_vjp_call": "inside a custom_vjp function, whose derivative is the user's own",
    "custom_vjp_call_jaxpr": "inside a custom_vjp function, whose derivative is the user's own",
    "gather": "read by a table lookup (gather)",
    "dynamic_slice": "sliced before its product",
    "slice": "sliced before its product",
    "split": "split before its product",
    "concatenate": "concatenated before its product",
})  # fmt: skip


@dataclasses.dataclass
class Findings:
    """What was found up to now.

    Attributes:
      leaf_shapes: shapes of the parameter leaves.
      sites: layers, in the order of execution.
      bias_uses: layers and the leaves added to their outputs.
      notes: for each leaf, how it is used other than by a layer.
    """

    leaf_shapes: Sequence[tuple[int, ...]]
    sites: list[Site] = dataclasses.field(default_factory=list)
    bias_uses: list[tuple[Site, int]] = dataclasses.field(default_factory=list)
    notes: dict[int, list[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.notes = {leaf: [] for leaf in range(len(self.leaf_shapes))}

    def note(self, seen: Seen, text: str) -> None:
        """Write down another use of the parameters in ``seen``; each use once."""
        for part in parts_of(seen):
            if part.is_parameter and text not in self.notes[part.source]:
                self.notes[part.source].append(text)

    def drop(self, reasons: Mapping[Site, str]) -> None:
        """Take back sites that turned out to be no layers, each with its reason."""
        self.sites = [site for site in self.sites if site not in reasons]
        for site, reason in reasons.items():
            self.note(site.view, reason)

    def settle(self, plan: Plan) -> Layers:
        """Keep the sites that agree on their leaf's view, and pair biases."""
        by_hand = {site.leaf for site in self.sites if site.by_hand}
        accepted, views = self._agreeing_sites(by_hand)
        biases = self._agreeing_biases(set(accepted), by_hand)
        plan.keep(set(accepted))
        return Layers(plan, accepted, views, biases, self.notes)

    def _agreeing_sites(self, by_hand: set[int]) -> tuple[list[Site], dict[int, LeafView]]:
        views: dict[int, LeafView] = {}
        accepted: list[Site] = []
        for leaf in by_hand:  # what the user declares stands in place of what was found
            self.notes[leaf].clear()
        for site in self.sites:
            if site.leaf in by_hand and not site.by_hand:
                continue
            # Moments of one leaf are sums over its uses. The first use decides the view, and one
            # in another orientation has other sides, which cannot be added to these.
            if views.setdefault(site.leaf, site.leaf_view) == site.leaf_view:
                accepted.append(site)
            else:
                self.notes[site.leaf].append("also used by a layer in another orientation")
        return accepted, views

    def _agreeing_biases(self, accepted: set[Site], by_hand: set[int]) -> dict[int, int]:
        biases: dict[int, int] = {}
        owners: dict[int, int] = {}
        for site, bias in self.bias_uses:
            # A bias added to a product belongs to the layer that was declared in its place.
            if site not in accepted and site.leaf not in by_hand:
                self.notes[bias].append("added to a layer that is not captured")
            elif owners.setdefault(bias, site.leaf) != site.leaf:
                # Two layers have two output factors, and the bias can use one only: it uses none.
                self.notes[bias].append("added to the outputs of two layers")
                biases.pop(owners[bias], None)
            elif biases.setdefault(site.leaf, bias) != bias:
                self.notes[bias].append("a second bias of its layer")
        return biases


class Spot(NamedTuple):
    """Where the walk stands.

    Fields:
      jaxpr: the jaxpr that is being walked.
      plan: its plan, to be filled.
      index: the index of the equation.
    """

    jaxpr: Any
    plan: Plan
    index: int

    @property
    def equation(self) -> Any:
        """The equation."""
        return self.jaxpr.eqns[self.index]

    @property
    def params(self) -> dict[str, Any]:
        """The equation's parameters."""
        return self.equation.params


# Given what an equation's inputs look at, says what its outputs look at (of those it can tell).
FollowRule = Callable[["Walk", Spot, list[Seen]], Sequence[Seen]]


@dataclasses.dataclass(frozen=True)
class Walk:
    """A walk through a jaxpr and the jaxprs in it.

    Attributes:
      findings: what is collected.
      rules: the rule of each primitive that can be followed.
      mesh_sizes: axes of the shard_maps inside the loss that are around the current jaxpr.
    """

    findings: Findings
    rules: Mapping[str, FollowRule]
    mesh_sizes: Mapping[str, int]

    def __call__(self, jaxpr: Any, inputs: Sequence[Seen]) -> tuple[Plan, list[Seen]]:
        """Walk one jaxpr whose inputs look at the sources as ``inputs`` say."""
        plan = Plan()
        # Only what looks at something is stored, so that a missing variable reads as None.
        looks: dict[Any, Seen] = {
            var: _across_border(seen)
            for var, seen in zip(jaxpr.invars, inputs, strict=True)
            if seen is not None
        }

        def look(var: Any) -> Seen:
            return None if is_literal(var) else looks.get(var)

        for index, equation in enumerate(jaxpr.eqns):
            seen = [look(var) for var in equation.invars]
            # Most equations touch neither a parameter nor a bare layer's output.
            if not any(seen):
                continue
            rule = self.rules.get(equation.primitive.name, give_up)
            outputs = rule(self, Spot(jaxpr, plan, index), seen)
            # A rule may know fewer outputs than there are: [] if it can follow none.
            for var, view in zip(equation.outvars, outputs, strict=False):
                if view is not None:
                    looks[var] = view
        return plan, [_across_border(look(var)) for var in jaxpr.outvars]

    def tap(self, spot: Spot, sites: list[Site]) -> list[Site]:
        """Enter the sites of an equation into its plan and the findings; return them as entered."""
        sites = [self._across_devices(site) for site in sites]
        spot.plan.taps[spot.index] = tuple(sites)
        self.findings.sites.extend(sites)
        return sites

    def _across_devices(self, site: Site) -> Site:
        """Return the site with the examples of all devices that hold a part of its input."""
        # Shapes inside a shard_map are those of one device. Only axes over which the input varies
        # hold other examples; over the rest every device sees the same.
        varying = varying_axes(site.operand_types().data)
        inside = math.prod(self.mesh_sizes[axis] for axis in varying if axis in self.mesh_sizes)
        # The size of an axis around the loss is not known here: ``tapping`` asks for it when it
        # runs.
        outside = tuple(sorted(axis for axis in varying if axis not in self.mesh_sizes))
        return dataclasses.replace(
            site, num_examples=site.num_examples * inside, outer_axes=outside
        )


def give_up(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Follow nothing, and note of each parameter that this equation used it."""
    name = spot.equation.primitive.name
    for each in seen:
        walk.findings.note(each, _REASONS.get(name, f"used by {name}"))
    return []


def _across_border(seen: Seen) -> Seen:
    """Return ``seen`` as another jaxpr has it, whose equations cannot read this one's variables."""

    def known_there(scales: Scales) -> Scales:
        return tuple(s if is_literal(s.var) else s._replace(var=None) for s in scales)

    return None if seen is None else change_scales(seen, known_there)
