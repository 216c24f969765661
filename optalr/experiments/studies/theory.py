"""The paper's two arguments, looked at on a config: noise of directions, spectra of the factors.

Theorem 2 of Ida & Fujiwara (2020): where minibatch gradients have the covariance C/b, those of
F^{-1/2} g have I/b, so that a preconditioned method diffuses alike in all directions, while plain
SGD keeps the noise's own shape. What there is to make isotropic is in the factors' spectra.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

import optalr
from optalr.experiments.errors import ExperimentError
from optalr.experiments.training.steps import TrainState
from optalr.experiments.training.trainer import Trainer
from optalr.reading.geometry import NoiseSpectrum, noise_spectrum
from optalr.signals.moments import is_moments

Spectra = dict[str, tuple[np.ndarray, np.ndarray]]
SNAPSHOTS = 6
GRADIENT, DIAGONAL, KRONECKER = "gradient (SGD)", "diagonal F^-1/2", "Kronecker F^-1/2"
ISOTROPIC = "isotropic noise"
# Normal numbers drawn at once for the reference.
_CHUNK = 4096


class Theory(NamedTuple):
    """What was found.

    Attributes:
      noise: a spectrum a direction, and that of isotropic noise sampled as often.
      spectra: (epoch, spectra of the factors), in the order of training.
      num_weights: numbers in the kernels that were looked at.
    """

    noise: dict[str, NoiseSpectrum]
    spectra: list[tuple[int, Spectra]]
    num_weights: int


def examine(trainer: Trainer, *, num_batches: int, damping: float) -> Theory:
    """Train to the end, noting the factors' spectra, and measure the noise there.

    Args:
      trainer: a config whose method keeps Kronecker factors.
      num_batches: minibatches, >= 2, for each estimate.
      damping: of the roots, relative to a factor's mean eigenvalue, > 0.

    Raises:
      ExperimentError: the method keeps no factors, or an argument is out of range.
    """
    if num_batches < 2:
        raise ExperimentError(f"--batches must be at least 2 for a covariance, got {num_batches}.")
    if not damping > 0:
        raise ExperimentError(f"--damping must be above 0, got {damping}.")
    seed = trainer.config.train.seed
    state, spectra = _train(trainer, seed)
    gradients, moments = _measure(trainer, state, num_batches)
    noise = {}
    for name, direction_fn in (
        (GRADIENT, None),
        (DIAGONAL, _diagonal(gradients, damping)),
        (KRONECKER, _kronecker(moments, damping)),
    ):
        noise[name] = noise_spectrum(lambda gradient: gradient, gradients, direction_fn)
    num_weights = sum(kernel.size for kernel in gradients[0].values())
    noise[ISOTROPIC] = _isotropic(num_batches, num_weights, seed)
    return Theory(noise, spectra, num_weights)


def noise_rows(noise: dict[str, NoiseSpectrum]) -> list[tuple[str, ...]]:
    """Return a row of text a direction: effective rank, spread, share of the largest tenth."""
    rows = []
    for name, spectrum in noise.items():
        values = spectrum.eigenvalues
        tenth = values[: max(1, len(values) // 10)].sum() / values.sum()
        spread = values[0] / np.median(values)
        rows.append((name, f"{spectrum.effective_rank:.1f}", f"{spread:.3g}", f"{tenth:.1%}"))
    return rows


def write(theory: Theory, path: Path) -> list[Path]:
    """Write two CSV files and two pictures into a new or existing folder."""
    path.mkdir(parents=True, exist_ok=True)
    noise = [
        (name, i, value)
        for name, spectrum in theory.noise.items()
        for i, value in enumerate(spectrum.eigenvalues)
    ]
    factors = [
        (epoch, kernel, side, i, value)
        for epoch, spectra in theory.spectra
        for kernel, sides in spectra.items()
        for side, values in zip(("rows", "cols"), sides, strict=True)
        for i, value in enumerate(values.reshape(-1))
    ]
    files = [path / name for name in ("noise.csv", "factors.csv", "noise.png", "factors.png")]
    _write_csv(files[0], ("direction", "index", "eigenvalue"), noise)
    _write_csv(files[1], ("epoch", "kernel", "side", "index", "eigenvalue"), factors)
    _draw_noise(theory.noise).savefig(files[2], dpi=100)
    _draw_factors(theory.spectra).savefig(files[3], dpi=100)
    return files


def _train(trainer: Trainer, seed: int) -> tuple[TrainState, list[tuple[int, Spectra]]]:
    epochs = trainer.config.train.epochs
    options = trainer.config.method.options.get("options")
    wanted = {round(epoch) for epoch in np.geomspace(1, epochs, min(SNAPSHOTS, epochs))}
    spectra: list[tuple[int, Spectra]] = []
    state = trainer.init(seed)
    for epoch in range(1, epochs + 1):
        for segment in trainer.segments(state, seed, np.nan):
            state = segment.state
            if not np.isfinite(segment.measured["loss"]).all():
                raise ExperimentError(
                    f"training diverged in epoch {epoch}: set a smaller method.learning_rate."
                )
        found = optalr.factor_spectra(state.opt_state, state.params, options=options)
        if epoch in wanted and found:
            spectra.append((epoch, found))
    if not spectra:
        raise ExperimentError(
            f"method {trainer.config.method.name!r} keeps no Kronecker factors: take a config of "
            "tso_alra or scale_by_kronecker."
        )
    return state, spectra


def _measure(
    trainer: Trainer, state: TrainState, num_batches: int
) -> tuple[list[dict[str, Any]], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return the gradients of the captured kernels, as matrices, and their mean factors."""
    evaluate = jax.jit(
        optalr.value_grad_and_extras(trainer.loss_fn, has_aux=True), static_argnames="signals"
    )
    train, size = trainer.dataset.train, trainer.batch_size
    random = np.random.default_rng(trainer.config.train.seed)
    key = trainer.key(trainer.config.train.seed)
    gradients: list[dict[str, Any]] = []
    factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for i in range(num_batches):
        batch = train.take(random.choice(len(train), size, replace=False))
        step_key = jax.random.fold_in(key, trainer.total_steps + i)
        _, grads, extras = evaluate(state.params, batch.x, batch.y, state.model_state, step_key)
        kernels = {}
        leaves = jax.tree_util.tree_leaves_with_path(extras["signals"], is_leaf=is_moments)
        named = {jax.tree_util.keystr(p): g for p, g in jax.tree_util.tree_leaves_with_path(grads)}
        for path, moments in leaves:
            name = jax.tree_util.keystr(path)
            shape = moments.rows.shape[-1], moments.cols.shape[-1]
            if moments.rows.ndim != 2 or named[name].size != shape[0] * shape[1]:
                continue  # a stack of kernels
            kernels[name] = np.asarray(named[name], np.float64).reshape(shape)
            rows, cols = factors.get(name, (np.zeros(()), np.zeros(())))
            rows = rows + np.asarray(moments.rows, np.float64) / num_batches
            cols = cols + np.asarray(moments.cols, np.float64) / num_batches
            factors[name] = rows, cols
        gradients.append(kernels)
    if not factors:
        raise ExperimentError("no layer was captured: optalr.coverage(loss_fn, ...) says why.")
    return gradients, factors


