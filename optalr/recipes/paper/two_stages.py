"""TSO-ALRA as published."""

from typing import Any

import optax

from optalr import phases
from optalr.arguments import check_count
from optalr.phases.switching import no_switch
from optalr.signals.coverage import Coverage
from optalr.transforms.published.eigen_roots import scale_by_eigen_roots
from optalr.transforms.recorded_rate import Rate, scale_by_recorded_rate
from optalr.transforms.shared.making import chained


def tso_alra(
    learning_rate: Rate,
    *,
    update_every: Any = 50,
    decay: Any = 0.95,
    damping: Any = 1e-6,
    switch_at: int | None = None,
    phase: Any = None,
    layout: Coverage | None = None,
    max_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Run Algorithm 1 of Ida & Fujiwara as it is printed: no momentum, no warm-up, no bound.

    Choose it to rerun the paper, and to see what ``optalr.tso_alra`` changes. In the paper's
    symbols, with ``α`` the inputs and ``β`` the back-propagated signals of layer l, at every step t

        B_t = (1−γ) B_{t−1} + γ E[ββᵀ],    A_t = (1−γ) A_{t−1} + γ E[ααᵀ],    A_0 = B_0 = 0
        t ≡ 0 (mod T_int):    B^{−1/2} = U (Λ + εI)^{−1/2} Uᵀ,    A^{−1/2} likewise
        θ_{t+1} = θ_t − η vec(A^{−1/2} g_t B^{−1/2})

    and after the switch ``θ_{t+1} = θ_t − η g_t``. Before the first roots, t < T_int, the step is
    that of the gradient, because the algorithm has no roots by then.

    What happens: at the paper's rate of 1e-2 it trains (digits, an MLP, 20 epochs with the switch
    after 12: test loss 0.103 ± 0.009 over five seeds; ``optalr.tso_alra`` ends at 0.057). At 0.1
    four of the five seeds diverge. The first roots come of averages that are still small, and of
    batches that have not filled every direction, and 1/√ε is a thousand.

    Args:
      learning_rate: η, ≥ 0, or a schedule of the updates since the start; both loops have it.
      update_every: T_int, ≥ 1. The paper gives no value.
      decay: 1 − γ, the weight of the past, in [0, 1]. The paper gives no value.
      damping: ε, ≥ 0, absolute; the paper's is 1e-6.
      switch_at: the update from which the second loop runs; None for no switch.
      phase: a phase scheduler instead, such as ``optalr.switch_on_plateau()`` for the paper's
        "minimum validation loss is not altered over several epochs".
      layout: what ``optalr.coverage(loss_fn, params, *args)`` returned, where a leaf's matrix view
        is not "all axes but the last by the last", or a matrix is no layer.
      max_size: the longest side of a matrix that is decomposed; ``init`` refuses a longer one.

    Returns:
      A transformation that reads the extra ``signals``, at every step of the first loop. The paper
      measures whole batches: pass ``max_cost=None`` to ``value_grad_and_extras`` where it would
      sample (above 10⁸ flops).

    Raises:
      ValueError: a number is out of range, both ``switch_at`` and ``phase`` are given, or (at
        ``init``) a side is longer than ``max_size``.

    Cost: a measurement at every step, an eigendecomposition of every factor every T_int steps, two
      products per kernel and step. Memory: 2(m² + n²) numbers a kernel.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> loss_fn = lambda w: 0.5 * jnp.mean((jnp.eye(2) @ w - jnp.array([[3.0], [0.01]])) ** 2)
      >>> evaluate = optalr.value_grad_and_extras(loss_fn)
      >>> tx = optalr.paper.tso_alra(0.1, update_every=1, decay=0.0)
      >>> w = jnp.zeros((2, 1))
      >>> value, grads, extras = evaluate(w)
      >>> updates, state = tx.update(grads, tx.init(w), w, **extras)
      >>> bool(loss_fn(optax.apply_updates(w, updates)) < value)
      True

    Reference: Yasutoshi Ida and Yasuhiro Fujiwara, "Improving Generalization Performance of
    Adaptive Learning Rate by Switching from Block Diagonal Matrix Preconditioning to SGD", 2020,
    eq. 14-18 and Algorithm 1. Mended: the factors stand on the sides that fit g (eq. 15 holds for
    its transpose). Left open by the paper, and taken so: A and B begin at zero; a bias is a kernel
    whose input is 1; what is no layer keeps its gradient.
    """
    if switch_at is not None and phase is not None:
        raise ValueError("switch_at and phase both say when to switch. Pass one of them.")
    if switch_at is not None:
        check_count("switch_at", switch_at, 0)
        phase = phases.switch_at(switch_at)
    direction = scale_by_eigen_roots(
        decay=decay, damping=damping, update_every=update_every, layout=layout, max_size=max_size
    )
    first = no_switch() if phase is None else phase
    stages = phases.two_stage(direction, optax.identity(), first, guard=False)
    return chained("paper.tso_alra", stages, scale_by_recorded_rate(learning_rate))
