"""SGD and Adam with the inverse of a Lipschitz constant as their rate."""

from collections.abc import Mapping
from typing import Any

import optax

from optalr.arguments import check_interval, is_python_zero
from optalr.transforms.guard import guard
from optalr.transforms.lipschitz_rate.guards import LipschitzGuards
from optalr.transforms.lipschitz_rate.transform import scale_by_lipschitz_rate
from optalr.transforms.shared.making import chained


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

    That rate is large, too large for many nets with hidden layers. Once the loss has risen to 1.5
    times its first value, the guards therefore bound the length of each step by 1, as a true
    Lipschitz constant would. ``guards="off"`` is the paper's own rule.

    Args:
      loss: ``"softmax_cross_entropy"``, ``"binary_cross_entropy"`` or ``"least_squares"``.
      num_classes: k >= 2, for softmax cross-entropy.
      weight_decay: λ >= 0, added here to the gradient and to L. If the loss itself contains the
        penalty, use ``scale_by_lipschitz_rate``, which counts it in L only.
      momentum: β in [0, 1), or None.
      target_norm: ‖y‖ of a minibatch, for least squares.
      steps_per_epoch: 1 for a new rate at every step; the number of steps in an epoch for a new
        rate per epoch, as in the paper.
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
    and their follow-up with momentum. ``optalr.paper.lipschitz_sgd`` runs the first as it is
    printed. Our departures: what the paper does; what we do, and why: the test loss of the paper's
    way (an MLP on digits, five seeds; ours 0.0787; docs/lipschitz_rate.md):

    * one K_z an epoch, from a pass before it; ours each minibatch's own, since that needs no pass
      and is never an epoch old: to the letter (no guard either) 4 of 5 seeds diverge, 2.84 with the
      other; with ``steps_per_epoch=n, guards="off"`` 2.3 to 50; one rate for the whole run 2.29.
    * no guard; ours on the length of a step once the loss has risen, since the rate is too large
      for nets with hidden layers: test accuracy 8 to 20 % without it, 95.0 to 97.8 % with it.
    * nothing against a bad gradient; ours drops or shortens it, since one batch must not end a run:
      not measured.
    * decay of kernels only; ours of all leaves, as ``optax.add_decayed_weights`` has it: not
      measured.
    * ‖y‖ subtracted (eq. 9); ours added (in ``optalr.paper`` too), since the printed sign, an
      erratum, can make the rate negative: not measured.
    """
    links = _penalty(weight_decay)
    if momentum is not None:
        check_interval("momentum", momentum, 0.0, 1.0, open_high=True)
        links.append(guard(optax.ema(momentum, debias=False)))
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
    return chained("lipschitz_sgd", *links, scale)


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
    """Run Adam with a rate from the Lipschitz constant of the loss.

    Choose it to try the authors' follow-up of their rate for SGD. The rate is 0.1 and more, far
    larger than Adam's usual ones, and small nets learn only with the default guards. With K₁ and K₂
    of ``scale_by_lipschitz_rate``, η = (√K₂ + 1e-8) / K₁.

    Args:
      loss: ``"softmax_cross_entropy"`` or ``"binary_cross_entropy"``.
      num_classes: k >= 2, for softmax cross-entropy.
      weight_decay: λ >= 0, added here to the gradient and to L.
      b1: decay of Adam's first moment and of K₁, in [0, 1).
      b2: decay of Adam's second moment and of K₂, in [0, 1).
      steps_per_epoch: 1 for a new rate at every step; the number of steps in an epoch for a new
        rate per epoch.
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
      and both averages corrected for their bias.
    """
    check_interval("b1", b1, 0.0, 1.0, open_high=True)
    check_interval("b2", b2, 0.0, 1.0, open_high=True)
    links = _penalty(weight_decay)
    scale = scale_by_lipschitz_rate(
        loss,
        num_classes=num_classes,
        weight_decay=weight_decay,
        averages=(b1, b2),
        steps_per_epoch=steps_per_epoch,
        last_layer=last_layer,
        guards=guards,
    )
    return chained("lipschitz_adam", *links, guard(optax.scale_by_adam(b1, b2)), scale)


def _penalty(weight_decay: Any) -> list[optax.GradientTransformation]:
    """Return what adds the penalty's gradient; nothing for the number 0."""
    if is_python_zero(weight_decay):
        return []
    return [optax.add_decayed_weights(weight_decay)]
