"""Decoupled weight decay whose strength is learned from a validation loss.

The learning rate of Ravaut & Gorti descends the loss along the step, ``f(η) = L_val(θ − η u)``. A
step with decay is ``θ − η (u + λ θ_m)``: a function of λ as well, which can be descended likewise.
``slope`` measures its derivative, ``rule`` answers it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_flag, check_interval, check_kind, check_mask
from optalr.arrays import wide_dtype
from optalr.clocks import PROBE, Periodic, asking, period_of, permitted
from optalr.signals.ray import by_path
from optalr.states import count_up, unboxed
from optalr.transforms.learned_decay.rule import DecayMemory, DecayRule, Moved
from optalr.transforms.learned_decay.slope import METHOD, SlopeProbe
from optalr.transforms.shared.lengths import value_at
from optalr.transforms.shared.making import transformation


class LearnedDecayState(NamedTuple):
    """State of ``add_learned_decay``."""

    # every update
    count: jax.Array  # () int32, updates so far
    weight_decay: jax.Array  # () float32, λ in force; with per_leaf the geometric mean of all
    # every probe
    probes: jax.Array  # () int32, probes that were used
    failures: jax.Array  # () int32, probes that were not finite
    # () float32, the smoothed dL_val/dλ over its root mean square, in [−1, 1]; below 0 more decay
    # helps. With per_leaf the mean.
    hypergradient: jax.Array
    memory: DecayMemory  # log(λ/λ₀) and averages: float32, () or with per_leaf a tree of ()
    # for whoever runs a program made for one answer of the clock (optalr/clocks.py)
    told: jax.Array  # () int8, -1
    period: jax.Array  # () int32, updates between probes

    @property
    def clock(self) -> Periodic:
        """When to probe."""
        return Periodic(self.count, self.period)


def add_learned_decay(
    initial_decay: Any,
    *,
    meta_rate: Any = 0.03,
    every: Any = 1,
    per_leaf: bool = False,
    mask: Any = None,
    probe: str = "validation_value_fn",
    derivative: str = "forward",
    required: bool = True,
    min_factor: Any = 3e-4,
    max_factor: Any = 100.0,
    smoothing: Any = 0.9,
    memory: Any = 0.95,
) -> optax.GradientTransformationExtraArgs:
    """Add weight decay to a direction, with a strength that is learned from a validation loss.

    Choose it where it is not known how much decay the data want: noisy data want much, data that
    can be separated want none. It stands where ``optax.add_decayed_weights`` would, after the
    direction ``u`` (gradient, momentum, Adam's, a preconditioned one) and *before* the learning
    rate. With ``θ_m`` the leaves that decay and ``L_val`` the loss of a validation batch,

        θ ← θ − η (u + λ θ_m),    λ = λ₀ e^z
        s = −⟨∇L_val(θ), θ_m⟩    at the next update, on the θ that this step has made
        m ← β m + (1 − β) s,    v ← γ v + (1 − γ) s²
        z ← z − every · α · m̂/√v̂    within [log min_factor, log max_factor]

    where ``m̂ = m/(1 − β^t)``, ``v̂ = v/(1 − γ^t)``, and ``m̂/√v̂`` is kept in [−1, 1].

    This descends the loss of eq. 22-23 in λ in place of η. With ``f(λ) = L_val(θ − η (u + λ θ_m))``
    the chain rule of eq. 4-7 gives ``f'(λ) = −η ⟨∇L_val(θ'), θ_m⟩`` at the new parameters θ'. There
    ``θ_m`` may be read as well: it differs by the step, which changes f' by a term in η². By z the
    derivative is ``λ f'(λ)``. The factor ``η λ > 0`` changes slowly, and the division by √v̂ takes
    it out, with the scale of the loss.

    The rule is greedy: it sees one step ahead (docs/learned_rate.md says how far off that is on
    ridge regressions). It learns nothing from leaves whose length the loss does not feel, as those
    before a normalization.

    Args:
      initial_decay: λ₀ > 0, a number or a schedule of the updates so far, in units of one over the
        learning rate. ``1/Σ η_t`` over the run is a good start: it alone would shrink a weight to
        1/e. With a cosine from η over T steps that is ``2/(η T)``.
      meta_rate: α ≥ 0, the most that z moves in a step; a number or a schedule. Over T steps 20/T
        to 40/T are good. 0 keeps λ₀.
      every: steps between probes, ≥ 1. A probe then moves z by so many steps' worth.
      per_leaf: whether each leaf learns a decay of its own.
      mask: the leaves that decay: a tree of bools, of which one may stand for a subtree, or a
        function that makes it of the parameters. None takes those of two or more axes. (Biases
        that are stacked for a scan have two.)
      probe: the name of the extra that holds the loss to probe, ``value_fn(params) -> scalar``.
        ``"value_fn"`` is for data of which nothing can be held out. It reads the training batch
        that this update is given, before any step on it. In the first epoch the parameters have
        not seen that batch, so its slope is an unbiased one of the true loss. Later they have: a
        net that memorizes then reads a training loss, which asks for less and less decay. Nothing
        protects from that.
      derivative: ``"forward"`` for a forward pass with tangents; ``"backward"`` for a gradient, as
        a loss with a ``jax.custom_vjp`` in it needs. With ``per_leaf`` it is always a gradient.
      required: whether a step without that extra is an error. Where it is not, such a step learns
        nothing, and λ stays what it is. Whether the extra is there decides what is compiled; so
        give it in every step or in none.
      min_factor: lower bound of λ/λ₀, in (0, 1].
      max_factor: upper bound of λ/λ₀, ≥ 1.
      smoothing: β in [0, 1), of the average of slopes.
      memory: γ in [0, 1), of the average of their squares.

    Returns:
      A transformation whose state holds ``weight_decay`` and ``hypergradient``. ``update`` reads
      the extra that ``probe`` names and, under ``optax.masked`` and ``optax.partition``, ``point``.
      A probe that is not finite leaves λ as it is, and counts in ``failures``. A slope above ten
      times √v̂ is cut to that. Directions pass as they are; ``optalr.guard`` looks after them.

    Raises:
      ValueError: an argument is out of range, or a wrapper has flattened the parameters.
      TypeError: ``update`` lacks the extra to probe, or the parameters; or, from jax as the step is
        compiled, the loss has no forward derivative.

    Cost: a forward probe takes less than two forward passes (1.7 for three layers), and no memory
      for activations. A backward one takes a gradient. The state is a few scalars.

    Examples:
      After a Kronecker-preconditioned direction with momentum, after Adam, and after momentum:

      >>> import jax, jax.numpy as jnp, optax, optalr
      >>> rate = optax.cosine_decay_schedule(1e-2, 1000)
      >>> decay, last = optalr.add_learned_decay(0.2), optalr.scale_by_recorded_rate(rate)
      >>> kronecker = optax.chain(optalr.scale_by_kronecker(), optax.trace(0.9), decay, last)
      >>> adam = optax.chain(optax.scale_by_adam(), decay, last)
      >>> sgd = optax.chain(optax.trace(0.9), decay, last)

      The extra is a ``Partial`` over a batch, so that a new batch is no new program:

      >>> loss_fn = lambda params, x, y: jnp.mean((x @ params["w"] - y) ** 2)
      >>> params = {"w": jnp.full((2, 1), 3.0)}
      >>> state, x = sgd.init(params), jnp.eye(2)
      >>> held_out = jax.tree_util.Partial(loss_fn, x=x, y=jnp.ones((2, 1)))
      >>> grads = jax.grad(loss_fn)(params, x, jnp.full((2, 1), 3.0))  # 0: the batch is fitted
      >>> updates, state = sgd.update(grads, state, params, validation_value_fn=held_out)
      >>> params = optax.apply_updates(params, updates)
      >>> bool(params["w"][0, 0] < 3), bool(optalr.metrics(state)["weight_decay"] > 0.2)
      (True, True)

    Reference: Ravaut, Gorti, "Faster gradient descent via an adaptive learning rate", eq. 4-7 and
      22-23, for the rate. We learn the decay, by z, and with the normalization of Kingma, Ba,
      "Adam", 2015, in place of the bare step of eq. 6, which depends on the loss's scale.
    """
    check_interval("initial_decay", initial_decay, 0.0, open_low=True)
    _check_kinds(probe, mask, meta_rate, flags={"per_leaf": per_leaf, "required": required})
    measuring = SlopeProbe(probe, every, derivative, per_leaf, required)
    rule = DecayRule(smoothing, memory, min_factor, max_factor)

    def initial_at(count: jax.Array) -> jax.Array:
        return jnp.asarray(value_at(initial_decay, count)).astype(jnp.float32)

    def init_fn(params: Any) -> LearnedDecayState:
        like = _decaying(params, mask) if per_leaf else jnp.zeros(())
        return _first_state(initial_at, like, every=every)

    def update_fn(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        if params is None:
            raise TypeError(
                f"{METHOD} needs params: tx.update(grads, opt_state, params, **extras)."
            )
        decaying = _decaying(params, mask)

        # Measure the slope of the probed loss, where it is due.
        may = permitted(state.told, PROBE)
        due = measuring.due(extras, state.count) & may
        slopes = measuring.read(extras, decaying, params=params, due=due, may=may)

        # Refresh the decay.
        rate = jnp.asarray(value_at(meta_rate, state.count) * every, jnp.float32)
        moved = rule.move(state.memory, slopes, probes=state.probes, rate=rate)
        initial, state = initial_at(state.count), state._replace(period=period_of(every))
        state = _advance(state, moved, due=due, initial=initial)

        # Apply it.
        decays = jax.tree.map(lambda z: initial * jnp.exp(z), state.memory.log_factor)
        return _add_decay(updates, decaying, decays, per_leaf=per_leaf), state

    return transformation(METHOD, init_fn, update_fn)


def _check_kinds(probe: Any, mask: Any, meta_rate: Any, *, flags: Mapping[str, Any]) -> None:
    """Raise where an argument on the learning is out of range or of another kind."""
    check_interval("meta_rate", meta_rate, 0.0)
    check_kind("probe", probe, str)
    check_mask("mask", mask)
    for name, value in flags.items():
        check_flag(name, value)


def _decaying(params: Any, mask: Any) -> Any:
    """Return the parameters with ``optax.MaskedNode`` for each leaf that does not decay."""
    if mask is None:
        return jax.tree.map(lambda p: p if p.ndim >= 2 else optax.MaskedNode(), params)

    def choose(flag: Any, subtree: Any) -> Any:
        return jax.tree.map(lambda p: p if flag else optax.MaskedNode(), subtree)

    # A flag may stand for a subtree, as in optax.masked.
    return jax.tree.map(choose, mask(params) if callable(mask) else mask, params)


def _add_decay(updates: Any, decaying: Any, decays: Any, *, per_leaf: bool) -> Any:
    """Return ``u + λ θ_m``, in the dtypes of the updates."""
    weights = by_path(unboxed(decaying))
    # By key path: what does not decay leaves holes in the structure.
    each: dict[str, Any] = by_path(decays) if per_leaf else dict.fromkeys(weights, decays)

    def add(path: Any, u: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if name not in weights:
            return u
        dtype = wide_dtype(u, weights[name])
        decay = each[name].astype(jnp.finfo(dtype).dtype)
        return (u.astype(dtype) + decay * weights[name].astype(dtype)).astype(u.dtype)

    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(unboxed(updates))]
    leaves, treedef = jax.tree.flatten(updates)
    return treedef.unflatten([add(*pair) for pair in zip(paths, leaves, strict=True)])


def _first_state(
    initial_at: Callable[[jax.Array], jax.Array], like: Any, *, every: Any
) -> LearnedDecayState:
    """Return the state before the first update; ``like`` has a leaf for each decay."""

    def zeros() -> Any:
        return jax.tree.map(lambda _: jnp.zeros((), jnp.float32), unboxed(like))

    count = jnp.zeros((), jnp.int32)
    return LearnedDecayState(
        told=asking(),
        period=period_of(every),
        count=count,
        weight_decay=jnp.array(initial_at(count)),
        probes=jnp.zeros((), jnp.int32),
        failures=jnp.zeros((), jnp.int32),
        hypergradient=jnp.zeros((), jnp.float32),
        memory=DecayMemory(zeros(), zeros(), zeros()),
    )


def _advance(
    state: LearnedDecayState, moved: Moved, *, due: jax.Array, initial: jax.Array
) -> LearnedDecayState:
    """Return the state after one update."""
    used = due & ~moved.failed
    memory = jax.tree.map(lambda a, b: jnp.where(due, a, b), moved.memory, state.memory)
    return state._replace(
        told=asking(),
        count=count_up(state.count),
        weight_decay=initial * jnp.exp(_mean(memory.log_factor)),
        probes=count_up(state.probes, used),
        failures=count_up(state.failures, due & moved.failed),
        hypergradient=jnp.where(used, _mean(moved.trend), state.hypergradient),
        memory=memory,
    )


def _mean(tree: Any) -> jax.Array:
    """Return the mean of a tree of scalars; 0 for one without leaves."""
    leaves = jax.tree.leaves(tree)
    return jnp.mean(jnp.stack(leaves)) if leaves else jnp.zeros((), jnp.float32)
