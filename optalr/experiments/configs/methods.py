"""From a method's name and hyperparameters to an optax transformation.

A name is looked up in optalr, then in optax, then in ``optax.contrib``. A name with a dot,
``paper.tso_alra``, is one of ``optalr.paper``.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optalr
from optalr.experiments.configs.calling import accepted, call, choose
from optalr.experiments.configs.config import Config, TrainConfig
from optalr.experiments.configs.rates import Schedule, build_schedule
from optalr.experiments.errors import ExperimentError, suggest

# Optalr's recipes, which manage their learning rate themselves.
RECIPES = (
    "classical",
    "edf",
    "learned_rate_sgd",
    "learned_rate_then",
    "lipschitz_adam",
    "lipschitz_sgd",
    "swats",
    "tso_alra",
    "untuned",
    *(f"paper.{name}" for name in optalr.paper.__all__),
)
# Those of them that read `validation_value_fn` without being told.
_PROBING = ("untuned",)
PHASES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "switch_at": optalr.switch_at,
        "switch_on_plateau": optalr.switch_on_plateau,
        "blend_between": optalr.blend_between,
    }
)
# Public callables of optax that take a learning rate but are no optimizers.
_NOT_OPTIMIZERS = ("inject_hyperparams", "scale_by_learning_rate")


def method_names() -> tuple[str, ...]:
    """Return every name that ``method.name`` can take, ``scale_by_*`` excepted."""
    baselines = [name for name in dir(optax) if _is_optimizer(optax, name)]
    contributed = [name for name in dir(optax.contrib) if _is_optimizer(optax.contrib, name)]
    return tuple(dict.fromkeys([*RECIPES, *baselines, *contributed]))


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
      given: arguments that follow from the data (``num_classes``, ``loss``). Methods of optalr that
        take them get them, unless the config sets them.
      learning_rate: replaces the config's, and may be traced (a sweep under ``vmap``).

    Raises:
      ExperimentError: an unknown name or argument.
    """
    number = config.method.learning_rate if learning_rate is None else learning_rate
    schedule = build_schedule(
        config.schedule, number, steps_per_epoch=steps_per_epoch, total_steps=total_steps
    )
    # A method of optalr gets a plain number as it is, which can still be injected or traced.
    rate = number if config.schedule.name == "constant" else schedule
    options = _in_steps(config.method.options, steps_per_epoch, section="method")
    given = {"total_steps": total_steps, **(given or {})}
    given = {key: value for key, value in given.items() if key not in options}
    factory, origin = find_method(config.method.name)
    phase = _build_phase(config, factory, steps_per_epoch) if config.phase.name else None
    if phase is not None:
        given["phase"] = phase
    if "second" in accepted(factory):
        given["second"], _ = _second_stage(config.phase.options, learning_rate=rate)
    if "learning_rate" not in accepted(factory):
        method = _build_without_rate(factory, options, schedule=schedule, given=given)
    elif origin == "optalr":
        method = call(factory, options, section="method", learning_rate=rate, **given)
    else:
        method = call(_injected(factory), options, section="method", learning_rate=schedule)
    method = optax.with_extra_args_support(method)
    if phase is not None and "phase" not in accepted(factory):
        method = optalr.two_stage(method, _second_stage(config.phase.options)[1], phase)
    before = _on_the_gradient(config.train)
    return optax.chain(*before, method) if before else method


def probes_validation(config: Config) -> bool:
    """Return whether the config's method probes the loss of validation examples."""
    method = config.method
    return method.name in _PROBING or "validation_value_fn" in method.options.values()


def measures_all(config: Config) -> bool:
    """Return whether the config's method is measured on whole batches, as its paper has it."""
    return config.method.name.startswith("paper.")


def keeps_parts(config: Config) -> bool:
    """Return whether each device of a mesh keeps a part of the method's factors."""
    return bool(dict(config.method.options.get("options") or {}).get("sharded_factors"))


def find_method(name: str) -> tuple[Callable[..., Any], str]:
    """Return the factory called ``name`` and the package it comes from.

    Raises:
      ExperimentError: no such optimizer.
    """
    if name in RECIPES:
        return attrgetter(name)(optalr), "optalr"
    scales = name.startswith("scale_by_") and name not in _NOT_OPTIMIZERS
    for module, origin in ((optalr, "optalr"), (optax, "optax"), (optax.contrib, "optax")):
        factory = getattr(module, name, None)
        if callable(factory) and (scales or _is_optimizer(module, name)):
            return factory, origin
    raise ExperimentError(f"unknown method.name {name!r}: {suggest(name, method_names())}")


