"""Data sets that ship inside Python packages: small, real, always there."""

import numpy as np

from optalr.experiments.data.dataset import Raw, Split


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

    The target, disease progression after a year, is standardized so that losses are of order one.
    """
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    y = np.asarray(y, np.float64)
    target = np.asarray((y - y.mean()) / y.std(), np.float32)[:, None]
    return Raw(Split(np.asarray(x, np.float32), target), None, "regression", 1, "feature")
