"""The model-based operator: exact where the frozen model is, noisy quadratics, errors, gate, bad input."""

from itertools import permutations

import numpy as np
import pytest
import toys
from koopman_hpo_adapters.numpy import mlp, softmax_regression

from koopman_hpo import AdapterError, HyperparameterError, NotFrozenError, Problem, ShapeError, Space, inner, log, logit
from koopman_hpo.krylov import Forecast, estimate, roll
from koopman_hpo.krylov.frozen import Coefficients, Small, along, sensitivity, step
from koopman_hpo.krylov.noise import gathered

P, T, SHORT = 12, 300, 60
rng = np.random.default_rng(0)
A, B, START = toys.spd(rng, P, 0.02, 2.0), rng.normal(size=P), rng.normal(size=P)


def quadratic(penalty=False, dtype=np.float64):
    """`1/2 t'At - b't`, with `l2 / 2 |t|^2` if asked for; two groups."""
    plain = toys.quadratic(A, B, START, target=np.ones(P), dtype=dtype)

    def grad_jvp(theta, hyper, Z, dhyper, batch):
        loss, g, dG = plain.grad_jvp(theta, hyper, Z, dhyper, batch)
        w = theta.dtype.type(hyper["l2"])
        dG = dG + w * Z
        if "l2" in dhyper:
            dG = dG + np.outer(dhyper["l2"], theta).astype(theta.dtype)
        return loss + 0.5 * w * theta @ theta, g + w * theta, dG

    names = frozenset({"l2"} if penalty else ())
    return Problem(plain.params, grad_jvp if penalty else plain.grad_jvp, plain.outer, hyper=names, segments=(5, 7))


def after(run, steps, batch=None):
    for _ in range(steps):
        run.step(run.space.phi0, batch)
    return run


def rest(run, steps, batch=None, val=None):
    """The exact hypergradient, by going on."""
    return after(run, steps, batch).hypergradient(val).grad


