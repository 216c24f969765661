"""Two transformations, one after the other, and a phase that says which is in charge.

Training that begins with a fast direction and ends with plain SGD has the speed of the one and the
generalization of the other (Ida & Fujiwara 2020; Keskar & Socher 2017; Akiba et al. 2017).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_choice, check_flag, check_interval, check_transformation
from optalr.arrays import wide_dtype
from optalr.clocks import ASK, BLEND, FIRST, SECOND, TAKE_OVER, asking, chosen, is_told
from optalr.phases.momentum import hand_over_momentum
from optalr.phases.switching import phase_schedule
from optalr.states import count_up, injects, settle, settle_like, update_when
from optalr.transforms.shared.gradient_watch import (
    WATCHED,
    GradientWatch,
    Watched,
    admit,
    start_gradient_watch,
)
from optalr.transforms.shared.making import judging, taking_extras, transformation


class TwoStageState(NamedTuple):
    """State of ``two_stage``.

    Attributes:
      phase: float32 scalar, the phase applied by the last update.
      steps_since_switch: int32 scalar, updates since the phase left 0; 0 while it is 0.
      first: the first stage's state, or ``Released``.
      second: the second stage's state.
      failures: int32 scalar, gradients that were not finite or out of proportion.
      gradients: what is remembered of the gradients' lengths, in both stages.
      told: int8 scalar, -1; for whoever runs a program made for one phase (optalr/clocks.py).
      hands_over: bool scalar, whether the second stage takes over a momentum at the switch.
    """

    phase: jax.Array
    steps_since_switch: jax.Array
    first: Any
    second: Any
    failures: jax.Array
    gradients: GradientWatch
    told: jax.Array
    hands_over: jax.Array


class Released(NamedTuple):
    """Takes the place of the first stage's state once its memory has been given back."""


Transfer = Callable[[Any, Any], Any]
Momentum = str | Transfer

_TRANSFERS: dict[str, Transfer | None] = {"restart": None, "hand_over": hand_over_momentum}


