"""Measuring: folding a batch into the statistics of all leaves, where that is due."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arrays import all_finite, as_vector, moving_average, wide_dtype
from optalr.clocks import MEASURE, is_barred, permitted, run_when
from optalr.linalg import spd
from optalr.linalg.structured import Structured
from optalr.signals.moments import LayerMoments, is_moments
from optalr.states import count_up
from optalr.transforms.kronecker.leaves import Elementwise, Kernel, Leaf
from optalr.transforms.kronecker.memory import (
    LeafMemory,
    SideMemory,
    with_narrow_roots,
)
from optalr.transforms.kronecker.pairing import sides_of, with_signals
from optalr.transforms.kronecker.proportion import (
    YOUNG,
    Measurement,
    Shares,
    Trust,
    in_proportion,
)
from optalr.transforms.kronecker.rule import Rule
from optalr.transforms.kronecker.spectrum import Spectrum, Step
from optalr.transforms.shared.rescaling import leaf_scales


class Arrived(NamedTuple):
    """The gradient that an update got."""

    grads: Sequence[jax.Array]  # of all leaves, in float32 or wider
    updates: Any  # the same as a tree
    original: Any  # the gradient as the loss gave it, or None
    usable: jax.Array  # () bool, whether it was finite


class Batch(NamedTuple):
    """What a batch adds to the statistics, beside the moments of its layers."""

    grads: Sequence[jax.Array]  # of all leaves, in float32 or wider
    scales: Mapping[int, jax.Array]  # of captured kernels, what their gradient was multiplied by
    num_examples: jax.Array  # () float32
    started: jax.Array  # () bool, whether there are roots
    trust: Trust  # what the averages are worth before this batch


class Folded(NamedTuple):
    """The statistics after a batch.

    Attributes:
      memories: of all leaves.
      good: () bool, whether all of the batch was finite.
      bounded: () bool, whether some of it was out of proportion, and was scaled down.
    """

    memories: list[LeafMemory]
    good: jax.Array
    bounded: jax.Array


def init_leaf(
    spectrum: Spectrum, leaf: Leaf, parameter: jax.Array, *, resting: Any = None
) -> LeafMemory:
    """Return what a leaf remembers before the first batch, its roots in the dtype given."""
    dtype = wide_dtype(parameter)
    if isinstance(leaf, Elementwise):
        # Like the parameter, so that it is sharded as that is.
        return LeafMemory(second_moment=jnp.zeros_like(parameter, dtype=dtype))
    if not isinstance(leaf, Kernel):
        return LeafMemory()
    rows, cols = (spectrum.start(side, leaf.stack, dtype) for side in leaf.sides)
    memory = LeafMemory(rows, cols, eigen_moment=spectrum.start_second_moment(leaf, dtype))
    return memory if resting is None else with_narrow_roots(memory, leaf, resting)


def measure(
    step: Step, memories: Sequence[LeafMemory], state: Any, *, arrived: Arrived
) -> tuple[list[LeafMemory], Any]:
    """Fold this batch into the statistics, where that is due and something was captured."""
    may = permitted(state.told, MEASURE)
    if is_barred(may):
        return list(memories), state._replace(signal_age=count_up(state.signal_age))
    nodes = [node for node in jax.tree.leaves(step.signals, is_leaf=is_moments) if is_moments(node)]
    num_examples = jnp.float32(1)
    if nodes:  # every count is the batch's size, or 0 where nothing was captured
        num_examples = jnp.max(jnp.stack([jnp.asarray(n.count, jnp.float32) for n in nodes]))
    due = state.clock.measures() & (num_examples > 0) & arrived.usable

    def fold(carry: Folded, inputs: Any) -> Folded:
        batch, (updates, original), signals = inputs
        layers = [i for i, leaf in enumerate(step.leaves) if _is_captured(leaf)]
        batch = batch._replace(scales=leaf_scales(updates, original, of=layers))
        if step.measure is not None:  # then ``signals`` is a function
            signals = signals(sides_of(step.leaves))
        leaves = with_signals(step.plans, signals)
        return fold_batch(step.spectrum, leaves, carry.memories, batch=batch)

    started = state.num_refreshes > 0
    young = ~started | (state.measurements < YOUNG)
    batch = Batch(arrived.grads, {}, num_examples, started, Trust(state.weight, young))
    signals = step.signals if step.measure is None else step.measure
    inputs = batch, (arrived.updates, arrived.original), signals
    carry = Folded(list(memories), jnp.bool_(True), jnp.bool_(False))
    folded = run_when(due, fold, carry, inputs=inputs, may=may)
    due &= may
    measured = due & folded.good
    decay = jnp.asarray(step.spectrum.rule.decay, jnp.float32)
    samples = samples_a_dimension(step.leaves)
    return list(folded.memories), state._replace(
        signal_age=jnp.where(due, 1, count_up(state.signal_age)),
        failures=count_up(state.failures, ~folded.good | folded.bounded),
        measurements=count_up(state.measurements, measured),
        samples=state.samples + jnp.where(measured, samples, 0),
        periods=state.periods._replace(
            samples=jnp.where(measured, samples, state.periods.samples).astype(jnp.float32)
        ),
        weight=jnp.where(measured, decay * state.weight + (1 - decay), state.weight),
    )


def fold_batch(
    spectrum: Spectrum, leaves: Sequence[Leaf], memories: Sequence[LeafMemory], *, batch: Batch
) -> Folded:
    """Return what is remembered after one batch.

    One number that is not finite leaves the memory of every leaf as it was.
    """
    measured: dict[int, Any] = {}
    for i, (leaf, memory) in enumerate(zip(leaves, memories, strict=True)):
        if isinstance(leaf, Kernel):
            measured[i] = _measure_kernel(spectrum, leaf, memory, index=i, batch=batch)
        elif isinstance(leaf, Elementwise):
            measured[i] = batch.num_examples * jnp.square(batch.grads[i])
    good, bounded = all_finite(measured), jnp.bool_(False)
    left = in_proportion(measured, leaves, memories, trust=batch.trust)
    folded = list(memories)
    for i, new in measured.items():
        leaf, memory = leaves[i], memories[i]
        seen = good
        if isinstance(leaf, Kernel):
            seen = good if leaf.moments is None else good & (leaf.moments.count > 0)
            folded[i] = _fold_kernel(spectrum.rule, memory, new, left=left[i], keep=seen)
        else:
            old, decay = memory.second_moment, spectrum.rule.decay
            average = moving_average(left[i][0].average * old, left[i][0].new * new, decay)
            folded[i] = LeafMemory(second_moment=jnp.where(seen, average, old))
        bounded |= seen & jnp.any(as_vector([share.over for share in left[i]]))
    # While the average is young its batches may well differ that much.
    return Folded(folded, good, bounded & ~batch.trust.is_young)


def _is_captured(leaf: Leaf) -> bool:
    return isinstance(leaf, Kernel) and leaf.moments is not None


def _measure_kernel(
    spectrum: Spectrum, leaf: Kernel, memory: LeafMemory, *, index: int, batch: Batch
) -> Measurement:
    matrix = leaf.to_matrix(batch.grads, index)
    if leaf.moments is not None:
        rows, cols = _grams_of_signals(leaf, leaf.moments, batch.scales[index])
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


def _grams_of_signals(
    leaf: Kernel, moments: LayerMoments, scale: jax.Array
) -> tuple[Structured, Structured]:
    """Return the two factors of one captured layer, a joint bias included.

    The signals are as large as the loss made them. ``scale`` is what the gradient was multiplied by
    since.
    """

    def factor(form: Structured, gram: Any, mean: jax.Array | None) -> Structured:
        if isinstance(gram, Structured):  # measured in this form, a joint bias included
            return gram
        if leaf.joint_bias is not None and mean is not None:
            gram = spd.with_ones(gram, mean)
        return form.of_gram(gram)

    sides = [
        factor(leaf.rows, moments.rows, moments.row_mean),
        factor(leaf.cols, moments.cols, moments.col_mean),
    ]
    sides[leaf.output_side] = sides[leaf.output_side].scaled(jnp.square(scale))
    return sides[0], sides[1]


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
    rule: Rule,
    memory: LeafMemory,
    new: Measurement,
    *,
    left: Sequence[Shares],
    keep: jax.Array,
) -> LeafMemory:
    """Return a kernel's memory after one more batch, or as it was where ``keep`` is false."""

    def fold_side(side: SideMemory, measured: Structured, share: Shares) -> SideMemory:
        decay = jnp.asarray(rule.decay, side.factor.dtype)
        old = measured.holding(side.factor).scaled(decay * share.average).stored
        average = old + measured.scaled((1 - decay) * share.new).stored
        return side._replace(factor=jnp.where(keep, average, side.factor))

    rows, cols = left

    def fold_moment(old: jax.Array, squares: jax.Array) -> jax.Array:
        # Squares of a batch's gradient are out of proportion where its factors are. By themselves
        # they may be N times those of the factors, in a batch whose examples agree.
        tame = squares * spd.align(rows.new * cols.new, squares).astype(squares.dtype)
        return jnp.where(keep, moving_average(old, tame, rule.decay), old)

    return LeafMemory(
        rows=fold_side(memory.rows, new.rows, rows),
        cols=fold_side(memory.cols, new.cols, cols),
        eigen_moment=jax.tree.map(fold_moment, memory.eigen_moment, new.second_moment),
    )


def samples_a_dimension(leaves: Sequence[Leaf]) -> jax.Array:
    """Return how many samples per dimension one batch adds to the factor that gets the fewest.

    A batch adds at most N·T samples to the factors of a captured layer. To factors made from a
    gradient it adds at most as many directions as the shorter side has.
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
            samples = leaf.moments.num_samples
        added.append(jnp.asarray(samples, jnp.float32) / largest)
    return jnp.min(jnp.stack(added)) if added else jnp.float32(jnp.inf)
