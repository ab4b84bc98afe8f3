"""The inner run: contract, snapshots, forgetting, linearisation, and what it refuses before anything moves."""

import copy

import numpy as np
import pytest
import toys

from koopman_hpo import (
    AdapterError,
    HyperparameterError,
    Inner,
    Problem,
    ShapeError,
    Space,
    check_hypergradient,
    hypergradient,
    identity,
    inner,
    log,
    logit,
    trajectory,
)

SPACE = Space(lr=log(0.05), momentum=logit(0.8), l2=log(0.1))
BATCHES, VAL = toys.batches(1, 10), toys.data(7)


def make(space=SPACE, **options):
    return inner.sgd(toys.logistic(np.linspace(-1, 1, 5)), space, **options)


def state(run):
    return {k: v.copy() for k, v in run.snapshot().items()}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_core_run_fills_the_contract():
    assert isinstance(make(), Inner)


def test_a_window_is_its_steps():
    one, two = make(), make()
    losses, H = one.run(SPACE.phi0, BATCHES, VAL, every=3)
    want = []
    for n, batch in enumerate(BATCHES, 1):
        two.step(SPACE.phi0, batch)
        if n % 3 == 0:
            want.append(two.hypergradient(VAL).grad)
    assert losses.shape == (10,)
    assert np.array_equal(H, want)
    assert same(state(one), state(two))


def test_plain_steps_move_the_parameters_alike_and_leave_the_tangents():
    one, two = make(), make()
    for batch in BATCHES:
        assert one.step(SPACE.phi0, batch) == two.step(SPACE.phi0, batch, tangents=False)
    assert np.array_equal(one.params, two.params)
    assert not two.tangents.any()


@pytest.mark.parametrize("options", [{}, {"directions": 2, "seed": 3}])
def test_a_restored_run_repeats_itself_bit_for_bit(options):
    run = make(**options)
    run.run(SPACE.phi0, BATCHES[:4], VAL)
    saved = run.snapshot()
    run.forget(0)
    first = run.run(SPACE.phi0, BATCHES[4:], VAL)[1]
    after = state(run)
    run.restore(saved)
    run.forget(0)
    assert np.array_equal(run.run(SPACE.phi0, BATCHES[4:], VAL)[1], first)
    assert same(state(run), after)


def test_a_restored_run_forgets_the_phi_and_directions_it_had():
    run = make(directions=2)
    saved, elsewhere = run.snapshot(), SPACE.phi0 + 0.1
    run.run(elsewhere, BATCHES[:1], VAL)
    want = state(run)
    run.forget(0)
    run.run(elsewhere, BATCHES[:1], VAL)  # along other directions
    run.restore(saved)
    run.run(elsewhere, BATCHES[:1], VAL)
    assert same(state(run), want)


@pytest.mark.parametrize("options", [{}, {"directions": 2, "seed": 3}])
def test_a_copy_is_a_run_of_its_own(options):
    one, still = make(**options), make(**options)
    two = copy.deepcopy(one)
    want = one.run(SPACE.phi0, BATCHES, VAL)
    got = two.run(SPACE.phi0, BATCHES, VAL)
    assert np.array_equal(got[0], want[0])
    assert np.array_equal(got[1], want[1])
    assert not np.array_equal(two.params, still.params)
    two.step(SPACE.phi0, BATCHES[0], tangents=False)
    assert not np.array_equal(two.params, one.params)


def test_a_refused_batch_leaves_phi_alone():
    run = make()
    run.step(SPACE.phi0, BATCHES[0])
    with pytest.raises(TypeError):
        run.step(SPACE.phi0 + 1, None)
    assert np.array_equal(run.phi, SPACE.phi0)
    run.step(SPACE.phi0 + 1, BATCHES[0])
    assert np.array_equal(run.phi, SPACE.phi0 + 1)


def test_a_column_is_no_phi_the_second_time_either():
    run = make()
    run.step(SPACE.phi0, BATCHES[0])
    with pytest.raises(ShapeError, match="phi"):
        run.step(SPACE.phi0[:, None], BATCHES[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("t"),
        lambda s: s.pop("rng"),
        lambda s: s.update(t=np.array("later")),
        lambda s: s.update(t=np.array([1, 2])),
        lambda s: s.update(rng=np.array("{}")),
        lambda s: s.update(rng=np.array(3)),
        lambda s: s.update(theta=s["theta"].astype(np.float32)),
        lambda s: s.update(directions=s["directions"][:1]),
        lambda s: s.update(phi=[0.0, 0.0, 0.0]),
    ],
)
def test_a_snapshot_that_does_not_fit_moves_nothing(change):
    run, other = make(directions=2), make(directions=2, seed=1)
    other.run(SPACE.phi0 + 0.1, BATCHES, VAL)
    before, snapshot = state(run), other.snapshot()
    change(snapshot)
    with pytest.raises(ShapeError, match=r"inner.restore"):
        run.restore(snapshot)
    assert same(state(run), before)


