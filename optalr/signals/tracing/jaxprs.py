"""Small tools for reading traced functions through jax's public API."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core as jex_core


def is_literal(var: Any) -> bool:
    """Whether an equation's input is a constant written into it."""
    return isinstance(var, jex_core.Literal)


def variables(equation: Any) -> list[Any]:
    """Return the distinct variables that an equation reads, in order."""
    return list(dict.fromkeys(var for var in equation.invars if not is_literal(var)))


def extract(
    jaxpr: Any, equations: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]
) -> Callable[..., list[Any]]:
    """Return some equations of a jaxpr as a function of ``inputs`` that returns ``outputs``."""
    effects = frozenset().union(*(equation.effects for equation in equations))
    part = jaxpr.replace(
        constvars=[],
        invars=list(inputs),
        outvars=list(outputs),
        eqns=list(equations),
        effects=effects,
    )
    return jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(part, ()))
