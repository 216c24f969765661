"""The methods that are compared, each with as many settings to try: six times two.

Where a method has a decoupled decay, that is the second number: ``c``, the sum of rate times decay
over the run. Where it has a damping, that is. Adam has neither: its second number is b1. Prodigy
finds its rate itself, so the factor of its estimate takes the rate's place. ``untuned`` has nothing
to try; ``untuned_tuned`` spends the same budget on its scale and its damping.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
from optax import contrib

import optalr

from ..untuned_parts.methods import METHODS as FIRST
from ..untuned_parts.methods import RATES, SGD_RATES, Method, grid_of, matrices_of, schedule
from ..untuned_parts.running import Runner

KFAC_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
NEWTON_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
DECAYS = (0.0, 3.0)
MOMENTUM = 0.9


def _runner() -> type[Runner]:
    return Runner


@dataclasses.dataclass(frozen=True)
class Entry(Method):
    """A method with the environment that it runs in.

    Attributes:
      environment: of ``environments.ENVIRONMENTS``.
      runner: returns the class that trains with it: other than ``Runner`` where the method is no
        optax transformation. It imports the peer, which only its environment has.
    """

    environment: str = "optax"
    runner: Callable[[], type[Runner]] = _runner


def _decay(n: dict[str, Any], total: int) -> Any:
    # A cosine's rates add up to half of their number.
    return n["c"] / (n["rate"] * total / 2)


def _adamw(n: dict[str, Any], total: int) -> optax.GradientTransformation:
    decay = _decay(n, total)
    return optax.adamw(schedule(n["rate"], total), weight_decay=decay, mask=matrices_of)


def _muon(n: dict[str, Any], total: int) -> optax.GradientTransformation:
    def view(p: jax.Array) -> Any:
        # Convolutions as matrices of all axes but the last.
        return None if p.ndim < 2 else contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), -1)

    return contrib.muon(
        schedule(n["rate"], total),
        weight_decay=_decay(n, total),
        weight_decay_mask=matrices_of,
        adam_learning_rate=schedule(0.15 * n["rate"], total),
        muon_weight_dimension_numbers=lambda params: jax.tree.map(view, params),
    )


def _schedule_free(n: dict[str, Any], total: int) -> optax.GradientTransformation:
    # Its rate stays, so the rates add up to all of their number.
    decay = _decay(n, 2 * total)
    return contrib.schedule_free_adamw(
        n["rate"], warmup_steps=max(1, total // 20), weight_decay=decay
    )


def _prodigy(n: dict[str, Any], total: int) -> optax.GradientTransformation:
    return contrib.prodigy(
        schedule(1.0, total),
        estim_lr_coef=n["factor"],
        weight_decay=n["decay"],
        safeguard_warmup=True,
    )


def _untuned_tuned(n: dict[str, Any], total: int) -> optax.GradientTransformation:
    return optalr.untuned(total, scale=n["scale"], damping=n["damping"])


def _tso_alra(n: dict[str, Any], total: int) -> optax.GradientTransformation:
    return optalr.tso_alra(
        schedule(n["rate"], total), switch_at=7 * total // 10, weight_decay=_decay(n, total)
    )


def _psgd(n: dict[str, Any], total: int) -> optax.GradientTransformation:
    from psgd_jax.kron import scale_by_kron

    # What its own kron chains, but a decay that may be traced.
    return optax.chain(
        scale_by_kron(),
        optax.add_decayed_weights(_decay(n, total), matrices_of),
        optax.scale_by_learning_rate(schedule(n["rate"], total)),
    )


def _momentum(n: dict[str, Any], total: int) -> optax.GradientTransformation:
    """Return what follows a direction that a peer has made."""
    rate = schedule(n["rate"], total)
    return optax.chain(optax.trace(MOMENTUM), optax.scale_by_learning_rate(rate))


def _no_chain(n: dict[str, Any], total: int) -> optax.GradientTransformation:
    raise NotImplementedError("this method is no optax transformation: its runner makes the steps")


def _kfac() -> type[Runner]:
    from .kfac import Own

    return Own


def _kfac_root() -> type[Runner]:
    from .kfac import Root

    return Root


def _somax() -> type[Runner]:
    from .gauss_newton import GaussNewton

    return GaussNewton


def _entries() -> Iterator[Entry]:
    yield Entry(
        "untuned",
        "optalr.untuned, nothing tuned",
        FIRST["untuned"].build,
        reads_signals=True,
        reads_validation=True,
    )
    yield Entry(
        "untuned_tuned",
        "optalr.untuned, its scale and damping",
        _untuned_tuned,
        grid_of(scale=(0.1, 0.3, 0.6, 1.0, 2.0, 4.0), damping=(0.03, 0.1)),
        reads_signals=True,
        reads_validation=True,
    )
    yield Entry(
        "tso_alra",
        "optalr.tso_alra, SGD after 7/10 of the run",
        _tso_alra,
        grid_of(rate=SGD_RATES, c=DECAYS),
        reads_signals=True,
    )
    yield Entry("adam", "Adam", FIRST["adam"].build, FIRST["adam"].grid)
    yield Entry("adamw", "AdamW", _adamw, grid_of(rate=RATES, c=(1.0, 9.0)))
    yield Entry("muon", "optax's muon", _muon, grid_of(rate=SGD_RATES, c=DECAYS))
    yield Entry(
        "schedule_free",
        "optax's schedule-free AdamW",
        _schedule_free,
        grid_of(rate=RATES, c=DECAYS),
        shown=contrib.schedule_free_eval_params,
    )
    yield Entry("prodigy", "optax's Prodigy", _prodigy, grid_of(factor=FACTORS, decay=DECAYS))
    yield Entry(
        "psgd_kron", "psgd-jax's kron", _psgd, grid_of(rate=RATES, c=DECAYS), environment="psgd"
    )
    kfac = {"environment": "kfac", "grid": grid_of(rate=KFAC_RATES, damping=(1e-2, 1.0))}
    yield Entry("kfac", "kfac-jax's own optimizer", _no_chain, runner=_kfac, **kfac)
    yield Entry("kfac_root", "kfac-jax in optax, square root", _momentum, runner=_kfac_root, **kfac)
    yield Entry(
        "somax_sgn",
        "python-somax's sgn: Gauss-Newton by CG",
        _no_chain,
        grid_of(rate=NEWTON_RATES, damping=(1e-2, 1.0)),
        environment="somax",
        runner=_somax,
    )


METHODS = {entry.name: entry for entry in _entries()}
