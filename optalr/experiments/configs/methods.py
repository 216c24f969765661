"""From a method's name and hyperparameters to an optax transformation.

A name is looked up in optalr, then in optax, then in ``optax.contrib``.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optalr
from optalr.experiments.configs.calling import accepted, call
from optalr.experiments.configs.config import Config, PhaseConfig
from optalr.experiments.configs.rates import Schedule, build_schedule
from optalr.experiments.errors import ExperimentError, suggest

# Optalr's recipes, which manage their learning rate themselves.
RECIPES = (
    "classical",
    "edf",
    "learned_rate_sgd",
    "lipschitz_adam",
    "lipschitz_sgd",
    "swats",
    "tso_alra",
)
# Public callables of optax that take a learning rate but are no optimizers.
_NOT_OPTIMIZERS = ("inject_hyperparams", "scale_by_learning_rate")


def method_names() -> tuple[str, ...]:
    """Return every name that ``method.name`` can take, ``scale_by_*`` excepted."""
    recipes = [name for name in RECIPES if hasattr(optalr, name)]
    baselines = [name for name in dir(optax) if _is_optimizer(optax, name)]
    contributed = [name for name in dir(optax.contrib) if _is_optimizer(optax.contrib, name)]
    return tuple(dict.fromkeys([*recipes, *baselines, *contributed]))


def build_method(
    config: Config,
    *,
    steps_per_epoch: int,
    total_steps: int,
    given: Mapping[str, Any] | None = None,
    learning_rate: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation that ``config`` describes.

    Weight decay joins the gradient first (so it is an L2 penalty), then the clip, then the method.

    Args:
      config: the experiment; its method, schedule, phase and train sections are read.
      steps_per_epoch: turns epochs into steps.
      total_steps: length of the schedule.
      given: arguments that follow from data and model (``num_classes``, ``loss``, ``layout``);
        handed to methods of optalr that take them, unless the config sets them.
      learning_rate: replaces the config's, and may be traced (a sweep under ``vmap``).

    Raises:
      ExperimentError: an unknown name or argument.
    """
    rate = config.method.learning_rate if learning_rate is None else learning_rate
    schedule = build_schedule(
        config.schedule, rate, steps_per_epoch=steps_per_epoch, total_steps=total_steps
    )
    options = _in_steps(config.method.options, steps_per_epoch)
    given = {k: v for k, v in (given or {}).items() if k not in options}
    if config.phase.name:
        given["phase"] = build_phase(config.phase, steps_per_epoch=steps_per_epoch)
    factory, origin = find_method(config.method.name)
    if config.phase.name and "phase" not in accepted(factory):
        raise ExperimentError(
            f"method {config.method.name!r} has no phases: remove the [phase] section, or take a "
            "two-stage method such as tso_alra."
        )
    constant = config.schedule.name == "constant"
    method = _build(factory, origin, rate if constant else schedule, schedule, options, given)
    before = []
    if config.train.weight_decay:
        before.append(optax.add_decayed_weights(config.train.weight_decay, mask=_kernels))
    if config.train.clip_norm:
        before.append(optax.clip_by_global_norm(config.train.clip_norm))
    method = optax.with_extra_args_support(method)
    return optax.chain(*before, method) if before else method


def find_method(name: str) -> tuple[Callable[..., Any], str]:
    """Return the factory called ``name`` and the package it comes from.

    Raises:
      ExperimentError: no such optimizer.
    """
    places = ((optalr, "optalr"), (optax, "optax"), (optax.contrib, "optax"))
    for module, origin in places:
        scales = name.startswith("scale_by_") and name not in _NOT_OPTIMIZERS
        recipe = origin == "optalr" and name in RECIPES
        if callable(getattr(module, name, None)) and (
            scales or recipe or _is_optimizer(module, name)
        ):
            return getattr(module, name), origin
    raise ExperimentError(f"unknown method.name {name!r}: {suggest(name, method_names())}")


def build_phase(config: PhaseConfig, *, steps_per_epoch: int) -> Any:
    """Return the phase scheduler that ``config`` names.

    Raises:
      ExperimentError: no such scheduler.
    """
    names = [n for n in ("blend_between", "switch_at", "switch_on_plateau") if hasattr(optalr, n)]
    if config.name not in names:
        raise ExperimentError(f"unknown phase.name {config.name!r}: {suggest(config.name, names)}")
    options = _in_steps(config.options, steps_per_epoch)
    return call(getattr(optalr, config.name), options, section="phase")


def _build(
    factory: Callable[..., Any],
    origin: str,
    rate: Any,
    schedule: Schedule,
    options: Mapping[str, Any],
    given: Mapping[str, Any],
) -> optax.GradientTransformation:
    """Call ``factory`` with a learning rate where it takes one, or chain one after it."""
    if "learning_rate" not in accepted(factory):
        if not factory.__name__.startswith("scale_by_"):
            return call(factory, options, section="method", **given)
        own = {key: value for key, value in options.items() if key != "length"}
        direction = call(factory, own, section="method", **given)
        length = _build_length(options["length"]) if "length" in options else _scale_by(schedule)
        return optax.chain(direction, length)
    if origin == "optalr":
        return call(factory, options, section="method", learning_rate=rate, **given)
    # Only the rate is injected: it shows in the state, and the other numbers stay constants.
    fixed = tuple(name for name in accepted(factory) if name != "learning_rate")
    injected = optax.inject_hyperparams(factory, static_args=fixed, hyperparam_dtype=jnp.float32)
    injected.__signature__ = inspect.signature(factory)  # type: ignore[attr-defined]
    injected.__name__ = factory.__name__
    return call(injected, options, section="method", learning_rate=schedule)


def _build_length(section: Any) -> optax.GradientTransformation:
    """Return what ``[method.length]`` names, in place of the learning rate."""
    if not isinstance(section, Mapping) or "name" not in section:
        raise ExperimentError(
            "method.length must be a section that names what sets the length of a step, for "
            f"example name = 'scale_by_learned_rate', got {section!r}."
        )
    factory, _ = find_method(section["name"])
    options = {key: value for key, value in section.items() if key != "name"}
    return call(factory, options, section="method.length")


def _scale_by(schedule: Schedule) -> optax.GradientTransformation:
    make = optax.inject_hyperparams(optax.scale_by_learning_rate, hyperparam_dtype=jnp.float32)
    return make(learning_rate=schedule)


def _in_steps(options: Mapping[str, Any], steps_per_epoch: int) -> dict[str, Any]:
    """Return ``options`` with every ``x_epochs`` as ``x``, in steps."""
    converted = {}
    for key, value in options.items():
        if not key.endswith("_epochs"):
            converted[key] = value
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ExperimentError(f"'{key}' must be a number of epochs, got {value!r}.")
        converted[key.removesuffix("_epochs")] = round(value * steps_per_epoch)
    return converted


def _is_optimizer(module: Any, name: str) -> bool:
    function = getattr(module, name, None)
    if name.startswith("_") or name in _NOT_OPTIMIZERS or not inspect.isfunction(function):
        return False
    return "learning_rate" in inspect.signature(function).parameters


def _kernels(params: Any) -> Any:
    """Mark what weight decay applies to: everything with two axes or more."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
