"""Wrappers of transformations that hand all extras on to what they wrap.

``multi_steps`` accumulates gradients and says in which call its inner transformation runs, so that
nothing is measured in vain. ``pass_extras`` carries extras through a wrapper of any library that
drops or refuses them (``optax.lookahead``, ``optax.MultiSteps(...).gradient_transformation()``).
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_count
from optalr.arrays import wide_dtype
from optalr.clocks import REFRESH, asking, period_of, permitted, run_when
from optalr.states import count_up, settle, settle_like
from optalr.transforms.shared.lengths import value_at
from optalr.transforms.shared.making import taking_extras, transformation
from optalr.transforms.shared.rescaling import tree_scale


class MultiStepsState(NamedTuple):
    """State of ``multi_steps``; the first five fields are those of ``optax.MultiStepsState``.

    Attributes:
      mini_step: int32 scalar, gradients gathered since the last update.
      gradient_step: int32 scalar, updates handed on.
      inner_opt_state: the state of the inner transformation.
      acc_grads: like the parameters, float32 or wider.
      skip_state: what ``should_skip_update_fn`` returned; ``()`` without one.
      emits: bool scalar, whether the next call runs the inner transformation.
      told: int8 scalar, -1; for a program made for one answer (optalr/clocks.py).
      period: int32 scalar, k of the update that is being gathered.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    inner_opt_state: Any
    acc_grads: Any
    skip_state: Any
    emits: jax.Array
    told: jax.Array
    period: jax.Array

    @property
    def clock(self) -> "_EmitClock":
        """When the inner transformation runs."""
        return _EmitClock(self.mini_step, self.period, self.emits)


class _EmitClock(NamedTuple):
    """When gathered gradients are handed on."""

    mini_step: Any  # () int32, gradients gathered since the last update
    period: Any  # () int32, k
    emits: Any  # () bool, whether the next call hands them on

    @property
    def is_certain(self) -> Any:
        """Whether the period is known: it is not in some states that an older release saved."""
        return self.period > 0

    def needs(self) -> Any:
        """Return whether the next call runs the inner transformation."""
        return REFRESH * self.emits

    def after(self, told: Any) -> "_EmitClock":
        """Return the clock after a call that was told so."""
        hands_on = self.emits & permitted(told, REFRESH)
        mini_step = (self.mini_step + 1) * (1 - hands_on)
        return self._replace(mini_step=mini_step, emits=mini_step + 1 >= self.period)

    def opens(self, told: Any, child: str) -> Any:
        """Return whether a call that is told so runs what it wraps."""
        del child
        return permitted(told, REFRESH)


def multi_steps(
    inner: optax.GradientTransformation,
    every_k_schedule: Any,
    *,
    use_grad_mean: bool = True,
    should_skip_update_fn: Callable[..., Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gather the gradients of ``k`` calls, and run a transformation on their mean in the last.

    Choose it instead of ``optax.MultiSteps`` around a method that reads extras: it gives the same
    updates, but runs ``inner`` in one call of ``k``, and ``optalr.wants_signals`` is False for the
    others. (``optax.MultiSteps`` runs it in every call and drops ``k - 1`` results.) The extras
    that ``inner`` gets are those of the last call: signals, ``value`` and ``value_fn`` belong to
    the last micro-batch, while the gradient is the mean over all ``k``.

    Args:
      inner: any gradient transformation.
      every_k_schedule: ``k``, at least 1, or a function from the number of updates so far to ``k``.
        If it is injected and changed between two calls, this takes effect one call later.
      use_grad_mean: whether ``inner`` gets the mean of the gradients; their sum otherwise.
      should_skip_update_fn: as for ``optax.MultiSteps``, for example ``optax.skip_not_finite``; a
        gradient that it skips counts as if it had never come.

    Returns:
      A transformation whose update is zero in all calls but the last of ``k``, in the dtypes of
      ``params`` (of the gradients where ``params`` is None).

    Raises:
      TypeError: ``inner`` is not a gradient transformation, or ``k`` is not a whole number.
      ValueError: ``k`` is below 1.

    Cost: one copy of the gradient in float32 or wider, and a pass over it a call. ``inner`` costs
      what it costs, once in ``k`` calls.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> tx = optalr.multi_steps(optax.sgd(1.0), 2)
      >>> state = tx.init(jnp.zeros(1))
      >>> first, state = tx.update(jnp.array([1.0]), state)
      >>> second, state = tx.update(jnp.array([3.0]), state)
      >>> first.tolist(), second.tolist()
      ([0.0], [-2.0])
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optax.GradientTransformation, got {inner!r}.")
    check_count("every_k_schedule", every_k_schedule)
    inner, skips = taking_extras(inner), should_skip_update_fn or _never

    def period(gradient_step: Any) -> jax.Array:
        return period_of(value_at(every_k_schedule, gradient_step))

    def init_fn(params: Any) -> MultiStepsState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p.dtype)), params)
        # Two arrays, since a donated state shares no buffers.
        mini_step, gradient_step = (jnp.zeros((), jnp.int32) for _ in range(2))
        _, skip_state = skips(jax.tree.map(jnp.zeros_like, params), gradient_step, params)
        skip_state, state = settle(skip_state), settle(inner.init(params))
        k = period(gradient_step)
        return MultiStepsState(
            mini_step, gradient_step, state, zeros, skip_state, mini_step + 1 >= k, asking(), k
        )

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        skipped, skip_state = skips(updates, state.gradient_step, params)
        step = _Step(state, use_grad_mean, jnp.asarray(skipped))
        gathered = step.gather(updates)
        new_updates, inner_state = step.run(inner, gathered, (updates, params, extras))
        mini_step, gradient_step = step.counts()
        k = period(gradient_step)
        return new_updates, MultiStepsState(
            mini_step,
            gradient_step,
            inner_state,
            jax.tree.map(lambda acc: jnp.where(step.emits, 0, acc), gathered),
            settle_like(skip_state, state.skip_state),
            mini_step + 1 >= k,
            asking(),
            k,
        )

    return transformation("multi_steps", init_fn, update_fn, holds=MultiStepsState)