def two_stage(
    first: optax.GradientTransformation,
    second: optax.GradientTransformation,
    phase: Any,
    *,
    momentum: Momentum = "restart",
    guard: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Apply ``first``, and from the switch on ``second``.

    Choose it to begin with a fast direction and to end with plain SGD. With ``p`` the phase and
    ``u₁``, ``u₂`` what the stages make of the gradient,

        u = u₁ if p ≤ 0,    u₂ if p ≥ 1,    (1 − p) u₁ + p u₂ between.

    Only the stages that count are run, and only their states advance. The first therefore costs
    nothing at phase 1, and the step count of the second, hence its schedules, starts at the switch.
    For more than two stages let ``second`` be another ``two_stage``; its scheduler starts at the
    switch too.

    A gradient that is not finite reaches both as zeros, and one more than ten times as long as any
    of late is shortened to those, whatever the stages do themselves. So no momentum and no moment
    keeps it, before the switch or after. ``failures`` counts both.

    Args:
      first: the transformation of phase 0, its learning rate included.
      second: the transformation of phase 1, with a rate or schedule of its own.
      phase: a number in [0, 1], or a phase scheduler: ``switch_at``, ``switch_on_plateau``,
        ``blend_between``, or any schedule through ``phase_schedule``. With a scheduler the result
        is ``optax.inject_hyperparams(two_stage, static_args=("first", "second"),
        hyperparam_dtype=jnp.float32)(first, second, phase=phase)``, and the phase stands in
        ``opt_state.hyperparams["phase"]``.
      momentum: ``"restart"`` lets the momentum of the second stage start at zero. ``"hand_over"``
        gives it the momentum of the first stage at the switch, unchanged: it is in the units of the
        first stage's direction, and the rate of the second scales it. A function ``(first_state,
        second_state) -> second_state`` of your own is applied at the switch.
      guard: whether gradients are looked at as above; False hands each on as it is.

    Returns:
      A transformation; extra arguments reach both stages.

    Raises:
      TypeError: a stage is not a gradient transformation.
      ValueError: ``phase`` is a number outside [0, 1]; or ``momentum`` is unknown; or (at ``init``)
        there is no momentum to hand over.

    Cost: that of the stage in charge, and of both between 0 and 1. Memory: the states of both,
      until ``release_first_stage``. Donate the state to the compiled step
      (``jax.jit(step, donate_argnums=...)``): a state that rests is then left where it is, and is
      copied otherwise. The update cannot be differentiated in reverse mode. The first stage runs
      inside control flow, where XLA on a CPU is 10 to 20 times slower at gradients of convolutions.
      A stage that takes such gradients itself, as ``edf`` does (14 times as long in here, with
      three convolutions; ``benchmarks/flows.py --control-flow``), is better run by
      ``optalr.train_step``, whose programs hold one stage each, or on an accelerator.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> tx = optalr.two_stage(optax.adam(0.1), optax.sgd(0.5), optalr.switch_at(1))
      >>> params = {"w": jnp.array([1.0, -2.0])}
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(params, state, params)  # the gradient of |w|²/2
      ...     params = optax.apply_updates(params, updates)
      >>> bool(jnp.allclose(params["w"], jnp.array([0.45, -0.95])))
      True
      >>> float(state.hyperparams["phase"])
      1.0

    Reference: Ida, Fujiwara, "Improving Generalization Performance of Adaptive Learning Rate by
      Switching from Block Diagonal Matrix Preconditioning to SGD", 2020, Algorithm 1. The blend
      follows Akiba, Suzuki, Fukuda, "Extremely Large Minibatch SGD", 2017.
    """
    for name, stage in (("first", first), ("second", second)):
        check_transformation(name, stage)
    check_flag("guard", guard)
    if not callable(momentum):
        check_choice("momentum", momentum, tuple(_TRANSFERS))
    if callable(phase):
        inject = optax.inject_hyperparams(
            two_stage,
            static_args=("first", "second", "momentum", "guard"),
            hyperparam_dtype=jnp.float32,
        )
        tx = inject(first, second, phase=phase_schedule(phase), momentum=momentum, guard=guard)
        return judging("two_stage", tx, lambda state: injects(state, "phase"))
    check_interval("phase", phase, 0.0, 1.0, remedy="Pass a phase scheduler such as switch_at.")
    stages = _Stages(
        first=taking_extras(first),
        second=taking_extras(second),
        phase=phase,
        transfer=momentum if callable(momentum) else _TRANSFERS[momentum],
        guard=guard,
    )
    return transformation("two_stage", stages.init, stages.update, holds=TwoStageState)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by jit: the phase may be an array
class _Stages:
    """Two stages and a phase that is a number, or a tracer under ``inject_hyperparams``."""

    first: optax.GradientTransformationExtraArgs
    second: optax.GradientTransformationExtraArgs
    phase: Any
    transfer: Transfer | None
    guard: bool

    def init(self, params: Any) -> TwoStageState:
        first, second = settle(self.first.init(params)), settle(self.second.init(params))
        if self.transfer is not None:
            jax.eval_shape(self.transfer, first, second)  # refuses now what fails at the switch
        return TwoStageState(
            told=asking(),
            hands_over=jnp.array(self.transfer is not None),
            phase=jnp.array(self.phase, jnp.float32),
            steps_since_switch=jnp.zeros((), jnp.int32),
            first=first,
            second=second,
            failures=jnp.zeros((), jnp.int32),
            gradients=start_gradient_watch(),
        )

    def update(
        self, updates: Any, state: Any, params: Any = None, **extras: Any
    ) -> tuple[Any, TwoStageState]:
        told = int(state.told) if is_told(state.told) else ASK
        if self.guard:
            given = admit(updates, state.gradients)
            if told == FIRST:
                watched = Watched(updates, given.updates, given.share, given.empty)
                extras = {**extras, WATCHED: watched}
            updates, failures = given.updates, count_up(state.failures, given.failed)
            state = state._replace(failures=failures, gradients=given.watch)
        inputs = (params, extras)
        if isinstance(state.first, Released) or told in (SECOND, TAKE_OVER):
            return self._second_alone(updates, state, inputs, takes_over=told == TAKE_OVER)
        if told == FIRST:
            zero, steps = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
            updates, first = _run(self.first, (updates, state.first), inputs)
            return updates, _moved(state, phase=zero, steps_since_switch=steps, first=first)

        weight = jnp.asarray(self.phase, jnp.float32)
        steps = jnp.where(weight > 0, count_up(state.steps_since_switch), 0)
        if told == BLEND:
            return self._blended(updates, state, inputs, weight=weight, steps=steps)
        second = self._take_over(steps == 1, state)
        # The updates are carried through and changed in place, with no second buffer in phase 1.
        updates, first, second = update_when(
            weight < 1,
            partial(self._first_and_blend, weight),
            (updates, state.first, second),
            inputs,
        )
        updates, second = update_when(
            weight >= 1, partial(_run, self.second), (updates, second), inputs
        )
        return updates, _moved(
            state, phase=weight, steps_since_switch=steps, first=first, second=second
        )

    def _second_alone(
        self, updates: Any, state: TwoStageState, inputs: Any, *, takes_over: bool
    ) -> tuple[Any, TwoStageState]:
        """Run the second stage, in a program that holds no other."""
        second = state.second
        if takes_over and self.transfer is not None:
            second = settle_like(self.transfer(state.first, second), second)
        updates, second = _run(self.second, (updates, second), inputs)
        steps = count_up(state.steps_since_switch)
        one = jnp.ones((), jnp.float32)
        return updates, _moved(state, phase=one, steps_since_switch=steps, second=second)

    def _blended(
        self, updates: Any, state: TwoStageState, inputs: Any, *, weight: Any, steps: jax.Array
    ) -> tuple[Any, TwoStageState]:
        """Run both stages, in a program that is made for phases between 0 and 1."""
        before = state.second
        if self.transfer is not None:
            after = settle_like(self.transfer(state.first, before), before)
            before = chosen(steps == 1, after, before)
        from_first, first = _run(self.first, (updates, state.first), inputs)
        from_second, second = _run(self.second, (updates, before), inputs)
        # The clock on the host may be late: only stages that count advance.
        first = chosen(weight < 1, first, state.first)
        second = chosen(weight > 0, second, before)
        blended = jax.tree.map(partial(_blend, weight), from_first, from_second)
        return blended, _moved(
            state, phase=weight, steps_since_switch=steps, first=first, second=second
        )

    def _take_over(self, is_switch: jax.Array, state: TwoStageState) -> Any:
        """Return the second stage's state, at the switch with the momentum that it takes over."""
        transfer = self.transfer
        if transfer is None:
            return state.second

        def apply(current: Any, source: Any) -> Any:
            return settle_like(transfer(source, current), current)

        return update_when(is_switch, apply, state.second, state.first)

    def _first_and_blend(self, weight: jax.Array, carry: Any, inputs: Any) -> Any:
        """Run the first stage, and above phase 0 blend the second one's updates into its own."""
        updates, first, second = carry
        from_first, first = _run(self.first, (updates, first), inputs)

        def mix_in(carry: Any, inputs: Any) -> Any:
            from_second, second = _run(self.second, (updates, carry[1]), inputs)
            return jax.tree.map(partial(_blend, weight), carry[0], from_second), second

        blended, second = update_when(weight > 0, mix_in, (from_first, second), inputs)
        return blended, first, second


def _moved(state: TwoStageState, **changes: Any) -> TwoStageState:
    """Return the state after an update."""
    return state._replace(told=asking(), **changes)


def _run(
    stage: optax.GradientTransformationExtraArgs, carry: tuple[Any, Any], inputs: tuple[Any, Any]
) -> tuple[Any, Any]:
    """Return a stage's updates and state, in the dtypes that they had in ``carry``."""
    (updates, state), (params, extras) = carry, inputs
    new_updates, new_state = stage.update(updates, state, params, **extras)
    return settle_like(new_updates, updates), settle_like(new_state, state)


def _blend(weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return ``(1 − p) a + p b`` in the dtype of ``a``, summed in float32 or wider."""
    dtype = wide_dtype(a)
    share = weight.astype(jnp.finfo(dtype).dtype)
    return ((1 - share) * a.astype(dtype) + share * b.astype(dtype)).astype(a.dtype)
