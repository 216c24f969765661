"""What the variables of a jaxpr depend on, and which of them a derivative of its outputs feels.

In: a jaxpr, its plan, what its inputs depend on, and which of its outputs are differentiated. Out:
the *origins* of each variable, a set of bits, and the variables that are *felt*: those that reach
such an output by a path along which derivatives flow.

Where an equation is none of the kinds known here, all its outputs depend on all its inputs, and all
its inputs are felt if one of its outputs is. That can keep a product that is no layer, but it never
loses one that is.
"""

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from optalr.signals.tracing.inner import scan_arity
from optalr.signals.tracing.jaxprs import has_tangent, is_literal, open_jaxpr
from optalr.signals.tracing.walk import Plan

# Bits of an origin. Constants made on the way share the first one. The inputs of the whole, and the
# constants that it closes over, have one each, from the second one on. A number of all bits says
# that anything may have come in.
_MADE = 1
_ANYTHING = -1


def input_bit(index: int) -> int:
    """Return the bit of an input of the whole, or (after the inputs) of one of its constants."""
    return 2 << index


# Primitives whose derivative is zero, though their outputs are floating numbers.
_FLAT = frozenset({"stop_gradient", "sign", "floor", "ceil", "round", "nextafter"})

# Primitives that run their one jaxpr once, as it stands.
_CALLS = frozenset({
    "jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat", "shard_map",
})  # fmt: skip


class Frame(NamedTuple):
    """A jaxpr with what is known at its borders.

    Fields:
      jaxpr: the jaxpr.
      plan: what to tap in it.
      inputs: the origins of its inputs.
      outputs: whether each of its outputs is felt.
      constants: the origins of the first of its constants.
    """

    jaxpr: Any
    plan: Plan
    inputs: Sequence[int]
    outputs: Sequence[bool]
    constants: Sequence[int] = ()

    def origins(self) -> dict[Any, int]:
        """Return what each of its variables depends on."""
        return origins(self.jaxpr, self.inputs, self.constants)

    def felt_inputs(self) -> list[bool]:
        """Return whether each of its inputs is felt."""
        felt = felt_variables(self, self.origins())
        return [var in felt for var in self.jaxpr.invars]


def union(bits: Iterable[int]) -> int:
    """Return all bits that are in any."""
    return functools.reduce(operator.or_, bits, 0)


def look_up(found: Mapping[Any, int], variables: Iterable[Any]) -> list[int]:
    """Return the origins of some variables; a number that is written into an equation has none."""
    return [0 if is_literal(var) else found.get(var, _MADE) for var in variables]


def origins(jaxpr: Any, inputs: Sequence[int], constants: Sequence[int] = ()) -> dict[Any, int]:
    """Return what each variable depends on, given what the inputs depend on."""
    found: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
    found.update(zip(jaxpr.constvars, constants, strict=False))
    for equation in jaxpr.eqns:
        bits = look_up(found, equation.invars)
        found.update(zip(equation.outvars, _output_origins(equation, bits), strict=True))
    return found


def felt_variables(frame: Frame, found: Mapping[Any, int]) -> set[Any]:
    """Return the variables that a derivative of the outputs feels, given all origins."""
    jaxpr, felt = frame.jaxpr, set[Any]()

    def feel(variables: Sequence[Any], which: Sequence[bool]) -> None:
        # Masks, indices and counts take part in a derivative, but none is taken by them.
        pairs = zip(variables, which, strict=True)
        felt.update(v for v, yes in pairs if yes and not is_literal(v) and has_tangent(v))

    feel(jaxpr.outvars, frame.outputs)
    for index in reversed(range(len(jaxpr.eqns))):
        equation = jaxpr.eqns[index]
        outputs = [var in felt for var in equation.outvars]
        if _holds_reference(equation):  # what is written may be read anywhere
            outputs = [True] * len(outputs)
        elif not any(outputs):
            continue
        which = _felt_inputs(
            frame.plan, index, (equation, look_up(found, equation.invars), outputs)
        )
        feel(equation.invars, which)
    return felt


