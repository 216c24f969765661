"""A complete optimizer that takes the number of steps, and no learning rate."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import (
    check_count,
    check_interval,
    check_kind,
    check_mask,
    is_concrete,
)
from optalr.signals.coverage import Coverage
from optalr.states import settle
from optalr.transforms.kronecker.transform import KroneckerOptions, scale_by_kronecker
from optalr.transforms.learned_decay.transform import add_learned_decay
from optalr.transforms.recorded_rate import Rate, scale_by_recorded_rate
from optalr.transforms.shared.making import chained

# Chosen on the bench's development problems, and good for all of them: neither the batch size
# (32 to 2000), the width (32 to 256) nor the loss's scale asked for another rate. The rate belongs
# to the momentum: without any the transformer's loss stands still, with 0.9 the others end higher.
_RATE, _MOMENTUM = 0.06, 0.7
# The decay that learning starts from, and that stays where nothing is learned: over the run it
# alone would shrink a weight to e^-3.
_SHRINKAGE = 3.0
# How far the logarithm of the decay may move over a run, and the bounds of its factor.
_REACH, _LOW, _HIGH = 30.0, 1e-4, 100.0
# What a step may shrink weights by, at most: the slope answers a decay with a delay.
_MAX_SHRINK = 0.2
# Roots from the first batch on, so that no bare gradient, with its unit, is ever followed. What the
# batch has not shown is amplified by damping^-1/2 at most.
_EARLY = MappingProxyType({"warmup": 0.0, "min_batches": 1})
# What stands for the length of a run that has no stated end.
_OPEN_STEPS = 1000


def untuned(
    total_steps: int | None,
    *,
    scale: Any = 1.0,
    momentum: Any = 0.7,
    damping: Any = 0.1,
    update_every: Any = None,
    warmup_steps: int | None = None,
    learn_every: Any = 1,
    decay_mask: Any = None,
    statistics: str = "signals",
    layout: Coverage | None = None,
    mesh: Any = None,
    options: KroneckerOptions | Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train along F^{-1/2} g with a decay that validation batches teach, and no rate to choose.

    Choose it first, before any search for a rate. It needs to know how many steps the run has, and
    it should be given batches that are not trained on. With F the Kronecker-factored Fisher matrix
    of *one example*, as in ``scale_by_kronecker``, T the total steps and θ_m the leaves of two or
    more axes,

        v ← momentum · v + F^{-1/2} g
        θ ← θ − η_t (v + λ_t θ_m)
        η_t = scale · 0.06 · (1 + cos(π t/T))/2    after a warm-up over T/50 steps
        λ_t = λ₀ e^z,   λ₀ = 3/Σ η_t               z learned by ``add_learned_decay``

    *Why one rate serves.* F^{-1/2} g has no unit: the scale of the loss does not change its length.
    F is that of one example, so the noise in a step falls as ``1/√N`` with the batch. Large batches
    make small and sure steps.

    *Bounds.* λ stays between ``1e-4 λ₀`` and ``100 λ₀``, and below what would shrink a weight by a
    fifth in a step at the peak of the rate.

    *Why the decay is learned.* Strong optimizers fit few data perfectly, and end too confident.
    Decay cures that, but how much is wanted differs by a factor of a hundred from problem to
    problem; a slope of the validation loss says which way to go.

    *What to pass.* ``signals``, from ``value_grad_and_extras``. ``validation_value_fn``, the loss
    of a batch that is not trained on, as a function of the parameters (another batch at each step).
    A net with batch normalization should compute it as in training, by the batch's own statistics.

    *Without it* the decay stays λ₀. On the ten problems below (one seed) the test loss then ends
    11 % higher in the geometric mean: 7 to 63 % higher on five, most where examples are few and
    noisy, within 2 % on four, and a fifth lower on one. The learned decay looks one step ahead, and
    can ask for less than the whole run wants.

    *Without an end* (``total_steps=None``) the rate is ``0.06/√(1 + t/1000)`` and never reaches
    zero. On the ten problems below (one seed) that ends with a test loss 25 % higher.

    *Evidence.* Ten small nets on real data, three seeds (docs/untuned.md has the tables). The test
    loss ends lower than that of Adam tuned over 12 settings on all ten (geometric mean of the
    ratios 0.77), and than that of AdamW tuned over 48 settings on seven (0.82). It loses to AdamW
    by 4 and 7 % on the two nets with batch normalization, and by 1 % on a small table. A step takes
    1.4 to 6 times as long as Adam's on such nets on a CPU.

    Args:
      total_steps: T, the updates of the whole run, >= 1; None if they are not known. After them the
        rate is zero, and nothing moves.
      scale: what the rate is multiplied by, > 0.
      momentum: in [0, 1). The rate is meant for 0.7; it is scaled by ``(1 − momentum)/0.3``.
      damping: >= 0, relative to a factor's mean eigenvalue.
      update_every: updates between two roots, >= 1; None for a fortieth of the run, at most 50.
      warmup_steps: W >= 1, steps over which the rate rises linearly; None for T/50.
      learn_every: steps between probes, >= 1. More save time and learn from fewer batches.
      decay_mask: the leaves that decay, as the ``mask`` of ``add_learned_decay``.
      statistics: ``"signals"``, or ``"gradient"``, which needs no captured signals.
      layout: what ``optalr.coverage(loss_fn, params, *args)`` returned, where it is needed.
      mesh: a ``jax.sharding.Mesh`` over whose devices the roots are shared out, as by
        ``scale_by_kronecker``; None for all roots on each device.
      options: further options of ``scale_by_kronecker``, a mapping of fields of
        ``KroneckerOptions``, or such an object. A mapping keeps ``warmup=0`` and ``min_batches=1``,
        with which the first update has roots already.

    Returns:
      A transformation that reads the extras ``signals`` and ``validation_value_fn``.
      ``optalr.metrics`` shows ``learning_rate``, ``weight_decay``, and in ``hypergradient`` which
      way the validation loss pulls: below 0 it wants more decay.

    Raises:
      ValueError: an argument is out of range.
      TypeError: ``total_steps`` is not a whole number; ``update`` got no ``signals``, or no
        parameters.

    Cost: that of ``scale_by_kronecker``, and a probe of 1.7 forward passes every ``learn_every``
      steps.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optalr
      >>> def loss_fn(w, x, y):
      ...     return jnp.mean((x @ w - y) ** 2)
      >>> x = jax.random.normal(jax.random.key(0), (192, 8)) * jnp.logspace(-1, 1, 8)[None]
      >>> y = x @ jnp.ones((8, 1))
      >>> held_out = jax.tree_util.Partial(loss_fn, x=x[128:], y=y[128:])
      >>> evaluate, tx = optalr.value_grad_and_extras(loss_fn), optalr.untuned(300)
      >>> @jax.jit
      ... def step(w, state):
      ...     wanted = optalr.wants_signals(state)
      ...     _, grads, extras = evaluate(w, x[:128], y[:128], signals=wanted)
      ...     updates, state = tx.update(grads, state, w, **extras, validation_value_fn=held_out)
      ...     return optax.apply_updates(w, updates), state
      >>> w = jnp.zeros((8, 1))
      >>> state = tx.init(w)
      >>> for _ in range(300):
      ...     w, state = step(w, state)
      >>> bool(held_out(w) < 1e-3 * held_out(jnp.zeros((8, 1))))
      True

    Reference: Ida, Fujiwara, "Improving Generalization Performance of Adaptive Learning Rate by
      Switching from Block Diagonal Matrix Preconditioning to SGD", 2020, for the direction; Ravaut,
      Gorti, "Faster gradient descent via an adaptive learning rate", eq. 22-23, for the probe.
    """
    check_count("learn_every", learn_every)
    check_interval("scale", scale, 0.0, open_low=True)
    check_interval("momentum", momentum, 0.0, 1.0, open_high=True)
    length, profile = _length_and_profile(total_steps)
    warmup = _at_least_one(length // 50) if warmup_steps is None else warmup_steps
    check_count("warmup_steps", warmup)
    # Momentum adds up 1/(1 − momentum) directions.
    peak = scale * _RATE * (1 - momentum) / (1 - _MOMENTUM)
    direction = scale_by_kronecker(
        damping=damping,
        update_every=_interval(length) if update_every is None else update_every,
        statistics=statistics,
        layout=layout,
        mesh=mesh,
        options=_with_early_roots(options),
    )
    decay = _decay(peak, length, every=learn_every, mask=_checked_mask(decay_mask))
    rate = scale_by_recorded_rate(_schedule(peak, length, warmup=warmup, profile=profile))
    return chained("untuned", direction, _momentum(momentum), decay, rate)


def _decay(peak: Any, length: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
    """Return the learned decay of a run whose rate peaks at ``peak``."""
    shrink = _smaller(_SHRINKAGE / (length / 2), _MAX_SHRINK)  # η λ₀ at the peak
    return add_learned_decay(
        shrink / peak,
        meta_rate=_REACH / length,
        required=False,
        min_factor=_LOW,
        max_factor=_smaller(_HIGH, _MAX_SHRINK / shrink),
        **options,
    )


def _length_and_profile(total_steps: Any) -> tuple[Any, Callable[..., jax.Array]]:
    """Return the steps that all else is measured in, and how the rate falls over them."""
    if total_steps is None:
        return _OPEN_STEPS, _inverse_root
    check_count("total_steps", total_steps)
    return total_steps, _cosine


def _schedule(peak: Any, length: Any, *, warmup: Any, profile: Callable[..., jax.Array]) -> Rate:
    """Return what rises to ``peak`` over ``warmup`` updates, and then follows ``profile``."""

    def rate(count: jax.Array) -> jax.Array:
        return peak * jnp.minimum((count + 1) / warmup, profile(count, warmup, length))

    return rate


def _momentum(decay: Any) -> optax.GradientTransformation:
    """Return ``optax.trace`` with a state that has the types it will keep, as any other here."""
    trace = optax.trace(decay)
    return optax.GradientTransformation(lambda params: settle(trace.init(params)), trace.update)


def _checked_mask(decay_mask: Any) -> Any:
    """Return the mask, or raise by the name that it has here."""
    check_mask("decay_mask", decay_mask)
    return decay_mask


def _with_early_roots(given: Any) -> Any:
    """Return the options, with roots from the first batch on unless they say otherwise."""
    check_kind("options", given, (Mapping, KroneckerOptions))
    return given if isinstance(given, KroneckerOptions) else {**_EARLY, **(given or {})}


def _smaller(a: Any, b: Any) -> Any:
    """Return the smaller of two numbers, which may be traced."""
    return min(a, b) if is_concrete(a) and is_concrete(b) else jnp.minimum(a, b)


def _at_least_one(number: Any) -> Any:
    """Return the larger of a whole number, which may be traced, and 1."""
    return max(1, number) if is_concrete(number) else jnp.maximum(1, number)


def _interval(length: Any) -> Any:
    """Return the updates between two roots: a fortieth of the run, from 1 to 50."""
    return _smaller(50, _at_least_one(length // 40))


def _cosine(count: jax.Array, start: Any, end: Any) -> jax.Array:
    """Return what falls from 1 to 0 between two counts of updates, and stays there."""
    part = jnp.clip((count - start) / _at_least_one(end - start), 0.0, 1.0)
    return (1 + jnp.cos(jnp.pi * part)) / 2


def _inverse_root(count: jax.Array, start: Any, horizon: Any) -> jax.Array:
    """Return what falls from 1 as one over the root of the updates, and never ends."""
    return (1 + jnp.maximum(count - start, 0) / horizon) ** -0.5
