"""Measuring: folding a batch into the statistics of all leaves, where that is due."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arrays import all_finite, moving_average
from optalr.linalg.structured import Structured
from optalr.signals.moments import LayerMoments, is_moments
from optalr.states import count_up, update_when
from optalr.transforms.kronecker.leaves import Elementwise, Kernel, Leaf, with_signals
from optalr.transforms.kronecker.memory import (
    LeafMemory,
    SideMemory,
)
from optalr.transforms.kronecker.rule import Rule
from optalr.transforms.kronecker.spectrum import Spectrum, Step


class Batch(NamedTuple):
    """What a batch adds to the statistics, beside the moments of its layers."""

    grads: Sequence[jax.Array]  # of all leaves, in float32 or wider
    num_examples: jax.Array  # () float32
    started: jax.Array  # () bool, whether there are roots


class Measurement(NamedTuple):
    """The statistics of one kernel in one batch."""

    rows: Structured
    cols: Structured
    second_moment: Any  # where one is kept


def init_leaf(spectrum: Spectrum, leaf: Leaf, dtype: Any) -> LeafMemory:
    """Return what a leaf remembers before the first batch."""
    if isinstance(leaf, Elementwise):
        return LeafMemory(second_moment=jnp.zeros(leaf.shape, dtype))
    if not isinstance(leaf, Kernel):
        return LeafMemory()
    rows, cols = (spectrum.start(side, leaf.stack, dtype) for side in leaf.sides)
    return LeafMemory(rows, cols, eigen_moment=spectrum.start_second_moment(leaf, dtype))


def measure(
    step: Step, memories: Sequence[LeafMemory], state: Any, *, grads: Sequence[jax.Array]
) -> tuple[list[LeafMemory], Any]:
    """Fold this batch into the statistics, where that is due and something was captured."""
    nodes = [node for node in jax.tree.leaves(step.signals, is_leaf=is_moments) if is_moments(node)]
    num_examples = jnp.float32(1)
    if nodes:  # every count is the batch's size, or 0 where nothing was captured
        num_examples = jnp.max(jnp.stack([jnp.asarray(n.count, jnp.float32) for n in nodes]))
    due = step.clock.measures(state.signal_age, state.count) & (num_examples > 0)

    def fold(carry: Any, inputs: Any) -> Any:
        batch, (signals, measure) = inputs
        leaves = with_signals(step.plans, signals if measure is None else measure())
        return fold_batch(step.spectrum, leaves, carry[0], batch=batch)

    batch = Batch(grads, num_examples, started=state.num_refreshes > 0)
    inputs = batch, (step.signals, step.measure)
    memories, good = update_when(due, fold, (list(memories), jnp.bool_(True)), inputs)
    measured = due & good
    decay = jnp.asarray(step.spectrum.rule.decay, jnp.float32)
    samples = samples_a_dimension(step.leaves)
    return list(memories), state._replace(
        signal_age=jnp.where(due, 1, count_up(state.signal_age)),
        failures=count_up(state.failures, ~good),
        measurements=count_up(state.measurements, measured),
        samples=state.samples + jnp.where(measured, samples, 0),
        weight=jnp.where(measured, decay * state.weight + (1 - decay), state.weight),
    )


def fold_batch(
    spectrum: Spectrum, leaves: Sequence[Leaf], memories: Sequence[LeafMemory], *, batch: Batch
) -> tuple[list[LeafMemory], jax.Array]:
    """Return what is remembered after one batch, and whether all of the batch was finite.

    One number that is not finite leaves the memory of every leaf as it was.
    """
    measured: dict[int, Any] = {}
    for i, (leaf, memory) in enumerate(zip(leaves, memories, strict=True)):
        if isinstance(leaf, Kernel):
            measured[i] = _measure_kernel(spectrum, leaf, memory, index=i, batch=batch)
        elif isinstance(leaf, Elementwise):
            measured[i] = batch.num_examples * jnp.square(batch.grads[i])
    good = all_finite(measured)
    folded = list(memories)
    for i, new in measured.items():
        leaf, memory = leaves[i], memories[i]
        if isinstance(leaf, Kernel):
            seen = good if leaf.moments is None else good & (leaf.moments.count > 0)
            folded[i] = _fold_kernel(spectrum.rule, leaf, memory, new=new, keep=seen)
        else:
            old = memory.second_moment
            average = moving_average(old, new, spectrum.rule.decay)
            folded[i] = LeafMemory(second_moment=jnp.where(good, average, old))
    return folded, good


def _measure_kernel(
    spectrum: Spectrum, leaf: Kernel, memory: LeafMemory, *, index: int, batch: Batch
) -> Measurement:
    matrix = leaf.to_matrix(batch.grads, index)
    if leaf.moments is not None:
        rows, cols = _grams_of_signals(leaf, leaf.moments)
    elif spectrum.rule.share == 1:  # a leaf without a layer among captured ones
        rows, cols = _normalized_grams(leaf, matrix, batch.num_examples)
    else:
        rows, cols = leaf.rows.gram(matrix), leaf.cols.gram(jnp.swapaxes(matrix, -1, -2))

    def second_moment(squares: jax.Array) -> jax.Array:
        # Before the first refresh the bases are the identity. Squares in it would be moments of
        # the parameters' own axes, and the first refresh replaces them anyway.
        return jnp.where(batch.started, batch.num_examples * squares, 0)

    squares = spectrum.squares(leaf, memory, leaf.pad(matrix))
    return Measurement(rows, cols, jax.tree.map(second_moment, squares))


def _grams_of_signals(leaf: Kernel, moments: LayerMoments) -> tuple[Structured, Structured]:
    """Return the two factors of one captured layer, a joint bias included."""
    rows, cols = moments.rows, moments.cols
    if leaf.joint_bias is not None and moments.row_mean is not None:
        rows = _with_ones(rows, moments.row_mean)
    elif leaf.joint_bias is not None and moments.col_mean is not None:
        cols = _with_ones(cols, moments.col_mean)
    return leaf.rows.of_gram(rows), leaf.cols.of_gram(cols)


def _with_ones(gram: jax.Array, mean: jax.Array) -> jax.Array:
    """Return the Gram matrix of inputs with a 1 appended, which is what a joint bias multiplies."""
    top = jnp.concatenate([gram, mean[..., :, None]], -1)
    bottom = jnp.concatenate([mean, jnp.ones_like(mean[..., :1])], -1)
    return jnp.concatenate([top, bottom[..., None, :]], -2)


def _normalized_grams(
    leaf: Kernel, matrix: jax.Array, num_examples: jax.Array
) -> tuple[Structured, Structured]:
    """Return the Gram matrices of a gradient, scaled to ``tr(B) tr(A) = N ‖G‖²``.

    That is the trace of the Fisher matrix of one example. So each factor takes the whole power, as
    the factors of captured layers do.
    """
    rows, cols = leaf.rows.gram(matrix), leaf.cols.gram(jnp.swapaxes(matrix, -1, -2))
    total = jnp.sum(jnp.square(matrix), (-2, -1))
    inverse = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
    if leaf.output_side == 1:
        return rows.scaled(inverse), cols.scaled(num_examples)
    return rows.scaled(num_examples), cols.scaled(inverse)


def _fold_kernel(
    rule: Rule, leaf: Kernel, memory: LeafMemory, *, new: Measurement, keep: jax.Array
) -> LeafMemory:
    """Return a kernel's memory after one more batch, or as it was where ``keep`` is false."""

    def choose(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)

    def fold_side(side: SideMemory, form: Structured, new: Structured) -> SideMemory:
        average = form.holding(side.factor).fold(new, rule.decay)
        return side._replace(factor=choose(average.stored, side.factor))

    average = partial(moving_average, decay=rule.decay)
    moment = jax.tree.map(average, memory.eigen_moment, new.second_moment)
    return LeafMemory(
        rows=fold_side(memory.rows, leaf.rows, new.rows),
        cols=fold_side(memory.cols, leaf.cols, new.cols),
        eigen_moment=choose(moment, memory.eigen_moment),
    )


def samples_a_dimension(leaves: Sequence[Leaf]) -> jax.Array:
    """Return how many samples per dimension one batch adds to the factor that gets the fewest.

    A batch adds N·T samples to the factors of a captured layer. To factors made from a gradient it
    adds at most as many directions as the shorter side has.
    """
    added = []
    for leaf in leaves:
        if not isinstance(leaf, Kernel):
            continue
        largest = max(side.block for side in leaf.sides)
        if largest == 0:
            continue  # diagonals only: no rank to fill before their powers make sense
        samples: Any = min(side.size for side in leaf.sides)
        if leaf.moments is not None:
            samples = leaf.moments.count * leaf.moments.positions
        added.append(jnp.asarray(samples, jnp.float32) / largest)
    return jnp.min(jnp.stack(added)) if added else jnp.float32(jnp.inf)