# An equation, the origins of its inputs, and whether each of its outputs is felt.
Surrounded = tuple[Any, Sequence[int], Sequence[bool]]


def frames_in(plans: Sequence[Plan], surrounded: Surrounded) -> list[Frame]:
    """Return the jaxprs that an equation runs on its last inputs; nothing if that is unknown."""
    equation, bits, outputs = surrounded
    inner = _inner_origins(equation, bits)
    if not inner:
        return []
    plans = plans or [Plan() for _ in inner]
    frames = [
        Frame(jaxpr, plan, inside, outputs)
        for plan, (jaxpr, inside) in zip(plans, inner, strict=True)
    ]
    if equation.primitive.name != "scan":
        return frames
    (frame,), (num_consts, num_carry) = frames, scan_arity(equation)
    while True:
        # What one step hands on is felt if the next step feels it.
        carried = frame.felt_inputs()[num_consts : num_consts + num_carry]
        carried = [a or b for a, b in zip(carried, frame.outputs[:num_carry], strict=True)]
        grown = frame._replace(outputs=[*carried, *frame.outputs[num_carry:]])
        if grown.outputs == list(frame.outputs):
            return [grown]
        frame = grown


def _felt_inputs(plan: Plan, index: int, surrounded: Surrounded) -> list[bool]:
    """Return whether each input of an equation is felt, given that one of its outputs is."""
    equation, bits, _ = surrounded
    if equation.primitive.name in _FLAT:
        return [False] * len(bits)
    nested, scaling = plan.nested.get(index), plan.scalings.get(index)
    frames = frames_in(nested.plans if nested is not None else (), surrounded)
    which = [True] * len(bits)
    if frames:
        inside = [any(felt) for felt in zip(*(f.felt_inputs() for f in frames), strict=True)]
        which = [*[False] * (len(bits) - len(inside)), *inside]
    # The σ of W/σ is computed from W: it is a part of the weights, and no layer stands in it.
    if scaling is not None and any(bits[scaling.operand] & input_bit(i) for i in scaling.leaves):
        which[scaling.operand] = False
    return which


def _output_origins(equation: Any, bits: Sequence[int]) -> list[int]:
    inner = _inner_origins(equation, bits)
    if not inner:
        whole = _ANYTHING if _holds_reference(equation) else union(bits) or _MADE
        return [whole] * len(equation.outvars)
    found = [look_up(origins(jaxpr, inside), jaxpr.outvars) for jaxpr, inside in inner]
    chosen_by = union(bits[: len(bits) - len(inner[0][1])])
    return [union(alternatives) | chosen_by for alternatives in zip(*found, strict=True)]


def _inner_origins(equation: Any, bits: Sequence[int]) -> list[tuple[Any, Sequence[int]]]:
    """Return the jaxprs that an equation runs on its last inputs, with these inputs' origins."""
    name, params = equation.primitive.name, equation.params
    if name in _CALLS:
        # An old name of a call keeps its jaxpr elsewhere.
        return [(open_jaxpr(params["jaxpr" if "jaxpr" in params else "call_jaxpr"]), bits)]
    if name == "cond":
        return [(open_jaxpr(branch), bits[1:]) for branch in params["branches"]]
    if name != "scan":
        return []
    body, (num_consts, num_carry) = open_jaxpr(params["jaxpr"]), scan_arity(equation)
    inside, end = list(bits), num_consts + num_carry
    while True:
        # What one step hands on comes to the next.
        handed_on = look_up(origins(body, inside), body.outvars[:num_carry])
        carried = [a | b for a, b in zip(inside[num_consts:end], handed_on, strict=True)]
        if carried == inside[num_consts:end]:
            return [(body, inside)]
        inside[num_consts:end] = carried


def _holds_reference(equation: Any) -> bool:
    """Return whether an equation reads or writes an array that can be changed in place."""
    return any(hasattr(var.aval, "inner_aval") for var in equation.invars)
