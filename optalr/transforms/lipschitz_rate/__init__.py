"""The learning rate as the inverse of the loss's Lipschitz constant.

``transform`` is the method, ``observing`` says what one minibatch shows of the constant,
``constants`` which constant is in force, ``averages`` what rate follows from it, ``guards`` what
bounds that rate.
"""

from optalr.transforms.lipschitz_rate.guards import LipschitzGuards
from optalr.transforms.lipschitz_rate.transform import LipschitzRateState, scale_by_lipschitz_rate

__all__ = [
    "LipschitzGuards",
    "LipschitzRateState",
    "scale_by_lipschitz_rate",
]
