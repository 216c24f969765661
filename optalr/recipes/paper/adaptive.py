"""SWATS and AMSGrad as published."""

from typing import Any

import optax

from optalr.transforms.published.amsgrad_rule import scale_by_published_amsgrad
from optalr.transforms.published.swats_rule import scale_by_published_swats
from optalr.transforms.recorded_rate import Rate, scale_by_recorded_rate
from optalr.transforms.shared.making import chained


def swats(
    learning_rate: Rate = 1e-3, *, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-9
) -> optax.GradientTransformationExtraArgs:
    """Switch from Adam to SGD by Algorithm 1 of Keskar & Socher, without any guard.

    Choose it to rerun the paper, and to see what ``optalr.swats`` changes. In the paper's symbols,

        m_k = β₁ m_{k−1} + (1−β₁) g_k,    a_k = β₂ a_{k−1} + (1−β₂) g_k²
        p_k = −α_k √(1−β₂ᵏ)/(1−β₁ᵏ) · m_k/(√a_k + ε),    w_k = w_{k−1} + p_k
        p_kᵀg_k ≠ 0:    γ_k = p_kᵀp_k/(−p_kᵀg_k),    λ_k = β₂ λ_{k−1} + (1−β₂) γ_k
        k > 1 and |λ_k/(1−β₂ᵏ) − γ_k| < ε:    Λ = λ_k/(1−β₂ᵏ), v = 0, and from then on

        v_k = β₁ v_{k−1} + g_k,    w_k = w_{k−1} − (1−β₁) Λ v_k

    One ε, 1e-9, serves Adam's division and the test. Λ may be negative; then SGD climbs.

    What happens: the test hardly ever holds at 1e-9. On digits (an MLP, 400 steps, five seeds) no
    run switched, neither at 1e-9 nor at 1e-5, so it was Adam that trained (docs/lecture.md).

    Args:
      learning_rate: α_k, ≥ 0, or a schedule of the step count.
      b1: β₁, in [0, 1); also SGD's momentum.
      b2: β₂, in [0, 1).
      eps: ε ≥ 0.

    Returns:
      A transformation, whose state holds ``phase`` and the rate applied.

    Raises:
      ValueError: an argument is out of range.

    Cost: Adam's and two inner products. Memory: two copies of the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> tx = optalr.paper.swats(0.1, eps=1e-6)
      >>> params, gradient = jnp.array([3.0, 4.0]), jnp.array([1.0, 3.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):  # for a constant gradient γ = 0.1 · 2/(1 + 3) in every step
      ...     updates, state = tx.update(gradient, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(optalr.metrics(state)["phase"])
      1.0

    Reference: Keskar, Socher, "Improving Generalization Performance by Switching from Adam to SGD",
    2017, Algorithm 1; named by the lecture (Raschka, STAT 479, lecture 12).
    """
    rule = scale_by_published_swats(learning_rate, b1=b1, b2=b2, eps=eps)
    return chained("paper.swats", rule)


def amsgrad(
    learning_rate: Rate, *, b1: Any = 0.9, b2: Any = 0.999
) -> optax.GradientTransformationExtraArgs:
    """Run Algorithm 2 of Reddi, Kale & Kumar: no bias correction, no ε.

    Choose it to rerun the baseline of the TSO-ALRA paper. In the symbols of its authors,

        m_t = β₁ m_{t−1} + (1−β₁) g_t,    v_t = β₂ v_{t−1} + (1−β₂) g_t²
        v̂_t = max(v̂_{t−1}, v_t),    x_{t+1} = x_t − α_t m_t/√v̂_t

    ``optax.amsgrad`` takes the maximum over bias-corrected second moments, corrects the first, and
    adds ε = 1e-8. Its first step is α in every coordinate; this one's is α (1−β₁)/√(1−β₂), which is
    3.1623 α at the usual β₁ = 0.9 and β₂ = 0.999.

    What happens: its first steps are longer, and so is every step until 1 − β₂ᵗ is near 1, some
    thousand steps on. On digits (an MLP, 200 steps, five seeds) it ends at 1e-3 with a test loss of
    0.073 ± 0.003, where optax's ends at 0.110 ± 0.002, and at 1e-2 with 0.098 ± 0.035 against
    0.071 ± 0.004: as if its rate were larger.

    Args:
      learning_rate: α_t, ≥ 0, or a schedule of the updates so far.
      b1: β₁, in [0, 1).
      b2: β₂, in [0, 1).

    Returns:
      A transformation.

    Raises:
      ValueError: an argument is out of range.

    Cost: Adam's, and one more copy of the parameters.

    Examples:
      >>> import jax.numpy as jnp, optalr
      >>> tx = optalr.paper.amsgrad(1.0)
      >>> params = jnp.zeros(2)
      >>> updates, state = tx.update(jnp.array([5.0, -0.1]), tx.init(params), params)
      >>> [round(float(u), 4) for u in updates]
      [-3.1623, 3.1623]

    Reference: Sashank J. Reddi, Satyen Kale, Sanjiv Kumar, "On the Convergence of Adam and Beyond",
    2018, Algorithm 2, on the whole space (no projection). Left open there: 0/0, a weight whose
    gradients were all zero, stands still.
    """
    rate = scale_by_recorded_rate(learning_rate)
    return chained("paper.amsgrad", scale_by_published_amsgrad(b1, b2), rate)
