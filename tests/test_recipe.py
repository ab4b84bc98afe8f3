"""`search_first`: a short search that is thrown away, then training from there with an lr that falls to zero."""

import math

import numpy as np
import pytest
from koopman_hpo_adapters.numpy import mlp

from koopman_hpo import (
    Global,
    Glocal,
    Guard,
    HyperparameterError,
    Local,
    ShapeError,
    Space,
    Tuner,
    box,
    identity,
    inner,
    log,
    logit,
    outer,
    recipe,
    search_first,
)

rng = np.random.default_rng(0)
X = rng.normal(size=(300, 6))
y = np.argmax(X[:, :3] + 0.3 * rng.normal(size=(300, 3)), axis=1)
VAL = (X[150:], y[150:])
MODEL = mlp((6, 8, 3), seed=0)


def batch(t):
    i = np.random.default_rng(t).choice(150, 20, replace=False)
    return X[i], y[i]


def space(lr=1e-3):
    return Space(lr=log(lr), momentum=logit(0.9), l2=log(1e-4))


def make(space):
    return inner.sgd(MODEL, space)


@pytest.mark.parametrize("lr", [1e-3, 30.0])
def test_it_is_two_tuners_one_after_the_other_bit_for_bit(lr):
    guards = []
    found = search_first(make, space(lr), batch, [VAL], steps=120, callbacks=[lambda tuner: guards.append(tuner.guard)])
    assert any(found.search.history.event) == (lr > 1)  # the guard has to do
    searched = Space(lr=log(lr), momentum=logit(0.5, bounds=(0.1, 0.9)), l2=log(1e-4))
    careful = Guard(again=1.0, excess=0.5, chaos_growth=math.inf)
    search = Tuner(make(searched), Local(), steps=40, window=2, guard=careful, outer=outer.adam(0.5)).fit(batch, [VAL])
    np.testing.assert_array_equal(found.search.params, search.params)
    at = search.learned
    height = log(10 * at["lr"], knots=(0, 120), factors=(1, 0))
    begun = Space(lr=height, momentum=logit(at["momentum"], bounds=(0.1, 0.9)), l2=log(5e-3))
    careful = Guard(again=0.3, excess=0.5, chaos_growth=math.inf)
    (run,) = found.runs
    assert [guard.again for guard in guards] == [1.0] * 20 + [0.3] * 5
    assert guards[-1] == careful
    want = Tuner(make(begun), Local(), steps=120, guard=careful, outer=outer.adam(0.25)).fit(batch, [VAL])
    np.testing.assert_array_equal(run.params, want.params)
    assert found.best is run
    assert found.steps == 40 + 120
    again = search_first(make, space(lr), batch, [VAL], steps=120)
    np.testing.assert_array_equal(again.best.params, run.params)


def test_from_any_start_over_five_decades_it_ends_as_low():
    ends = [search_first(make, space(lr), batch, [VAL], steps=300).best.value for lr in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)]
    plain = [Tuner(make(space(lr)), Local(), steps=400).fit(batch, [VAL]).value for lr in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)]
    assert max(ends) < 1.1 * min(ends)
    assert max(ends) < 0.9 * np.median(plain)


def test_further_runs_begin_where_the_last_learned_with_the_batches_that_follow():
    asked = []

    def counted(t):
        asked.append(t)
        return batch(t)

    ends = []
    found = search_first(
        make, space(), counted, [VAL], steps=60, runs=3, share=0.5, callbacks=[lambda tuner: ends.append(tuner.inner)]
    )
    assert asked == [*range(30), *range(180)]
    assert len(found.runs) == 3
    assert len(set(map(id, ends))) == 4
    assert found.steps == 30 + 180
    assert found.best.value == min(run.value for run in found.runs)
    begun = recipe.falling(space(), found.search.learned, 60).replace(**found.runs[0].learned)
    tuner = Tuner(make(begun), Local(), steps=60, guard=recipe.CAREFUL, outer=outer.adam(0.25))
    np.testing.assert_array_equal(found.runs[1].params, tuner.fit(lambda t: batch(60 + t), [VAL]).params)


