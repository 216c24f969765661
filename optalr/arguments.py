"""Checks that refuse bad arguments at construction, all with the same form of message.

Hyperparameters may be traced: ``optax.inject_hyperparams`` makes arrays of them inside a jitted
step. A tracer has no value to check. Every check here therefore judges concrete numbers and lets
tracers pass.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def is_concrete(value: Any) -> bool:
    """Return whether ``value`` is a number that can be read, not a tracer or a schedule."""
    return not isinstance(value, jax.core.Tracer) and not callable(value)


def shown(value: Any) -> str:
    """Return how a message shows a value: as it is written, or by its kind where that is long.

    Parameters that stand in the place of a function would fill pages.
    """
    text = repr(value)
    if len(text) <= 100 and "\n" not in text:
        return text
    shape = f" of shape {value.shape}" if hasattr(value, "shape") else ""
    return f"a value of the type {type(value).__name__}{shape}"


def is_python_zero(value: Any) -> bool:
    """Return whether ``value`` is the Python number 0, for which a part may be left out.

    A state's structure must not depend on a number that ``optax.inject_hyperparams`` makes an array
    of: it is known at ``init`` and traced at ``update``.
    """
    return isinstance(value, int | float) and value == 0


def check_interval(
    name: str,
    value: Any,
    low: float = -np.inf,
    high: float = np.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    remedy: str = "",
) -> None:
    """Raise ``ValueError`` unless a concrete ``value`` lies between ``low`` and ``high``.

    Args:
      name: the argument's name, as the caller wrote it.
      value: a number, a 0-d array, a tracer or a schedule; the last two always pass.
      low: lower end of the interval.
      high: upper end of the interval.
      open_low: whether ``low`` itself is refused.
      open_high: whether ``high`` itself is refused.
      remedy: a sentence on what to pass instead.

    Raises:
      TypeError: ``value`` is not a number.
      ValueError: ``value`` lies outside the interval or is NaN.
    """
    if not is_concrete(value):
        return
    try:
        number = _as_float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {shown(value)}. {remedy}".rstrip()) from None
    above = number > low if open_low else number >= low
    below = number < high if open_high else number <= high
    if not (above and below):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name} must lie in {interval}, got {shown(value)}. {remedy}".rstrip())


def _as_float(value: Any) -> float:
    """Return a number as a float. Python would also read a text: "1e-2" is a slip, not a rate."""
    if isinstance(value, str | bytes):
        raise TypeError
    return float(value)


def check_count(name: str, value: Any, low: int = 1, *, remedy: str = "") -> None:
    """Raise unless a concrete ``value`` is a whole number of at least ``low``.

    Args:
      name: the argument's name, as the caller wrote it.
      value: a number, a 0-d array, a tracer or a schedule; the last two always pass.
      low: the smallest number allowed.
      remedy: a sentence on what to pass instead.

    Raises:
      TypeError: ``value`` is not a whole number; a bool is none.
      ValueError: ``value`` is below ``low``.
    """
    if not is_concrete(value):
        return
    try:
        whole = _as_float(value) == int(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(
            f"{name} must be a whole number, got {shown(value)}. {remedy}".rstrip()
        ) from None
    if not whole or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {shown(value)}. {remedy}".rstrip())
    if int(value) < low:
        raise ValueError(f"{name} must be at least {low}, got {shown(value)}. {remedy}".rstrip())


def check_known(name: str, value: Any) -> None:
    """Raise ``TypeError`` if ``value`` is traced: it decides shapes or the structure of a state."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} must be a known number, because shapes depend on it, got a traced one. Under "
            f"optax.inject_hyperparams pass static_args=({name!r},)."
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {shown(value)}.")


