"""What users get wrong, at every entry but the tuner's: refused by name before anything changes, or made harmless."""

import copy
import math

import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from koopman_hpo_adapters.numpy import difference_error, mlp, problem, softmax_regression

from koopman_hpo import (
    AdapterError,
    CheckpointError,
    Global,
    Glocal,
    Guard,
    History,
    Hyperparameter,
    HyperparameterError,
    Local,
    Problem,
    ShapeError,
    Space,
    Tuner,
    box,
    check_hypergradient,
    checks,
    errors,
    files,
    hypergradient,
    identity,
    inner,
    koopman,
    log,
    logit,
    optimizers,
    outer,
    trajectory,
)
from koopman_hpo.guard import coherence
from koopman_hpo.history import Record
from koopman_hpo.transforms import LOG, transform

HUGE = 10**400
NAN, INF = float("nan"), float("inf")
BATCH = np.ones((4, 3)), np.array([0, 1, 1, 0])
MODEL = mlp((3, 4, 2))
LOGISTIC = toys.logistic(np.ones(5))
ROOT = Space(lr=log(0.1))
SINGLE = toys.quadratic(np.eye(2), np.zeros(2), np.ones(2), dtype=np.float32)


def run(space=ROOT, **options):
    return inner.sgd(MODEL, space, **options)


def refused(*cases):
    """A parametrisation over (call, error, words of the message)."""
    return pytest.mark.parametrize(("call", "error", "says"), cases)


# -- conversions: one for all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        "1",
        b"1",
        True,
        1j,
        np.ones(2) * 1j,
        [[1], [1, 2]],
        HUGE,
        [HUGE],
        {},
        object(),
        [None],
        np.ma.array([1], mask=[1]),
    ],
)
def test_what_is_no_real_number_is_none_anywhere(value):
    for call in (
        lambda: errors.reals("f", "x", value),
        lambda: log(value),
        lambda: Hyperparameter(value, LOG, (0.1, 1.0)),
        lambda: koopman.extrapolate(value, 1),
        lambda: ROOT.check(value, "f"),
        lambda: ROOT.clip(value),
        lambda: ROOT.replace(lr=value),
        lambda: Problem(value, len, len),
    ):
        with pytest.raises(ShapeError):
            call()
    for call in (
        lambda: log(0.5, bounds=value),
        lambda: inner.sgd(LOGISTIC, Space(l2=log(0.1)), lr=value if value is not None else "none"),
        lambda: Guard(factor=value),
        lambda: Glocal(clip=value),
        lambda: outer.adam(b1=value),
    ):
        with pytest.raises(HyperparameterError):
            call() if value is not None else errors.number("f", "x", None)


def test_a_boolean_among_long_integers_is_none_either():
    with pytest.raises(ShapeError, match="x must be"):
        errors.reals("f", "x", [10**20, True])


def test_integers_of_any_length_and_fractions_are_real():
    from fractions import Fraction

    assert errors.reals("f", "x", [10**20, Fraction(1, 2)]).tolist() == [1e20, 0.5]
    mine = np.ones(3)
    assert errors.reals("f", "x", mine) is mine


@pytest.mark.parametrize("value", [True, 2.0, "2", None, 0, 4, HUGE, [1]])
def test_a_whole_number_is_an_integer_in_its_range(value):
    with pytest.raises(HyperparameterError, match=r"f: n must be a whole number in 1\.\.3, got .*\. Try 2\."):
        errors.whole("f", "n", value, 1, 3, "Try 2.")
    assert errors.whole("f", "n", np.int8(3), 1, 3) == 3


def test_a_message_stays_on_one_short_line():
    for value in ("\n" * 500, np.zeros((50, 50)), HUGE, 10**5000, [1] * 1000):
        shown = errors.short(value)
        assert len(shown) <= 80
        assert "\n" not in shown


# -- hyperparameters ---------------------------------------------------------------------------------------------------


