"""Suggesting a learning rate: the rate at which the learned rate settles from several starts."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from optalr.arguments import check_count, check_interval
from optalr.reading.metrics import metrics
from optalr.reading.wanted import wants_signals
from optalr.recipes import learned_rate_sgd
from optalr.signals import value_grad_and_extras

# An extra of our own name, because ``value_fn`` is the loss on the batch of the step itself.
_PROBE = "suggestion_value_fn"
STARTS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclasses.dataclass(frozen=True)
class RateSuggestion:
    """What ``suggest_learning_rate`` found; prints as a table.

    Attributes:
      rate: the suggested rate, the geometric mean of ``settled`` over the runs that count. NaN
        where the runs do not agree.
      low: 10th percentile of the rates of these runs while they settle.
      high: 90th percentile of the same rates.
      agreed: whether at least two runs count and their settled rates are within ``tolerance``.
      tolerance: the factor within which settled rates agree.
      starts: ``(S,)`` the initial rates.
      settled: ``(S,)`` the median rate of each run, over the second half of the steps in which its
        loss makes 95 % of its decrease.
      counted: ``(S,)`` bool, whether a run trained: it lowered its loss at least half as much as
        the best run. The others (diverged or stuck) do not count.
      rates: ``(S, T)`` the rate at every step.
      losses: ``(S, T)`` the training loss at every step.
    """

    rate: float
    low: float
    high: float
    agreed: bool
    tolerance: float
    starts: np.ndarray
    settled: np.ndarray
    counted: np.ndarray
    rates: np.ndarray
    losses: np.ndarray

    def __str__(self) -> str:
        lines = ["start      settled    loss at first -> at last"]
        last = _tail(self.losses).mean(axis=1)
        for i, start in enumerate(self.starts):
            note = "" if self.counted[i] else "   (did not train: left out)"
            losses = f"{self.losses[i, 0]:.4g} -> {last[i]:.4g}"
            lines.append(f"{start:<9.2g}  {self.settled[i]:<9.3g}  {losses}{note}")
        lines.append(self.verdict)
        return "\n".join(lines)

    @property
    def verdict(self) -> str:
        """The suggestion in a sentence."""
        spread = f"80 % of single rates: {self.low:.2g} to {self.high:.2g}"
        if self.agreed:
            return f"suggested learning rate: {self.rate:.2g} ({spread})"
        settled = self.settled[self.counted]
        if len(settled) < 2:
            return "no suggestion: fewer than two starts trained. Scale the data, or start lower."
        return (
            f"no suggestion: the starts settle apart, from {settled.min():.2g} to "
            f"{settled.max():.2g}, more than {self.tolerance:g} times ({spread}). Take more steps, "
            "or larger batches."
        )

    def plot(self, axes: Any = None) -> Any:
        """Draw the rates over the steps, one curve per start, and the suggestion.

        Args:
          axes: matplotlib axes to draw into; None makes a new figure.

        Returns:
          The axes.

        Raises:
          ImportError: matplotlib is missing.
        """
        if axes is None:
            try:
                from matplotlib.figure import Figure
            except ImportError as error:
                raise ImportError(
                    "RateSuggestion.plot needs matplotlib: pip install matplotlib."
                ) from error
            axes = Figure(figsize=(7, 4), layout="constrained").subplots()
        for start, rates, counted in zip(self.starts, self.rates, self.counted, strict=True):
            style = "-" if counted else ":"
            curve = np.concatenate([[start], np.where(rates > 0, rates, np.nan)])
            axes.plot(np.arange(len(curve)), curve, style, label=f"from {start:.2g}", lw=1)
        if math.isfinite(self.low) and math.isfinite(self.high):
            axes.axhspan(self.low, self.high, color="gray", alpha=0.2, label="10 % to 90 %")
        if self.agreed:
            axes.axhline(self.rate, color="black", lw=1, label=f"suggested {self.rate:.2g}")
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("learning rate")
        axes.legend(fontsize="small")
        return axes


def suggest_learning_rate(
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any] | Callable[[int], Any],
    *,
    starts: Sequence[float] = STARTS,
    num_steps: int = 200,
    tolerance: float = 2.0,
    fresh_probe: bool = True,
    has_aux: bool = False,
    options: Mapping[str, Any] | None = None,
) -> RateSuggestion:
    """Suggest a learning rate for SGD: run the learned rate from several starts.

    Choose it before a search over rates, or instead of one. The learned rate of order 2 tends to
    the same range from any start between 1e-4 and 1. The suggestion is the rate at which the runs
    settle. Where they do not agree there is none. It holds for these parameters, this batch size,
    the first ``num_steps`` steps and plain SGD (with momentum β multiply it by 1 − β).

    Args:
      loss_fn: ``loss_fn(params, *args) -> scalar`` (or ``(scalar, aux)``).
      params: the parameters that each run starts from; they are not changed.
      batches: a sequence of ``args`` tuples, used in turn and then again from the first; or a
        function from the step's number to ``args``. A batch that is not a tuple is the only
        argument.
      starts: initial rates, each > 0, at least two.
      num_steps: steps of each run, >= 4.
      tolerance: > 1, the factor within which the settled rates agree.
      fresh_probe: whether the loss along each step is that of the next batch, rather than of the
        step's own. A rate fitted to the batch of its own gradient is too large for other batches.
        The smaller the batches, the larger the excess, until training breaks down.
      has_aux: whether ``loss_fn`` returns aux, which is dropped.
      options: further arguments of ``learned_rate_sgd``; ``lag`` is False unless set.

    Returns:
      A ``RateSuggestion``: ``print`` shows it as a table, ``.plot()`` as a picture.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is out of range, or there is no batch.

    Cost: ``len(starts) * num_steps`` learned-rate steps, each about 8/3 of an SGD step, and one
      compilation.

    Examples:
      >>> import jax, jax.numpy as jnp, optalr
      >>> x = jax.random.normal(jax.random.key(0), (256, 4)) * jnp.array([[1.0, 1.0, 1.0, 2.0]])
      >>> loss_fn = lambda w, x: 0.5 * jnp.mean((x @ w - x.sum(axis=1)) ** 2)
      >>> batches = [x[i : i + 32] for i in range(0, 256, 32)]
      >>> found = optalr.suggest_learning_rate(loss_fn, jnp.zeros(4), batches, num_steps=40)
      >>> found.agreed, bool(0.1 < found.rate < 1.0)  # the eigenvalues are 1 and 4
      (True, True)

    Reference: Ravaut, Gorti, "Faster gradient descent via an adaptive learning rate", section 7:
      "the learning rate that our algorithm converges to suggests an ideal learning rate".
    """
    starts = tuple(float(start) for start in starts)
    if len(starts) < 2:
        raise ValueError(f"starts must hold at least two rates, got {starts!r}.")
    for start in starts:
        check_interval("starts", start, 0.0, open_low=True)
    check_count("num_steps", num_steps, 4)
    check_interval("tolerance", tolerance, 1.0, open_low=True)
    batch_at = _indexed(batches)
    # Without the lag no step is taken with a rate that suited another direction.
    options = {"probe": _PROBE, "lag": False, **(options or {})}
    optimizers = [learned_rate_sgd(start, **options) for start in starts]
    step = _compiled_step(loss_fn, optimizers[0], fresh_probe=fresh_probe, has_aux=has_aux)
    traces = []
    for optimizer in optimizers:  # they differ in their first state only
        carry, trace = (params, optimizer.init(params)), []
        for i in range(num_steps):
            carry, measured = step(carry, batch_at(i), batch_at(i + 1))
            trace.append(measured)
        traces.append(jax.device_get(trace))
    losses, rates = np.moveaxis(np.asarray(traces, np.float64), -1, 0)
    return summarize(np.asarray(starts), rates, losses, tolerance=tolerance)


def _compiled_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    fresh_probe: bool,
    has_aux: bool,
) -> Callable[..., Any]:
    """Return a step on ``(params, state)``, which also returns its loss and its rate."""
    evaluate = value_grad_and_extras(loss_fn, has_aux=has_aux)

    def probe(args: tuple[Any, ...], params: Any) -> jax.Array:
        value = loss_fn(params, *args)
        return value[0] if has_aux else value

    @jax.jit
    def step(carry: tuple[Any, Any], args: tuple[Any, ...], following: tuple[Any, ...]) -> Any:
        params, state = carry
        value, grads, extras = evaluate(params, *args, signals=wants_signals(state))
        extras[_PROBE] = Partial(probe, following) if fresh_probe else extras["value_fn"]
        updates, state = optimizer.update(grads, state, params, **extras)
        value = value[0] if has_aux else value
        rate = metrics(state)["learning_rate"]
        return (optax.apply_updates(params, updates), state), (jnp.float32(value), rate)

    return step


def _indexed(batches: Any) -> Callable[[int], tuple[Any, ...]]:
    """Return a function from a step's number to the arguments of the loss after ``params``."""
    if callable(batches):
        found = batches
    else:
        listed = list(batches)
        if not listed:
            raise ValueError("batches must hold at least one batch, got none.")

        def found(i: int) -> Any:
            return listed[i % len(listed)]

    def batch_at(i: int) -> tuple[Any, ...]:
        batch = found(i)
        return batch if isinstance(batch, tuple) else (batch,)

    return batch_at


