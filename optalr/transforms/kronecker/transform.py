"""Preconditioning by a power of the Kronecker-factored Fisher matrix, F^p with F ≈ B ⊗ A.

A layer's kernel W (m × n, s = Wᵀα) has the gradient G = E[α βᵀ]; its Fisher block is approximated
by B ⊗ A with A = E[α αᵀ] and B = E[β βᵀ] (Martens & Grosse 2015), so that

    F^p vec(G) = vec(A^p G B^p),

two small roots instead of one of order mn. p = −1/2 is the direction of Ida & Fujiwara (2020),
p = −1 the natural gradient, p = 0 the gradient.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_choice, check_count, check_interval, require_extra
from optalr.signals.moments import Coverage, is_moments
from optalr.states import count_up, settle, settle_like, update_when
from optalr.transforms.kronecker import direction as applying
from optalr.transforms.kronecker import factors
from optalr.transforms.kronecker import memory as store
from optalr.transforms.kronecker import refresh as refreshing
from optalr.transforms.kronecker.leaves import find_sources, leaves_with_path, plan_leaves
from optalr.transforms.kronecker.options import (
    Clock,
    KroneckerOptions,
    check_root_method,
    resolve_options,
)


class KroneckerState(NamedTuple):
    """Memory of ``scale_by_kronecker``. The trees have the structure of the parameters.

    For a kernel of matrix shape (m, n) factors and roots take 2(m² + n²) numbers, and nothing else
    of that order is kept, but for ``root_method="eigenbasis"`` (m² + n² more: the bases) and
    ``spectrum="measured"`` (mn more). A leaf that lacks an entry has ``optax.MaskedNode()`` there.
    """

    # every update
    count: jax.Array  # () int32, updates seen
    signal_age: jax.Array  # () int32, updates from the last measurement to the next update
    root_age: jax.Array  # () int32, updates since roots were last due (or since the start)
    wants_signals: jax.Array  # () bool, will the next update read signals?
    failures: jax.Array  # () int32, roots kept back, measurements and updates not finite
    update_norm: jax.Array  # () float32, global norm of the last update
    damping: jax.Array  # () float32, as applied in the last update
    graft: Any  # state of options.graft
    # every measurement
    measurements: jax.Array  # () int32, batches measured
    samples: jax.Array  # () float32, samples a dimension, of the factor that has the fewest
    weight: jax.Array  # () float32, sum of the moving average's weights (bias correction)
    row_factors: Any  # (*stack, m, m) float32 a kernel
    col_factors: Any  # (*stack, n, n) float32 a kernel
    # diagonal leaves: their shape; spectrum="measured": (*stack, m, n), relative to the product of
    # the largest row and column eigenvalue
    second_moments: Any
    # every refresh
    num_refreshes: jax.Array  # () int32
    root_residual: jax.Array  # () float32, the worst among the roots in use (0: none yet)
    row_roots: Any  # (*stack, m, m) a kernel: the root, or the eigenbasis
    col_roots: Any  # (*stack, n, n) a kernel
    row_eigenvalues: Any  # (*stack, m), where eigenbases are kept
    col_eigenvalues: Any  # (*stack, n)
    row_bases: Any  # (*stack, m, m), where roots are taken from bases that are refreshed
    col_bases: Any  # (*stack, n, n)


def scale_by_kronecker(
    power: Any = -0.5,
    *,
    decay: Any = 0.95,
    damping: Any = 1e-3,
    update_every: Any = 50,
    signals_every: Any = None,
    statistics: str = "signals",
    layout: Coverage | None = None,
    options: KroneckerOptions | Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale gradients by a power of the Kronecker-factored Fisher matrix.

    Choose it where the curvature of dense and convolution layers should set the direction: few
    epochs, badly scaled inputs, deep narrow layers. ``optalr.tso_alra`` is the complete optimizer.

    For a kernel with gradient G, from the moments A, B of ``value_grad_and_extras``,

        A ← decay·A + (1 − decay) E[ααᵀ],   B ← decay·B + (1 − decay) E[ββᵀ]   (bias-corrected),
        U = (A + λ_A)^p G (B + λ_B)^p,       λ_A = damping · tr(A)/m,  λ_B = damping · tr(B)/n.

    *What each leaf gets.* A captured kernel: the above. Its bias: ``(B + λ_B)^p b``, without use of
    a memory of its own (with no ``layout``, which tells beforehand, it has a diagonal all the same,
    should it stand alone). Another leaf of two or more axes (an embedding): the same with
    ``A = GGᵀ/‖G‖²`` and ``B = N GᵀG`` in place of the moments, in the memory it has anyway; with a
    ``layout`` the diagonal rule. Any other leaf: ``(v + λ)^p g`` with
    ``v ← decay·v + (1 − decay) N g²``. The factor N (examples a batch) is there because g is the
    gradient of a batch's mean: moments estimate the Fisher matrix of *one example*, and squares of
    batch gradients one N times smaller. A side longer than ``options.max_factor_size`` keeps only
    its factor's diagonal. A layer whose ``count`` is 0 in a batch keeps its factors as they are;
    but the bias correction has one weight for all, so that in a batch the counts must be zero for
    all layers or for none.

    *When.* Until every factor has seen ``options.warmup`` samples a dimension, in at least
    ``options.min_batches`` batches, gradients pass as they are (or ``options.graft`` acts), bounded
    as below: a root of a factor of too low a rank amplifies what was not seen yet by ``λ^p``. (A
    moving average never holds more than some 1/(1 − decay) batches, so twice that many are always
    enough.) Then roots are taken when they are as old as half the updates so far, and from there
    every ``update_every``.

    *How far.* The update of a leaf is shrunk until, times a learning rate of 1, it changes the
    outputs of its layer by at most ``options.max_update`` RMS, inputs taken as isotropic:
    ``‖U‖² tr(A)/m <= max_update² n``. (Leaves without a layer: ``‖U‖² <= max_update² max(m, n)``.)

    *What can go wrong.* A root that misses its residual, for either side, leaves the last good pair
    in place; moments that are not finite are not folded in; an update that is not finite is zero.
    Each is counted in ``failures``.

    Args:
      power: p, in [−1, 0]. May be a schedule under ``inject_hyperparams``; roots in use keep the
        power they were taken with.
      decay: of the moving averages, a measurement, in [0, 1).
      damping: λ, >= 0, relative to the mean eigenvalue (of each factor; of their product where
        ``options.spectrum`` is not ``"factored"``) unless ``options.damping_form`` says otherwise.
      update_every: updates between two roots, >= 1.
      signals_every: updates between two measurements, >= 1; None for a tenth of ``update_every``.
        Shortly after the start, when roots are taken more often, measurements are too.
      statistics: ``"signals"``, or ``"gradient"`` for Shampoo's ``GGᵀ`` and ``GᵀG``, each to the
        power p/2, which needs no capture.
      layout: what ``optalr.coverage(loss_fn, params, *args)`` returned; needed where a leaf's
        matrix view is not "all axes but the last by the last".
      options: a ``KroneckerOptions``, or a mapping of its fields.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` that reads the extra ``signals``.

    Raises:
      ValueError: an argument is out of range, or ``options.root_method`` cannot take roots of this
        power; at ``init``, the layout is of other parameters; at
        ``update``, signals do not fit the state, or lack a leaf that ``layout`` says is captured.
      TypeError: ``update`` got no ``signals``.

    Cost: an update two products, ``2mn(m + n)`` flops a kernel; a measurement ``m² + n²``
    additions; a refresh some ``20(m³ + n³)`` flops by eigendecomposition, equal sizes batched.
    Memory ``2(m² + n²)`` numbers a kernel, ``3(m² + n²)`` with ``root_method="eigenbasis"``;
    ``optalr.coverage(..., options=options)`` prints the bytes.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optalr.transforms.kronecker.transform import KroneckerOptions, scale_by_kronecker
      >>> options = KroneckerOptions(warmup=0, min_batches=1, max_update=None)
      >>> tx = scale_by_kronecker(damping=0.0, statistics="gradient", options=options)
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
    holds for its transpose), correct the moving averages for their start, and add the warm-up, the
    relative damping and the bound. ``statistics="gradient"``: Vineet Gupta, Tomer Koren and Yoram
    Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", 2018.
    """
    options = resolve_options(options)
    check_interval("power", power, -1, 0)
    check_interval("decay", decay, 0, 1, open_high=True)
    check_interval("damping", damping, 0)
    check_count("update_every", update_every)
    if signals_every is not None:
        check_count("signals_every", signals_every)
    check_choice("statistics", statistics, ("signals", "gradient"))
    check_root_method(options, power, statistics)
    if options.joint_bias and layout is None:
        raise ValueError(
            "joint_bias=True needs layout=optalr.coverage(loss_fn, params, *args), which tells "
            "which bias belongs to which kernel."
        )
    clock = Clock(update_every, signals_every, decay, options)
    from_signals = statistics == "signals"

    def plan(tree):
        own = "shared" if from_signals else "own"
        return plan_leaves(tree, layout, options, "joint" if options.joint_bias else own)

    def init_fn(params):
        dtypes = [_working_dtype(leaf) for _, leaf in leaves_with_path(params)]
        memory = store.init_memory(plan(params), dtypes, options)
        return KroneckerState(
            count=jnp.zeros([], jnp.int32),
            signal_age=jnp.ones([], jnp.int32),
            root_age=jnp.zeros([], jnp.int32),
            wants_signals=jnp.asarray(from_signals),
            failures=jnp.zeros([], jnp.int32),
            update_norm=jnp.zeros([], jnp.float32),
            damping=jnp.asarray(damping, jnp.float32),
            graft=settle(options.graft.init(_widen(params)))
            if options.graft
            else optax.EmptyState(),
            measurements=jnp.zeros([], jnp.int32),
            samples=jnp.zeros([], jnp.float32),
            weight=jnp.zeros([], jnp.float32),
            num_refreshes=jnp.zeros([], jnp.int32),
            root_residual=jnp.zeros([], jnp.float32),
            **_to_trees(memory, jax.tree.structure(params)),
        )

    def update_fn(updates, state, params=None, **extras):
        signals = measure = None
        if from_signals:
            signals = require_extra(extras, "signals", "scale_by_kronecker", _SIGNALS_REMEDY)
            measure = extras.get("measure")
        plans = plan(updates)
        setup = store.Setup(
            plans=plans,
            sources=find_sources(plans, signals),
            statistics=statistics,
            spectrum=options.spectrum,
            damping_form=options.damping_form,
            root_method=options.root_method,
            power=power,
            decay=decay,
            damping=jnp.asarray(damping, jnp.float32),
        )
        structure = jax.tree.structure(updates)
        grads = [leaf.astype(_working_dtype(leaf)) for leaf in jax.tree.leaves(updates)]
        memory = _from_trees(state, structure)

        memory, state = _measure(setup, clock, memory, state, grads, (signals, measure))
        memory, state = _refresh(setup, clock, memory, state)
        new = applying.apply(setup, memory, grads, state.weight, state.num_refreshes > 0)

        if options.graft is not None:
            new, state = _graft(options.graft, new, updates, state, params, extras)
        if options.max_update is not None:
            new = applying.bound(setup, memory, state.weight, new, options.max_update)
        new, state = _finish(new, state, clock, from_signals)
        new = [u.astype(leaf.dtype) for u, leaf in zip(new, jax.tree.leaves(updates), strict=True)]
        state = state._replace(damping=setup.damping, **_to_trees(memory, structure))
        return structure.unflatten(new), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


