"""Where a state of any nesting keeps its clocks, and which of them run only when another says so.

In: the structure of a state. Out: the positions of the clocks' scalars among the state's leaves. So
a clock is read, and told, by position, without a walk over the state at each step.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from optalr.phases.clocks import stage_clock
from optalr.phases.two_stage import Released, TwoStageState
from optalr.states import children, injects, is_named_tuple
from optalr.transforms.kronecker.memory import KroneckerState

# Wrappers of optax that decide on the device whether what they wrap runs, and do not say so before.
_GATES = frozenset(
    {
        "ApplyIfFiniteState",
        "ConditionallyMaskState",
        "ConditionallyTransformState",
        "MaybeUpdateState",
        "MultiStepsState",
        "SAMState",
    }
)

# Hyperparameters that are periods, by the names that optax.inject_hyperparams knows them by.
_PERIODS = frozenset(
    {"every", "every_k_schedule", "signals_every", "steps_per_epoch", "update_every"}
)


class Gate(NamedTuple):
    """What lets a clock run: the place of another one, and which of its children this is in."""

    place: int
    child: str


@dataclasses.dataclass(frozen=True)
class Place:
    """A clock in a state.

    Attributes:
      told: the position of its state's ``told`` among the leaves.
      clock: the clock, with positions in place of the scalars that are leaves of the state.
      gates: what lets it run, from the outside in.
      asks: why no program can be made for one answer of it; empty where one can.
    """

    told: int
    clock: Any
    gates: tuple[Gate, ...]
    asks: str

    @property
    def is_gate(self) -> bool:
        """Whether it decides which other clocks run."""
        return hasattr(self.clock, "opens")


@dataclasses.dataclass(frozen=True)
class Survey:
    """What is known of a state by its structure.

    Attributes:
      places: the clocks, each after those that gate it.
      asks_for_signals: whether a method without a clock says on the device what it wants.
      factors: which leaves are factors of matrices, and their roots.
    """

    places: tuple[Place, ...]
    asks_for_signals: bool
    factors: tuple[int, ...]

    @functools.cached_property
    def positions(self) -> tuple[int, ...]:
        """The leaves that the clocks consist of, each once."""
        leaves = jax.tree.leaves([place.clock for place in self.places if not place.asks])
        return tuple(sorted({leaf for leaf in leaves if isinstance(leaf, int)}))

    @property
    def reasons(self) -> list[str]:
        """Why clocks cannot be told, each reason once."""
        return sorted({place.asks for place in self.places if place.asks})

    def factors_of(self, leaves: Any) -> list[Any]:
        """Return the factors and roots of a state, given its leaves by position."""
        return [leaves[i] for i in self.factors]

    def is_open(self, place: Place, told: Sequence[int]) -> bool:
        """Return whether a clock runs, by what those before it are told."""
        clocks = (self.places[gate.place].clock for gate in place.gates)
        gates = zip(place.gates, clocks, strict=True)
        return all(clock.opens(told[gate.place], gate.child) for gate, clock in gates)

    def clocks(self, leaves: Any) -> list[Any]:
        """Return the clocks of a state, given its leaves by position."""

        def scalar(entry: Any) -> Any:
            return leaves[entry] if isinstance(entry, int) else entry

        return [None if p.asks else jax.tree.map(scalar, p.clock) for p in self.places]


def survey(state: Any) -> Survey:
    """Return where a state keeps its clocks."""
    leaves, treedef = jax.tree.flatten(state)
    walk = _Walk([np.shape(leaf) for leaf in leaves])
    walk.visit(treedef.unflatten(range(len(leaves))), (), asks="")
    return Survey(tuple(walk.places), walk.asks_for_signals, tuple(walk.factors))


class _Walk:
    """A walk over a state whose leaves are their own positions."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        self.shapes = shapes
        self.places: list[Place] = []
        self.asks_for_signals = False
        self.factors: list[int] = []

    def visit(self, node: Any, gates: tuple[Gate, ...], *, asks: str, injected: Any = None) -> None:
        """Note the clocks under ``node``; ``injected`` is a state that may hold its phase."""
        scheduled = _PERIODS.intersection(getattr(node, "hyperparams_states", None) or ())
        if scheduled:
            asks = asks or f"a schedule sets {', '.join(sorted(scheduled))}"
        if injects(node, "phase"):
            return self.visit(node.inner_state, gates, asks=asks, injected=node)
        if is_named_tuple(node) and hasattr(node, "told"):
            return self._visit_clocked(node, gates, asks=asks, injected=injected)
        if is_named_tuple(node):
            self.asks_for_signals |= hasattr(node, "wants_signals")
            name = type(node).__name__
            if name in _GATES:
                asks = asks or f"optax's {name} says on the device alone when it acts"
        for _, child in children(node):
            self.visit(child, gates, asks=asks)

    def _visit_clocked(
        self, node: Any, gates: tuple[Gate, ...], *, asks: str, injected: Any
    ) -> None:
        if not isinstance(node, TwoStageState):
            clock = node.clock
        elif isinstance(node.first, Released):
            clock = stage_clock(node, None)
        else:
            clock = stage_clock(node, injected)
            if clock is None:
                asks = asks or "a bare function decides the phase (switch_at is known beforehand)"
        positions = [leaf for leaf in jax.tree.leaves(clock) if isinstance(leaf, int)]
        if any(self.shapes[position] for position in positions):
            asks = asks or "its state holds a clock for each member of a vmap"
        if isinstance(node, KroneckerState):
            self.factors += jax.tree.leaves(node.memory.sides)
        own = len(self.places)
        told: Any = node.told  # a position, as all leaves here
        self.places.append(Place(told, clock, gates, asks))
        for name, child in children(node):
            inside = (*gates, Gate(own, name)) if hasattr(clock, "opens") else gates
            self.visit(child, inside, asks=asks)
        return None