@refused(
    (lambda: log(0.5, bounds=(0.1, "1")), HyperparameterError, "pair"),
    (lambda: log(0.5, bounds=(None, 1)), HyperparameterError, "pair"),
    (lambda: log(0.5, bounds=(0.1, HUGE)), HyperparameterError, "pair"),
    (lambda: log(0.5, bounds={0.1, 1}), HyperparameterError, "pair"),
    (lambda: log(0.5, bounds=(0.1, 0.5, 1)), HyperparameterError, "pair"),
    (lambda: log(0.5, bounds=([0.1], [1])), HyperparameterError, "pair"),
    (lambda: log(0.5, bounds=(0.1, NAN)), HyperparameterError, "low < high"),
    (lambda: box(0.5, "0", 1), HyperparameterError, "box: low"),
    (lambda: box(0.5, 0, None), HyperparameterError, "box: high"),
    (lambda: box(0.5, 0, 1j), HyperparameterError, "box: high"),
    (lambda: box(0.5, False, True), HyperparameterError, "box: low"),
    (lambda: box(0.5, -1e308, 1e308), HyperparameterError, "apart"),
    (lambda: box(0.5, 0, INF), HyperparameterError, "low < high"),
    (lambda: box(0.5, 0, HUGE), HyperparameterError, "box: high"),
    (lambda: log([0.1, 0.2], knots=(0, True)), HyperparameterError, "whole"),
    (lambda: log([0.1, 0.2], knots=(0, 10**30)), HyperparameterError, "whole"),
    (lambda: log([0.1, 0.2], knots="ab"), HyperparameterError, "whole"),
    (lambda: log([0.1, 0.2], knots=(0, 5), schedule=["linear"]), HyperparameterError, "'linear'"),
    (lambda: Hyperparameter(0.5, "log", (0.1, 1)), HyperparameterError, "must be a Transform"),
    (lambda: Hyperparameter(0.5, LOG, None), HyperparameterError, "pair"),
    (lambda: Hyperparameter(0.5, LOG, (0.1, 1), knots=5), HyperparameterError, "knots"),
    (lambda: transform(None), HyperparameterError, "no transform None"),
    (lambda: transform("0,1"), HyperparameterError, "no transform"),
    (lambda: transform("box(1, 0)"), HyperparameterError, "no transform"),
    (lambda: ROOT.phi(None), HyperparameterError, "dict"),
    (lambda: ROOT.phi({1: 2}), HyperparameterError, "no hyperparameter 1"),
    (lambda: ROOT.phi({"lr": "0.1"}), ShapeError, "real numbers"),
    (lambda: ROOT.phi({"lr": 1j}), ShapeError, "real numbers"),
    (lambda: ROOT.replace(lr=[0.1, 0.2]), ShapeError, r"shape \(\)"),
    (lambda: ROOT.where([]), HyperparameterError, "no hyperparameter"),
    (lambda: ROOT.check([800.0], "f"), HyperparameterError, r"f: phi\[0\] of lr must lie in -700..700, got 800"),
    (lambda: ROOT.natural(np.ones(1) * 1j), ShapeError, "numbers"),
)
def test_odd_hyperparameters_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


FAR = {
    "log": (Space(lr=log(0.1)), 1e3),
    "logit": (Space(momentum=logit(0.9)), 40.0),  # 1 - 1 / (1 + e^40) is 1.0
    "box": (Space(momentum=box(0.5, 0, 0.9)), 40.0),
    "identity": (Space(momentum=identity(0.5, bounds=(0, 0.9))), 1.0),
}


@pytest.mark.parametrize("kind", FAR)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_phi_whose_value_leaves_its_domain_is_refused_and_nothing_moves(kind, sign):
    space, far = FAR[kind]
    it = run(space, **({} if "lr" in space else {"lr": 0.1}))
    before = it.params
    with pytest.raises(HyperparameterError, match=r"phi\[0\] of .* must lie in"):
        it.step(np.array([sign * far]), BATCH)
    assert np.array_equal(it.params, before)
    assert it.t == 0
    for edge in (space.low, space.high):  # the bounds themselves are good
        it.step(edge, BATCH)


def test_a_space_cannot_be_changed_from_outside():
    for array in (ROOT.phi0, ROOT.low, ROOT.high):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


# -- what an inner optimizer is made of --------------------------------------------------------------------------------


@refused(
    (lambda: inner.sgd(LOGISTIC, ROOT, nesterov="no"), HyperparameterError, "nesterov must be True or False"),
    (lambda: inner.sgd(LOGISTIC, ROOT, nesterov=0), HyperparameterError, "nesterov must be True or False"),
    (lambda: inner.rmsprop(LOGISTIC, ROOT, centered=None), HyperparameterError, "centered must be True or False"),
    (lambda: inner.adagrad(LOGISTIC, ROOT, initial_accumulator=True), HyperparameterError, "initial_accumulator"),
    (lambda: inner.adagrad(LOGISTIC, ROOT, initial_accumulator=HUGE), HyperparameterError, "initial_accumulator"),
    (lambda: inner.adagrad(LOGISTIC, ROOT, initial_accumulator=INF), HyperparameterError, "initial_accumulator"),
    (lambda: inner.sgd(LOGISTIC, ROOT, momentum=np.ones(1) * 1j), HyperparameterError, "momentum must be"),
    (lambda: inner.sgd(LOGISTIC, ROOT, momentum=True), HyperparameterError, "momentum must be"),
    (lambda: inner.sgd(LOGISTIC, ROOT, seed=True), HyperparameterError, "seed must be a whole number"),
    (lambda: inner.sgd(LOGISTIC, ROOT, chunk=True), HyperparameterError, "chunk must be a whole number"),
    (lambda: run(Space(lr=log(0.1), label_smoothing=identity(5.0))), HyperparameterError, "0 <= value <= 1, got a start"),
    (lambda: run(Space(lr=log(0.1), label_smoothing=identity(0.1))), HyperparameterError, "its bounds are"),
    (lambda: run(Space(lr=log(0.1), label_smoothing=log(0.1))), HyperparameterError, "its bounds are"),
    (lambda: run(Space(lr=log(0.1), l2=identity(-0.1))), HyperparameterError, "0 <= value"),
    (lambda: run(Space(lr=log(0.1), class_weights=identity(np.ones(2)))), HyperparameterError, "its bounds are"),
    (lambda: run().linearise(BATCH).hvp([["a"]]), ShapeError, "real numbers"),
)
def test_odd_settings_of_a_run_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_loss_hyperparameters_within_their_domain_are_tuned():
    both = Space(lr=log(0.1), label_smoothing=identity(0.1, bounds=(0, 1)), l2=identity(0.0, bounds=(0, INF)))
    assert np.isfinite(hypergradient(run(both), [BATCH] * 3, BATCH).grad).all()


