"""Forward mode is exact: against central differences, against reverse mode, and against closed forms."""

import numpy as np
import pytest
import reference
import toys

from koopman_hpo import Problem, Space, check_hypergradient, hypergradient, inner, log, logit, trajectory

LR = log(0.05)
WD = log(0.02)
BETAS = {"beta1": logit(0.8), "beta2": logit(0.95), "eps": log(1e-3)}
CASES = {
    "sgd": (inner.sgd, {}, {"lr": LR, "momentum": logit(0.8), "dampening": logit(0.3), "weight_decay": WD}),
    "nesterov": (inner.sgd, {"nesterov": True}, {"lr": LR, "momentum": logit(0.8), "weight_decay": WD}),
    "adam": (inner.adam, {}, {"lr": LR, "weight_decay": WD, **BETAS}),
    "adamw": (inner.adamw, {}, {"lr": LR, "weight_decay": WD, **BETAS}),
    "rmsprop": (
        inner.rmsprop,
        {},
        {"lr": LR, "alpha": logit(0.9), "momentum": logit(0.5), "eps": log(1e-2), "weight_decay": WD},
    ),
    "centered": (
        inner.rmsprop,
        {"centered": True},
        {"lr": LR, "alpha": logit(0.9), "momentum": logit(0.5), "eps": log(1e-1), "weight_decay": WD},
    ),
    "adagrad": (inner.adagrad, {}, {"lr": LR, "lr_decay": log(0.1), "eps": log(1e-2), "weight_decay": WD}),
    "lion": (inner.lion, {}, {"lr": log(1e-3), "beta1": logit(0.8), "beta2": logit(0.9), "weight_decay": WD}),
}
STEPS = 12


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """A run with every hyperparameter of one optimizer and the loss's l2 tuned, on a new batch each step."""
    make, flags, tuned = CASES[request.param]
    problem = toys.logistic(np.random.default_rng(3).normal(size=5))
    space = Space(**tuned, l2=log(0.1))
    run = make(problem, space, **flags)
    return run, flags, toys.batches(1, STEPS), toys.data(7)


def test_agrees_with_central_differences_for_every_optimizer_and_hyperparameter(case):
    run, _, batches, val = case
    report = check_hypergradient(run, batches, val)
    assert report.error[report.central != 0].max() < 1e-6, str(report)
    assert report.ok, str(report)


def test_agrees_with_reverse_mode_for_every_optimizer_and_hyperparameter(case):
    run, flags, batches, val = case
    values = run.space.natural(run.space.phi0)
    # theta's part of the outer gradient at fixed l2, then the direct part by hand: .1 sum(theta_T)
    outer = lambda theta: run.problem.outer(theta, values, val)[1]
    gradient, theta0 = toys.logistic_gradient, run.problem.params
    hyper = lambda t, phi: dict(zip(values, phi, strict=True))
    found = reference.reverse(run.rule.name, gradient, theta0, hyper, np.array([*values.values()]), batches, outer, **flags)
    want = dict(zip(values, found, strict=True))
    end = reference.train(run.rule.name, gradient, theta0, lambda t: values, batches, **flags)
    want["l2"] += 0.1 * end.sum()
    got = hypergradient(run, batches, val).natural
    scale = max(abs(v) for v in want.values())
    for name in run.space.names:
        # 1e-10 of the largest coordinate: a coordinate that is zero (lion's betas) has no scale of its own
        np.testing.assert_allclose(got[name], want[name], rtol=1e-10, atol=1e-14 * scale, err_msg=name)


def test_takes_the_textbook_steps(case):
    run, flags, batches, _ = case
    values = run.space.natural(run.space.phi0)
    want = reference.train(run.rule.name, toys.logistic_gradient, run.problem.params, lambda t: values, batches, **flags)
    before = run.snapshot()
    for batch in batches:
        run.step(run.space.phi0, batch, tangents=False)
    np.testing.assert_allclose(run.params, want, rtol=1e-13)
    run.restore(before)


@pytest.mark.parametrize("T", [1, 2, 17])
def test_gradient_descent_on_a_quadratic_has_its_closed_form(T):
    rng, lr = np.random.default_rng(0), 0.3
    A, theta0 = toys.spd(rng, 4), rng.normal(size=4)
    run = inner.sgd(toys.quadratic(A, np.zeros(4), theta0), Space(lr=log(lr)))
    for _ in range(T):
        run.step(run.space.phi0, None)
    want = -T * A @ np.linalg.matrix_power(np.eye(4) - lr * A, T - 1) @ theta0
    np.testing.assert_allclose(run.tangents[0] / lr, want, rtol=1e-12)