def _diagonal(gradients: list[dict[str, Any]], damping: float) -> Callable[[Any], Any]:
    squares = {
        name: np.mean([gradient[name] ** 2 for gradient in gradients], 0) for name in gradients[0]
    }
    scales = {name: (v + damping * v.mean()) ** -0.5 for name, v in squares.items()}
    return lambda gradient: {name: scales[name] * g for name, g in gradient.items()}


def _kronecker(
    factors: dict[str, tuple[np.ndarray, np.ndarray]], damping: float
) -> Callable[[Any], Any]:
    roots = {name: [_root(side, damping) for side in sides] for name, sides in factors.items()}
    return lambda gradient: {
        name: roots[name][0] @ g @ roots[name][1] for name, g in gradient.items()
    }


def _root(factor: np.ndarray, damping: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(factor)
    damped = np.maximum(values, 0) + damping * values.mean()
    return (vectors * damped**-0.5) @ vectors.T


def _isotropic(num_batches: int, num_weights: int, seed: int) -> NoiseSpectrum:
    """Return the spectrum of as many samples of N(0, I), a chunk of numbers at a time."""
    random = np.random.default_rng(seed)
    matrix = np.zeros((num_batches, num_batches))
    for start in range(0, num_weights, _CHUNK):
        part = random.standard_normal((num_batches, min(_CHUNK, num_weights - start)))
        part -= part.mean(0)
        matrix += part @ part.T
    values = np.linalg.eigvalsh(matrix / (num_batches - 1))[::-1]
    values = np.maximum(values[: min(num_weights, num_batches - 1)], 0)
    return NoiseSpectrum(values, 0.0, float(values.sum() ** 2 / np.sum(values**2)))


def _draw_noise(noise: dict[str, NoiseSpectrum]) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, spectrum in noise.items():
        values = spectrum.eigenvalues / spectrum.eigenvalues.mean()
        style = {"color": "gray", "ls": "--"} if name == ISOTROPIC else {}
        axis.semilogy(np.arange(1, len(values) + 1), values, label=name, **style)
    axis.set(xlabel="index", ylabel="eigenvalue / mean eigenvalue")
    axis.set_title("Covariance of directions over minibatches")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def _draw_factors(spectra: list[tuple[int, Spectra]]) -> Figure:
    kernels = list(spectra[0][1])
    figure = Figure(figsize=(2.6 * max(2, len(kernels)), 5.2), layout="constrained")
    axes = figure.subplots(2, len(kernels), squeeze=False)
    # From dark to light over training.
    shades = np.linspace(0.1, 0.85, len(spectra))
    for i, kernel in enumerate(kernels):
        for j, side in enumerate(("inputs (rows)", "outputs (cols)")):
            axis = axes[j, i]
            for shade, (epoch, found) in zip(shades, spectra, strict=True):
                values = np.sort(found[kernel][j].reshape(-1))[::-1]
                # float32 factors know nothing below this.
                values = np.maximum(values, 1e-8 * values[0])
                color = (shade, 0.25, 1 - shade)
                places = np.linspace(0, 1, len(values))
                axis.semilogy(places, values, color=color, lw=1, label=f"epoch {epoch}")
            axis.set_title(f"{kernel}\n{side}", fontsize=7)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("eigenvalue")
    axes[1, 0].set_ylabel("eigenvalue")
    axes[1, 0].set_xlabel("place (0 largest, 1 smallest)", fontsize=8)
    axes[0, 0].legend(fontsize=6)
    return figure


def _write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
