"""Count what each kind of compiled step is made of, in multiples of Adam's step.

    python benchmarks/operations.py
    python benchmarks/operations.py --platform cuda     # what a GPU would be given
    python benchmarks/operations.py --bytes     # what a plain step moves and does; this compiles

Operations are those of the lowered program (StableHLO), nested functions included. So the counts
are the same on every machine with this jax, and nothing is compiled or run. Control flow is counted
apart: on an accelerator each piece of it may be a question whose answer the host waits for.
"""

import argparse
import collections
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from signals import gpt_shapes, make

import optalr

OPERATION = re.compile(r"\b(?:stablehlo|chlo)\.(\w+)")
KINDS = ("plain", "measuring", "refreshing", "second", "traced")


def mlp(sizes: tuple[int, ...] = (784, 512, 512, 10)) -> tuple[Callable[..., Any], Any, Any]:
    """Return the loss of an MLP, its parameters and a batch."""

    def loss_fn(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        hidden = inputs
        for i, (kernel, bias) in enumerate(params):
            hidden = hidden @ kernel + bias
            hidden = jax.nn.relu(hidden) if i < len(params) - 1 else hidden
        return optax.softmax_cross_entropy_with_integer_labels(hidden, labels).mean()

    pairs = itertools.pairwise(sizes)
    params = [(jnp.zeros((m, n)), jnp.zeros(n)) for m, n in pairs]
    return loss_fn, params, (jnp.zeros((128, sizes[0])), jnp.zeros(128, jnp.int32))


def vgg(widths: tuple[int, ...] = (64, 128, 256, 512)) -> tuple[Callable[..., Any], Any, Any]:
    """Return the loss of a net with two convolutions a width, its parameters and a batch."""

    def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        hidden = images
        for i, (kernel, bias) in enumerate(params["convolutions"]):
            numbers = ("NHWC", "HWIO", "NHWC")
            hidden = jax.lax.conv_general_dilated(
                hidden, kernel, (1, 1), "SAME", dimension_numbers=numbers
            )
            hidden = jax.nn.relu(hidden + bias)
            if i % 2:
                window = (1, 2, 2, 1)
                hidden = jax.lax.reduce_window(
                    hidden, -jnp.inf, jax.lax.max, window, window, "VALID"
                )
        kernel, bias = params["head"]
        logits = hidden.reshape(hidden.shape[0], -1) @ kernel + bias
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    channels, convolutions = 3, []
    for width in widths:
        for _ in range(2):
            convolutions.append((jnp.zeros((3, 3, channels, width)), jnp.zeros(width)))
            channels = width
    head = (jnp.zeros((4 * channels, 10)), jnp.zeros(10))
    batch = jnp.zeros((128, 32, 32, 3)), jnp.zeros(128, jnp.int32)
    return loss_fn, {"convolutions": convolutions, "head": head}, batch


NETS = {
    "MLP": mlp,
    "VGG": vgg,
    "ResNet": functools.partial(make, "resnet"),  # of eight layers
    "GPT": gpt_shapes,
}


def operations(step: Any, arguments: tuple[Any, ...], **which: Any) -> collections.Counter:
    """Return how many operations of each name one kind of step has; see ``TrainStep.lower``."""
    text = step.lower(*arguments, **which).as_text()
    return collections.Counter(OPERATION.findall(text))


def rows(names: Sequence[str], platform: str) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table, of programs for one kind of device."""
    for net in names:
        loss_fn, params, batch = NETS[net]()
        has_aux = net in ("ResNet", "GPT")
        layout = optalr.coverage(loss_fn, params, *batch)
        methods = {
            "tso_alra": optalr.tso_alra(1e-2, switch_at=1000, layout=layout),
            "untuned": optalr.untuned(1000, layout=layout),
        }
        adam = optax.adam(1e-3)
        step = optalr.train_step(loss_fn, adam, has_aux=has_aux)
        state = jax.eval_shape(adam.init, params)
        where = {"platforms": (platform,)}
        least = operations(step, (params, state, *batch), kind="plain", **where).total()
        yield net, "Adam", "", str(least), "1", "0"
        for name, tx in methods.items():
            step = optalr.train_step(loss_fn, tx, has_aux=has_aux)
            state = jax.eval_shape(tx.init, params)
            for kind in KINDS:
                if kind == "second" and name != "tso_alra":
                    continue
                found = operations(step, (params, state, *batch), kind=kind, **where)
                flow = sum(found[each] for each in ("while", "case", "if"))
                ratio = f"{found.total() / least:.1f}"
                yield net, name, kind, str(found.total()), ratio, str(flow)


def moved(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield rows of what a plain step moves and does, as XLA counts it, and what it must move.

    Beside SGD's step an update must read the roots, read and write the momentum, and read and write
    what each of its two products takes and gives: 6 passes over the parameters.
    """
    for net in names:
        loss_fn, params, batch = NETS[net]()
        layout = optalr.coverage(loss_fn, params, *batch)
        methods = {
            "SGD": optax.sgd(1e-2),
            "Adam": optax.adam(1e-3),
            "tso_alra": optalr.tso_alra(1e-2, layout=layout),
            "tso_alra on gradients": optalr.tso_alra(1e-2, layout=layout),
            "untuned": optalr.untuned(1000, layout=layout),
        }
        size, least = _nbytes(params), 0.0
        for name, tx in methods.items():
            state = jax.eval_shape(tx.init, params)
            # Where they are cheaper, the sides of a gradient are multiplied in its place.
            sides = {"outer_products": False} if "gradients" in name else {}
            step = optalr.train_step(loss_fn, tx, has_aux=net in ("ResNet", "GPT"), **sides)
            cost = step.lower(params, state, *batch, kind="plain").compile().cost_analysis()
            least = least or cost["bytes accessed"]
            must = {"SGD": least, "Adam": least + 4 * size}.get(name)
            if must is None:
                must = least + (_nbytes(state) - size) / 2 + 6 * size
            numbers = cost["bytes accessed"], must, cost["flops"]
            yield net, name, *(f"{x / 1e6:.1f}" for x in numbers)


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    platforms = ("cpu", "cuda", "rocm", "tpu")
    parser.add_argument("--platform", choices=platforms, default="cpu", help="lowered for it")
    parser.add_argument("--bytes", action="store_true", help="what plain steps move and do instead")
    options = parser.parse_args()
    if options.bytes:
        print("| net | method | MB moved | MB that must be moved | MFLOP |\n|---|---|---|---|---|")
        for row in moved(options.nets):
            print("| " + " | ".join(row) + " |", flush=True)
        return
    names = options.nets
    print("| net | method | step | operations | times Adam's | control flow |")
    print("|---|---|---|---|---|---|")
    for row in rows(names, options.platform):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
