"""A net with two layers in float64 NumPy, by hand: gradients, layer signals, curvature products."""

import numpy as np

SIZES = (64, 12, 10)


def batches(num_batches=8, size=24):
    """Return minibatches of the digits, scaled to [0, 1]; some pixels of theirs are always 0."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))[: num_batches * size]
    images, labels = images[order] / 16.0, labels[order]
    return list(zip(np.split(images, num_batches), np.split(labels, num_batches), strict=True))


def start(seed=0):
    """Return the first parameters."""
    rng = np.random.default_rng(seed)
    m, h, n = SIZES
    return {
        "W1": rng.standard_normal((m, h)) / np.sqrt(m),
        "b1": 0.1 * rng.standard_normal(h),
        "W2": rng.standard_normal((h, n)) / np.sqrt(h),
        "b2": np.zeros(n),
    }


def forward(w, x):
    """Return hidden units, logits and probabilities; works for complex weights too."""
    hidden = np.tanh(x @ w["W1"] + w["b1"])
    logits = hidden @ w["W2"] + w["b2"]
    powers = np.exp(logits - logits.real.max(1, keepdims=True))
    return hidden, logits, powers / powers.sum(1, keepdims=True)


def loss(w, x, y):
    """Return the mean cross-entropy."""
    probabilities = forward(w, x)[2]
    return -np.mean(np.log(probabilities[np.arange(len(y)), y]))


def signals(w, x, y):
    """Return the inputs ``α_i`` and the signals ``β_i`` of each example's loss, layer by layer."""
    hidden, _, probabilities = forward(w, x)
    second = probabilities - np.eye(SIZES[-1])[y]
    first = (second @ w["W2"].T) * (1 - hidden**2)
    return (x, first), (hidden, second)


def gradient(w, x, y):
    """Return the gradient of the mean cross-entropy."""
    (a1, d1), (a2, d2) = signals(w, x, y)
    n = len(y)
    return {"W1": a1.T @ d1 / n, "b1": d1.mean(0), "W2": a2.T @ d2 / n, "b2": d2.mean(0)}


def gauss_newton(w, x, y, v):
    """Return ``Jᵀ H_L J v``."""
    hidden, _, p = forward(w, x)
    moved = (1 - hidden**2) * (x @ v["W1"] + v["b1"])
    out = moved @ w["W2"] + hidden @ v["W2"] + v["b2"]
    out = (p * out - p * (p * out).sum(1, keepdims=True)) / len(y)
    back = (out @ w["W2"].T) * (1 - hidden**2)
    return {"W1": x.T @ back, "b1": back.sum(0), "W2": hidden.T @ out, "b2": out.sum(0)}


def hessian(w, x, y, v):
    """Return ``H v`` by a complex step, which is exact up to rounding."""
    shifted = {key: w[key] + 1e-30j * v[key] for key in w}
    return {key: g.imag / 1e-30 for key, g in gradient(shifted, x, y).items()}


def linear_loss(w, x, y):
    """Return the mean cross-entropy of logistic regression."""
    logits = x @ w["W"] + w["b"]
    logits = logits - logits.max(1, keepdims=True)
    return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y])


def linear_gradient(w, x, y):
    """Return its gradient."""
    powers = np.exp(x @ w["W"] + w["b"])
    signal = powers / powers.sum(1, keepdims=True) - np.eye(SIZES[-1])[y]
    return {"W": x.T @ signal / len(y), "b": signal.mean(0)}


def linear_start():
    """Return its first parameters."""
    return {"W": np.zeros((SIZES[0], SIZES[-1])), "b": np.zeros(SIZES[-1])}


def combine(a, x, b, y):
    """Return ``a x + b y`` of two trees."""
    return {key: a * x[key] + b * y[key] for key in x}


def inner(x, y):
    """Return the inner product of two trees."""
    return sum(np.sum(x[key] * y[key]) for key in x)