def test_what_rounds_to_zero_in_single_precision_is_refused_there():
    rule = optimizers.adam(decoupled=False)
    tiny = Space(eps=log(1e-60, bounds=(1e-70, 1)))
    with pytest.raises(HyperparameterError, match="eps needs"):
        checks.fixed("f", rule, ROOT, {"eps": 1e-60}, 1, np.float32)
    with pytest.raises(HyperparameterError, match="eps needs"):
        checks.domains("f", rule, tiny, 1, np.float32)
    assert checks.fixed("f", rule, ROOT, {"eps": 1e-60}, 1, np.float64)["eps"] == 1e-60
    checks.domains("f", rule, tiny, 1, np.float64)


# -- the model's contract ----------------------------------------------------------------------------------------------


def plain(**changes):
    return Problem(**({"params": np.ones(3), "grad_jvp": LOGISTIC.grad_jvp, "outer": LOGISTIC.outer} | changes))


def graded(*answer):
    """The directional derivative of a model whose `grad` answers this."""
    return hand(grad=lambda th, h, b: answer).grad_jvp(np.ones(3), {}, np.ones((1, 3)), {}, 0)


def measured(*answer):
    """The outer loss of a model whose `outer` answers this."""
    return hand(outer=lambda th, h, b: answer).outer(np.ones(3), {"c": 1.0}, 0)


def hand(**changes):
    parts = {"params": np.ones(3), "grad": lambda th, h, b: (0.0, th), "outer": lambda th, h, b: (0.0, th)}
    return problem(**(parts | changes))


@refused(
    (lambda: plain(segments=5), ShapeError, "whole lengths"),
    (lambda: plain(segments=(1.5, 1.5)), ShapeError, "whole lengths"),
    (lambda: plain(segments="abc"), ShapeError, "whole lengths"),
    (lambda: plain(segments=()), ShapeError, "sum to p = 3"),
    (lambda: plain(hyper="l2"), AdapterError, r"use \('l2',\)"),
    (lambda: plain(hyper=5), AdapterError, "collection of names"),
    (lambda: plain(hyper=[1]), AdapterError, "collection of names"),
    (lambda: plain(outer_hvp=1), AdapterError, "outer_hvp must be a function"),
    (lambda: plain(params=[[1.0], [1.0, 2.0]]), ShapeError, "flat array"),
    (lambda: plain(params=np.ones(2) * 1j), ShapeError, "flat array"),
    (lambda: hand(hyper=1.5), AdapterError, "collection of names"),
    (lambda: hand(segments=1.5), ShapeError, "whole lengths"),
    (lambda: hand(params="abc"), ShapeError, "flat array"),
    (lambda: graded("0.5", np.ones(3)), AdapterError, "loss must be one real number"),
    (lambda: graded([[1], [1, 2]], np.ones(3)), AdapterError, "loss must be one real number"),
    (lambda: measured(0.0, np.ones(3), {"c": "a"}), AdapterError, "dE_dhyper"),
    (lambda: measured(0.0, np.ones(3), {"c": 1j}), AdapterError, "dE_dhyper"),
    (lambda: difference_error(None, np.ones(3), {}, 0), AdapterError, "must be a Problem"),
    (lambda: difference_error(MODEL, "a", {}, BATCH), AdapterError, "theta"),
    (lambda: difference_error(MODEL, np.ones(3), {}, BATCH), AdapterError, "theta must have shape"),
    (lambda: difference_error(MODEL, MODEL.params, None, BATCH), AdapterError, "hyper must be a dict"),
    (lambda: difference_error(MODEL, MODEL.params, {"l2": NAN}, BATCH), AdapterError, "finite"),
    (lambda: difference_error(MODEL, MODEL.params, {"l2": []}, BATCH), AdapterError, "not empty"),
    (lambda: difference_error(MODEL, MODEL.params, {}, BATCH, seed=-1), AdapterError, "seed"),
)  # fmt: skip
def test_odd_models_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_a_problems_parameters_are_its_own_and_stay():
    mine = np.ones(5)
    model = toys.logistic(mine)
    mine[:] = NAN
    assert (model.params == 1).all()
    with pytest.raises(ValueError, match="read-only"):
        model.params[0] = 2
    run_ = inner.sgd(model, ROOT)
    run_.step(ROOT.phi0, toys.data(0))  # the engine works on a copy
    assert (model.params == 1).all()
    assert copy.deepcopy(model).params.tolist() == [1.0] * 5


ANSWERS = {
    "loss must be a number": ("0.5", np.zeros(2), np.zeros((1, 2))),
    "loss must be a number, got list of shape": ([1.0, 2.0], np.zeros(2), np.zeros((1, 2))),
    "g must be an array": (0.5, "ab", np.zeros((1, 2))),
    "g must be an array of real": (0.5, [[1.0], [1.0, 2.0]], np.zeros((1, 2))),
    "g must be .* of dtype complex": (0.5, np.ones(2) * 1j, np.zeros((1, 2))),
    "g must have shape": (0.5, np.zeros(3), np.zeros((1, 2))),
    "dG must be": (0.5, np.zeros(2), None),
}


