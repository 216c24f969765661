"""How a learned rate reads the loss along a step: by probes, or from two steps' gradients."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_choice, is_concrete, require_extra
from optalr.clocks import measure_when
from optalr.signals.ray import (
    ExactDerivatives,
    FiniteDifferences,
    by_path,
    inner_product,
    loss_along,
)
from optalr.transforms.learned_rate.rate_rule import Reading
from optalr.transforms.shared.rescaling import tree_scale

_PROBE_REMEDY = (
    "Pass {probe}=jax.tree_util.Partial(loss_fn, x=x, y=y) to update, with the batch to probe."
)


@dataclasses.dataclass(frozen=True)
class SuccessiveGradients:
    """Take ``f'(η_t) = −u_tᵀ g_{t+1}`` from the next step's gradient, eq. 8: no extra pass.

    Choose it where a probe costs too much. On stochastic gradients it compares two batches. It
    gives no curvature, hence ``order=1`` only.

    Cost: one inner product per step, and one copy of the parameters in the state, for the last
      direction.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optalr
      >>> slopes = optalr.SuccessiveGradients()
      >>> tx = optalr.scale_by_learned_rate(0.1, order=1, meta_rate=0.01, derivatives=slopes)
      >>> w = jnp.ones(1)
      >>> state = tx.init(w)
      >>> for _ in range(2):  # L = w², so the gradients are 2 and 1.6
      ...     updates, state = tx.update(2 * w, state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(jnp.isclose(state.learning_rate, 0.1 + 0.01 * 2 * 1.6))
      True

    Reference: Ravaut, Gorti, "Faster gradient descent via an adaptive learning rate", eq. 8. Since
      then it has been known as hypergradient descent (Baydin et al. 2018).
    """


Derivatives = ExactDerivatives | FiniteDifferences | SuccessiveGradients
DERIVATIVES: Mapping[str, Derivatives] = MappingProxyType(
    {
        "exact": ExactDerivatives(),
        "finite_differences": FiniteDifferences(),
        "successive_gradients": SuccessiveGradients(),
    }
)


class UpdateInputs(NamedTuple):
    """What an update was given."""

    updates: Any  # the direction u, a pytree
    last_direction: Any  # that of the step before, where a reader keeps it
    params: Any  # the parameters, or None
    extras: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A reader that evaluates the loss along the step, by extra passes.

    Attributes:
      derivatives: how f' and f'' are taken.
      name: the extra that holds the loss.
      order: 1 where only f' is needed; 2, or traced, where f'' is needed too.
      every: updates between probes.
      compares: whether f(0) and gᵀu are wanted too; they need the extra ``grad``.
    """

    derivatives: ExactDerivatives | FiniteDifferences
    name: str
    order: Any
    every: Any
    compares: bool

    def init_direction(self, params: Any) -> Any:
        """Return the part of the state for the last direction: none is kept."""
        del params
        return ()

    def next_direction(self, inputs: UpdateInputs) -> Any:
        """Return that part after a step."""
        return inputs.last_direction

    def read(self, inputs: UpdateInputs, rate: jax.Array, *, due: jax.Array, may: Any) -> Reading:
        """Return the reading at ``rate``, zeros where none is due."""
        measure = self._prepare(inputs)
        if is_concrete(self.every) and int(self.every) == 1:
            return measure(rate)  # always due: a branch would only hide the pass from XLA
        return measure_when(due, partial(measure, rate), may=may)

    def _prepare(self, inputs: UpdateInputs) -> Callable[[jax.Array], Reading]:
        """Return the function of the rate that takes a reading along the step."""
        updates, extras = inputs.updates, inputs.extras
        remedy = "" if self.name == "value_fn" else _PROBE_REMEDY.format(probe=self.name)
        value_fn = require_extra(extras, self.name, "scale_by_learned_rate", remedy)
        point = extras.get("point", inputs.params)
        if point is None:
            raise TypeError(
                "scale_by_learned_rate needs the parameters: call tx.update(grads, opt_state, "
                "params, **extras)."
            )
        kind = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in by_path(updates).values()))
        ray = loss_along(value_fn, point, updates)
        compares = self.compares and "grad" in extras
        # A direction that was rescaled since the loss gave it is that of a loss so much larger.
        scale = tree_scale(updates, extras.get("grad"))
        # The extra value is f(0) of the training batch only.
        known = self.name == "value_fn" and "value" in extras

        def measure(rate: jax.Array) -> Reading:
            eta = rate.astype(kind)
            start, decrease = -jnp.inf, 0.0
            if compares:
                start = extras["value"] if known else ray(jnp.zeros_like(eta))
                decrease = inner_product(updates, extras["grad"])
            found = (*self._differentiate(ray, eta), start, decrease)
            return Reading(*(scale.astype(kind) * jnp.asarray(x).astype(kind) for x in found))

        return measure

    def _differentiate(self, ray: Callable[[jax.Array], jax.Array], eta: jax.Array) -> Any:
        """Return f, f' and f''; raise with a remedy where the loss has no forward derivative."""
        # A traced order may turn out to be 2.
        order = int(self.order) if is_concrete(self.order) else 2
        try:
            return self.derivatives.measure(ray, eta, order)
        except (TypeError, NotImplementedError) as error:
            if "custom_vjp" not in str(error) and "custom_lin" not in str(error):
                raise
            # jax names neither the loss nor a way out.
            raise TypeError(
                "the loss has no forward derivative, because of a jax.custom_vjp in it. Pass "
                "derivatives=optalr.FiniteDifferences(step=1e-2) to scale_by_learned_rate."
            ) from error


