"""The ready models against the oracle, and the laws that their derivatives obey."""

import copy
import pickle
import threading

import numpy as np
import pytest
import reference_models as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from koopman_hpo_adapters.numpy import difference_error, mlp, softmax_regression

from koopman_hpo import AdapterError

N_TRAIN = 20
EXACT = 1e-12  # both sides are exact derivatives: a few hundred roundings of numbers of order one
SINGLE = 2e-5  # the same in float32
ACTIVATIONS, LOSSES = ("tanh", "relu", "gelu"), ("cross_entropy", "squared_error")


def make_batch(rng, n, sizes, loss="cross_entropy"):
    X = rng.normal(size=(n, sizes[0]))
    y = rng.integers(0, sizes[-1], n) if loss == "cross_entropy" else rng.normal(size=(n, sizes[-1]))
    return X, y, rng.integers(0, N_TRAIN, n)


def make_hyper(rng, sizes, loss="cross_entropy", per_layer=True):
    """A value for every loss hyperparameter that the model has."""
    hyper = {"l2": rng.uniform(0.01, 0.1, len(sizes) - 1) if per_layer else 0.03}
    hyper["example_weights"] = rng.uniform(0.5, 1.5, N_TRAIN)
    if loss == "cross_entropy":
        hyper |= {"label_smoothing": 0.1, "class_weights": rng.uniform(0.5, 1.5, sizes[-1])}
    return hyper


def make_tangents(rng, model, hyper, q):
    dhyper = {name: rng.normal(size=(q, *np.shape(value))) for name, value in hyper.items()}
    return rng.normal(size=(q, len(model.params))), dhyper


def row(dhyper, j):
    return {name: d[j] for name, d in dhyper.items()}


def close(actual, desired, tolerance):
    """Agreement relative to the largest entry: single entries may cancel."""
    np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * max(1e-3, np.abs(desired).max()))


# -- against the oracle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_linearisation_pushes_what_grad_jvp_does(activation, loss):
    rng = np.random.default_rng(0)
    sizes = (4, 6, 5, 3)
    model = mlp(sizes, activation=activation, loss=loss)
    theta = model.params + 0.1 * rng.normal(size=model.params.shape)
    batch, hyper = make_batch(rng, 300, sizes, loss), make_hyper(rng, sizes, loss)
    push, rough = (model.linearise(theta, hyper, batch, r) for r in (False, True))
    for q in (3, 0, 2):  # the second use finds what the first left
        Z, dhyper = make_tangents(rng, model, hyper, q)
        want = model.grad_jvp(theta, hyper, Z, dhyper, batch)[2]
        assert push(Z, dhyper).shape == want.shape
        close(push(Z, dhyper), want, EXACT) if q else None
        close(rough(Z, dhyper), want, SINGLE) if q else None
    assert rough(Z, dhyper).dtype == theta.dtype
    with pytest.raises(AdapterError, match="linearise"):
        model.linearise(theta, hyper, (batch[0], batch[1][:5], batch[2]), False)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loss_gradient_and_every_tangent_are_exact(activation, loss, per_layer):
    rng = np.random.default_rng(0)
    sizes = (4, 6, 5, 3)
    model = mlp(sizes, activation=activation, loss=loss)
    theta = model.params + 0.1 * rng.normal(size=model.params.shape)  # random, so no relu sits on its kink
    batch, hyper = make_batch(rng, 7, sizes, loss), make_hyper(rng, sizes, loss, per_layer)
    Z, dhyper = make_tangents(rng, model, hyper, 3)
    oracle = {"activation": activation, "loss": loss}

    value, g, dG = model.grad_jvp(theta, hyper, Z, dhyper, batch)

    expected, slow = reference.gradient(theta, sizes, batch, hyper, **oracle)
    assert value == pytest.approx(expected.real, rel=EXACT)
    close(g, slow.real, EXACT)
    for j in range(3):
        close(dG[j], reference.tangent(theta, sizes, batch, hyper, Z[j], row(dhyper, j), **oracle), EXACT)
        slope = reference.slope_of_loss(theta, sizes, batch, hyper, Z[j], **oracle)
        assert g @ Z[j] == pytest.approx(slope, rel=1e-10)  # a sum of 80 terms that may cancel


