"""Which of the products that were found are no layers after all.

In: a traced loss and the plan of what to tap in it. Out: the products to leave alone, each with the
reason to report.

A layer takes examples of the batch, and what comes out of it moves the loss. A product that the
loss does not feel, one that sees none of the loss's arguments, and one of a single vector beside
layers of many examples are parts of how weights or tables are computed: a power iteration, a
hypernetwork, an encoding of positions.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from optalr.signals.tracing.inner import CustomJvp, Scan
from optalr.signals.tracing.reach.flow import (
    Frame,
    felt_variables,
    frames_in,
    input_bit,
    look_up,
    union,
)
from optalr.signals.tracing.site import Site
from optalr.signals.tracing.walk import Plan

_UNFELT = "multiplied where no derivative of the loss arrives"
_UNFELT_BY_HAND = "tapped by hand, but the loss does not use what tap_layer returned"
_UNFED = "multiplied by what depends on no argument of the loss"
_SINGLE = "multiplied by one vector, where other layers see a batch"


class _Found(NamedTuple):
    """A product that was found, and what reaches it.

    Fields:
      site: the product.
      is_felt: whether the loss feels its output.
      origins: what its data depends on.
      in_loop: whether it is inside a scan.
    """

    site: Site
    is_felt: bool
    origins: int
    in_loop: bool


def no_layers(jaxpr: Any, plan: Plan, sizes: tuple[int, int, int | None]) -> dict[Site, str]:
    """Return the products of a traced loss that are no layers, each with the reason.

    Args:
      jaxpr: the loss's; its first inputs are the parameter leaves.
      plan: what was found in it.
      sizes: how many parameter leaves there are, how many of the inputs after them are constants of
        the loss, and how many of the first outputs are differentiated (None for all).
    """
    num_leaves, num_held, num_outputs = sizes
    bits = [input_bit(i) for i in range(len(jaxpr.invars) + len(jaxpr.constvars))]
    inputs, constants = bits[: len(jaxpr.invars)], bits[len(jaxpr.invars) :]
    felt = [num_outputs is None or i < num_outputs for i in range(len(jaxpr.outvars))]
    found = list(_look_into(Frame(jaxpr, plan, inputs, felt, constants), in_loop=False))
    unfelt = [x.site for x in found if not x.is_felt]
    reasons = {site: _UNFELT_BY_HAND if site.by_hand else _UNFELT for site in unfelt}
    # What the user declares to be a layer is one, if the loss feels it.
    left = [x for x in found if x.is_felt and not x.site.by_hand]
    unfed = _unfed(left, union(inputs[num_leaves + num_held :]))
    left = [x for x in left if x.site not in unfed]
    reasons.update(dict.fromkeys(unfed, _UNFED))
    reasons.update(dict.fromkeys(_single(left, union(inputs[:num_leaves])), _SINGLE))
    return reasons


def _unfed(found: list[_Found], arguments: int) -> set[Site]:
    """Return the products that see none of the loss's ``arguments``, where others do."""
    fed = [x.site for x in found if x.origins & arguments]
    # A batch that the loss closes over is a constant like any table. It is taken for the batch
    # where no product sees an argument, and where it has as many examples as those that do: then
    # the arguments are random keys or running averages, say. Further uses of a kernel that sees
    # arguments elsewhere are uses like any other.
    sizes, leaves = {site.num_examples for site in fed}, {site.leaf for site in fed}
    return {
        x.site
        for x in found
        if fed
        and not x.origins & arguments
        and x.site.num_examples not in sizes
        and x.site.leaf not in leaves
    }


def _single(found: list[_Found], leaves: int) -> set[Site]:
    """Return the products of a single vector that does not come from what others see a batch of."""
    # A batch of one, and what is pooled of many rows, are single vectors too. They come from the
    # data that the layers of many rows see. What else there is comes from elsewhere, as the
    # vectors of a power iteration do.
    batches = {x.origins & ~leaves for x in found if x.site.num_examples > 1} - {0}
    # Steps of a loop may be examples, and so may devices.
    single = [
        x for x in found if x.site.sees_one_vector and not x.in_loop and not x.site.outer_axes
    ]
    # A state that begins with zeros comes from nowhere at its first step, and belongs to the rest.
    kept = {x.site.leaf for x in single if any(not batch & ~x.origins for batch in batches)}
    return {x.site for x in single if batches and x.site.leaf not in kept}


def _look_into(frame: Frame, *, in_loop: bool) -> Iterator[_Found]:
    """Iterate over the products in a jaxpr and in the jaxprs in it."""
    bits = frame.origins()
    felt = felt_variables(frame, bits)
    for index, sites in frame.plan.taps.items():
        equation = frame.jaxpr.eqns[index]
        for site in sites:
            data, _ = site.operands(equation.invars)
            yield _Found(site, equation.outvars[0] in felt, look_up(bits, [data])[0], in_loop)
    for index, nested in frame.plan.nested.items():
        equation = frame.jaxpr.eqns[index]
        outer = look_up(bits, equation.invars)
        outputs = [var in felt for var in equation.outvars]
        inner = (
            [_derivative_frame(nested, bits, outputs)]
            if isinstance(nested, CustomJvp)
            else frames_in(nested.plans, (equation, outer, outputs))
        )
        for each in inner:
            yield from _look_into(each, in_loop=in_loop or isinstance(nested, Scan))


def _derivative_frame(nested: CustomJvp, bits: dict[Any, int], outputs: list[bool]) -> Frame:
    """Return the frame of a user's derivative, whose last inputs are tangents."""
    derivative = nested.derivative
    values = look_up(bits, derivative.variables)
    inputs = [*values, *(values[i] for i in derivative.inputs)]
    felt = [outputs[i] for i in derivative.outputs]
    return Frame(derivative.closed.jaxpr, nested.plans[0], inputs, felt)
