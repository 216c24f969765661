"""Measuring: folding a batch into the statistics of all leaves, where that is due."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.arrays import all_finite, as_vector, moving_average, repeated, wide_dtype
from optalr.clocks import MEASURE, chosen, is_barred, permitted, run_when
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
    Trust,
    Weights,
    in_proportion,
)
from optalr.transforms.kronecker.rule import Rule
from optalr.transforms.kronecker.spectrum import Spectrum, Step
from optalr.transforms.shared.rescaling import leaf_scales


class Own(NamedTuple):
    """Which leaves are the loss's gradient times one factor, the same arrays but for that."""

    places: set[int]
    share: jax.Array  # () float32, the factor; 1 but for a gradient that was too long


class Arrived(NamedTuple):
    """The gradient that an update got."""

    grads: Sequence[jax.Array]  # of all leaves, in float32 or wider
    updates: Any  # the same as a tree
    original: Any  # the gradient as the loss gave it, or None
    own: Own
    usable: jax.Array  # () bool, whether it was finite


class Batch(NamedTuple):
    """What a batch adds to the statistics, beside the moments of its layers."""

    grads: Sequence[jax.Array]  # of all leaves, in float32 or wider
    own: Own
    scales: Mapping[int, jax.Array]  # of other captured kernels, what theirs was multiplied by
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
    num_examples = _num_examples(step.signals)
    due = state.clock.measures() & (num_examples > 0) & arrived.usable

    own = arrived.own
    others = [i for i, leaf in enumerate(step.leaves) if _is_captured(leaf) and i not in own.places]

    def fold(carry: Folded, inputs: Any) -> Folded:
        (grads, share, *known), (updates, original), signals = inputs
        scales = leaf_scales(updates, original, of=others)
        batch = Batch(grads, Own(own.places, share), scales, *known)
        if step.measure is not None:  # then ``signals`` is a function
            signals = signals(sides_of(step.leaves))
        leaves = with_signals(step.plans, signals)
        return fold_batch(step.spectrum, leaves, carry.memories, batch=batch)

    started = state.num_refreshes > 0
    young = ~started | (state.measurements < YOUNG)
    batch = arrived.grads, own.share, num_examples, started, Trust(state.weight, young)
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


def _num_examples(signals: Any) -> jax.Array:
    """Return the batch's size, 0 where nothing was captured; 1 without signals."""
    nodes = [node for node in jax.tree.leaves(signals, is_leaf=is_moments) if is_moments(node)]
    if not nodes:
        return jnp.float32(1)
    # Every count is the batch's size, or 0.
    return jnp.max(jnp.stack([jnp.asarray(node.count, jnp.float32) for node in nodes]))


def fold_batch(
    spectrum: Spectrum, leaves: Sequence[Leaf], memories: Sequence[LeafMemory], *, batch: Batch
) -> Folded:
    """Return what is remembered after one batch.

    One number that is not finite leaves the memory of every leaf as it was. What each side has one
    number of is computed for all sides together, in few operations.
    """
    measured: dict[int, Any] = {}
    for i, (leaf, memory) in enumerate(zip(leaves, memories, strict=True)):
        if isinstance(leaf, Kernel):
            measured[i] = _measure_kernel(spectrum, leaf, memory, index=i, batch=batch)
        elif isinstance(leaf, Elementwise):
            measured[i] = batch.num_examples * jnp.square(batch.grads[i])
    good = all_finite(measured)
    own = {i for i in batch.own.places if _is_captured(leaves[i])}
    left = in_proportion(
        measured, leaves, memories, trust=batch.trust, rescaled=(own, batch.own.share)
    )
    weights = left.weights(spectrum.rule.decay)
    folded = list(memories)
    for i, new in measured.items():
        leaf, memory = leaves[i], memories[i]
        if isinstance(leaf, Kernel):
            seen = good if leaf.moments is None else good & (leaf.moments.count > 0)
            after = _fold_kernel(memory, new, weights=weights[i], stack=left.stacks[i])
            if isinstance(memory.eigen_moment, jax.Array):
                moment = _fold_moment(spectrum.rule, memory, new, tame=left.tame(i))
                after = after._replace(eigen_moment=moment)
            folded[i] = chosen(seen, after, memory)
        else:
            average = _weighted(memory.second_moment, new, weights[i][0], stack=())
            folded[i] = chosen(good, LeafMemory(second_moment=average), memory)
    # While the average is young its batches may well differ that much.
    return Folded(folded, good, good & jnp.any(left.over) & ~batch.trust.is_young)


