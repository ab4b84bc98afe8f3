"""Hand-written models: central differences and their error, and every broken promise named."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from koopman_hpo_adapters.numpy import difference_error, mlp, problem

from koopman_hpo import AdapterError, ShapeError, Space, check_hypergradient, hypergradient, inner, log, logit

DIFFERENCES = 1e-9  # fourth order at a step of 7e-4 of each scale: rounding and truncation are both near 1e-11
SINGLE = 5e-4  # the same in float32, near 1e-5 of the gradient, which may exceed its derivative


def quartic(theta, hyper, batch):
    """Loss and gradient of 1/2 |theta - batch|^2 + l2/2 |theta|^2 + sum(c * theta^4) / 4, all smooth."""
    l2, c = hyper.get("l2", 0.0), hyper.get("c", np.ones(3))
    loss = 0.5 * np.sum((theta - batch) ** 2) + 0.5 * l2 * np.sum(theta**2) + np.sum(c * theta**4) / 4
    return loss, (theta - batch + l2 * theta + c * theta**3).astype(theta.dtype)


def quartic_tangent(theta, hyper, Z, dhyper, batch):
    """The exact rows dG."""
    dG = Z * (1 + hyper.get("l2", 0.0) + 3 * hyper.get("c", np.ones(3)) * theta**2)
    if "l2" in hyper:
        dG = dG + dhyper["l2"][:, None] * theta
    if "c" in hyper:
        dG = dG + dhyper["c"] * theta**3
    return (*quartic(theta, hyper, batch), dG)


def distance(theta, hyper, batch):
    return 0.5 * np.sum((theta - batch) ** 2), theta - batch


THETA, BATCH = np.array([0.5, -1.5, 2.0]), np.array([1.0, 0.0, -1.0])
HYPER = {"l2": 0.1, "c": np.array([0.2, 0.3, 0.4])}


def make(**changes):
    return problem(THETA, **({"grad": quartic, "outer": distance} | changes))


def tangents(q, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(q, 3)), {"l2": rng.normal(size=q), "c": rng.normal(size=(q, 3))}


# -- central differences -----------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(-6, 6),
    z_scale=st.floats(-12, 12),
    hyper_scale=st.floats(-6, 3),
)
def test_differences_are_exact_on_any_scale(seed, scale, z_scale, hyper_scale):
    """Of a cubic gradient fourth-order differences have no truncation error; rounding stays relative to its scale."""
    rng = np.random.default_rng(seed)
    theta, batch = 10**scale * rng.normal(size=3), 10**scale * rng.normal(size=3)
    hyper = {"l2": 10**hyper_scale, "c": 10 ** (hyper_scale - 2 * scale) * rng.uniform(0.5, 1, 3)}
    Z, dhyper = 10**z_scale * rng.normal(size=(2, 3)), {"l2": hyper["l2"] * np.array([1.0, 0.0]), "c": np.zeros((2, 3))}
    loss, g, dG = make().grad_jvp(theta, hyper, Z, dhyper, batch)
    expected_loss, expected_g, expected = quartic_tangent(theta, hyper, Z, dhyper, batch)
    assert loss == expected_loss
    np.testing.assert_array_equal(g, expected_g)
    # each of the two differences carries the gradient's rounding over its step, 1e-12 of the gradient times |d| / scale
    size = np.abs(expected_g).max() + 10**scale
    moved = np.abs(Z).max(axis=1) / np.sqrt(np.mean(theta**2)) + np.array([1.0, 0.0])
    assert np.all(np.abs(dG - expected) <= 1e-11 * size * moved[:, None])


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, DIFFERENCES), (np.float32, SINGLE)])
def test_differences_match_the_exact_tangents_and_say_so(dtype, tolerance):
    model = problem(THETA.astype(dtype), grad=quartic, outer=distance)
    Z, dhyper = tangents(4)
    _, g, dG = model.grad_jvp(model.params, HYPER, Z.astype(dtype), dhyper, BATCH.astype(dtype))
    expected = quartic_tangent(THETA, HYPER, Z, dhyper, BATCH)[2]
    assert g.dtype == dG.dtype == dtype
    np.testing.assert_allclose(dG, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    assert "central differences" in model.note
    assert "difference_error" in model.note
    assert difference_error(model, model.params, HYPER, BATCH.astype(dtype)) < tolerance


def test_directions_that_are_zero_are_exactly_zero_and_cost_nothing():
    calls = []
    model = make(grad=lambda *args: calls.append(1) or quartic(*args))
    Z, dhyper = np.zeros((3, 3)), {"l2": np.array([0.0, 0.0, 1.0]), "c": np.zeros((3, 3))}
    Z[0] = 1
    _, _, dG = model.grad_jvp(THETA, HYPER, Z, dhyper, BATCH)
    assert not dG[1].any()
    assert len(calls) == 1 + 4 + 0 + 4  # the gradient, then four for each direction that moves


def test_a_name_that_grad_never_reads_has_exactly_no_hypergradient():
    space = Space(lr=log(0.1), l2=log(0.1), unread=log(3.0))
    h = hypergradient(inner.sgd(make(), space), [BATCH] * 5, BATCH)
    assert h.natural["unread"] == 0.0
    assert h.natural["l2"] != 0.0


def test_difference_error_exposes_a_wrong_grad_jvp():
    wrong = lambda th, hyper, Z, dhyper, batch: (
        *quartic(th, hyper, batch),
        1.01 * quartic_tangent(th, hyper, Z, dhyper, batch)[2],
    )
    assert difference_error(make(grad_jvp=quartic_tangent), THETA, HYPER, BATCH) < DIFFERENCES
    assert difference_error(make(grad_jvp=wrong), THETA, HYPER, BATCH) == pytest.approx(0.01, rel=0.01)
    flat = problem(THETA, grad=lambda th, hyper, batch: (0.0, np.zeros(3)), outer=distance)
    assert difference_error(flat, THETA, {}, None) == 0.0


def test_differences_of_a_network_match_its_exact_tangents():
    rng = np.random.default_rng(0)
    exact, batch = mlp((3, 5, 2)), (rng.normal(size=(6, 3)), rng.integers(0, 2, 6))
    grad = lambda theta, hyper, batch: exact.grad_jvp(theta, {}, np.empty((0, theta.size)), {}, batch)[:2]
    model = problem(exact.params, grad=grad, outer=exact.outer)
    Z = rng.normal(size=(3, exact.params.size))
    expected = exact.grad_jvp(exact.params, {}, Z, {}, batch)[2]
    actual = model.grad_jvp(exact.params, {}, Z, {}, batch)[2]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=DIFFERENCES * np.abs(expected).max())


# -- the user's functions ----------------------------------------------------------------------------------------------


def test_a_hand_written_model_tunes_optimizer_and_loss_together():
    space = Space(lr=log(0.05), momentum=logit(0.5), l2=log(0.1))
    batches = [BATCH * s for s in np.linspace(0.5, 1.5, 8)]
    by_differences = hypergradient(inner.sgd(make(), space), batches, BATCH)
    by_hand = hypergradient(inner.sgd(make(grad_jvp=quartic_tangent), space), batches, BATCH)
    np.testing.assert_allclose(by_differences.grad, by_hand.grad, rtol=1e-8)  # eight steps of DIFFERENCES each
    assert check_hypergradient(inner.sgd(make(grad_jvp=quartic_tangent), space), batches, BATCH).ok


def test_a_direct_derivative_of_the_outer_loss_arrives():
    penalised = lambda th, hyper, batch: (*distance(th, hyper, batch), {"l2": 2.0, "c": np.arange(3.0)})
    value, dE, direct = make(outer=penalised).outer(THETA, HYPER, BATCH)
    assert value == distance(THETA, HYPER, BATCH)[0]
    np.testing.assert_array_equal(dE, THETA - BATCH)
    assert direct["l2"] == 2.0
    np.testing.assert_array_equal(direct["c"], np.arange(3.0))
    declared = make(outer=penalised, hyper=("l2", "c"))
    assert declared.hyper == {"l2", "c"}
    assert list(declared.outer(THETA, {"l2": 0.1}, BATCH)[2]) == ["l2"]  # c is held fixed: nobody asks


def test_the_users_functions_cannot_touch_the_engines_arrays():
    seen = {}

    def grad(theta, hyper, batch):
        seen["grad"] = theta, hyper["c"]
        return quartic(theta, hyper, batch)

    def grad_jvp(theta, hyper, Z, dhyper, batch):
        seen["grad_jvp"] = theta, Z, hyper["c"], dhyper["c"]
        return quartic_tangent(theta, hyper, Z, dhyper, batch)

    model = make(grad=grad, grad_jvp=grad_jvp)
    theta, hyper, (Z, dhyper) = THETA.copy(), {"l2": 0.1, "c": np.ones(3)}, tangents(2)
    model.grad_jvp(theta, hyper, Z, dhyper, BATCH)
    model.grad_jvp(theta, hyper, Z[:0], {k: d[:0] for k, d in dhyper.items()}, BATCH)
    for arrays in seen.values():
        for array in arrays:
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
    theta[0] = Z[0, 0] = hyper["c"][0] = 9.0  # the engine's own are as they were


def test_results_may_be_the_arguments_or_memory_that_is_reused():
    """Of 1/2 |theta|^2 the gradient is theta and its tangents are Z; the engine then writes into its own in place."""
    identity = problem(
        THETA,
        grad=lambda th, hyper, batch: (0.5 * th @ th, th),
        outer=lambda th, hyper, batch: (0.5 * th @ th, th),
        grad_jvp=lambda th, hyper, Z, dhyper, batch: (0.5 * th @ th, th, Z),
        outer_hvp=lambda th, hyper, V, batch: V,
    )
    Z = np.ones((2, 3))
    _, g, dG = identity.grad_jvp(THETA, {}, Z, {}, None)
    HV = identity.outer_hvp(THETA, {}, Z, None)
    for result in (g, dG, HV, identity.outer(THETA, {}, None)[1], identity.grad_jvp(THETA, {}, Z[:0], {}, None)[1]):
        result[...] = 7.0
    np.testing.assert_array_equal(Z, np.ones((2, 3)))
    assert THETA[0] == 0.5

    buffer = np.empty(3)

    def reuse(theta, hyper, batch):
        loss, buffer[...] = quartic(theta, hyper, batch)
        return loss, buffer

    Z, dhyper = tangents(2)
    _, g, dG = make(grad=reuse).grad_jvp(THETA, HYPER, Z, dhyper, BATCH)
    _, expected_g, expected = make().grad_jvp(THETA, HYPER, Z, dhyper, BATCH)
    np.testing.assert_array_equal(g, expected_g)
    np.testing.assert_array_equal(dG, expected)


def test_params_are_copied_and_segments_kept():
    params = THETA.copy()
    model = problem(params, grad=quartic, outer=distance, segments=[1, 2])
    params[0] = 9.0
    assert model.params[0] == 0.5
    assert model.segments == (1, 2)


# -- broken promises ---------------------------------------------------------------------------------------------------

GRADS = {
    r"grad: must return \(loss, g\), got one ndarray": lambda th, hyper, b: th,
    r"got 3 values": lambda th, hyper, b: (1.0, th, th),
    r"grad: loss must be one real number, got shape \(3,\)": lambda th, hyper, b: (th, th),
    r"got shape \(1,\)": lambda th, hyper, b: (th[:1], th),
    r"of dtype complex128": lambda th, hyper, b: (1j, th),
    r"grad: g must be an array of shape \(3,\).* got \(2,\)": lambda th, hyper, b: (1.0, th[:2]),
    r"got \(3, 1\)": lambda th, hyper, b: (1.0, th[:, None]),
    r"of float32": lambda th, hyper, b: (1.0, th.astype(np.float32)),
    r"of int64": lambda th, hyper, b: (1.0, np.zeros(3, np.int64)),
    r"got list": lambda th, hyper, b: (1.0, list(th)),
    r"read hyper\['l22'\], .*Did you mean 'l2'": lambda th, hyper, b: (hyper["l22"], th),
}


@pytest.mark.parametrize("message", GRADS)
def test_a_grad_that_breaks_the_contract_is_named(message):
    with pytest.raises(AdapterError, match=message):
        make(grad=GRADS[message]).grad_jvp(THETA, HYPER, *tangents(1), BATCH)


OUTERS = {
    r"outer: must return \(value, dE_dtheta, \{name: dE_dhyper\}\), got one float": lambda th, hyper, b: 1.0,
    r"outer: value must be one real number": lambda th, hyper, b: (th, th),
    r"outer: dE_dtheta must be": lambda th, hyper, b: (1.0, th[1:]),
    r"third part must be a dict .* got float": lambda th, hyper, b: (1.0, th, 1.0),
    r"names 'l22', .*Did you mean 'l2'": lambda th, hyper, b: (1.0, th, {"l22": 1.0}),
    r"dE_dhyper\['c'\] must have the hyperparameter's shape \(3,\), got \(\)": lambda th, hyper, b: (1.0, th, {"c": 1.0}),
}


@pytest.mark.parametrize("message", OUTERS)
def test_an_outer_that_breaks_the_contract_is_named(message):
    with pytest.raises(AdapterError, match=message):
        make(outer=OUTERS[message]).outer(THETA, HYPER, BATCH)


JVPS = {
    r"grad_jvp: must return \(loss, g, dG\), got 2 values": lambda th, hyper, Z, dhyper, b: (1.0, th),
    r"grad_jvp: dG must be an array of shape \(2, 3\).* got \(3, 2\)": lambda th, hyper, Z, dhyper, b: (1.0, th, Z.T),
    r"grad_jvp: g must be": lambda th, hyper, Z, dhyper, b: (1.0, th[1:], Z),
    r"grad_jvp: loss must be": lambda th, hyper, Z, dhyper, b: (th, th, Z),
}


@pytest.mark.parametrize("message", JVPS)
def test_a_grad_jvp_that_breaks_the_contract_is_named(message):
    with pytest.raises(AdapterError, match=message):
        make(grad_jvp=JVPS[message]).grad_jvp(THETA, HYPER, *tangents(2), BATCH)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (AdapterError, "grad must be a function, got float", {"grad": 1.0}),
        (AdapterError, "outer must be a function, got NoneType", {"outer": None}),
        (AdapterError, "grad_jvp must be a function, got str", {"grad_jvp": "exact"}),
        (AdapterError, r"use \('l2',\)", {"hyper": "l2"}),
        (ShapeError, "segments must be", {"segments": (1, 1)}),
    ],
)
def test_a_problem_that_cannot_be_is_refused(error, message, changes):
    with pytest.raises(error, match=message):
        make(**changes)


@pytest.mark.parametrize("params", [np.zeros((3, 1)), np.zeros(3, int), np.array([1.0, np.nan]), [1, 2], []])
def test_params_that_are_not_flat_finite_floats_are_refused(params):
    with pytest.raises(ShapeError, match="params must be"):
        problem(params, grad=quartic, outer=distance)
