"""What an optimizer state of any nesting reports, and how large it is."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optalr.phases.two_stage import TwoStageState
from optalr.states import check_opt_state, children, injects, is_named_tuple

# Fields of state NamedTuples that are reported under their own name. A fixed list, because a state
# also holds numbers that no log should show.
REPORTED = (
    "learning_rate",
    "phase",
    "steps_since_switch",
    "damping",
    "root_age",
    "root_residual",
    "failures",
    "update_norm",
    "lipschitz_constant",
    "krylov_residual",
    "reduction_ratio",
    "negative_curvature",
    "activation_norm",
    "next_rate",
    "average_rate",
    "ray_slope",
    "ray_curvature",
    "nonconvex_probes",
    "runaway_steps",
    "clipped_rates",
    "bounded_steps",
    "guarded_rates",
    "weight_decay",
    "hypergradient",
    "gain",
)
# Fields of common optax states, and the name they are reported under.
FOREIGN = {
    "estim_lr": "learning_rate",
    "total_notfinite": "failures",
    "gradient_step": "step",
    "count": "step",
}
# How several values of one name become one. Without an entry here the first one found counts.
_COMBINED = {
    "failures": lambda values: sum(values[1:], values[0]),
    "root_age": lambda values: _largest(values),
    "root_residual": lambda values: _largest(values),
    "step": lambda values: _largest(values),
}


def metrics(opt_state: Any) -> dict[str, Any]:
    """Collect what the states report about the last update in one flat dictionary.

    Choose it for logging: the values are those applied, not those planned. It may be called inside
    or outside ``jit``.

    Args:
      opt_state: any optimizer state, of optalr or optax, at any nesting. The function reads the
        fields listed in ``REPORTED`` and ``FOREIGN`` and the numbers under
        ``optax.inject_hyperparams``.

    Returns:
      A dict of scalars. It always has ``"state_bytes"``. Where they apply, it has
      ``"learning_rate"``, ``"phase"``, ``"steps_since_switch"``, ``"damping"``, ``"root_age"``,
      ``"root_residual"``, ``"failures"``, ``"step"`` and more.

      ``"root_age"`` counts the updates since roots were last due, whether new ones were taken or
      the old ones kept (``"failures"`` counts the latter). ``"root_residual"`` is that of the roots
      in use.

      Where several states report one name, each has an entry of its own with the path to it
      (``"first/learning_rate"``). The plain name then holds one value: the learning rate of the
      stage in charge (in a blend the mean of both, weighted by the phase; 0 of a stage whose rate
      cannot be read), the sum of failures, and
      the largest root age, residual and step. For all other names it is the outermost value.

      A rate that exists in a closure only, as in ``optax.sgd(0.1)``, cannot be read.
      ``optax.inject_hyperparams(optax.sgd)(0.1)`` makes it visible.

    Cost: a walk over the state and a few scalar operations.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> tx = optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.adam)(1e-3))
      >>> report = optalr.metrics(tx.init(jnp.ones(2)))
      >>> round(float(report["learning_rate"]), 6), int(report["state_bytes"])
      (0.001, 44)
    """
    check_opt_state(opt_state)
    found: dict[str, list[tuple[str, Any]]] = {}
    for path, name, value in _reports(opt_state, ()):
        found.setdefault(name, []).append(("/".join((*path, name)), value))
    report: dict[str, Any] = {}
    for name, entries in found.items():
        values = [value for _, value in entries]
        report[name] = _COMBINED[name](values) if name in _COMBINED else values[0]
        if len(entries) > 1 and name != "step":
            for i, (label, value) in enumerate(entries):
                # The first without a path has the plain name already.
                if i or label != name:
                    report.setdefault(label if label not in report else f"{label}_{i}", value)
    rate = _rate_in_charge(opt_state)
    if rate is not None:
        report["learning_rate"] = rate
    report["state_bytes"] = np.float32(state_bytes(opt_state))
    return report


def state_bytes(opt_state: Any) -> int:
    """Return how many bytes the arrays of ``opt_state`` take.

    Choose it to compare optimizers before they are run, or to see what a release gives back.

    Args:
      opt_state: any pytree of arrays, or of their shapes (``jax.eval_shape(tx.init, params)``).

    Returns:
      The sum over the leaves of size times bytes per element.

    Cost: a walk over the state, on the host.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optalr
      >>> optalr.state_bytes(jax.eval_shape(optax.adam(1e-3).init, jnp.ones(100)))
      804
    """
    check_opt_state(opt_state)
    return sum(
        math.prod(np.shape(leaf)) * _dtype(leaf).itemsize for leaf in jax.tree.leaves(opt_state)
    )


def _dtype(leaf: Any) -> Any:
    """Return the dtype of an array, its shape, or a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _largest(values: list[Any]) -> jax.Array:
    """Return the largest entry; under vmap a value has one for each member."""
    return jnp.max(jnp.stack([jnp.max(jnp.asarray(value)) for value in values]))


def _reports(
    node: Any, path: tuple[str, ...], phase_is_known: bool = False
) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Yield ``(path, name, value)`` for all that is reported under ``node``.

    Args:
      node: a state, or a part of one.
      path: the names of stages and groups on the way to it.
      phase_is_known: whether the phase of the nearest ``two_stage`` was read where it is injected.
    """
    hyperparams = getattr(node, "hyperparams", None) if is_named_tuple(node) else None
    for name, value in (hyperparams or {}).items():
        if _is_number(value):
            yield path, name, value
    if is_named_tuple(node):
        for field in node._fields:
            name = field if field in REPORTED else FOREIGN.get(field)
            if name == "phase" and phase_is_known:
                continue
            if name and _is_number(value := getattr(node, field)):
                yield path, name, value
    for name, child in children(node):
        if hyperparams is not None and name in ("hyperparams", "hyperparams_states"):
            continue
        if isinstance(node, TwoStageState | Mapping):
            yield from _reports(child, (*path, name))
        else:
            yield from _reports(child, path, phase_is_known or "phase" in (hyperparams or {}))


def _rate_in_charge(node: Any) -> Any:
    """Return the learning rate last applied, or None where no state holds one."""
    if isinstance(node, TwoStageState):
        first, second = _rate_in_charge(node.first), _rate_in_charge(node.second)
        if first is None and second is None:
            return None
        first, second = (0.0 if rate is None else rate for rate in (first, second))
        share = jnp.where((node.phase > 0) & (node.phase < 1), node.phase, 0.5)
        blend = (1 - share) * first + share * second
        return jnp.where(node.phase <= 0, first, jnp.where(node.phase >= 1, second, blend))
    if injects(node, "learning_rate"):
        return node.hyperparams["learning_rate"]
    for field in ("learning_rate", "estim_lr"):
        if is_named_tuple(node) and field in node._fields and _is_number(getattr(node, field)):
            return getattr(node, field)
    rates = (_rate_in_charge(child) for _, child in children(node))
    return next((rate for rate in rates if rate is not None), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or hasattr(value, "dtype")
