"""What keeps a Lipschitz rate within bounds, and how it is configured."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optalr.arguments import check_count, check_interval
from optalr.transforms.lipschitz_rate.constants import Constants
from optalr.transforms.shared.loss_watch import check_bound
from optalr.transforms.shared.presets import resolve_preset


@dataclasses.dataclass(frozen=True)
class LipschitzGuards:
    """Bounds on a Lipschitz rate. What they do is counted in ``guarded_rates``.

    Choose your own where the rates of the first steps are absurd, or where a net needs shorter
    steps than the default ``max_step`` gives.

    Right after a random initialization the measured constant may give rates from 1e-8 to absurdly
    large ones (both are in the paper's plots). And the constant is too small by a factor of up to
    √m, where m is the batch size (see ``scale_by_lipschitz_rate``). Logistic regression bears that;
    a net with hidden layers may not. Once the loss rises, ``max_step`` therefore holds the rate to
    what a true Lipschitz constant would allow: with ‖∇‖ ≤ L, no step ``∇ / L`` is longer than 1.

    Attributes:
      min_rate: least rate, ≥ 0; ``max_step`` may go below it.
      max_rate: greatest rate, above ``min_rate``.
      warmup_steps: the number of first updates that use ``warmup_rate`` while the constant is
        measured, ≥ 0.
      warmup_rate: the rate of these updates, > 0; it is also used as long as nothing has been
        measured.
      max_step: greatest norm of an update, > 0. It holds from the first step on whose loss is
        above ``max_rise`` times the first loss, or not finite. Infinity or None is the paper's
        rule. It needs the extra ``value``, and does nothing without it. Unless it is None, a
        direction more than ten times as long as any of late is shortened to those from the first
        step on, and counted in ``failures``.
      max_rise: see ``max_step``, ≥ 0. A first loss L below zero may rise to L + (max_rise − 1)|L|.
        With 0 the bound holds from the first step on.

    Raises:
      ValueError: a field is out of range.

    Cost: with ``max_step`` one pass over the update, else a few scalar operations.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> x, y = jnp.array([[1.0], [-1.0]]), jnp.array([1.0, 0.0])
      >>> logistic = lambda w: optax.sigmoid_binary_cross_entropy((x @ w)[:, 0], y).mean()
      >>> tx = optalr.lipschitz_sgd("sigmoid", guards=optalr.LipschitzGuards(max_rate=2.0))
      >>> w = jnp.zeros((1, 1))
      >>> value, grads, extras = optalr.value_grad_and_extras(logistic)(w)
      >>> updates, state = tx.update(grads, tx.init(w), w, **extras)
      >>> bool(jnp.allclose(optax.apply_updates(w, updates), -2.0 * grads))  # 1/L is 2.8
      True
    """

    min_rate: float = 1e-6
    max_rate: float = 1e2
    warmup_steps: int = 0
    warmup_rate: float = 1e-2
    max_step: float | None = 1.0
    max_rise: float = 1.5

    def __post_init__(self):
        check_interval("min_rate", self.min_rate, 0.0)
        check_interval("max_rate", self.max_rate, self.min_rate, open_low=True)
        check_count("warmup_steps", self.warmup_steps, 0)
        check_interval("warmup_rate", self.warmup_rate, 0.0, open_low=True)
        check_bound(self.max_step, self.max_rise)

    @classmethod
    def off(cls) -> "LipschitzGuards":
        """Return no guards, the paper's own rule: the rate is 1/L, whatever comes of it."""
        return cls(min_rate=0.0, max_rate=float("inf"), max_step=None)


def resolve_guards(given: LipschitzGuards | Mapping[str, Any] | str | None) -> LipschitzGuards:
    """Return the guards that ``given`` stands for."""
    on = LipschitzGuards()
    return resolve_preset("guards", given, {"on": on, None: on, "off": LipschitzGuards.off()})


def bound_rate(
    rate: jax.Array, guards: LipschitzGuards, *, count: jax.Array, known: Constants
) -> tuple[jax.Array, jax.Array]:
    """Return the rate within its bounds, float32, and whether a guard decided it.

    Args:
      rate: what the constant gives; anything where none was measured.
      guards: the bounds.
      count: updates so far.
      known: the constants, of which the first is 0 before a measurement.
    """
    # The bounds hold for the warm-up rate too.
    early = (count < guards.warmup_steps) | ~(known.lipschitz_constant > 0)
    bounded = jnp.clip(jnp.where(early, guards.warmup_rate, rate), guards.min_rate, guards.max_rate)
    return bounded.astype(jnp.float32), early | (bounded != rate)