@pytest.mark.parametrize("name", ["l2", "label_smoothing", "class_weights", "example_weights"])
def test_each_hyperparameter_alone_has_an_exact_mixed_derivative(name):
    rng = np.random.default_rng(1)
    sizes = (4, 5, 3)
    model = mlp(sizes)
    batch, hyper = make_batch(rng, 6, sizes), {name: make_hyper(rng, sizes)[name]}
    _, dhyper = make_tangents(rng, model, hyper, 2)
    _, _, dG = model.grad_jvp(model.params, hyper, np.zeros((2, len(model.params))), dhyper, batch)
    for j in range(2):
        expected = reference.tangent(model.params, sizes, batch, hyper, np.zeros_like(model.params), row(dhyper, j))
        assert np.abs(expected).max() > 1e-4
        close(dG[j], expected, EXACT)


@pytest.mark.parametrize("bias", [True, False])
def test_softmax_regression_is_exact_with_and_without_intercepts(bias):
    rng = np.random.default_rng(2)
    sizes = (5, 4)
    model = softmax_regression(*sizes, bias=bias)
    assert model.segments == (model.params.size,) == (20 + 4 * bias,)
    batch, hyper = make_batch(rng, 6, sizes), make_hyper(rng, sizes, per_layer=False)
    Z, dhyper = make_tangents(rng, model, hyper, 2)
    _, g, dG = model.grad_jvp(model.params, hyper, Z, dhyper, batch)
    close(g, reference.gradient(model.params, sizes, batch, hyper, bias=bias)[1].real, EXACT)
    for j in range(2):
        close(dG[j], reference.tangent(model.params, sizes, batch, hyper, Z[j], row(dhyper, j), bias=bias), EXACT)


@pytest.mark.parametrize("sizes", [(3, 40, 35, 2), (3, 4, 33), (2, 2)])
def test_wide_and_narrow_layers_are_equally_exact(sizes):
    """Layers of 32 outputs and more take another route to the same products."""
    rng = np.random.default_rng(3)
    model, batch = mlp(sizes, activation="gelu"), make_batch(rng, 5, sizes)
    Z = rng.normal(size=(2, len(model.params)))
    _, g, dG = model.grad_jvp(model.params, {}, Z, {}, batch)
    close(g, reference.gradient(model.params, sizes, batch, {}, activation="gelu")[1].real, EXACT)
    for z, dg in zip(Z, dG, strict=True):
        close(dg, reference.tangent(model.params, sizes, batch, {}, z, {}, activation="gelu"), EXACT)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_outer_is_the_plain_mean_and_its_hessian_is_exact(activation, loss):
    rng = np.random.default_rng(4)
    sizes = (4, 6, 3)
    settings_ = {"l2": 0.5, "example_weights": np.full(N_TRAIN, 3.0)}
    if loss == "cross_entropy":
        settings_ |= {"label_smoothing": 0.2, "class_weights": np.full(3, 2.0)}
    model = mlp(sizes, activation=activation, loss=loss, **settings_)
    X, y, _ = make_batch(rng, 6, sizes, loss)
    V = rng.normal(size=(2, len(model.params)))
    value, dE, direct = model.outer(model.params, settings_, (X, y))
    expected, slow = reference.gradient(model.params, sizes, (X, y), {}, activation=activation, loss=loss)
    assert value == pytest.approx(expected.real, rel=EXACT)
    assert direct == {}
    close(dE, slow.real, EXACT)
    for v, hv in zip(V, model.outer_hvp(model.params, {}, V, (X, y)), strict=True):
        close(hv, reference.tangent(model.params, sizes, (X, y), {}, v, {}, activation=activation, loss=loss), EXACT)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_stays_float32_and_is_as_exact_as_it_can_be(activation, loss):
    rng = np.random.default_rng(5)
    sizes = (4, 6, 3)
    model = mlp(sizes, activation=activation, loss=loss, dtype=np.float32)
    batch, hyper = make_batch(rng, 6, sizes, loss), make_hyper(rng, sizes, loss)
    Z, dhyper = make_tangents(rng, model, hyper, 2)
    Z = Z.astype(np.float32)
    theta = model.params
    value, g, dG = model.grad_jvp(theta, hyper, Z, dhyper, batch)
    assert isinstance(value, float)
    assert g.dtype == dG.dtype == theta.dtype == model.outer(theta, hyper, batch)[1].dtype == np.float32
    assert model.outer_hvp(theta, hyper, Z, batch).dtype == model.predict(theta, batch[0]).dtype == np.float32
    oracle = {"activation": activation, "loss": loss}
    close(g, reference.gradient(theta.astype(float), sizes, batch, hyper, **oracle)[1].real, SINGLE)
    for j in range(2):
        close(dG[j], reference.tangent(theta.astype(float), sizes, batch, hyper, Z[j], row(dhyper, j), **oracle), SINGLE)