def test_a_reused_buffer_does_not_spoil_the_outer_hessian():
    good, buffer = toys.logistic(np.ones(5)), np.empty(5)

    def outer(theta, hyper, batch):
        value, dE, direct = good.outer(theta, hyper, batch)
        buffer[:] = dE
        return value, buffer, direct

    V = np.random.default_rng(0).normal(size=(2, 5))
    got = inner.sgd(Problem(good.params, good.grad_jvp, outer), SPACE).linearise(BATCHES[0], VAL).outer_hvp(V)
    want = inner.sgd(Problem(good.params, good.grad_jvp, good.outer), SPACE).linearise(BATCHES[0], VAL).outer_hvp(V)
    assert np.array_equal(got, want)
    assert np.abs(want).max() > 1e-3


def test_snapshots_do_not_move_with_the_run():
    run = make()
    saved = run.snapshot()
    before = {k: v.copy() for k, v in saved.items()}
    run.run(SPACE.phi0, BATCHES, VAL)
    assert same(saved, before)


def test_forgetting_scales_the_tangents():
    run = make()
    run.run(SPACE.phi0, BATCHES, VAL)
    Z = run.tangents
    run.forget(0.5)
    assert np.array_equal(run.tangents, 0.5 * Z)
    run.forget(0)
    assert not run.tangents.any()


def test_natural_hypergradients_follow_the_transform():
    run = make()
    run.run(SPACE.phi0, BATCHES, VAL)
    h = run.hypergradient(VAL)
    assert h.t == 10
    assert h.natural == pytest.approx({"lr": h.grad[0] / 0.05, "momentum": h.grad[1] / 0.16, "l2": h.grad[2] / 0.1})


def test_linearisation_agrees_with_differences_of_the_gradients():
    run, rng = make(), np.random.default_rng(0)
    run.run(SPACE.phi0, BATCHES, VAL)
    L, V, theta, e = run.linearise(BATCHES[0], VAL), rng.normal(size=(3, 5)), run.params, 1e-6
    hyper = {"l2": SPACE.natural(SPACE.phi0)["l2"]}
    g = lambda th: toys.logistic_gradient(th, hyper, BATCHES[0])
    o = lambda th: run.problem.outer(th, hyper, VAL)[1]
    np.testing.assert_allclose(L.gradient, g(theta), rtol=1e-14)
    np.testing.assert_allclose(L.outer_gradient, o(theta), rtol=1e-14)
    for got, f in ((L.hvp(V), g), (L.outer_hvp(V), o)):
        want = [(f(theta + e * v) - f(theta - e * v)) / (2 * e) for v in V]
        np.testing.assert_allclose(got, want, atol=1e-8)  # rounding 1e-16 / 1e-6 and truncation of both differences


def test_a_model_cannot_change_the_engines_buffers_and_the_engine_not_the_users_arrays():
    theta0 = np.ones(3)

    def spoil(theta, hyper, Z, dhyper, batch):
        theta[0] = 7.0

    with pytest.raises(ValueError, match="read-only"):
        inner.sgd(Problem(theta0, spoil, lambda *a: None), Space(lr=log(0.1))).step([np.log(0.1)], None)
    run = inner.sgd(toys.quadratic(np.eye(3), np.zeros(3), theta0), Space(lr=log(0.1)))
    run.step(run.space.phi0, None)
    assert (theta0 == 1).all()


def test_exact_tools_leave_the_run_where_it_was():
    run = make()
    run.run(SPACE.phi0, BATCHES[:2], VAL)
    before = state(run)
    hypergradient(run, BATCHES, VAL)
    trajectory(run, BATCHES, VAL, every=2)
    check_hypergradient(run, BATCHES[:2], VAL)
    assert same(state(run), before)


def test_the_trajectory_ends_in_the_hypergradient():
    run = make()
    H = trajectory(run, BATCHES, VAL, every=5)
    assert H.shape == (2, 3)
    assert np.array_equal(H[-1], hypergradient(run, BATCHES, VAL).grad)


