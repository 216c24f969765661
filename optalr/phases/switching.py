"""Phase schedulers: the number that says which stage is in charge, kept in the optimizer's state.

A phase is a float32 scalar. 0 stands for the first stage, 1 for the second, and a number between
them for a blend. Each scheduler here is an ``optax.base.StatefulSchedule`` for
``optax.inject_hyperparams``:

    tx = optax.inject_hyperparams(
        two_stage, static_args=("first", "second"), hyperparam_dtype=jnp.float32
    )(first, second, phase=switch_at(2_000))

The phase in force can then be read in ``opt_state.hyperparams["phase"]``. It is saved with the rest
of the state, whose structure never changes. The phase of the *next* update is decided at the end of
each update and kept in the state. So ``optalr.wants_signals`` knows, before the next gradient is
taken, whether a stage will read its signals.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_choice, check_count, is_concrete
from optalr.states import count_up


class PhaseState(NamedTuple):
    """State of every phase scheduler.

    Attributes:
      scheduled: float32 scalar, the phase that the schedule gives the next update.
      override: float32 scalar, the phase set by ``set_phase`` instead; 0 where none is set.
      overridden: bool scalar, whether one is set.
      schedule: the schedule's own state.
    """

    scheduled: jax.Array
    override: jax.Array
    overridden: jax.Array
    schedule: Any

    @property
    def next_phase(self) -> jax.Array:
        """The phase that the next update will apply."""
        return jnp.where(self.overridden, self.override, self.scheduled)


def next_phase(node: Any) -> jax.Array:
    """Return the phase that the next update of an injected ``two_stage`` will apply.

    Where a bare function schedules the phase, that of the last update is returned: the state holds
    no other.
    """
    schedule = schedule_state(node)
    return schedule.next_phase if isinstance(schedule, PhaseState) else node.hyperparams["phase"]


def schedule_state(node: Any) -> Any:
    """Return the state of what schedules the phase of ``node``, None where it is a constant."""
    # A wrapper of one's own may keep hyperparams like optax's without the states of schedules.
    return (getattr(node, "hyperparams_states", None) or {}).get("phase")


class PhaseSchedule:
    """A stateful schedule whose phase is known one step ahead and can be overridden by hand.

    ``phase_schedule`` makes one of any schedule.
    """

    def __init__(self, schedule: Any):
        self._schedule = schedule

    def init(self) -> PhaseState:
        """Return the state before the first update."""
        inner = self._schedule.init()
        return PhaseState(
            scheduled=_as_phase(self._schedule(inner)),
            override=jnp.zeros((), jnp.float32),
            overridden=jnp.zeros((), bool),
            schedule=inner,
        )

    def update(self, state: PhaseState, **extra_args: Any) -> PhaseState:
        """Return the state after an update that received ``extra_args``."""
        inner = self._schedule.update(state.schedule, **extra_args)
        scheduled = _as_phase(self._schedule(inner, **extra_args))
        return state._replace(scheduled=scheduled, schedule=inner)

    def __call__(self, state: PhaseState, **extra_args: Any) -> jax.Array:
        """Return the phase of the current update."""
        del extra_args
        return state.next_phase


class CountState(NamedTuple):
    """State of a phase that is a function of the step: int32 scalar, updates so far."""

    count: jax.Array


class RampState(NamedTuple):
    """State of a phase that rises from 0 to 1 between two steps.

    Attributes:
      count: int32 scalar, updates so far.
      start: int32 scalar, up to which the phase is 0; for a switch it is 0 *before* it.
      end: int32 scalar, from which the phase is 1.
    """

    count: jax.Array
    start: jax.Array
    end: jax.Array


class _FunctionOfStep:
    """A function of the step count, as a stateful schedule."""

    def __init__(self, schedule_fn: Callable[[jax.Array], Any]):
        self._schedule_fn = schedule_fn

    def init(self) -> CountState:
        return CountState(jnp.zeros((), jnp.int32))

    def update(self, state: CountState, **extra_args: Any) -> CountState:
        del extra_args
        return CountState(count_up(state.count))

    def __call__(self, state: CountState, **extra_args: Any) -> Any:
        del extra_args
        return self._schedule_fn(state.count)


class _Ramp:
    """A function of the step count that is 0 up to ``start`` and 1 from ``end`` on."""

    def __init__(self, schedule_fn: Callable[[jax.Array], Any], start: Any, end: Any):
        self._schedule_fn, self._start, self._end = schedule_fn, start, end

    def init(self) -> RampState:
        return self._state(jnp.zeros((), jnp.int32))

    def update(self, state: RampState, **extra_args: Any) -> RampState:
        del extra_args
        return self._state(count_up(state.count))

    def __call__(self, state: RampState, **extra_args: Any) -> Any:
        del extra_args
        return self._schedule_fn(state.count)

    def _state(self, count: jax.Array) -> RampState:
        return RampState(count, jnp.array(self._start, jnp.int32), jnp.array(self._end, jnp.int32))


def phase_schedule(schedule: Any) -> PhaseSchedule:
    """Make a phase scheduler of any schedule, so that ``set_phase`` can override it.

    Choose it for a rule of your own. ``optax.inject_hyperparams`` takes bare functions too, but
    ``set_phase`` cannot reach those and ``wants_signals`` sees their phase one step late.

    Args:
      schedule: a function of the step count (updates so far, 0 at the first), with values in
        [0, 1]; or an object with ``init()``, ``update(state, **extra_args)`` and ``__call__(state,
        **extra_args)``, such as an ``optax.base.StatefulSchedule``. An object is called at the end
        of each update, with the extra arguments of that update, for the phase of the next one.

    Returns:
      A stateful schedule for ``optax.inject_hyperparams``. Values are clipped to [0, 1].

    Raises:
      TypeError: ``schedule`` is neither.

    Cost: a few scalar operations a step.

    Examples:
      >>> import jax.numpy as jnp, optalr
      >>> back_and_forth = optalr.phase_schedule(lambda step: (step // 10) % 2)
      >>> state = back_and_forth.init()
      >>> for _ in range(10):
      ...     state = back_and_forth.update(state)
      >>> float(back_and_forth(state))
      1.0
    """
    if isinstance(schedule, PhaseSchedule):
        return schedule
    if all(callable(getattr(schedule, name, None)) for name in ("init", "update", "__call__")):
        return PhaseSchedule(schedule)
    if callable(schedule):
        return PhaseSchedule(_FunctionOfStep(schedule))
    raise TypeError(
        f"schedule must be a function of the step or a stateful schedule, got {schedule!r}. For a "
        "constant phase pass a function that returns it."
    )


def switch_at(step: int) -> PhaseSchedule:
    """Switch to the second stage at a given step, the switchover point that the paper tunes.

    Choose it where the switch point is known, from earlier runs or the literature. The phase of
    update ``t`` (0 at the first) is ``0 if t < step else 1``.

    Args:
      step: number of updates that the first stage makes, at least 0: epochs times steps per epoch.

    Returns:
      A stateful schedule for the ``phase`` of ``two_stage`` under ``optax.inject_hyperparams``.

    Raises:
      TypeError: ``step`` is not a whole number.
      ValueError: ``step`` is negative.

    Cost: a few scalar operations a step.

    Examples:
      >>> import optalr
      >>> schedule = optalr.switch_at(2)
      >>> state, phases = schedule.init(), []
      >>> for _ in range(4):
      ...     phases.append(float(schedule(state)))
      ...     state = schedule.update(state)
      >>> phases
      [0.0, 0.0, 1.0, 1.0]

    Reference: Ida, Fujiwara, "Improving Generalization Performance of Adaptive Learning Rate by
      Switching from Block Diagonal Matrix Preconditioning to SGD", 2020, Algorithm 1.
    """
    check_count("step", step, 0, remedy="Give the number of updates that the first stage makes.")
    return phase_schedule(_Ramp(lambda count: count >= step, step - 1, step))


def no_switch() -> PhaseSchedule:
    """Stay in the first stage; only ``set_phase`` can leave it."""
    last = jnp.iinfo(jnp.int32).max
    return phase_schedule(_Ramp(lambda _: 0.0, last, last))


def blend_between(
    start: int, end: int, *, shape: str | Callable[[jax.Array], Any] = "linear"
) -> PhaseSchedule:
    """Pass smoothly from the first stage to the second, over an interval of steps.

    Choose it where a sudden switch upsets training, as with very large batches. The phase of
    update ``t`` (0 at the first) is ``shape((t − start) / (end − start))``, the fraction clipped
    to [0, 1]: exactly 0 up to ``start`` and exactly 1 from ``end`` on.

    Args:
      start: the last step of the first stage alone, at least 0.
      end: the first step of the second stage alone, after ``start``.
      shape: ``"linear"``; ``"cosine"``, with no kink at either end; or an increasing function of
        your own from [0, 1] to [0, 1].

    Returns:
      A stateful schedule for the ``phase`` of ``two_stage``.

    Raises:
      TypeError: ``start`` or ``end`` is not a whole number.
      ValueError: ``end`` is not after ``start``, or ``shape`` is unknown.

    Cost: both stages are run between ``start`` and ``end``.

    Examples:
      >>> import optalr
      >>> schedule = optalr.blend_between(1, 5)
      >>> state, phases = schedule.init(), []
      >>> for _ in range(7):
      ...     phases.append(float(schedule(state)))
      ...     state = schedule.update(state)
      >>> phases
      [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]

    Reference: Akiba, Suzuki, Fukuda, "Extremely Large Minibatch SGD: Training ResNet-50 on
      ImageNet in 15 Minutes", 2017. They weigh RMSProp against momentum SGD inside one update,
      along a curve that is first exponential and then linear. We weigh two whole updates; their
      curve can be passed as ``shape``.
    """
    check_count("start", start, 0)
    check_count("end", end, 0)
    if is_concrete(start) and is_concrete(end) and end <= start:
        raise ValueError(f"end must come after start={start}, got {end}. See switch_at for a step.")
    if not callable(shape):
        check_choice("shape", shape, tuple(_SHAPES))
        shape = _SHAPES[shape]

    def phase_at(count: jax.Array) -> jax.Array:
        steps = jnp.clip(count - start, 0, end - start).astype(jnp.float32)
        fraction = steps / (end - start)
        # A shape of the user's own may miss 0 and 1 at the ends, and then both stages would run.
        within = jnp.asarray(shape(fraction), jnp.float32)
        return jnp.where(fraction <= 0, 0.0, jnp.where(fraction >= 1, 1.0, within))

    return phase_schedule(_Ramp(phase_at, start, end))


_SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda fraction: fraction,
    "cosine": lambda fraction: (1 - jnp.cos(jnp.pi * fraction)) / 2,
}


def _as_phase(value: Any) -> jax.Array:
    return jnp.clip(jnp.asarray(value).astype(jnp.float32), 0.0, 1.0)
