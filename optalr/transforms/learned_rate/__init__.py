"""A learning rate that is learned from the loss along the step.

``transform`` is the method, ``probing`` takes a reading of the loss along the step, ``rate_rule``
answers it with a new rate, ``safeguards`` says what happens where that rule fails.
"""

from optalr.transforms.learned_rate.probing import SuccessiveGradients
from optalr.transforms.learned_rate.safeguards import RateSafeguards
from optalr.transforms.learned_rate.transform import LearnedRateState, scale_by_learned_rate

__all__ = [
    "LearnedRateState",
    "RateSafeguards",
    "SuccessiveGradients",
    "scale_by_learned_rate",
]
