"""Every method that keeps the contract, one line each.

To add a method, add a line: its name, a function that builds it, and the extras it cannot do
without. A public transformation without a line of its own name fails a test. Lines of other names
are choices of a method that change its state or its program; ``CHOICES`` lists them. Numeric
parameters of that function (with defaults) are also injected by ``optax.inject_hyperparams`` and
given NaN, which must be refused by name.
"""

from typing import Any

import optax

import optalr
from tests.contract.lines import Exemption, Method


def _stages(phase, first=None):
    first = optax.adam(1e-2, eps=1e-4) if first is None else first
    second = optax.chain(optax.trace(0.9), optalr.scale_by_recorded_rate(0.1))
    return optalr.two_stage(first, second, phase)


PHASE = ("phase", "steps_since_switch")
RATE = ("learning_rate", "failures", "average_rate", "nonconvex_probes", "runaway_steps")
DECAY = ("weight_decay", "hypergradient", "failures")

# Methods of this module run a paper's text and nothing else.
PAPER = "paper."


def _to_the_letter(why: str, *others: Exemption) -> dict[str, Any]:
    """Return the fields of a line that keeps every clause but that on faults, and others."""
    return {"guards": False, "exempt": (Exemption("faults", f"to the letter: {why}"), *others)}


# What a method is also tried with, beside its defaults.
CHOICES = {
    "two_stage_blend",
    "three_stages",
    "scale_by_full_matrix_window",
    "shampoo",
    "kronecker_measured",
    "kronecker_grafted",
    "edf_hessian",
    "successive_gradients",
    "learned_decay_per_leaf",
    "tso_alra_matched",
}

