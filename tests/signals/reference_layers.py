"""What goes into each product of a layer, for the brute-force reference: rows, or patches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


def conv_patches(x, kernel, strides, padding, rhs_dilation=None, lhs_dilation=None):
    """Return the patches ``(N, *out, area * C)`` of channels-last data, channels minor."""
    spatial = "DHW"[3 - len(kernel) :]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    patches = jax.lax.conv_general_dilated_patches(
        x,
        tuple(kernel),
        tuple(strides),
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=numbers,
    )
    patches = patches.reshape(*patches.shape[:-1], x.shape[-1], math.prod(kernel))
    return jnp.swapaxes(patches, -1, -2).reshape(*patches.shape[:-2], -1)


def group_patches(patches, area, groups):
    """Return ``(..., groups, area * C/groups)``: the groups' patches as further positions."""
    patches = patches.reshape(*patches.shape[:-1], area, groups, -1)
    return jnp.swapaxes(patches, -2, -3).reshape(*patches.shape[:-3], groups, -1)


def linen_layer(layer):
    """Intercept Flax linen's modules: ``layer(path, inputs, outputs)`` at each product."""

    def interceptor(next_fun, args, kwargs, context):
        module = context.module
        if isinstance(module, nn.Dropout):
            return _dropout(module, args[0])
        outputs = next_fun(*args, **kwargs)
        name = "/".join(module.path)
        if context.method_name == "attend" and isinstance(module, nn.Embed):
            return layer(name, args[0], outputs)
        if context.method_name != "__call__":
            return outputs
        if isinstance(module, nn.Dense | nn.DenseGeneral | nn.Conv | nn.ConvTranspose):
            x = args[0] if module.dtype is None else args[0].astype(module.dtype)
        if isinstance(module, nn.Dense):
            return layer(name, x, outputs)
        if isinstance(module, nn.DenseGeneral):
            return _general(layer, name, module, x, outputs)
        if isinstance(module, nn.Conv | nn.ConvTranspose):
            return layer(name, _linen_patches(module, x), outputs)
        return outputs

    return nn.intercept_methods(interceptor)


def _dropout(module, x):
    """Drop what float32 would drop: with x64 on, the same key gives other random numbers."""
    keep = np.float32(1.0 - module.rate)
    mask = jax.random.bernoulli(module.make_rng("dropout"), keep, x.shape)
    return jnp.where(mask, x / (1.0 - module.rate), 0.0)


def _general(layer, name, module, x, outputs):
    axes = module.axis if isinstance(module.axis, tuple) else (module.axis,)
    axes = tuple(axis % x.ndim for axis in axes)
    free = [axis for axis in range(x.ndim) if axis not in axes]
    alpha = jnp.transpose(x, (*free, *axes)).reshape(
        *(x.shape[axis] for axis in free), math.prod(x.shape[axis] for axis in axes)
    )
    flat = outputs.reshape(*(x.shape[axis] for axis in free), -1)
    return layer(name, alpha, flat).reshape(outputs.shape)


def _linen_patches(module, x):
    kernel = module.kernel_size
    ones = (1,) * len(kernel)
    strides = module.strides if isinstance(module.strides, tuple) else (module.strides or 1,)
    strides = strides if len(strides) == len(kernel) else strides * len(kernel)
    dilation = module.kernel_dilation if isinstance(module.kernel_dilation, tuple) else ones
    if isinstance(module, nn.ConvTranspose):
        assert module.padding == "VALID"
        padding = [(k - 1, k - 1 + max(s - k, 0)) for k, s in zip(kernel, strides, strict=True)]
        return conv_patches(x, kernel, ones, padding, lhs_dilation=strides)
    padding = module.padding
    if padding == "CIRCULAR":
        raise NotImplementedError
    patches = conv_patches(x, kernel, strides, padding, rhs_dilation=dilation)
    return group_patches(patches, math.prod(kernel), module.feature_group_count)