_SIGNALS_REMEDY = (
    "Replace jax.value_and_grad by evaluate = optalr.value_grad_and_extras(loss_fn), call value, "
    "grads, extras = evaluate(params, ...) and pass tx.update(grads, opt_state, params, **extras); "
    "or pass statistics='gradient', which needs no signals."
)


def _measure(setup, clock, memory, state, grads, captured):
    """Fold this batch into the factors, where it is due and was captured."""
    signals, _ = captured
    nodes = [node for node in jax.tree.leaves(signals, is_leaf=is_moments) if is_moments(node)]
    num_examples = jnp.float32(1)
    if nodes:
        num_examples = jnp.max(jnp.stack([jnp.asarray(n.count, jnp.float32) for n in nodes]))
    due = clock.measures(state.signal_age, state.count) & (num_examples > 0)
    names = ("row_factors", "col_factors", "second_moments")

    def fold_in(carry, inputs):
        grads, (signals, measure), num_examples, started = inputs
        filled = memory._replace(**carry[0])
        sources = find_sources(setup.plans, signals if measure is None else measure())
        current = dataclasses.replace(setup, sources=sources)
        new, good = store.measure(current, filled, grads, num_examples, started)
        return {name: getattr(new, name) for name in names}, good

    kept = {name: getattr(memory, name) for name in names}
    inputs = grads, captured, num_examples, state.num_refreshes > 0
    kept, good = update_when(due, fold_in, (kept, jnp.bool_(True)), inputs)
    memory = memory._replace(**kept)
    measured = due & good
    decay = jnp.asarray(setup.decay, jnp.float32)
    return memory, state._replace(
        signal_age=jnp.where(due, 1, count_up(state.signal_age)),
        failures=state.failures + (~good).astype(jnp.int32),
        measurements=state.measurements + measured.astype(jnp.int32),
        samples=state.samples + jnp.where(measured, store.evidence(setup), 0),
        weight=jnp.where(measured, decay * state.weight + (1 - decay), state.weight),
    )


