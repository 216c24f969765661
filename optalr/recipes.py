"""Complete optimizers, made of the other rooms' parts with ``optax.chain``."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optalr import phases
from optalr.arguments import check_choice, check_interval, is_concrete
from optalr.signals.moments import Coverage
from optalr.transforms.guard import guard
from optalr.transforms.kronecker import KroneckerOptions, scale_by_kronecker
from optalr.transforms.krylov_flow import LevenbergMarquardt, scale_by_krylov_flow
from optalr.transforms.learned_rate import (
    LearnedRateState,
    RateSafeguards,
    scale_by_learned_rate,
)
from optalr.transforms.learning_rate import scale_by_recorded_rate
from optalr.transforms.lipschitz_rate import LipschitzGuards, scale_by_lipschitz_rate
from optalr.transforms.nesterov_flow import accelerate_by_nesterov_flow

Rate = float | Callable[[jax.Array], Any]


def tso_alra(
    learning_rate: Rate,
    *,
    switch_at: int | None = None,
    phase: Any = None,
    second_learning_rate: Rate | None = None,
    power: Any = -0.5,
    statistics: str = "signals",
    decay: Any = 0.95,
    damping: Any = 1e-3,
    update_every: Any = 50,
    signals_every: Any = None,
    momentum: float | None = 0.9,
    second_momentum: float | None = None,
    layout: Coverage | None = None,
    options: KroneckerOptions | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train along F^{-1/2} g, then by plain SGD: the two-stage optimizer of Ida & Fujiwara.

    Choose it to reach a low training loss in few epochs and still generalize: the preconditioned
    phase gets there fast, and plain SGD after the switch keeps the gradient noise as it is
    (theorem 2 of the paper: F^{-1/2} makes it isotropic). With p the power,

        phase 0:   v ← momentum · v + F^p g,   θ ← θ − η v
        phase 1:   θ ← θ − η g

    with F the Kronecker-factored Fisher matrix of ``scale_by_kronecker``, whose warm-up, bound on
    the update and relative damping are on. A rate of 1e-2 is a good start in phase 0. In phase 1
    nothing is captured and no root is taken; ``optalr.release_first_stage`` gives the memory back.

    Args:
      learning_rate: η, > 0, or a schedule of the updates since the start.
      switch_at: the update from which phase 1 holds; None for no switch (``optalr.set_phase`` can
        still make one by hand).
      phase: a phase scheduler instead of ``switch_at``, or a number in [0, 1].
      second_learning_rate: η of phase 1, where it shall be another; a schedule counts from the
        switch. The second phase's rate decides how it ends: with a large one, or with momentum, the
        test loss rises again.
      power: p, in [−1, 0].
      statistics: ``"signals"`` or ``"gradient"`` (needs no captured signals).
      decay: of the moving averages of statistics, in [0, 1).
      damping: >= 0, relative to a factor's mean eigenvalue.
      update_every: updates between roots, >= 1.
      signals_every: updates between measurements, >= 1; None for a tenth of ``update_every``.
      momentum: in [0, 1), of phase 0; None for none.
      second_momentum: in [0, 1), of phase 1, starting from zero at the switch; None for none. With
        one of m, a rate acts as if divided by 1 − m.
      layout: what ``optalr.coverage(loss_fn, params, *args)`` returned, where it is needed.
      options: more of ``scale_by_kronecker``, a ``KroneckerOptions``.

    Returns:
      A transformation that reads the extra ``signals``.

    Raises:
      ValueError: both ``switch_at`` and ``phase`` are given, or a number is out of range.

    Cost: see ``scale_by_kronecker``; in phase 1 that of SGD.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optalr
      >>> tx = optalr.tso_alra(0.1, switch_at=40, second_learning_rate=0.05, statistics="gradient")
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.array([100.0, 1.0])[:, None] * w**2)
      >>> w = jnp.ones((2, 2))
      >>> state = tx.init(w)
      >>> start = loss_fn(w)
      >>> @jax.jit
      ... def step(w, state):
      ...     updates, state = tx.update(jax.grad(loss_fn)(w), state, w)
      ...     return optax.apply_updates(w, updates), state
      >>> for _ in range(30):
      ...     w, state = step(w, state)
      >>> bool(loss_fn(w) < 0.05 * start), float(state.hyperparams["phase"])
      (True, 0.0)

    Reference: Yasutoshi Ida and Yasuhiro Fujiwara, "Improving Generalization Performance of
    Adaptive Learning Rate by Switching from Block Diagonal Matrix Preconditioning to SGD", 2020,
    Algorithm 1. We add momentum after the preconditioner (theirs has none) and the safeguards.
    """
    if switch_at is not None and phase is not None:
        raise ValueError(
            "switch_at and phase both say when to switch. Pass one of them: switch_at=2_000, or "
            "phase=optalr.switch_on_plateau()."
        )
    if switch_at is not None:
        phase = phases.switch_at(switch_at)
    elif phase is None:
        phase = phases.phase_schedule(_never)
    direction = scale_by_kronecker(
        power,
        decay=decay,
        damping=damping,
        update_every=update_every,
        signals_every=signals_every,
        statistics=statistics,
        layout=layout,
        options=options,
    )
    if momentum is not None:
        direction = optax.chain(direction, optax.trace(momentum))
    if second_momentum is not None:
        check_interval("second_momentum", second_momentum, 0.0, 1.0, open_high=True)
    second = optax.identity() if second_momentum is None else optax.trace(second_momentum)
    if second_learning_rate is None:
        # One rate, on one clock, for both phases.
        staged = phases.two_stage(direction, second, phase)
        return optax.chain(staged, scale_by_recorded_rate(learning_rate))
    second_rate = scale_by_recorded_rate(second_learning_rate)
    return phases.two_stage(
        optax.chain(direction, scale_by_recorded_rate(learning_rate)),
        second_rate if second_momentum is None else optax.chain(second, second_rate),
        phase,
    )


