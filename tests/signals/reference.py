"""Layer moments by brute force, in float64 and without a jaxpr.

A model calls ``layer(name, inputs, outputs)`` at every product (a Flax model is left as it is: its
modules are intercepted). The reference keeps the inputs, and differentiates the loss by what it
adds to the outputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import optalr
from optalr.signals.moments import LayerMoments
from tests.references import enable_x64

# Data and references are compiled in a hurry: LLVM's optimizations change no digit that is
# compared, and take most of the time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def _normal(shape):
    draw = functools.partial(jax.random.normal, shape=shape)
    return quick_jit(draw)


def standard_normal(key, *shape):
    """Draw ``jax.random.normal`` from a key or a seed, without its long compilation."""
    return _normal(shape)(jax.random.key(key) if isinstance(key, int) else key)


def cross_entropy(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1))


def no_layer(name, inputs, outputs):
    del name, inputs
    return outputs


def reference_moments(model, params, x, y, *, num_examples, dtype=jnp.float64):
    """Return ``{name: (A, B, mean)}``; inputs are ``(..., R, m)``, outputs any shape.

    ``model(params, x, y, layer)`` returns the loss. Uses of one name add up as positions. With
    ``dtype`` None the arrays stay as they are.
    """
    with enable_x64():
        if dtype is not None:
            # By NumPy: a cast by jax would be compiled for every shape.
            params, x = jax.tree.map(
                lambda a: np.asarray(a, dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a,
                (params, x),
            )
        shapes = {}

        def discover(name, alpha, outputs):
            del alpha
            shapes.setdefault(name, []).append((outputs.shape, outputs.dtype))
            return outputs

        jax.eval_shape(lambda p, x: model(p, x, y, discover), params, x)
        zeros = {name: [np.zeros(*s) for s in shape] for name, shape in shapes.items()}

        def perturbed(added, params, x):
            inputs = {name: [] for name in added}

            def add(name, alpha, outputs):
                inputs[name].append(alpha)
                return outputs + added[name][len(inputs[name]) - 1]

            return model(params, x, y, add), inputs

        gradient = quick_jit(jax.grad(perturbed, has_aux=True))
        betas, inputs = gradient(zeros, params, x)
        return {name: _moments(uses, betas[name], num_examples) for name, uses in inputs.items()}


def _moments(inputs, betas, num_examples):
    """Return ``(A, B, mean)`` of all uses of one layer."""
    alpha, beta = _rows(inputs), _rows(betas) * num_examples
    return alpha.T @ alpha / len(alpha), beta.T @ beta / num_examples, alpha.mean(0)


def _rows(uses):
    return np.concatenate([np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in uses])


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
    jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    evaluate = jit(optalr.value_grad_and_extras(loss, has_aux=has_aux, **options))
    value, grads, extras = evaluate(params, *args)
    plain = jit(jax.value_and_grad(loss, has_aux=has_aux))
    expected_value, expected_grads = plain(params, *args)
    same = functools.partial(np.testing.assert_allclose, rtol=gradient_rtol, atol=0.0)
    jax.tree.map(same, (value, grads), (expected_value, expected_grads))
    for name, moments in (expected or {}).items():
        path = f"{name}/kernel" if kernels is None else kernels[name]
        leaf = leaf_at(extras["signals"], path) if isinstance(path, str) else path(extras)
        assert leaf is not None, f"{name} was not captured"
        assert_moments(leaf, moments, rtol)
    return extras
