"""Why a training run blew up."""

import math
from typing import Any

# A rate that is too large shows within a few steps, so earlier losses are not compared.
_RECENT_STEPS = 20
# Losses of minibatches jump, but seldom threefold.
_GROWTH = 3


def diagnose(rows: list[dict[str, Any]], step: int) -> str:
    """Return the likely cause and a remedy.

    Args:
      rows: metrics, one row per step.
      step: the step at which training stopped.
    """
    before = [row for row in rows if row["step"] <= step and math.isfinite(row["loss"])]
    if not before:
        return (
            "the very first loss is not finite, so the data or the initial parameters are at "
            "fault; look for values that are not numbers in the data"
        )
    last = before[-1]
    recent = before[-_RECENT_STEPS:]
    lowest = min(recent, key=lambda row: row["loss"])
    found = [f"the last finite loss was {last['loss']:.4g} at step {last['step']}"]
    rate = last.get("learning_rate", math.nan)
    if math.isfinite(rate):
        found.append(f"the learning rate {rate:.3g}")
    if last.get("failures", 0) > 0:
        found.append(f"{last['failures']:.0f} numerical failures had been counted")
    grew = last["loss"] / max(lowest["loss"], 1e-30)
    if grew > _GROWTH:
        found.append(
            f"the loss had grown {grew:.3g}-fold in {last['step'] - lowest['step']} steps, so the "
            "learning rate is too large"
        )
    return ", ".join(found) + "; lower method.learning_rate or set train.clip_norm"
