"""One compiled program for each kind of step, and a host that knows which one is next.

A step that asks its clocks on the device holds everything that it may ever do, with control flow
around it. On an accelerator such a step compiles slowly, and in each step the device waits for
answers that the host knew all along.
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from optalr.arguments import check_choice, check_count, shown
from optalr.clocks import ASK, BLEND, FIRST, MEASURE, PROBE, REFRESH, REPAIR, SECOND
from optalr.phases.clocks import StageClock
from optalr.programs.call import open_call, split_call
from optalr.programs.mirror import Mirror, Told
from optalr.programs.placement import Carried, Placement
from optalr.programs.survey import Survey, survey
from optalr.reading.wanted import wants_signals
from optalr.signals import value_grad_and_extras
from optalr.signals.binding.bound import Bound
from optalr.transforms.shared.making import taking_extras

# What a kind of step tells the clocks of methods, those of two_stage, and whether multi_steps hands
# its gradients on.
_KINDS = {
    "plain": (0, FIRST, True),
    "probing": (PROBE, FIRST, True),
    "measuring": (MEASURE | PROBE, FIRST, True),
    "refreshing": (MEASURE | PROBE | REFRESH, FIRST, True),
    "repairing": (MEASURE | PROBE | REFRESH | REPAIR, FIRST, True),
    "gathering": (0, FIRST, False),
    "blend": (MEASURE | PROBE | REFRESH, BLEND, True),
    "second": (0, SECOND, True),
}


# What is told, the static part of the call, and where its arrays lie.
_Program = tuple[Told, Bound, Placement]


def train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    donate: bool = True,
    read_every: int = 50,
    compiler_options: dict[str, Any] | None = None,
    **capture: Any,
) -> "TrainStep":
    """Return a compiled training step that pays only for what is due.

    Choose it for the usual training loop, above all on an accelerator. It takes the place of a
    jitted function that calls ``value_grad_and_extras``, ``tx.update`` and
    ``optax.apply_updates``. That function, the *traced* step, holds all that it may ever have to
    do: measuring, roots, both stages. Here each kind of step is a program of its own, compiled when
    it is first needed: a plain one, one that measures signals, one that takes roots besides, one
    for the second stage. In none of them a clock is asked, so nothing waits for an answer. Which
    program is next the host knows from its own copy of the clocks, without waiting for the device.
    The traced step remains the way for ``jax.lax.scan``, ``jax.vmap`` and loops of one's own.

    The numbers are those of the traced step, to rounding, with one exception. What data decide (a
    switch on a plateau of the validation loss, a batch that could not be used) the host reads from
    the device every now and then. It takes effect at most ``read_every`` updates late. So it is
    with roots that an iteration could not take (``failures`` counts them; the last good ones stay):
    the traced step decomposes these matrices at once, here a later refresh does, which is a program
    of its own.

    Args:
      loss_fn: the mean loss of a batch, ``loss_fn(params, *args)``, as ``value_grad_and_extras``
        takes it.
      tx: any optax transformation.
      has_aux: whether the loss returns ``(loss, aux)``.
      donate: whether the arrays of ``params`` and ``state`` may be reused for the new ones. They
        can then not be read any more after the call.
      read_every: updates within which the host learns what data have decided, at least 2.
      compiler_options: passed on to ``jax.jit``.
      **capture: options of ``value_grad_and_extras``: ``num_examples``, ``every``,
        ``max_positions``, ``max_cost``, ``axis_name``, ``fisher``, ``likelihood``, ``storage``,
        ``batch_sharding``, ``outer_products``. The last is on by default where all arrays are on
        one device. Over a mesh it would add a sum over the devices to each step.
        ``batch_sharding`` is by default that of the first axis of ``args``, where factors rest in
        parts and all sharded arrays among ``args`` have the same; None gives none.

    Returns:
      ``step(params, state, *args, extras=None, key=None)``, which returns ``(params, state,
      value)``, with aux ``(params, state, (value, aux))``. Arrays and Python numbers among ``args``
      and ``extras`` are data. Bools, strings and functions among ``args`` belong to the program, of
      which there is another for each value. ``extras`` adds to what ``tx.update`` is given, such as
      ``validation_value``; a function in it should be a ``jax.tree_util.Partial`` over its batch.
      ``key`` is for ``fisher="true"``. ``step.lower(params, state, *args, kind=...)`` returns what
      ``jax.jit(...).lower`` does, for ``"plain"``, ``"probing"``, ``"measuring"``,
      ``"refreshing"``, ``"repairing"``, ``"gathering"`` (in ``multi_steps``), ``"blend"``,
      ``"second"`` or the ``"traced"`` step. ``step.kinds`` names what has been compiled so far.

    Raises:
      TypeError: ``loss_fn`` is no function, ``tx`` is no transformation, or an option is unknown.
      ValueError: an argument is out of range.

    Cost: on the host some 0.1 ms a step beside jax's own dispatch. Several programs take longer to
      compile together than the traced one where compiling is what counts, as on a CPU
      (docs/train_step.md has the figures; none are from an accelerator yet). A state that the last
      call did not return (restored, changed by ``set_phase``, of another run) has its clocks read,
      which waits for the device once. Wrappers that decide on the device whether they act
      (``optax.MultiSteps``, ``optax.apply_if_finite``) have their clocks asked there; a warning
      says so. ``optalr.multi_steps`` is told like any other.

    Examples:
      >>> import jax.numpy as jnp, optalr
      >>> loss_fn = lambda params, x, y: jnp.mean((x @ params["w"] - y) ** 2)
      >>> params, x, y = {"w": jnp.zeros((2, 1))}, jnp.eye(2), jnp.ones((2, 1))
      >>> tx = optalr.tso_alra(0.1, switch_at=20, second_learning_rate=0.1)
      >>> step, state = optalr.train_step(loss_fn, tx), tx.init(params)
      >>> for _ in range(30):
      ...     params, state, loss = step(params, state, x, y)
      >>> bool(loss < 0.2), "second" in step.kinds
      (True, True)
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"tx must be an optax.GradientTransformation, got {shown(tx)}.")
    check_count("read_every", read_every, 2)

    @functools.cache
    def evaluate(at: Placement) -> Callable[..., Any]:
        options = {"outer_products": at.alone, "batch_sharding": at.batch, **capture}
        return value_grad_and_extras(loss_fn, has_aux=has_aux, **options)

    evaluate(Placement(alone=True, batch=None))  # so that what is wrong is said at once
    tx = taking_extras(tx)
    return TrainStep(evaluate, tx, donate=donate, read_every=read_every, options=compiler_options)