def test_heavy_ball_on_a_quadratic_has_its_closed_form():
    rng, lr, mu, T = np.random.default_rng(1), 0.1, 0.7, 15
    A, theta0 = toys.spd(rng, 4), rng.normal(size=4)
    run = inner.sgd(toys.quadratic(A, np.zeros(4), theta0), Space(lr=log(lr), momentum=logit(mu)))
    for _ in range(T):
        run.step(run.space.phi0, None)
    # (theta, m) moves by a matrix M(lr, mu): d M^T = sum over M^(T-1-i) dM M^i; the first step has an empty buffer
    I, O = np.eye(4), np.zeros((4, 4))
    M = np.block([[I - lr * A, -lr * mu * I], [A, mu * I]])
    derivatives = [np.block([[-A, -mu * I], [O, O]]) * lr, np.block([[O, -lr * I], [O, I]]) * mu * (1 - mu)]
    power = lambda n: np.linalg.matrix_power(M, n)
    start = np.concatenate([theta0, np.zeros(4)])
    for Z, dM in zip(run.tangents, derivatives, strict=True):
        want = sum(power(T - 1 - i) @ dM @ power(i) for i in range(T)) @ start
        np.testing.assert_allclose(Z, want[:4], rtol=1e-11, atol=1e-14)


def test_adam_on_a_linear_loss_does_not_depend_on_its_betas():
    rng = np.random.default_rng(2)
    run = inner.adam(toys.linear(rng.normal(size=6), rng.normal(size=6)), Space(beta1=logit(0.9), beta2=logit(0.999)))
    for _ in range(30):
        run.step(run.space.phi0, None)
    # zero but for rounding in m_hat = (1 - b1^t) g / (1 - b1^t), amplified by 1 / (1 - b2) = 1000
    assert np.abs(run.tangents).max() < 1e-14


def test_ridge_tangent_tends_to_the_implicit_derivative():
    rng, l2 = np.random.default_rng(4), 0.2
    X, y = toys.data(3)

    def grad_jvp(theta, hyper, Z, dhyper, batch):
        g = X.T @ (X @ theta - y) / len(y) + hyper["l2"] * theta
        dG = Z @ X.T @ X / len(y) + hyper["l2"] * Z + np.outer(dhyper["l2"], theta)
        return 0.0, g, dG

    problem = Problem(rng.normal(size=5), grad_jvp, lambda th, h, b: (0.0, th, {}), hyper=frozenset({"l2"}))
    run = inner.sgd(problem, Space(l2=log(l2)), lr=0.3, momentum=0.5)
    for _ in range(600):
        run.step(run.space.phi0, None)
    A = X.T @ X / len(y) + l2 * np.eye(5)
    theta = np.linalg.solve(A, X.T @ y / len(y))
    np.testing.assert_allclose(run.tangents[0] / l2, -np.linalg.solve(A, theta), rtol=1e-10)


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_a_shared_lr_is_the_sum_over_steps_and_over_layers(name):
    make = getattr(inner, name)
    theta0, batches, val = np.random.default_rng(5).normal(size=5), toys.batches(2, 8), toys.data(9)
    problem = toys.logistic(theta0, segments=(2, 3))
    h = lambda space: hypergradient(make(problem, space), batches, val).grad
    shared = h(Space(lr=log(0.05)))[0]
    layers = h(Space(lr=log([0.05, 0.05])))
    steps = h(Space(lr=log([0.05] * 8, knots=range(8), schedule="constant")))
    np.testing.assert_allclose([layers.sum(), steps.sum()], shared, rtol=1e-12)
    assert np.abs(np.diff(layers)).max() > 1e-6  # they are not all alike
    assert np.abs(np.diff(steps)).min() > 0


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_schedules_and_groups_agree_with_central_differences(schedule):
    problem = toys.logistic(np.random.default_rng(6).normal(size=5), segments=(1, 4))
    space = Space(
        lr=log([[0.05, 0.1], [0.02, 0.01], [0.2, 0.3]], knots=(0, 4, 9), schedule=schedule),
        momentum=logit([0.8, 0.6]),
        weight_decay=log([1e-2, 1e-1], knots=(0, 6), schedule=schedule),
        l2=log(0.1),
    )
    report = check_hypergradient(inner.sgd(problem, space), toys.batches(3, 12), toys.data(5))
    assert report.error.max() < 1e-6, str(report)


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_the_height_of_a_given_schedule_is_the_sum_over_its_knots(name):
    """value_k = height * factor_k: on a log scale the height's derivative is the sum of the knots'."""
    make, batches, val = getattr(inner, name), toys.batches(2, 12), toys.data(9)
    problem = toys.logistic(np.random.default_rng(5).normal(size=5), segments=(2, 3))
    h = lambda lr: hypergradient(make(problem, Space(lr=lr)), batches, val).grad
    height = h(log([0.05, 0.1], knots=(0, 5, 12), factors=(0.5, 1.0, 0.0)))
    apart = h(log([[0.025, 0.05], [0.05, 0.1], [1e-300, 1e-300]], knots=(0, 5, 12), bounds=(0, 1)))
    np.testing.assert_allclose(height, apart.reshape(3, 2)[:2].sum(axis=0), rtol=1e-10)
    report = check_hypergradient(make(problem, Space(lr=log(0.05, knots=(0, 12), factors=(1, 0)))), batches, val)
    assert report.error.max() < 1e-6, str(report)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "lion"])
