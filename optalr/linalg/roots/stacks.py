"""Inverse roots of stacks of several sizes at once.

In: stacks of matrices, dampings, and how to take the roots. Out: the roots, and how good they are.
Products and decompositions are done size by size. Numbers, of which a matrix has one, are worked on
in one vector for all sizes, and one loop serves all sizes whose method iterates. So a program for
many sizes compiles fast, and an accelerator starts few kernels and answers few questions.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.linalg import spd
from optalr.linalg.roots.methods import EIGH, FIRST_BASIS, REFRESH, Device, RootMethod, choose
from optalr.linalg.spd import MethodResult, RootTask

# Where no tolerance is asked for, a root is held to max(FLOOR, FACTOR · ε · condition): what
# rounding leaves within reach.
TOLERANCE_FLOOR = 1e-4
TOLERANCE_FACTOR = 8.0


class Asked(NamedTuple):
    """What is asked for: K matrices in all."""

    stacks: Sequence[jax.Array]  # each (k, n, n), all of one dtype
    damping: jax.Array  # (K,)
    scale: jax.Array | None = None  # (K,), what the matrices are to be multiplied by first
    power: jax.Array | None = None  # (K,), p where it is traced
    bases: Sequence[jax.Array] | None = None  # each (k, n, n)
    tolerance: jax.Array | None = None  # (K,); None for what rounding leaves within reach


class Manner(NamedTuple):
    """How to take roots: what a program is made for."""

    power: int | float | None  # p, None where it is traced
    method: str
    order: int = 3
    repairs: bool = True  # whether eigh is tried where a method misses its tolerance


class Found(NamedTuple):
    """Roots, and how good they are.

    A root that does not exist has an infinite residual, and may hold anything.
    """

    roots: list[jax.Array]  # each (k, n, n)
    residual: jax.Array  # (K,), never NaN
    success: jax.Array  # (K,) bool
    num_steps: jax.Array  # (K,) int32
    fell_back: jax.Array  # (K,) bool, where the root is eigh's because the method missed
    bases: list[jax.Array] | None  # each (k, n, n), with method="eigenbasis"


@functools.partial(jax.jit, static_argnames="manner")
def solve(asked: Asked, manner: Manner) -> Found:
    """Take roots; under ``vmap``, of larger stacks, to keep the fallback's ``cond`` a branch."""
    solve_stacks = jax.custom_batching.custom_vmap(functools.partial(_solve, manner=manner))

    @solve_stacks.def_vmap
    def _(axis_size, in_batched, asked):
        asked = jax.tree.map(
            lambda x, batched: x if batched else jnp.broadcast_to(x, (axis_size, *x.shape)),
            asked,
            in_batched[0],
        )
        ends = np.cumsum([0, *(stack.shape[1] for stack in asked.stacks)])
        places = list(itertools.pairwise(ends.tolist()))

        def merged(part: jax.Array) -> jax.Array:
            if part.ndim == 4:
                return part.reshape(-1, *part.shape[2:])
            return jnp.concatenate([part[:, a:b].reshape(-1) for a, b in places])

        def apart(part: jax.Array) -> jax.Array:
            if part.ndim == 3:
                return part.reshape(axis_size, -1, *part.shape[1:])
            pieces = [part[axis_size * a : axis_size * b] for a, b in places]
            return jnp.concatenate([piece.reshape(axis_size, -1) for piece in pieces], axis=1)

        found = jax.tree.map(apart, solve_stacks(jax.tree.map(merged, asked)))
        return found, jax.tree.map(lambda _: True, found)

    return solve_stacks(asked)


class _Ran(NamedTuple):
    """What a method found, and what eigh found in its place."""

    result: MethodResult
    fell_back: jax.Array  # (K,) bool


class _Judge(NamedTuple):
    """What decides whether a root is good enough."""

    usable: jax.Array  # (K,) bool
    tolerance: jax.Array | None  # (K,)

    def accepts(self, result: MethodResult) -> jax.Array:
        """Return which residuals are within the tolerance; a NaN is not."""
        tolerance = self.tolerance
        if tolerance is None:
            eps = jnp.finfo(result.condition.dtype).eps
            tolerance = jnp.maximum(TOLERANCE_FLOOR, TOLERANCE_FACTOR * eps * result.condition)
        return result.residual <= tolerance