def _refresh(setup, clock, memory, state):
    """Take new roots, where they are due."""
    state = state._replace(root_age=count_up(state.root_age))
    due = clock.refreshes(state)
    names = ("row_roots", "col_roots", "row_eigenvalues", "col_eigenvalues", "second_moments")
    names += ("row_bases", "col_bases")

    def take(carry, inputs):
        rows, cols, weight, first = inputs
        filled = memory._replace(row_factors=rows, col_factors=cols, **carry[0])
        new, residual, failed = refreshing.refresh(setup, filled, weight, first, carry[1])
        return {name: getattr(new, name) for name in names}, residual, failed

    kept = {name: getattr(memory, name) for name in names}
    first = state.num_refreshes == 0
    kept, residual, failed = update_when(
        due,
        take,
        (kept, state.root_residual, jnp.int32(0)),
        (memory.row_factors, memory.col_factors, state.weight, first),
    )
    memory = memory._replace(**kept)
    return memory, state._replace(
        root_age=jnp.where(due, 0, state.root_age),
        root_residual=residual,
        failures=state.failures + failed,
        num_refreshes=state.num_refreshes + due.astype(jnp.int32),
    )


def _graft(transformation, new, updates, state, params, extras):
    """Give each leaf the norm of another method's update; before the first roots, that update."""
    graft = optax.with_extra_args_support(transformation)
    others, after = graft.update(_widen(updates), state.graft, _widen(params), **extras)
    after = settle_like(after, state.graft)
    # Moments of the other method must not be poisoned either.
    finite = store.all_finite(updates)
    after = jax.tree.map(lambda x, old: jnp.where(finite, x, old), after, state.graft)
    started = state.num_refreshes > 0
    others = [x.astype(u.dtype) for x, u in zip(jax.tree.leaves(others), new, strict=True)]
    grafted = applying.graft(new, others)
    new = [jnp.where(started, u, x) for u, x in zip(grafted, others, strict=True)]
    return new, state._replace(graft=after)


