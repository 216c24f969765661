"""Products of data and a parameter that are no layers, and layers that look like such products."""

import jax
import jax.numpy as jnp
import pytest

import optalr
from tests.signals.reference import assert_moments, check_capture, no_layer, reference_moments
from tests.signals.test_models_bare import normal

UNFELT = "multiplied where no derivative of the loss arrives"
UNFED = "multiplied by what depends on no argument of the loss"
SINGLE = "multiplied by one vector, where other layers see a batch"


def squared(out, y):
    return jnp.mean(jnp.sum((out - y) ** 2, 1))


def reasons(loss, params, *args):
    return {path: leaf.reason for path, leaf in paths(optalr.coverage(loss, params, *args))}


def paths(report):
    return [(leaf.path.strip("[']"), leaf) for leaf in report.leaves]


def treatments(loss, params, *args):
    return {path: leaf.treatment for path, leaf in paths(optalr.coverage(loss, params, *args))}


# What is done with a side product ``s`` of ``x`` and a leaf, so that no derivative arrives at it.
STOPPERS = {
    "stop_gradient": lambda s, h: h + jax.lax.stop_gradient(jnp.mean(s)),
    "argmax": lambda s, h: h * (1.0 + jnp.argmax(s, 1)[:, None]),
    "comparison": lambda s, h: jnp.where(jnp.mean(s) > 0, h, 2 * h),
    "cast": lambda s, h: h + jnp.sum(s).astype(jnp.int32),
    "round": lambda s, h: h + jnp.round(jnp.mean(s)),
    "unused": lambda s, h: h,
    "in_jit": lambda s, h: jax.jit(lambda s, h: h + jax.lax.stop_gradient(jnp.mean(s)))(s, h),
    "in_scan": lambda s, h: jax.lax.scan(
        lambda c, row: (c + jax.lax.stop_gradient(jnp.mean(row)), None), h, s
    )[0],
    "in_cond": lambda s, h: jax.lax.cond(
        h[0, 0] > 0, lambda s, h: h + jnp.sign(jnp.mean(s)), lambda s, h: h, s, h
    ),
}
WRAPS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "jit_remat": lambda f: jax.jit(jax.checkpoint(f)),
    "cond": lambda f: lambda *args: jax.lax.cond(True, f, f, *args),
}


@pytest.mark.parametrize("stopper", STOPPERS)
@pytest.mark.parametrize("wrap", ["plain", "remat"])
def test_a_product_that_the_loss_does_not_feel(stopper, wrap):
    def body(params, x):
        h = jnp.tanh(x @ params["w"])
        return STOPPERS[stopper](x @ params["side"], h)

    def loss(params, x, y):
        return squared(WRAPS[wrap](body)(params, x), y)

    params = {"w": normal(0, 4, 4), "side": normal(1, 4, 3)}
    x, y = normal(2, 5, 4), normal(3, 5, 4)
    assert reasons(loss, params, x, y) == {"w": "", "side": UNFELT}
    _, _, extras = jax.jit(optalr.value_grad_and_extras(loss))(params, x, y)
    assert extras["signals"]["side"] is None
    assert extras["head"].rows.shape == (4, 4)


@pytest.mark.parametrize("wrap", WRAPS)
def test_auxiliary_outputs_are_not_felt_but_other_uses_of_their_kernel_are(wrap):
    def body(params, x):
        h = jnp.tanh(x @ params["w"])
        return h, (x @ params["probe"], 2 * h @ params["w"])

    def loss(params, x, y):
        h, aux = WRAPS[wrap](body)(params, x)
        return squared(h, y), aux

    params = {"w": normal(0, 4, 4), "probe": normal(1, 4, 3)}
    x, y = normal(2, 5, 4), normal(3, 5, 4)
    assert reasons(loss, params, x, y) == {"w": f"not in the moments: {UNFELT}", "probe": UNFELT}
    expected = reference_moments(
        lambda p, x, y, layer: squared(jnp.tanh(layer("w", x, x @ p["w"])), y),
        params,
        x,
        y,
        num_examples=5,
    )
    evaluate = jax.jit(optalr.value_grad_and_extras(loss, has_aux=True))
    _, _, extras = evaluate(params, x, y)
    assert_moments(extras["signals"]["w"], expected["w"])
    assert_moments(extras["head"], expected["w"])
    assert extras["signals"]["probe"] is None


