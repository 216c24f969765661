"""SGD at a learned rate, and other optimizers at the rate that was found."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optalr import phases
from optalr.arguments import check_interval, check_kind
from optalr.transforms.guard import guard
from optalr.transforms.learned_rate.safeguards import RateSafeguards
from optalr.transforms.learned_rate.transform import LearnedRateState, scale_by_learned_rate
from optalr.transforms.shared.making import chained


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

    Choose it to train without searching for a rate, above all in the first epochs, or to find a
    rate, as ``optalr.suggest_learning_rate`` does. It is
    ``optax.chain(optalr.guard(optax.trace(momentum)), scale_by_learned_rate(initial_rate, ...))``.

    Args:
      initial_rate: η₀ > 0.
      order: 2 for Newton's method on the rate, 1 for gradient descent on it.
      momentum: decay of the gradients' momentum, in [0, 1); None (as in the paper) for plain SGD.
      meta_rate: α > 0, for order 1; the paper's are 1e-6 (MNIST) and 1e-9 (Boston Housing).
      derivatives: ``"exact"``, ``"finite_differences"``, ``"successive_gradients"``, or a
        configured one of these (``optalr.FiniteDifferences(...)``, ...).
      rate_momentum: decay of the rate's own momentum, in [0, 1).
      every: steps between updates of the rate, >= 1.
      lag: whether a new rate is applied from the next step on, as published, rather than at once.
      probe: the name of the extra that holds the loss to probe.
      safeguards: ``"on"``, a ``RateSafeguards`` or a mapping of its fields; ``"off"`` or None for
        the paper's bare rule.

    Returns:
      A transformation that reads ``value_fn`` and the other extras of
      ``optalr.value_grad_and_extras``; see ``scale_by_learned_rate``.

    Raises:
      ValueError: an argument is out of range.

    Cost: that of ``scale_by_learned_rate``; at order 2 about 8/3 of an SGD step.

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

    Reference: Ravaut, Gorti, "Faster gradient descent via an adaptive learning rate", eq. 5-23,
    which ``optalr.paper.learned_rate_sgd`` runs as it is printed. Our departures: what the paper
    does; what we do, and why: the test loss of the paper's way (logistic regression on 5000 MNIST
    digits, five seeds; ours 0.526 ± 0.053; docs/learned_rate.md):

    * f' and f'' from differences at ε = 1e-5; ours exact, since the second difference is
      rounding noise in float32: 0.390 ± 0.023 to the letter, and 1.8 ± 3 at ε = 1e-2.
    * no safeguard but a floor of 1e-6; ours where f'' ≤ 0, the loss explodes or a number is not
      finite, since Newton's rule fails there, and a floor of 1e-12, since a sum over many examples
      needs less than 1e-6: 1.9 ± 3 with exact derivatives and none.
    * momentum of 0.9 on the rate (eq. 20-21); ours none, since Newton's step is a whole one:
      0.495 with our safeguards, above 1e6 with those but for ``max_drag``; 4 of 5 seeds diverge
      with none.
    * a validation batch to probe, as a variant (eq. 22-23); ours the step's own batch, as in eq.
      5-21, and the variant by ``probe``: 0.366 to the letter.
    * α = 1e-6 on MNIST and 1e-9 on Boston Housing; ours 1e-3, for order 1 alone: not measured.
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
        return chained("learned_rate_sgd", scale)
    check_interval("momentum", momentum, 0.0, 1.0, open_high=True)
    return chained("learned_rate_sgd", guard(optax.trace(momentum)), scale)


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

    Choose it to follow the paper's own conclusion: the learned rate is fastest in the first epochs,
    and its steps cost more. At the switch ``second`` gets the geometric mean of the last hundred
    learned rates (single rates are noisy), times ``rate_factor``, as its ``learning_rate``.

    Args:
      second: a factory that takes ``learning_rate``, such as ``optax.sgd``.
      initial_rate: η₀ > 0 of the first stage.
      phase: when to switch: ``optalr.switch_at(step)``, ``optalr.switch_on_plateau(...)``.
      rate_factor: > 0, the factor on the rate found: 1 - β for SGD with momentum β, and about 1e-2
        for Adam, whose direction has another length.
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
    check_kind("first", first, dict)
    learned = learned_rate_sgd(initial_rate, **(first or {}))
    start = float(initial_rate) * rate_factor
    following = optax.inject_hyperparams(second, hyperparam_dtype=jnp.float32)(
        learning_rate=start, **second_options
    )

    def hand_over_rate(first_state: Any, second_state: Any) -> Any:
        states = jax.tree.leaves(first_state, is_leaf=lambda x: isinstance(x, LearnedRateState))
        found = next(x for x in states if isinstance(x, LearnedRateState)).average_rate
        rate = jnp.asarray(rate_factor * found, jnp.float32)
        return second_state._replace(
            hyperparams={**second_state.hyperparams, "learning_rate": rate}
        )

    return phases.two_stage(learned, following, phase, momentum=hand_over_rate)
