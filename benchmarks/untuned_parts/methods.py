"""The methods that are compared: three that are tuned over a grid, and those that are not."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import optalr

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Momentum's rates act as if divided by 1 − m: the grid spans what plain SGD's would.
SGD_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)

# Parts are taken from the recipe that stands. What was added, and paid nothing, was added to the
# recipe as it was first, and is compared with that.
_WHOLE, _FIRST = "untuned", "untuned_first"
_FIRST_MOMENTUM = 0.9


def _params(state: Any, params: Any) -> Any:
    """Return the parameters that training moves."""
    del state
    return params


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
      name: as shown.
      about: what it is, in a few words.
      build: ``(numbers, total_steps)`` to a transformation; the numbers may be tracers.
      grid: the numbers tried; a single empty set for a method without tuning.
      reads_signals: whether it needs ``value_grad_and_extras``.
      reads_validation: whether it is given losses of the validation examples.
      shown: ``(state, params)`` to the parameters that are evaluated.
      ablation: whether it is the recipe without one of its parts.
      whole: what an ablation is compared with; empty for the recipe that is judged.
    """

    name: str
    about: str
    build: Callable[[dict[str, Any], int], optax.GradientTransformation]
    grid: tuple[dict[str, float], ...] = ({},)
    reads_signals: bool = False
    reads_validation: bool = False
    shown: Callable[[Any, Any], Any] = _params
    ablation: bool = False
    whole: str = ""

    @property
    def tuned(self) -> bool:
        """Whether numbers are chosen by the validation loss."""
        return len(self.grid) > 1