def _finish(new, state, clock, from_signals):
    """Replace an update that is not finite by zero, and say what the next one wants."""
    norms = [factors.norm(u).astype(jnp.float32) for u in new]
    norm = factors.norm(jnp.stack(norms)) if norms else jnp.float32(0)
    finite = store.all_finite(new)
    new = [jnp.where(finite, u, 0) for u in new]
    count = count_up(state.count)
    return new, state._replace(
        count=count,
        failures=state.failures + (~finite).astype(jnp.int32),
        update_norm=jnp.where(finite, norm, 0),
        wants_signals=from_signals & clock.measures(state.signal_age, count),
    )


def _working_dtype(leaf: Any) -> Any:
    """Return float32, or float64 where the leaf is."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _widen(tree: Any) -> Any:
    """Return floating leaves in their working dtype: in bfloat16 a decay of 0.999 is 1."""

    def widen(leaf: Any) -> Any:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(_working_dtype(leaf)) if floating else leaf

    return jax.tree.map(widen, tree)


def _to_trees(memory: store.Memory, structure: Any) -> dict[str, Any]:
    """Give each list of ``memory`` the structure of the parameters."""
    return {
        name: structure.unflatten([optax.MaskedNode() if x is None else x for x in leaves])
        for name, leaves in memory._asdict().items()
    }


def _from_trees(state: KroneckerState, structure: Any) -> store.Memory:
    """Undo ``_to_trees``."""
    lists = [structure.flatten_up_to(getattr(state, name)) for name in store.Memory._fields]
    return store.Memory(
        *([None if isinstance(x, optax.MaskedNode) else x for x in leaves] for leaves in lists)
    )