def test_what_a_scan_carries_to_its_next_step_is_felt_and_what_it_stacks_for_aux_is_not():
    def loss(params, x, y):
        def step(carry, row):
            old, new = carry
            out = (row + old) @ params["probe"]
            return (new, jnp.tanh(row @ params["w"] + new)), out

        start = jnp.zeros((5, 4)), jnp.zeros((5, 4))
        (first, _), probes = jax.lax.scan(step, start, x)  # the loss feels it a step later
        return squared(first, y), probes

    params = {"w": normal(0, 4, 4), "probe": normal(1, 4, 3)}
    assert reasons(loss, params, normal(2, 3, 5, 4), normal(3, 5, 4)) == {"w": "", "probe": UNFELT}


def test_a_product_inside_a_custom_derivative():
    @jax.custom_jvp
    def layer_of(x, w):
        return jnp.tanh(x @ w)

    layer_of.defjvp(lambda p, t: (layer_of(*p), 0.5 * (t[0] @ p[1] + p[0] @ t[1])))

    def loss(params, x, y):
        felt = layer_of(x, params["w"])
        return squared(felt, y) + jax.lax.stop_gradient(jnp.sum(layer_of(x, params["side"])))

    params = {"w": normal(0, 4, 4), "side": normal(1, 4, 4)}
    assert reasons(loss, params, normal(2, 5, 4), normal(3, 5, 4)) == {"w": "", "side": UNFELT}


def test_a_straight_through_estimate_is_felt():
    def loss(params, x, y):
        s = x @ params["w"]
        return squared(s + jax.lax.stop_gradient(jnp.round(s) - s), y)

    assert reasons(loss, {"w": normal(0, 4, 3)}, normal(1, 5, 4), normal(2, 5, 3)) == {"w": ""}


def test_a_hand_tap_whose_result_is_thrown_away():
    def loss(params, x, y):
        s = jnp.sin(x @ jnp.sin(params["w"]))
        optalr.tap_layer(s, x, params["w"])
        return squared(s, y)

    (reason,) = reasons(loss, {"w": normal(0, 4, 3)}, normal(1, 5, 4), normal(2, 5, 3)).values()
    assert "the loss does not use what tap_layer returned" in reason


@pytest.mark.parametrize("table", ["closed_over", "made", "parameter"])
def test_tables_and_hypernetworks_see_no_examples(table):
    """Positions by a table of seven rows, beside five examples."""
    constant = normal(0, 7, 4)

    def loss(params, x, y, layer=no_layer):
        made = jnp.arange(28.0).reshape(7, 4)
        rows = {"closed_over": constant, "made": made, "parameter": jnp.sin(params["code"])}[table]
        positions = jnp.tanh(rows @ params["first"]) @ params["second"]
        h = jnp.tanh(layer("w", x, x @ params["w"]) + positions[None])
        return jnp.mean(jnp.sum((layer("head", h, h @ params["head"]) - y) ** 2, (1, 2)))

    params = {"first": normal(1, 4, 4), "second": normal(2, 4, 3), "w": normal(3, 4, 3)}
    params |= {"head": normal(4, 3, 2), "code": normal(5, 7, 4)}
    x, y = normal(6, 5, 7, 4), normal(7, 5, 7, 2)
    found = reasons(loss, params, x, y)
    assert (found["first"], found["second"], found["w"], found["head"]) == (UNFED, UNFED, "", "")
    expected = reference_moments(loss, params, x, y, num_examples=5)
    extras = check_capture(loss, params, (x, y), expected, {name: name for name in expected})
    assert extras["signals"]["first"] is None


def test_a_batch_that_the_loss_closes_over():
    params = {"w": normal(0, 4, 3), "head": normal(1, 3, 2)}
    x, y = normal(2, 5, 4), normal(3, 5, 2)

    def loss(params, x, y, key=None, shift=None):
        h = jnp.tanh(x @ params["w"])
        if key is not None:
            h = h * jax.random.bernoulli(key, 0.5, h.shape)
        if shift is not None:
            h = h - shift[None]
        return squared(h @ params["head"], y)

    both = {"w": "", "head": ""}
    assert reasons(lambda p: loss(p, x, y), params) == both
    assert reasons(lambda p: loss(p, jnp.ones((5, 4)), y), params) == both
    assert reasons(jax.jit(lambda p: loss(p, x, y)), params) == both
    # Beside arguments that are no batch: random keys, running averages, indices into the data.
    assert reasons(lambda p, key: loss(p, x, y, key), params, jax.random.key(0)) == both
    assert reasons(lambda p, m: loss(p, x, y, shift=m), params, normal(4, 3)) == both
    assert reasons(lambda p, i: loss(p, x[i], y[i]), params, jnp.arange(2)) == both
    assert reasons(lambda p, y: loss(p, x, y), params, y) == both
    # A batch of one as well.
    one = x[:1], y[:1]
    assert reasons(lambda p, key: loss(p, *one, key), params, jax.random.key(0)) == both


