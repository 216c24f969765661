"""The papers' algorithms in float64 NumPy, line by line from the papers and from no code of ours.

Each takes the first weights and an iterable of minibatches, and returns the weights after the last.
"""

import numpy as np

from tests.paper import numpy_net as net


def inverse_root(factor, eps):
    values, vectors = np.linalg.eigh(factor)
    return vectors @ np.diag((values + eps) ** -0.5) @ vectors.T


def tso_alra(w, minibatches, *, eta, interval, gamma, eps, switch):
    """Algorithm 1 of Ida & Fujiwara."""
    layers = ("W1", "b1"), ("W2", "b2")
    A = {name: np.zeros((w[name].shape[0],) * 2) for name, _ in layers}
    B = {name: np.zeros((w[name].shape[1],) * 2) for name, _ in layers}
    one = 0.0  # the average of the squared input of a bias, which is 1
    roots = None
    for t, (x, y) in enumerate(minibatches, start=1):
        g = net.gradient(w, x, y)
        if t > switch:
            w = net.combine(1, w, -eta, g)
            continue
        for (name, _), (a, b) in zip(layers, net.signals(w, x, y), strict=True):
            A[name] = (1 - gamma) * A[name] + gamma * a.T @ a / len(y)
            B[name] = (1 - gamma) * B[name] + gamma * b.T @ b / len(y)
        one = (1 - gamma) * one + gamma
        if t % interval == 0:
            roots = {
                name: (inverse_root(A[name], eps), inverse_root(B[name], eps)) for name, _ in layers
            }
            of_one = (one + eps) ** -0.5
        step = dict(g)
        if roots is not None:
            for name, bias in layers:
                left, right = roots[name]
                step[name] = left @ g[name] @ right
                step[bias] = of_one * right @ g[bias]
        w = net.combine(1, w, -eta, step)
    return w


def learned_rate(w, minibatches, *, eta, eps, delta, beta=0.0):
    """Eq. 9, 16-21 of Ravaut & Gorti, in the order of section 4.1, on logistic regression."""
    rates, moved = [], 0.0
    for x, y in minibatches:
        g = net.linear_gradient(w, x, y)

        def f(rate, w=w, g=g, x=x, y=y):
            return net.linear_loss(net.combine(1, w, -rate, g), x, y)

        rates.append(eta)
        numerator = f(eta + eps) - f(eta - eps)
        denominator = f(eta + 2 * eps) + f(eta - 2 * eps) - 2 * f(eta)
        if abs(denominator) <= np.finfo(float).eps * abs(f(eta)):
            denominator += delta
        w = net.combine(1, w, -eta, g)
        moved = beta * moved - 2 * eps * numerator / denominator
        eta = max(eta + moved, delta)
    return w, rates


def learned_rate_first_order(w, minibatches, *, eta, alpha, delta):
    """Eq. 5-7, on logistic regression."""
    rates = []
    for x, y in minibatches:
        g = net.linear_gradient(w, x, y)
        rates.append(eta)
        w = net.combine(1, w, -eta, g)
        eta = max(eta + alpha * net.inner(g, net.linear_gradient(w, x, y)), delta)
    return w, rates


def lipschitz(w, epochs, *, decay, adaptive=True):
    """Eq. 20 with weight decay, K_z and max‖w‖ at the weights that an epoch begins with."""
    rates = []
    for minibatches in epochs:
        if adaptive or not rates:
            K_z = max(np.linalg.norm(net.forward(w, x)[0]) for x, _ in minibatches)
            largest = max(np.linalg.norm(w["W1"]), np.linalg.norm(w["W2"]))
            k, m = net.SIZES[-1], len(minibatches[0][1])
            rate = 1 / ((k - 1) / (k * m) * K_z + decay * largest)
        rates.append(rate)
        for x, y in minibatches:
            g = net.gradient(w, x, y)
            for name in ("W1", "W2"):
                g[name] = g[name] + decay * w[name]
            w = net.combine(1, w, -rate, g)
    return w, rates