@pytest.mark.parametrize("says", ANSWERS)
def test_a_gradient_that_is_none_is_refused_and_nothing_moves(says):
    model = Problem(np.ones(2), lambda *a: ANSWERS[says], lambda *a: (0.0, np.ones(2), {}))
    it = inner.sgd(model, ROOT)
    with pytest.raises(AdapterError, match=f"problem.grad_jvp: {says}"):
        it.step(ROOT.phi0, None)
    assert it.t == 0
    assert (it.params == 1).all()


@pytest.mark.parametrize("loss", [0.5, np.float32(0.5), np.array(0.5), 1, np.int64(1)])
def test_any_real_scalar_is_a_loss(loss):
    model = Problem(
        np.ones(2), lambda th, h, Z, d, b: (loss, np.zeros(2), np.zeros_like(Z)), lambda *a: (loss, np.ones(2), {})
    )
    assert inner.sgd(model, ROOT).step(ROOT.phi0, None) == loss


# -- ready models ------------------------------------------------------------------------------------------------------

X, Y = BATCH


@refused(
    (lambda: mlp((3, 2), seed=-1), AdapterError, "seed must be a whole number"),
    (lambda: mlp((3, 2), seed="a"), AdapterError, "seed must be a whole number"),
    (lambda: mlp((3, 2), seed=None), AdapterError, "seed must be a whole number"),
    (lambda: mlp((3, 2), dtype="foo"), AdapterError, "dtype must be float32 or float64, got 'foo'"),
    (lambda: mlp((3, 2), dtype=7), AdapterError, "dtype must be float32 or float64"),
    (lambda: mlp((3, 2), l2="a"), AdapterError, "l2 must be"),
    (lambda: mlp((3, 2), l2=1j), AdapterError, "l2 must be"),
    (lambda: mlp((3, 2), l2=1e300, dtype=np.float32), AdapterError, "l2 must be finite"),
    (lambda: mlp((3, 2), l2=HUGE), AdapterError, "l2 must be"),
    (lambda: mlp((3, 2), label_smoothing=[0.1, 7.0]), AdapterError, "label_smoothing must"),
    (lambda: mlp((3, 2), class_weights=[[1], [1, 2]]), AdapterError, "class_weights must be"),
    (lambda: mlp((3, 2), example_weights=[]), AdapterError, "example_weights must be"),
    (lambda: mlp((3, 2), activation=["tanh"]), AdapterError, "activation must be one of"),
    (lambda: mlp((3, 2), loss=None), AdapterError, "loss must be one of"),
    (lambda: mlp((3, True)), AdapterError, "positive widths"),
    (lambda: mlp((10**6, 10**6)), AdapterError, "narrower"),
    (lambda: mlp((3, 2), params="a"), AdapterError, "params"),
    (lambda: mlp((3, 2), params=np.ones(8) * 1j), AdapterError, "params"),
    (lambda: mlp((3, 2), params=np.full(8, 1e300), dtype=np.float32), ShapeError, "finite"),
    (lambda: softmax_regression(3, 2, bias="no"), AdapterError, "bias must be True or False"),
    (lambda: softmax_regression("3", 2), AdapterError, "positive widths"),
    (lambda: MODEL.accuracy(MODEL.params, X, Y[:, None]), AdapterError, r"accuracy: y must be \(4,\) integer labels"),
    (lambda: MODEL.accuracy(MODEL.params, X, ["a"] * 4), AdapterError, "accuracy: y must be"),
    (lambda: MODEL.accuracy(MODEL.params, X, np.array(["a"] * 4)), AdapterError, "integer labels"),
    (lambda: MODEL.accuracy(MODEL.params, X, Y + 0.5), AdapterError, "integer labels"),
    (lambda: MODEL.accuracy(MODEL.params, X, Y + 1), AdapterError, r"labels must be in 0..1, got y\[1\] = 2"),
    (lambda: MODEL.accuracy(MODEL.params, X, Y - 1), AdapterError, r"got y\[0\] = -1"),
    (lambda: MODEL.accuracy(MODEL.params, X * NAN, Y), AdapterError, r"finite, got X\[0, 0\] = nan"),
    (lambda: MODEL.accuracy(list(MODEL.params), X, Y), AdapterError, "got list"),
    (lambda: MODEL.predict(list(MODEL.params), X), AdapterError, r"theta must be \(26,\) of float64, got list"),
    (lambda: MODEL.predict(None, X), AdapterError, "got NoneType"),
    (lambda: MODEL.predict(MODEL.params, X * INF), AdapterError, "finite, got X"),
    (lambda: MODEL.predict(MODEL.params, [[1], [1, 2]]), AdapterError, "predict: X must be"),
    (lambda: MODEL.predict(MODEL.params, np.full((4, 3), "a")), AdapterError, "real features"),
    (lambda: MODEL.outer(list(MODEL.params), {}, BATCH), AdapterError, "got list"),
    (lambda: MODEL.outer(MODEL.params, {}, ([[1], [1, 2]], Y)), AdapterError, "outer: X must be"),
    (lambda: MODEL.outer(MODEL.params, {}, (X, [[1], [1, 2]])), AdapterError, "outer: y must be"),
    (lambda: run(Space(lr=log(0.1), example_weights=log(np.ones(9)))).step(np.zeros(10), (X, Y, [[1], [1, 2]])),
     AdapterError, "index must be"),
)  # fmt: skip
def test_odd_ready_models_and_batches_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_accuracy_counts_the_labels_that_are_hit():
    hit = MODEL.predict(MODEL.params, X).argmax(axis=1)
    assert MODEL.accuracy(MODEL.params, X, hit) == 1.0
    assert MODEL.accuracy(MODEL.params, X, (1 - hit).tolist()) == 0.0