def test_a_value_shared_out_to_groups_has_the_derivative_of_the_weighted_sum(name):
    """value_g = height * share_g: on a log scale the height's derivative is the sum of the groups' own."""
    make, batches, val = getattr(inner, name), toys.batches(2, 12), toys.data(9)
    problem = toys.logistic(np.random.default_rng(5).normal(size=5), segments=(2, 3))
    h = lambda **space: hypergradient(make(problem, Space(**space)), batches, val).grad
    shared = h(lr=log(0.05, shares=(1, 2)), weight_decay=log(0.1, shares=(1, 0)))
    apart = h(lr=log([0.05, 0.1]), weight_decay=log([0.1, 1e-300], bounds=(0, 1)))
    np.testing.assert_allclose(shared, apart.reshape(2, 2).sum(axis=1), rtol=1e-10)
    run = make(
        problem, Space(lr=log(0.05, shares=(1, 0), knots=(0, 12), factors=(1, 0)), weight_decay=log(0.1, shares=(0, 1)))
    )
    report = check_hypergradient(run, batches, val)
    assert report.error.max() < 1e-6, str(report)


@pytest.mark.parametrize(("name", "flags"), [("sgd", {}), ("adamw", {}), ("rmsprop", {"centered": True})])
def test_schedules_and_groups_agree_with_reverse_mode(name, flags):
    theta0, batches, val = np.random.default_rng(6).normal(size=5), toys.batches(3, 10), toys.data(5)
    problem = toys.logistic(theta0, segments=(1, 4))
    own = {"sgd": "momentum", "adamw": "beta1", "rmsprop": "alpha"}[name]
    fixed = {"sgd": {}, "adamw": {"beta2": 0.95, "eps": 1e-3}, "rmsprop": {"momentum": 0.5, "eps": 1e-1}}[name]
    space = Space(
        lr=log([[0.05, 0.1], [0.02, 0.01], [0.2, 0.3]], knots=(0, 4, 8)),
        **{own: logit([0.8, 0.6])},
        weight_decay=log([1e-2, 1e-1], knots=(0, 6), schedule="constant"),
        l2=log(0.1),
    )
    group = np.array([0, 1, 1, 1, 1])

    def hyper(t, phi):
        lr, wd = np.exp(phi[:6]).reshape(3, 2), np.exp(phi[8:10])
        k, share = (0, t / 4) if t < 4 else (1, (t - 4) / 4) if t < 8 else (1, 1.0)
        return {
            "lr": ((1 - share) * lr[k] + share * lr[k + 1])[group],
            own: (1 / (1 + np.exp(-phi[6:8])))[group],
            "weight_decay": wd[int(t >= 6)],
            "l2": np.exp(phi[10]),
            **fixed,
        }

    l2 = {"l2": np.exp(space.phi0[-1])}
    run = getattr(inner, name)(problem, space, **fixed, **flags)
    want = reference.reverse(
        name, toys.logistic_gradient, theta0, hyper, space.phi0, batches, lambda th: problem.outer(th, l2, val)[1], **flags
    )
    for batch in batches:
        run.step(space.phi0, batch)
    want[-1] += l2["l2"] * problem.outer(run.params, l2, val)[2]["l2"]  # the direct part
    np.testing.assert_allclose(run.hypergradient(val).grad, want, rtol=1e-10)


