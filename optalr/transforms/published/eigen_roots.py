"""The direction of TSO-ALRA's Algorithm 1: roots by eigendecomposition, every so many steps.

Ida & Fujiwara, "Improving Generalization Performance of Adaptive Learning Rate by Switching from
Block Diagonal Matrix Preconditioning to SGD", 2020, eq. 14-18 and lines 2 to 8 of Algorithm 1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_count, check_interval, check_kind, require_extra
from optalr.arrays import moving_average, on_auto_axes
from optalr.clocks import (
    MEASURE,
    REFRESH,
    asking,
    is_barred,
    period_of,
    permitted,
    run_when,
)
from optalr.signals.coverage import Coverage
from optalr.signals.moments import LayerMoments
from optalr.states import count_up
from optalr.transforms.published.factor_trees import (
    Factors,
    Layer,
    from_trees,
    identity,
    layers_of,
    moments_by_path,
    paths_of,
    start,
    to_trees,
)
from optalr.transforms.shared.making import transformation
from optalr.transforms.shared.subtrees import check_places

_NAME = "paper.tso_alra"


class EigenRootsClock(NamedTuple):
    """When Algorithm 1 measures (always) and takes roots (t ≡ 0 mod T_int): scalars."""

    root_age: Any  # int32, updates since roots were taken; since the start, before the first
    period: Any  # int32, T_int

    @property
    def is_certain(self) -> Any:
        """Whether the period is known."""
        return self.period > 0

    def takes_roots(self) -> Any:
        """Return whether the next update takes roots."""
        return self.root_age + 1 >= self.period

    def needs(self) -> Any:
        """Return what the next update has to do."""
        return MEASURE | REFRESH * self.takes_roots()

    def after(self, told: Any) -> "EigenRootsClock":
        """Return the clock after an update that was told so."""
        stays = 1 - self.takes_roots() * permitted(told, REFRESH)
        return self._replace(root_age=(self.root_age + 1) * stays)


class EigenRootsState(NamedTuple):
    """State of ``scale_by_eigen_roots``.

    The last four are trees of the parameters' structure: arrays at leaves of two or more axes,
    ``optax.MaskedNode()`` elsewhere.
    """

    # every update
    count: jax.Array  # () int32, t
    root_age: jax.Array  # () int32, updates since roots were taken; since the start, before that
    wants_signals: jax.Array  # () bool, True: statistics are taken at every step
    row_factor: Any  # (*stack, m, m), the moving average of the rows' Gram matrices
    col_factor: Any  # (*stack, n, n), likewise of the columns
    # every T_int updates
    row_root: Any  # (*stack, m, m), (row_factor + εI)^{-1/2}; the identity before the first
    col_root: Any  # (*stack, n, n)
    # for whoever runs a program made for one answer of the clock (optalr/clocks.py)
    told: jax.Array  # () int8, -1
    period: jax.Array  # () int32, T_int

    @property
    def clock(self) -> EigenRootsClock:
        """When to take roots."""
        return EigenRootsClock(self.root_age, self.period)


def scale_by_eigen_roots(
    *,
    decay: Any = 0.95,
    damping: Any = 1e-6,
    update_every: Any = 50,
    layout: Coverage | None = None,
    max_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Multiply gradients by roots of Kronecker factors, exactly as Algorithm 1 says.

    Choose it through ``optalr.paper.tso_alra``, which has the recurrence, the arguments and what to
    expect; ``optalr.scale_by_kronecker`` is the form to train with.
    """
    check_interval("decay", decay, 0.0, 1.0)
    check_interval("damping", damping, 0.0)
    check_count("update_every", update_every)
    check_count("max_size", max_size)
    remedy = "Pass what optalr.coverage(loss_fn, params, *args) returns."
    check_kind("layout", layout, Coverage, remedy=remedy)
    method = _Algorithm(decay, damping, update_every, layout, max_size)
    return transformation(_NAME, method.init, method.update)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by jit: settings may be arrays
