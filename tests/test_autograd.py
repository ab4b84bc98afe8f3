"""HIPS autograd: the conformance suite, containers, Hessian products, and what is refused."""

import numpy as np
import pytest

from koopman_hpo import AdapterError, ShapeError, Space, check_hypergradient, inner, log, logit

anp = pytest.importorskip("autograd.numpy")
from koopman_hpo_adapters import autograd  # noqa: E402
from koopman_hpo_adapters.conformance import Conformance  # noqa: E402
from threadpoolctl import threadpool_limits  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small products: a second BLAS thread only waits."""
    with threadpool_limits(1):
        yield


class TestConformance(Conformance):
    def problem(self, model, dtype):
        train, val = model.losses(anp)
        return autograd.problem(train, val, model.params(dtype))


def tanh_regression(dtype=float):
    """A small network in containers, with a scalar and a vector loss hyperparameter."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    params = {"out": draw(4), "layers": [(draw(3, 4), draw(4))], "none": draw(0)}

    def fit(params, batch):
        X, y = batch
        W, b = params["layers"][0]
        return anp.mean((anp.tanh(X @ W + b) @ params["out"] - y) ** 2)

    def train(params, hyper, batch):
        W, b = params["layers"][0]
        scale = hyper["l2"][0] * anp.sum(W**2) + hyper["l2"][1] * anp.sum(b**2)
        return hyper["weight"] * fit(params, batch) + scale

    batch = (draw(8, 3), draw(8))
    return train, lambda params, hyper, batch: fit(params, batch), params, batch


SPACE = Space(lr=log(0.05), momentum=logit(0.7), weight=log(0.5), l2=log([0.01, 0.02]))


def test_containers_come_back_and_every_hyperparameter_is_exact():
    train, val, params, batch = tanh_regression()
    model = autograd.problem(train, val, params, hyper=("weight", "l2"))
    back = model.unravel(model.params)
    assert np.array_equal(back["layers"][0][0], params["layers"][0][0])
    assert model.segments == (12, 4, 4)
    assert "exact" in model.note
    report = check_hypergradient(inner.sgd(model, SPACE), [batch] * 10, batch)
    assert report.error.max() < 1e-7, str(report)


def test_its_hessian_products_are_exact():
    train, val, params, batch = tanh_regression()
    run = inner.sgd(autograd.problem(train, val, params), SPACE)
    run.step(SPACE.phi0, batch)
    frozen = run.linearise(batch)
    outer_gradient = lambda theta: run.problem.outer(theta, SPACE.natural(SPACE.phi0), batch)[1]
    v, theta, eps = np.random.default_rng(1).normal(size=20), run.params, 1e-5
    want = (outer_gradient(theta + eps * v) - outer_gradient(theta - eps * v)) / (2 * eps)
    np.testing.assert_allclose(frozen.outer_hvp(v[None])[0], want, rtol=1e-7, atol=1e-9)
    H = frozen.hvp(np.eye(20))
    np.testing.assert_allclose(H, H.T, atol=1e-13)


def test_a_linear_loss_and_a_constant_one_have_zero_tangents():
    theta = np.ones(3)
    linear = autograd.problem(lambda p, h, b: anp.sum(p), lambda p, h, b: anp.sum(p * b), theta)
    loss, g, dG = linear.grad_jvp(theta, {"a": 1.0}, np.ones((2, 3)), {"a": np.ones(2)}, None)
    assert loss == 3
    assert (g == 1).all()
    assert (dG == 0).all()
    constant = autograd.problem(lambda p, h, b: 1.0, lambda p, h, b: 1.0, theta)
    assert (constant.grad_jvp(theta, {}, np.ones((2, 3)), {}, None)[2] == 0).all()
    assert (constant.outer(theta, {}, None)[1] == 0).all()


def test_keeps_single_precision():
    train, val, params, batch = tanh_regression(np.float32)
    model = autograd.problem(train, val, params)
    run = inner.adam(model, Space(lr=log(0.01), weight=log(0.5), l2=log([0.01, 0.02])))
    run.step(run.space.phi0, batch)
    assert model.params.dtype == run.params.dtype == run.tangents.dtype == np.float32
    assert run.linearise(batch).outer_hvp(np.ones((2, 20))).shape == (2, 20)


def test_refuses_what_it_cannot_differentiate():
    train, val, params, batch = tanh_regression()
    with pytest.raises(AdapterError, match="train_loss must be a function, got NoneType"):
        autograd.problem(None, val, params)
    with pytest.raises(AdapterError, match=r"use \('l2',\)"):
        autograd.problem(train, val, params, hyper="l2")
    for wrong in ({"W": np.arange(3)}, ["W"], (3.0,)):
        with pytest.raises(AdapterError, match="float32 or float64 arrays in tuples, lists or dicts"):
            autograd.problem(train, val, wrong)
    with pytest.raises(ShapeError, match="finite"):
        autograd.problem(train, val, params | {"out": np.full(4, np.nan)})
    run = inner.sgd(autograd.problem(train, val, params), Space(lr=log(0.1), weight=log(1.0)))
    with pytest.raises(AdapterError, match=r"reads hyper\['l2'\]"):
        run.step(run.space.phi0, batch)
    with pytest.raises(AdapterError, match=r"all float32 or all float64, got float32 and float64\. Use"):
        autograd.problem(train, val, params | {"out": np.ones(4, np.float32)})
    vector = autograd.problem(lambda p, h, b: p, lambda p, h, b: p, np.ones(3))
    with pytest.raises(AdapterError, match=r"train_loss must be a scalar, got shape \(3,\)"):
        inner.sgd(vector, Space(lr=log(0.1))).step([0.0], None)
    with pytest.raises(AdapterError, match="val_loss must be a scalar"):
        vector.outer(vector.params, {}, None)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda p, h, b: None, "must be a scalar, got NoneType. Return the loss alone"),
        (lambda p, h, b: (anp.sum(p), p), "must be a scalar, got tuple"),
        (lambda p, h, b: "much", "must be a scalar, got str"),
        (lambda p, h, b: anp.sum(p) * (1 + 2j), "must be real, got .*j.* Take its real part"),
        (lambda p, h, b: 1 + 2j, "must be real, got"),
    ],
    ids=["none", "aux", "text", "complex", "constant"],
)
def test_a_loss_that_is_no_real_scalar_is_refused(loss, said):
    model, space = autograd.problem(loss, loss, np.ones(3)), Space(lr=log(0.1))
    for tangents in (False, True):
        with pytest.raises(AdapterError, match=f"train_loss {said}"):
            inner.sgd(model, space).step([0.0], None, tangents=tangents)
    with pytest.raises(AdapterError, match=f"val_loss {said}"):
        model.outer(model.params, {}, None)
