"""Products of data and a parameter: the equations that are layers.

In: what the equation's inputs look at. Out: what the layer's output looks at, so that its bias is
found; the layer's site goes into the plan and the findings, or the reason why it is none.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from optalr.signals.tracing.compat import varying_axes
from optalr.signals.tracing.joined import Joined, Seen, parts_of
from optalr.signals.tracing.sides import NotALayer
from optalr.signals.tracing.sites.convolutions import conv_site
from optalr.signals.tracing.sites.dots import dot_site
from optalr.signals.tracing.sites.hand import hand_site
from optalr.signals.tracing.sites.site import KernelPart, Product, Site, Window
from optalr.signals.tracing.views import View
from optalr.signals.tracing.walk import Spot, Walk

_SITE_MAKERS: Mapping[str, Callable[[Product, KernelPart], Site]] = MappingProxyType(
    {"dot_general": dot_site, "conv_general_dilated": conv_site}
)
PRODUCTS = frozenset(_SITE_MAKERS)


def pass_product(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Try to read a product of data and a parameter as a layer, of each leaf in its kernel."""
    # A product of two parameters depends on both in ways that no Kronecker factor describes.
    kernels = [i for i, look in enumerate(seen) if look is not None and look.is_parameter]
    if len(kernels) != 1:
        for kernel in kernels:
            walk.findings.note(seen[kernel], "multiplied by another parameter")
        return []
    product = Product(spot.jaxpr, spot.equation, kernels[0])
    sites = []
    for part in _kernel_parts(walk, seen[product.kernel]):
        try:
            sites.append(_across_devices(walk, _site(product, part)))
        except NotALayer as reason:
            walk.findings.note(part.view, str(reason))
    if not sites:
        return []
    walk.findings.sites.extend(sites)
    spot.plan.taps[spot.index] = tuple(sites)
    return [_joined_output(sites, tuple(spot.equation.outvars[0].aval.shape))]


def take_hand_tap(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Take a layer that the user declared."""
    # The mark's inputs are outputs, inputs and kernel, in this order.
    view = seen[2]
    if not isinstance(view, View) or not view.is_parameter or view.cut is not None:
        walk.findings.note(view, "tapped by hand, but not as a whole leaf")
        return [seen[0]]
    product = Product(spot.jaxpr, spot.equation, 2)
    try:
        site = hand_site(product, view, walk.findings.leaf_shapes[view.source])
    except NotALayer as reason:
        walk.findings.note(view, str(reason))
        return [seen[0]]
    site = _across_devices(walk, site)
    walk.findings.sites.append(site)
    spot.plan.taps[spot.index] = (site,)
    return [site.output_view()]


def _kernel_parts(walk: Walk, kernel: Seen) -> list[KernelPart]:
    """Return the leaves in a kernel, with their places in it if they were concatenated."""
    shapes = walk.findings.leaf_shapes
    if not isinstance(kernel, Joined):
        return [KernelPart(view, shapes[view.source]) for view in parts_of(kernel)]
    windows = [
        Window(kernel.axis, start, view.shape[kernel.axis])
        for view, start in zip(kernel.parts, kernel.starts(), strict=True)
    ]
    return [
        KernelPart(view, shapes[view.source], window)
        for view, window in zip(kernel.parts, windows, strict=True)
    ]


def _site(product: Product, part: KernelPart) -> Site:
    site = _SITE_MAKERS[product.equation.primitive.name](product, part)
    if not site.fits_its_cut(part.leaf_shape):
        raise NotALayer("cut along one of several axes on a side of its product")
    return site


def _across_devices(walk: Walk, site: Site) -> Site:
    """Return the site with the examples of all devices that hold a part of its input."""
    # Shapes inside a shard_map are those of one device. Only axes over which the input varies
    # hold other examples; over the rest every device sees the same.
    data, _ = site.operands(site.equation.invars)
    varying = varying_axes(data.aval)
    inside = math.prod(walk.mesh_sizes[axis] for axis in varying if axis in walk.mesh_sizes)
    # The size of an axis around the loss is not known here: ``tapping`` asks for it when it runs.
    outside = tuple(sorted(axis for axis in varying if axis not in walk.mesh_sizes))
    return dataclasses.replace(site, num_examples=site.num_examples * inside, outer_axes=outside)


def _joined_output(sites: list[Site], shape: tuple[int, ...]) -> Seen:
    """Return what a product's output looks at, given the sites of the leaves in its kernel."""
    outputs = [site.output_view() for site in sites]
    if outputs[0].shape == shape:
        return outputs[0]
    # Kernels joined along their outputs: each layer's output is a stretch of the product's.
    differ = [i for i, size in enumerate(shape) if size != outputs[0].shape[i]]
    joined = Joined(tuple(outputs), differ[0])
    return joined if joined.shape == shape else None
