"""The two rates that need no tuning, as published: learned, and from a Lipschitz constant."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import is_python_zero
from optalr.signals.ray import ExactDerivatives, FiniteDifferences
from optalr.transforms.learned_rate.safeguards import RateSafeguards
from optalr.transforms.learned_rate.transform import scale_by_learned_rate
from optalr.transforms.published.epoch_rate import scale_by_epoch_rate
from optalr.transforms.shared.making import chained, judging


def learned_rate_sgd(
    initial_rate: Any,
    *,
    order: int = 2,
    meta_rate: Any = 1e-6,
    step: Any = 1e-5,
    smoothing: Any = 1e-6,
    rate_momentum: Any = 0.0,
    probe: str = "value_fn",
) -> optax.GradientTransformationExtraArgs:
    """Descend the gradient at a rate learned as Ravaut & Gorti print it, without safeguards.

    Choose it to rerun the paper, and to see what ``optalr.learned_rate_sgd`` changes. In the
    paper's symbols, with ``f(η) = L(w(t) − η g(t))`` on the batch at hand,

        w(t+1) = w(t) − η(t) g(t)                                                    eq. 9
        D = f(η+2ε) + f(η−2ε) − 2f(η),    D ← D + δ where D ≈ 0                       eq. 17-18
        η(t+1) = η(t) − 2ε (f(η+ε) − f(η−ε)) / D                                     eq. 16
        η(t+1) = max(η(t+1), δ)                                                      eq. 19

    Of order 1 the rate follows ``η(t+1) = η(t) − α f'(η(t))`` with ``f' = −g(t)ᵀ ∇L(w(t+1))``
    (eq. 6-7). β gives the rate a momentum: what eq. 16 adds to η is added to β times what was added
    before (eq. 20-21).

    What happens: in float32 ε = 1e-5 is below what D can resolve, so the rate is moved by rounding.
    On 5000 MNIST digits (logistic regression, five seeds) that trains all the same, to a test loss
    of 0.390 ± 0.023. With ε = 1e-2 the rule is Newton's, and one of the five seeds breaks down.
    With a momentum of 0.9 on the rate and exact derivatives four of five diverge.

    Args:
      initial_rate: η(0) > 0.
      order: 2 for eq. 16, 1 for eq. 6.
      meta_rate: α > 0, for order 1; the paper's is 1e-6 on MNIST and 1e-9 on Boston Housing.
      step: ε > 0, for order 2.
      smoothing: δ > 0: what is added to a D of zero, and the least rate. "≈ 0" is taken as zero up
        to one rounding of f; the paper does not say.
      rate_momentum: β of eq. 20-21, in [0, 1).
      probe: the extra that holds the loss of f; that of a validation batch for eq. 22-23.

    Returns:
      A transformation that reads ``value_fn`` of ``optalr.value_grad_and_extras``.

    Raises:
      ValueError: an argument is out of range.

    Cost: five forward passes beside the gradient (order 2), or one forward derivative (order 1).

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> evaluate = optalr.value_grad_and_extras(lambda w: jnp.sum((w - 1) ** 2))
      >>> tx = optalr.paper.learned_rate_sgd(0.01, step=0.1)  # 1e-5 is rounding noise in float32
      >>> w = jnp.zeros(3)
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     value, grads, extras = evaluate(w)
      ...     updates, state = tx.update(grads, state, w, **extras)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(jnp.allclose(w, 1.0, atol=1e-3))
      True

    Reference: Ravaut, Gorti, "Faster gradient descent via an adaptive learning rate", eq. 5-23.
    It is ``optalr.scale_by_learned_rate`` with these settings, which change nothing else.
    """
    derivatives = FiniteDifferences(step=step, smoothing=smoothing)
    scale = scale_by_learned_rate(
        initial_rate,
        order=order,
        meta_rate=meta_rate,
        derivatives=ExactDerivatives() if order == 1 else derivatives,
        rate_momentum=rate_momentum,
        probe=probe,
        safeguards=RateSafeguards.off(floor=smoothing),
    )
    return chained("paper.learned_rate_sgd", scale)


def lipschitz_sgd(
    loss: str,
    *,
    steps_per_epoch: Any,
    num_classes: Any = None,
    weight_decay: Any = 0.0,
    target_norm: Any = None,
    every_epoch: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Descend the gradient at one over a Lipschitz constant, as Yedida & Saha print it.

    Choose it to rerun the paper, and to see what ``optalr.lipschitz_sgd`` changes. In the paper's
    symbols, with m the batch size, k the number of classes and λ the weight decay,

        K_z = max over the minibatches of ‖a^{[L−1]}‖_F,    max‖w‖ = max_l ‖W_l‖_F
        L = (k−1)/(km) K_z + λ max‖w‖        eq. 20        (K_z/2m: eq. 15; (K_a+‖y‖)K_z/m: eq. 9)
        w ← w − (g + λ w)/L,    the same L for an epoch

    K_z belongs to the weights with which an epoch begins. It takes a pass over the data ("around 3
    extra seconds per epoch"). So here ``steps_per_epoch`` updates that move nothing and only
    measure come before the ``steps_per_epoch`` updates of each epoch: an epoch of the paper is two
    passes of your loop.

    What happens: a net with hidden layers breaks down. On digits (an MLP, 20 epochs, five seeds)
    four seeds diverge and the fifth learns nothing; the fixed rate leaves all five at chance.
    ``optalr.lipschitz_sgd`` ends at a test loss of 0.079 with its guards. Logistic regression,
    which has no hidden units to lose, trains at this rate (docs/lipschitz_rate.md).

    Args:
      loss: ``"softmax_cross_entropy"``, ``"binary_cross_entropy"`` (means over the batch) or
        ``"least_squares"`` (``‖a − y‖² / 2m``).
      steps_per_epoch: minibatches of a pass, ≥ 1.
      num_classes: k ≥ 2, for softmax cross-entropy.
      weight_decay: λ ≥ 0, added to L and to the gradient of leaves of two or more axes.
      target_norm: ‖y‖ of a minibatch, for least squares.
      every_epoch: True for a new rate before each epoch; False for the paper's "same fixed
        learning rate", measured once in the first pass and never again.

    Returns:
      A transformation that reads ``head`` of ``optalr.value_grad_and_extras`` while it measures,
      with weight decay ``point`` or the parameters, and ``outputs`` for least squares.

    Raises:
      ValueError: an argument is out of range or missing.

    Cost: SGD's, twice as many steps with ``every_epoch``; with decay the norms of the weights.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> x, y = jnp.array([[1.0], [-1.0]]), jnp.array([1.0, 0.0])
      >>> logistic = lambda w: optax.sigmoid_binary_cross_entropy((x @ w)[:, 0], y).mean()
      >>> evaluate = optalr.value_grad_and_extras(logistic)
      >>> tx = optalr.paper.lipschitz_sgd("binary_cross_entropy", steps_per_epoch=1)
      >>> w = jnp.zeros((1, 1))
      >>> state = tx.init(w)
      >>> for _ in range(2):  # the first measures
      ...     value, grads, extras = evaluate(w)
      ...     updates, state = tx.update(grads, state, w, **extras)
      ...     w = optax.apply_updates(w, updates)
      >>> round(float(optalr.metrics(state)["learning_rate"]), 4), bool(logistic(w) < value)
      (2.8284, True)

    Reference: Yedida, Saha, "A novel adaptive learning rate scheduler for deep neural networks",
    eq. 9, 15, 20 and section 7. Mended: ``K_a + ‖y‖`` for the minus sign of eq. 9. The norms are
    Frobenius norms, which the paper's own numbers (K_z = 206.695 and so on) settle.
    """
    scale = scale_by_epoch_rate(
        loss,
        steps_per_epoch=steps_per_epoch,
        num_classes=num_classes,
        weight_decay=weight_decay,
        target_norm=target_norm,
        every_epoch=every_epoch,
    )
    if is_python_zero(weight_decay):
        return chained("paper.lipschitz_sgd", scale)
    penalty = optax.add_decayed_weights(weight_decay, mask=_kernels)
    penalty = judging("paper.lipschitz_sgd", penalty, lambda s: isinstance(s, optax.MaskedState))
    return chained("paper.lipschitz_sgd", penalty, scale)


def _kernels(params: Any) -> Any:
    """Return which leaves are weights: those of two or more axes."""
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)
