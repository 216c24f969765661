"""What a learned rate does where its rule fails, and how that is configured."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from optalr.arguments import check_interval
from optalr.transforms.shared.loss_watch import check_bound
from optalr.transforms.shared.presets import resolve_preset


@dataclasses.dataclass(frozen=True)
class RateSafeguards:
    """What a learned rate does where Newton's rule fails. None switches a safeguard off.

    Choose your own to bound the rate (``ceiling``) or the step (``max_step``), or to run the
    paper's bare rule (``RateSafeguards.off()``).

    Where ``f'' > 0`` and nothing is out of proportion, no safeguard acts, however fast the rate
    grows or falls. On a quadratic one update therefore lands on the exact rate. Each safeguard acts
    relative to the rate and to the loss, so scaling the loss by c still divides the rates by c.

    Attributes:
      curvature: k > 1. Where the parabola through f, f', f'' has no minimum at a positive rate
        (f'' ≤ 0, or η − f'/f'' ≤ 0), Newton's rule climbs or turns back. The rate η is then
        multiplied by k where f' < 0 and divided by k where f' > 0. Counted as
        ``nonconvex_probes``.
      max_drag: share in [0, 1]. Of order 2 the momentum of the rate may take a new rate at most
        this share below Newton's, and never above it, where the step would be longer than the best
        one for its batch. Newton's step is a whole one, not a small one downhill: added up with
        β = 0.9, a rate that starts far below the best one η* is 1.9 η* after two updates on a
        quadratic, where almost nothing is gained. What follows a doubling of the rate (see
        ``curvature``) is carried even further: by ever larger steps of its own. Where a safeguard
        sets the rate, no momentum is added.
      runaway: limit ≥ 0. A step is not made if it would raise the loss by more than this many times
        the decrease it should bring, ``f(η) − f(0) > limit · η gᵀu``. The rate becomes
        ``½ η / (1 + (f(η) − f(0)) / (η gᵀu))``, the minimum of the parabola through f(0), f'(0)
        and f(η), and is used at once. On a quadratic this acts above 2(1 + limit) times the best
        rate. It needs the extra ``grad``. Counted as ``runaway_steps``.
      nonfinite: k > 1. Where f(η) is not finite no step is made, and η becomes the lesser of η/k
        and the average rate. Where only a derivative is not finite, η stays as it is. A direction
        that is not finite gives a zero update and leaves η alone. One more than ten times as long
        as any of late is shortened to those, and η learns nothing from it. Counted as ``failures``.
        None lets NaN through, and directions of any length.
      floor: the least rate, > 0. The paper's is 1e-6, which is too much for a loss that is a sum
        over many examples.
      ceiling: the greatest rate, at least the floor. The paper has none. Rates brought back to
        floor or ceiling are counted as ``clipped_rates``.
      max_step: greatest norm of an update, > 0; None, the default, for no bound. It holds from the
        first step on whose loss is above ``max_rise`` times the first loss, or not finite. Try 0.3
        where a net is probed on its own small batches: the steps that fit one batch are too long
        for all others. It depends on the scale of the parameters, which nothing else here does,
        and makes the loss of a quadratic fall more slowly. It needs the extra ``value``. Counted
        as ``bounded_steps``; the rate that is learned stays as it is.
      max_rise: see ``max_step``, ≥ 0. A first loss L below zero may rise to L + (max_rise − 1)|L|.
        With 0 the bound holds from the first step on.

    Raises:
      ValueError: a field is out of range.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> safeguards = optalr.RateSafeguards(ceiling=0.1)
      >>> tx = optalr.learned_rate_sgd(0.01, safeguards=safeguards)
      >>> evaluate = optalr.value_grad_and_extras(lambda w: jnp.sum(w**2))
      >>> w = jnp.ones(2)
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     value, grads, extras = evaluate(w)
      ...     updates, state = tx.update(grads, state, w, **extras)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(jnp.allclose(w, 0.98 * (1 - 2 * 0.1)))  # the exact rate is 0.5
      True

    Reference: the floor is δ of Ravaut, Gorti, "Faster gradient descent via an adaptive learning
      rate", eq. 19. The other safeguards are ours.
    """

    curvature: float | None = 2.0
    max_drag: float | None = 0.5
    runaway: float | None = 1e3
    nonfinite: float | None = 10.0
    floor: float = 1e-12
    ceiling: float = float("inf")
    max_step: float | None = None
    max_rise: float = 1.5

    def __post_init__(self):
        remedy = "None switches it off."
        for name, value in (("curvature", self.curvature), ("nonfinite", self.nonfinite)):
            if value is not None:
                check_interval(name, value, 1.0, open_low=True, remedy=remedy)
        if self.max_drag is not None:
            check_interval("max_drag", self.max_drag, 0.0, 1.0, remedy=remedy)
        if self.runaway is not None:
            check_interval("runaway", self.runaway, 0.0, remedy=remedy)
        check_interval("floor", self.floor, 0.0, open_low=True, remedy="The paper's is 1e-6.")
        check_interval("ceiling", self.ceiling, self.floor)
        check_bound(self.max_step, self.max_rise)

    @classmethod
    def off(cls, floor: float = 1e-6) -> "RateSafeguards":
        """Return the published rule's only safeguard, the floor δ of eq. 19."""
        return cls(curvature=None, max_drag=None, runaway=None, nonfinite=None, floor=floor)


def resolve_safeguards(given: RateSafeguards | Mapping[str, Any] | str | None) -> RateSafeguards:
    """Return the safeguards that ``given`` stands for."""
    off = RateSafeguards.off()
    return resolve_preset("safeguards", given, {"on": RateSafeguards(), "off": off, None: off})
