"""Small models with everything known: a quadratic, a ridge regression, and a logistic regression with an L2."""

import numpy as np

from koopman_hpo import Problem


def quadratic(A, b, theta0, target=None, dtype=np.float64):
    """Inner `1/2 t'At - b't`, outer `1/2 |t - target|^2`."""
    A, b, theta0 = A.astype(dtype), b.astype(dtype), theta0.astype(dtype)
    target = np.zeros_like(b) if target is None else target.astype(dtype)

    def grad_jvp(theta, hyper, Z, dhyper, batch):
        return 0.5 * theta @ A @ theta - b @ theta, A @ theta - b, Z @ A

    def outer(theta, hyper, batch):
        value = np.nan if batch == "nan" else 0.5 * np.sum((theta - target) ** 2)
        return value, theta - target, {}

    return Problem(theta0, grad_jvp, outer, hyper=frozenset())


def linear(c, theta0):
    """Inner `c't`: a constant gradient."""

    def grad_jvp(theta, hyper, Z, dhyper, batch):
        return c @ theta, c.copy(), np.zeros_like(Z)

    def outer(theta, hyper, batch):
        return 0.5 * theta @ theta, theta.copy(), {}

    return Problem(theta0, grad_jvp, outer, hyper=frozenset())


def logistic_gradient(theta, hyper, batch):
    """Of `mean softplus(-y x't) + l2/2 |t|^2`; takes complex theta and l2."""
    X, y = batch
    s = 1 / (1 + np.exp(y * (X @ theta)))
    return -X.T @ (s * y) / len(y) + hyper.get("l2", 0.0) * theta


def logistic(theta0, segments=None):
    """Logistic regression; the outer loss depends on l2 directly too, through `.1 l2 sum(theta)`."""

    def grad_jvp(theta, hyper, Z, dhyper, batch):
        X, y = batch
        margin = y * (X @ theta)
        s, l2 = 1 / (1 + np.exp(margin)), hyper.get("l2", 0.0)
        loss = np.mean(np.logaddexp(0, -margin)) + 0.5 * l2 * theta @ theta
        dG = ((Z @ X.T) * (s * (1 - s))) @ X / len(y) + l2 * Z
        if "l2" in dhyper:
            dG = dG + np.outer(dhyper["l2"], theta)
        return loss, logistic_gradient(theta, hyper, batch), dG.astype(theta.dtype)

    def outer(theta, hyper, batch):
        X, y = batch
        margin, l2 = y * (X @ theta), hyper.get("l2", 0.0)
        s = 1 / (1 + np.exp(margin))
        value = np.mean(np.logaddexp(0, -margin)) + 0.1 * l2 * theta.sum()
        direct = {"l2": 0.1 * theta.sum()} if "l2" in hyper else {}
        return value, -X.T @ (s * y) / len(y) + 0.1 * l2, direct

    return Problem(theta0, grad_jvp, outer, hyper=frozenset({"l2"}), segments=segments)


def data(seed, n=12, p=5):
    """(X (n, p), y (n,) of -1 and 1)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, p)), np.where(rng.random(n) < 0.5, -1.0, 1.0)


def batches(seed, steps, n=12, p=5):
    return [data(1000 * seed + t, n, p) for t in range(steps)]


def spd(rng, p, low=0.5, high=2.0):
    """A symmetric positive definite matrix with eigenvalues between low and high."""
    Q = np.linalg.qr(rng.normal(size=(p, p)))[0]
    return (Q * np.linspace(low, high, p)) @ Q.T