# -- differences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-45, 1e-44, 1e-40, 1e-38, 1e-20, 1.0, 1e30])
def test_tangents_too_small_for_single_precision_have_finite_differences(size):
    model = mlp((3, 4, 2), dtype=np.float32)
    none = np.empty((0, model.params.size), np.float32)
    grad = lambda th, h, b: model.grad_jvp(th, {}, none, {}, b)[:2]
    differences = problem(model.params, grad=grad, outer=lambda th, h, b: model.outer(th, {}, b))
    z = np.full((1, model.params.size), size, np.float32)
    got = differences.grad_jvp(model.params, {}, z, {}, BATCH)[2]
    exact = model.grad_jvp(model.params, {}, z, {}, BATCH)[2]
    # of float32: 1e-5; a tangent near the smallest float32 keeps no digits, and its product underflows
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-4 * np.abs(exact).max() + 2e-43)


@refused(
    (lambda: check_hypergradient(run(), [BATCH], BATCH, step=1e-18), HyperparameterError, "rounding swallows"),
    (lambda: check_hypergradient(run(), [BATCH], BATCH, step=0), HyperparameterError, "step must be"),
    (lambda: check_hypergradient(run(), [BATCH], BATCH, step=-1e-3), HyperparameterError, "step must be"),
    (lambda: check_hypergradient(run(), [BATCH], BATCH, step=NAN), HyperparameterError, "step must be"),
    (lambda: check_hypergradient(run(), [BATCH], BATCH, step="a"), HyperparameterError, "step must be"),
    (lambda: check_hypergradient(run(), [BATCH], BATCH, step=2.0), HyperparameterError, "step must be"),
    (lambda: check_hypergradient(run(), [BATCH], BATCH, rtol=0), HyperparameterError, "rtol must be"),
    (lambda: check_hypergradient(run(), [BATCH], BATCH, rtol=NAN), HyperparameterError, "rtol must be"),
    (lambda: check_hypergradient(run(), None, BATCH), ShapeError, "batches must be a list"),
    (lambda: hypergradient(run(), b"ab", BATCH), ShapeError, "batches must be a list"),
    (lambda: hypergradient(run(), [BATCH], BATCH, phi="a"), ShapeError, "phi must be"),
    (lambda: trajectory(run(), None, BATCH), ShapeError, "batches must be a list"),
    (lambda: trajectory(run(), [BATCH], BATCH, every=True), HyperparameterError, "every must be a whole number"),
    (lambda: trajectory(run(), [BATCH], BATCH, every=2), HyperparameterError, "every must be a whole number in 1..1"),
)
def test_the_exact_tools_refuse_what_cannot_be_measured(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_a_hypergradient_below_the_uncertainty_of_its_differences_has_not_passed():
    """The outer loss is 1 + 1e-13 |theta|^2: its derivative drowns in the rounding of the 1."""

    def grad_jvp(theta, hyper, Z, dhyper, batch):
        return 0.5 * theta @ theta, theta.copy(), Z.copy()

    tiny = lambda theta, hyper, batch: (1.0 + 1e-15 * theta @ theta, 2e-15 * theta, {})
    check = check_hypergradient(inner.sgd(Problem(np.ones(2), grad_jvp, tiny), ROOT), [None] * 3, None)
    assert (check.uncertainty > np.abs(check.forward)).all()
    assert not check.ok
    assert "UNSURE" in str(check)
    assert "DIFFERS" not in str(check)


def test_a_check_at_a_bound_looks_inside_and_in_a_narrow_box_takes_a_small_step():
    for bounds in ((0.0, 0.5), (0.5, 0.9), (0.4999, 0.5)):
        space = Space(lr=log(0.1), momentum=identity(0.5, bounds=bounds))
        assert check_hypergradient(run(space), [BATCH] * 4, BATCH).ok


def test_an_unused_hyperparameter_passes_with_exactly_zero():
    space = Space(lr=log(0.1), unused=log(1.0))
    model = Problem(np.ones(5), lambda th, h, Z, d, b: LOGISTIC.grad_jvp(th, {}, Z, {}, b), LOGISTIC.outer)
    check = check_hypergradient(inner.sgd(model, space), toys.batches(1, 3), toys.data(0))
    assert check.ok
    assert check.forward[1] == 0


# -- Koopman -----------------------------------------------------------------------------------------------------------

MODES = 0.9 ** np.arange(25)[:, None] * np.array([1.0, -2.0, 3.0]) + np.array([5.0, 0.0, -1.0])
NOISE = np.random.default_rng(0).normal(size=(25, 3))
WALK = np.random.default_rng(1).normal(size=(25, 60)).cumsum(axis=0)
EXTREMES = [-1000, -700, -520, -250, 250, 400, 520, 1015]


@pytest.mark.parametrize("H", [MODES, MODES + NOISE, WALK], ids=["modes", "noisy", "wide"])
@pytest.mark.parametrize("power", EXTREMES)
def test_no_unit_is_too_large_or_too_small_for_an_extrapolation(power, H):
    unit = 2.0**power
    for method in koopman.METHODS:
        want, got = koopman.extrapolate(H, 7, method), koopman.extrapolate(H * unit, 7, method)
        assert got.accepted == want.accepted
        np.testing.assert_allclose(got.value / unit, want.value, rtol=1e-9, atol=1e-12)  # the smallest floats are rounded
        np.testing.assert_allclose(got.error / unit, want.error, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"modes": "stationary"}, {"rank": "svht"}, {"delays": 2, "rank": 1}])
