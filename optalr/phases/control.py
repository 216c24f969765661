"""Control of the phase by hand: setting it, and giving back the memory of the first stage."""

from typing import Any

import jax
import jax.numpy as jnp

from optalr.arguments import check_interval, is_concrete
from optalr.phases.matching import take_over_gain
from optalr.phases.switching import PhaseState, next_phase, schedule_state
from optalr.phases.two_stage import Released, TwoStageState
from optalr.states import injects


def set_phase(opt_state: Any, phase: float | None, *, level: int = 0) -> Any:
    """Set the phase by hand, from the next update on.

    Choose it in a notebook, after a look at the curves. Writing to
    ``opt_state.hyperparams["phase"]`` has no effect, because optax recomputes what is scheduled.
    This function writes an override into the scheduler's state, which is saved and restored with
    the rest.

    Args:
      opt_state: an optimizer state that holds a ``two_stage`` with a scheduler, at any depth.
      phase: a number in [0, 1], or None to give the decision back to the schedule.
      level: which ``two_stage`` to set where they are nested: 0 for the outermost, 1 for those
        inside it, and so on.

    Returns:
      A new state of the same structure, shapes and dtypes.

    Raises:
      ValueError: ``phase`` lies outside [0, 1]; or there is no phase at this level; or the first
        stage has been released and ``phase`` is below 1.
      TypeError: the phase is scheduled by a bare function, whose state cannot hold an override.

    Cost: a walk over the state. It may be called inside ``jit``.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> tx = optalr.two_stage(optax.adam(0.1), optax.sgd(0.5), optalr.switch_at(1_000))
      >>> params = jnp.ones(2)
      >>> state = optalr.set_phase(tx.init(params), 1.0)
      >>> updates, state = tx.update(params, state, params)
      >>> optax.apply_updates(params, updates).tolist()
      [0.5, 0.5]
    """
    if phase is not None:
        check_interval("phase", phase, 0.0, 1.0, remedy="0 is the first stage, 1 the second.")
    found = 0

    def at_level(tree: Any, depth: int) -> Any:
        def visit(node: Any) -> Any:
            nonlocal found
            if not injects(node, "phase"):
                return node
            if depth:
                return node._replace(inner_state=at_level(node.inner_state, depth - 1))
            found += 1
            return _override(node, phase)

        return jax.tree.map(visit, tree, is_leaf=lambda node: injects(node, "phase"))

    new_state = at_level(opt_state, level)
    if not found:
        raise ValueError(
            f"opt_state holds no phase at level {level} that can be set. Build the optimizer with "
            "optalr.two_stage(first, second, optalr.switch_at(...)); swats decides by itself."
        )
    return new_state


def release_first_stage(opt_state: Any) -> Any:
    """Give back the memory of first stages that are no longer needed.

    Choose it once the switch is final: the factors and roots of a preconditioner often take several
    times the memory of the model. The state gets smaller, so the next step is compiled again, once.
    That program holds the second stage alone, whatever the phase is afterwards. The transformation
    stays the same.

    Args:
      opt_state: an optimizer state. Every ``two_stage`` in it is released (where they are nested,
        the outermost) and must have reached phase 1. A state whose phase cannot be read, as inside
        ``jit``, is refused.

    Returns:
      The state, without the first stages.

    Raises:
      ValueError: there is nothing to release, or a phase is still below 1.

    Cost: a walk over the state, and one compilation afterwards.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> tx = optalr.two_stage(optax.adam(0.1), optax.sgd(0.5), optalr.switch_at(0))
      >>> params = jnp.ones(1000)
      >>> state = tx.init(params)
      >>> before = optalr.state_bytes(state)
      >>> state = optalr.release_first_stage(state)
      >>> before > 8000 > optalr.state_bytes(state)
      True

    To restore a checkpoint taken after a release, build the target in the same way:
    ``release_first_stage(set_phase(tx.init(params), 1.0))``.
    """
    found = 0

    def visit(node: Any, phase: Any) -> Any:
        nonlocal found
        if injects(node, "phase"):
            return node._replace(inner_state=walk(node.inner_state, next_phase(node)))
        if not isinstance(node, TwoStageState):
            return node
        found += 1
        current = node.phase if phase is None else phase
        if not is_concrete(current) or not bool(jnp.all(current >= 1)):
            raise ValueError(
                f"the first stage is still needed: the phase is {current}. Call "
                "release_first_stage outside jit, when opt_state.hyperparams['phase'] is 1."
            )
        return take_over_gain(node)._replace(first=Released())

    def walk(tree: Any, phase: Any) -> Any:
        def stops(node: Any) -> bool:
            return injects(node, "phase") or isinstance(node, TwoStageState)

        return jax.tree.map(lambda node: visit(node, phase), tree, is_leaf=stops)

    new_state = walk(opt_state, None)
    if not found:
        raise ValueError("opt_state holds no two_stage, so there is no first stage to release.")
    return new_state


def _override(node: Any, phase: float | None) -> Any:
    """Return the injected state ``node`` with ``phase`` in force from the next update on."""
    inner = node.inner_state
    released = isinstance(inner, TwoStageState) and isinstance(inner.first, Released)
    if released and phase is not None and is_concrete(phase) and float(phase) < 1:
        raise ValueError(f"phase must be 1 once the first stage is released, got {phase}.")
    schedule = schedule_state(node)
    value = node.hyperparams["phase"]
    if schedule is None:
        if phase is None:
            raise ValueError("phase must be a number: no schedule decides it in this optimizer.")
        replaced = node
        value = jnp.full_like(value, phase)
    elif isinstance(schedule, PhaseState):
        schedule = schedule._replace(
            override=jnp.full_like(schedule.override, 0 if phase is None else phase),
            overridden=jnp.full_like(schedule.overridden, phase is not None),
        )
        replaced = node._replace(hyperparams_states={**node.hyperparams_states, "phase": schedule})
        value = jnp.asarray(schedule.next_phase, value.dtype)
    else:
        raise TypeError(
            "phase is scheduled by a bare function, which cannot be overridden. Wrap it: "
            "phase=optalr.phase_schedule(schedule)."
        )
    return replaced._replace(hyperparams={**node.hyperparams, "phase": value})
