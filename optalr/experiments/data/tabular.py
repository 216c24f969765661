"""Small data sets that ship inside Python packages, or are made by one."""

import numpy as np

from optalr.experiments.data.dataset import Raw, Split
from optalr.experiments.errors import ExperimentError


def digits() -> Raw:
    """Load the 1797 handwritten digits, 8 x 8 pixels of 0-16, that ship with scikit-learn."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = np.asarray(x, np.float32).reshape(-1, 8, 8, 1)
    return Raw(Split(images, np.asarray(y, np.int32)), None, "classification", 10)


def breast_cancer() -> Raw:
    """Load the 569 tumours with 30 measurements, two classes, that ship with scikit-learn."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    features = np.asarray(x, np.float32)
    return Raw(Split(features, np.asarray(y, np.int32)), None, "classification", 2, "feature")


def diabetes() -> Raw:
    """Load the 442 patients with 10 measurements that ship with scikit-learn.

    The target is the disease's progression after a year, standardized so that losses are of order
    one.
    """
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    y = np.asarray(y, np.float64)
    target = np.asarray((y - y.mean()) / y.std(), np.float32)[:, None]
    return Raw(Split(np.asarray(x, np.float32), target), None, "regression", 1, "feature")


_BOSTON_NOTE = (
    "Boston Housing: column B is built on the assumption that racial segregation raises house "
    "prices; use the data to check optimizers, not to learn about houses, or set data.drop_b=true."
)


def boston(drop_b: bool = False, raw: bool = False) -> Raw:
    """Load the 506 districts of Boston Housing with 13 columns that ship with mlxtend.

    The target is the median value in thousands of dollars.

    Args:
      drop_b: leave out column B, whose construction is unethical.
      raw: leave the features unscaled, for experiments with badly scaled problems.
    """
    from mlxtend.data import boston_housing_data

    x, y = boston_housing_data()
    x = np.asarray(x, np.float32)
    if drop_b:
        x = np.delete(x, 11, axis=1)  # the twelfth of the published thirteen
    target = np.asarray(y, np.float32)[:, None]
    scaling = "none" if raw else "feature"
    return Raw(Split(x, target), None, "regression", 1, scaling, "" if drop_b else _BOSTON_NOTE)


def mnist_5k() -> Raw:
    """Load the 5000 MNIST digits, 500 a class, that ship with mlxtend."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    images = np.asarray(x).astype(np.uint8).reshape(-1, 28, 28, 1)
    return Raw(Split(images, np.asarray(y, np.int32)), None, "classification", 10)


def mnist1d(num_samples: int = 5000, seed: int = 42) -> Raw:
    """Make MNIST-1D, digits as curves of 40 points, with the package ``mnist1d``.

    Args:
      num_samples: how many curves to make; a fifth of them is the test set.
      seed: seed of the package's generator.
    """
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError:
        raise ExperimentError(
            "data 'mnist1d' is made by the package mnist1d: pip install mnist1d."
        ) from None
    arguments = get_dataset_args()
    # The package takes its settings as a namespace, as its own command line would.
    vars(arguments).update(num_samples=num_samples, seed=seed)
    made = make_dataset(arguments)

    def part(suffix: str) -> Split:
        curves = np.asarray(made["x" + suffix], np.float32)[..., None]
        return Split(curves, np.asarray(made["y" + suffix], np.int32))

    return Raw(part(""), part("_test"), "classification", 10)