def apart(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


momentum = {"momentum": logit(0.8)}
VARIANTS = {
    "lr": lambda: inner.sgd(quadratic(), Space(lr=log(0.1))),
    "momentum and decay": lambda: inner.sgd(quadratic(), Space(lr=log(0.1), weight_decay=log(1e-2), **momentum)),
    "nesterov": lambda: inner.sgd(quadratic(), Space(lr=log(0.1), weight_decay=log(1e-2), **momentum), nesterov=True),
    "dampening": lambda: inner.sgd(quadratic(), Space(lr=log(0.1), dampening=logit(0.3), **momentum)),
    "groups": lambda: inner.sgd(
        quadratic(), Space(lr=log([0.1, 0.2]), momentum=logit([0.8, 0.5]), weight_decay=log([1e-2, 3e-2]))
    ),
    "fixed groups": lambda: inner.sgd(quadratic(), Space(lr=log(0.1)), momentum=[0.8, 0.5], weight_decay=[0.0, 3e-2]),
    "loss": lambda: inner.sgd(quadratic(penalty=True), Space(lr=log(0.1), l2=log(0.05), **momentum)),
    "ramp": lambda: inner.sgd(quadratic(), Space(lr=log([0.1, 0.2, 0.05], knots=(0, 50, 250)), **momentum)),
    "to nothing": lambda: inner.sgd(quadratic(), Space(lr=log(0.1, knots=(0, 150), factors=(1, 0)), **momentum)),
    "to nothing and back": lambda: inner.sgd(
        quadratic(), Space(lr=log(0.1, knots=(0, 20, 90), factors=(1, 0, 1)), **momentum)
    ),
    "nothing": lambda: inner.sgd(quadratic(), Space(lr=log(0.1, knots=(0, 10), factors=(1, 0)), **momentum)),
    "one group warms up": lambda: inner.sgd(quadratic(), Space(lr=log([[0.01, 0.9], [0.1, 0.9]], knots=(0, 100)))),
    "shares": lambda: inner.sgd(
        quadratic(), Space(lr=log(0.1, shares=(1, 2)), weight_decay=log(1e-2, shares=(1, 0)), **momentum)
    ),
    "steps": lambda: inner.sgd(
        quadratic(),
        Space(lr=log([0.1, 0.05], knots=(0, 90), schedule="constant"), momentum=logit([0.8, 0.5], knots=(0, 100))),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("midpoint", [True, False])
@pytest.mark.parametrize("begun", [0, 20])
def test_is_exact_for_a_quadratic_in_full_columns(name, midpoint, begun):
    run = after(VARIANTS[name](), begun)
    found = estimate(run, None, None, T - begun, columns=P, midpoint=midpoint)
    assert apart(found.estimate, rest(run, T - begun)) < 1e-9
    assert found.accepted
    np.testing.assert_array_equal(found.value, found.estimate)


def test_the_undamped_first_step_is_no_edge():
    """Its momentum is empty: a step ten times as long as the others cannot grow."""
    run = inner.sgd(quadratic(), Space(lr=log(3.0), weight_decay=log(1e-2)), momentum=0.9, dampening=0.9)
    found = estimate(run, None, None, SHORT, columns=P)
    assert apart(found.estimate, rest(run, SHORT)) < 1e-9
    assert found.edge < 0.5


def test_growth_is_clipped_by_the_way_and_not_by_the_slowest_step():
    """Negative curvature adds about e in a stage, also where lr falls to nothing in it."""
    steep = Problem(START, lambda th, hy, Z, dh, b: (0.0, -0.5 * th, -0.5 * Z), lambda th, hy, b: (th @ th / 2, th, {}))
    run = inner.sgd(steep, Space(lr=log(0.2, knots=(0, T), factors=(1, 0))))
    found = estimate(run, None, None, T, columns=P)
    grown = lambda value: np.log(value / (START @ START / 2)) / 2 / len(found.stages)
    assert 1 < grown(found.outer_loss) < 1.5 < grown(after(run, T).hypergradient(None).value)


@pytest.mark.parametrize(("lr", "dampening"), [(log([0.1, 3.0]), [0.0, 0.9]), (log(0.1, shares=(1, 0)), 0.0)])
@pytest.mark.parametrize("begun", [0, 20])
def test_each_group_has_an_edge_of_its_own(begun, lr, dampening):
    """One takes long steps that are damped, or none, the other short ones."""
    run = after(inner.sgd(quadratic(), Space(lr=lr, **momentum), dampening=dampening), begun)
    found = estimate(run, None, None, SHORT - begun, columns=P)
    assert apart(found.estimate, rest(run, SHORT - begun)) < 1e-9
    assert found.edge < 0.5


@pytest.mark.parametrize("stages", [1, 4])
def test_is_exact_in_any_number_of_stages(stages):
    run = after(VARIANTS["groups"](), 20)
    assert apart(estimate(run, None, None, 1, columns=P, stages=stages).estimate, rest(after(run, 0), 1)) < 1e-12
    found = estimate(run, None, None, T, columns=99, stages=stages)
    assert max(found.basis) <= P
    assert apart(found.estimate, rest(run, T)) < 1e-9


def test_follows_random_directions():
    space = Space(lr=log(0.1), weight_decay=log(1e-2), **momentum)
    runs = [inner.sgd(quadratic(), space, directions=d, seed=3) for d in (None, 3)]
    full, along = (estimate(after(run, 20), None, None, T, columns=P).estimate for run in runs)
    assert apart(along, full) < 1e-9  # as many directions as coordinates lose nothing


def test_single_precision_agrees_to_its_digits():
    space = Space(lr=log(0.1), l2=log(0.05), **momentum)
    run = after(inner.sgd(quadratic(penalty=True, dtype=np.float32), space), 20)
    found = estimate(run, None, None, 100, columns=P).estimate
    assert apart(found, rest(run, 100)) < 2e-3


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop"])
def test_adaptive_rules_are_exact_where_their_preconditioner_stands_still(name):
    """With a large eps the second moment hardly counts: what is left is the rule's own arithmetic."""
    beta = {"momentum": logit(0.5)} if name == "rmsprop" else {"beta1": logit(0.5)}
    space = Space(lr=log(1e3), eps=log(1e5), weight_decay=log(2e-5 if name == "adamw" else 1e-2), **beta)
    run = after(getattr(inner, name)(quadratic(), space), 60)
    found = estimate(run, None, None, SHORT, columns=P).estimate
    np.testing.assert_allclose(found, rest(run, SHORT), rtol=1e-3)


def test_adam_per_group_and_centered_rmsprop():
    groups = Space(lr=log([1e3, 5e2]), eps=log([1e5, 5e4]), weight_decay=log([1e-2, 3e-2]))
    for run in (inner.adam(quadratic(), groups), inner.rmsprop(quadratic(), groups, centered=True)):
        found = estimate(after(run, 60), None, None, SHORT, columns=P).estimate
        np.testing.assert_allclose(found, rest(run, SHORT), rtol=2e-3)


# -- mini-batches ---------------------------------------------------------------------------------------------------

MODES, HORIZON, WINDOW, NOISE, MU = 200, 2000, 50, 0.3, 0.9
CURVATURE = np.logspace(-3, 0, MODES)


def noisy(theta):
    """A quadratic of 200 modes, condition 1e3, whose gradient noise has its Hessian as covariance; also the outer loss."""

    def grad_jvp(theta, hyper, Z, dhyper, batch):
        noise = 0.0 if batch is None else NOISE * np.sqrt(CURVATURE) * batch
        return 0.5 * theta @ (CURVATURE * theta), CURVATURE * theta + noise, Z * CURVATURE

    outer = lambda theta, hyper, batch: (0.5 * theta @ (CURVATURE * theta), CURVATURE * theta, {})
    return Problem(theta, grad_jvp, outer, hyper=frozenset(), outer_hvp=lambda theta, hyper, V, batch: V * CURVATURE)


def expected(run, steps, j=0):
    """d E[outer loss] / d phi_j, of log lr, after so many steps from the run's state: mean and covariance of each mode, by
    recursion and one complex step."""
    e = 1e-30
    now = run.snapshot()
    d = now["theta"] + 1j * e * now["Z"][j]
    v = now["slots"][0] + 1j * e * now["dslots"][0][j]
    dd, dv, vv = np.zeros((3, MODES), complex)
    white = CURVATURE * NOISE**2
    for t in range(run.t, run.t + steps):
        at = run.space.at(run.phi, t)
        rate = at.values["lr"] + 1j * e * at.seeds["lr"][j]
        v = MU * v + CURVATURE * d
        d = d - rate * v
        vv, dv = MU**2 * vv + 2 * MU * CURVATURE * dv + CURVATURE**2 * dd + white, MU * dv + CURVATURE * dd
        dd, dv = dd - 2 * rate * dv + rate**2 * vv, dv - rate * vv
    return 0.5 * np.sum(CURVATURE * (d**2 + dd)).imag / e


def test_the_noise_term_gives_the_sign_of_lr_on_a_noisy_quadratic():
    right = {"none": 0, "independent": 0}
    for seed in range(3):
        for lr in np.logspace(-3, -0.5, 10):
            draw = np.random.default_rng(seed)
            run = inner.sgd(noisy(draw.normal(size=MODES)), Space(lr=log(lr)), momentum=MU)
            for _ in range(WINDOW):
                run.step(run.space.phi0, draw.normal(size=MODES))
            batches = [draw.normal(size=MODES) for _ in range(16)]
            want = expected(run, HORIZON - WINDOW)
            for kind in right:
                noise = {"noise": kind, "batches": batches} if kind != "none" else {}
                found = estimate(run, None, None, HORIZON - WINDOW, seed=seed, **noise)
                right[kind] += bool(np.sign(found.estimate[0]) == np.sign(want))
                if kind == "independent" and lr > 0.02:
                    assert abs(found.estimate[0] / want - 1) < 0.2
    assert right["independent"] >= 29
    assert right["none"] <= 15


@pytest.mark.parametrize(
    "lr",
    [
        log(0.2, knots=(0, HORIZON), factors=(1, 0)),
        log(0.2, knots=(0, HORIZON), factors=(1, 0.1)),
        log([0.2, 0.07, 0.02], knots=(0, HORIZON // 2, HORIZON)),
    ],
    ids=["to nothing", "to a tenth", "knots"],
)
def test_the_noise_term_knows_the_schedule(lr):
    """Noise of long steps fades while short ones are taken: the last coefficients alone leave nearly nothing."""
    draw = np.random.default_rng(0)
    run = inner.sgd(noisy(draw.normal(size=MODES)), Space(lr=lr), momentum=MU)
    for _ in range(WINDOW):
        run.step(run.space.phi0, draw.normal(size=MODES))
    batches = [draw.normal(size=MODES) for _ in range(32)]
    found = estimate(run, None, None, HORIZON - WINDOW, noise="independent", batches=batches)
    want = np.array([expected(run, HORIZON - WINDOW, j) for j in range(run.space.q)])
    assert np.linalg.norm(found.estimate - want) < 0.3 * np.linalg.norm(want)
    assert (np.abs(found.estimate - want) < 1.5 * found.error + 0.01 * np.abs(want).max()).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 7, 8])
def test_noise_without_replacement_is_that_of_all_orders(steps):
    draw = np.random.default_rng(steps)
    step, J = 0.5 * draw.normal(size=(4, 4)), draw.normal(size=(4, 2))
    noise = draw.normal(size=(3, 2))
    noise -= noise.mean(axis=0)
    orders = list(permutations(range(3)))

    def taken(order, state):
        for i in order:
            state = step @ state + J @ noise[i]
        return state

    ends = [np.zeros(4)]
    for epoch in range(0, steps, 3):
        ends = [taken(order[: steps - epoch], x) for x in ends for order in orders]
    want = np.einsum("ni,nj->ij", ends, ends) / len(ends)
    got = gathered(step, J, noise.T @ noise / 3, steps, 3)[2]
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_independent_noise_is_the_plain_recursion():
    draw = np.random.default_rng(0)
    step, J, C = 0.4 * draw.normal(size=(4, 4)), draw.normal(size=(4, 2)), np.diag([1.0, 2.0])
    want = np.zeros((4, 4))
    for _ in range(13):
        want = step @ want @ step.T + J @ C @ J.T
    np.testing.assert_allclose(gathered(step, J, C, 13, None)[2], want, rtol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("runs", [(), (5,)])
def test_the_step_differentiated_backward_is_its_complex_step(nesterov, inside, runs):
    """With weights on every entry, three groups, and every coefficient moving; also for several runs at once."""
    draw, m, n, q = np.random.default_rng(3), 4, 3, 7
    few = lambda *shape: draw.normal(size=(*runs, *shape))
    small = Small(
        few(m, m), few(m), few(n, m, m), few(n, m, m), few(n, m), few(n, m), np.array([0.5, 2, 3]), nesterov, inside
    )
    at = Coefficients(draw.normal(size=(6, n)), draw.normal(size=(6, q, n)))
    weights = few(2 * m + 1, 2 * m + 1)

    def contracted(c):
        A = step(small, c)[0]
        return np.sum(A * weights, axis=tuple(range(1, A.ndim)))

    np.testing.assert_allclose(sensitivity(small, at, weights), along(contracted, at, batch=len(runs)), rtol=1e-12)


# -- a network ------------------------------------------------------------------------------------------------------


def network(opt="sgd", seed=0, **space):
    model = mlp((6, 8, 3), seed=seed)
    draw = np.random.default_rng(seed)
    X = draw.normal(size=(400, 6))
    y = np.argmax(X[:, :3] + 0.5 * draw.normal(size=(400, 3)), axis=1)
    return getattr(inner, opt)(model, Space(**space)), (X[:300], y[:300]), (X[300:], y[300:])


SETTINGS = {
    "sgd": ("sgd", {"lr": log(0.03), "momentum": logit(0.9), "weight_decay": log(1e-2)}),
    "loss": ("sgd", {"lr": log(0.1), "l2": log([1e-2, 1e-3]), "class_weights": log([1.0, 2.0, 0.5])}),
    "adam": ("adam", {"lr": log(2e-3), "beta1": logit(0.9), "weight_decay": log(1e-2)}),
    "adamw": ("adamw", {"lr": log(2e-3), "weight_decay": log(0.1)}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_network_window_beats_its_last_value(name):
    opt, space = SETTINGS[name]
    for seed in range(3):
        run, train, val = network(opt, seed, **space)
        after(run, 100, train).forget(0)
        after(run, 30, train)
        last, found = run.hypergradient(val).grad, estimate(run, train, val, 400)
        want = rest(run, 400, train, val)
        away = np.linalg.norm(found.estimate - want)
        assert away < 0.5 * np.linalg.norm(last - want)
        assert away < 3 * np.linalg.norm(found.error)  # an estimate, not a bound


def test_counts_what_the_outer_loss_owes_to_the_hyperparameters_directly():
    data = toys.data(0, n=200)
    run = after(inner.sgd(toys.logistic(np.zeros(5)), Space(l2=log(0.3), lr=log(0.2))), 20, data)
    found = estimate(run, data, data, 200, columns=5).estimate
    want = rest(run, 200, data, data)
    direct = 0.1 * 0.3 * run.params.sum()
    assert abs(direct) > 0.1 * abs(want[0])
    np.testing.assert_allclose(found[0], want[0], rtol=1e-3)


@pytest.mark.parametrize("begun", [20, 40])
def test_adam_counts_its_bias_correction(begun):
    """beta1 = 0.95, so that it matters for a hundred steps; not every step is read, so not to the last digit."""
    run = after(inner.adam(quadratic(), Space(lr=log(3e2), eps=log(1e5), beta1=logit(0.95))), begun)
    found = estimate(run, None, None, 30, columns=P).estimate
    np.testing.assert_allclose(found, rest(run, 30), rtol=3e-3)


def test_more_columns_and_stages_are_nearer():
    run, train, val = network(lr=log(0.02), momentum=logit(0.9), weight_decay=log(1e-3))
    after(run, 100, train)
    few, many = (
        estimate(run, train, val, 300, columns=c, stages=s, midpoint=m, tolerance=t).estimate
        for c, s, m, t in ((4, 1, False, 0.02), (60, 4, True, 0))
    )
    want = rest(run, 300, train, val)
    assert apart(many, want) < 0.02
    assert apart(few, want) > 5 * apart(many, want)


def test_a_tighter_tolerance_takes_more_products_and_is_nearer():
    run, train, val = network(lr=log(0.02), momentum=logit(0.9), weight_decay=log(1e-3))
    after(run, 30, train)
    loose, tight, every = (estimate(run, train, val, 200, columns=60, tolerance=x) for x in (0.2, 1e-3, 0))
    want = rest(run, 200, train, val)
    assert loose.hvps < tight.hvps < every.hvps
    assert max(every.basis) == 60
    assert apart(tight.estimate, want) < 0.3 * apart(loose.estimate, want)


def test_momentum_joins_where_it_counts():
    """A velocity that has nothing to do with the gradient, which steers the first steps."""
    run = after(VARIANTS["momentum and decay"](), 30)
    before = run.snapshot()
    before["slots"] = 3 * np.random.default_rng(1).normal(size=before["slots"].shape)
    run.restore(before)
    found = estimate(run, None, None, 12, columns=8)
    assert apart(found.estimate, rest(run, 12)) < 0.05  # .085 without


def test_few_columns_are_less_sure_than_all():
    run = after(VARIANTS["momentum and decay"](), 30)
    every, few = (estimate(run, None, None, 200, columns=n) for n in (P, 3))
    assert apart(few.estimate, every.estimate) > 1e-3  # or there would be nothing to be unsure of
    assert few.deviation > 10 * every.deviation


def test_stages_are_cut_where_the_frozen_gradient_goes_astray_and_stretched_where_not():
    fast, train, val = network(lr=log(0.1), momentum=logit(0.9))
    found = estimate(after(fast, 10, train), train, val, 400, stages=2)
    assert found.stages[0] < 154  # as planned: 400 * 0.6 / (1.6**2 - 1)
    assert len(found.stages) <= 4
    calm = estimate(after(VARIANTS["lr"](), 20), None, None, 400, stages=5)
    assert len(calm.stages) < 5


def test_the_first_stage_too_has_its_hessian_in_its_middle():
    for seed in range(3):
        run, train, val = network(seed=seed, lr=log(0.02), momentum=logit(0.9))
        after(run, 100, train)
        at_start, at_middle = (estimate(run, train, val, 300, midpoint=m) for m in (False, True))
        assert at_middle.stages[0] >= at_start.stages[0]
        assert at_middle.bends[0] < 0.5 * at_start.bends[0]


def test_a_stage_with_others_behind_it_may_leave_out_more(monkeypatch):
    draw, p = np.random.default_rng(5), 80
    stiff = toys.quadratic(toys.spd(draw, p, 1e-3, 2.0), draw.normal(size=p), draw.normal(size=p), target=np.ones(p))
    run = after(inner.sgd(stiff, Space(lr=log(0.1), **momentum)), 20)
    found = estimate(run, None, None, 400, columns=60)
    monkeypatch.setattr(roll, "EARLY", 1.0)
    every, want = estimate(run, None, None, 400, columns=60), rest(run, 400)
    assert found.basis[0] < every.basis[0]
    assert found.deviation < 1.6 * every.deviation  # what it leaves out counts for as much less
    assert apart(found.estimate, want) < 1e-3


def test_says_what_it_did_and_moves_nothing():
    run, train, val = network(lr=log(0.1), l2=log([1e-2, 1e-3]))
    after(run, 30, train)
    before, t = run.snapshot(), run.t
    batches = [tuple(part[i : i + 8] for part in train) for i in range(0, 80, 8)]
    found, again = (estimate(run, train, val, 200, noise="epoch", batches=batches, samples=4, seed=5) for _ in range(2))
    assert isinstance(found, Forecast)
    np.testing.assert_array_equal(found.value, again.value)
    assert run.t == t
    for name, array in run.snapshot().items():
        np.testing.assert_array_equal(array, before[name])
    assert sum(found.stages) == 200
    assert len(found.stages) == len(found.spectrum) == len(found.basis)
    assert found.hvps >= sum(found.basis)
    assert found.mixed > 0
    assert 0 < found.noise_share < 1
    other = estimate(run, train, val, 200, noise="epoch", batches=batches, samples=4, seed=6)
    assert not np.array_equal(other.estimate, found.estimate)


def test_a_horizon_of_ten_million_steps_is_finite_and_settled():
    run = after(VARIANTS["loss"](), 20)
    far, farther = (estimate(run, None, None, n, columns=P).estimate for n in (10**5, 10**7))
    np.testing.assert_allclose(far[1], farther[1], rtol=1e-6)  # l2 has a limit, lr and momentum fade
    assert np.abs(farther[[0, 2]]).max() < 1e-6 * abs(farther[1])


def test_zero_steps_are_the_current_value():
    run = after(VARIANTS["lr"](), 20)
    found = estimate(run, None, None, 0)
    np.testing.assert_array_equal(found.value, run.hypergradient(None).grad)
    assert found.accepted
    assert not found.error.any()


def test_a_closed_gate_gives_the_last_value_and_says_so():
    run, train, val = network(lr=log(0.3), momentum=logit(0.9))
    after(run, 10, train)
    found = estimate(run, train, val, 300, gate=1e-9)
    assert not found.accepted
    assert "last value" in found.reason
    assert "gate" in found.reason
    np.testing.assert_array_equal(found.value, run.hypergradient(val).grad)
    assert not np.array_equal(found.estimate, found.value)


@pytest.mark.parametrize("steps", [0, 100])
def test_a_diverged_run_is_not_believed(steps):
    run = inner.sgd(quadratic(), Space(lr=log(30.0)))
    with np.errstate(all="ignore"):
        after(run, 600)
    found = estimate(run, None, None, steps)
    assert not found.accepted
    assert "finite" in found.reason


def test_training_that_will_grow_is_not_believed():
    """The one mode that grows is still too small to be seen in anything else."""
    slope, start = np.array([0.3, 0.5, 1.02]), np.array([2.0, -1.0, 1.0 + 1e-9])
    model = toys.quadratic(np.diag(slope), slope, start, target=np.zeros(3))
    run = inner.sgd(model, Space(lr=log(2.0)))
    found = estimate(run, None, None, 800)
    assert found.edge == pytest.approx(1.02)
    assert found.deviation < 0.5
    assert not found.accepted
    assert "training grows" in found.reason
    assert after(run, 800).hypergradient(None).value > 1e6


def test_adam_begins_with_the_first_gradients_preconditioner():
    """Of moments that are still nothing it is the inverse of eps, and training would be gone in a step."""
    for seed in range(3):
        run, train, val = network("adam", seed, lr=log(3e-3), beta1=logit(0.9), weight_decay=log(1e-3))
        found, want = estimate(run, train, val, 100), rest(run, 100, train, val)
        assert np.linalg.norm(found.estimate - want) < 0.2 * np.linalg.norm(want)


@pytest.mark.parametrize("centered", [False, True])
def test_rmsprop_begins_with_what_half_a_stage_leaves(centered):
    """Of a loss whose slope is the same everywhere it knows the way: a stage's mean is that of its middle, nearly."""
    flat = Problem(
        np.ones(2), lambda th, hy, Z, dh, b: (th.sum(), np.ones(2), 0 * Z), lambda th, hy, b: (th.sum(), np.ones(2), {})
    )
    run = inner.rmsprop(flat, Space(lr=log(1e-3)), alpha=0.9, centered=centered)
    found = estimate(run, None, None, 10, stages=1)
    assert found.estimate == pytest.approx(rest(run, 10), rel=0.15)


@pytest.mark.parametrize("more", [{}, {"lr": log(2e-3)}])
def test_what_acts_on_the_preconditioner_alone_keeps_its_current_value(more):
    run, train, val = network("adam", beta2=logit(0.99), **more)
    after(run, 30, train)
    now, found = run.hypergradient(val).grad, estimate(run, train, val, 200)
    beta2 = run.space.where("beta2")
    np.testing.assert_array_equal(found.value[beta2], now[beta2])
    if not more:
        assert not found.accepted
        return
    assert found.accepted
    assert "beta2 as now" in found.reason
    np.testing.assert_array_equal(found.error[beta2], np.abs(now[beta2]))
    plain, train, val = network("adam", **more)
    alone = estimate(after(inner.adam(plain.problem, plain.space, beta2=0.99), 30, train), train, val, 200)
    np.testing.assert_allclose(found.value[run.space.where("lr")], alone.value, rtol=1e-9)
    assert found.deviation == pytest.approx(alone.deviation)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"steps": -1}, HyperparameterError, "steps"),
        ({"steps": 2.5}, HyperparameterError, "steps"),
        ({"columns": 1}, HyperparameterError, "columns"),
        ({"stages": 0}, HyperparameterError, "stages"),
        ({"noise": "epoche"}, HyperparameterError, "epoch"),
        ({"noise": "epoch"}, ShapeError, "batches"),
        ({"noise": "epoch", "batches": [None]}, ShapeError, "at least two"),
        ({"noise": "epoch", "batches": (None, None)}, ShapeError, "list of mini-batches"),
        ({"tolerance": 1.0}, HyperparameterError, "tolerance"),
        ({"gate": 0.0}, HyperparameterError, "gate"),
        ({"seed": -1}, HyperparameterError, "seed"),
    ],
)
def test_refuses_what_makes_no_sense(change, error, says):
    run = after(VARIANTS["lr"](), 5)
    with pytest.raises(error, match=says):
        estimate(run, None, None, **({"steps": 10} | change))


def test_refuses_a_run_that_cannot_be_frozen():
    with pytest.raises(AdapterError, match="adagrad has no frozen step"):
        estimate(inner.adagrad(quadratic(), Space(lr=log(0.1))), None, None, 10)
    with pytest.raises(AdapterError, match=r"optimizer is known: .* jax\.problem"):
        estimate(object(), None, None, 10)
    ramp = Space(lr=log(0.1), l2=log([0.05, 0.06], knots=(0, 100)))
    with pytest.raises(NotFrozenError, match="'l2' changes the loss with the step"):
        estimate(inner.sgd(quadratic(penalty=True), ramp), None, None, 10)
    with pytest.raises(HyperparameterError, match="its space is empty"):
        estimate(inner.sgd(quadratic(), Space(), lr=0.1), None, None, 10)


def test_the_cost_does_not_grow_with_the_number_of_hyperparameters():
    """One model, its hyperparameters once as they are and once a value for each of many groups: 2 and 42 of them."""
    draw = np.random.default_rng(0)
    X = draw.normal(size=(80, 6))
    batch = X, draw.integers(0, 3, 80)
    found = []
    for n in (None, 21):
        spread = (lambda x: x) if n is None else (lambda x, n=n: [x] * n)
        space = Space(lr=log(spread(0.05)), momentum=logit(spread(0.8)))
        run = after(inner.sgd(softmax_regression(6, 3), space, groups=None if n is None else (1,) * n), 20, batch)
        found.append(estimate(run, batch, batch, 100, columns=8))
    few, many = found
    assert (few.hvps, few.gradients) == (many.hvps, many.gradients)
    np.testing.assert_allclose(many.estimate.reshape(2, 21).sum(axis=1), few.estimate, rtol=1e-8)
