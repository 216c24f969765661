"""Finding the layers of a model in its traced loss.

In: the jaxpr of a loss, whose first inputs are the parameter leaves. Out: ``Layers``, with the plan
(which equations to tap, in which nested jaxpr), and for every leaf that no tap reaches, why.

The jaxpr is walked once, following every parameter leaf through reshapes, casts, inner functions
and loops until a product takes it, and every layer's output up to its bias. A primitive without a
rule ends the way of what it touches: the leaf is reported, never silently dropped. Here are the
rules of the primitives that make a layer: those that move entries about, products, and additions.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from optalr.signals.tracing import inner, pieces
from optalr.signals.tracing.convolutions import conv_site
from optalr.signals.tracing.dots import dot_site
from optalr.signals.tracing.jaxprs import CALLS
from optalr.signals.tracing.reach.verdicts import no_layers
from optalr.signals.tracing.site import Product, Site
from optalr.signals.tracing.views import (
    REARRANGEMENTS,
    Atom,
    Joined,
    NotALayer,
    Seen,
    Stretch,
    View,
    axes_of,
    identity_view,
    parts_of,
    rearrange,
)
from optalr.signals.tracing.walk import Findings, FollowRule, Layers, Spot, Walk, give_up

# Primitives whose output is their first operand, entry for entry. Casts are among them: moments are
# taken of the operands as the product sees them, and factors are float32 in any case.
_UNCHANGED = frozenset({
    "convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint", "name",
    "pvary", "pcast", "pbroadcast", "optimization_barrier", "mesh_cast", "reshard",
})  # fmt: skip


# The products that make a layer.
_SITE_MAKERS: Mapping[str, Callable[[Product], Site]] = MappingProxyType(
    {"dot_general": dot_site, "conv_general_dilated": conv_site}
)


def find_layers(
    closed: Any,
    leaf_shapes: Sequence[tuple[int, ...]],
    *,
    num_held: int = 0,
    num_outputs: int | None = None,
) -> Layers:
    """Find the layers of a traced loss.

    Args:
      closed: the ``ClosedJaxpr`` of the loss; its first inputs are the parameter leaves.
      leaf_shapes: the leaves' shapes.
      num_held: how many of the inputs after the leaves are constants of the loss, no arguments.
      num_outputs: how many of its first outputs are differentiated; None for all.

    Returns:
      The plan and what it covers.
    """
    inputs: list[Seen] = [None] * len(closed.jaxpr.invars)
    for leaf, shape in enumerate(leaf_shapes):
        inputs[leaf] = identity_view(leaf, shape)
    walk = Walk(Findings(leaf_shapes), _RULES, mesh_sizes={})
    plan, _ = walk(closed.jaxpr, inputs)
    walk.findings.drop(no_layers(closed.jaxpr, plan, (len(leaf_shapes), num_held, num_outputs)))
    return walk.findings.settle(plan)


def _pass_unchanged(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Follow arrays through one of ``_UNCHANGED``, each operand to its output."""
    del walk, spot
    return seen


