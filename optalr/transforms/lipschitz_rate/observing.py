"""What one minibatch says about the Lipschitz constant, from the moments of the last layer."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import SUPPLY, require_extra
from optalr.linalg.structured import Diagonal, Structured, as_structured
from optalr.signals.lipschitz import canonical_loss, lipschitz_constant
from optalr.signals.moments import LayerMoments, Sides, is_moments
from optalr.transforms.shared.lengths import length

METHOD = "scale_by_lipschitz_rate"


class Measurement(NamedTuple):
    """What one minibatch says, as scalars."""

    activation_norm: jax.Array  # float32, K_z
    loss_bound: jax.Array  # float32, L without its weight decay term
    square_bound: jax.Array  # float32, the bound on the squared gradient; 0 unless wanted
    usable: jax.Array  # bool, whether something was measured, and is finite and positive
    failed: jax.Array  # bool, whether something was measured and is not


@dataclasses.dataclass(frozen=True)
class Gauge:
    """The formula of a loss's constant, and where its norms come from.

    Attributes:
      loss: a name of the loss.
      num_classes: k, for softmax cross-entropy.
      further_norms: a function of the extras that returns the norms besides K_z, by their names in
        ``lipschitz_constant``.
      last_layer: key path of the kernel whose input counts; None for the layer executed last.
      squares: whether the bound on the squared gradient is wanted.
    """

    loss: str
    num_classes: Any
    further_norms: Callable[[dict[str, Any]], dict[str, Any]]
    last_layer: str | None
    squares: bool

    def measure(self, extras: dict[str, Any]) -> Measurement:
        """Return what this minibatch says."""
        moments = _last_layer(self.last_layer, extras)
        energies = _diagonal_of_inputs(moments)
        rows = moments.count * moments.positions
        # The moments of a step that captured nothing are zeros, which is no measurement.
        present = rows > 0
        # ‖a‖_F² = N T tr(A); of a stack of layers the largest.
        norm = jnp.sqrt(rows * jnp.max(jnp.sum(energies, axis=-1)))
        bound = lipschitz_constant(
            self.loss,
            norm,
            jnp.where(present, rows, 1),
            num_classes=self.num_classes,
            **self.further_norms(extras),
        )
        squared = jnp.zeros_like(bound)
        if self.squares:
            factor = jnp.where(norm > 0, bound / jnp.where(norm > 0, norm, 1), 0)  # c / m
            squared = factor**2 * _norm_of_squares(extras, rows, energies)
        sound = jnp.isfinite(bound) & jnp.isfinite(squared) & (bound > 0)
        return Measurement(norm, bound, squared, present & sound, present & ~sound)


def further_norms(loss: str, target_norm: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the function of the extras that returns the norms in the formula besides K_z."""
    if canonical_loss(loss) != "least_squares":
        return lambda extras: {}

    def norms_of_least_squares(extras: dict[str, Any]) -> dict[str, Any]:
        remedy = SUPPLY.format(loss="optalr.composite_loss(predict_fn, output_loss)")
        outputs = require_extra(extras, "outputs", METHOD, remedy)
        targets = extras.get("target_norm", target_norm)
        if targets is None:
            targets = require_extra(
                extras,
                "target_norm",
                METHOD,
                "Pass it to update as target_norm=, or once to the optimizer: the norm ‖y‖ of a "
                "minibatch of targets.",
            )
        return {"output_norm": length(outputs), "target_norm": targets}

    return norms_of_least_squares


def _norm_of_squares(extras: dict[str, Any], rows: jax.Array, energies: jax.Array) -> jax.Array:
    """Return ‖a∘a‖_F from the activations, or the lower bound that the moments give."""
    if extras.get("activations") is not None:
        return jnp.sqrt(jnp.sum(extras["activations"].astype(jnp.float32) ** 4))
    # By Jensen's inequality: the mean of a fourth power is at least the square of A_jj.
    return jnp.sqrt(rows * jnp.max(jnp.sum(energies**2, axis=-1)))


def _last_layer(name: str | None, extras: dict[str, Any]) -> LayerMoments:
    """Return the moments of the layer executed last, or of the one with this key path.

    Where it can be, the diagonal of the input's Gram matrix is measured alone.
    """
    if name is None:
        remedy = "" if "head" not in extras else "No layer was found in the loss: see coverage."
        head = require_extra(extras, "head", METHOD, remedy)
        measure = extras.get("measure_head")
        keep = _diagonals(head)
        return head if measure is None or keep is None else measure(keep)
    signals = require_extra(extras, "signals", METHOD)
    layers = _layers(signals)
    if name not in layers:
        raise ValueError(
            f"last_layer must be the key path of a captured kernel, one of {', '.join(layers)}; "
            f"got {name!r}."
        )
    measure, keep = extras.get("measure"), _diagonals(layers[name])
    return layers[name] if measure is None or keep is None else _layers(measure({name: keep}))[name]


def _layers(signals: Any) -> dict[str, LayerMoments]:
    """Return the moments of all layers by their key paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(signals, is_leaf=is_moments)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if is_moments(leaf)}


def _diagonals(moments: LayerMoments) -> Sides | None:
    """Return what to measure of a layer, or None where less than all is measured already."""
    if isinstance(moments.rows, Structured) or isinstance(moments.cols, Structured):
        return None
    return Diagonal(moments.rows.shape[-1]), Diagonal(moments.cols.shape[-1])


def _diagonal_of_inputs(moments: LayerMoments) -> jax.Array:
    """Return the mean squares of a layer's inputs, ``(*stack, m)``."""
    on_rows = moments.input_side == "rows"
    second_moment = as_structured(moments.rows if on_rows else moments.cols)
    mean = moments.row_mean if on_rows else moments.col_mean
    diagonal = second_moment.diagonal()
    # Blocks have padded rows, and a joint bias has a row.
    flat = diagonal.reshape(*second_moment.stack, -1)
    return flat if mean is None else flat[..., : mean.shape[-1]]