def test_the_check_notices_a_wrong_derivative():
    right = toys.logistic(np.ones(5))

    def wrong(theta, hyper, Z, dhyper, batch):
        loss, g, dG = right.grad_jvp(theta, hyper, Z, dhyper, batch)
        return loss, g, 1.00001 * dG  # ten times the tolerance

    report = check_hypergradient(inner.sgd(Problem(right.params, wrong, right.outer), SPACE), BATCHES, VAL)
    assert not report.ok
    assert "DIFFERS" in str(report)
    assert report.uncertainty.max() < 1e-6 * np.abs(report.central).max()  # the tolerance, or it would hide behind it


def bad_model(**broken):
    good = toys.logistic(np.ones(5))
    parts = {"grad_jvp": good.grad_jvp, "outer": good.outer} | broken
    return inner.sgd(Problem(good.params, parts["grad_jvp"], parts["outer"]), SPACE)


G = np.ones(5)
BROKEN = [
    ({"grad_jvp": lambda th, h, Z, dh, b: (0.0, np.ones(4), np.zeros_like(Z))}, r"g must have shape \(5,\)"),
    ({"grad_jvp": lambda th, h, Z, dh, b: (0.0, G, np.zeros((1, 5)))}, r"dG must have shape \(3, 5\)"),
    ({"grad_jvp": lambda th, h, Z, dh, b: (G, G, np.zeros_like(Z))}, "loss must be a number"),
    ({"grad_jvp": lambda th, h, Z, dh, b: (0.0, G)}, "must return"),
    ({"grad_jvp": lambda th, h, Z, dh, b: (np.nan, G, np.zeros_like(Z))}, "finite at the initial"),
    ({"grad_jvp": lambda th, h, Z, dh, b: (0.0, G * np.inf, np.zeros_like(Z))}, "finite at the initial"),
    ({"outer": lambda th, h, b: (0.0, G)}, "must return"),
    ({"outer": lambda th, h, b: (0.0, G[:3], {})}, "dE_dtheta must have shape"),
    ({"outer": lambda th, h, b: (0.0, G, {"l3": 1.0})}, "not a loss hyperparameter of the space"),
    ({"outer": lambda th, h, b: (0.0, G, {"l2": np.ones(2)})}, "dE_dhyper"),
]


@pytest.mark.parametrize(("broken", "says"), BROKEN)
def test_a_model_that_breaks_the_contract_is_refused_and_nothing_moves(broken, says):
    run = bad_model(**broken)
    before = state(run)
    with pytest.raises(AdapterError, match=says):
        run.run(SPACE.phi0, BATCHES[:1], VAL) if "outer" not in broken else run.hypergradient(VAL)
    assert same(state(run), before)


