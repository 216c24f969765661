"""Thin adapters: to the training states of frameworks, and to wrappers of transformations.

Importing one of a framework imports the framework; ``wrappers`` and ``packing`` need optax alone.

``optalr.adapters.linen.TrainState`` for Flax linen; ``optalr.adapters.nnx.Optimizer`` and
``optalr.adapters.nnx.value_grad_and_extras`` for Flax nnx. After ``import optalr`` these names lead
there: a module is imported when it is first asked for.
"""

import importlib
from typing import Any

_MODULES = ("linen", "nnx", "packing", "wrappers")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
