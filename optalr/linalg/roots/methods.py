"""The methods by name, the powers that each can do, and which one ``"auto"`` takes where."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from optalr.arguments import is_concrete
from optalr.linalg import spd
from optalr.linalg.roots.eigh import eigh_root, eigh_root_and_basis, refreshed_root
from optalr.linalg.roots.interface import MethodResult, RootTask
from optalr.linalg.roots.newton import coupled_newton_root
from optalr.linalg.roots.polar import cholesky_polar_root

# Where, on a CPU, Cholesky + polar takes no longer than eigh at condition 1e2 and at 1e6, by
# benchmarks/roots.py: matrices of this many rows, at least this many rows in the stack. The coupled
# iteration is about as fast there, and less accurate at a high condition.
CPU_POLAR_ROWS = (32, 64)
CPU_POLAR_TOTAL = 256


def _any_power(p: Any, method: str) -> None:
    del p, method


def _whole_power(p: Any, method: str) -> int:
    """Return p as an int, or raise if it is not a known whole number."""
    if not is_concrete(p):
        raise TypeError(f"p must be a known number for method={method!r}. Pass method='eigh'.")
    whole = spd.whole_number(p)
    if whole is None:
        raise ValueError(f"p must be whole for method={method!r}, got {p!r}. Pass method='eigh'.")
    return whole


def _power_of_two(p: Any, method: str) -> None:
    """Raise if p is not a known power of two."""
    whole = _whole_power(p, method)
    if whole & (whole - 1):
        raise ValueError(
            f"p must be a power of two for method={method!r}, got {p!r}. Pass "
            "method='coupled_newton'."
        )


class RootMethod(NamedTuple):
    """A way to take roots of a normalized stack."""

    take: Callable[[RootTask], MethodResult]
    check_power: Callable[[Any, str], Any] = _any_power  # raises for a p that it cannot do
    can_miss: bool = True  # whether eigh is tried where it misses the tolerance


EIGH = RootMethod(eigh_root, can_miss=False)
POLAR = RootMethod(cholesky_polar_root, _power_of_two)
NEWTON = RootMethod(coupled_newton_root, _whole_power)
REFRESH = RootMethod(refreshed_root)
# What REFRESH does without a basis to start from.
FIRST_BASIS = RootMethod(eigh_root_and_basis, can_miss=False)

BY_NAME: Mapping[str, RootMethod] = MappingProxyType(
    {"eigh": EIGH, "coupled_newton": NEWTON, "cholesky_polar": POLAR, "eigenbasis": REFRESH}
)
AUTO = "auto"


def check_power(p: Any, method: str) -> int | None:
    """Return p as an int where it is whole, or raise if the method cannot do it."""
    if method != AUTO:
        BY_NAME[method].check_power(p, method)
    return spd.whole_number(p)


def choose(method: str, task: RootTask) -> tuple[RootMethod, RootMethod]:
    """Return what to run for the task on a CPU, and what elsewhere."""
    if method == AUTO:
        # Only eigh takes a root that is traced or not whole.
        return _automatic(task) if isinstance(task.power, int) else (EIGH, EIGH)
    chosen = BY_NAME[method]
    if chosen is REFRESH and task.basis is None:
        chosen = FIRST_BASIS
    return chosen, chosen


def _automatic(task: RootTask) -> tuple[RootMethod, RootMethod]:
    """Return the fastest on a CPU, whatever the condition, and the fewest products elsewhere."""
    p, shape = task.power, task.matrix.shape
    low, high = CPU_POLAR_ROWS
    many = math.prod(shape[:-1]) >= CPU_POLAR_TOTAL
    suits_cpu = p == 1 or (p == 2 and low <= shape[-1] <= high and many)
    # Decompositions are slow on accelerators.
    return (POLAR if suits_cpu else EIGH), (POLAR if p <= 2 else NEWTON)