@pytest.mark.parametrize("H", [MODES + NOISE, WALK], ids=["noisy", "wide"])
@pytest.mark.parametrize("power", EXTREMES)
def test_no_unit_is_too_large_or_too_small_for_a_fit(power, H, options):
    unit = 2.0**power
    want, got = koopman.fit(H, **options), koopman.fit(H * unit, **options)
    np.testing.assert_allclose(got.forecast([0, 9]) / unit, want.forecast([0, 9]), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got.error(9) / unit, want.error(9), rtol=1e-6, atol=1e-9)


def test_the_largest_floats_give_finite_forecasts_and_errors():
    edge = np.finfo(float).max
    for H in (
        np.full((25, 2), edge),
        edge * np.tanh(MODES),
        np.where(NOISE > 0, edge, -edge),
        NOISE * [edge / 4, 1e-300, 0],
    ):
        for method in koopman.METHODS:
            forecast = koopman.extrapolate(H, 3, method)
            assert np.isfinite(forecast.value).all()
            assert np.isfinite(forecast.error).all()


def test_one_huge_constant_beside_small_values_spoils_nothing():
    H = np.column_stack([np.full(25, 1e200), MODES])
    forecast = koopman.extrapolate(H, 7)
    assert np.isfinite(forecast.value).all()
    assert forecast.value[0] == 1e200


def test_a_recorded_window_of_huge_values_is_extrapolated():
    recorder = koopman.Recorder(3, 25)
    for h in MODES * 2.0**500:
        recorder.append(h)
    want = koopman.extrapolate(MODES, 7).value
    np.testing.assert_allclose(koopman.extrapolate(recorder, 7).value / 2.0**500, want, rtol=1e-6)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("unit", [1e-200, 1.0, 1e200])
def test_a_value_that_is_not_finite_is_found_at_any_scale(bad, unit):
    for where in ((0, 0), (7, 1), (24, 2)):
        H = MODES * unit
        H[where] = bad
        for call in (koopman.fit, lambda x: koopman.extrapolate(x, 1)):
            with pytest.raises(ShapeError, match=f"finite, first violated in snapshot {where[0]} of 25"):
                call(H)


@refused(
    (lambda: koopman.extrapolate([[1, 2], [3]], 1), ShapeError, "snapshots must be"),
    (lambda: koopman.fit([[1, 2], [3]]), ShapeError, "snapshots must be"),
    (lambda: koopman.extrapolate(MODES > 0, 1), ShapeError, "bool"),
    (lambda: koopman.extrapolate([[HUGE]] * 12, 1), ShapeError, "snapshots must be"),
    (lambda: koopman.extrapolate(MODES, HUGE), HyperparameterError, "steps must be a whole number"),
    (lambda: koopman.extrapolate(MODES, 10**20), HyperparameterError, "steps must be a whole number"),
    (lambda: koopman.extrapolate(MODES, True), HyperparameterError, "steps must be a whole number"),
    (lambda: koopman.extrapolate(MODES, 1, method=["dmd"]), HyperparameterError, "method must be one of"),
    (lambda: koopman.extrapolate(MODES, 1, gate=1j), HyperparameterError, "gate must be"),
    (lambda: koopman.fit(MODES, growth=HUGE), HyperparameterError, "growth must be"),
    (lambda: koopman.fit(MODES, growth="0.2"), HyperparameterError, "growth must be"),
    (lambda: koopman.fit(MODES, growth=True), HyperparameterError, "growth must be"),
    (lambda: koopman.fit(MODES, modes=["decaying"]), HyperparameterError, "modes must be one of"),
    (lambda: koopman.fit(MODES, rank=np.array([1, 2])), HyperparameterError, "rank must be a whole number"),
    (lambda: koopman.fit(MODES, delays=True), HyperparameterError, "delays must be a whole number"),
    (lambda: koopman.fit(MODES).forecast(HUGE), HyperparameterError, "steps"),
    (lambda: koopman.fit(MODES).forecast(10**20), HyperparameterError, "steps must be a whole number in"),
    (lambda: koopman.fit(MODES).forecast([1, 10**20]), HyperparameterError, "steps"),
    (lambda: koopman.fit(MODES).forecast([[1], [1, 2]]), HyperparameterError, "steps"),
    (lambda: koopman.fit(MODES).error(10**20), HyperparameterError, "steps must be a whole number in"),
    (lambda: koopman.Recorder(3, 5, "foo"), ShapeError, "dtype must be float32 or float64, got 'foo'"),
    (lambda: koopman.Recorder(True, 5), HyperparameterError, "q must be a whole number"),
    (lambda: koopman.Recorder(10**12, 10**6), ShapeError, "fit into memory"),
    (lambda: koopman.Recorder(10**30, 3), ShapeError, "fit into memory"),
    (lambda: koopman.Recorder(2, 3).append([[1], [2, 3]]), ShapeError, "2 real numbers"),
    (lambda: koopman.Recorder(1, 3).append(["1"]), ShapeError, "1 real numbers"),
    (lambda: koopman.Recorder(1, 3, np.float32).append([1e39]), ShapeError, "snapshot 0 must be finite"),
)
def test_odd_calls_of_koopman_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