class TrainStep:
    """A compiled training step; ``train_step`` makes it and describes it."""

    def __init__(
        self,
        evaluate: Callable[[Placement], Callable[..., Any]],
        tx: optax.GradientTransformationExtraArgs,
        *,
        donate: bool,
        read_every: int,
        options: dict[str, Any] | None,
    ):
        self._evaluate, self._tx, self._read_every = evaluate, tx, read_every
        self._jitted = jax.jit(
            self._run,
            static_argnums=0,
            donate_argnums=1 if donate else (),
            compiler_options=options,
        )
        self._surveys: dict[Any, Survey] = {}
        self._mirror: Mirror | None = None
        self._last: _Identity | None = None
        self._carried = Carried.of((), ())
        self._told: dict[Told, Survey] = {}

    @property
    def kinds(self) -> list[str]:
        """What kinds of steps have been run, in the order in which they were first needed."""
        return list(dict.fromkeys(_kind(known, told) for told, known in self._told.items()))

    def __call__(
        self, params: Any, state: Any, *args: Any, extras: Any = None, key: Any = None
    ) -> tuple[Any, Any, Any]:
        """Return the parameters and the state after a step, and the loss before it."""
        call, arrays = split_call(args, extras, key)
        leaves, treedef = jax.tree.flatten(state)
        known = self._survey(state, treedef)
        mirror = self._mirror
        is_new = self._last is None or not self._last.is_of(leaves, treedef)
        if mirror is None or is_new:
            mirror = Mirror(known, leaves, self._read_every)
            self._carried = Carried.of(params, known.factors_of(leaves))
        # Until this call has returned, no state is known.
        self._mirror = self._last = None
        told = mirror.next_told()
        program = told, call, self._carried.with_data(arrays, args)
        params, state, value = self._jitted(program, (params, state), arrays)
        self._told.setdefault(told, known)
        leaves = jax.tree.leaves(state)
        if is_new:
            # The first step may move what it gets; then it stays, and one look is enough.
            self._carried = Carried.of(params, known.factors_of(leaves))
        mirror.advance(told, leaves)
        self._mirror, self._last = mirror, _Identity(known, leaves, treedef)
        return params, state, value

    def lower(
        self,
        params: Any,
        state: Any,
        *args: Any,
        kind: str,
        extras: Any = None,
        key: Any = None,
        platforms: Sequence[str] | None = None,
    ) -> jax.stages.Lowered:
        """Return the program of one kind of step, lowered and not compiled.

        Args:
          params: the parameters, or their shapes, with shardings where a mesh has them.
          state: the state, or its shapes, likewise.
          *args: the loss's further arguments.
          kind: ``"plain"``, ``"probing"``, ``"measuring"``, ``"refreshing"``, ``"repairing"``,
            ``"gathering"``, ``"blend"``, ``"second"`` or ``"traced"``.
          extras: as in a call.
          key: as in a call.
          platforms: what to lower for, such as ``("cuda",)``; by default the device at hand. A
            program for another device can be read, and not compiled here.
        """
        check_choice("kind", kind, (*_KINDS, "traced"))
        call, arrays = split_call(args, extras, key)
        leaves, treedef = jax.tree.flatten(state)
        known = self._survey(state, treedef)
        told = (ASK,) * len(known.places) if kind == "traced" else _told_in(known, kind)
        carried = Carried.of(params, known.factors_of(leaves))
        program = told, call, carried.with_data(arrays, args)
        traced = self._jitted.trace(program, (params, state), arrays)
        return traced.lower(lowering_platforms=None if platforms is None else tuple(platforms))

    def _survey(self, state: Any, treedef: Any) -> Survey:
        known = self._surveys.get(treedef)
        if known is None:
            known = self._surveys[treedef] = survey(state)
            for reason in known.reasons:
                warnings.warn(
                    f"train_step asks a clock on the device in each step: {reason}. The results "
                    "are right; the step is one program with control flow.",
                    stacklevel=3,
                )
        return known

    def _run(self, program: _Program, carry: tuple[Any, Any], arrays: Any) -> Any:
        """Take a step; jit compiles it once for each ``program``."""
        (told, call, at), (params, state) = program, carry
        args, extras, key = open_call(call, arrays)
        leaves, treedef = jax.tree.flatten(state)
        known = self._survey(state, treedef)
        for place, mark in zip(known.places, told, strict=True):
            # NumPy, because a Python number would be weakly typed and a jax one traced.
            if mark != ASK:
                leaves[place.told] = np.int8(mark)
        told_state = treedef.unflatten(leaves)
        signals = _signals(known, told, state)
        value, grads, found = self._evaluate(at)(params, *args, signals=signals, key=key)
        updates, state = self._tx.update(grads, told_state, params, **{**found, **extras})
        params = optax.apply_updates(params, updates)
        return params, state, value