def check_transformation(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise ``TypeError`` unless ``value`` has the methods of a gradient transformation.

    Args:
      name: the argument's name, as the caller wrote it.
      value: what was passed.
      optional: whether None is allowed.
    """
    if optional and value is None:
        return
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation{' or None' if optional else ''}, got "
            f"{shown(value)}. Build it first, for instance optax.sgd(0.1)."
        )


def check_kind(name: str, value: Any, kind: Any, *, remedy: str = "") -> None:
    """Raise ``TypeError`` unless ``value`` is a ``kind`` (a type, or several), or None."""
    if value is not None and not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        listed = " or ".join(each.__name__ for each in kinds)
        raise TypeError(f"{name} must be a {listed} or None, got {shown(value)}. {remedy}".rstrip())


def check_flag(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a bool; an array may be a traced one."""
    if not isinstance(value, bool | np.bool_ | jax.Array | np.ndarray):
        raise TypeError(f"{name} must be True or False, got {shown(value)}.")


def check_function(name: str, value: Any, *, remedy: str = "") -> None:
    """Raise ``TypeError`` unless ``value`` can be called, or is None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None, got {shown(value)}. {remedy}".rstrip())


def check_mask(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a tree of bools, a function to one, or None."""
    flags = bool | np.bool_ | jax.Array | np.ndarray
    if not callable(value) and not all(isinstance(x, flags) for x in jax.tree.leaves(value)):
        raise TypeError(f"{name} must be a tree of bools, a function or None, got {shown(value)}.")


def check_numbers(name: str, tree: Any, *, floating: bool = False) -> None:
    """Raise unless every leaf of a pytree is an array of numbers, or a number.

    Args:
      name: the argument's name, as the caller wrote it.
      tree: a pytree; None and what is masked have no leaves.
      floating: whether the numbers must be real and of floating point.

    Raises:
      TypeError: a leaf is something else, such as a random key; the message names it.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        is_number = isinstance(leaf, float | int | complex)
        dtype = jnp.result_type(leaf) if is_number else getattr(leaf, "dtype", type(leaf))
        kinds = (jnp.floating,) if floating else (jnp.number, jnp.bool_)
        if isinstance(dtype, type) or not any(jnp.issubdtype(dtype, kind) for kind in kinds):
            raise TypeError(
                f"{name} must be a pytree of floating arrays, but "
                f"{jax.tree_util.keystr(path) or name} is {dtype}. {_remedy_of(tree)}"
            )


def _remedy_of(tree: Any) -> str:
    """Return what to do with a tree that holds more than is trained, by the framework it is of."""
    # By their modules' names, so that nothing here imports a framework.
    origins = [kind.__module__ for kind in type(tree).__mro__]
    for origin, remedy in _REMEDIES.items():
        if any(f"{each}.".startswith(f"{origin}.") for each in origins):
            return remedy
    return (
        "Keep what is not trained (counters, keys, functions) out of params and pass it as a "
        "further argument of loss_fn."
    )


_REMEDIES = {
    "equinox": (
        "Pass the arrays of the module alone: params, static = eqx.partition(model, "
        "eqx.is_inexact_array), and eqx.combine(params, static) within loss_fn."
    ),
    "flax.nnx": (
        "For an nnx module take value_grad_and_extras and Optimizer of optalr.adapters.nnx, which "
        "keep what is not trained apart."
    ),
}


def from_fields(name: str, given: Any, kind: type) -> Any:
    """Return a ``kind`` if ``given`` is a mapping of its fields, else ``given`` unchanged.

    Args:
      name: the argument, as the user wrote it.
      given: what was passed.
      kind: a dataclass or a NamedTuple whose fields all have defaults.

    Returns:
      A ``kind``, or what was given.

    Raises:
      TypeError: the mapping names a field that ``kind`` does not have.
    """
    if not isinstance(given, Mapping):
        return given
    defaults: dict[str, Any] = getattr(kind, "_field_defaults", {})
    if dataclasses.is_dataclass(kind):
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for key in given:
        if key not in defaults:
            raise TypeError(f"{name} has no field {key!r}; its fields are {', '.join(defaults)}.")
    # TOML has no None: in a config, False stands for it in a field that is not a bool.
    off = {key for key, value in given.items() if value is False}
    switches = {key for key, default in defaults.items() if isinstance(default, bool)}
    return kind(**{k: None if k in off - switches else v for k, v in given.items()})


def require_extra(extras: dict[str, Any], name: str, method: str, remedy: str = "") -> Any:
    """Return ``extras[name]``, or raise a ``TypeError`` that names the call that supplies it.

    Args:
      extras: the keyword arguments that reached ``update``.
      name: the extra that is needed, one of those of ``value_grad_and_extras``.
      method: the transformation that needs it, as the user wrote it.
      remedy: replaces the sentence on how to supply the extra.

    Raises:
      TypeError: the extra is missing or None, or is no function where its name says that it is one.
    """
    value = extras.get(name)
    if value is not None:
        if name.endswith("_fn") and not callable(value):
            raise TypeError(
                f"the extra argument {name!r} must be a function of the parameters, got "
                f"{shown(value)}. Pass jax.tree_util.Partial(loss_fn, x=x, y=y), not its value."
            )
        return value
    if isinstance(extras.get(_UNPACKED), Mapping):
        raise TypeError(
            f"{method} needs the extra argument {name!r}, and update got a dictionary called "
            "'extras'. Write tx.update(grads, opt_state, params, **extras)."
        )
    message = f"{method} needs the extra argument {name!r}, which update did not get. "
    message += remedy or SUPPLY.format(loss="loss_fn")
    # With some extras there, somebody has passed them all the way.
    raise TypeError(f"{message} {_PAGE if extras else _DROPPED}")


# What supplies most extras; a remedy that says more begins with it.
SUPPLY = (
    "Call value, grads, extras = optalr.value_grad_and_extras({loss})(params, ...) and pass "
    "**extras to update."
)
_PAGE = "See docs/wrappers.md."
# The name under which somebody passes all of them as one.
_UNPACKED = "extras"
_DROPPED = (
    "If you pass extras, a wrapper drops them. optalr.multi_steps, optalr.pass_extras, "
    "optalr.adapters.linen.TrainState and update(model, grads, **extras) of nnx hand them on. "
    f"{_PAGE}"
)
