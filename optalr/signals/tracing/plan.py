"""What was found in a traced loss: its layers, and which equations to tap, jaxpr by jaxpr.

A ``Plan`` has the shape of the traced loss: equations that hold jaxprs have plans of their own for
these (``Nested``). The finder (``layers``) writes it, and ``tapping`` follows it. ``Layers`` is the
plan with what it covers, leaf by leaf.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from optalr.signals.moments import LeafView
from optalr.signals.tracing.sites.site import Site


@dataclasses.dataclass
class Plan:
    """What to tap in one jaxpr.

    Attributes:
      taps: sites by equation index; several if the equation's kernel joins several leaves.
      nested: by equation index, equations that hold jaxprs with something to tap.
    """

    taps: dict[int, tuple[Site, ...]] = dataclasses.field(default_factory=dict)
    nested: dict[int, "Nested"] = dataclasses.field(default_factory=dict)

    def all_sites(self) -> Iterator[Site]:
        """Iterate over the sites of this jaxpr and of those inside it."""
        for sites in self.taps.values():
            yield from sites
        for nested in self.nested.values():
            for inner in nested.plans:
                yield from inner.all_sites()

    def sites_run_once(self) -> Iterator[Site]:
        """Iterate over the sites outside loops, branches and remat."""
        for sites in self.taps.values():
            yield from sites
        # A remat's inside runs twice, a branch perhaps not at all, a shard_map's on every device.
        for nested in self.nested.values():
            if isinstance(nested, Call):
                yield from nested.plans[0].sites_run_once()

    def keep(self, accepted: set[Site]) -> None:
        """Drop the sites that are not accepted."""
        # Emptied inner plans stay: their equations are rebuilt to the same effect.
        kept = {i: tuple(s for s in sites if s in accepted) for i, sites in self.taps.items()}
        self.taps = {index: sites for index, sites in kept.items() if sites}
        for nested in self.nested.values():
            for inner in nested.plans:
                inner.keep(accepted)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tap."""
        return not self.taps and not self.nested


@dataclasses.dataclass(frozen=True)
class Nested:
    """An equation that holds jaxprs, and a plan for each of them.

    Each subclass is one way in which an equation runs its jaxprs, and so one way to rebuild it.

    Attributes:
      equation: the equation.
      plans: the plans, in the order of the jaxprs.
    """

    equation: Any
    plans: Sequence[Plan]


class Call(Nested):
    """An inner ``jit``: the jaxpr runs once, as it stands."""


class Remat(Nested):
    """A ``jax.checkpoint``: the jaxpr runs again in the backward pass."""


class Branches(Nested):
    """A ``cond`` or ``switch``: one of the jaxprs runs."""


class ShardMap(Nested):
    """A ``shard_map``: the jaxpr runs on each device's part of the data."""


@dataclasses.dataclass(frozen=True)
class Scan(Nested):
    """A ``scan``, or a ``fori_loop`` with static bounds: the jaxpr runs once a step.

    Attributes:
      sliced: the leaves of which the scan takes one slice a step.
    """

    sliced: frozenset[int]


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


@dataclasses.dataclass(frozen=True)
class CustomJvp(Nested):
    """A ``custom_jvp`` call: what is tapped is its derivative, not its value.

    Attributes:
      derivative: the derivative, which the plan is for.
    """

    derivative: Derivative


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
    # Keyed by leaf index, as everything in tracing is: key paths are looked up for printing only.
    views: dict[int, LeafView]
    biases: dict[int, int]
    notes: dict[int, list[str]]
    head: Site | None
