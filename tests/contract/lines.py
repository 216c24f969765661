"""What a line of the registry says, and which clauses it may be exempted from."""

from collections.abc import Callable
from typing import Any, NamedTuple

# Clauses that a method may be exempted from, by name. All others hold for every line.
CLAUSES = {
    "faults": "5 and 9: what is not finite, or out of proportion, is counted and harmless",
    "rescaling": "9: a gradient that was rescaled on its way changes no direction",
}


class Exemption(NamedTuple):
    """A clause of ``CLAUSES`` that a method does not keep, and why."""

    clause: str
    reason: str


class Method(NamedTuple):
    """One line of the registry.

    Attributes:
      name: unique; that of the public function, or one of ``CHOICES``.
      make: builds the transformation; parameters with numeric defaults may be injected.
      needs: extras without which ``update`` raises a TypeError that names them.
      reports: names that ``optalr.metrics`` must find in the state.
      guards: whether a gradient that is not finite yields a finite update and a failure counted;
        False for what only passes on what it is given.
      rtol: tolerance between two compilations of the same steps.
      exempt: clauses that the method does not keep.
    """

    name: str
    make: Callable[..., Any]
    needs: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()
    guards: bool = True
    rtol: float = 1e-4
    exempt: tuple[Exemption, ...] = ()

    def __repr__(self) -> str:
        return self.name