def test_fixed_points_beside_a_batch_are_further_uses_of_their_kernels():
    """A physics-informed net: boundary points are constants, the others come with each call."""
    boundary = normal(0, 3, 2)

    def net(params, x, layer):
        h = jnp.tanh(layer("w", x, x @ params["w"]))
        return layer("head", h, h @ params["head"])

    def loss(params, x, y, layer=no_layer):
        return squared(net(params, x, layer), y) + jnp.mean(net(params, boundary, layer) ** 2)

    params, x, y = {"w": normal(1, 2, 4), "head": normal(2, 4, 1)}, normal(3, 5, 2), normal(4, 5, 1)
    assert reasons(loss, params, x, y) == {"w": "", "head": ""}
    expected = reference_moments(loss, params, x, y, num_examples=5)
    check_capture(loss, params, (x, y), expected, {name: name for name in expected})


def test_one_vector_beside_a_batch():
    """A time of the process, embedded, is the same for all examples."""

    def loss(params, x, t, y):
        h = jnp.tanh(x @ params["w"] + jnp.sin(t[None] @ params["time"]))
        return squared(h @ params["head"], y)

    params = {"w": normal(0, 4, 3), "time": normal(1, 2, 3), "head": normal(2, 3, 2)}
    t = normal(3, 2)
    x, y = normal(4, 5, 4), normal(5, 5, 2)
    assert reasons(loss, params, x, t, y) == {"w": "", "time": SINGLE, "head": ""}
    assert reasons(loss, params, x[:1], t, y[:1]) == {"w": "", "time": "", "head": ""}


@pytest.mark.parametrize("examples", [5, 1])
def test_layouts_of_a_batch_keep_their_layers(examples):
    """Time first, batch and time in one axis, pooled, unrolled and mapped over: all are layers."""

    def loss(params, x, y):
        h = jnp.tanh(x @ params["time_first"])  # (time, examples, features)
        h = jnp.tanh(h.reshape(-1, 4) @ params["flat"]).reshape(h.shape)
        state = jnp.zeros((examples, 4))
        for row in h:
            state = jnp.tanh(row + state @ params["cell"])
        mapped = jax.lax.map(lambda one: jnp.tanh(one @ params["mapped"]), h.mean(0))
        pooled = state + mapped + h.max(0)
        return squared(pooled @ params["head"], y)

    names = ("time_first", "flat", "cell", "mapped")
    params = {name: normal(i, 4, 4) for i, name in enumerate(names)} | {"head": normal(9, 4, 2)}
    x, y = normal(10, 3, examples, 4), normal(11, examples, 2)
    assert set(reasons(loss, params, x, y).values()) == {""}


def test_a_graph_of_many_nodes_with_one_readout_keeps_its_head():
    def loss(params, graph, x, y):
        h = jnp.tanh(graph @ (x @ params["w"]))
        return squared(h.mean(0)[None] @ params["head"], y)

    params = {"w": normal(0, 4, 3), "head": normal(1, 3, 2)}
    args = normal(2, 7, 7), normal(3, 7, 4), normal(4, 1, 2)
    assert reasons(loss, params, *args) == {"w": "", "head": ""}


def test_true_fisher_looks_at_all_outputs_of_the_model():
    predict = lambda p, x: {"a": x @ p["a"], "b": x @ p["b"]}  # noqa: E731
    loss = optalr.composite_loss(predict, lambda out, x: jnp.mean(out["a"] ** 2))
    params, x = {"a": normal(0, 4, 3), "b": normal(1, 4, 2)}, normal(2, 5, 4)
    evaluate = optalr.value_grad_and_extras(loss, fisher="true", likelihood="gaussian")
    _, _, extras = jax.jit(evaluate)(params, x, key=jax.random.key(0))
    assert float(jnp.trace(extras["signals"]["b"].cols)) > 0
    assert reasons(loss, params, x) == {"a": "", "b": UNFELT}
