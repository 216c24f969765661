"""The plain lines "By hand" of each method's page do what the library does, step by step."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = (
    "exponentially_decaying_flows", "learned_rate", "lecture", "lipschitz_rate", "untuned",
)  # fmt: skip
# The library keeps rates, decays and damping in float32 whatever the dtype, so that in float64 the
# two differ by some of its roundings (6e-8 each).
FEW_ROUNDINGS = 1e-6


def code_of(page):
    section = (DOCS / f"{page}.md").read_text().partition("\n## By hand\n")[2]
    (code,) = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    return code


def run(code):
    """Return the names that code leaves behind, which are its functions' globals."""
    names = {}
    exec(compile(code, "by hand", "exec"), names)
    return names


def defined_on(page):
    """Return what a page's code defines, before it trains."""
    return run(code_of(page).partition("\nfor t in")[0])


@pytest.fixture(autouse=True, scope="module")
def _broadcasting_as_users_know_it():
    """The pages' code broadcasts as plain NumPy code does; the suite's setting forbids that."""
    with jax.numpy_rank_promotion("allow"):
        yield


def in_double(tree):
    return jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a), jnp.float64) if a.dtype == jnp.float32 else a, tree
    )


def check(actual, expected, tolerance=FEW_ROUNDINGS):
    """Compare two updates, each relative to its length."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert float(jnp.linalg.norm(a - e) / jnp.linalg.norm(e)) < tolerance


def difference(new, old):
    return jax.tree.map(jnp.subtract, new, old)


@pytest.mark.parametrize("page", PAGES)
def test_the_lines_are_at_most_thirty(page):
    lines = [line for line in code_of(page).splitlines() if line.strip()]
    assert 10 <= len(lines) <= 30


@pytest.mark.parametrize("page", PAGES)
def test_the_loss_printed_is_the_one_stated(page, capsys):
    run(code_of(page))
    printed = [float(number) for number in capsys.readouterr().out.split()]
    section = (DOCS / f"{page}.md").read_text().partition("\n## By hand\n")[2]
    stated = re.findall(
        r"It prints a loss of (\d[\de.-]*\d)(?:, and a rate of ([\d.]+\d))?", section
    )
    numbers = [float(number) for found in stated for number in found if number]
    assert printed == pytest.approx(numbers, rel=0.03)


@pytest.mark.parametrize("safeguards", ["off", "on"])
def test_the_learned_rate(safeguards, x64):
    page = defined_on("learned_rate")
    x, y = in_double((page["x"], page["y"]))
    tx = optalr.learned_rate_sgd(0.01, safeguards=safeguards)
    weights, rate = jnp.zeros((8, 3), jnp.float64), jnp.float64(0.01)
    evaluate, state, step = (
        optalr.value_grad_and_extras(page["loss_fn"]),
        tx.init(weights),
        page["step"],
    )

    @jax.jit
    def both(weights, rate, state):
        _, grads, extras = evaluate(weights, x, y)
        updates, state = tx.update(grads, state, weights, **extras)
        return updates, state, step(weights, rate, x, y)

    for _ in range(8):
        updates, state, (new, rate) = both(weights, rate, state)
        check(updates, new - weights, tolerance=1e-5)  # Newton's rule amplifies the rate's rounding
        weights = new
    assert optalr.metrics(state)["learning_rate"] > 0.1


def test_sgd_at_the_first_rate_is_behind_the_learned_one():
    page = defined_on("learned_rate")
    weights = jnp.zeros((8, 3))
    descend = jax.jit(jax.grad(page["loss_fn"]))
    for _ in range(20):
        weights = weights - 0.01 * descend(weights, page["x"], page["y"])
    loss = float(page["loss_fn"](weights, page["x"], page["y"]))
    assert f"SGD at 0.01 is at {loss:.3f}" in (DOCS / "learned_rate.md").read_text()


@pytest.mark.parametrize(("size", "acts"), [(0.3, False), (0.03, True)])
def test_the_lipschitz_rate(size, acts, x64):
    page = defined_on("lipschitz_rate")
    x, y = in_double((page["x"], page["y"]))
    y = jnp.roll(y, 1) if acts else y  # labels that nothing explains
    tx = optalr.lipschitz_sgd("softmax_cross_entropy", num_classes=3, weight_decay=page["decay"])
    keys = page["keys"]
    weights = [jax.random.normal(keys[2], (8, 16)), jax.random.normal(keys[3], (16, 3))]
    weights = in_double([size * w.astype(jnp.float64) for w in weights])
    evaluate, state = jax.jit(optalr.value_grad_and_extras(page["loss_fn"])), tx.init(weights)
    first, risen = None, False
    for _ in range(6):
        _, grads, extras = evaluate(weights, x, y)
        updates, state = tx.update(grads, state, weights, **extras)
        new, first, risen, rate = page["step"](weights, first, risen, x, y)
        check(updates, difference(new, weights))
        np.testing.assert_allclose(optalr.metrics(state)["learning_rate"], rate, rtol=FEW_ROUNDINGS)
        weights = new
    assert bool(optalr.metrics(state)["guarded_rates"] > 0) == acts == bool(risen)


@pytest.mark.parametrize("recipe", [optalr.edf, optalr.paper.edf], ids=["ours", "to_the_letter"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_flow(recipe, k, x64):
    page = defined_on("exponentially_decaying_flows")
    page.update(k=k, rate=0.5)
    x, y = in_double((page["x"], page["y"]))
    weights = 0.3 * jax.random.normal(page["keys"][2], (176,), jnp.float64)
    loss = optalr.composite_loss(
        lambda w: page["predict"](w, x), lambda outputs: page["output_loss"](outputs, y)
    )
    evaluate, tx, step = optalr.value_grad_and_extras(loss), recipe(0.5, num_steps=k), page["step"]

    @jax.jit
    def both(weights, state):
        _, grads, extras = evaluate(weights)
        updates, state = tx.update(grads, state, weights, **extras)
        return updates, state, step(weights, x, y)

    state = tx.init(weights)
    for _ in range(4):
        updates, state, new = both(weights, state)
        check(updates, new - weights)
        weights = new


def gradients(num_steps):
    """Return gradients of a quadratic that differ in size, sign and from step to step."""
    noise = jax.random.normal(jax.random.key(3), (num_steps, 5), jnp.float64)
    return [jnp.geomspace(0.1, 1.0, 5) + 0.5 * row for row in noise]


def test_local_gains(x64):
    step = defined_on("lecture")["local_gains_step"]
    tx = optalr.classical("sgd", 0.1, gains={"beta": 0.5})
    weights, gains, previous = jnp.zeros(5, jnp.float64), jnp.ones(5), jnp.zeros(5)
    state = tx.init(weights)
    for gradient in gradients(12):
        updates, state = tx.update(gradient, state, weights)
        new, gains, previous = step(weights, gains, previous, gradient, beta=0.5)
        check(updates, new - weights)
        weights = new
    assert float(gains.max()) > 2
    assert float(gains.min()) < 1


def test_swats(x64):
    loose = 0.02  # so wide that it switches on the way
    step, tx = defined_on("lecture")["swats_step"], optalr.swats(0.1, tolerance=loose)
    weights = jnp.zeros(5, jnp.float64)
    memory, state = (jnp.zeros(5), jnp.zeros(5), 0.0, None), tx.init(weights)
    for k, gradient in enumerate(gradients(12), start=1):
        updates, state = tx.update(gradient, state, weights)
        new, memory = step(k, weights, memory, gradient, rate=0.1, tolerance=loose)
        check(updates, new - weights)
        weights = new
    assert optalr.metrics(state)["phase"] == 1
    assert memory[-1] is not None


def test_untuned_with_the_direction_of_the_thirty_lines(x64):
    page = defined_on("untuned")
    text = (DOCS / "thirty_lines.md").read_text()
    thirty = run(re.findall(r"```python\n(.*?)\nweights, averages =", text, re.DOTALL)[0])
    thirty.update(rate=1.0, switch_at=page["total_steps"])
    x, y, weights = in_double((thirty["x"], thirty["y"], thirty["start"]))
    x, y, x_held, y_held = x[:48], y[:48], x[48:], y[48:]

    def loss_fn(weights, x, y):
        logits = jnp.tanh(x @ weights[0]) @ weights[1]
        return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(logits), axis=1))

    bare = {"warmup": 0, "min_batches": 1, "max_update": None}
    tx = optalr.untuned(page["total_steps"], damping=1e-3, update_every=1, options=bare)
    held_out = jax.tree_util.Partial(loss_fn, x=x_held, y=y_held)
    evaluate, state = optalr.value_grad_and_extras(loss_fn), tx.init(weights)

    @jax.jit
    def update(weights, state):
        _, grads, extras = evaluate(weights, x, y)
        updates, state = tx.update(grads, state, weights, **extras, validation_value_fn=held_out)
        return updates, state, jax.grad(held_out)(weights)

    averages, memory = [(0.0, 0.0)] * 2, ([0.0, 0.0], 0.0, 0.0, 0.0)
    for t in range(6):
        updates, state, held_out_gradients = update(weights, state)
        _, stepped, averages = thirty["step"](t, weights, averages, x, y)
        directions = difference(weights, stepped)
        new, memory = page["step"](t, weights, memory, directions, held_out_gradients)
        check(updates, difference(new, weights))
        weights = new
    assert abs(float(memory[1])) > 0.1  # the decay has been learned