def _build_phase(config: Config, factory: Callable[..., Any], steps_per_epoch: int) -> Any:
    """Return the phase scheduler that ``config`` names."""
    scheduler = choose(PHASES, config.phase.name, key="phase.name")
    options = _in_steps(config.phase.options, steps_per_epoch, section="phase")
    second = options.pop("second", None)
    phase = call(scheduler, options, section="phase")
    if second is None and "phase" not in accepted(factory):
        raise ExperimentError(
            f"method {config.method.name!r} has no phases: remove the [phase] section, take a "
            "two-stage method such as tso_alra, or say in [phase.second] what follows."
        )
    return phase


def _second_stage(
    options: Mapping[str, Any], **given: Any
) -> tuple[Callable[..., Any], optax.GradientTransformation]:
    """Return what ``[phase.second]`` names, as a function of its rate and as it is built.

    Args:
      options: the ``[phase]`` section's keys.
      **given: a rate, where the section need not say one.
    """
    factory, own = _named_section(
        options.get("second"),
        "phase.second must be a section that names what follows the first stage, for example "
        "name = 'sgd' and learning_rate = 0.1",
    )
    built = call(_injected(factory), own, section="phase.second", **given)
    return partial(factory, **own), built


def _build_without_rate(
    factory: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    schedule: Schedule,
    given: Mapping[str, Any],
) -> optax.GradientTransformation:
    """Call a recipe that sets its own rate, or chain a length after a direction."""
    if not factory.__name__.startswith("scale_by_"):
        return call(factory, options, section="method", **given)
    own = {key: value for key, value in options.items() if key != "length"}
    direction = call(factory, own, section="method", **given)
    if "length" in options:
        return optax.chain(direction, _build_length(options["length"]))
    scale = optax.inject_hyperparams(optax.scale_by_learning_rate, hyperparam_dtype=jnp.float32)
    return optax.chain(direction, scale(learning_rate=schedule))


def _injected(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``factory`` with its rate kept in the state, where ``optalr.metrics`` finds it."""
    # Only the rate is injected. The other numbers stay constants, which compile to less code.
    fixed = tuple(name for name in accepted(factory) if name != "learning_rate")
    injected = optax.inject_hyperparams(factory, static_args=fixed, hyperparam_dtype=jnp.float32)
    # `call` checks the config's keys against these.
    injected.__signature__ = inspect.signature(factory)  # type: ignore[attr-defined]
    injected.__name__ = factory.__name__
    return injected


def _build_length(section: Any) -> optax.GradientTransformation:
    """Return what ``[method.length]`` names, in place of the learning rate."""
    factory, options = _named_section(
        section,
        "method.length must be a section that names what sets the length of a step, for example "
        "name = 'scale_by_learned_rate'",
    )
    return call(factory, options, section="method.length")


def _named_section(section: Any, wanted: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the factory that a section names, and the section's other keys.

    Raises:
      ExperimentError: it names none; ``wanted`` says what it must be.
    """
    if not isinstance(section, Mapping) or "name" not in section:
        raise ExperimentError(f"{wanted}, got {section!r}.")
    factory, _ = find_method(section["name"])
    return factory, {key: value for key, value in section.items() if key != "name"}


def _on_the_gradient(config: TrainConfig) -> list[optax.GradientTransformation]:
    """Return what changes the gradient before the method sees it."""
    before = []
    if config.weight_decay:
        before.append(optax.add_decayed_weights(config.weight_decay, mask=_kernels))
    if config.clip_norm:
        before.append(optax.clip_by_global_norm(config.clip_norm))
    return before


def _in_steps(options: Mapping[str, Any], steps_per_epoch: int, *, section: str) -> dict[str, Any]:
    """Return ``options`` with every ``x_epochs`` as ``x``, in steps."""
    converted = {}
    for key, value in options.items():
        if not key.endswith("_epochs"):
            converted[key] = value
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ExperimentError(f"{section}.{key} must be a number of epochs, got {value!r}.")
        converted[key.removesuffix("_epochs")] = round(value * steps_per_epoch)
    return converted


def _is_optimizer(module: Any, name: str) -> bool:
    function = getattr(module, name, None)
    if name.startswith("_") or name in _NOT_OPTIMIZERS or not inspect.isfunction(function):
        return False
    return "learning_rate" in inspect.signature(function).parameters


def _kernels(params: Any) -> Any:
    """Return a mask of what weight decay applies to: every leaf with two axes or more."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
