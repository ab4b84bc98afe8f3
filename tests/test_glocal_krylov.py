"""`Glocal(estimator="krylov" | "auto")`: what a tuner makes of the model-based operator."""

import numpy as np
import pytest
from koopman_hpo_adapters.numpy import mlp

from koopman_hpo import (
    AdapterError,
    Glocal,
    HyperparameterError,
    ShapeError,
    Space,
    Tuner,
    checkpoint,
    inner,
    krylov,
    log,
    logit,
)

STEPS, WINDOW = 60, 20
OPEN = {"gate": 10.0}
draw = np.random.default_rng(0)
X = draw.normal(size=(300, 6))
Y = np.argmax(X[:, :3] + 0.5 * draw.normal(size=(300, 3)), axis=1)
TRAIN, VAL = (X[:200], Y[:200]), (X[200:], Y[200:])
BATCHES = [(X[i : i + 20], Y[i : i + 20]) for i in range(0, 200, 20)]


def start(make=inner.sgd, **space):
    return make(mlp((6, 8, 3)), Space(**(space or {"lr": log(0.05), "momentum": logit(0.8)})))


def tuned(strategy, run=None, batches=(TRAIN,), **more):
    tuner = Tuner(start() if run is None else run, strategy, steps=STEPS, window=WINDOW, **more)
    tuner.fit(list(batches), [VAL])
    return tuner.history


def by_hand(strategy, windows=1, run=None, batch=TRAIN):
    """A run, its trajectory and its last outer step, with what stands before the last of some windows closes."""
    tuner = Tuner(start() if run is None else run, strategy, steps=STEPS, window=WINDOW)
    for _ in range(windows * WINDOW - 1):
        tuner.step(batch, VAL)
    return tuner


def test_the_record_is_the_estimate_from_where_the_run_stood():
    tuner = by_hand(Glocal(estimator="krylov", train_batch=TRAIN, settings=OPEN | {"seed": 3}), windows=2)
    phi, run = tuner.phi, tuner.inner
    twin = start()
    twin.restore(run.snapshot())
    twin.step(phi, TRAIN)
    want = krylov.estimate(twin, TRAIN, VAL, STEPS - 2 * WINDOW, seed=3, **OPEN)
    tuner.step(TRAIN, VAL)
    record = tuner.history[1]
    assert want.accepted
    assert record.accepted
    assert (record.method, record.reason) == ("krylov", want.reason)
    np.testing.assert_array_equal(record.estimate, want.value)
    np.testing.assert_array_equal(record.error, want.error)


def test_an_accepted_value_is_not_clipped():
    plain, free = (
        tuned(Glocal(clip=1e-6, estimator=e, train_batch=TRAIN, settings=OPEN)) for e in ("trajectory", "krylov")
    )
    assert np.abs(plain.estimate[0]).max() < 1e-5 * np.abs(free.estimate[0]).max()


def test_a_closed_gate_gives_the_trajectorys_and_both_reasons():
    shut = tuned(Glocal(estimator="krylov", train_batch=TRAIN, settings={"gate": 1e-12}))
    plain = tuned(Glocal())
    np.testing.assert_array_equal(shut.estimate[:2], plain.estimate[:2])
    for a, b in zip(shut.reason[:2], plain.reason[:2], strict=True):
        assert "krylov not accepted" in a
        assert a.endswith(b)


@pytest.mark.parametrize(
    ("change", "method"),
    [
        ({}, "krylov"),
        ({"batches": BATCHES, "noise": "epoch"}, None),
        ({"batches": BATCHES, "noise": "epoch", "share": 1e3}, "krylov"),
        ({"batches": BATCHES}, None),
    ],
)
def test_auto_is_for_deterministic_problems_or_a_cheap_estimate(change, method):
    history = tuned(Glocal(estimator="auto", train_batch=TRAIN, settings=OPEN, **change))
    assert (history.method[0] == "krylov") == (method == "krylov")
    if method is None:
        assert "no krylov (about" in history.reason[0]
        np.testing.assert_array_equal(history.estimate, tuned(Glocal()).estimate)


@pytest.mark.parametrize("one", [TRAIN, (TRAIN[0], TRAIN[1]), tuple(a.copy() for a in TRAIN)])
def test_auto_takes_training_for_deterministic_only_where_it_is_or_is_said_to_be(one):
    """A copy of the batch is another one, until `batches` says that there is no other."""
    known = one[0] is TRAIN[0]
    history = tuned(Glocal(estimator="auto", train_batch=TRAIN, settings=OPEN), batches=[one])
    assert (history.method[0] == "krylov") == known
    said = tuned(Glocal(estimator="auto", train_batch=TRAIN, batches=[TRAIN], settings=OPEN), batches=[one])
    assert said.method[0] == "krylov"


def test_auto_leaves_batches_that_it_is_not_told_of_to_the_trajectory():
    history = tuned(Glocal(estimator="auto", train_batch=TRAIN, settings=OPEN), batches=[TRAIN] * 3 + BATCHES)
    assert "steps are not all on train_batch" in history.reason[0]
    np.testing.assert_array_equal(history.estimate, tuned(Glocal(), batches=[TRAIN] * 3 + BATCHES).estimate)


