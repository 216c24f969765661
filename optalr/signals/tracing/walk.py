"""Walking a jaxpr: what each array on the way looks at.

In: a jaxpr and what its inputs look at. Out: the plan of what to tap in it, and what its outputs
look at; on the side, sites and notes gather in ``Findings``, which are settled in the end: every
leaf then has one matrix view at most, and every layer one bias at most. How one equation is
followed is decided by the *rule* of its primitive.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from optalr.signals.moments import LeafView
from optalr.signals.tracing.jaxprs import is_literal
from optalr.signals.tracing.joined import Joined, Seen, parts_of
from optalr.signals.tracing.plan import Layers, Plan
from optalr.signals.tracing.sites.hand import HandSite
from optalr.signals.tracing.sites.site import Site
from optalr.signals.tracing.views import View

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

    def settle(self, plan: Plan) -> Layers:
        """Keep the sites that agree on their leaf's view; pair biases; name the head."""
        accepted, views = self._agreeing_sites()
        biases = self._agreeing_biases(set(accepted))
        plan.keep(set(accepted))
        # The walk meets equations in the order of execution, so the last site is the head.
        head = accepted[-1] if accepted else None
        return Layers(plan, accepted, views, biases, self.notes, head)

    def _by_hand(self) -> set[int]:
        return {site.leaf for site in self.sites if isinstance(site, HandSite)}

    def _agreeing_sites(self) -> tuple[list[Site], dict[int, LeafView]]:
        views: dict[int, LeafView] = {}
        accepted: list[Site] = []
        by_hand = self._by_hand()
        for leaf in by_hand:  # what the user declares stands in place of what was found
            self.notes[leaf].clear()
        for site in self.sites:
            if site.leaf in by_hand and not isinstance(site, HandSite):
                continue
            # Moments of one leaf are sums over its uses. The first use decides the view, and one
            # in another orientation has other sides, which cannot be added to these.
            if views.setdefault(site.leaf, site.leaf_view) == site.leaf_view:
                accepted.append(site)
            else:
                self.notes[site.leaf].append("also used by a layer in another orientation")
        return accepted, views

    def _agreeing_biases(self, accepted: set[Site]) -> dict[int, int]:
        by_hand = self._by_hand()
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
        looks: dict[Any, View | Joined] = {
            var: seen for var, seen in zip(jaxpr.invars, inputs, strict=True) if seen is not None
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
        return plan, [look(var) for var in jaxpr.outvars]

    def inside_mesh(self, sizes: Mapping[str, int]) -> "Walk":
        """Return the walk for what is inside a shard_map over axes of these sizes."""
        return dataclasses.replace(self, mesh_sizes={**self.mesh_sizes, **sizes})


def give_up(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Follow nothing, and note of each parameter that this equation used it."""
    name = spot.equation.primitive.name
    for each in seen:
        walk.findings.note(each, _REASONS.get(name, f"used by {name}"))
    return []