def test_a_vector_longer_than_a_block_is_the_sum_of_its_parameters():
    """2,500 parameters in groups that end within a block, each its own quadratic: compared with reverse mode of a few."""
    rng, p, T = np.random.default_rng(11), 2500, 4
    a, theta0 = rng.uniform(0.5, 2, p), rng.normal(size=p)
    problem = Problem(
        theta0,
        lambda th, h, Z, dh, b: (0.5 * a @ th**2, a * th, a * Z),
        lambda th, h, b: (0.5 * th @ th, th, {}),
        hyper=frozenset(),
        segments=(1000, 1500),
    )
    space = Space(lr=log([0.05, 0.02]), beta1=logit(0.8), beta2=logit(0.95))
    run = inner.adam(problem, space, eps=1e-3)
    for _ in range(T):
        run.step(space.phi0, None)
    for group, some in ((0, [0, 511, 999]), (1, [1000, 1023, 1024, 2023, 2024, 2047, 2048, 2499])):
        hyper = lambda t, phi: {
            "lr": np.exp(phi[0]),
            "beta1": 1 / (1 + np.exp(-phi[1])),
            "beta2": 1 / (1 + np.exp(-phi[2])),
            **{"eps": 1e-3, "weight_decay": 0.0},
        }
        phi = space.phi0[[group, 2, 3]]
        for i in some:
            gradient = lambda th, h, b, i=i: a[i] * th
            want = reference.reverse("adam", gradient, theta0[[i]], hyper, phi, [None] * T, lambda th: np.ones(1))
            np.testing.assert_allclose(run.tangents[[group, 2, 3], i], want, rtol=1e-10)
            assert run.tangents[1 - group, i] == 0


def test_without_momentum_there_is_no_buffer_to_damp():
    problem, space = toys.logistic(np.ones(5)), Space(lr=log(0.1))
    ends = []
    for dampening in (0.0, 0.5):
        run = inner.sgd(problem, space, dampening=dampening)
        for batch in toys.batches(7, 5):
            run.step(space.phi0, batch)
        ends.append((run.params, run.tangents))
    assert np.array_equal(ends[0][0], ends[1][0])
    assert np.array_equal(ends[0][1], ends[1][1])


def test_a_variance_of_zero_stays_zero_under_rounding():
    c = np.random.default_rng(0).normal(size=200)
    run = inner.rmsprop(toys.linear(c, np.ones(200)), Space(lr=log(0.01), alpha=logit(0.7)), centered=True)
    for _ in range(200):  # a constant gradient: v - a^2 tends to zero, and rounding takes it below
        run.step(run.space.phi0, None)
    assert np.isfinite(run.params).all()
    assert np.isfinite(run.tangents).all()


def test_adagrad_starts_from_its_accumulator():
    c = np.array([0.5, -2.0])
    run = inner.adagrad(toys.linear(c, np.ones(2)), Space(lr=log(0.1)), initial_accumulator=0.3)
    run.step(run.space.phi0, None)
    np.testing.assert_allclose(run.params, 1 - 0.1 * c / (np.sqrt(0.3 + c**2) + 1e-10), rtol=1e-14)


def test_permuting_hyperparameters_permutes_the_hypergradient():
    problem, batches, val = toys.logistic(np.ones(5)), toys.batches(4, 6), toys.data(1)
    parts = {"lr": log(0.05), "momentum": logit(0.8), "l2": log(0.1), "weight_decay": log(0.01)}
    h = hypergradient(inner.sgd(problem, Space(**parts)), batches, val).natural
    back = hypergradient(inner.sgd(problem, Space(**dict(reversed(parts.items())))), batches, val).natural
    assert h == back