def test_a_search_makes_about_twenty_moves():
    moves = [-(-steps // recipe.window(steps)) for steps in (20, 29, 39, 40, 200, 333, 667)]
    assert moves == [20, 29, 20, 20, 20, 20, 21]
    assert recipe.window(5) == 1


def test_a_list_is_cycled_and_a_loader_goes_on_from_run_to_run():
    some = [batch(t) for t in range(7)]
    listed = search_first(make, space(), some, [VAL], steps=60)
    np.testing.assert_array_equal(
        listed.best.params, search_first(make, space(), lambda t: some[t % 7], [VAL], steps=60).best.params
    )
    stream = search_first(make, space(), iter([batch(t) for t in range(80)]), lambda n: VAL, steps=60)
    shifted = search_first(make, space(), batch, [VAL], steps=60)
    np.testing.assert_array_equal(stream.search.params, shifted.search.params)
    assert stream.best.value != shifted.best.value  # of other batches: 20 to 79


def test_the_run_that_ended_lowest_is_the_best_and_one_that_diverged_never_is():
    found = search_first(make, space(), batch, [VAL], steps=60, runs=2)
    ended = lambda value: found.best._replace(value=value)
    for values, which in (((0.3, 0.2), 1), ((0.2, 0.3), 0), ((math.nan, 9.0), 1), ((math.inf, 9.0), 1)):
        runs = tuple(ended(v) for v in values)
        assert found._replace(runs=runs).best is runs[which]


def test_what_is_searched_and_where_the_runs_begin():
    mine = Space(
        lr=log([1e-3, 1e-2], bounds=(1e-6, 2.0)),
        momentum=logit(0.95, bounds=(0.3, 0.99)),
        weight_decay=log(1e-5, bounds=(1e-8, 1e-3)),
        shift=identity(0.5),
    )
    searched = recipe.searching(mine)
    assert searched["momentum"].bounds == (0.3, 0.9)
    assert searched["momentum"].value == 0.5
    assert [searched[name] is mine[name] for name in mine] == [True, False, True, True]
    at = {"lr": [0.03, 0.5], "momentum": 0.7, "weight_decay": 1e-4, "shift": -1.0}
    begun = recipe.falling(mine, at, 90)
    assert begun["lr"].value.tolist() == pytest.approx([0.3, 2.0])  # within its bounds
    assert [begun.at(begun.phi0, t).values["lr"].tolist() for t in (45, 90)] == [pytest.approx([0.15, 1.0]), [0, 0]]
    assert begun["weight_decay"].value == 1e-3
    assert (begun["momentum"].value, begun["momentum"].bounds) == (0.7, (0.3, 0.9))
    assert begun["shift"].value == 0.5  # of the search, too short for it, nothing is taken
    kept = recipe.falling(mine, at, 90, peak=3.0, penalty=None)
    assert kept["lr"].value.tolist() == pytest.approx([0.09, 1.5])
    assert kept["weight_decay"].value == 1e-5
    held = recipe.falling(Space(lr=log(1e-3, schedule="constant")), {"lr": 1e-2}, 90)
    assert [held.at(held.phi0, t).values["lr"] for t in (45, 90)] == pytest.approx([0.05, 0.0])


@pytest.mark.parametrize("bounds", [(0.92, 0.99), (0.01, 0.05)])
def test_bounds_that_leave_nothing_are_the_users(bounds):
    mine = Space(lr=log(1e-3), momentum=logit(sum(bounds) / 2, bounds=bounds))
    assert recipe.searching(mine)["momentum"].bounds == bounds
    assert recipe.searching(mine)["momentum"].value == min(max(0.5, bounds[0]), bounds[1])
    knotted = Space(lr=log(1e-3), momentum=logit([0.8, 0.9], knots=(0, 50)))
    assert recipe.searching(knotted)["momentum"] is knotted["momentum"]


@pytest.mark.parametrize(
    ("momentum", "penalty"),
    [
        (box(0.95, 0.5, 0.99), box(1e-4, 0.0, 1e-3)),
        (box(0.95, 0.6, 0.99), box(2e-2, 0.01, 0.1)),
        (box(0.2, 0.0, 0.4), log(1e-6, bounds=(1e-9, 1e-4))),
        (logit(0.9, shares=(1.0, 0.5)), log([1e-4, 1e-3])),
        (identity(0.9, bounds=(0.0, 0.95)), identity(0.0, bounds=(0.0, 1.0))),
    ],
)
def test_a_start_beyond_the_bounds_is_as_near_as_they_allow(momentum, penalty):
    mine = Space(lr=log(1e-3), momentum=momentum, l2=penalty)
    begun = recipe.falling(mine, {"lr": 1e-2, "momentum": recipe.searching(mine)["momentum"].value}, 90)
    for name, at in (("momentum", 0.5), ("l2", 5e-3)):
        low, high = (max(momentum.bounds[0], 0.1), min(momentum.bounds[1], 0.9)) if name == "momentum" else penalty.bounds
        assert begun[name].bounds == (low, high)
        assert begun[name].value == pytest.approx(np.clip(at, low, high), rel=1e-9)


def test_a_penalty_by_another_name_begins_anew_where_the_space_says():
    one = mlp((6, 8, 3), seed=0)
    named = search_first(
        lambda s: inner.sgd(one, s), Space(lr=log(1e-7), weight_decay=log(1e-4)), batch, [VAL], steps=90, penalty=None
    )
    assert named.search.learned["weight_decay"] > 1e-3  # a search from so low an lr takes everything far
    assert named.best.history.phi[0][1] == pytest.approx(np.log(1e-4))


def test_callbacks_that_can_be_read_once_are_called_in_every_run():
    ends = []
    search_first(make, space(), batch, [VAL], steps=60, callbacks=(f for f in [lambda tuner: ends.append(tuner.steps)]))
    assert ends == [20] * 20 + [60] * 3


def test_it_takes_any_online_strategy_any_optimizer_and_a_space_of_one():
    one = search_first(lambda s: inner.adam(MODEL, s), Space(lr=log(1e-5)), batch, [VAL], steps=200, strategy=Glocal())
    assert one.best.value < 0.8 * one.search.history.value[0]
    assert {*one.best.history.method} & {"robust", "dmd"}
    knots = Space(lr=log(1e-3), momentum=logit([0.8, 0.9], knots=(0, 50)))
    assert search_first(make, knots, batch, [VAL], steps=60).best.params.shape == MODEL.params.shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"make": 3}, HyperparameterError, "make must be a function"),
        ({"make": lambda s: 3}, ShapeError, "make must return a run"),
        ({"make": lambda s: make(space())}, ShapeError, "of the space that it is given"),
        ({"space": {"lr": 1}}, HyperparameterError, "space must be a Space"),
        ({"space": Space(momentum=logit(0.9))}, HyperparameterError, "must have an 'lr'"),
        ({"space": Space(lr=identity(0.1))}, HyperparameterError, "lr must be made by log"),
        ({"space": Space(lr=log([0.1, 0.2], knots=(0, 9)))}, HyperparameterError, "have no knots"),
        ({"steps": 30}, HyperparameterError, "20 inner steps or more, got share \\* steps = 10"),
        ({"steps": 0}, HyperparameterError, "steps"),
        ({"steps": 2.5}, HyperparameterError, "steps"),
        ({"runs": 0}, HyperparameterError, "runs"),
        ({"share": 0.0}, HyperparameterError, "share of a run in"),
        ({"share": 1.5}, HyperparameterError, "share of a run in"),
        ({"peak": math.inf}, HyperparameterError, "peak"),
        ({"penalty": -1.0}, HyperparameterError, "penalty"),
        ({"strategy": Global()}, HyperparameterError, "needs an online strategy"),
        ({"batches": batch(0)}, ShapeError, "batches must be a list"),
        ({"val_batches": VAL}, ShapeError, "val_batches must be a list"),
        ({"callbacks": 3}, HyperparameterError, "callbacks"),
    ],
)
def test_wrong_input_is_refused_before_training(change, error, message):
    taken = []
    good = {
        "make": make,
        "space": space(),
        "batches": lambda t: taken.append(t) or batch(t),
        "val_batches": [VAL],
        "steps": 90,
    }
    with pytest.raises(error, match=message):
        search_first(**(good | change))
    assert taken == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, k: inner.sgd(MODEL, Space(lr=log(1e-3)).replace(lr=s["lr"].value)), "other bounds or schedules"),
        (
            lambda s, k: inner.sgd(mlp((6, 8, 3), seed=k), s),
            "call 2 returned others: a model that has been trained already",
        ),
    ],
)
def test_runs_of_another_schedule_or_model_are_refused(change, message):
    calls = []

    def made(space):
        calls.append(space)
        return change(space, len(calls))

    with pytest.raises(ShapeError, match=message):
        search_first(made, Space(lr=log(1e-3)), batch, [VAL], steps=90)


def test_a_run_that_has_begun_is_refused():
    kept = []

    def cached(space):
        kept.append(kept[0] if kept else make(space))
        return kept[-1]

    with pytest.raises(ShapeError, match="at its start, it returned one at step 30"):
        search_first(cached, space(), batch, [VAL], steps=90)
