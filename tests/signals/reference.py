"""Layer moments by brute force, in float64 and without a jaxpr.

A model calls ``layer(name, inputs, outputs)`` at every product (a Flax model is left as it is: its
modules are intercepted). The reference keeps the inputs, and differentiates the loss by what it
adds to the outputs.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import optalr
from optalr.signals.moments import LayerMoments
from tests.references import enable_x64


def no_layer(name, inputs, outputs):
    del name, inputs
    return outputs


def reference_moments(model, params, x, y, num_examples, dtype=jnp.float64):
    """Return ``{name: (A, B, mean)}``; inputs are ``(..., R, m)``, outputs any shape.

    ``model(params, x, y, layer)`` returns the loss. Uses of one name add up as positions. With
    ``dtype`` None the arrays stay as they are.
    """
    with enable_x64():
        if dtype is not None:
            params, x = jax.tree.map(
                lambda a: jnp.asarray(a, dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a,
                (params, x),
            )
        shapes = {}

        def discover(name, alpha, outputs):
            del alpha
            shapes.setdefault(name, []).append((outputs.shape, outputs.dtype))
            return outputs

        jax.eval_shape(lambda p, x: model(p, x, y, discover), params, x)
        zeros = {name: [jnp.zeros(*s) for s in shape] for name, shape in shapes.items()}

        def perturbed(added, params, x):
            inputs = {name: [] for name in added}

            def add(name, alpha, outputs):
                inputs[name].append(alpha)
                return outputs + added[name][len(inputs[name]) - 1]

            return model(params, x, y, add), inputs

        betas, inputs = jax.jit(jax.grad(perturbed, has_aux=True))(zeros, params, x)
        moments = {}
        for name, uses in inputs.items():
            alpha = np.concatenate(
                [np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in uses]
            )
            beta = np.concatenate(
                [
                    np.asarray(b, np.float64).reshape(-1, b.shape[-1]) * num_examples
                    for b in betas[name]
                ]
            )
            moments[name] = (
                alpha.T @ alpha / len(alpha),
                beta.T @ beta / num_examples,
                alpha.mean(0),
            )
        return moments


def assert_moments(captured: LayerMoments, expected, rtol=1e-5):
    """Compare one layer with ``(A, B, mean)``, whichever way its leaf is oriented."""
    inputs, outputs, mean = expected
    if captured.col_mean is not None:
        actual = (captured.cols, captured.rows, captured.col_mean)
    else:
        actual = (captured.rows, captured.cols, captured.row_mean)
    for got, want in zip(actual, (inputs, outputs, mean), strict=True):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max())


def random_params(init, *args, scale=0.4, seed=0):
    """Return parameters of the shapes that ``init(*args)`` would give, none of them zero."""
    rng = np.random.default_rng(seed)
    fill = lambda s: jnp.asarray(scale * rng.standard_normal(s.shape), s.dtype)  # noqa: E731
    return jax.tree.map(fill, jax.eval_shape(init, *args))


def leaf_at(tree, path):
    """Return the node of nested dicts (or attributes) at a path such as ``"a/b/kernel"``."""
    for part in path.split("/"):
        tree = tree[part] if isinstance(tree, dict) else getattr(tree, part)
    return tree


def stack_slice(moments, index):
    """Return one layer of a stack of layers."""
    pick = lambda a: None if a is None else a[index]  # noqa: E731
    return LayerMoments(
        pick(moments.rows),
        pick(moments.cols),
        pick(moments.row_mean),
        pick(moments.col_mean),
        moments.count,
        moments.positions,
        moments.bias,
    )


def check_capture(loss, params, args, expected=None, kernels=None, *, has_aux=False, **options):
    """Capture under jit: gradients bit-equal to jax's, moments as expected; return ``extras``.

    Args:
      loss: ``loss(params, *args)``.
      expected: what ``reference_moments`` returned.
      kernels: maps names in ``expected`` to leaves of the parameters; ``"name/kernel"`` if None.
      options: of ``value_grad_and_extras``; also ``rtol`` of the moments, and ``gradient_rtol``
        where XLA is known to compile the gradient's sums in another order beside the moments.
    """
    rtol, gradient_rtol = options.pop("rtol", 1e-5), options.pop("gradient_rtol", 0.0)
    # Bits are equal where XLA optimizes, as it does for users: unlike the rest of the suite.
    jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    evaluate = jit(optalr.value_grad_and_extras(loss, has_aux=has_aux, **options))
    value, grads, extras = evaluate(params, *args)
    plain = jit(jax.value_and_grad(loss, has_aux=has_aux))
    expected_value, expected_grads = plain(params, *args)
    same = partial(np.testing.assert_allclose, rtol=gradient_rtol, atol=0.0)
    jax.tree.map(same, (value, grads), (expected_value, expected_grads))
    for name, moments in (expected or {}).items():
        path = f"{name}/kernel" if kernels is None else kernels[name]
        leaf = leaf_at(extras["signals"], path) if isinstance(path, str) else path(extras)
        assert leaf is not None, f"{name} was not captured"
        assert_moments(leaf, moments, rtol)
    return extras


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