# -- strategies, guard, outer optimizers -------------------------------------------------------------------------------


@refused(
    *((lambda c=c, n=n: c(snapshots=n), HyperparameterError, f"{c.__name__}: snapshots must be a whole number")
      for c in (Local, Global, Glocal) for n in (0, -3, 2.5, True, "1", NAN)),
    *((lambda c=c, x=x: c(cut=x), HyperparameterError, f"{c.__name__}: ")
      for c in (Local, Global, Glocal) for x in (7, 0, -1, NAN, "a", None)),
    *((lambda c=c, x=x: c(mode=x), HyperparameterError, f"{c.__name__}: mode must be one of 'online', 'restart'")
      for c in (Local, Global, Glocal) for x in ("onlin", None, ["online"], 1)),
    (lambda: Glocal(method=["dmd"]), HyperparameterError, "method must be one of"),
    (lambda: Glocal(method="robst"), HyperparameterError, "Did you mean 'robust'"),
    (lambda: Glocal(clip=NAN), HyperparameterError, "clip must be"),
    (lambda: Glocal(clip="a"), HyperparameterError, "clip must be"),
    *((lambda n=n, x=x: Guard(**{n: x}), HyperparameterError, f"Guard: {n} must be")
      for n in ("factor", "shrink", "excess", "chaos_growth", "patience", "chaos_steps")
      for x in (NAN, "a", None, True, [2.0])),
    *((lambda x=x: Guard(again=x), HyperparameterError, "Guard: again must be a share of the run")
      for x in (-0.1, 1.1, NAN, INF, "a", None, True)),
    *((lambda x=x: Guard(fall=x), HyperparameterError, "Guard: fall must be a number > 0")
      for x in (0, -1, NAN, "a", None, True)),
    (lambda: Guard(patience=2.5), HyperparameterError, "patience must be a whole number"),
    (lambda: Guard(shrink=INF), HyperparameterError, "shrink must be a finite"),
    (lambda: Guard(shrink_names="lr"), HyperparameterError, r"use \('lr',\)"),
    (lambda: Guard(shrink_names=5), HyperparameterError, "collection of names"),
    (lambda: Guard(shrink_names=(5,)), HyperparameterError, "collection of names"),
    *((lambda x=x: outer.adam(eps=x), HyperparameterError, "eps must be positive") for x in (-1, 0, NAN, INF, "a", None)),
    *((lambda f=f, x=x: f(lr=x), HyperparameterError, "lr must be positive")
      for f in (outer.adam, outer.sgd, outer.sign) for x in (0, NAN, INF, "a", True, [0.1], HUGE)),
    *((lambda f=f, x=x: f(clip=x), HyperparameterError, "clip must be")
      for f in (outer.adam, outer.sgd) for x in (NAN, "a", 0)),
    *((lambda x=x: outer.adam(b2=x), HyperparameterError, "b2 must be") for x in (1, -0.1, NAN, "a", None)),
)  # fmt: skip
def test_odd_settings_of_tuning_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_shrink_names_may_be_any_collection():
    assert Guard(shrink_names=["lr", "eps"]) == Guard(shrink_names=("lr", "eps"))


SHRINKABLE = {
    "log": log(0.3),
    "log at its bound": log(0.3, bounds=(0.2, 1.0)),
    "logit": logit(0.3),
    "box": box(0.3, 0.2, 0.9),
    "box below zero": box(-0.3, -0.9, -0.2),
    "box across zero": box(0.3, -0.9, 0.9),
    "identity": identity(0.3),
    "negative": identity(-3.0),
    "zero": identity(0.0),
    "bounded": identity(0.3, bounds=(0.25, 1.0)),
    "vector": identity([-3.0, 0.0, 3.0]),
}


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1), shrink=st.sampled_from([1.5, 3.0, 1e6]))
@pytest.mark.parametrize("kind", SHRINKABLE)
def test_shrinking_never_raises_a_value_nor_leaves_its_bounds(kind, share, shrink):
    space = Space(lr=SHRINKABLE[kind], other=log(1.0))
    near, far = np.maximum(space.low, -20), np.minimum(space.high, 20)
    phi = space.clip(near + share * (far - near))
    got = Guard(shrink=shrink).shrunk(space, phi)
    assert np.isfinite(got).all()
    assert (got <= phi).all()
    assert (got >= space.low).all()
    assert got[-1] == phi[-1]
    before, after = (np.atleast_1d(space.natural(p)["lr"]) for p in (phi, got))
    low = space["lr"].bounds[0]
    want = np.where(before > 0, np.maximum(before / shrink, low), before)
    np.testing.assert_allclose(after, want, rtol=1e-6, atol=1e-9)


def test_a_phi_without_sense_is_not_shrunk():
    with pytest.raises(ShapeError, match=r"Guard\.shrunk"):
        Guard().shrunk(ROOT, None)