def test_keyword_values_are_those_that_hyper_would_give():
    rng = np.random.default_rng(6)
    sizes = (4, 5, 3)
    hyper, batch = make_hyper(rng, sizes), make_batch(rng, 6, sizes)
    Z = rng.normal(size=(2, mlp(sizes).params.size))
    still = {name: np.zeros((2, *np.shape(value))) for name, value in hyper.items()}
    tuned = mlp(sizes).grad_jvp(mlp(sizes).params, hyper, Z, still, batch)
    fixed = mlp(sizes, **hyper).grad_jvp(mlp(sizes).params, {}, Z, {}, batch)
    overridden = mlp(sizes, l2=7.0, label_smoothing=0.9).grad_jvp(mlp(sizes).params, hyper, Z, still, batch)
    for a, b, c in zip(tuned, fixed, overridden, strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-15)  # the same sums, zeros added in one of them


def test_weights_of_one_give_the_plain_mean():
    rng = np.random.default_rng(7)
    model, (X, y, index) = mlp((4, 5, 3)), make_batch(rng, 6, (4, 5, 3))
    ones = {"class_weights": np.ones(3), "example_weights": np.ones(N_TRAIN), "label_smoothing": 0.0, "l2": 0.0}
    none = np.zeros((0, len(model.params)))
    weighted = model.grad_jvp(
        model.params, ones, none, {name: np.zeros((0, *np.shape(v))) for name, v in ones.items()}, (X, y, index)
    )
    plain, outer = model.grad_jvp(model.params, {}, none, {}, (X, y)), model.outer(model.params, {}, (X, y))
    assert weighted[0] == pytest.approx(plain[0], rel=1e-14)
    assert plain[0] == outer[0]
    np.testing.assert_allclose(weighted[1], plain[1], rtol=0, atol=1e-16)
    np.testing.assert_array_equal(plain[1], outer[1])


# -- laws --------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(q=st.integers(0, 30), n=st.integers(1, 9), seed=st.integers(0, 2**32 - 1), activation=st.sampled_from(ACTIVATIONS))
def test_tangents_do_not_depend_on_the_company_they_come_in(q, n, seed, activation):
    """One at a time, all at once, and permuted: across the chunks that the model works in."""
    rng = np.random.default_rng(seed)
    sizes = (3, 34, 2)
    model, batch, hyper = mlp(sizes, activation=activation), make_batch(rng, n, sizes), make_hyper(rng, sizes)
    Z, dhyper = make_tangents(rng, model, hyper, q)
    _, g, dG = model.grad_jvp(model.params, hyper, Z, dhyper, batch)
    order = rng.permutation(q)
    _, g2, dG2 = model.grad_jvp(model.params, hyper, Z[order], {k: d[order] for k, d in dhyper.items()}, batch)
    close(g2, g, 1e-14)
    assert dG.shape == (q, len(model.params))
    if q:
        close(dG2, dG[order], 1e-13)  # BLAS may sum in another order for another width
        j = q - 1
        close(model.grad_jvp(model.params, hyper, Z[j:], {k: d[j:] for k, d in dhyper.items()}, batch)[2][0], dG[j], 1e-13)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), activation=st.sampled_from(ACTIVATIONS), loss=st.sampled_from(LOSSES))
def test_the_hessian_is_symmetric_and_linear(seed, activation, loss):
    rng = np.random.default_rng(seed)
    model, batch = mlp((3, 5, 2), activation=activation, loss=loss, l2=0.1), make_batch(rng, 4, (3, 5, 2), loss)
    u, v = rng.normal(size=(2, len(model.params)))
    _, _, (Hu, Hv, Hw) = model.grad_jvp(model.params, {}, np.array([u, v, 2 * u - 3 * v]), {}, batch)
    assert u @ Hv == pytest.approx(v @ Hu, rel=1e-9, abs=1e-11)  # sums of 27 products that may cancel
    close(Hw, 2 * Hu - 3 * Hv, 1e-12)


