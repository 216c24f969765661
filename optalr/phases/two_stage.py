"""Two transformations, one after the other, with a phase that says which is in charge.

Training that begins with a fast direction and ends with plain SGD keeps the speed of the one and
the generalization of the other (Ida & Fujiwara 2020; Keskar & Socher 2017; Akiba et al. 2017).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_choice, check_interval
from optalr.arrays import wide_dtype
from optalr.phases.momentum import hand_over_momentum
from optalr.phases.schedulers import phase_schedule
from optalr.states import count_up, settle, settle_like, update_when


class TwoStageState(NamedTuple):
    """State of ``two_stage``.

    Attributes:
      phase: float32 scalar, the phase applied by the last update.
      steps_since_switch: int32 scalar, updates since the phase left 0; 0 while it is 0.
      first: the first stage's state, or ``Released``.
      second: the second stage's state.
    """

    phase: jax.Array
    steps_since_switch: jax.Array
    first: Any
    second: Any


class Released(NamedTuple):
    """Stands where the first stage's state was, once its memory has been given back."""


Transfer = Callable[[Any, Any], Any]
Momentum = str | Transfer

_TRANSFERS: dict[str, Transfer | None] = {"restart": None, "hand_over": hand_over_momentum}


def two_stage(
    first: optax.GradientTransformation,
    second: optax.GradientTransformation,
    phase: Any,
    *,
    momentum: Momentum = "restart",
) -> optax.GradientTransformationExtraArgs:
    """Apply ``first``, and from the switch on ``second``.

    Choose it to begin with a fast direction and to end with plain SGD. With ``p`` the phase and
    ``u₁``, ``u₂`` what the stages make of the gradient,

        u = u₁ if p ≤ 0,    u₂ if p ≥ 1,    (1 − p) u₁ + p u₂ between.

    Only the stages that count are run, and only their states advance: the first costs nothing at
    phase 1, and the second's step count, hence its schedules, start at the switch. For more than
    two stages let ``second`` be another ``two_stage``; its scheduler, too, starts at the switch.

    Args:
      first: the transformation of phase 0, its learning rate included.
      second: the transformation of phase 1, with a rate or schedule of its own.
      phase: a phase scheduler (``switch_at``, ``switch_on_plateau``, ``blend_between``, or any
        schedule through ``phase_schedule``), and then the result is
        ``optax.inject_hyperparams(two_stage, static_args=("first", "second"),
        hyperparam_dtype=jnp.float32)(first, second, phase=phase)``, with the phase in
        ``opt_state.hyperparams["phase"]``; or a number in [0, 1].
      momentum: ``"restart"``: the second stage's momentum starts at zero. ``"hand_over"``: at the
        switch it takes over the first stage's, as it is; that is in the units of the first stage's
        direction, and the second's rate scales it. Or a function ``(first_state, second_state) ->
        second_state`` of your own, applied at the switch.

    Returns:
      A transformation; extra arguments reach both stages.

    Raises:
      TypeError: a stage is not a gradient transformation.
      ValueError: ``phase`` is a number outside [0, 1], or ``momentum`` is unknown, or (at ``init``)
        there is no momentum to hand over.

    Cost: that of the stage in charge; of both between 0 and 1. Memory: the states of both, until
      ``release_first_stage``. Donate the state to the compiled step
      (``jax.jit(step, donate_argnums=...)``): the state that rests is then left where it is, and
      otherwise copied. The update cannot be differentiated in reverse mode. The first stage runs
      inside control flow, where XLA on a CPU is 10 to 20 times slower at gradients of convolutions:
      one that takes them itself, as ``edf`` does (12.6 ms a step alone, 152 ms in here, on three
      such layers), is better switched in Python, or run on an accelerator.

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
      Switching from Block Diagonal Matrix Preconditioning to SGD", 2020, Algorithm 1; the blend
      after Akiba, Suzuki, Fukuda, "Extremely Large Minibatch SGD", 2017.
    """
    for name, stage in (("first", first), ("second", second)):
        if not (hasattr(stage, "init") and hasattr(stage, "update")):
            raise TypeError(
                f"{name} must be an optax.GradientTransformation, got {stage!r}. Build it first, "
                "for instance optax.sgd(0.1)."
            )
    if not callable(momentum):
        check_choice("momentum", momentum, tuple(_TRANSFERS))
    if callable(phase):
        inject = optax.inject_hyperparams(
            two_stage, static_args=("first", "second", "momentum"), hyperparam_dtype=jnp.float32
        )
        return inject(first, second, phase=phase_schedule(phase), momentum=momentum)
    check_interval("phase", phase, 0.0, 1.0, remedy="Pass a phase scheduler such as switch_at.")
    transfer = momentum if callable(momentum) else _TRANSFERS[momentum]
    first, second = optax.with_extra_args_support(first), optax.with_extra_args_support(second)

    def init_fn(params: Any) -> TwoStageState:
        first_state, second_state = settle(first.init(params)), settle(second.init(params))
        if transfer is not None:
            jax.eval_shape(transfer, first_state, second_state)  # refuses now what fails later
        return TwoStageState(
            phase=jnp.asarray(phase, jnp.float32),
            steps_since_switch=jnp.zeros((), jnp.int32),
            first=first_state,
            second=second_state,
        )

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        inputs = (params, extras)
        if isinstance(state.first, Released):
            weight = jnp.ones((), jnp.float32)
            steps = count_up(state.steps_since_switch)
            new_updates, second_state = _run(second, state.second, updates, *inputs)
            return new_updates, TwoStageState(weight, steps, state.first, second_state)

        weight = jnp.asarray(phase, jnp.float32)
        steps = jnp.where(weight > 0, count_up(state.steps_since_switch), 0)

        def before_the_end(carry: Any, inputs: Any) -> Any:
            updates, first_state, second_state = carry
            new_updates, first_state = _run(first, first_state, updates, *inputs)

            def mix_in(carry: Any, inputs: Any) -> Any:
                from_second, second_state = _run(second, carry[1], updates, *inputs)
                return jax.tree.map(partial(_blend, weight), carry[0], from_second), second_state

            new_updates, second_state = update_when(
                weight > 0, mix_in, (new_updates, second_state), inputs
            )
            return new_updates, first_state, second_state

        def at_the_end(carry: Any, inputs: Any) -> Any:
            return _run(second, carry[1], carry[0], *inputs)

        # The updates are carried through and changed in place, with no second buffer in phase 1.
        second_state = _hand_over(transfer, steps == 1, state.first, state.second)
        new_updates, first_state, second_state = update_when(
            weight < 1, before_the_end, (updates, state.first, second_state), inputs
        )
        new_updates, second_state = update_when(
            weight >= 1, at_the_end, (new_updates, second_state), inputs
        )
        return new_updates, TwoStageState(weight, steps, first_state, second_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _hand_over(
    transfer: Transfer | None, is_switch: jax.Array, first_state: Any, second_state: Any
) -> Any:
    if transfer is None:
        return second_state

    def apply(current: Any, source: Any) -> Any:
        return settle_like(transfer(source, current), current)

    return update_when(is_switch, apply, second_state, first_state)


def _run(stage: Any, state: Any, updates: Any, params: Any, extras: Any) -> tuple[Any, Any]:
    new_updates, new_state = stage.update(updates, state, params, **extras)
    return settle_like(new_updates, updates), settle_like(new_state, state)


def _blend(weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = wide_dtype(a)
    share = weight.astype(jnp.finfo(dtype).dtype)
    return ((1 - share) * a.astype(dtype) + share * b.astype(dtype)).astype(a.dtype)