def _never(step: jax.Array) -> float:
    """Stay in phase 0, until ``set_phase``."""
    del step
    return 0.0


def classical(
    rule: str | optax.GradientTransformation,
    learning_rate: Rate,
    *,
    gains: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Combine one of optax's classical rules with any schedule and with gains of each weight.

    Choose it for a baseline whose rate can be read in ``optalr.metrics``, that survives a bad batch
    and runs in float32 whatever the parameters' dtype. With u what the rule makes of the gradient,

        θ ← θ − η u,    with gains    θ ← θ − η gain ⊙ u.

    Args:
      rule: a name in ``CLASSICAL_RULES``: ``"sgd"``, ``"momentum"`` (0.9), ``"nesterov"`` (0.9),
        ``"rmsprop"`` (decay 0.9, eps outside the root, as the lecture has it), ``"adam"``,
        ``"amsgrad"``, ``"adagrad"``, ``"adadelta"``; or, for other settings, an optax
        transformation without a rate, such as ``optax.scale_by_adam(b2=0.99)``. PyTorch's
        ``dampening=d`` is ``optax.chain(optax.scale(1 - d), optax.trace(momentum))``, but for its
        first step, which PyTorch does not dampen.
      learning_rate: η, at least 0, or a schedule, of ``optax`` or ``optalr.schedules``.
      gains: ``optalr.scale_by_local_gains(...)``; a gain follows the sign of u. After a rule that
        divides by the gradient's size, gains before it would be divided out.

    Returns:
      A transformation.

    Raises:
      ValueError: the rule's name is unknown, or the rate is negative.

    Cost: that of optax's rule.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> rate = optalr.schedules.inverse_decay(0.5, rate=1.0)
      >>> tx = optalr.classical("nesterov", rate, gains=optalr.scale_by_local_gains(0.1))
      >>> params = jnp.array([1.0, -2.0])
      >>> state = tx.init(params)
      >>> for _ in range(50):
      ...     updates, state = tx.update(params, state, params)  # the gradient of |θ|²/2
      ...     params = optax.apply_updates(params, updates)
      >>> bool(jnp.linalg.norm(params) < 0.1), float(optalr.metrics(state)["learning_rate"]) < 0.02
      (True, True)

    Reference: Raschka, "Common Optimization Algorithms", STAT 479 lecture 12, 2019.
    """
    if isinstance(rule, str):
        check_choice("rule", rule, tuple(CLASSICAL_RULES))
        rule = CLASSICAL_RULES[rule]()
    links = [rule] if gains is None else [rule, gains]
    return guard(optax.chain(*links, scale_by_recorded_rate(learning_rate)))


CLASSICAL_RULES: Mapping[str, Callable[[], optax.GradientTransformation]] = MappingProxyType(
    {
        "sgd": optax.identity,
        "momentum": partial(optax.trace, 0.9),
        "nesterov": partial(optax.trace, 0.9, nesterov=True),
        "rmsprop": partial(optax.scale_by_rms, 0.9, eps_in_sqrt=False),
        "adam": optax.scale_by_adam,
        "amsgrad": optax.scale_by_amsgrad,
        "adagrad": optax.scale_by_rss,
        "adadelta": optax.scale_by_adadelta,
    }
)


def edf(
    learning_rate: Any,
    *,
    curvature: str = "gauss_newton",
    num_steps: int = 1,
    damping: tuple[Any, Any] | LevenbergMarquardt = (1.0, 1.0),
    acceleration: str | None = None,
    tol: Any = 0.0,
    preconditioner: Callable[..., Callable[[Any], Any]] | None = None,
    negative_curvature: str = "descend",
) -> optax.GradientTransformationExtraArgs:
    """Follow the exponentially decaying flow: a few Krylov steps against curvature, then a rate.

    Choose it with ``num_steps`` 1 or 2 and the default damping for mini-batches (the paper's rates
    lie between 0.1 and 2), with more steps, ``acceleration="W2"`` and a rate of 1 to fit a full
    batch. The paper fits full batches without damping, ``(0.0, 1.0)``; from k = 5 on such fits
    of a small convolution net by type G ended at losses of 1e5 and more. It is
    ``optax.chain(scale_by_krylov_flow(...), scale_by_recorded_rate(learning_rate))``, with
    ``optax.trace(0.9)`` between the two for W1 and ``accelerate_by_nesterov_flow(3)`` after them
    for W2.

    Args:
      learning_rate: η of the flow's time, a number of at least 0 or a schedule; decay profiles
        other than ``e^{−t}`` are schedules made by ``optalr.flow_schedule``.
      curvature: ``"gauss_newton"`` (type G; the loss must be an ``optalr.composite_loss``) or
        ``"hessian"`` (type H).
      num_steps: k, MINRES steps, a Python int of at least 1.
      damping: ``(a, b)`` for ``λ = a ‖∇‖^b``, or an ``optalr.LevenbergMarquardt`` rule.
      acceleration: None; ``"W1"``, constant friction: momentum 0.9 on the solved direction; or
        ``"W2"``, vanishing friction ``3/t``: Nesterov's scheme.
      tol: see ``scale_by_krylov_flow``.
      preconditioner: see ``scale_by_krylov_flow``.
      negative_curvature: see ``scale_by_krylov_flow``.

    Returns:
      A transformation; its ``update`` needs ``extras`` of ``optalr.value_grad_and_extras``.

    Raises:
      ValueError: an argument is out of range.

    Cost: ``num_steps`` curvature products a step; see ``scale_by_krylov_flow``.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> X, y = jnp.array([[1.0, 2.0], [3.0, 5.0]]), jnp.array([5.0, 6.0])
      >>> loss = optalr.composite_loss(lambda w: X @ w, lambda z: 0.5 * jnp.mean((z - y) ** 2))
      >>> evaluate = optalr.value_grad_and_extras(loss)
      >>> tx, w = edf(1.0, num_steps=2), jnp.zeros(2)
      >>> value, grads, extras = evaluate(w)
      >>> updates, state = tx.update(grads, tx.init(w), w, **extras)
      >>> bool(loss(optax.apply_updates(w, updates)) < value)
      True

    Reference:
      "Exponentially decaying flows for optimization in deep learning", sections 3, 4 and 6. There
      the damping is none in full-batch runs and ``(1, 1)`` in mini-batch runs.
    """
    if acceleration is not None:
        check_choice("acceleration", acceleration, ("W1", "W2"))
    links: list[optax.GradientTransformation] = [
        scale_by_krylov_flow(
            curvature=curvature,
            num_steps=num_steps,
            damping=damping,
            tol=tol,
            preconditioner=preconditioner,
            negative_curvature=negative_curvature,
        )
    ]
    if acceleration == "W1":
        links.append(optax.trace(0.9))
    links.append(scale_by_recorded_rate(learning_rate))
    if acceleration == "W2":
        links.append(accelerate_by_nesterov_flow(3.0))
    return optax.chain(*links)


def learned_rate_sgd(
    initial_rate: Any,
    *,
    order: int = 2,
    momentum: float | None = None,
    meta_rate: Any = 1e-3,
    derivatives: Any = "exact",
    rate_momentum: Any = 0.0,
    every: Any = 1,
    lag: bool = True,
    probe: str = "value_fn",
    safeguards: RateSafeguards | Mapping[str, Any] | str | None = "on",
) -> optax.GradientTransformationExtraArgs:
    """Descend the gradient with a learning rate that is itself learned.

    Choose it to train without searching for a rate, in the first epochs above all; or to find a
    rate, as ``optalr.suggest_learning_rate`` does. It is
    ``optax.chain(optax.trace(momentum), scale_by_learned_rate(initial_rate, ...))``.

    Args:
      initial_rate: η₀ > 0.
      order: 2 for Newton's method on the rate, 1 for gradient descent on it.
      momentum: decay of the gradients' momentum, in [0, 1); None (as in the paper) for plain SGD.
      meta_rate: α > 0 of order 1.
      derivatives: ``"exact"``, ``"finite_differences"``, ``"successive_gradients"``, or one of
        these configured.
      rate_momentum: decay of the rate's own momentum, in [0, 1).
      every: update the rate at every so many steps, >= 1.
      lag: whether a new rate is applied from the next step on, as published, or at once.
      probe: the name of the extra that holds the loss to probe.
      safeguards: ``"on"``, a ``RateSafeguards`` or a mapping of its fields; ``"off"`` or None for
        the paper's bare rule.

    Returns:
      A transformation that reads ``value_fn`` and the other extras of
      ``optalr.value_grad_and_extras``; see ``scale_by_learned_rate``.

    Raises:
      ValueError: an argument is out of range.

    Cost: that of ``scale_by_learned_rate``; at order 2 a step takes about 8/3 of SGD's.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> evaluate = optalr.value_grad_and_extras(lambda w: jnp.sum((w - 1) ** 2))
      >>> tx = optalr.learned_rate_sgd(0.01)
      >>> w = jnp.zeros(3)
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     value, grads, extras = evaluate(w)
      ...     updates, state = tx.update(grads, state, w, **extras)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(jnp.allclose(w, 1.0))  # the second step has the exact rate
      True

    Reference: Ravaut, Gorti, "Faster gradient descent via an adaptive learning rate".
    """
    scale = scale_by_learned_rate(
        initial_rate,
        order=order,
        meta_rate=meta_rate,
        derivatives=derivatives,
        rate_momentum=rate_momentum,
        every=every,
        lag=lag,
        probe=probe,
        safeguards=safeguards,
    )
    if momentum is None:
        return optax.chain(scale)
    check_interval("momentum", momentum, 0.0, 1.0, open_high=True)
    return optax.chain(optax.trace(momentum), scale)


def learned_rate_then(
    second: Callable[..., optax.GradientTransformation],
    initial_rate: Any,
    phase: Any,
    *,
    rate_factor: float = 1.0,
    first: dict[str, Any] | None = None,
    **second_options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Learn the rate for the first epochs, then hand it to another optimizer.

    Choose it after the paper's own conclusion: the learned rate is fastest in the first epochs and
    dearer a step. At the switch ``second`` is given the geometric mean of the last hundred learned
    rates (single rates are noisy), times ``rate_factor``, as its ``learning_rate``.

    Args:
      second: a factory that takes ``learning_rate``, such as ``optax.sgd``.
      initial_rate: η₀ > 0 of the first stage.
      phase: when to switch: ``optalr.switch_at(step)``, ``optalr.switch_on_plateau(...)``.
      rate_factor: > 0, what the rate found is multiplied by: 1 - β for SGD with momentum β, and
        about 1e-2 for Adam, whose direction has another length.
      first: further arguments of ``learned_rate_sgd``, as a dict.
      **second_options: further arguments of ``second``.

    Returns:
      A ``two_stage`` transformation.

    Raises:
      ValueError: an argument is out of range.
      TypeError: ``second`` takes no ``learning_rate``.

    Cost: a learned-rate step before the switch, a step of ``second`` after it.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> evaluate = optalr.value_grad_and_extras(lambda w: jnp.sum((w - 1) ** 2))
      >>> tx = optalr.learned_rate_then(optax.sgd, 0.01, optalr.switch_at(1), momentum=0.9)
      >>> w = jnp.zeros(3)
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     value, grads, extras = evaluate(w)
      ...     updates, state = tx.update(grads, state, w, **extras)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(jnp.allclose(optalr.metrics(state)["learning_rate"], 0.5))  # what step 1 found
      True

    Reference: Ravaut, Gorti, "Faster gradient descent via an adaptive learning rate", section 7.
    """
    check_interval("rate_factor", rate_factor, 0.0, open_low=True)
    if not callable(second) or "learning_rate" not in inspect.signature(second).parameters:
        raise TypeError(
            f"second must take a learning_rate, got {second!r}. Pass the factory, such as "
            "optax.sgd, not a built optimizer."
        )
    learned = learned_rate_sgd(initial_rate, **(first or {}))
    start = float(initial_rate) * rate_factor
    following = optax.inject_hyperparams(second, hyperparam_dtype=jnp.float32)(
        learning_rate=start, **second_options
    )

    def hand_over(first_state: Any, second_state: Any) -> Any:
        states = jax.tree.leaves(first_state, is_leaf=lambda x: isinstance(x, LearnedRateState))
        found = next(x for x in states if isinstance(x, LearnedRateState)).average_rate
        rate = jnp.asarray(rate_factor * found, jnp.float32)
        return second_state._replace(
            hyperparams={**second_state.hyperparams, "learning_rate": rate}
        )

    return phases.two_stage(learned, following, phase, momentum=hand_over)


def lipschitz_sgd(
    loss: str,
    *,
    num_classes: Any = None,
    weight_decay: Any = 0.0,
    momentum: float | None = None,
    target_norm: Any = None,
    steps_per_epoch: Any = 1,
    last_layer: str | None = None,
    guards: LipschitzGuards | Mapping[str, Any] | str | None = "on",
) -> optax.GradientTransformationExtraArgs:
    """Descend the gradient with a rate of one over the loss's Lipschitz constant.

    Choose it to train without searching for a rate. With L of ``scale_by_lipschitz_rate``,

        g ← g + λ w,    w ← w − g / L

    and with momentum v ← βv + (1−β)g, K ← βK + (1−β)L, w ← w − v / K.

    That rate is large, and more than many nets with hidden layers bear. Once the loss has risen to
    1.5 times its first value the guards therefore bound each step's length by 1, which is what a
    true Lipschitz constant would do; ``guards="off"`` is the paper's own rule.

    Args:
      loss: ``"softmax_cross_entropy"``, ``"binary_cross_entropy"`` or ``"least_squares"``.
      num_classes: k >= 2, for softmax cross-entropy.
      weight_decay: λ >= 0, added here to the gradient and to L. If the loss has the penalty itself,
        use ``scale_by_lipschitz_rate``, which counts it in L only.
      momentum: β in [0, 1), or None.
      target_norm: ‖y‖ of a minibatch, for least squares.
      steps_per_epoch: 1 for a new rate at every step, else one an epoch, as in the paper.
      last_layer: key path of the last layer's kernel, or None for the layer executed last.
      guards: ``"on"``, a ``LipschitzGuards`` or a mapping of its fields; ``"off"`` for none.

    Returns:
      A transformation that reads the extra ``head`` of ``optalr.value_grad_and_extras``.

    Raises:
      ValueError: an argument is out of range or missing.

    Cost: that of SGD, and a trace of the last layer's captured moment.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> x, y = jnp.array([[1.0], [-1.0]]), jnp.array([1.0, 0.0])
      >>> logistic = lambda w: optax.sigmoid_binary_cross_entropy((x @ w)[:, 0], y).mean()
      >>> evaluate = optalr.value_grad_and_extras(logistic)
      >>> tx = optalr.lipschitz_sgd("binary_cross_entropy")
      >>> w = jnp.zeros((1, 1))
      >>> value, grads, extras = evaluate(w)
      >>> updates, state = tx.update(grads, tx.init(w), w, **extras)
      >>> rate = float(optalr.metrics(state)["learning_rate"])
      >>> round(rate, 4), bool(logistic(optax.apply_updates(w, updates)) < value)  # 2m / √2
      (2.8284, True)

    Reference: Yedida, Saha, "A novel adaptive learning rate scheduler for deep neural networks",
      and their follow-up with momentum.
    """
    links: list[optax.GradientTransformation] = []
    if not (is_concrete(weight_decay) and weight_decay == 0):
        links.append(optax.add_decayed_weights(weight_decay))
    if momentum is not None:
        check_interval("momentum", momentum, 0.0, 1.0, open_high=True)
        links.append(optax.ema(momentum, debias=False))
    scale = scale_by_lipschitz_rate(
        loss,
        num_classes=num_classes,
        weight_decay=weight_decay,
        target_norm=target_norm,
        averages=() if momentum is None else (momentum,),
        steps_per_epoch=steps_per_epoch,
        last_layer=last_layer,
        guards=guards,
    )
    return optax.chain(*links, scale)


def lipschitz_adam(
    loss: str,
    *,
    num_classes: Any = None,
    weight_decay: Any = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    steps_per_epoch: Any = 1,
    last_layer: str | None = None,
    guards: LipschitzGuards | Mapping[str, Any] | str | None = "on",
) -> optax.GradientTransformationExtraArgs:
    """Run Adam with the rate that the Lipschitz constant of the loss gives.

    Choose it for the authors' follow-up of their rate for SGD; at 0.1 and more it is far larger
    than what Adam is usually given, and small nets learn only with the default guards. With K₁, K₂
    of ``scale_by_lipschitz_rate``, η = (√K₂ + 1e-8) / K₁.

    Args:
      loss: ``"softmax_cross_entropy"`` or ``"binary_cross_entropy"``.
      num_classes: k >= 2, for softmax cross-entropy.
      weight_decay: λ >= 0, added here to the gradient and to L.
      b1: decay of Adam's first moment and of K₁, in [0, 1).
      b2: decay of Adam's second moment and of K₂, in [0, 1).
      steps_per_epoch: 1 for a new rate at every step, else one an epoch.
      last_layer: key path of the last layer's kernel, or None for the layer executed last.
      guards: ``"on"``, a ``LipschitzGuards`` or a mapping of its fields; ``"off"`` for none.

    Returns:
      A transformation that reads the extra ``head`` of ``optalr.value_grad_and_extras``.

    Raises:
      ValueError: an argument is out of range or missing.

    Cost: that of Adam, and a trace of the last layer's captured moment.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> x, y = jnp.array([[1.0], [-1.0]]), jnp.array([1.0, 0.0])
      >>> logistic = lambda w: optax.sigmoid_binary_cross_entropy((x @ w)[:, 0], y).mean()
      >>> evaluate = optalr.value_grad_and_extras(logistic)
      >>> tx = optalr.lipschitz_adam("binary_cross_entropy")
      >>> w = jnp.zeros((1, 1))
      >>> value, grads, extras = evaluate(w)
      >>> updates, state = tx.update(grads, tx.init(w), w, **extras)
      >>> bool(logistic(optax.apply_updates(w, updates)) < value)
      True

    Reference: Yedida, Saha, Prashanth, "LipschitzLR: Using theoretically computed adaptive learning
      rates for fast convergence", 2020. Departures: the bound on ‖a∘a‖_F from captured moments,
      and both averages freed of their bias.
    """
    links: list[optax.GradientTransformation] = []
    if not (is_concrete(weight_decay) and weight_decay == 0):
        links.append(optax.add_decayed_weights(weight_decay))
    scale = scale_by_lipschitz_rate(
        loss,
        num_classes=num_classes,
        weight_decay=weight_decay,
        averages=(b1, b2),
        steps_per_epoch=steps_per_epoch,
        last_layer=last_layer,
        guards=guards,
    )
    return optax.chain(*links, optax.scale_by_adam(b1, b2), scale)
