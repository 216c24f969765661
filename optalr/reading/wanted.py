"""Whether an optimizer state of any nesting wants signals from the next gradient."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optalr.phases.switching import next_phase
from optalr.phases.two_stage import TwoStageState
from optalr.states import check_opt_state, children, injects, is_named_tuple


def wants_signals(opt_state: Any) -> jax.Array | np.bool_:
    """Return whether the next update will read captured signals.

    Choose it to capture signals only in steps that use them:
    ``evaluate(params, batch, signals=optalr.wants_signals(opt_state))``. Around a switch of phase
    the phase of the next update decides, so nothing is captured in vain and nothing is missed. (A
    phase scheduled by a bare function is known one step late; ``phase_schedule`` makes it known in
    time.) In ``optalr.multi_steps`` it is False for all calls but those that hand on an update;
    ``optax.MultiSteps`` does not tell which these are, so within it every call may be one.

    Args:
      opt_state: any optimizer state, of optalr or not, at any nesting.

    Returns:
      A boolean scalar; a concrete False where no state in it ever reads signals.

    Cost: a few scalar operations.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> bool(optalr.wants_signals(optax.adam(1e-3).init(jnp.ones(2))))
      False
    """
    check_opt_state(opt_state)
    answers = list(_answers(opt_state, None))
    if not answers:
        return np.bool_(False)
    # A state under vmap answers for every member at once, and one member's yes is enough.
    return jnp.any(jnp.stack([jnp.any(answer) for answer in answers]))


def _answers(node: Any, phase: Any) -> Iterator[jax.Array]:
    """Yield what the states under ``node`` answer; ``phase`` is that of the nearest two_stage."""
    if injects(node, "phase"):
        phase, node = next_phase(node), node.inner_state
    if is_named_tuple(node) and hasattr(node, "emits"):
        # A wrapper that runs what it wraps in some calls alone, and says so.
        for _, child in children(node):
            yield from (node.emits & jnp.any(answer) for answer in _answers(child, phase))
    elif isinstance(node, TwoStageState):
        phase = node.phase if phase is None else phase
        for stage, in_charge in ((node.first, phase < 1), (node.second, phase > 0)):
            yield from (in_charge & jnp.any(answer) for answer in _answers(stage, None))
    elif is_named_tuple(node) and hasattr(node, "wants_signals"):
        yield node.wants_signals
    else:
        for _, child in children(node):
            yield from _answers(child, phase)