def test_an_unused_hyperparameter_has_exactly_zero():
    problem = toys.quadratic(np.eye(3), np.zeros(3), np.ones(3))
    run = inner.sgd(problem, Space(lr=log([0.1, 0.2], knots=(0, 100), schedule="constant")))
    grad = hypergradient(run, [None] * 5, None).grad
    assert grad[1] == 0.0
    assert grad[0] != 0.0


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_chunks_of_tangents_change_nothing(chunk):
    problem, batches, val = toys.logistic(np.ones(5)), toys.batches(5, 6), toys.data(2)
    space = Space(lr=log(0.05), momentum=logit(0.8), l2=log(0.1), weight_decay=log(0.01))
    whole = trajectory(inner.sgd(problem, space), batches, val)
    parts = trajectory(inner.sgd(problem, space, chunk=chunk), batches, val)
    np.testing.assert_allclose(parts, whole, rtol=1e-13)  # BLAS may order a sum by its size


def test_all_random_directions_together_are_exact_and_few_are_unbiased():
    problem, batches, val = toys.logistic(np.ones(5)), toys.batches(6, 6), toys.data(3)
    space = Space(lr=log([0.05] * 6, knots=range(6), schedule="constant"), momentum=logit(0.8), l2=log(0.1))
    exact = hypergradient(inner.sgd(problem, space), batches, val).grad
    full = hypergradient(inner.sgd(problem, space, directions=8, seed=1), batches, val).grad
    np.testing.assert_allclose(full, exact, rtol=1e-11)
    draws = np.array(
        [hypergradient(inner.sgd(problem, space, directions=3, seed=s), batches, val).grad for s in range(2000)]
    )
    # five standard errors of the mean over the draws
    assert (np.abs(draws.mean(0) - exact) < 5 * draws.std(0) / np.sqrt(len(draws))).all()


def test_directions_are_reproducible_and_fresh_after_forgetting():
    problem, space = toys.logistic(np.ones(5)), Space(lr=log(0.05), momentum=logit(0.8), l2=log(0.1))
    one, two = (inner.sgd(problem, space, directions=2, seed=4) for _ in range(2))
    assert np.array_equal(one.directions, two.directions)
    saved = one.snapshot()
    one.forget(0)
    assert not np.array_equal(one.directions, two.directions)
    after = one.directions
    one.restore(saved)
    assert np.array_equal(one.directions, two.directions)
    one.forget(0)
    assert np.array_equal(one.directions, after)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "lion"])
def test_single_precision_follows_double(name):
    make, rng = getattr(inner, name), np.random.default_rng(8)
    A, b, theta0 = toys.spd(rng, 5), rng.normal(size=5), rng.normal(size=5)
    space = Space(lr=log(0.02), weight_decay=log(0.01))
    ends = []
    for dtype in (np.float32, np.float64):
        run = make(toys.quadratic(A, b, theta0, dtype=dtype), space)
        for _ in range(40):
            run.step(space.phi0, None)
        assert run.params.dtype == run.tangents.dtype == dtype
        ends.append((run.params, run.tangents, run.hypergradient(None).grad))
    for single, double in zip(*ends, strict=True):
        # 40 steps of rounding at 6e-8, relative to the largest entry
        np.testing.assert_allclose(single, double, atol=2e-5 * np.abs(double).max())


def test_a_parameter_without_gradient_stays_put_under_adam():
    run = inner.adam(toys.linear(np.array([0.0, 1.0]), np.ones(2)), Space(lr=log(0.1), beta2=logit(0.99), eps=log(1e-8)))
    for _ in range(5):
        run.step(run.space.phi0, None)
    assert run.params[0] == 1.0
    assert (run.tangents[:, 0] == 0).all()
    assert np.isfinite(run.tangents).all()


def test_converged_training_forgets_its_lr():
    rng = np.random.default_rng(9)
    run = inner.sgd(toys.quadratic(toys.spd(rng, 4), rng.normal(size=4), rng.normal(size=4)), Space(lr=log(0.5)))
    H = trajectory(run, [None] * 200, None, every=50)
    assert np.abs(H[-1]).max() < 1e-10
    assert np.abs(H[0]).max() > 1e3 * np.abs(H[-1]).max()


def test_a_hypergradient_that_is_no_number_is_in_error():
    """An error of nothing would look like agreement."""
    base = toys.logistic(np.zeros(5))
    outer = lambda theta, hyper, batch: (*base.outer(theta, hyper, batch)[:1], np.full_like(theta, np.nan), {})
    problem = Problem(base.params, base.grad_jvp, outer, hyper=base.hyper)
    report = check_hypergradient(inner.sgd(problem, Space(lr=log(0.1), l2=log(0.1))), toys.batches(2, 4), toys.data(9))
    assert np.isinf(report.error).all()
    assert not report.ok
