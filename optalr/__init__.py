"""Adaptive learning rates and curvature for JAX, as composable optax transformations."""

from optalr import linalg, schedules
from optalr.adapters.wrappers import multi_steps, pass_extras
from optalr.phases import (
    blend_between,
    phase_schedule,
    release_first_stage,
    set_phase,
    swats,
    switch_at,
    switch_on_plateau,
    two_stage,
)
from optalr.programs.train_step import train_step
from optalr.reading.geometry import geodesic, noise_spectrum
from optalr.reading.metrics import metrics, state_bytes
from optalr.reading.monitoring import monitor
from optalr.reading.resuming import configuration, warn_if_changed
from optalr.reading.shardings import state_shardings
from optalr.reading.spectra import factor_spectra
from optalr.reading.upgrading import upgrade_state
from optalr.reading.wanted import wants_signals
from optalr.recipes import (
    CLASSICAL_RULES,
    classical,
    edf,
    learned_rate_sgd,
    learned_rate_then,
    lipschitz_adam,
    lipschitz_sgd,
    paper,
    tso_alra,
    untuned,
)
from optalr.schedules import (
    exponential_profile,
    flow_schedule,
    linear_profile,
    power_profile,
)
from optalr.signals import (
    Coverage,
    LayerMoments,
    LeafView,
    composite_loss,
    coverage,
    curvature_products,
    full_batch,
    kronecker_preconditioner,
    sigmoid_product,
    softmax_product,
    squared_error_product,
    tap_layer,
    value_grad_and_extras,
)
from optalr.signals.lipschitz import LipschitzRate, lipschitz_constant, lipschitz_rate
from optalr.signals.ray import ExactDerivatives, FiniteDifferences
from optalr.suggestion import RateSuggestion, suggest_learning_rate
from optalr.transforms.dense.block_diagonal import scale_by_block_diagonal
from optalr.transforms.dense.full_matrix import scale_by_full_matrix
from optalr.transforms.guard import guard
from optalr.transforms.kronecker.transform import KroneckerOptions, scale_by_kronecker
from optalr.transforms.krylov_flow.damping import LevenbergMarquardt
from optalr.transforms.krylov_flow.transform import scale_by_krylov_flow
from optalr.transforms.learned_decay.transform import add_learned_decay
from optalr.transforms.learned_rate.probing import SuccessiveGradients
from optalr.transforms.learned_rate.safeguards import RateSafeguards
from optalr.transforms.learned_rate.transform import scale_by_learned_rate
from optalr.transforms.lipschitz_rate.guards import LipschitzGuards
from optalr.transforms.lipschitz_rate.transform import scale_by_lipschitz_rate
from optalr.transforms.local_gains import scale_by_local_gains
from optalr.transforms.nesterov_flow import accelerate_by_nesterov_flow
from optalr.transforms.recorded_rate import scale_by_recorded_rate

__all__ = [
    # What a loss reveals.
    "train_step",
    "value_grad_and_extras",
    "composite_loss",
    "coverage",
    "tap_layer",
    "Coverage",
    "LayerMoments",
    "LeafView",
    # Directions.
    "scale_by_kronecker",
    "KroneckerOptions",
    "scale_by_block_diagonal",
    "scale_by_full_matrix",
    "add_learned_decay",
    # Flows: curvature products, their solver, their decay.
    "edf",
    "scale_by_krylov_flow",
    "LevenbergMarquardt",
    "kronecker_preconditioner",
    "accelerate_by_nesterov_flow",
    "curvature_products",
    "softmax_product",
    "sigmoid_product",
    "squared_error_product",
    "full_batch",
    "flow_schedule",
    "exponential_profile",
    "linear_profile",
    "power_profile",
    # Lengths of a step.
    "scale_by_recorded_rate",
    "scale_by_learned_rate",
    "RateSafeguards",
    "ExactDerivatives",
    "FiniteDifferences",
    "SuccessiveGradients",
    "scale_by_lipschitz_rate",
    "LipschitzGuards",
    "lipschitz_constant",
    "lipschitz_rate",
    "LipschitzRate",
    "suggest_learning_rate",
    "RateSuggestion",
    "scale_by_local_gains",
    "guard",
    "schedules",
    # Phases: two stages, and when to switch.
    "two_stage",
    "swats",
    "switch_at",
    "switch_on_plateau",
    "blend_between",
    "phase_schedule",
    "set_phase",
    "release_first_stage",
    # Recipes: complete optimizers.
    "untuned",
    "tso_alra",
    "learned_rate_sgd",
    "learned_rate_then",
    "lipschitz_sgd",
    "lipschitz_adam",
    "classical",
    "CLASSICAL_RULES",
    # Each source to the letter.
    "paper",
    # Wrappers that hand extras on.
    "multi_steps",
    "pass_extras",
    # Reading a state.
    "metrics",
    "wants_signals",
    "state_bytes",
    # A state over many devices.
    "state_shardings",
    # Looking at the arguments behind the methods.
    "noise_spectrum",
    "geodesic",
    "factor_spectra",
    "monitor",
    # Resuming with the settings a run was saved with.
    "configuration",
    "warn_if_changed",
    "upgrade_state",
    # Linear algebra that is true without an optimizer.
    "linalg",
]

__version__ = "0.1.0"
