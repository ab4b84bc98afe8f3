"""A real model trained to convergence: the hypergradient is the implicit-function value, and lr is forgotten."""

import numpy as np
import pytest
from koopman_hpo_adapters.numpy import softmax_regression
from sklearn.datasets import load_digits

from koopman_hpo import Space, inner, log


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    X, y = X[order] / 16.0, y[order]
    return (X[:600], y[:600]), (X[600:1200], y[600:1200])


def test_converged_softmax_regression_on_digits(digits):
    train, val = digits
    l2 = 0.05
    model = softmax_regression(64, 10)
    run = inner.sgd(model, Space(lr=log(0.5), l2=log(l2)), momentum=0.9)
    for _ in range(900):
        run.step(run.space.phi0, train)
    theta, h = run.params, run.hypergradient(val)
    p = theta.size
    still = {"l2": np.zeros(p)}
    _, g, hessian = model.grad_jvp(theta, {"l2": l2}, np.eye(p), still, train)
    assert np.abs(g).max() < 1e-13
    mixed = model.grad_jvp(theta, {"l2": l2}, np.zeros((1, p)), {"l2": np.ones(1)}, train)[2][0]
    implicit = -model.outer(theta, {}, val)[1] @ np.linalg.solve(hessian, mixed)
    assert h.natural["l2"] == pytest.approx(implicit, rel=1e-9)
    assert abs(h.natural["lr"]) < 1e-10
    assert abs(h.natural["l2"]) > 1e-2
