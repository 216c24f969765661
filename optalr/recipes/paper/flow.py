"""Exponentially decaying flows as published."""

from typing import Any

import optax

from optalr.arguments import check_choice
from optalr.transforms.published.minres_flow import ACCELERATIONS, scale_by_minres_flow
from optalr.transforms.recorded_rate import Rate, scale_by_recorded_rate
from optalr.transforms.shared.making import chained


def edf(
    learning_rate: Rate,
    *,
    curvature: str = "gauss_newton",
    num_steps: int = 1,
    damping: tuple[Any, Any] = (1.0, 1.0),
    acceleration: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Follow the flow by Algorithms 1 and 2 of the paper, without any guard.

    Choose it to rerun the paper, and to see what ``optalr.edf`` changes. In the paper's symbols,
    with ``g = ∇L``, ``s = ‖g‖`` and ``λ = a s^b``, for k = 1

        u = (G + λI) g,    c = ⟨g, u⟩/⟨u, u⟩,    v = c g,    w ← w − η v          Algorithm 2

    and for larger k the k-th iterate v of MINRES for ``(G + λI) v = g`` by Algorithm 1, letter by
    letter. H stands in G's place for type H. W1 puts momentum 0.9 between v and η; W2 is Nesterov's
    scheme with friction 3/t on the step.

    What happens: with damping and k = 1 or 2 it does what ``optalr.edf`` does, until something
    breaks: a gradient of zero, or a Krylov space that is exhausted, is 0/0 and the run is over.
    Undamped full batches at η = 1 break down on our net from k = 5 on, and type H can climb
    (docs/measured/exponentially_decaying_flows.md).

    Args:
      learning_rate: η, ≥ 0, or a schedule of the updates so far.
      curvature: ``"gauss_newton"`` (EDF-G; the loss must be an ``optalr.composite_loss``) or
        ``"hessian"`` (EDF-H).
      num_steps: k, ≥ 1.
      damping: ``(a, b)``, both ≥ 0; ``(1, 1)`` for minibatches, ``(0, 1)`` for none, as in the
        paper's full-batch fits.
      acceleration: None, ``"W1"`` or ``"W2"``.

    Returns:
      A transformation that reads ``gauss_newton`` or ``hessian`` of
      ``optalr.value_grad_and_extras``.

    Raises:
      ValueError: an argument is out of range.

    Cost: k curvature products a step, unrolled.

    Examples:
      >>> import jax.numpy as jnp, optax, optalr
      >>> X, y = jnp.array([[1.0, 2.0], [3.0, 5.0]]), jnp.array([5.0, 6.0])
      >>> loss = optalr.composite_loss(lambda w: X @ w, lambda z: 0.5 * jnp.mean((z - y) ** 2))
      >>> evaluate = optalr.value_grad_and_extras(loss)
      >>> tx, w = optalr.paper.edf(1.0, num_steps=2, damping=(0.0, 1.0)), jnp.zeros(2)
      >>> value, grads, extras = evaluate(w)
      >>> updates, state = tx.update(grads, tx.init(w), w, **extras)
      >>> bool(loss(optax.apply_updates(w, updates)) < 1e-3 * value)  # two steps, two unknowns
      True

    Reference: "Exponentially decaying flows for optimization in deep learning", eq. 20-25,
    Algorithms 1 and 2. Mended: ``u + λv₁`` for the ``u + λg`` of Algorithm 1, which contradicts
    Algorithm 2 and eq. 24.
    """
    links = [scale_by_minres_flow(curvature=curvature, num_steps=num_steps, damping=damping)]
    rate = scale_by_recorded_rate(learning_rate)
    if acceleration is None:
        return chained("paper.edf", *links, rate)
    check_choice("acceleration", acceleration, tuple(ACCELERATIONS))
    friction = ACCELERATIONS[acceleration]()
    # W1's momentum is that of the direction, W2's velocity that of the steps taken.
    order = (friction, rate) if acceleration == "W1" else (rate, friction)
    return chained("paper.edf", *links, *order)