def algorithm_1(product, g, lam, k):
    """Algorithm 1 of the paper on flows, with its own letters; ``u + λv₁`` for ``u + λg``."""
    beta = xi = np.sqrt(net.inner(g, g))
    gamma0 = gamma1 = 1.0
    sigma0 = sigma1 = 0.0
    zero = net.combine(0, g, 0, g)
    v, v0, v1, q0, q1 = zero, zero, g, zero, zero
    for _ in range(k):
        v1 = net.combine(1 / beta, v1, 0, v1)
        u = product(v1)
        u = net.combine(1, u, lam, v1)
        alpha = net.inner(v1, u)
        u = net.combine(1, net.combine(1, u, -alpha, v1), -beta, v0)
        v0, v1 = v1, u
        delta = gamma1 * alpha - gamma0 * sigma1 * beta
        rho2 = sigma1 * alpha + gamma0 * gamma1 * beta
        rho3 = sigma0 * beta
        beta = np.sqrt(net.inner(v1, v1))
        rho1 = np.sqrt(delta**2 + beta**2)
        gamma0, gamma1 = gamma1, delta / rho1
        sigma0, sigma1 = sigma1, beta / rho1
        u, q0 = q0, q1
        q1 = net.combine(1 / rho1, net.combine(1, v0, -rho2, q0), -rho3 / rho1, u)
        v = net.combine(1, v, gamma1 * xi, q1)
        xi = -sigma1 * xi
    return v


def algorithm_2(product, g, lam):
    """Algorithm 2: k = 1."""
    u = net.combine(1, product(g), lam, g)
    return net.combine(net.inner(g, u) / net.inner(u, u), g, 0, g)


def edf(w, minibatches, *, eta, k, a, b, kind=net.gauss_newton, acceleration=None):
    """EDF of either type; W1 is momentum 0.9 on v, W2 the scheme of Su et al. with α = 3."""
    velocity = net.combine(0, w, 0, w)
    before = w  # w_{k−1} of W2; ``w`` is y_{k−1}
    for count, (x, y) in enumerate(minibatches, start=1):
        g = net.gradient(w, x, y)
        lam = a * np.sqrt(net.inner(g, g)) ** b

        def product(v, w=w, x=x, y=y):
            return kind(w, x, y, v)

        v = algorithm_2(product, g, lam) if k == 1 else algorithm_1(product, g, lam, k)
        if acceleration == "W1":
            velocity = net.combine(0.9, velocity, 1, v)
            w = net.combine(1, w, -eta, velocity)
        elif acceleration == "W2":
            now = net.combine(1, w, -eta, v)
            share = (count - 1) / (count + 3 - 1)
            w = net.combine(1 + share, now, -share, before)
            before = now
        else:
            w = net.combine(1, w, -eta, v)
    return w


def swats(w, minibatches, *, alpha, beta1, beta2, eps):
    """Algorithm 1 of Keskar & Socher; also returns the step of the switch and Λ."""
    m = a = v = net.combine(0, w, 0, w)
    lam, rate, switched = 0.0, None, None
    for k, (x, y) in enumerate(minibatches, start=1):
        g = net.gradient(w, x, y)
        if rate is not None:
            v = net.combine(beta1, v, 1, g)
            w = net.combine(1, w, -(1 - beta1) * rate, v)
            continue
        m = net.combine(beta1, m, 1 - beta1, g)
        a = net.combine(beta2, a, 1 - beta2, {key: g[key] ** 2 for key in g})
        scale = -alpha * np.sqrt(1 - beta2**k) / (1 - beta1**k)
        p = {key: scale * m[key] / (np.sqrt(a[key]) + eps) for key in g}
        w = net.combine(1, w, 1, p)
        if net.inner(p, g) != 0:
            projected = net.inner(p, p) / -net.inner(p, g)
            lam = beta2 * lam + (1 - beta2) * projected
            if k > 1 and abs(lam / (1 - beta2**k) - projected) < eps:
                rate, switched = lam / (1 - beta2**k), k
    return w, switched, rate


def amsgrad(w, minibatches, *, alpha, beta1, beta2):
    """Algorithm 2 of Reddi, Kale & Kumar on the whole space."""
    m = v = largest = net.combine(0, w, 0, w)
    for x, y in minibatches:
        g = net.gradient(w, x, y)
        m = net.combine(beta1, m, 1 - beta1, g)
        v = net.combine(beta2, v, 1 - beta2, {key: g[key] ** 2 for key in g})
        largest = {key: np.maximum(largest[key], v[key]) for key in g}
        with np.errstate(invalid="ignore"):
            step = {key: np.nan_to_num(m[key] / np.sqrt(largest[key]), nan=0.0) for key in g}
        w = net.combine(1, w, -alpha, step)
    return w
