"""The methods that take inverse roots, and which of them suits a size and a device.

The methods themselves are in ``decompositions``, ``newton`` and ``polar``.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from optalr.arguments import check_choice, check_interval, is_concrete
from optalr.linalg.roots import decompositions
from optalr.linalg.roots.newton import coupled_newton_root
from optalr.linalg.roots.polar import cholesky_polar_root
from optalr.linalg.spd import MethodResult, RootTask

# Where, on a CPU, Cholesky + polar takes no longer than eigh at condition 1e2 and at 1e6, by
# benchmarks/roots.py: matrices of this many rows, at least this many rows in the stack. The coupled
# iteration is about as fast there, and less accurate at a high condition.
CPU_POLAR_ROWS = (32, 64)
CPU_POLAR_TOTAL = 256
# Up to so many rows a GPU takes an eigendecomposition faster than an iteration: on an H100 (jax
# 0.11) it took 0.94 ms for 4 matrices of 128 rows, Cholesky + polar 2.0 ms; for 16 of 1024 rows 59
# ms and 18 to 26 ms.
GPU_EIGH_ROWS = 128


class RootMethod(NamedTuple):
    """A way to take roots of normalized stacks."""

    take: Callable[[RootTask], MethodResult]
    whole_powers: bool = False  # whether p must be whole, and known
    can_miss: bool = True  # whether eigh is tried where it misses the tolerance


EIGH = RootMethod(decompositions.eigh_root, can_miss=False)
POLAR = RootMethod(cholesky_polar_root, whole_powers=True)
NEWTON = RootMethod(coupled_newton_root, whole_powers=True)
REFRESH = RootMethod(decompositions.refreshed_root)
# What REFRESH does without a basis to start from.
FIRST_BASIS = RootMethod(decompositions.eigh_root_and_basis, can_miss=False)
BY_NAME: Mapping[str, RootMethod] = MappingProxyType(
    {"eigh": EIGH, "coupled_newton": NEWTON, "cholesky_polar": POLAR, "eigenbasis": REFRESH}
)
AUTO = "auto"
METHODS = (AUTO, *BY_NAME)


class Device(NamedTuple):
    """What kind of device a program is for: a CPU, a GPU, or another accelerator."""

    is_cpu: bool = False
    is_gpu: bool = False


def choose(method: str, power: Any, *, shape: tuple[int, int], device: Device) -> RootMethod:
    """Return what to run for k matrices of n rows.

    Args:
      method: a name, or ``"auto"``.
      power: p, None where it is traced.
      shape: ``(k, n)``.
      device: what the program is for.
    """
    if method != AUTO:
        return BY_NAME[method]
    if not isinstance(power, int):
        return EIGH  # nothing else takes a root that is traced or not whole
    number, rows = shape
    if device.is_gpu and rows <= GPU_EIGH_ROWS and power > 1:
        return EIGH
    if not device.is_cpu:
        # Decompositions are slow on accelerators: there, the fewest products.
        return POLAR if power <= 2 else NEWTON
    # The fastest on a CPU, whatever the condition.
    low, high = CPU_POLAR_ROWS
    suits = low <= rows <= high and number * rows >= CPU_POLAR_TOTAL
    return POLAR if power == 1 or (power == 2 and suits) else EIGH


def checked_power(p: Any, method: str, order: int) -> int | float | None:
    """Return p, an int where it is whole, None where it is traced.

    Raises:
      TypeError: p is traced and the method needs its value.
      ValueError: p, the method or the order is out of range, or the method cannot take this p.
    """
    check_choice("method", method, METHODS)
    check_interval("p", p, 0, open_low=True, remedy="Pass p=2 for the inverse square root.")
    if order not in (2, 3):
        raise ValueError(f"order must be 2 or 3, got {order!r}.")
    value = float(np.asarray(p)) if is_concrete(p) else None
    power = int(value) if value is not None and value.is_integer() else value
    chosen = BY_NAME.get(method, EIGH)  # auto takes any power, as eigh does
    if not chosen.whole_powers:
        return power
    if power is None:
        raise TypeError(f"p must be a known number for method={method!r}. Pass method='eigh'.")
    if not isinstance(power, int):
        raise ValueError(f"p must be whole for method={method!r}, got {p!r}. Pass method='eigh'.")
    if chosen is POLAR and power & (power - 1):
        raise ValueError(
            f"p must be a power of two for method={method!r}, got {p!r}. Pass "
            "method='coupled_newton'."
        )
    return power
