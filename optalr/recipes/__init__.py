"""Complete optimizers, made of the parts in the other rooms with ``optax.chain``."""

from optalr.recipes import paper
from optalr.recipes.classical import CLASSICAL_RULES, classical
from optalr.recipes.flows import edf
from optalr.recipes.learned_rate import learned_rate_sgd, learned_rate_then
from optalr.recipes.lipschitz_rate import lipschitz_adam, lipschitz_sgd
from optalr.recipes.tso_alra import tso_alra
from optalr.recipes.untuned import untuned

__all__ = [
    "CLASSICAL_RULES",
    "classical",
    "edf",
    "learned_rate_sgd",
    "learned_rate_then",
    "lipschitz_adam",
    "lipschitz_sgd",
    "paper",
    "tso_alra",
    "untuned",
]