P = toys.logistic(np.ones(5))
FREE = Problem(np.ones(5), P.grad_jvp, P.outer)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: inner.sgd(P, Space(momentun=logit(0.9), lr=log(0.1))), HyperparameterError, "'momentum'"),
        (lambda: inner.sgd(FREE, Space(momentun=logit(0.9), lr=log(0.1))), HyperparameterError, "'momentum'"),
        (lambda: inner.sgd(FREE, Space(beta1=logit(0.9)), lr=0.1), HyperparameterError, "sgd has no 'beta1'"),
        (lambda: inner.sgd(P, Space(l2=log(0.1))), HyperparameterError, "lr is neither"),
        (lambda: inner.sgd(P, Space(lr=log(0.1)), lr=0.1), HyperparameterError, "tuned by the space and fixed"),
        (lambda: inner.sgd(P, Space(l2=log(0.1)), lr=0.0), HyperparameterError, "0 < value"),
        (lambda: inner.sgd(P, Space(l2=log(0.1)), lr=-1.0), HyperparameterError, "0 < value"),
        (lambda: inner.sgd(P, Space(lr=log(0.1)), momentum=1.0), HyperparameterError, "value < 1"),
        (lambda: inner.sgd(P, Space(lr=log(0.1)), momentum=[0.1, 0.2]), ShapeError, "1 groups"),
        (lambda: inner.sgd(P, Space(lr=identity(0.1))), HyperparameterError, "bounds"),
        (lambda: inner.sgd(P, Space(lr=log(0.1), momentum=identity(0.5))), HyperparameterError, "bounds"),
        (lambda: inner.sgd(P, Space(lr=log([0.1, 0.1]))), ShapeError, "groups=..."),
        (lambda: inner.sgd(P, Space(lr=log([0.1, 0.1])), groups=(2, 2)), ShapeError, "sum to p = 5"),
        (lambda: inner.sgd(P, Space(lr=log(0.1)), nesterov=True), HyperparameterError, "nesterov"),
        (lambda: inner.sgd(P, Space(lr=log(0.1)), directions=2), HyperparameterError, "at most q = 1"),
        (lambda: inner.sgd(P, Space(lr=log(0.1)), chunk=0), HyperparameterError, "chunk"),
        (lambda: inner.sgd(P, Space(lr=log(0.1)), device="gpu"), HyperparameterError, "'cpu', 'cuda'"),
        (lambda: inner.sgd(np.ones(5), Space(lr=log(0.1))), AdapterError, "must be a Problem"),
        (lambda: inner.sgd(P, {"lr": 0.1}), HyperparameterError, "must be a Space"),
        (lambda: inner.adam(P, Space(lr=log(0.1)), eps=0.0), HyperparameterError, "eps needs 0 < value"),
        (lambda: inner.adam(P, Space(lr=log(0.1)), beta2=1.0), HyperparameterError, "beta2 needs"),
        (lambda: inner.adagrad(P, Space(lr=log(0.1)), initial_accumulator=-1), HyperparameterError, "initial_acc"),
        (lambda: Problem(np.ones((2, 2)), None, None), ShapeError, "flat array"),
        (lambda: Problem(np.ones(2, int), None, None), ShapeError, "float32 or float64"),
        (lambda: Problem(np.array([1.0, np.nan]), None, None), ShapeError, "finite, got nan at index 1"),
        (lambda: Problem(np.ones(3), None, None, segments=(1, 1)), ShapeError, "sum to p = 3"),
        (lambda: inner.sgd(P, Space(lr=log(0.1)), beta1=0.9), HyperparameterError, "unknown keyword 'beta1'"),
        (lambda: inner.sgd(P, Space(lr=log(0.1)), momentun=0.9), HyperparameterError, "Did you mean 'momentum'"),
        (lambda: inner.sgd(P, Space(l2=log(0.1)), lr="fast"), HyperparameterError, "lr must be a number"),
        (lambda: inner.sgd(P, Space(lr=log(0.1)), groups="ab"), ShapeError, "groups must be whole"),
        (lambda: inner.sgd(P, Space(lr=log(0.1)), groups=(2.5, 2.5)), ShapeError, "groups must be whole"),
        (lambda: inner.sgd(P, Space(lr=log(0.1)), seed="a"), HyperparameterError, "seed"),
        (lambda: Problem(np.ones(2), None, None), AdapterError, "grad_jvp must be a function"),
        (lambda: make().step("abc", BATCHES[0]), ShapeError, "phi must be"),
        (lambda: make().step({"lr": 0.1}, BATCHES[0]), ShapeError, "phi must be"),
        (lambda: hypergradient(None, BATCHES, VAL), AdapterError, "must be an Inner"),
        (lambda: trajectory(SPACE, BATCHES, VAL), AdapterError, "must be an Inner"),
        (lambda: make().step(np.zeros(2), BATCHES[0]), ShapeError, r"\(q,\) = \(3,\)"),
        (lambda: make().step([np.nan] * 3, BATCHES[0]), HyperparameterError, "finite"),
        (lambda: make().forget(1.5), HyperparameterError, "rho"),
        (lambda: make().run(SPACE.phi0, BATCHES, VAL, every=0), HyperparameterError, "every"),
        (lambda: make().restore({}), ShapeError, "another model"),
        (lambda: make().restore(None), ShapeError, "what snapshot"),
        (lambda: make().restore(make(directions=3).snapshot()), ShapeError, "random directions"),
        (lambda: make().restore(make(Space(lr=log(0.1))).snapshot()), ShapeError, "another model"),
        (lambda: make().linearise(BATCHES[0]).hvp(np.ones(5)), ShapeError, r"\(n, p\)"),
        (lambda: hypergradient(make(), [], VAL), ShapeError, "empty"),
        (lambda: hypergradient(make(), VAL, VAL), ShapeError, "batches must be a list"),
        (lambda: trajectory(make(), BATCHES, VAL, every=11), HyperparameterError, "every"),
        (lambda: check_hypergradient(make(directions=1), BATCHES, VAL), HyperparameterError, "random directions"),
    ],
)
def test_bad_input_is_refused_with_advice(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_an_undeclared_name_far_from_the_optimizers_belongs_to_the_loss():
    run = inner.sgd(FREE, Space(lr=log(0.1), l2=log(0.1)))
    assert hypergradient(run, BATCHES, VAL).grad[1] != 0


def test_divergence_is_returned_not_raised():
    run = inner.sgd(toys.quadratic(np.eye(2), np.zeros(2), np.ones(2)), Space(lr=log(1e3)))
    with np.errstate(all="ignore"):
        losses = [run.step(run.space.phi0, None) for _ in range(200)]
    assert not np.isfinite(losses[-1])
