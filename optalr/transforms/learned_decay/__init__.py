"""A weight decay that is learned from a validation loss.

``transform`` is the method, ``slope`` measures how the loss answers the decay, ``rule`` moves the
decay.
"""

from optalr.transforms.learned_decay.transform import LearnedDecayState, add_learned_decay

__all__ = ["LearnedDecayState", "add_learned_decay"]
