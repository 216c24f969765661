"""Two arguments of the paper, tested on a config: noise of directions, spectra of the factors.

Theorem 2 of Ida & Fujiwara (2020): where minibatch gradients g have the covariance C/b, the
directions F^{-1/2} g have I/b. A preconditioned method therefore diffuses alike in all directions,
while plain SGD keeps the shape of the noise. How much there is to make isotropic can be read off
the spectra of the factors.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import optalr
from optalr.experiments.errors import ExperimentError
from optalr.experiments.training.steps import TrainState
from optalr.experiments.training.trainer import Trainer
from optalr.reading.geometry import NoiseSpectrum, noise_spectrum
from optalr.signals.moments import is_moments

# A gradient or a direction: kernel to matrix.
Kernels = dict[str, np.ndarray]
# A kernel's two factors, or their eigenvalues: kernel to (rows, cols).
Factors = dict[str, tuple[np.ndarray, np.ndarray]]

GRADIENT, DIAGONAL, KRONECKER = "gradient (SGD)", "diagonal F^-1/2", "Kronecker F^-1/2"
ISOTROPIC = "isotropic noise"
# Spectra to keep over training: as many as can be told apart in one small picture.
SNAPSHOTS = 6
# Normal numbers to draw at once for the reference. It needs as many per batch as there are weights.
_CHUNK = 4096
# All gradients are held, and the eigenvalues of a matrix of this size are taken.
_MOST_BATCHES = 10_000


class Theory(NamedTuple):
    """What was found.

    Attributes:
      noise: one spectrum per direction, and that of isotropic noise sampled as often.
      spectra: (epoch, eigenvalues of the factors), in the order of training.
      num_weights: numbers in the kernels that were looked at.
    """

    noise: dict[str, NoiseSpectrum]
    spectra: list[tuple[int, Factors]]
    num_weights: int


def examine(trainer: Trainer, *, num_batches: int, damping: float) -> Theory:
    """Train to the end, keep the factors' spectra on the way, and measure the noise at the end.

    Args:
      trainer: a config whose method keeps Kronecker factors.
      num_batches: minibatches for each estimate, >= 2.
      damping: damping of the roots, relative to a factor's mean eigenvalue, > 0.

    Raises:
      ExperimentError: the method keeps no factors, training diverged, or an argument is out of
        range.
    """
    if num_batches < 2:
        raise ExperimentError(f"--batches must be at least 2 for a covariance, got {num_batches}.")
    if num_batches > _MOST_BATCHES:
        raise ExperimentError(f"--batches must be at most {_MOST_BATCHES}, got {num_batches}.")
    if not 0 < damping < math.inf:
        raise ExperimentError(f"--damping must be above 0 and finite, got {damping}.")
    seed = trainer.config.train.seed
    state, spectra = _train_noting_spectra(trainer, seed)
    gradients, factors = _sample_gradients(trainer, state, num_batches)
    noise = {}
    for name, direction_fn in (
        (GRADIENT, None),
        (DIAGONAL, _diagonal(gradients, damping)),
        (KRONECKER, _kronecker(factors, damping)),
    ):
        noise[name] = noise_spectrum(lambda gradient: gradient, gradients, direction_fn)
    num_weights = sum(kernel.size for kernel in gradients[0].values())
    noise[ISOTROPIC] = isotropic_spectrum(num_batches, num_weights, seed)
    return Theory(noise, spectra, num_weights)


def damped_root(factor: np.ndarray, damping: float) -> np.ndarray:
    """Return ``(factor + damping * mean eigenvalue * I)^(-1/2)``, in float64."""
    values, vectors = np.linalg.eigh(factor)
    # Rounding leaves eigenvalues just below zero, whose root would be NaN.
    damped = np.maximum(values, 0) + damping * values.mean()
    return (vectors * damped**-0.5) @ vectors.T


def isotropic_spectrum(num_batches: int, num_weights: int, seed: int) -> NoiseSpectrum:
    """Return the spectrum of ``num_batches`` samples of N(0, I): what perfect isotropy looks like.

    Few samples of many numbers never have equal eigenvalues, so the measured spectra are compared
    with this one and not with a flat line.
    """
    random = np.random.default_rng(seed)
    # The Gram matrix of the samples has the nonzero eigenvalues of their covariance; it is summed
    # over chunks of weights, so that no more than one chunk is held.
    matrix = np.zeros((num_batches, num_batches))
    for start in range(0, num_weights, _CHUNK):
        part = random.standard_normal((num_batches, min(_CHUNK, num_weights - start)))
        part -= part.mean(0)
        matrix += part @ part.T
    values = np.linalg.eigvalsh(matrix / (num_batches - 1))[::-1]
    # The mean takes one dimension away.
    values = np.maximum(values[: min(num_weights, num_batches - 1)], 0)
    return NoiseSpectrum(values, 0.0, float(values.sum() ** 2 / np.sum(values**2)))


def _train_noting_spectra(
    trainer: Trainer, seed: int
) -> tuple[TrainState, list[tuple[int, Factors]]]:
    epochs = trainer.config.train.epochs
    options = trainer.config.method.options.get("options")
    # Evenly in the logarithm: the factors change fastest at the start.
    wanted = {round(epoch) for epoch in np.geomspace(1, epochs, min(SNAPSHOTS, epochs))}
    spectra: list[tuple[int, Factors]] = []
    state = trainer.init(seed)
    for epoch in range(1, epochs + 1):
        for segment in trainer.segments(state, seed, np.nan):
            state = segment.state
            if not np.isfinite(segment.measured["loss"]).all():
                raise ExperimentError(
                    f"training diverged in epoch {epoch}: set a smaller method.learning_rate."
                )
        if epoch not in wanted:
            continue
        # Empty before the method's first measurement.
        found = optalr.factor_spectra(state.opt_state, state.params, options=options)
        if found:
            spectra.append((epoch, found))
    if not spectra:
        raise ExperimentError(
            f"method {trainer.config.method.name!r} keeps no Kronecker factors: take a config of "
            "tso_alra or scale_by_kronecker."
        )
    return state, spectra


def _sample_gradients(
    trainer: Trainer, state: TrainState, num_batches: int
) -> tuple[list[Kernels], Factors]:
    """Return the gradients of the captured kernels over random batches, and their mean factors."""
    evaluate = jax.jit(
        optalr.value_grad_and_extras(trainer.loss_fn, has_aux=True), static_argnames="signals"
    )
    train, size = trainer.dataset.train, trainer.batch_size
    random = np.random.default_rng(trainer.config.train.seed)
    key = trainer.key(trainer.config.train.seed)
    gradients: list[Kernels] = []
    factors: Factors = {}
    for i in range(num_batches):
        batch = train.take(random.choice(len(train), size, replace=False))
        # The numbers go on from the last step's, so that dropout draws what training never drew.
        step_key = jax.random.fold_in(key, trainer.total_steps + i)
        _, grads, extras = evaluate(state.params, batch.x, batch.y, state.model_state, step_key)
        kernels: Kernels = {}
        for name, gradient, moments in _captured(grads, extras["signals"]):
            kernels[name] = gradient
            rows, cols = factors.get(name, (np.zeros(()), np.zeros(())))
            rows = rows + np.asarray(moments.rows, np.float64) / num_batches
            cols = cols + np.asarray(moments.cols, np.float64) / num_batches
            factors[name] = rows, cols
        gradients.append(kernels)
    if not factors:
        raise ExperimentError("no layer was captured: optalr.coverage(loss_fn, ...) says why.")
    return gradients, factors


def _captured(grads: Any, signals: Any) -> Iterator[tuple[str, np.ndarray, optalr.LayerMoments]]:
    """Yield name, gradient as a matrix, and moments of every captured kernel."""
    named = {jax.tree_util.keystr(p): g for p, g in jax.tree_util.tree_leaves_with_path(grads)}
    for path, moments in jax.tree_util.tree_leaves_with_path(signals, is_leaf=is_moments):
        name = jax.tree_util.keystr(path)
        shape = moments.rows.shape[-1], moments.cols.shape[-1]
        # In a stack each kernel has its own pair of factors. Stacks are left out.
        if moments.rows.ndim == 2 and named[name].size == shape[0] * shape[1]:
            yield name, np.asarray(named[name], np.float64).reshape(shape), moments


def _diagonal(gradients: list[Kernels], damping: float) -> Callable[[Kernels], Kernels]:
    squares = {
        name: np.mean([gradient[name] ** 2 for gradient in gradients], 0) for name in gradients[0]
    }
    scales = {name: (v + damping * v.mean()) ** -0.5 for name, v in squares.items()}
    return lambda gradient: {name: scales[name] * g for name, g in gradient.items()}


def _kronecker(factors: Factors, damping: float) -> Callable[[Kernels], Kernels]:
    roots = {
        name: (damped_root(rows, damping), damped_root(cols, damping))
        for name, (rows, cols) in factors.items()
    }
    return lambda gradient: {
        name: roots[name][0] @ g @ roots[name][1] for name, g in gradient.items()
    }