def _signals(known: Survey, told: Told, state: Any) -> Any:
    """Return whether a step measures signals: a bool where that is known now."""
    if known.asks_for_signals or known.reasons:
        return wants_signals(state)
    marks = zip(known.places, told, strict=True)
    return any(mark & MEASURE for place, mark in marks if not place.is_gate)


def _told_in(known: Survey, kind: str) -> Told:
    """Return what all clocks are told in one kind of step."""
    level, stage, emits = _KINDS[kind]
    told: list[int] = []
    for place in known.places:
        if place.asks:
            told.append(ASK)
        elif not known.is_open(place, told):
            told.append(0)
        elif isinstance(place.clock, StageClock):
            told.append(stage)
        else:
            told.append(REFRESH * emits if place.is_gate else level)
    return tuple(told)


def _kind(known: Survey, told: Told) -> str:
    """Return the name of a kind of step by what it tells."""
    named = (kind for kind in _KINDS if _told_in(known, kind) == told)
    return next(named, f"told {told}")


class _Identity:
    """Which state was returned last, told by the arrays of its clocks."""

    def __init__(self, known: Survey, leaves: Sequence[Any], treedef: Any):
        self._treedef = treedef
        # Weak, so that a run that is given up gives its memory back.
        self._clocks = {i: weakref.ref(leaves[i]) for i in known.positions}

    def is_of(self, leaves: Sequence[Any], treedef: Any) -> bool:
        """Return whether a state, given its leaves, is the one that was returned."""
        same = (reference() is leaves[i] for i, reference in self._clocks.items())
        return treedef == self._treedef and all(same)
