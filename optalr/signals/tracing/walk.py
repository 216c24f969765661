"""Walking a jaxpr: what each array on the way looks at.

In: a jaxpr and what its inputs look at. Out: the plan of what to tap in it, and what its outputs
look at; on the side, sites and notes gather in ``Findings``. How one equation is followed is
decided by the *rule* of its primitive.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from optalr.signals.tracing.findings import Findings
from optalr.signals.tracing.jaxprs import is_literal
from optalr.signals.tracing.joined import Joined, Seen
from optalr.signals.tracing.plan import Plan
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
Rule = Callable[["Walk", Spot, list[Seen]], Sequence[Seen]]


@dataclasses.dataclass(frozen=True)
class Walk:
    """A walk through a jaxpr and the jaxprs in it.

    Attributes:
      findings: what is collected.
      rules: the rule of each primitive that can be followed.
      mesh_sizes: axes of the shard_maps inside the loss that are around the current jaxpr.
    """

    findings: Findings
    rules: Mapping[str, Rule]
    mesh_sizes: Mapping[str, int]

    def __call__(self, jaxpr: Any, inputs: Sequence[Seen]) -> tuple[Plan, list[Seen]]:
        """Walk one jaxpr whose inputs look at the sources as ``inputs`` say."""
        plan = Plan()
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