def _solve(asked: Asked, *, manner: Manner) -> Found:
    """Scale stacks, run the methods, with eigh where that misses, and judge the results."""
    normalized = spd.normalize(asked.stacks, asked.damping, asked.scale)
    stacks, usable = normalized.stacks, normalized.usable
    p: Any = asked.power if manner.power is None else manner.power
    task = RootTask(stacks, p, manner.order, asked.bases or ())
    judge = _Judge(usable, asked.tolerance)

    # One question about the device, and none inside.
    devices = {"cpu": Device(is_cpu=True), "cuda": Device(is_gpu=True), "rocm": Device(is_gpu=True)}
    devices["default"] = Device()
    choices = {name: _methods(manner, asked, device) for name, device in devices.items()}
    run = {
        name: functools.partial(
            _run, chosen, task._replace(on_cpu=name == "cpu"), judge, repairs=manner.repairs
        )
        for name, chosen in choices.items()
        if name in ("cpu", "default") or chosen != choices["default"]
    }
    result, fell_back = jax.lax.platform_dependent(**run)
    # Undo the scaling.
    units = spd.columns(spd.inverse_root_of_unit(normalized.unit, p), stacks)
    roots = list(map(jnp.multiply, result.roots, units))
    exists = usable & jnp.isfinite(result.residual)
    if not (isinstance(p, int | float) and p >= 2):
        # Else a root whose residual is finite is so itself, and its unit is far from overflow.
        exists &= spd.join([jnp.isfinite(root).all((-2, -1)) for root in roots])
    return Found(
        roots=roots,
        residual=jnp.where(exists, result.residual, jnp.inf),
        success=exists & judge.accepts(result),
        num_steps=result.num_steps,
        fell_back=fell_back,
        bases=result.bases,
    )


def _methods(manner: Manner, asked: Asked, device: Device) -> tuple[RootMethod, ...]:
    """Return the method of each stack on a kind of device."""
    shapes = [(stack.shape[0], stack.shape[1]) for stack in asked.stacks]
    chosen = [choose(manner.method, manner.power, shape=s, device=device) for s in shapes]
    return tuple(FIRST_BASIS if m is REFRESH and asked.bases is None else m for m in chosen)


def _run(methods: Sequence[RootMethod], task: RootTask, judge: _Judge, *, repairs: bool) -> _Ran:
    """Run the method of each stack; those that have the same one together."""
    places: dict[RootMethod, list[int]] = {}
    for i, method in enumerate(methods):
        places.setdefault(method, []).append(i)
    if len(places) == 1:
        return _run_one(methods[0], task, judge, repairs=repairs)
    ran: dict[int, _Ran] = {}
    for method, own in places.items():
        some, of_some = _part(task, judge, own)
        found = _run_one(method, some, of_some, repairs=repairs)
        ran.update(zip(own, _apart(found, some.stacks), strict=True))
    return _together([ran[i] for i in range(len(methods))])


def _run_one(method: RootMethod, task: RootTask, judge: _Judge, *, repairs: bool) -> _Ran:
    """Run one method, and eigh once for the stacks with a matrix where it missed."""
    result = method.take(task)
    ran = _Ran(result, jnp.zeros(judge.usable.shape, bool))
    if not method.can_miss or not repairs:
        return ran
    missed = spd.split(judge.usable & ~judge.accepts(result), task.stacks)

    def repair(task: RootTask, missed: jax.Array, ran: _Ran) -> _Ran:
        result = ran.result
        other = (EIGH if result.bases is None else FIRST_BASIS).take(task)
        # Written so that a NaN residual loses.
        take = missed & ~(result.residual <= other.residual)
        chosen = jax.tree.map(
            lambda new, old: jnp.where(spd.align(take, new), new, old), other, result
        )
        return _Ran(chosen, take)

    repaired = []
    for i, own in enumerate(_apart(ran, task.stacks)):
        some, _ = _part(task, judge, [i])
        again = functools.partial(repair, some, missed[i])
        repaired.append(jax.lax.cond(jnp.any(missed[i]), again, lambda ran: ran, own))
    return _together(repaired)


def _part(task: RootTask, judge: _Judge, places: Sequence[int]) -> tuple[RootTask, _Judge]:
    """Return what is asked for some of the stacks."""

    def some(numbers: Any) -> Any:
        if not isinstance(numbers, jax.Array):  # None, or one number for all
            return numbers
        parts = spd.split(numbers, task.stacks)
        return spd.join([parts[i] for i in places])

    stacks = [task.stacks[i] for i in places]
    bases = [task.bases[i] for i in places] if task.bases else ()
    part = task._replace(stacks=stacks, bases=bases, power=some(task.power))
    return part, _Judge(some(judge.usable), some(judge.tolerance))


def _apart(ran: _Ran, stacks: Sequence[jax.Array]) -> list[_Ran]:
    """Return what was found for each stack."""
    result = ran.result
    residual, condition, num_steps, fell_back = (
        spd.split(each, stacks)
        for each in (result.residual, result.condition, result.num_steps, ran.fell_back)
    )
    bases = [[basis] for basis in result.bases] if result.bases else [None] * len(stacks)
    return [
        _Ran(MethodResult([root], *numbers, bases=basis), fell)
        for root, basis, fell, *numbers in zip(
            result.roots, bases, fell_back, residual, condition, num_steps, strict=True
        )
    ]


def _together(parts: Sequence[_Ran]) -> _Ran:
    """Undo ``_apart``."""
    results = [part.result for part in parts]
    bases = [basis for result in results for basis in result.bases or ()]
    result = MethodResult(
        [root for result in results for root in result.roots],
        spd.join([result.residual for result in results]),
        spd.join([result.condition for result in results]),
        spd.join([result.num_steps for result in results]),
        bases=bases or None,
    )
    return _Ran(result, spd.join([part.fell_back for part in parts]))
