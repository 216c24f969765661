"""The classical optimizers by name, with any rate or schedule and a gain per weight."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import optax

from optalr.arguments import check_choice, check_transformation
from optalr.transforms.guard import guard
from optalr.transforms.local_gains import scale_by_local_gains
from optalr.transforms.recorded_rate import Rate, scale_by_recorded_rate


def classical(
    rule: str | optax.GradientTransformation,
    learning_rate: Rate,
    *,
    gains: optax.GradientTransformation | Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Combine one of optax's classical rules with any schedule, and with a gain per weight.

    Choose it for a baseline that survives a bad batch, that runs in float32 whatever the dtype of
    the parameters, and whose rate ``optalr.metrics`` can read. With u the update of the rule before
    its rate,

        θ ← θ − η u,    with gains    θ ← θ − η gain ⊙ u.

    Args:
      rule: a name in ``CLASSICAL_RULES``: ``"sgd"``, ``"momentum"`` (0.9), ``"nesterov"`` (0.9),
        ``"rmsprop"`` (decay 0.9, eps outside the root, as in the lecture), ``"adam"``,
        ``"amsgrad"``, ``"adagrad"``, ``"adadelta"``. For other settings pass an optax
        transformation without a rate, such as ``optax.scale_by_adam(b2=0.99)``. PyTorch's
        ``dampening=d`` is ``optax.chain(optax.scale(1 - d), optax.trace(momentum))``, except for
        the first step, which PyTorch does not dampen.
      learning_rate: η, at least 0, or a schedule from ``optax`` or ``optalr.schedules``.
      gains: ``optalr.scale_by_local_gains(...)``, a mapping of its arguments, or None. A gain
        follows the sign of u. It comes after the rule, because a rule that divides by the size of
        the gradient would divide out gains that come before it.

    Returns:
      A transformation.

    Raises:
      ValueError: the name of the rule is unknown, or the rate is negative.
      TypeError: ``rule`` or ``gains`` is of another kind.

    Cost: that of optax's rule, and of the gains.

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

    Reference: Raschka, "Common Optimization Algorithms", STAT 479 lecture 12, 2019. Our departures
    from the sources: what they do; what we do, and why: what it changes (an MLP on digits, 200
    steps, five seeds; docs/lecture.md):

    * AMSGrad (Reddi, Kale & Kumar, Algorithm 2) corrects no bias and has no ε; ours is optax's,
      both moments corrected and ε = 1e-8, since all rules here are optax's own: test loss 0.0712
      for 0.0975 to the letter at 1e-2, 0.110 for 0.0730 at 1e-3. ``optalr.paper.amsgrad`` runs the
      algorithm as it is printed.
    * no guard; ours drops or shortens a bad gradient, since one batch must not end a run: not
      measured.
    """
    if isinstance(rule, str):
        check_choice("rule", rule, tuple(CLASSICAL_RULES))
        rule = CLASSICAL_RULES[rule]()
    if isinstance(gains, Mapping):
        gains = scale_by_local_gains(**gains)
    for name, link in (("rule", rule), ("gains", gains)):
        check_transformation(name, link, optional=name == "gains")
    links = [rule] if gains is None else [rule, gains]
    return guard(optax.chain(*links, scale_by_recorded_rate(learning_rate)))


# Functions that make them, so that each optimizer gets a transformation of its own.
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
