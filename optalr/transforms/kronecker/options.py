"""Options of the Kronecker form."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from optalr.arguments import (
    check_choice,
    check_count,
    check_interval,
    check_kind,
    from_fields,
    is_concrete,
)
from optalr.linalg.roots.methods import METHODS
from optalr.signals.coverage import Coverage
from optalr.signals.moments import AUTO, FactorStorage
from optalr.transforms.kronecker.rule import DAMPING_FORMS
from optalr.transforms.kronecker.spectrum import SPECTRA


@dataclasses.dataclass(frozen=True)
class KroneckerOptions(FactorStorage):
    """The less common settings of ``scale_by_kronecker`` and ``tso_alra``.

    Choose your own where the factors of a layer are too large to be kept whole (``block_size``,
    ``max_factor_size``), or where another damping or spectrum is wanted. The warm-up and the
    bound, which the paper does not have, can be switched off here too.

    Attributes:
      warmup: samples per dimension that every factor must have seen before the first roots, >= 0.
      min_batches: batches that must have been measured before the first roots, >= 1.
      max_update: the RMS change that one update times a learning rate of 1 may make to the outputs
        of a layer, > 0; None for no bound.
      damping_form: ``"relative"`` to the mean eigenvalue of each factor (of their product, with
        another spectrum than ``"factored"``), or ``"absolute"`` (the paper's ``(Λ + εI)``).
        ``"balanced"`` splits √λ between the factors by π = √(mean eigenvalue of A / mean eigenvalue
        of B) (Martens & Grosse 2015, section 6.3).
      spectrum: ``"factored"`` damps and roots each factor alone. ``"exact"`` keeps eigenbases and
        applies ``(λ_A λ_B + λ)^p``. ``"measured"`` replaces ``λ_A λ_B`` by a moving average of the
        squared gradient in the eigenbasis (George et al. 2018, EKFAC; Vyas et al. 2024, SOAP).
      graft: a transformation whose norm, leaf by leaf, the update takes, such as
        ``optax.identity()`` (SGD), ``optax.scale_by_rms()`` or ``optax.scale_by_adam()``.
      block_size: sides longer than this get block-diagonal factors of at most this size; None for
        no blocks. ``"auto"`` is 1152, of sides that are not longer than ``max_factor_size``.
      max_factor_size: sides longer than this, and not blocked, keep only their factor's diagonal.
      joint_bias: treat a bias as one more row of its kernel; needs a layout.
      root_method: the ``method`` of ``optalr.linalg.inverse_root``. The spectra ``"exact"`` and
        ``"measured"`` keep eigenbases instead of roots, and only ``"eigenbasis"`` changes what they
        do. With ``"eigenbasis"`` a refresh improves the last basis by one QR step. It decomposes
        anew only at the start and where a basis has fallen too far behind.
        A factored spectrum then keeps its bases beside the roots: ``m² + n²`` more numbers a
        kernel.
      root_dtype: what roots, eigenbases and bases rest in: ``"bfloat16"`` halves their memory and
        the bytes that an update reads, ``"float32"`` narrows what float64 parameters need; None for
        the dtype that they are computed in, float32 or wider. All arithmetic is in that one.
        Rounding changes each entry by at most 0.2 %, which the reported root residual does not see.
        On digits it changes nothing (test loss 0.0573 for 0.0572, five seeds). Factors stay wide:
        rounded likewise they are no longer positive, and training ends at 0.093.
      mesh_axes: the axes of ``mesh`` over which roots are shared out; None for all of them. Devices
        that differ along another axis alone take the same roots.
      sharded_factors: whether each device keeps a share of every factor and root, and not all of
        them: some layers of a stack, or some rows. It takes ``1/D`` of the memory over D devices.
        In every update each device then gets the gradients and roots of the kernels whose products
        it makes, a Dth of all, and sends the updates back. Replicated parameters gather these.
        Needs a mesh. A factor whose rows (or stack) D does not divide is kept whole. Give a jitted
        step of your own ``out_shardings`` (``optalr.state_shardings``), or the compiler may shard
        parameters as it likes.

    Raises:
      ValueError: a field is out of range, or ``"balanced"`` damping goes with another spectrum than
        ``"factored"``.
      TypeError: ``graft`` is no gradient transformation.

    Cost: ``spectrum="exact"`` and ``"measured"`` apply four products per update instead of two.

    Examples:
      >>> import jax.numpy as jnp, optalr
      >>> options = optalr.KroneckerOptions(max_factor_size=2)
      >>> state = optalr.scale_by_kronecker(options=options).init({"w": jnp.ones((2, 3))})
      >>> rows, cols = state.memory.sides
      >>> rows.factor["w"].shape, cols.factor["w"].shape  # three columns: a diagonal
      ((2, 2), (3,))
    """

    warmup: float = 2.0
    min_batches: int = 10
    max_update: float | None = 0.5
    damping_form: str = "relative"
    graft: optax.GradientTransformation | None = None
    mesh_axes: tuple[str, ...] | None = None
    sharded_factors: bool = False

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
        check_choice("damping_form", self.damping_form, tuple(DAMPING_FORMS))
        check_choice("spectrum", self.spectrum, tuple(SPECTRA))
        check_choice("root_method", self.root_method, METHODS)
        if self.spectrum != "factored" and self.damping_form == "balanced":
            raise ValueError(
                "damping_form='balanced' splits the damping between two factors, which "
                f"spectrum={self.spectrum!r} need not do. Pass damping_form='absolute'."
            )
        if self.block_size not in (None, AUTO):
            check_count("block_size", self.block_size, 2)
        check_count("max_factor_size", self.max_factor_size)
        if self.root_dtype is not None:
            # Both "bfloat16" and jnp.bfloat16 name a dtype; float16 would lose small entries.
            names = ("bfloat16", "float32")
            check_choice("root_dtype", jnp.dtype(self.root_dtype).name, names)


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


def check_together(
    options: KroneckerOptions, *, power: Any, statistics: str, layout: Coverage | None
) -> None:
    """Raise if the options do not go with other arguments."""
    _check_layout(layout, options)
    _check_root_method(options, power, statistics)


def _check_layout(layout: Any, options: KroneckerOptions) -> None:
    """Raise unless a layout is a report, or None where nothing needs one."""
    remedy = "Pass what optalr.coverage(loss_fn, params, *args) returns."
    check_kind("layout", layout, Coverage, remedy=remedy)
    if options.joint_bias and layout is None:
        raise ValueError(
            "joint_bias=True needs layout=optalr.coverage(loss_fn, params, *args), which says "
            "which bias belongs to which kernel."
        )


def _check_root_method(options: KroneckerOptions, power: Any, statistics: str) -> None:
    """Raise if the root method cannot take the roots that ``power`` asks for."""
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
