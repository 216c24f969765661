"""Small tools for reading and evaluating traced functions through jax's public API.

In: a jaxpr, jax's record of a function as a list of equations. Out: facts about it, parts of it as
functions, or its value with some equations evaluated in another way (``replay``).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

# Evaluates one equation in a way of its own: the values of its inputs in, and of what it reads
# besides; those of its outputs out.
Replacement = Callable[[list[Any]], Sequence[Any]]


@functools.cache
def _public_core() -> Any:
    """Return ``jax.extend.core``, imported when the first loss is traced.

    Its package imports Pallas, a sixth of what ``import optalr`` would take.
    """
    from jax.extend import core

    return core


# Primitives that run one jaxpr, once and as it stands, by their names in all releases.
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})


def is_literal(var: Any) -> bool:
    """Return whether an equation's input is a constant written into it."""
    return isinstance(var, _public_core().Literal)


def is_closed(jaxpr: Any) -> bool:
    """Return whether something is a closed jaxpr, which holds its constants."""
    return isinstance(jaxpr, _public_core().ClosedJaxpr)


def closed_jaxpr(jaxpr: Any) -> Any:
    """Return a closed jaxpr as it is, and close an open one that has no constants."""
    # Primitives differ: ``jit`` and ``scan`` hold closed jaxprs, remat and ``shard_map`` open ones.
    return jaxpr if is_closed(jaxpr) else _public_core().ClosedJaxpr(jaxpr, ())


def as_function(closed: Any) -> Callable[..., list[Any]]:
    """Return a closed jaxpr as a function of its inputs, which returns its outputs."""
    return _public_core().jaxpr_as_fun(closed)


def variables(equation: Any) -> list[Any]:
    """Return the distinct variables that an equation reads, in order."""
    # A dict, unlike a set, keeps the order. Variables compare by identity.
    return list(dict.fromkeys(var for var in equation.invars if not is_literal(var)))


def has_tangent(var: Any) -> bool:
    """Return whether one can differentiate by a variable: whether it holds floating numbers."""
    return jnp.issubdtype(var.aval.dtype, jnp.inexact)


def open_jaxpr(jaxpr: Any) -> Any:
    """Return the open jaxpr of a closed one, or the jaxpr itself."""
    return jaxpr.jaxpr if is_closed(jaxpr) else jaxpr


def extract(
    jaxpr: Any, equations: Sequence[Any], *, inputs: Sequence[Any], outputs: Sequence[Any]
) -> Callable[..., list[Any]]:
    """Return some equations of a jaxpr as a function of ``inputs`` that returns ``outputs``."""
    # ``replace`` on the jaxpr at hand, because the constructor's signature differs between
    # releases of jax, and binding equations one by one needs interfaces that are private.
    part = jaxpr.replace(
        constvars=[],
        invars=list(inputs),
        outvars=list(outputs),
        eqns=list(equations),
        effects=frozenset().union(*(equation.effects for equation in equations)),
    )
    return as_function(closed_jaxpr(part))


def replay(
    closed: Any,
    args: Sequence[Any],
    replacements: Mapping[int, Replacement],
    *,
    also_reads: Mapping[int, Sequence[Any]] = MappingProxyType({}),
) -> list[Any]:
    """Evaluate a jaxpr, with some of its equations evaluated in another way.

    Args:
      closed: the ``ClosedJaxpr``.
      args: its flat inputs.
      replacements: by equation index, what to do in place of the equation.
      also_reads: by equation index, variables that its replacement is given after its inputs.

    Returns:
      The flat outputs.
    """
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    last_reads = _last_reads(jaxpr, also_reads)

    def read(var: Any) -> Any:
        return var.val if is_literal(var) else values[var]

    def run_stretch(start: int, end: int) -> None:
        """Evaluate the equations between two indices, and store what is read after them."""
        equations = jaxpr.eqns[start:end]
        if not equations:
            return
        made = dict.fromkeys(var for equation in equations for var in equation.outvars)
        read_here = dict.fromkeys(var for equation in equations for var in variables(equation))
        inputs = [var for var in read_here if var not in made]
        # Only what is read later leaves the stretch. To return everything would keep it alive.
        outputs = [var for var in made if last_reads.get(var, -1) >= end]
        run = extract(jaxpr, equations, inputs=inputs, outputs=outputs)
        values.update(zip(outputs, run(*map(read, inputs)), strict=True))

    start = 0
    # Stretches without a replacement run as one closed jaxpr each: fewer and larger calls, and the
    # equations in them stay exactly as jax traced them.
    for index in sorted(replacements):
        run_stretch(start, index)
        equation = jaxpr.eqns[index]
        reads = (*equation.invars, *also_reads.get(index, ()))
        results = replacements[index]([read(var) for var in reads])
        values.update(zip(equation.outvars, results, strict=True))
        start = index + 1
    run_stretch(start, len(jaxpr.eqns))
    return [read(var) for var in jaxpr.outvars]


def _last_reads(jaxpr: Any, also_reads: Mapping[int, Sequence[Any]]) -> dict[Any, int]:
    """Return the index of the last equation that reads each variable; for outputs, the end."""
    last: dict[Any, int] = {}
    for index, equation in enumerate(jaxpr.eqns):
        others = [var for var in also_reads.get(index, ()) if not is_literal(var)]
        last.update(dict.fromkeys((*variables(equation), *others), index))
    return last | {var: len(jaxpr.eqns) for var in jaxpr.outvars if not is_literal(var)}


# What differs between the releases of jax that we support.


def varying_axes(aval: Any) -> frozenset[str]:
    """Return the mesh axes over which a value of this type varies inside a ``shard_map``."""
    # Newer releases keep the axes in a type of their own, older ones as a plain set.
    manual = getattr(aval, "manual_axis_type", None)
    if manual is not None:
        return frozenset(manual.varying)
    return frozenset(getattr(aval, "vma", None) or ())


def vary(array: Any, axes: frozenset[str]) -> Any:
    """Mark ``array`` as varying over ``axes``; the transpose of the mark is a sum over them."""
    missing = tuple(sorted(axes - varying_axes(jax.typeof(array))))
    if not missing:
        return array
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, missing, to="varying")
    # By name, because newer releases lack it and the type checker reads the newest.
    return getattr(jax.lax, "pvary")(array, missing)  # noqa: B009
