"""What was found in a traced loss: its layers, and which equations to tap, jaxpr by jaxpr."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from optalr.signals.moments import LeafView
from optalr.signals.tracing.compat import open_jaxpr
from optalr.signals.tracing.sites import Site

# Equations that evaluate a jaxpr once, as it stands.
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})


@dataclasses.dataclass(frozen=True)
class Derivative:
    """The user's derivative of one ``custom_jvp`` call, traced.

    Attributes:
      function: the call, as a function of ``variables``.
      variables: the distinct variables that it reads.
      inputs: which of them have tangents.
      outputs: which of its outputs have tangents.
      closed: the ``ClosedJaxpr`` of (all variables, tangents of inputs) -> tangents of outputs.
    """

    function: Callable[..., Any]
    variables: tuple[Any, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    closed: Any


@dataclasses.dataclass
class Plan:
    """What to tap in one jaxpr.

    Attributes:
      taps: sites by equation index; several if the equation's kernel joins several leaves.
      nested: plans of the jaxprs inside an equation, by equation index.
      sliced: for a scan, by equation index, the leaves of which it takes one slice a step.
      derivatives: for a custom_jvp, by equation index, its derivative; the nested plan is for it.
    """

    taps: dict[int, tuple[Site, ...]] = dataclasses.field(default_factory=dict)
    nested: dict[int, tuple["Plan", ...]] = dataclasses.field(default_factory=dict)
    sliced: dict[int, frozenset[int]] = dataclasses.field(default_factory=dict)
    derivatives: dict[int, Derivative] = dataclasses.field(default_factory=dict)

    def all_sites(self) -> Iterator[Site]:
        """Iterate over the sites of this jaxpr and of those inside it."""
        for sites in self.taps.values():
            yield from sites
        for plans in self.nested.values():
            for inner in plans:
                yield from inner.all_sites()

    def sites_run_once(self, jaxpr: Any) -> Iterator[Site]:
        """Iterate over the sites of ``jaxpr``, this plan's, outside loops, branches and remat."""
        for sites in self.taps.values():
            yield from sites
        for index, plans in self.nested.items():
            equation = jaxpr.eqns[index]
            if equation.primitive.name in CALLS:
                yield from plans[0].sites_run_once(open_jaxpr(equation.params["jaxpr"]))


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