class _Algorithm:
    """Algorithm 1, first loop, for one choice of arguments."""

    decay: Any
    damping: Any
    update_every: Any
    layout: Coverage | None
    max_size: int

    def init(self, params: Any) -> EigenRootsState:
        layers = layers_of(params, self.layout, self.max_size)
        leaves = jax.tree.leaves(params)
        zeros = {i: start(layer, leaves[i], jnp.zeros) for i, layer in layers.items()}
        roots = {i: start(layer, leaves[i], identity) for i, layer in layers.items()}
        return EigenRootsState(
            count=jnp.zeros((), jnp.int32),
            root_age=jnp.zeros((), jnp.int32),
            wants_signals=jnp.ones((), bool),
            **to_trees(params, zeros, roots),
            told=asking(),
            period=period_of(self.update_every),
        )

    def update(self, updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        del params
        check_places(_NAME, updates, extras.get("point"))
        if "signals" not in extras:  # of one bare array without a layer they are None
            require_extra(extras, "signals", _NAME)
        signals = extras["signals"]
        return on_auto_axes(self._advance, updates, signals, state, like=(updates, state))

    def _advance(self, updates: Any, signals: Any, state: Any) -> tuple[Any, EigenRootsState]:
        """Do lines 2 to 8."""
        layers, moments = layers_of(updates, self.layout, self.max_size), moments_by_path(signals)
        factors = from_trees(state.row_factor, state.col_factor, updates)
        roots = from_trees(state.row_root, state.col_root, updates)

        # Line 3.
        if not is_barred(permitted(state.told, MEASURE)):
            captured = {i: moments.get(layer.path) for i, layer in layers.items()}
            factors = {i: self._averaged(factors[i], layers[i], captured[i]) for i in layers}

        # Lines 4 to 7.
        state = state._replace(count=count_up(state.count), period=period_of(self.update_every))
        may, due = permitted(state.told, REFRESH), state.clock.takes_roots()
        roots = run_when(due, self._roots, roots, inputs=factors, may=may)
        root_age = jnp.where(due & may, 0, count_up(state.root_age))
        state = state._replace(root_age=root_age, told=asking())

        # Line 8.
        new = self._directions(updates, layers, roots, state=state, moments=moments)
        return new, state._replace(**to_trees(updates, factors, roots))

    def _averaged(self, factors: Factors, layer: Layer, moments: LayerMoments | None) -> Factors:
        """Return eq. 17 and 18 of one layer."""
        if moments is None:
            return factors
        measured = Factors(moments.rows, moments.cols)
        if any(new.shape != old.shape for new, old in zip(measured, factors, strict=True)):
            raise ValueError(
                f"signals has factors of shapes {measured.rows.shape} and {measured.cols.shape} "
                f"for {layer.path}, and the state {factors.rows.shape} and {factors.cols.shape}. "
                "Pass layout=optalr.coverage(loss_fn, params, *args)."
            )

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            # A count of 0: nothing was captured in this step.
            return jnp.where(moments.count > 0, moving_average(old, new, self.decay), old)

        return jax.tree.map(average, factors, measured)

    def _roots(self, roots: Any, factors: Any) -> Any:
        """Return ``U (Λ + εI)^{-1/2} Uᵀ`` of all factors."""
        del roots

        def root(factor: jax.Array) -> jax.Array:
            values, vectors = jnp.linalg.eigh(factor, symmetrize_input=False)
            # In exact arithmetic no eigenvalue is negative, as the paper says below eq. 16.
            damped = jnp.maximum(values, 0) + jnp.asarray(self.damping, factor.dtype)
            scaled = vectors * (damped**-0.5)[..., None, :]
            return scaled @ jnp.swapaxes(vectors, -1, -2)

        return jax.tree.map(root, factors)

    def _directions(
        self,
        updates: Any,
        layers: Mapping[int, Layer],
        roots: Mapping[int, Factors],
        *,
        state: EigenRootsState,
        moments: Mapping[str, LayerMoments],
    ) -> Any:
        """Return eq. 16; a leaf that is no layer keeps its gradient."""
        leaves, tree = jax.tree.flatten(updates)
        places = {path: i for i, path in enumerate(paths_of(updates))}
        new = list(leaves)
        for i, layer in layers.items():
            captured = moments.get(layer.path)
            if captured is None:
                continue
            gradient = layer.view.to_matrix(leaves[i].astype(roots[i].rows.dtype))
            direction = roots[i].rows @ gradient @ roots[i].cols
            new[i] = layer.view.from_matrix(direction, layer.shape).astype(leaves[i].dtype)
            if captured.bias in places:
                output = roots[i].cols if captured.input_side == "rows" else roots[i].rows
                place = places[captured.bias]
                new[place] = self._of_bias(leaves[place], output, state)
        return tree.unflatten(new)

    def _of_bias(self, bias: jax.Array, root: jax.Array, state: EigenRootsState) -> jax.Array:
        """Return the direction of a bias: a kernel whose input is always 1, so that A is too."""
        b = bias.astype(root.dtype).reshape(*root.shape[:-1], 1)
        taken_at = (state.count - state.root_age).astype(root.dtype)  # the step of the last roots
        # The moving average of ones from zero on, 1 − (1−γ)^t.
        average = 1 - jnp.asarray(self.decay, root.dtype) ** taken_at
        inverse = (average + jnp.asarray(self.damping, root.dtype)) ** -0.5
        direction = jnp.where(taken_at > 0, inverse, 1) * (root @ b)
        return direction.reshape(bias.shape).astype(bias.dtype)