class _Step(NamedTuple):
    """One call of ``multi_steps``."""

    state: MultiStepsState
    use_grad_mean: bool
    skipped: jax.Array

    @property
    def emits(self) -> jax.Array:
        """Whether the inner transformation runs."""
        # The state has said so to whoever asked, so this call does not judge anew.
        return self.state.emits & ~self.skipped & permitted(self.state.told, REFRESH)

    def gather(self, updates: Any) -> Any:
        """Return what has been gathered, with these gradients."""

        def fold(acc: jax.Array, update: jax.Array) -> jax.Array:
            change = update.astype(acc.dtype)
            if self.use_grad_mean:
                change = (change - acc) / (self.state.mini_step + 1)
            return jnp.where(self.skipped, acc, acc + change)

        return jax.tree.map(fold, self.state.acc_grads, updates)

    def counts(self) -> tuple[jax.Array, jax.Array]:
        """Return the counts of calls and of updates, after this call."""
        counted = count_up(self.state.mini_step, ~self.skipped)
        mini_step = jnp.where(self.emits, 0, counted)
        return mini_step, count_up(self.state.gradient_step, self.emits)

    def run(self, inner: Any, gathered: Any, inputs: tuple[Any, Any, Any]) -> tuple[Any, Any]:
        """Return the update and the inner state; zeros and the old one where nothing runs."""
        updates, params, extras = inputs
        mean = jax.tree.map(lambda acc, like: acc.astype(like.dtype), gathered, updates)
        zeros = jax.tree.map(jnp.zeros_like, updates if params is None else params)

        def update(carry: Any, inputs: Any) -> Any:
            inner_state, (mean, params, extras) = carry[1], inputs
            if "grad" in extras:
                # What the loss gave for this mean: the number that clipping or loss scaling has
                # multiplied it by since is known of the last call's gradient.
                scale = tree_scale(updates, extras["grad"])
                extras["grad"] = jax.tree.map(lambda x: x / scale.astype(x.dtype), mean)
            new_updates, new_state = inner.update(mean, inner_state, params, **extras)
            return settle_like(new_updates, zeros), settle_like(new_state, inner_state)

        # A loop rather than a conditional: a donated state stays where it is in all other calls.
        carry = (zeros, self.state.inner_opt_state)
        may = permitted(self.state.told, REFRESH)
        return run_when(self.emits, update, carry, inputs=(mean, params, extras), may=may)


def _never(*_: Any) -> tuple[jax.Array, tuple[()]]:
    return jnp.zeros((), bool), ()


def pass_extras(
    wrap: Callable[[Any], Any], inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Return ``wrap(inner)``, with all extras handed to ``inner`` whatever the wrapper does.

    Choose it around a wrapper that drops or refuses extras, such as ``optax.lookahead``,
    ``optax.contrib.split_real_and_imaginary`` or a wrapper of your own. The wrapper itself gets
    those extras that its signature names.

    Args:
      wrap: a function from a transformation to the wrapped one. It is called at each update, on a
        transformation that has the extras, so it must make the same thing each time.
      inner: the transformation that reads extras.

    Returns:
      A transformation with the state of ``wrap(inner)``, which keeps the dtypes of its start.

    Raises:
      TypeError: ``wrap`` is not a function, or does not return a gradient transformation.

    Cost: none.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> loss_fn = lambda params: jnp.sum(params["w"] ** 2)
      >>> tx = optalr.pass_extras(
      ...     lambda fast: optax.lookahead(fast, sync_period=5, slow_step_size=0.5),
      ...     optalr.learned_rate_sgd(0.1),
      ... )
      >>> params = optax.LookaheadParams.init_synced({"w": jnp.ones(2)})
      >>> value, grads, extras = optalr.value_grad_and_extras(loss_fn)(params.fast)
      >>> updates, state = tx.update(grads, tx.init(params), params, **extras)
      >>> params = optax.apply_updates(params, updates)
      >>> bool(loss_fn(params.fast) < value)
      True
    """
    if not callable(wrap):
        raise TypeError(f"wrap must be a function from transformation to wrapper, got {wrap!r}.")
    inner = taking_extras(inner)
    outer = wrap(inner)
    if not (hasattr(outer, "init") and hasattr(outer, "update")):
        raise TypeError(f"wrap must return an optax.GradientTransformation, got {outer!r}.")

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        def update(updates: Any, state: Any, params: Any = None, **handed_on: Any) -> Any:
            return inner.update(updates, state, params, **{**extras, **handed_on})

        bound = wrap(optax.GradientTransformationExtraArgs(inner.init, update))
        named = _named_by(bound.update, extras)
        new_updates, new_state = bound.update(updates, state, params, **named)
        # Some wrappers choose between two states by products, and make integers of booleans.
        return new_updates, settle_like(new_state, state)

    def init_fn(params: Any) -> Any:
        return settle(outer.init(params))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _named_by(function: Callable[..., Any], extras: dict[str, Any]) -> dict[str, Any]:
    """Return the extras that a function's signature takes."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return extras
    return {name: value for name, value in extras.items() if name in parameters}
