"""What differs between the releases of jax that we support, in one place.

In: types and equations as one of these releases makes them. Out: the same facts for all of them.
"""

from typing import Any

import jax

from optalr.signals.tracing.jaxprs import open_jaxpr


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


def manual_axes(shard_map_params: dict[str, Any]) -> frozenset[str]:
    """Return the mesh axes over which a ``shard_map`` equation is manual."""
    for name in ("newly_manual_axes", "manual_axes"):
        if name in shard_map_params:
            return frozenset(shard_map_params[name])
    raise NotImplementedError(f"a shard_map with parameters {sorted(shard_map_params)}")


def scan_arity(equation: Any) -> tuple[int, int]:
    """Return how many constants and carries a scan has."""
    # Releases differ in the parameters that say so. The shapes say it in all of them: what is
    # scanned or stacked has one more axis outside than inside, and nothing else has.
    body = open_jaxpr(equation.params["jaxpr"])

    def rank(var):
        return len(var.aval.shape)

    carries = [rank(a) == rank(b) for a, b in zip(equation.outvars, body.outvars, strict=True)]
    scanned = [rank(a) != rank(b) for a, b in zip(equation.invars, body.invars, strict=True)]
    return len(scanned) - sum(scanned) - sum(carries), sum(carries)
