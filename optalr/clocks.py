"""What an update does by the count of updates alone: asked on the device, or told beforehand.

Some work is due in one update of many: a measurement, a root, a probe. A compiled program can ask
its clock each time, and then holds both answers, with control flow around them that an accelerator
waits for. Or whoever runs the program knows the answer, because counts of updates are no secret:
``optalr.train_step`` keeps a copy of each clock on the host and runs a program in which the answer
is a constant.

A state with a clock has a scalar ``told``, at rest ``ASK``, and a property ``clock``. Where a NumPy
integer stands in ``told`` while an update is traced, it says what the update may do. That is a
permission. What is due by the clock in the state, and is not permitted, waits; what is permitted
and not due is computed and not used. (What decides whether other states run, a stage or the end of
a gathering, obeys.) So a copy that is out of date makes something late, and nothing wrong.

A clock is a NamedTuple of scalars. Its methods take jax arrays and Python's numbers alike, so that
one text serves the device and the host.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from optalr.states import update_when

# What ``told`` holds at rest: the update asks its own clock.
ASK = -1
# Bits of what an update may do: measure signals of this batch, take what was measured and work on
# it, evaluate the loss once more, or decompose what an iteration could not do.
MEASURE, REFRESH, PROBE, REPAIR = 1, 2, 4, 8
# What a two_stage may be told in their place: which stages run, and whether the second takes over
# what the first leaves.
FIRST, BLEND, SECOND, TAKE_OVER = range(4)


class Clock(Protocol):
    """When something is due."""

    def needs(self) -> Any:
        """Return what the next update has to do: the bits above, as an integer scalar."""
        ...

    def after(self, told: Any) -> "Clock":
        """Return the clock after an update that was told so, and in which all went well."""
        ...


def asking() -> jax.Array:
    """Return what ``told`` holds at rest."""
    return jnp.array(ASK, jnp.int8)


def is_told(told: Any) -> bool:
    """Return whether the program at hand is made for one answer."""
    # A state that was restored as NumPy arrays, and is not traced, holds ASK as one of them.
    return isinstance(told, np.generic | np.ndarray) and int(told) != ASK


def period_of(number: Any) -> jax.Array:
    """Return a period as a state keeps it, for whoever copies the clock."""
    return jnp.array(number, jnp.int32)


def where(condition: Any, one: Any, other: Any) -> Any:
    """Return ``one`` where a condition holds, else ``other``, on the device or on the host."""
    if isinstance(condition, jax.Array):
        return jnp.where(condition, one, other)
    return one if condition else other


def larger(one: Any, other: Any) -> Any:
    """Return the larger of two scalars, on the device or on the host."""
    return where(one > other, one, other)


def smaller(one: Any, other: Any) -> Any:
    """Return the smaller of two scalars, on the device or on the host."""
    return where(one < other, one, other)


def permitted(told: Any, bit: int) -> Any:
    """Return whether an update may do something: a NumPy bool where that is known now."""
    if is_told(told):
        return np.bool_((told & bit) != 0)
    asks = (told < 0) | ((told & bit) != 0)
    return asks if isinstance(asks, jax.Array) else bool(asks)


def is_barred(may: Any) -> bool:
    """Return whether it is known now that nothing may be done, by what ``permitted`` returned."""
    return isinstance(may, np.bool_) and not may


def run_when(
    due: jax.Array,
    update: Callable[[Any, Any], Any],
    state: Any,
    *,
    inputs: Any,
    may: Any,
) -> Any:
    """Return ``update(state, inputs)`` where that is due and permitted, else ``state``.

    Args:
      due: boolean scalar.
      update: a function that keeps structure, shapes and dtypes of ``state``.
      state: a pytree of arrays.
      inputs: a pytree of all else that ``update`` reads.
      may: what ``permitted`` returned. A NumPy bool leaves no control flow in the program.
    """
    if not isinstance(may, np.bool_):
        return update_when(due & may, update, state, inputs)
    if is_barred(may):
        return state
    return chosen(due, update(state, inputs), state)


def measure_when(due: jax.Array, measure: Callable[[], Any], *, may: Any) -> Any:
    """Return ``measure()`` where that is due and permitted, else zeros.

    Args:
      due: boolean scalar.
      measure: a function that returns a pytree of arrays.
      may: what ``permitted`` returned. A NumPy bool leaves no control flow in the program.
    """
    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(measure))
    if not isinstance(may, np.bool_):
        return jax.lax.cond(due & may, measure, lambda: nothing)
    return chosen(due, measure(), nothing) if may else nothing


def chosen(condition: jax.Array, new: Any, old: Any) -> Any:
    """Return the leaves of ``new`` where ``condition`` holds, else those of ``old``.

    A leaf that is the same in both is left alone: a select would copy it.
    """

    def pick(one: Any, other: Any) -> Any:
        if one is other:
            return one
        one, other = jnp.asarray(one), jnp.asarray(other)
        if one.shape != other.shape or one.dtype != other.dtype:
            return jnp.where(condition, one, other)
        return jax.lax.select(condition, one, other)  # one operation, where jnp.where has three

    return jax.tree.map(pick, new, old)


class Periodic(NamedTuple):
    """What is due in the first update, and then every so many."""

    count: Any  # () int32, updates so far
    period: Any  # () int32

    @property
    def is_certain(self) -> Any:
        """Whether the period is known: it is not in some states that an older release saved."""
        return self.period > 0

    def needs(self) -> Any:
        """Return whether the next update probes."""
        return PROBE * (self.count % larger(self.period, 1) == 0)

    def after(self, told: Any) -> "Periodic":
        """Return the clock an update later."""
        del told
        return self._replace(count=self.count + 1)
