"""Writing what an optimizer reports to a logger, from inside or outside a compiled step."""

import csv
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optalr.arguments import check_count, is_concrete
from optalr.reading.metrics import metrics

Write = Callable[[int, dict[str, float]], Any]


def monitor(writer: Any, *, every: int = 1, prefix: str = "") -> Callable[..., None]:
    """Return a function that writes ``optalr.metrics`` of an optimizer state to a logger.

    Choose it to watch the learning rate, the phase and the failures of a run. The function may be
    called outside of compiled code, or inside ``jit``, ``lax.scan`` and ``lax.cond``, where it
    becomes a ``jax.debug.callback``. Rows of a compiled loop may be written a little later and out
    of order, so each holds its step. ``jax.effects_barrier()`` waits for them.

    Args:
      writer: what receives the rows. It may be the path of a CSV file (``CSVWriter``), or a
        function ``(step, scalars)``. It may be an object with ``add_scalar(tag, value, step)``,
        such as TensorBoard's ``SummaryWriter`` in ``tensorboardX`` or PyTorch, or one with
        ``write_scalars(step, scalars)``, as in ``clu.metric_writers``.
      every: steps between rows, at least 1: steps that are multiples of it are written.
      prefix: text before each name, such as ``"optimizer/"``.

    Returns:
      ``log(opt_state, step=None, **scalars)``. ``step`` defaults to the state's own count of
      updates. ``scalars`` (``loss=...``) are written in the same row, without the prefix.

    Raises:
      TypeError: ``writer`` is none of these, or ``every`` is not a whole number; ``log`` raises it
        where there is no step.
      ValueError: ``every`` is below 1.

    Cost: a transfer of a few scalars to the host in steps that are written.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optalr
      >>> rows = []
      >>> log = optalr.monitor(lambda step, scalars: rows.append((step, scalars)), every=2)
      >>> tx = optax.chain(optax.trace(0.9), optalr.scale_by_recorded_rate(lambda t: 1 / (1 + t)))
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(params, state)
      ...     log(state, loss=jnp.sum(params**2))
      ...     return optax.apply_updates(params, updates), state
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     params, state = step(params, state)
      >>> jax.effects_barrier()
      >>> [(step, scalars["learning_rate"]) for step, scalars in rows]
      [(2, 0.5), (4, 0.25)]
    """
    check_count("every", every, 1)
    write = _as_function(writer)

    def write_row(step: Any, scalars: Mapping[str, Any]) -> None:
        if int(step) % every == 0:
            write(int(step), {name: float(value) for name, value in scalars.items()})

    def log(opt_state: Any, step: Any = None, **scalars: Any) -> None:
        report = metrics(opt_state)
        step = report.get("step") if step is None else step
        if step is None:
            raise TypeError(
                "step is missing: no state in opt_state counts updates. Pass log(opt_state, step)."
            )
        report.pop("step", None)
        row = {f"{prefix}{name}": value for name, value in report.items()} | scalars
        if not all(is_concrete(leaf) for leaf in jax.tree.leaves((step, row))):
            # Decided on the device as well, so that other steps transfer nothing.
            due = jnp.asarray(step) % every == 0
            jax.lax.cond(due, lambda: jax.debug.callback(write_row, step, row), lambda: None)
        else:
            write_row(step, row)

    return log


class CSVWriter:
    """Append rows of scalars to a CSV file, one column per name, the step first.

    An existing file is continued, as after a resume. A new name gets a new column, for which the
    file is written again. A row without one of the names leaves that column empty.
    """

    def __init__(self, path: Any):
        self.path = pathlib.Path(path)
        self._columns = self._read()[0]

    def __call__(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one row."""
        row = {"step": step, **scalars}
        new = [name for name in row if name not in self._columns]
        if new:
            _, rows = self._read()
            self._columns = [*self._columns, *new]
            self._write("w", rows)
        self._write("a", [row])

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        if not self.path.exists():
            return [], []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            return list(reader.fieldnames or []), rows

    def _write(self, mode: str, rows: list[dict[str, Any]]) -> None:
        with self.path.open(mode, newline="") as file:
            sheet = csv.DictWriter(file, self._columns, restval="")
            if mode == "w":
                sheet.writeheader()
            sheet.writerows(rows)


def _as_function(writer: Any) -> Write:
    """Return the function that writes a row to ``writer``, whatever kind of logger it is."""
    if isinstance(writer, str | pathlib.Path):
        return CSVWriter(writer)
    if hasattr(writer, "write_scalars"):
        return writer.write_scalars
    if hasattr(writer, "add_scalar"):

        def add_scalars(step: int, scalars: dict[str, float]) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)

        return add_scalars
    if callable(writer):
        return writer
    raise TypeError(
        "writer must be a path, a function (step, scalars), or a logger with add_scalar or "
        f"write_scalars, got {writer!r}."
    )
