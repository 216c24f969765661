"""The solve inside the flow, and the direction taken where it met negative curvature."""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from optalr.arguments import check_count
from optalr.linalg.minres.linear_solve import MinresResult, minres, minres_step
from optalr.linalg.minres.vectors import dot, where

Ending = Callable[[MinresResult, Any], tuple[Any, jax.Array]]


@dataclasses.dataclass(frozen=True)
class KrylovSolver:
    """How ``(A + λI) v = ∇`` is solved; the arguments are those of ``scale_by_krylov_flow``.

    Attributes:
      num_steps: k.
      tol: relative residual below which the solution is left alone.
      preconditioner: ``preconditioner(extras, damping)`` returns a linear map, or None.
      end: a function of the solve and the gradient that returns the direction taken, and whether
        the solve ended in a direction of descent.
    """

    num_steps: int
    tol: Any
    preconditioner: Callable[..., Callable[[Any], Any]] | None
    end: Ending

    def solve(
        self, matvec: Callable[[Any], Any], gradient: Any, *, shift: jax.Array, extras: Any
    ) -> MinresResult:
        """Return the last iterate for the damping ``shift``, and what is known of it."""
        # One step has a closed form, with fewer passes over the vectors.
        if self.num_steps == 1 and self.preconditioner is None:
            return minres_step(matvec, gradient, damping=shift)
        inverse = None if self.preconditioner is None else self.preconditioner(extras, shift)
        return minres(
            matvec,
            gradient,
            num_steps=self.num_steps,
            damping=shift,
            tol=self.tol,
            preconditioner=inverse,
        )


def _descend(solved: MinresResult, gradient: Any) -> tuple[Any, jax.Array]:
    """Return the last iterate if it descends, else the trusted one; and whether it descends."""
    descends = dot(gradient, solved.solution) > 0
    return where(descends, solved.solution, solved.trusted), descends


def _keep(solved: MinresResult, gradient: Any) -> tuple[Any, jax.Array]:
    """Return the last iterate, and True: it is taken for a direction of descent."""
    del gradient
    return solved.solution, jnp.asarray(True)


# What to do with a solve that met negative curvature.
ENDINGS: Mapping[str, Ending] = MappingProxyType({"descend": _descend, "keep": _keep})


def checked_steps(num_steps: Any) -> int:
    """Return ``num_steps`` as a Python int."""
    try:
        whole = None if isinstance(num_steps, bool) else operator.index(num_steps)
    except TypeError:  # what a tracer raises is a TypeError too
        whole = None
    if whole is None:
        raise TypeError(
            f"num_steps must be an integer, got {num_steps!r}: the steps are unrolled. Under "
            "optax.inject_hyperparams pass static_args=('num_steps',)."
        )
    check_count("num_steps", whole)
    return whole