def schedule(rate: Any, total_steps: int) -> optax.Schedule:
    """Return a cosine that ends at zero, after a warm-up over the first fiftieth."""
    return cosine(rate, total_steps, warmup=max(1, total_steps // 50))


def cosine(rate: Any, total_steps: int, *, warmup: int) -> optax.Schedule:
    """Return ``rate`` times a linear warm-up and half a cosine; the rate may be a tracer."""

    def at(count: jax.Array) -> jax.Array:
        part = jnp.clip((count - warmup) / max(1, total_steps - warmup), 0, 1)
        return rate * jnp.minimum((count + 1) / warmup, (1 + jnp.cos(jnp.pi * part)) / 2)

    return at


def grid_of(**choices: tuple[float, ...]) -> tuple[dict[str, float], ...]:
    """Return every combination of some numbers' values."""
    return tuple(
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    )


def matrices_of(params: Any) -> Any:
    """Return which leaves have two or more axes: those that weight decay shrinks."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def _adam(n: dict[str, Any], total: int) -> optax.GradientTransformation:
    return optax.adam(schedule(n["rate"], total), b1=n["b1"])


def _adamw(n: dict[str, Any], total: int) -> optax.GradientTransformation:
    # The decay is given as c, the sum of rate times decay over the run: what a weight shrinks by.
    decay = n["c"] / (n["rate"] * total / 2)
    rate = schedule(n["rate"], total)
    return optax.adamw(rate, b1=n["b1"], weight_decay=decay, mask=matrices_of)


def _sgd(n: dict[str, Any], total: int) -> optax.GradientTransformation:
    return optax.sgd(schedule(n["rate"], total), momentum=n["momentum"])


def _fixed_adam(rate: float) -> Callable[..., optax.GradientTransformation]:
    return lambda _, total: optax.adam(schedule(rate, total))


def _adam_learned_decay(_: Any, total: int) -> optax.GradientTransformation:
    rate = 3e-3
    return optax.chain(
        optax.scale_by_adam(),
        optalr.add_learned_decay(2 / (rate * total), meta_rate=30 / total),
        optax.scale_by_learning_rate(schedule(rate, total)),
    )


def _schedule_free(_: Any, total: int) -> optax.GradientTransformation:
    return contrib.schedule_free_adamw(2.5e-3, warmup_steps=max(1, total // 20))


def _prodigy(_: Any, total: int) -> optax.GradientTransformation:
    return contrib.prodigy(schedule(1.0, total), safeguard_warmup=True)


def _muon(_: Any, total: int) -> optax.GradientTransformation:
    def matrices(params: Any) -> Any:
        # Convolutions as matrices of all axes but the last.
        def view(p: jax.Array) -> Any:
            if p.ndim < 2:
                return None
            return contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1)

        return jax.tree.map(view, params)

    return contrib.muon(
        schedule(2e-2, total),
        adam_learning_rate=schedule(3e-3, total),
        muon_weight_dimension_numbers=matrices,
    )


def _soap(_: Any, total: int) -> optax.GradientTransformation:
    options = optalr.KroneckerOptions(spectrum="measured", max_update=None)
    return optax.chain(
        optalr.scale_by_kronecker(statistics="gradient", update_every=10, options=options),
        optax.trace(0.9),
        optax.scale_by_learning_rate(schedule(3e-3, total)),
    )


def _untuned(_: Any, total: int) -> optax.GradientTransformation:
    return optalr.untuned(total)


def _with(**changes: Any) -> Callable[..., optax.GradientTransformation]:
    return lambda _, total: optalr.untuned(total, **changes)


def _first(total: int, **changes: Any) -> optax.GradientTransformationExtraArgs:
    return optalr.untuned(total, momentum=_FIRST_MOMENTUM, **changes)


def _open_ended(_: Any, total: int) -> optax.GradientTransformation:
    del total
    return optalr.untuned(None)


def _switched(_: Any, total: int) -> optax.GradientTransformation:
    at = 7 * total // 10
    rate = cosine(2e-2, total - at, warmup=1)
    sgd = optax.chain(optax.trace(0.9), optalr.scale_by_recorded_rate(rate))
    return optalr.two_stage(_first(total), sgd, optalr.switch_at(at))


class AverageState(NamedTuple):
    """The average of the iterates, with the structure of the parameters."""

    average: Any


def _averaged(_: Any, total: int) -> optax.GradientTransformation:
    weight = 1 / max(1, total // 20)

    def init(params: Any) -> AverageState:
        return AverageState(jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        del extras
        new = optax.apply_updates(params, updates)
        return updates, AverageState(optax.incremental_update(new, state.average, weight))

    link = optax.GradientTransformationExtraArgs(init, update)
    return optax.chain(_first(total), link)


class CurbState(NamedTuple):
    """The lowest validation loss so far, and what the update is multiplied by."""

    best: jax.Array
    factor: jax.Array


def _curbed(_: Any, total: int) -> optax.GradientTransformation:
    def init(params: Any) -> CurbState:
        del params
        return CurbState(jnp.float32(jnp.inf), jnp.float32(1))

    def update(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        del params
        value, is_new = extras["validation_value"]
        factor = jnp.where(is_new & (value > state.best), state.factor / 2, state.factor)
        best = jnp.where(is_new, jnp.minimum(value, state.best), state.best)
        return jax.tree.map(lambda u: u * factor, updates), CurbState(best, factor)

    link = optax.GradientTransformationExtraArgs(init, update)
    return optax.chain(_first(total), link)


def _vectors_by_adam(_: Any, total: int) -> optax.GradientTransformation:
    def label(params: Any) -> Any:
        return jax.tree.map(lambda p: "matrix" if p.ndim >= 2 else "vector", params)

    adam = optax.adam(schedule(3e-3, total))
    return optax.partition({"matrix": _first(total), "vector": adam}, label)


def _average(state: Any, params: Any) -> Any:
    del params
    return state[1].average


def _no_leaf(params: Any) -> Any:
    return jax.tree.map(lambda _: False, params)


def _recipe(name: str, about: str, build: Any = None, **more: Any) -> Method:
    """Return the recipe, or one that differs from it in one part."""
    given = {"reads_signals": True, "reads_validation": True, **more}
    return Method(name, about, build or _untuned, **given)


def _part(name: str, about: str, build: Any, **more: Any) -> Method:
    """Return the recipe without one part."""
    return _recipe(name, about, build, **{"ablation": True, "whole": _WHOLE, **more})


def _added(name: str, about: str, build: Any, **more: Any) -> Method:
    """Return the first recipe with one part more."""
    return _recipe(name, f"{about}, added", build, **{"ablation": True, "whole": _FIRST, **more})


METHODS = {
    method.name: method
    for method in (
        _recipe(_WHOLE, "optalr.untuned"),
        Method("adam", "Adam, 6 rates × 2 b1", _adam, grid_of(rate=RATES, b1=(0.9, 0.99))),
        Method(
            "adamw",
            "AdamW, 6 rates × 2 b1 × 4 decays",
            _adamw,
            grid_of(rate=RATES, b1=(0.9, 0.99), c=(0.3, 1.0, 3.0, 9.0)),
        ),
        Method(
            "sgd",
            "SGD, 6 rates × 2 momenta",
            _sgd,
            grid_of(rate=SGD_RATES, momentum=(0.9, 0.98)),
        ),
        Method("adam_1e-3", "Adam, 1e-3", _fixed_adam(1e-3)),
        Method("adam_3e-3", "Adam, 3e-3", _fixed_adam(3e-3)),
        Method(
            "adam_learned_decay",
            "Adam, 3e-3, with the learned decay",
            _adam_learned_decay,
            reads_validation=True,
        ),
        Method(
            "schedule_free",
            "schedule-free AdamW, 2.5e-3",
            _schedule_free,
            shown=contrib.schedule_free_eval_params,
        ),
        Method("prodigy", "Prodigy", _prodigy),
        Method("muon", "optax's muon, 2e-2", _muon),
        Method("soap", "SOAP-like: second moments in eigenbases, 3e-3", _soap, reads_signals=True),
        _part(_FIRST, "as it was first: momentum 0.9 for 0.7", _with(momentum=_FIRST_MOMENTUM)),
        _part(
            "untuned_no_validation",
            "without validation losses: the decay stays 3/Σ η",
            _with(),
            reads_validation=False,
        ),
        _part("untuned_no_decay", "without decay", _with(decay_mask=_no_leaf)),
        _part("untuned_no_damping", "damping 1e-3 for 0.1", _with(damping=1e-3)),
        _part("untuned_no_momentum", "without momentum", _with(momentum=0.0)),
        _part("untuned_open_end", "without a known end", _open_ended),
        _added(
            "untuned_measured",
            "second moments measured in the eigenbases",
            lambda _, total: _first(total, options={"spectrum": "measured"}),
        ),
        _added(
            "untuned_curbed",
            "the rate halved whenever the validation loss has not fallen",
            _curbed,
        ),
        _added(
            "untuned_vectors",
            "Adam at 3e-3 for leaves of one axis",
            _vectors_by_adam,
        ),
        _added("untuned_switched", "SGD after 7/10 of the run", _switched),
        _added(
            "untuned_averaged",
            "average over the last twentieth",
            _averaged,
            shown=_average,
        ),
    )
}
