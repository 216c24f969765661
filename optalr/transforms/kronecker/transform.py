"""Preconditioning by a power of the Kronecker-factored Fisher matrix, F^p with F ≈ B ⊗ A.

A layer's kernel W (m × n, s = Wᵀα) has the gradient G = E[α βᵀ]. Its Fisher block is approximated
by B ⊗ A, with A = E[α αᵀ] and B = E[β βᵀ] (Martens & Grosse 2015). So

    F^p vec(G) = vec(A^p G B^p),

two small roots instead of one of order mn. p = −1/2 is the direction of Ida & Fujiwara (2020),
p = −1 the natural gradient, p = 0 the gradient.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_choice, check_count, check_interval, require_extra
from optalr.arrays import at_least_float32, on_auto_axes, wide_dtype
from optalr.clocks import asking
from optalr.sharding.spread import Spread, spread_over
from optalr.signals.coverage import Coverage
from optalr.states import count_up, settle
from optalr.transforms.kronecker.direction import directions
from optalr.transforms.kronecker.leaves import Leaf, plan_leaves
from optalr.transforms.kronecker.length import bound, finish, graft, norm_of, run_graft
from optalr.transforms.kronecker.measuring import Arrived, Own, init_leaf, measure
from optalr.transforms.kronecker.memory import KroneckerState, at_rest, from_trees, to_trees
from optalr.transforms.kronecker.options import KroneckerOptions, check_together, resolve_options
from optalr.transforms.kronecker.pairing import REMEDY, own_products, with_signals
from optalr.transforms.kronecker.refresh import refresh
from optalr.transforms.kronecker.rule import DAMPING_FORMS, Periods, Rule, periods_of
from optalr.transforms.kronecker.spectrum import SPECTRA, Spectrum, Step
from optalr.transforms.shared.gradient_watch import WATCHED, admit_unless, start_gradient_watch
from optalr.transforms.shared.making import transformation
from optalr.transforms.shared.rescaling import untouched
from optalr.transforms.shared.subtrees import check_places


def scale_by_kronecker(
    power: Any = -0.5,
    *,
    decay: Any = 0.95,
    damping: Any = 1e-3,
    update_every: Any = 50,
    signals_every: Any = None,
    statistics: str = "signals",
    layout: Coverage | None = None,
    mesh: Any = None,
    options: KroneckerOptions | Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale gradients by a power of the Kronecker-factored Fisher matrix.

    Choose it where the curvature of dense and convolution layers should set the direction: few
    epochs, badly scaled inputs, deep narrow layers. ``optalr.tso_alra`` is the complete optimizer.

    For a kernel with gradient G, and the moments A and B of ``value_grad_and_extras``,

        A ← decay·A + (1 − decay) E[ααᵀ],   B ← decay·B + (1 − decay) E[ββᵀ]   (bias-corrected),
        U = (A + λ_A)^p G (B + λ_B)^p,       λ_A = damping · tr(A)/m,  λ_B = damping · tr(B)/n.

    *What each leaf gets.*

    * A captured kernel gets the update above.
    * Its bias b gets ``(B + λ_B)^p b`` and needs no memory of its own. (Without a ``layout``,
      ``init`` cannot know that the leaf is a bias, and allocates a diagonal for it.)
    * Another leaf of two or more axes, such as an embedding, gets the same update as a kernel, with
      ``A = GGᵀ/‖G‖²`` and ``B = N GᵀG`` in place of the moments. With a ``layout`` it gets the
      diagonal rule.
    * Any other leaf gets the diagonal rule: ``(v + λ)^p g`` with
      ``v ← decay·v + (1 − decay) N g²``.

    N is the number of examples in the batch. Moments estimate the Fisher matrix of *one example*.
    Squares of g, the gradient of a batch's mean, estimate one that is N times smaller.

    A side longer than ``options.max_factor_size`` keeps only the diagonal of its factor. A layer
    whose ``count`` is 0 in a batch keeps its factors as they are. The bias correction has one
    weight for all layers, so in a batch the counts must be zero for all layers or for none.

    *When.* Gradients pass unchanged (or ``options.graft`` acts), bounded as below, until every
    factor has seen ``options.warmup`` samples per dimension, in at least ``options.min_batches``
    batches. A factor of too low a rank amplifies what it has not seen yet by ``λ^p``. (A moving
    average never holds more than some 1/(1 − decay) batches, so twice that many are always enough.)
    From then on roots are taken anew when they are as old as half the updates so far, and later
    every ``update_every`` updates.

    *How far.* An update that is too long is shrunk. At a learning rate of 1 it then changes the
    outputs of its layer by at most ``options.max_update`` RMS, with inputs taken as isotropic:
    ``‖U‖² tr(A)/m <= max_update² n``. (Leaves without a layer: ``‖U‖² <= max_update² max(m, n)``.)

    *What can go wrong.* If a root misses its residual on either side, the last good pair stays in
    place. A gradient that is not finite gives a zero update, and its moments are not folded in. One
    more than ten times as long as any of late is shortened to those. Moments with more than 30
    times the mean eigenvalue of their average are scaled down to that: one batch then changes the
    average of a factor 2.5-fold at most, and is forgotten within two refresh intervals.
    ``failures`` counts each of these.

    *Scale.* A gradient that was multiplied by c since the loss gave it (clipping, loss scaling)
    finds B multiplied by c², leaf by leaf, if the extra ``grad`` is there. So the direction is that
    of the loss times c, and the order in the chain does not matter.

    *Precision.* Gram matrices, and products of roots and gradients, are as precise as the loss's
    own products: ``jax.default_matmul_precision`` decides. Roots are taken in full precision.

    *On many devices.* With ``mesh`` a device takes the roots of some of the matrices, and one
    all-gather a refresh hands them out. No matrix is cut. They are shared out by their cost, n³,
    all sizes together, longest first, so the busiest device has at most the mean and one matrix to
    do. Nothing else changes: factors and roots are on every device, whose steps between two
    refreshes send nothing more than without. Every device decides alike, since all judge the same
    gathered numbers. ``options.sharded_factors`` leaves them on the devices in parts, in a Dth of
    the memory. Inside a ``jax.shard_map`` each device takes every root.

    Args:
      power: p, in [−1, 0]. It may be a schedule under ``inject_hyperparams``; roots in use keep the
        power they were taken with.
      decay: weight of the past in the moving averages, for each measurement, in [0, 1).
      damping: λ, >= 0, relative to the mean eigenvalue (of each factor; of their product where
        ``options.spectrum`` is not ``"factored"``) unless ``options.damping_form`` says otherwise.
      update_every: updates between two roots, >= 1.
      signals_every: updates between two measurements, >= 1; None for a tenth of ``update_every``.
        Shortly after the start roots are taken more often, and so are measurements.
      statistics: ``"signals"``, or ``"gradient"`` for Shampoo's ``GGᵀ`` and ``GᵀG``, each to the
        power p/2, which needs no capture.
      layout: the report of ``optalr.coverage(loss_fn, params, *args)``. Pass it where a leaf's
        matrix view is not "all axes but the last by the last".
      mesh: a ``jax.sharding.Mesh`` over whose devices the roots are shared out, or None: then each
        device takes all of them. See *On many devices*.
      options: a ``KroneckerOptions``, or a mapping of its fields.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` that reads the extra ``signals``, and has
      ``measure`` take what it keeps of them.

    Raises:
      ValueError: an argument is out of range, or ``options.root_method`` cannot take roots of this
        power; at ``init``, the layout is of other parameters; at ``update``, signals do not fit the
        state, or lack a leaf that ``layout`` says is captured, or ``jax.set_mesh`` has another
        mesh.
      TypeError: ``update`` got no ``signals``; ``mesh`` is no mesh.

    Cost: per kernel, an update takes two products, ``2mn(m + n)`` flops, or for a gradient of few
    positions N, through ``train_step``, ``2N(m² + n² + mn)``. A measurement takes ``m² + n²``
    additions. A refresh by eigendecomposition takes some ``20(m³ + n³)`` flops, equal
    sizes batched. Over D devices each takes about a Dth of it, unless one matrix costs more than
    that. Memory: ``2(m² + n²)`` numbers, ``3(m² + n²)`` with ``root_method="eigenbasis"``;
    ``optalr.coverage(..., options=options)`` prints the bytes.

    Examples:
      >>> import jax, jax.numpy as jnp, optalr, optax
      >>> options = optalr.KroneckerOptions(warmup=0, min_batches=1, max_update=None)
      >>> tx = optalr.scale_by_kronecker(damping=0.0, statistics="gradient", options=options)
      >>> params = {"kernel": jnp.diag(jnp.array([3.0, 4.0]))}
      >>> state = tx.init(params)
      >>> grads = {"kernel": jnp.diag(jnp.array([9.0, 1e-2]))}  # badly scaled
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, jax.tree.map(lambda u: -u, updates))
      >>> bool(jnp.allclose(params["kernel"], jnp.diag(jnp.array([2.0, 3.0])), atol=1e-4))
      True

    Reference: Yasutoshi Ida and Yasuhiro Fujiwara, "Improving Generalization Performance of
    Adaptive Learning Rate by Switching from Block Diagonal Matrix Preconditioning to SGD", 2020,
    eq. 14-18 and Algorithm 1. We put the factors on the sides that fit the gradient's shape (eq. 15
    holds for its transpose). We correct the moving averages for their start, and add the warm-up,
    the relative damping and the bound. ``statistics="gradient"``: Vineet Gupta, Tomer Koren and
    Yoram Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", 2018.
    """
    options = resolve_options(options)
    check_interval("power", power, -1, 0)
    check_interval("decay", decay, 0, 1, open_high=True)
    check_interval("damping", damping, 0)
    check_count("update_every", update_every)
    if signals_every is not None:
        check_count("signals_every", signals_every)
    check_choice("statistics", statistics, ("signals", "gradient"))
    check_together(options, power=power, statistics=statistics, layout=layout)
    first_roots = {"warmup": options.warmup, "min_batches": options.min_batches}
    periods = partial(periods_of, update_every, signals_every, decay, **first_roots)
    spread = spread_over(mesh, options.mesh_axes, rests=options.sharded_factors)
    numbers = power, decay, damping, statistics == "signals"
    method = _Kronecker(*numbers, layout, options, periods, spread)
    return transformation("scale_by_kronecker", method.init, method.update)


