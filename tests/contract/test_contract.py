"""The contract that every transformation keeps, run over one registry."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import optalr
from tests.contract import problem
from tests.contract.registry import METHODS

NUM_STEPS = 4

every_method = pytest.mark.parametrize("method", METHODS, ids=repr)
needing = pytest.mark.parametrize(
    ("method", "extra"),
    [(method, extra) for method in METHODS for extra in method.needs],
    ids=lambda value: str(value),
)
injectable = pytest.mark.parametrize(
    ("method", "argument"),
    [(m, argument) for m in METHODS for argument in inspect.signature(m.make).parameters],
    ids=lambda value: str(value),
)
guarding = pytest.mark.parametrize("method", [m for m in METHODS if m.guards], ids=repr)


def take_step(tx, params, state, batch):
    _, grads, extras = problem.evaluate(params, batch, signals=optalr.wants_signals(state))
    updates, state = tx.update(grads, state, params, **extras)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    return optax.apply_updates(params, updates), state


def step_of(tx):
    def step(params, state, batch):
        return take_step(tx, params, state, batch)

    return step


@functools.cache
def compiled(method):
    """One compiled step a method, shared by the tests that need no other."""
    tx = method.make()
    return tx, jax.jit(counted(step_of(tx), TRACES.setdefault(method.name, [])))


TRACES = {}


def counted(step, traces):
    def counting(*args):
        traces.append(1)
        return step(*args)

    return counting


def run(step, params, state, batch, num_steps=NUM_STEPS):
    for _ in range(num_steps):
        params, state = step(params, state, batch)
    return params, state


def start(tx, dtype=jnp.float32):
    params = problem.make_params(dtype)
    return params, tx.init(params), problem.make_batch(dtype)


def assert_close(actual, expected, rtol):
    def compare(path, x, y):
        # The residual of a root is rounding itself.
        is_rounding = jax.tree_util.keystr(path).endswith(".root_residual")
        if jnp.issubdtype(x.dtype, jnp.floating) and not is_rounding:
            scale = float(np.max(np.abs(np.asarray(y, np.float64)), initial=0.0))
            np.testing.assert_allclose(
                np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=rtol, atol=rtol * scale
            )

    jax.tree_util.tree_map_with_path(compare, actual, expected)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_same_types(new, old):
    chex.assert_trees_all_equal_shapes_and_dtypes(new, old)
    for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert isinstance(x, jax.Array)
        assert x.weak_type == y.weak_type


def assert_finite(tree):
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


# 1. Shape of the thing, and one compilation a run.


@every_method
def test_state_is_final_at_init_and_one_compilation_serves_a_run(method):
    tx, step = compiled(method)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    params, state, batch = start(tx)
    assert isinstance(state, tuple)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    before = len(TRACES[method.name])
    _, new_state = run(step, params, state, batch)
    assert len(TRACES[method.name]) <= before + 1
    assert_same_types(new_state, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params), state)


@every_method
def test_jit_changes_nothing(method):
    tx, step = compiled(method)
    params, state, batch = start(tx)
    _, grads, extras = jax.jit(problem.evaluate)(params, batch)
    with jax.disable_jit():
        updates, new_state = tx.update(grads, state, params, **extras)
        expected = optax.apply_updates(params, updates), new_state
    assert_close(step(params, state, batch), expected, method.rtol)


@every_method
def test_per_parameter_state_is_recognized(method):
    tx, _ = compiled(method)
    _, state, _ = start(tx)
    assert_equal(optax.tree.map_params(tx, lambda leaf: leaf, state), state)


# 2. Extra arguments.


@needing
def test_a_missing_extra_is_named_with_the_call_that_supplies_it(method, extra):
    tx, _ = compiled(method)
    params, state, batch = start(tx)

    def update_without():
        _, grads, extras = problem.evaluate(params, batch)
        del extras[extra]
        return tx.update(grads, state, params, **extras)

    with pytest.raises(TypeError, match=rf"{extra}.*(value_grad_and_extras|{extra}=)"):
        jax.eval_shape(update_without)


@every_method
def test_unknown_extras_are_ignored(method):
    tx, _ = compiled(method)
    params, state, batch = start(tx)

    def update_with_more():
        _, grads, extras = problem.evaluate(params, batch)
        return tx.update(grads, state, params, **extras, an_extra_nobody_knows=jnp.ones(3))

    updates, _ = jax.eval_shape(update_with_more)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


# 3. Composition.


def kernels(params, yes, no):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: yes if path[-1].key == "kernel" else no, params
    )


def wrapped_in_everything(tx):
    """All of optax's wrappers at once, since compiling is dear; ``partition`` is made of masks."""
    careful = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), tx), 3)
    parts = optax.partition(
        {"method": careful, "rest": optax.sgd(0.1)}, lambda p: kernels(p, "method", "rest")
    )
    return optax.MultiSteps(parts, 2)


@every_method
def test_composes(method):
    tx = wrapped_in_everything(compiled(method)[0])
    params, state, batch = start(tx)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(step_of(tx), n=1))
    new_params, new_state = run(step, params, state, batch)
    assert_same_types(new_state, state)
    assert_finite(new_params)
    assert np.any(new_params["hidden"]["kernel"] != params["hidden"]["kernel"])
    assert set(method.reports) <= set(optalr.metrics(new_state))


