"""Each source to the letter, for whoever wants to run what was published.

The methods of the same names in ``optalr`` are what we train with. They add safeguards, momentum,
bias corrections and a warm-up, each with its reason in its docstring. Here nothing is added: what
the papers print happens, with what comes of it. Only errata are mended (a wrong sign, a factor on
the wrong side, a vector's name), because the printed text there contradicts the paper itself.

    optalr.tso_alra(...)          what we would use
    optalr.paper.tso_alra(...)    what Ida & Fujiwara print
"""

from optalr.recipes.paper.adaptive import amsgrad, swats
from optalr.recipes.paper.flow import edf
from optalr.recipes.paper.rates import learned_rate_sgd, lipschitz_sgd
from optalr.recipes.paper.two_stages import tso_alra

__all__ = ["amsgrad", "edf", "learned_rate_sgd", "lipschitz_sgd", "swats", "tso_alra"]