@dataclasses.dataclass(frozen=True)
class _Kronecker:
    """The two functions of the transformation, for one choice of arguments."""

    power: Any
    decay: Any
    damping: Any
    from_signals: bool
    layout: Coverage | None
    options: KroneckerOptions
    periods: Callable[[], Periods]
    spread: Spread | None

    def plan(self, tree: Any) -> list[Leaf]:
        """Return what each leaf of a tree is."""
        own_biases = not self.from_signals
        return plan_leaves(tree, self.layout, self.options, own_biases=own_biases)

    def spectrum(self) -> Spectrum:
        """Return the spectrum with its rule, made anew: its arrays belong to the trace at hand."""
        rule = Rule(
            power=self.power,
            share=1.0 if self.from_signals else 0.5,
            decay=self.decay,
            damping=jnp.asarray(self.damping, jnp.float32),
            damping_form=DAMPING_FORMS[self.options.damping_form],
        )
        return SPECTRA[self.options.spectrum](rule, self.options.root_method)

    def init(self, params: Any) -> KroneckerState:
        plans = zip(self.plan(params), jax.tree.leaves(params), strict=True)
        resting = self.options.root_dtype
        memories = [init_leaf(self.spectrum(), *plan, resting=resting) for plan in plans]
        other = self.options.graft
        return KroneckerState(
            told=asking(),
            periods=self.periods(),
            count=jnp.zeros([], jnp.int32),
            signal_age=jnp.ones([], jnp.int32),  # so that the first update measures
            root_age=jnp.zeros([], jnp.int32),
            wants_signals=jnp.asarray(self.from_signals),
            failures=jnp.zeros([], jnp.int32),
            update_norm=jnp.zeros([], jnp.float32),
            damping=jnp.array(self.damping, jnp.float32),
            graft=settle(other.init(at_least_float32(params))) if other else optax.EmptyState(),
            gradients=start_gradient_watch(),
            measurements=jnp.zeros([], jnp.int32),
            samples=jnp.zeros([], jnp.float32),
            weight=jnp.zeros([], jnp.float32),
            num_refreshes=jnp.zeros([], jnp.int32),
            missed=jnp.zeros([], jnp.int32),
            root_residual=jnp.zeros([], jnp.float32),
            memory=at_rest(to_trees(memories, params, self.spectrum().kept), self.spread),
        )

    def update(self, updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        check_places("scale_by_kronecker", updates, extras.get("point"))
        # One bare array without a layer has signals of None.
        if self.from_signals and "signals" not in extras:
            passed = {name: extra for name, extra in extras.items() if name != WATCHED}
            require_extra(passed, "signals", "scale_by_kronecker", remedy=REMEDY)
        other = self.options.graft
        # A bad gradient need not become zeros where its update does in the end.
        seen, options = extras.get(WATCHED), {"squares": False, "zeros": other is not None}
        given = admit_unless(seen, updates, state.gradients, **options)
        failures = count_up(state.failures, given.failed)
        # Periods may be injected anew at each update; the last batch's size is remembered.
        periods = self.periods()._replace(samples=state.periods.samples)
        state = state._replace(gradients=given.watch, failures=failures, periods=periods)
        others = None
        if other is not None:
            others, state = run_graft(other, given, state, params=params, extras=extras)
        read = {name: extras[name] for name in ("signals", "measure", "grad") if name in extras}
        # Asked here, because within control flow and on other axes every array is another one.
        own = untouched(updates, extras.get("grad"), seen)
        advance = partial(self._advance, own=own)
        if self.spread is None:
            read["outer_products"] = own_products(updates, extras, own, share=given.share)
        # Nothing in here calls the loss, which may be written for explicit axes.
        like = updates, state
        new, state = on_auto_axes(advance, (given, others), read, state, like=like)
        return (new if self.spread is None else self.spread.follow(new, params)), state

    def _advance(self, arrived: Any, read: dict[str, Any], state: Any, *, own: set[int]) -> Any:
        """Return the update and the state, given what arrived and the extras that are read."""
        given, others = arrived
        updates, step = given.updates, self._step(given.updates, read)
        grads = [leaf.astype(wide_dtype(leaf)) for leaf in jax.tree.leaves(updates)]
        memories = from_trees(state.memory, updates)

        known = read.get("grad"), Own(own, given.share)
        gradient = Arrived(grads, updates, *known, usable=~given.bad)
        memories, state = measure(step, memories, state, arrived=gradient)
        memories, state = refresh(step, memories, state)
        new = directions(step, memories, state, grads=grads)
        if others is not None:
            new = graft(new, others, started=state.num_refreshes > 0)
        if self.options.max_update is None:
            norm = norm_of(new)
        else:
            limits = {"weight": state.weight, "max_update": self.options.max_update}
            new, norm = bound(step.leaves, memories, new, **limits)
        new, state = finish(step, new, state, norm=norm, usable=gradient.usable, empty=given.empty)
        new = [u.astype(leaf.dtype) for u, leaf in zip(new, jax.tree.leaves(updates), strict=True)]
        kept = to_trees(memories, updates, step.spectrum.kept)
        kept = at_rest(kept, self.spread, like=state.memory)
        return jax.tree.structure(updates).unflatten(new), state._replace(memory=kept)

    def _step(self, updates: Any, extras: Any) -> Step:
        read = extras if self.from_signals else {}
        plans, signals, measure = self.plan(updates), read.get("signals"), read.get("measure")
        given = signals, measure, self.spread, extras.get("outer_products", {})
        return Step(self.spectrum(), plans, with_signals(plans, signals), *given)