@every_method
def test_injected_scanned_donated_and_in_an_ensemble_it_does_the_same(method):
    tx, step = compiled(method)
    injected = optax.inject_hyperparams(method.make, hyperparam_dtype=jnp.float32)()
    batch = problem.make_batch()
    members = [problem.make_params(seed=seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    states = jax.vmap(injected.init)(stacked)
    _, shape, _ = start(injected)
    assert_same_types(jax.tree.map(lambda x: x[0], states), shape)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def scanned(params, states):
        step_all = jax.vmap(step_of(injected), in_axes=(0, 0, None))
        return jax.lax.scan(
            lambda carry, _: (step_all(*carry, batch), None), (params, states), length=NUM_STEPS
        )[0]

    new_params, new_states = scanned(stacked, states)
    together = new_params, new_states.inner_state
    for i, member in enumerate(members):
        alone = run(step, member, tx.init(member), batch)
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, method.rtol)


@every_method
@pytest.mark.parametrize("injected", [False, True])
def test_a_fresh_state_may_be_donated(method, injected):
    inject = optax.inject_hyperparams(method.make, hyperparam_dtype=jnp.float32)
    state = (inject if injected else method.make)().init(problem.make_params())
    expected = jax.tree.map(np.array, state)
    donated = jax.jit(lambda state: state, donate_argnums=0)(state)  # refused if buffers are shared
    assert_equal(donated, expected)


# 4. Number formats.


@every_method
def test_half_precision_parameters(method):
    tx, step = compiled(method)
    _, _, batch = start(tx)
    params = problem.make_params(jnp.bfloat16)  # one layer in each of the two formats
    params["output"] = problem.make_params(jnp.float16)["output"]
    batch = (batch[0].astype(jnp.bfloat16), batch[1])
    state = tx.init(params)
    new_params, new_state = run(step, params, state, batch, 3)
    chex.assert_trees_all_equal_dtypes(new_params, params)
    assert_finite(new_params)
    assert_same_types(new_state, state)
    for leaf in jax.tree.leaves(new_state):
        if leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.floating):
            assert leaf.dtype == jnp.float32


@every_method
def test_double_precision_parameters(method):
    with jax.enable_x64(True):
        tx = method.make()
        params, state, batch = start(tx, jnp.float64)
        step = jax.jit(step_of(tx))
        new_params, new_state = run(step, params, state, batch, 3)
        assert {x.dtype for x in jax.tree.leaves(new_params)} == {jnp.dtype(jnp.float64)}
        assert_finite(new_params)
        assert_same_types(new_state, state)


@every_method
def test_narrow_parameters_where_float64_is_on(method):
    with jax.enable_x64(True):
        tx = method.make()
        params, state, batch = start(tx, jnp.float32)
        new_params, new_state = run(jax.jit(step_of(tx)), params, state, batch, 3)
        assert {x.dtype for x in jax.tree.leaves(new_params)} == {jnp.dtype(jnp.float32)}
        assert_finite(new_params)
        assert_same_types(new_state, state)


@every_method
def test_counters_at_their_end_stay_there(method):
    tx, step = compiled(method)
    params, state, batch = start(tx)
    _, state = step(params, state, batch)
    end = jnp.iinfo(jnp.int32).max
    is_counter = jax.tree.map(lambda x: x.dtype == jnp.int32 and x.ndim == 0, state)
    state = jax.tree.map(
        lambda x, counts: jnp.full_like(x, end) if counts else x, state, is_counter
    )
    spoiled = (batch[0].at[0, 0].set(jnp.nan), batch[1])
    for each in (batch, spoiled) if method.guards else (batch,):
        _, state = step(params, state, each)
        counters = [
            int(x)
            for x, counts in zip(jax.tree.leaves(state), jax.tree.leaves(is_counter), strict=True)
            if counts
        ]
        assert min(counters, default=0) >= 0, counters


# 5. Refusing bad arguments; surviving bad numbers.


@injectable
def test_bad_arguments_are_refused_by_name(method, argument):
    with pytest.raises(ValueError, match=argument):
        method.make(**{argument: float("nan")})


@guarding
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_is_counted_and_does_no_harm(method, bad):
    tx, step = compiled(method)
    params, state, batch = start(tx)
    params, state = run(step, params, state, batch, 2)
    before = int(optalr.metrics(state)["failures"])
    spoiled = (batch[0].at[0, 0].set(bad), batch[1])
    new_params, state = step(params, state, spoiled)
    assert_finite(new_params)
    assert int(optalr.metrics(state)["failures"]) > before
    new_params, state = run(step, new_params, state, batch, 2)
    assert_finite(new_params)
    assert np.any(new_params["hidden"]["kernel"] != params["hidden"]["kernel"])


# 6. Saving and resuming.


@every_method
def test_a_restored_run_goes_on_bit_for_bit(method, tmp_path):
    tx, step = compiled(method)
    params, state, batch = start(tx)
    saved = run(step, params, state, batch, 3)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "run", jax.eval_shape(lambda: saved))
    assert_equal(restored, saved)
    # Orbax pins arrays to their device, for which the step would be compiled again.
    restored = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), restored)
    assert_equal(run(step, *restored, batch), run(step, *saved, batch))


# 7. Reports.


@every_method
def test_reports_are_scalars_in_the_state(method):
    tx, step = compiled(method)
    params, state, batch = start(tx)
    _, state = step(params, state, batch)
    report = optalr.metrics(optax.chain(tx).init(params))
    assert set(method.reports) <= set(report)
    report = jax.jit(optalr.metrics)(state)
    assert set(method.reports) <= set(report)
    assert all(jnp.shape(value) == () for value in report.values())
    wish = optalr.wants_signals(state)
    assert jnp.shape(wish) == ()
    assert wish.dtype == jnp.bool_