METHODS = (
    Method(
        "swats",
        lambda learning_rate=0.01, b1=0.9, b2=0.99, eps=1e-8, tolerance=1e-3: optalr.swats(
            learning_rate, b1, b2, eps, tolerance=tolerance
        ),
        reports=("learning_rate", "failures", *PHASE),
    ),
    Method(
        "scale_by_local_gains",
        lambda beta=0.05, min_gain=0.1, max_gain=10.0: optalr.scale_by_local_gains(
            beta, min_gain=min_gain, max_gain=max_gain
        ),
        reports=("failures",),
    ),
    Method(
        "classical",
        lambda learning_rate=0.01: optalr.classical(
            "adam", learning_rate, gains=optalr.scale_by_local_gains()
        ),
        reports=("learning_rate", "failures"),
    ),
    Method(
        "scale_by_recorded_rate",
        lambda learning_rate=0.1: optalr.scale_by_recorded_rate(learning_rate),
        reports=("learning_rate",),
        guards=False,
    ),
    Method(
        "two_stage",
        lambda: _stages(optalr.switch_at(2)),
        reports=("learning_rate", *PHASE),
    ),
    Method(
        "guard",
        lambda: optalr.guard(optax.scale_by_adam(eps=1e-4)),
        reports=("failures",),
    ),
    Method("two_stage_blend", lambda phase=0.5: _stages(phase), reports=PHASE),
    Method(
        "three_stages",
        lambda: _stages(
            optalr.switch_at(1), _stages(optalr.switch_on_plateau(patience=1, rtol=1.0))
        ),
        needs=("validation_value",),
        reports=PHASE,
    ),
    Method(
        "scale_by_kronecker",
        lambda power=-0.5, decay=0.9, damping=1e-2: optalr.scale_by_kronecker(
            power,
            decay=decay,
            damping=damping,
            update_every=3,
            signals_every=1,
            options=optalr.KroneckerOptions(min_batches=2),
        ),
        needs=("signals",),
        reports=("damping", "root_age", "root_residual", "failures", "update_norm"),
        rtol=1e-3,
    ),
    Method(
        "scale_by_block_diagonal",
        lambda power=-0.5, decay=0.9, damping=1e-2: optalr.scale_by_block_diagonal(
            power, decay=decay, damping=damping
        ),
        reports=("damping", "root_age", "root_residual", "failures", "update_norm"),
        rtol=1e-3,
    ),
    Method(
        "scale_by_full_matrix",
        lambda power=-0.5, decay=0.9, damping=1e-2: optalr.scale_by_full_matrix(
            power, decay=decay, damping=damping, update_every=2
        ),
        reports=("damping", "root_age", "root_residual", "failures", "update_norm"),
        rtol=1e-3,
    ),
    Method(
        "scale_by_full_matrix_window",
        lambda decay=0.9, damping=1e-2: optalr.scale_by_full_matrix(
            decay=decay, damping=damping, window=3
        ),
        reports=("damping", "failures", "update_norm"),
        rtol=1e-3,
    ),
    Method(
        "shampoo",
        lambda: optalr.scale_by_kronecker(
            damping=1e-2,
            statistics="gradient",
            options=optalr.KroneckerOptions(min_batches=2, graft=optax.scale_by_rms()),
        ),
        reports=("root_residual", "failures"),
        rtol=1e-3,
    ),
    Method(
        "kronecker_measured",
        lambda: optalr.scale_by_kronecker(
            damping=1e-2,
            update_every=3,
            signals_every=1,
            options=optalr.KroneckerOptions(
                min_batches=2, spectrum="measured", block_size=3, root_method="eigenbasis"
            ),
        ),
        needs=("signals",),
        reports=("damping", "root_age", "root_residual", "failures", "update_norm"),
        rtol=1e-3,
    ),
    Method(
        "kronecker_grafted",
        lambda: optalr.scale_by_kronecker(
            damping=1e-2,
            options=optalr.KroneckerOptions(min_batches=2, graft=optax.scale_by_adam()),
        ),
        needs=("signals",),
        reports=("root_residual", "failures"),
        rtol=1e-3,
    ),
    Method(
        "tso_alra",
        lambda: optalr.tso_alra(1e-2, switch_at=3, options=optalr.KroneckerOptions(min_batches=2)),
        needs=("signals",),
        reports=("learning_rate", "phase", "root_residual", "failures"),
        rtol=1e-3,
    ),
    Method(
        "tso_alra_matched",
        lambda: optalr.tso_alra(
            1e-2,
            switch_at=3,
            second_learning_rate="matched",
            options=optalr.KroneckerOptions(min_batches=2),
        ),
        needs=("signals",),
        reports=("learning_rate", "phase", "root_residual", "failures", "gain"),
        rtol=1e-3,
    ),
    Method(
        "scale_by_krylov_flow",
        lambda tol=1e-3: optalr.scale_by_krylov_flow(num_steps=2, tol=tol),
        needs=("gauss_newton",),
        reports=("damping", "krylov_residual", "failures"),
    ),
    Method(
        "accelerate_by_nesterov_flow",
        lambda friction=3.0: optalr.accelerate_by_nesterov_flow(friction),
        reports=("failures",),
    ),
    Method(
        "edf",
        lambda learning_rate=0.5: optalr.edf(learning_rate),
        needs=("gauss_newton",),
        reports=("learning_rate", "damping", "krylov_residual", "failures"),
    ),
    Method(
        "edf_hessian",
        lambda learning_rate=0.5: optalr.edf(
            learning_rate,
            curvature="hessian",
            num_steps=2,
            damping=optalr.LevenbergMarquardt(),
            acceleration="W2",
        ),
        needs=("hessian", "value", "value_fn", "point"),
        reports=("learning_rate", "damping", "reduction_ratio", "negative_curvature", "failures"),
    ),
    Method(
        "scale_by_learned_rate",
        lambda initial_rate=0.1, rate_momentum=0.1: optalr.scale_by_learned_rate(
            initial_rate, rate_momentum=rate_momentum
        ),
        needs=("value_fn",),
        reports=RATE,
        rtol=1e-3,
    ),
    Method(
        "learned_rate_sgd",
        lambda initial_rate=0.1: optalr.learned_rate_sgd(initial_rate, order=1, every=2),
        needs=("value_fn",),
        reports=RATE,
    ),
    Method(
        "successive_gradients",
        lambda initial_rate=0.1, meta_rate=1e-2: optalr.scale_by_learned_rate(
            initial_rate, order=1, meta_rate=meta_rate, derivatives="successive_gradients"
        ),
        reports=RATE,
    ),
    Method(
        "learned_rate_then",
        lambda: optalr.learned_rate_then(optax.sgd, 0.1, optalr.switch_at(2), momentum=0.9),
        needs=("value_fn",),
        reports=(*RATE, *PHASE),
        rtol=1e-3,
    ),
    Method(
        "add_learned_decay",
        lambda initial_decay=0.1, meta_rate=0.03, smoothing=0.9: optalr.add_learned_decay(
            initial_decay, meta_rate=meta_rate, smoothing=smoothing
        ),
        needs=("validation_value_fn",),
        reports=DECAY,
        guards=False,
    ),
    Method(
        "learned_decay_per_leaf",
        lambda min_factor=1e-2, max_factor=10.0, memory=0.99: optalr.add_learned_decay(
            0.1,
            every=2,
            per_leaf=True,
            probe="value_fn",
            min_factor=min_factor,
            max_factor=max_factor,
            memory=memory,
        ),
        needs=("value_fn",),
        reports=DECAY,
        guards=False,
    ),
    Method(
        "untuned",
        lambda scale=1.0, momentum=0.9, damping=0.1: optalr.untuned(
            400, scale=scale, momentum=momentum, damping=damping, update_every=3
        ),
        needs=("signals",),
        reports=("learning_rate", "weight_decay", "root_residual", "failures"),
        rtol=1e-3,
    ),
    Method(
        "scale_by_lipschitz_rate",
        lambda weight_decay=1e-3: optalr.scale_by_lipschitz_rate(
            "softmax", num_classes=3, weight_decay=weight_decay, steps_per_epoch=2
        ),
        needs=("head",),
        reports=("learning_rate", "lipschitz_constant", "activation_norm", "failures"),
    ),
    Method(
        "lipschitz_sgd",
        lambda weight_decay=1e-3, momentum=0.9: optalr.lipschitz_sgd(
            "softmax", num_classes=3, weight_decay=weight_decay, momentum=momentum
        ),
        needs=("head",),
        reports=("learning_rate", "lipschitz_constant", "failures"),
    ),
    Method(
        "lipschitz_adam",
        lambda: optalr.lipschitz_adam("softmax", num_classes=3, guards={"max_rate": 0.1}),
        needs=("head",),
        reports=("learning_rate", "lipschitz_constant", "failures"),
        rtol=1e-3,
    ),
    Method(
        "paper.tso_alra",
        lambda learning_rate=1e-2, decay=0.9, damping=1e-2: optalr.paper.tso_alra(
            learning_rate, update_every=2, decay=decay, damping=damping, switch_at=6
        ),
        needs=("signals",),
        reports=("learning_rate", "phase", "root_age"),
        rtol=1e-3,
        **_to_the_letter(
            "Algorithm 1 folds every batch in, and applies every root",
            Exemption("rescaling", "to the letter: eps is absolute, beside factors of any scale"),
        ),
    ),
    Method(
        "paper.learned_rate_sgd",
        lambda initial_rate=0.1, rate_momentum=0.1: optalr.paper.learned_rate_sgd(
            initial_rate, step=0.1, rate_momentum=rate_momentum
        ),
        needs=("value_fn",),
        reports=("learning_rate",),
        rtol=1e-2,  # differences of float32 losses
        **_to_the_letter("eq. 19 is a floor, and the only bound on a rate"),
    ),
    Method(
        "paper.lipschitz_sgd",
        lambda weight_decay=1e-3: optalr.paper.lipschitz_sgd(
            "softmax", steps_per_epoch=1, num_classes=3, weight_decay=weight_decay
        ),
        needs=("head",),
        reports=("learning_rate", "lipschitz_constant", "activation_norm"),
        **_to_the_letter("eq. 20 takes the largest activations of a pass, whatever they are"),
    ),
    Method(
        "paper.edf",
        lambda learning_rate=0.5: optalr.paper.edf(learning_rate, num_steps=2, acceleration="W2"),
        needs=("gauss_newton",),
        reports=("learning_rate", "damping"),
        rtol=1e-3,
        **_to_the_letter(
            "Algorithm 1 divides by norms that may be zero or not finite",
            Exemption("rescaling", "to the letter: G is that of the loss, g what arrives"),
        ),
    ),
    Method(
        "paper.swats",
        lambda learning_rate=0.01, b1=0.9, b2=0.99, eps=1e-3: optalr.paper.swats(
            learning_rate, b1=b1, b2=b2, eps=eps
        ),
        reports=("learning_rate", "phase", "steps_since_switch"),
        **_to_the_letter("Algorithm 1 averages every gradient"),
    ),
    Method(
        "paper.amsgrad",
        lambda learning_rate=0.01, b1=0.9, b2=0.99: optalr.paper.amsgrad(
            learning_rate, b1=b1, b2=b2
        ),
        reports=("learning_rate",),
        **_to_the_letter("Algorithm 2 keeps the largest second moment for ever"),
    ),
    Method(
        "multi_steps",
        lambda: optalr.multi_steps(
            optalr.scale_by_kronecker(
                damping=1e-2, signals_every=1, options=optalr.KroneckerOptions(min_batches=1)
            ),
            2,
        ),
        needs=("signals",),
        reports=("damping", "root_residual", "failures", "update_norm"),
        guards=False,
        rtol=1e-3,
    ),
    Method(
        "pass_extras",
        lambda: optalr.pass_extras(
            optax.contrib.split_real_and_imaginary, optalr.scale_by_learned_rate(0.1)
        ),
        needs=("value_fn",),
        reports=RATE,
        rtol=1e-3,
    ),
)