def _tail(values: np.ndarray) -> np.ndarray:
    """Return the second half of each run."""
    return values[:, values.shape[1] // 2 :]


def _descent(losses: np.ndarray) -> slice:
    """Return the second half of the steps in which one run's loss falls.

    These steps end where a moving average of the loss has made 95 % of the decrease. At a minimum
    every rate is as bad as any other, and what the learned rate does there means nothing.
    """
    width = min(5, len(losses))
    smooth = np.convolve(losses, np.full(width, 1 / width), "valid")
    last = losses[len(losses) // 2 :].mean()
    below = smooth <= last + 0.05 * (losses[0] - last)
    end = int(np.argmax(below)) + width if below.any() else len(losses)
    end = min(max(end, width), len(losses))
    return slice(end // 2, end)


def summarize(
    starts: np.ndarray, rates: np.ndarray, losses: np.ndarray, *, tolerance: float
) -> RateSuggestion:
    """Return the suggestion of runs with these rates and losses, one row per run."""
    parts = [run[_descent(trace)] for run, trace in zip(rates, losses, strict=True)]
    settled = np.array([np.median(part) for part in parts])
    decrease = np.nan_to_num(losses[:, 0] - _tail(losses).mean(axis=1), nan=0.0, neginf=0.0)
    counted = (decrease > 0) & (decrease >= 0.5 * decrease.max()) & (settled > 0)
    agreed, rate, low, high = False, math.nan, math.nan, math.nan
    if counted.any():
        chosen = settled[counted]
        pooled = np.concatenate([part for part, c in zip(parts, counted, strict=True) if c])
        low, high = (float(x) for x in np.quantile(pooled, (0.1, 0.9)))
        agreed = bool(counted.sum() >= 2 and chosen.max() <= tolerance * chosen.min())
        rate = float(np.exp(np.mean(np.log(chosen)))) if agreed else math.nan
    return RateSuggestion(
        rate=rate,
        low=low,
        high=high,
        agreed=agreed,
        tolerance=float(tolerance),
        starts=starts,
        settled=settled,
        counted=counted,
        rates=rates,
        losses=losses,
    )