@pytest.mark.parametrize("n", [256, 257, 700])
def test_large_batches_in_blocks_equal_the_mean_over_their_parts(n):
    rng = np.random.default_rng(8)
    sizes = (3, 4, 2)
    model, (X, y, index), hyper = mlp(sizes), make_batch(rng, n, sizes), make_hyper(rng, sizes) | {"l2": 0.0}
    Z, dhyper = make_tangents(rng, model, hyper, 14)
    whole = model.grad_jvp(model.params, hyper, Z, dhyper, (X, y, index))
    parts = [slice(a, min(a + 100, n)) for a in range(0, n, 100)]
    pieces = [model.grad_jvp(model.params, hyper, Z, dhyper, (X[p], y[p], index[p])) for p in parts]
    shares = [(p.stop - p.start) / n for p in parts]
    l2 = sum(share * piece[1] for share, piece in zip(shares, pieces, strict=True))
    close(whole[1], l2, 1e-13)
    close(whole[2], sum(share * piece[2] for share, piece in zip(shares, pieces, strict=True)), 1e-13)
    np.testing.assert_allclose(model.predict(model.params, X)[-5:], model.predict(model.params, X[-5:]), rtol=1e-13)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_zero_tangents_stay_exactly_zero(activation):
    rng = np.random.default_rng(9)
    sizes = (3, 40, 4, 2)
    model, batch, hyper = mlp(sizes, activation=activation), make_batch(rng, 5, sizes), make_hyper(rng, sizes)
    Z, dhyper = make_tangents(rng, model, hyper, 3)
    Z[1], dhyper = 0, {name: d * np.reshape([1, 0, 1], (3, *[1] * (d.ndim - 1))) for name, d in dhyper.items()}
    _, _, dG = model.grad_jvp(model.params, hyper, Z, dhyper, batch)
    assert not dG[1].any()
    assert dG[0].any()
    assert dG[2].any()


def test_arguments_are_left_alone_and_results_are_the_callers():
    rng = np.random.default_rng(10)
    sizes = (3, 4, 2)
    model, batch, hyper = mlp(sizes), make_batch(rng, 5, sizes), make_hyper(rng, sizes)
    Z, dhyper = make_tangents(rng, model, hyper, 2)
    arguments = [model.params, Z, *batch, *(np.asarray(v) for v in hyper.values()), *dhyper.values()]
    for array in arguments:
        array.flags.writeable = False
    first = model.grad_jvp(model.params, hyper, Z, dhyper, batch)
    kept = copy.deepcopy(first)
    model.grad_jvp(model.params + 1, hyper, Z, dhyper, batch)  # the same shapes: the same workspace
    for a, b in zip(first, kept, strict=True):
        np.testing.assert_array_equal(a, b)
    outputs = model.predict(model.params, batch[0])
    kept = outputs.copy()
    model.predict(model.params + 1, batch[0])
    np.testing.assert_array_equal(outputs, kept)


@pytest.mark.parametrize("make", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy])
def test_a_copy_of_a_model_works_alone(make):
    rng = np.random.default_rng(11)
    model, batch = mlp((3, 4, 2)), make_batch(rng, 5, (3, 4, 2))
    expected = model.outer(model.params, {}, batch)[1]
    np.testing.assert_array_equal(make(model).outer(model.params, {}, batch)[1], expected)


