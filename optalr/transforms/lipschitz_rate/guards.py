"""What keeps a Lipschitz rate within bounds, and how it is configured."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from optalr.arguments import check_count, check_interval, from_fields


@dataclasses.dataclass(frozen=True)
class LipschitzGuards:
    """Bounds on a Lipschitz rate. What they do is counted in ``guarded_rates``.

    Right after a random initialization the measured constant may give rates from 1e-8 to absurdly
    large ones (both are in the paper's plots). And the constant is too small by a factor of up to
    √m, the batch size (see ``scale_by_lipschitz_rate``): logistic regression bears that, a net
    with hidden layers may not. Once the loss rises, ``max_step`` therefore holds the rate to what
    a Lipschitz constant would keep: were ‖∇‖ ≤ L, no step ``∇ / L`` were longer than 1.

    Attributes:
      min_rate: least rate, >= 0; ``max_step`` may go below it.
      max_rate: greatest rate.
      warmup_steps: so many first updates use ``warmup_rate`` while the constant is measured, >= 0.
      warmup_rate: > 0; also used as long as nothing has been measured.
      max_step: greatest norm of an update, > 0, from the first step on whose loss is above
        ``max_rise`` times the first loss (or not finite). Infinity or None is the paper's rule.
        Needs the extra ``value``, and does nothing without.
      max_rise: see ``max_step``, >= 0; with 0 the bound holds from the first step on.
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
        if self.max_step is not None:
            remedy = "None switches it off."
            check_interval("max_step", self.max_step, 0.0, open_low=True, remedy=remedy)
        check_interval("max_rise", self.max_rise, 0.0)

    @classmethod
    def off(cls) -> "LipschitzGuards":
        """Return the paper's own rule: the rate is 1/L, whatever comes of it."""
        return cls(min_rate=0.0, max_rate=float("inf"), max_step=None)


def resolve_guards(given: "LipschitzGuards | Mapping[str, Any] | str | None") -> LipschitzGuards:
    """Return the guards that ``given`` stands for."""
    if given is None or given == "on":
        return LipschitzGuards()
    if given == "off":
        return LipschitzGuards.off()
    given = from_fields("guards", given, LipschitzGuards)
    if not isinstance(given, LipschitzGuards):
        raise TypeError(
            f"guards must be 'on', 'off', a LipschitzGuards or a mapping of its fields, got "
            f"{given!r}."
        )
    return given
