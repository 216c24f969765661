"""Counting what a program costs a device, from its jaxpr and from its compiled text."""

import collections
import math
import re
from typing import Any

import jax
import numpy as np
import optax

from optalr.clocks import REFRESH

COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)
RESULT = re.compile(r"(pred|[a-z]+\d\d)\[([\d,]*)\]")
# Flops of a decomposition of an n × n matrix, in n³. Only that they are the same on one device and
# on many matters here.
DECOMPOSITIONS = {"eigh": 20.0, "qr": 4.0, "geqrf": 4.0, "cholesky": 1 / 3, "triangular_solve": 1.0}


def flops(jaxpr: Any) -> float:
    """Return the flops of products and decompositions that the busiest device has.

    A loop counts as one round and a branch as its dearest. Shapes inside a ``shard_map`` are those
    of a device.
    """
    return sum(_flops_of(eqn) for eqn in jaxpr.eqns)


def _flops_of(eqn: Any) -> float:
    name, inner = eqn.primitive.name, [flops(jaxpr) for jaxpr in _jaxprs_in(eqn)]
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        lengths = (eqn.invars[0].aval.shape[axis] for axis in contracted)
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lengths)
    if name in DECOMPOSITIONS:
        *stack, _, n = eqn.invars[0].aval.shape
        return DECOMPOSITIONS[name] * math.prod(stack) * n**3
    return max(inner, default=0.0) if name == "cond" else sum(inner)


def _jaxprs_in(eqn: Any):
    leaves = jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    )
    for leaf in leaves:
        if hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr"):
            yield getattr(leaf, "jaxpr", leaf)


def refresh_flops(tx: optax.GradientTransformation, params: Any) -> float:
    """Return the flops that a refresh adds to an update of ``scale_by_kronecker``."""

    def update(told: int):
        def run(grads, state):
            return tx.update(grads, state._replace(told=np.int8(told)), grads)

        return jax.make_jaxpr(run)(params, jax.eval_shape(tx.init, params)).jaxpr

    return flops(update(REFRESH)) - flops(update(0))


def collectives(text: str) -> collections.Counter:
    """Return how many collectives of each kind a compiled program holds."""
    return collections.Counter(COLLECTIVE.findall(text))


def result_bytes(text: str) -> collections.Counter:
    """Return how many bytes the results of a compiled program's collectives have, by kind."""
    found = collections.Counter()
    for line in text.splitlines():
        kind = COLLECTIVE.search(line)
        if kind is None:
            continue
        for dtype, shape in RESULT.findall(line[: kind.start()].split(" = ", 1)[1]):
            numbers = math.prod(map(int, shape.split(","))) if shape else 1
            found[kind[1]] += numbers * (1 if dtype == "pred" else int(dtype[-2:]) // 8)
    return found
