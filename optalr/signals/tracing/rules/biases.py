"""Which bias is added to which layer's output.

In: what the two operands of an addition look at. Out: the pairs of a layer and its bias, or none.
A bias shares the output factor of its layer, so a wrong pair would precondition it wrongly: what is
not certainly a bias is none.
"""

from collections.abc import Sequence

from optalr.signals.tracing.joined import Joined, Seen, parts_of
from optalr.signals.tracing.sides import axes_of
from optalr.signals.tracing.sites.site import Site
from optalr.signals.tracing.views import Atom, View


def bias_pairs(
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
    if parameter.cut is not None or output.source.view.cut is not None:
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