def test_auto_is_for_hyperparameters_of_the_loss():
    run = start(l2=log(1e-2), lr=log(0.05))
    history = tuned(Glocal(estimator="auto", train_batch=TRAIN, batches=BATCHES, settings=OPEN), run, BATCHES)
    assert history.method[0] == "krylov"


def test_a_run_that_cannot_be_frozen_is_refused_or_said():
    run = start(inner.adagrad, lr=log(0.05))
    with pytest.raises(AdapterError, match="Glocal: adagrad has no frozen step"):
        Tuner(run, Glocal(estimator="krylov", train_batch=TRAIN), steps=STEPS)
    history = tuned(Glocal(estimator="auto", train_batch=TRAIN), start(inner.adagrad, lr=log(0.05)))
    assert "no krylov" in history.reason[0]
    assert "adagrad" in history.reason[0]
    np.testing.assert_array_equal(history.estimate, tuned(Glocal(), start(inner.adagrad, lr=log(0.05))).estimate)


def test_auto_leaves_what_krylov_neglects_to_the_trajectory():
    history = tuned(Glocal(estimator="auto", train_batch=TRAIN), start(inner.adam, lr=log(1e-3), beta2=logit(0.99)))
    assert "beta2" in history.reason[0]
    assert history.method[0] != "krylov"


@pytest.mark.parametrize("mode", ["online", "restart"])
@pytest.mark.parametrize("change", [{}, {"batches": BATCHES, "noise": "epoch", "share": 1e3}, None])
def test_resumes_bit_for_bit(tmp_path, mode, change):
    strategy = Glocal(estimator="auto", train_batch=TRAIN, mode=mode, cut=0.5, settings=OPEN, **change or {})
    batches = {0: [TRAIN], 3: BATCHES}[len(change)] if change is not None else [BATCHES[0], *[TRAIN] * 40]
    make = lambda: Tuner(start(), strategy, steps=STEPS, window=WINDOW, runs=2)
    whole = make()
    whole.fit(batches, [VAL])
    assert ("krylov" in whole.history.method) == (change is not None)
    first = make()
    for n in range(27):
        first.step(batches[n % len(batches)], VAL)
    path = checkpoint.save(tmp_path / "run", first)
    second = checkpoint.load(path, make())
    second.fit(batches, [VAL])
    for name, column in whole.history.arrays().items():
        np.testing.assert_array_equal(column, second.history.arrays()[name])
    np.testing.assert_array_equal(whole.result.params, second.result.params)


def test_looking_fails_before_anything_moves():
    class Broken(Glocal):
        def look(self, H, ahead, window):
            raise RuntimeError("not today")

    tuner = by_hand(Broken(estimator="krylov", train_batch=TRAIN))
    with pytest.raises(RuntimeError, match="not today"):
        tuner.step(TRAIN, VAL)
    assert len(tuner.history) == 0
    before = tuner.inner.params
    tuner.strategy = Glocal(estimator="krylov", train_batch=TRAIN, settings=OPEN)
    tuner.step(TRAIN, VAL)  # settles what was owed, without a step of its own
    np.testing.assert_array_equal(tuner.inner.params, before)
    assert tuner.history.method[0] == "krylov"


def test_a_strangers_strategy_needs_only_estimate():
    class Stranger:
        mode, snapshots, cut = "online", 5, 0.1
        seen = ()

        def estimate(self, H, ahead):
            self.seen = (*self.seen, (H.shape, ahead))
            return Glocal().estimate(H, ahead)

    stranger = Stranger()
    tuned(stranger)
    assert stranger.seen == (((5, 2), 10), ((5, 2), 5), ((5, 2), 0))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"estimator": "dmd"}, HyperparameterError, "estimator"),
        ({"train_batch": None, "settings": {"colums": 3}}, HyperparameterError, "columns"),
        ({"train_batch": None, "settings": {"columns": 1}}, HyperparameterError, "Glocal: columns"),
        ({"train_batch": None, "noise": "epoch"}, ShapeError, "Glocal: noise='epoch' needs batches"),
        ({"train_batch": None, "noise": "white"}, HyperparameterError, "white"),
        ({"train_batch": None, "batches": (1, 2)}, ShapeError, "list"),
        ({"share": 0}, HyperparameterError, "share"),
        ({}, HyperparameterError, "needs train_batch"),
    ],
)
@pytest.mark.parametrize("estimator", ["krylov", "auto"])
def test_refuses_what_makes_no_sense(estimator, change, error, says):
    with pytest.raises(error, match=says):
        Glocal(**({"estimator": estimator} | change))


def test_settings_are_part_of_a_checkpoint(tmp_path):
    strategy = lambda columns: Glocal(estimator="krylov", train_batch=TRAIN, settings={"columns": columns})
    path = checkpoint.save(tmp_path / "run", by_hand(strategy(10)))
    with pytest.raises(Exception, match="columns"):
        checkpoint.load(path, Tuner(start(), strategy(12), steps=STEPS, window=WINDOW))