def _pass_rearrangement(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Follow an array through a transpose, squeeze, reshape or broadcast."""
    first = seen[0]
    if first is None:  # a dynamic size looks at something, the array does not
        return give_up(walk, spot, seen)
    moved = rearrange(spot.equation, first)
    # A layer's output is not noted (``note`` looks at parameters only): it just ends here.
    if moved is None:
        walk.findings.note(first, "reshaped across its axes before its product")
    return [moved]


def _pass_addition(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Pair a layer's output with the bias added to it; other addends change nothing."""
    shape = tuple(spot.equation.outvars[0].aval.shape)
    # A layer's output stays one after the sum (of two branches, say), unless it is broadcast.
    outputs = [x for x in seen if x is not None and not x.is_parameter and x.shape == shape]
    output = outputs[0] if outputs else None
    for parameter in seen:
        if parameter is None or not parameter.is_parameter:
            continue
        pairs = _bias_pairs(output, parameter, walk.findings.leaf_shapes)
        walk.findings.bias_uses.extend(pairs)
        if not pairs:
            walk.findings.note(parameter, "used by add")
    return [output]


def _pass_product(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Try to read a product of data and a parameter as a layer, of each leaf in its kernel."""
    # A product of two parameters depends on both in ways that no Kronecker factor describes.
    kernels = [i for i, look in enumerate(seen) if look is not None and look.is_parameter]
    if len(kernels) != 1:
        for kernel in kernels:
            walk.findings.note(seen[kernel], "multiplied by another parameter")
        return []
    make, (kernel,) = _SITE_MAKERS[spot.equation.primitive.name], kernels
    sites: list[Site] = []
    for part, window in _windows(seen[kernel]):
        shape = walk.findings.leaf_shapes[part.source]
        try:
            pieces.check_scales(part)
            site = make(Product(spot.jaxpr, spot.equation, kernel, part, shape, window))
            if part.cut is not None:
                pieces.check_cut(part.cut, site)
            sites.append(site)
        except NotALayer as reason:
            walk.findings.note(part, str(reason))
    if not sites:
        return []
    return [_joined_output(walk.tap(spot, sites), tuple(spot.equation.outvars[0].aval.shape))]


def _windows(kernel: Seen) -> list[tuple[View, Stretch | None]]:
    """Return the leaves in a kernel, with their places in it if they were concatenated."""
    if not isinstance(kernel, Joined):
        return [(view, None) for view in parts_of(kernel)]
    return [
        (view, Stretch(kernel.axis, start, view.shape[kernel.axis]))
        for view, start in zip(kernel.parts, kernel.starts(), strict=True)
    ]


def _joined_output(sites: list[Site], shape: tuple[int, ...]) -> Seen:
    """Return what a product's output looks at, given the sites of the leaves in its kernel."""
    outputs = [site.output_view() for site in sites]
    if outputs[0].shape == shape:
        return outputs[0]
    # Kernels joined along their outputs: each layer's output is a stretch of the product's.
    differ = [i for i, size in enumerate(shape) if size != outputs[0].shape[i]]
    joined = Joined(tuple(outputs), differ[0])
    return joined if joined.shape == shape else None


def _bias_pairs(
    output: Seen, parameter: Seen, leaf_shapes: Sequence[tuple[int, ...]]
) -> list[tuple[Site, int]]:
    """Return (layer, leaf) for each bias in ``parameter``; nothing unless all of it is biases."""
    if isinstance(output, Joined) and isinstance(parameter, Joined):
        # Joined layers and joined biases must be cut at the same places, counted from the right:
        # the biases lack the dimensions of the batch.
        offset = len(output.shape) - len(parameter.shape)
        if output.axis != parameter.axis + offset or output.starts() != parameter.starts():
            return []
    elif not isinstance(output, View) or not isinstance(parameter, View):
        return []
    pairs = list(zip(parts_of(output), parts_of(parameter), strict=True))
    if not all(_is_bias(out, bias, leaf_shapes[bias.source]) for out, bias in pairs):
        return []
    return [(out.source, bias.source) for out, bias in pairs]


def _is_bias(output: View, parameter: View, leaf_shape: tuple[int, ...]) -> bool:
    """Return whether ``parameter`` has one entry for each feature of the layer's ``output``."""
    offset = len(output.dims) - len(parameter.dims)
    # Part of a bias, or a bias of part of a layer, has no factor that fits it.
    # So has one that is scaled: its gradients are as many times those of the layer's outputs.
    if parameter.scales or parameter.cut is not None or output.source.view.cut is not None:
        return False
    # Layers that a scan stacks along their leading axes need biases stacked in the same way.
    if offset < 0 or parameter.scanned != tuple(range(len(output.source.view.scanned))):
        return False
    atoms: list[Atom] = []
    for axis, out_dim in enumerate(output.dims):
        dim = parameter.dims[axis - offset] if axis >= offset else ()
        of_layer = [a for a in out_dim if a.axis >= 0]
        if of_layer:
            if any(a.axis < 0 for a in (*dim, *out_dim)):
                return False
            if [a.size for a in of_layer if a.size > 1] != [a.size for a in dim if a.size > 1]:
                return False
            atoms.extend(dim)
        elif any(a.axis >= 0 and a.size > 1 for a in dim):
            # An entry for each example or position is an embedding, say, but no bias.
            return False
    axes = set(axes_of(atoms)) | set(parameter.scanned)
    every_axis_used = all(axis in axes or size == 1 for axis, size in enumerate(leaf_shape))
    return every_axis_used and bool(leaf_shape)


# The rule of each primitive that can be followed. Some primitives have had several names in the
# releases of jax that we support.
_RULES: Mapping[str, FollowRule] = MappingProxyType({
    **dict.fromkeys(_UNCHANGED, _pass_unchanged),
    **dict.fromkeys(REARRANGEMENTS, _pass_rearrangement),
    "concatenate": pieces.pass_concatenation,
    "slice": pieces.pass_slice,
    "split": pieces.pass_split,
    **dict.fromkeys(("mul", "div"), pieces.pass_scaling),
    **dict.fromkeys(("add", "add_any"), _pass_addition),
    **dict.fromkeys(_SITE_MAKERS, _pass_product),
    **dict.fromkeys(CALLS, inner.enter_call),
    **dict.fromkeys(("remat2", "checkpoint", "remat"), inner.enter_remat),
    "scan": inner.enter_scan,
    "cond": inner.enter_branches,
    "shard_map": inner.enter_shard_map,
    "custom_jvp_call": inner.enter_custom_jvp,
})  # fmt: skip