def _is_captured(leaf: Leaf) -> bool:
    return isinstance(leaf, Kernel) and leaf.moments is not None


def _measure_kernel(
    spectrum: Spectrum, leaf: Kernel, memory: LeafMemory, *, index: int, batch: Batch
) -> Measurement:
    matrix = leaf.to_matrix(batch.grads, index)
    if leaf.moments is not None:
        rows, cols = _grams_of_signals(leaf, leaf.moments, batch.scales.get(index))
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
    leaf: Kernel, moments: LayerMoments, scale: jax.Array | None
) -> tuple[Structured, Structured]:
    """Return the two factors of one captured layer, a joint bias included.

    The signals are as large as the loss made them. ``scale`` is what the gradient was multiplied by
    before it arrived; None for 1.
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
    if scale is not None:
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
    memory: LeafMemory, new: Measurement, *, weights: Sequence[Weights], stack: tuple[int, ...]
) -> LeafMemory:
    """Return a kernel's factors after one more batch."""

    def fold_side(side: SideMemory, measured: Structured, weight: Weights) -> SideMemory:
        factor = _weighted(side.factor, measured.stored, weight, stack=stack)
        return side._replace(factor=factor)

    rows = fold_side(memory.rows, new.rows, weights[0])
    return memory._replace(rows=rows, cols=fold_side(memory.cols, new.cols, weights[1]))


def _fold_moment(rule: Rule, memory: LeafMemory, new: Measurement, *, tame: jax.Array) -> jax.Array:
    """Return a kernel's second moment in the eigenbases after one more batch.

    Squares of a batch's gradient are out of proportion where its factors are. By themselves they
    may be N times those of the factors, in a batch whose examples agree. So they are multiplied by
    what is left of both.
    """
    squares = new.second_moment
    squares *= repeated(tame, squares, squares.shape[:-2])
    return moving_average(memory.eigen_moment, squares, rule.decay)


def _weighted(old: jax.Array, new: Any, weight: Weights, *, stack: tuple[int, ...]) -> jax.Array:
    """Return the weighted sum of an average and a measurement, in the dtype of the average."""
    average, measured = (repeated(each.astype(old.dtype), old, stack) for each in weight)
    return average * old + measured * new.astype(old.dtype)


def samples_a_dimension(leaves: Sequence[Leaf]) -> jax.Array:
    """Return how many samples per dimension one batch adds to the factor that gets the fewest.

    A batch adds at most N·T samples to the factors of a captured layer. To factors made from a
    gradient it adds at most as many directions as the shorter side has.
    """
    samples: list[Any] = []
    dimensions: list[int] = []
    for leaf in leaves:
        if not isinstance(leaf, Kernel):
            continue
        largest = max(side.block for side in leaf.sides)
        if largest == 0:
            continue  # diagonals only: no rank to fill before their powers make sense
        shorter = min(side.size for side in leaf.sides)
        samples.append(shorter if leaf.moments is None else leaf.moments.num_samples)
        dimensions.append(largest)
    if not samples:
        return jnp.float32(jnp.inf)
    counts = as_vector([jnp.asarray(number, jnp.float32) for number in samples])
    return jnp.min(counts / np.array(dimensions, np.float32))