@pytest.mark.parametrize("make", [outer.adam, outer.sgd, lambda: outer.sgd(momentum=0.9), outer.sign])
@pytest.mark.parametrize("size", [1e200, -1e308])
def test_an_explosion_does_not_stay_in_the_moments_for_good(make, size):
    optimizer = make()
    state = optimizer.init(2)
    for h in (np.array([size, 1.0]), np.array([size, 1.0]), np.ones(2)):
        step, state = optimizer.update(h, state, 0.1)
        assert np.isfinite(step).all()
        assert all(np.isfinite(x).all() for x in state[:2])


def test_an_estimate_of_the_largest_floats_is_finite():
    H = np.full((3, 2), np.finfo(float).max)
    assert np.isfinite(Glocal().estimate(H, 5).value).all()


def test_a_natural_hypergradient_beyond_float64_is_infinite_and_no_warning():
    small = Space(lr=log(1e-10))
    assert small.gradient(small.phi0, np.array([1e300])) == {"lr": INF}


def test_coherence_of_the_largest_floats():
    edge = np.finfo(float).max
    np.testing.assert_allclose(coherence(np.array([[edge, edge], [edge, -edge]])), [1.0, 0.0])


@pytest.mark.parametrize("guard", [Guard(), None])
@pytest.mark.parametrize("strategy", [Local(), Glocal()])
def test_tuning_survives_hypergradients_beyond_any_scale(strategy, guard):
    """Their squares overflow: disbelieved or clipped, recorded, and no error."""
    model = toys.quadratic(np.eye(2), np.zeros(2), np.ones(2))
    huge = Problem(model.params, model.grad_jvp, lambda th, h, b: (0.5, 1e200 * th, {}), hyper=frozenset())
    tuner = Tuner(inner.sgd(huge, ROOT), strategy, steps=40, window=20, guard=guard)
    result = tuner.fit([None], [None])
    assert result.reason == "finished"
    assert np.isfinite(result.history.phi).all()
    assert np.isfinite(result.history.estimate).all()


# -- histories and files -----------------------------------------------------------------------------------------------


def record(q=1, **changes):
    vector = np.ones(q)
    parts = [1, 1, *[vector] * 6, 1.0, 1.0, True, "last", "", ""]
    return Record(*parts)._replace(**changes)


def history():
    out = History(("lr",), ("log",))
    out.append(record())
    out.observe(1, np.ones(1))
    return out


@refused(
    (lambda: History("lr"), HyperparameterError, r"use \('lr',\)"),
    (lambda: History(None), HyperparameterError, "collection of names"),
    (lambda: History(("lr",), ("logg",)), HyperparameterError, "Did you mean 'log'"),
    (lambda: History(("lr", "m"), ("log",)), ShapeError, "one transform a label"),
    (lambda: History(("lr",)).append(None), ShapeError, "must be a Record"),
    (lambda: History(("lr",)).append(record(2)), ShapeError, r"shape \(q,\) = \(1,\)"),
    (lambda: History(("lr",)).observe(1, np.ones(2)), ShapeError, r"shape \(q,\) = \(1,\)"),
    (lambda: History(("lr",)).learned(1.0), ShapeError, "no window yet"),
    (lambda: history().learned(math.inf), HyperparameterError, "a finite number"),
    (lambda: history().learned(None), HyperparameterError, "a finite number"),
    (lambda: History.from_arrays(None), CheckpointError, "a dict of arrays"),
    (lambda: History.from_arrays({}), CheckpointError, "columns missing"),
    (lambda: History.from_arrays(history().arrays() | {"phi": np.ones((2, 1))}), CheckpointError, "lengths"),
    (lambda: History.from_arrays(history().arrays() | {"phi": np.ones((1, 2))}), CheckpointError, r"shape \(q,\)"),
    (lambda: History.from_arrays(history().arrays() | {"step": np.array(["a"])}), CheckpointError, "not a history"),
    (lambda: History.from_arrays(history().arrays() | {"trajectory": np.ones((2, 1))}), CheckpointError, "trajectory"),
    (lambda: History.from_arrays(history().arrays() | {"labels": np.array(["a", "b"])}), CheckpointError, "not a history"),
    (lambda: history().save(None), CheckpointError, "path must be a string or a Path, got None"),
    (lambda: history().save(""), CheckpointError, "must name a file"),
    (lambda: history().save("a\0b"), CheckpointError, "must name a file"),
    (lambda: History.load(5), CheckpointError, "path must be a string or a Path, got 5"),
    (lambda: History.load("."), CheckpointError, "corrupt or not"),
)
def test_odd_histories_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_a_history_without_coordinates_has_empty_columns():
    empty = History(())
    assert empty.trajectory.shape == (0, 0)
    assert empty.natural.shape == (0, 0)


@pytest.mark.parametrize(("at", "value", "says"), [(6, 99, "version"), (10, 99, "compression"), (8, 1, "encrypted")])
def test_an_archive_that_python_cannot_read_is_refused(tmp_path, at, value, says):
    file = history().save(tmp_path / "history.npz")
    content = bytearray(file.read_bytes())
    content[content.find(b"PK\x01\x02") + at] = value  # of the first entry in the central directory
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"corrupt or not an \.npz of arrays .*{says}"):
        files.read(file, "history")
