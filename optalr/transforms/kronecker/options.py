"""Options of the Kronecker form, and the clock that says when it measures and takes roots."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import (
    check_choice,
    check_count,
    check_interval,
    from_fields,
    is_concrete,
)
from optalr.linalg.roots.inverse_root import METHODS
from optalr.signals.storage import FactorStorage

# How many measurements a refresh interval holds where signals_every is not given.
_MEASUREMENTS_PER_ROOT = 10
# An interval may not exceed this part of the steps taken: roots age fast in early training.
_GROWTH = 2


@dataclasses.dataclass(frozen=True)
class KroneckerOptions(FactorStorage):
    """Everything about ``scale_by_kronecker`` that its defaults usually settle.

    Attributes:
      warmup: samples a dimension that every factor must have seen before the first roots, >= 0.
      min_batches: batches that must have been measured before the first roots, >= 1.
      max_update: the RMS change that one update times a learning rate of 1 may make to the outputs
        of a layer, > 0; None for no bound.
      damping_form: ``"relative"`` to the mean eigenvalue of each factor (of their product, with
        another spectrum than ``"factored"``), ``"absolute"`` (the paper's ``(Λ + εI)``), or
        ``"balanced"``: √λ split between the factors by π = √(mean eigenvalue of A / mean eigenvalue
        of B) (Martens & Grosse 2015, section 6.3).
      spectrum: ``"factored"`` damps and roots each factor alone; ``"exact"`` keeps eigenbases and
        applies ``(λ_A λ_B + λ)^p``; ``"measured"`` replaces ``λ_A λ_B`` by a moving average of the
        squared gradient in the eigenbasis (George et al. 2018, EKFAC; Vyas et al. 2024, SOAP).
      graft: a transformation whose norm, leaf by leaf, the update takes, such as
        ``optax.identity()`` (SGD), ``optax.scale_by_rms()`` or ``optax.scale_by_adam()``.
      block_size: sides longer than this get block-diagonal factors of at most this size.
      max_factor_size: sides longer than this, and not blocked, keep only their factor's diagonal.
      joint_bias: treat a bias as one more row of its kernel; needs a layout.
      root_method: ``method`` of ``optalr.linalg.inverse_root``; the spectra ``"exact"`` and
        ``"measured"`` take no roots but eigenbases, and heed only ``"eigenbasis"``. With that every
        spectrum refreshes the last basis by one QR step, and decomposes anew (all sides of that
        size) only at the start and where the basis has fallen too far behind; a factored spectrum
        then keeps its bases beside the roots, ``m² + n²`` numbers more a kernel.
    """

    warmup: float = 2.0
    min_batches: int = 10
    max_update: float | None = 0.5
    damping_form: str = "relative"
    graft: optax.GradientTransformation | None = None

    def __post_init__(self):
        check_interval("warmup", self.warmup, 0)
        check_count("min_batches", self.min_batches)
        if self.max_update is not None:
            check_interval("max_update", self.max_update, 0, open_low=True)
        methods = hasattr(self.graft, "init") and hasattr(self.graft, "update")
        if self.graft is not None and not methods:
            raise TypeError(
                "graft must be an optax.GradientTransformation such as optax.scale_by_adam(), or "
                f"None, got {self.graft!r}."
            )
        check_choice("damping_form", self.damping_form, ("relative", "absolute", "balanced"))
        check_choice("spectrum", self.spectrum, ("factored", "exact", "measured"))
        check_choice("root_method", self.root_method, METHODS)
        if self.spectrum != "factored" and self.damping_form == "balanced":
            raise ValueError(
                "damping_form='balanced' splits the damping between two factors, which "
                f"spectrum={self.spectrum!r} need not do. Pass damping_form='absolute'."
            )
        if self.block_size is not None:
            check_count("block_size", self.block_size, 2)
        check_count("max_factor_size", self.max_factor_size)


def resolve_options(given: KroneckerOptions | Mapping[str, Any] | None) -> KroneckerOptions:
    """Return the options that ``given`` stands for."""
    given = from_fields("options", given, KroneckerOptions)
    if given is None:
        return KroneckerOptions()
    if not isinstance(given, KroneckerOptions):
        raise TypeError(
            f"options must be a KroneckerOptions or a mapping of its fields, got {given!r}."
        )
    return given


def check_root_method(options: KroneckerOptions, power: Any, statistics: str) -> None:
    """Raise unless the root method can take the roots that ``power`` asks for."""
    method = options.root_method
    if options.spectrum != "factored" or method not in ("coupled_newton", "cholesky_polar"):
        return
    remedy = "Pass another power, or options=KroneckerOptions(root_method='auto')."
    if not is_concrete(power):
        raise ValueError(
            f"power must be a known number, not a traced one, with root_method={method!r}. {remedy}"
        )
    halves = 2 if statistics == "gradient" else 1
    root = halves / -float(power) if float(power) else 1.0
    wanted = "1, 2, 4, 8, ..." if method == "cholesky_polar" else "whole"
    if not root.is_integer() or (method == "cholesky_polar" and int(root) & (int(root) - 1)):
        raise ValueError(
            f"power={power!r} with root_method={method!r} and statistics={statistics!r} asks for "
            f"roots of order -{halves}/power = {root:.4g}, which must be {wanted}. {remedy}"
        )


@dataclasses.dataclass(frozen=True)
class Clock:
    """When to measure and when to take roots. Numbers may be traced."""

    update_every: Any
    signals_every: Any
    decay: Any
    options: KroneckerOptions

    def _interval(self, count: jax.Array) -> jax.Array:
        """Updates between two roots: half the updates so far, up to ``update_every``."""
        return jnp.clip(count // _GROWTH, 1, jnp.asarray(self.update_every, jnp.int32))

    def measures(self, signal_age: jax.Array, count: jax.Array) -> jax.Array:
        """Tell whether the update after ``count`` others measures."""
        longest = self.signals_every
        if longest is None:
            longest = jnp.asarray(self.update_every, jnp.int32) // _MEASUREMENTS_PER_ROOT
        spacing = self._interval(count) // _MEASUREMENTS_PER_ROOT
        steady = count // _GROWTH >= jnp.asarray(self.update_every, jnp.int32)
        longest = jnp.asarray(longest, jnp.int32)
        spacing = jnp.where(steady, longest, jnp.minimum(spacing, longest))
        return signal_age >= jnp.maximum(spacing, 1)

    def refreshes(self, state: Any) -> jax.Array:
        """Tell whether this update takes roots."""
        longest_memory = 1 / (1 - jnp.asarray(self.decay, jnp.float32))
        seen = state.measurements.astype(jnp.float32)
        enough = (state.samples >= self.options.warmup) | (seen >= 2 * longest_memory)
        trusted = enough & (state.measurements >= self.options.min_batches)
        due = (state.num_refreshes == 0) | (state.root_age >= self._interval(state.count))
        return trusted & due