def test_threads_do_not_share_memory():
    rng = np.random.default_rng(12)
    model, batch = mlp((8, 40, 5)), make_batch(rng, 30, (8, 40, 5))
    thetas = [model.params * (1 + i) for i in range(4)]
    expected = [model.outer(theta, {}, batch)[1] for theta in thetas]
    wrong = []

    def work(theta, g):
        for _ in range(50):
            if not np.array_equal(model.outer(theta, {}, batch)[1], g):
                wrong.append(theta)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(thetas, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_hold_over_the_whole_line(activation):
    """A network of one unit with weight 1 is the activation itself; 5 units in the last place."""
    x = np.concatenate([np.linspace(-60, 60, 4001), np.logspace(-300, 2, 500), -np.logspace(-300, 2, 500), [0.0]])
    model = mlp((1, 1, 1), activation=activation, loss="squared_error", params=[1.0, 0.0, 1.0, 0.0])
    y = model.predict(model.params, x[:, None])[:, 0]
    expected = reference.ACTIVATION[activation][0](x)
    np.testing.assert_allclose(y, expected, rtol=1.2e-15, atol=1e-15 if activation == "gelu" else 0)


def test_models_start_random_by_seed_and_predict():
    model = mlp((64, 32, 10), activation="relu", seed=3)
    np.testing.assert_array_equal(model.params, mlp((64, 32, 10), activation="relu", seed=3).params)
    assert not np.array_equal(model.params, mlp((64, 32, 10), activation="relu").params)
    assert model.segments == (65 * 32, 33 * 10)
    assert model.params[:2048].std() == pytest.approx(np.sqrt(2 / 64), rel=0.1)  # 2,048 draws: 1.6 % a sigma
    assert not model.params[2048:2080].any()
    X = np.random.default_rng(0).normal(size=(5, 64))
    assert model.predict(model.params, X).shape == (5, 10)
    assert model.accuracy(model.params, X, model.predict(model.params, X).argmax(1)) == 1.0
    assert model.hyper == {"l2", "label_smoothing", "class_weights", "example_weights"}
    assert mlp((2, 2), loss="squared_error").hyper == {"l2", "example_weights"}
    assert model.note == "exact"
    assert difference_error(model, model.params, {}, (X, np.arange(5))) < 1e-9


def test_features_of_any_real_dtype_and_layout_are_taken():
    X = np.arange(12).reshape(3, 4)
    model, y = mlp((4, 3, 2)), np.array([0, 1, 1])
    expected = model.outer(model.params, {}, (X.astype(float), y))[1]
    for other in (X.astype(np.uint8), np.asfortranarray(X.astype(float)), X.astype(np.float32)):
        np.testing.assert_array_equal(model.outer(model.params, {}, (other, y.astype(np.int32)))[1], expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations_let_nan_through_and_saturate_at_infinity(activation, dtype):
    model = mlp((1, 1, 1), activation=activation, loss="squared_error", params=[1.0, 0.0, 1.0, 0.0], dtype=dtype)
    at_nan, high, low = model.ready.network.outputs(model.params, np.array([[np.nan], [np.inf], [-np.inf]]))[:, 0]
    assert np.isnan(at_nan)
    assert (high, low) == ((1, -1) if activation == "tanh" else (np.inf, 0))


# -- divergence and bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1e200, np.inf, np.nan])
def test_diverged_parameters_give_a_loss_that_is_not_finite_and_no_error(activation, size):
    rng = np.random.default_rng(13)
    sizes = (3, 4, 2)
    model, (X, y, _) = mlp(sizes, activation=activation, loss="squared_error"), make_batch(rng, 5, sizes, "squared_error")
    theta = np.full_like(model.params, size)
    value, _, _ = model.grad_jvp(theta, {}, np.ones((2, len(theta))), {}, (X, y))
    assert not np.isfinite(value)
    assert not np.isfinite(model.outer(theta, {}, (X, y))[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_batch_that_is_not_finite_is_found_wherever_it_hides(activation, bad):
    rng = np.random.default_rng(14)
    model, (X, y, _) = mlp((3, 4, 2), activation=activation), make_batch(rng, 5, (3, 4, 2))
    X[4, 2] = bad
    calls = (
        lambda: model.grad_jvp(model.params, {}, np.zeros((0, len(model.params))), {}, (X, y)),
        lambda: model.outer(model.params, {}, (X, y)),
        lambda: model.outer_hvp(model.params, {}, model.params[None], (X, y)),
    )
    for call in calls:
        with pytest.raises(AdapterError, match=r"batch must be finite, got X\[4, 2\]"):
            call()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_targets_that_are_not_finite_are_found(bad):
    rng = np.random.default_rng(15)
    model, (X, y, _) = mlp((3, 4, 2), loss="squared_error"), make_batch(rng, 5, (3, 4, 2), "squared_error")
    y[3, 1] = bad
    with pytest.raises(AdapterError, match=r"got y\[3, 1\]"):
        model.outer(model.params, {}, (X, y))


X, Y = np.zeros((4, 3)), np.array([0, 1, 1, 0])
BAD_BATCHES = {
    "a batch is": (X,),
    "got ndarray": X,
    r"X must be \(n, 3\)": (np.zeros((4, 2)), Y),
    "n >= 1": (X[:0], Y[:0]),
    "of complex128": (X + 0j, Y),
    "integer labels": (X, Y.astype(float)),
    "got shape \\(3,\\)": (X, Y[:3]),
    r"labels must be in 0..1, got y\[2\] = 2": (X, np.array([0, 1, 2, 0])),
    r"got y\[1\] = -1": (X, np.array([0, -1, 1, 0])),
}


@pytest.mark.parametrize("message", BAD_BATCHES)
def test_a_wrong_batch_is_named(message):
    model = mlp((3, 4, 2))
    with pytest.raises(AdapterError, match=message):
        model.outer(model.params, {}, BAD_BATCHES[message])
    with pytest.raises(AdapterError, match=message):
        model.grad_jvp(model.params, {}, np.zeros((1, len(model.params))), {}, BAD_BATCHES[message])


def test_a_label_in_a_later_block_is_named_by_its_own_position():
    X, y = np.zeros((600, 3)), np.zeros(600, int)
    y[555] = 9
    with pytest.raises(AdapterError, match=r"y\[555\] = 9"):
        mlp((3, 2)).outer(mlp((3, 2)).params, {}, (X, y))


@pytest.mark.parametrize(
    ("hyper", "batch", "message"),
    [
        ({"l22": 0.1}, (X, Y), r"Did you mean 'l2'"),
        ({"l2": np.ones(3)}, (X, Y), r"l2 must be a scalar or \(2,\), got shape \(3,\)"),
        ({"label_smoothing": np.ones(2)}, (X, Y), "label_smoothing must be a scalar, got shape"),
        ({"class_weights": np.ones(3)}, (X, Y), r"class_weights must be \(2,\)"),
        ({"example_weights": np.ones((2, 2))}, (X, Y), r"example_weights must be \(n_train,\)"),
        ({"example_weights": np.ones(9)}, (X, Y), "positions in the training set"),
        ({"example_weights": np.ones(9)}, (X, Y, np.arange(3)), r"index must be \(4,\) integers in 0..8"),
        ({"example_weights": np.ones(9)}, (X, Y, np.arange(4.0)), "of float64"),
        ({"example_weights": np.ones(9)}, (X, Y, np.arange(4) + 6), "from 6 to 9"),
        ({"example_weights": np.ones(9)}, (X, Y, np.arange(4) - 1), "from -1 to 2"),
    ],
)
def test_wrong_loss_hyperparameters_are_named(hyper, batch, message):
    model = mlp((3, 4, 2))
    dhyper = {name: np.zeros((1, *np.shape(value))) for name, value in hyper.items()}
    with pytest.raises(AdapterError, match=message):
        model.grad_jvp(model.params, hyper, np.zeros((1, len(model.params))), dhyper, batch)


def test_wrong_flat_arrays_and_tangents_are_named():
    model = mlp((3, 4, 2))
    p = len(model.params)
    with pytest.raises(AdapterError, match=rf"theta must be \({p},\)"):
        model.outer(model.params[1:], {}, (X, Y))
    with pytest.raises(AdapterError, match=r"of float64, got .* of float32"):
        model.outer(model.params.astype(np.float32), {}, (X, Y))
    with pytest.raises(AdapterError, match=rf"the tangents \(q, {p}\)"):
        model.grad_jvp(model.params, {}, np.zeros((2, p - 1)), {}, (X, Y))
    with pytest.raises(AdapterError, match="tangent of l2"):
        model.grad_jvp(model.params, {"l2": 0.1}, np.zeros((2, p)), {"l2": np.zeros(3)}, (X, Y))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp((3,)), "two or more positive widths"),
        (lambda: mlp((3, 0, 2)), "positive widths"),
        (lambda: mlp((3, 2.5)), "positive widths"),
        (lambda: mlp((3, 2), activation="tahn"), "Did you mean 'tanh'"),
        (lambda: mlp((3, 2), loss="mse"), "'cross_entropy', 'squared_error', got 'mse'"),
        (lambda: mlp((3, 2), dtype=np.float16), "float32 or float64"),
        (lambda: mlp((3, 2), params=np.zeros(7)), r"params must be \(8,\)"),
        (lambda: mlp((3, 2), l2=-1.0), "l2 must be finite and not negative"),
        (lambda: mlp((3, 2), class_weights=[1.0, np.nan]), "class_weights must be finite"),
        (lambda: mlp((3, 2), label_smoothing=1.5), r"label_smoothing must lie in \[0, 1\]"),
        (lambda: mlp((3, 2), l2=np.ones(2)), "l2 must be a scalar, got"),
        (lambda: mlp((3, 2), class_weights=np.ones(3)), r"class_weights must be \(2,\)"),
        (lambda: mlp((3, 2), loss="squared_error", label_smoothing=0.1), "'label_smoothing'"),
    ],
)
def test_a_model_that_cannot_be_is_refused(make, message):
    with pytest.raises(AdapterError, match=message):
        make()