class GradientComparison:
    """A reader that takes the last step's slope from the new gradient: f' = −uᵀg."""

    def init_direction(self, params: Any) -> Any:
        """Return the part of the state for the last direction: zeros like the parameters."""
        return jax.tree.map(jnp.zeros_like, params)

    def next_direction(self, inputs: UpdateInputs) -> Any:
        """Return that part after a step: its direction."""
        return jax.tree.map(
            lambda u, old: u.astype(old.dtype), inputs.updates, inputs.last_direction
        )

    def read(self, inputs: UpdateInputs, rate: jax.Array, *, due: jax.Array, may: Any) -> Reading:
        """Return the reading of the last step. It costs nothing, so ``due`` does not matter."""
        del rate, due, may
        gradient = inputs.extras.get("grad", inputs.updates)
        slope = -inner_product(inputs.last_direction, gradient)
        slope = slope * tree_scale(inputs.updates, gradient)
        zero = jnp.zeros_like(slope)
        return Reading(zero, slope, zero, zero, zero)


def reader_of(derivatives: Derivatives, probe: str, **how: Any) -> Probe | GradientComparison:
    """Return what takes the derivatives; ``how`` goes to ``Probe``."""
    if isinstance(derivatives, SuccessiveGradients):
        return GradientComparison()
    return Probe(derivatives, probe, **how)


def resolve_derivatives(given: str | Mapping[str, Any] | Derivatives, order: Any) -> Derivatives:
    """Return the configured derivatives; raise if they do not fit the order.

    Args:
      given: a name of ``DERIVATIVES``, a mapping that holds one as ``name`` beside fields of that
        kind, or the derivatives themselves.
      order: 1 or 2, or traced.

    Raises:
      ValueError: an unknown order or name, or derivatives without curvature at order 2.
      TypeError: ``given`` is of another kind.
    """
    if is_concrete(order) and order not in (1, 2):
        raise ValueError(f"order must be 1 (gradient descent) or 2 (Newton), got {order!r}.")
    if isinstance(given, str):
        given = {"name": given}
    if isinstance(given, Mapping):
        fields = dict(given)
        check_choice("derivatives", name := fields.pop("name", "exact"), tuple(DERIVATIVES))
        given = dataclasses.replace(DERIVATIVES[name], **fields)
    if not isinstance(given, Derivatives):
        raise TypeError(
            f"derivatives must be one of {', '.join(DERIVATIVES)} or a configured "
            f"ExactDerivatives, FiniteDifferences or SuccessiveGradients, got {given!r}."
        )
    if isinstance(given, SuccessiveGradients) and is_concrete(order) and order != 1:
        raise ValueError(
            "derivatives='successive_gradients' gives no curvature. Pass order=1 with it."
        )
    return given
