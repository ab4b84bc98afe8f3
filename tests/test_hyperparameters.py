"""Spaces: round trips, bounds, seeds as derivatives, schedules and groups, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from koopman_hpo import HyperparameterError, ShapeError, Space, box, identity, log, logit
from koopman_hpo.transforms import transform

finite = {"allow_nan": False, "allow_infinity": False}


@given(x=st.floats(1e-9, 1e3, **finite))
def test_log_round_trip_is_exact_to_rounding(x):
    space = Space(a=log(x))
    assert space.natural(space.phi0)["a"] == pytest.approx(x, rel=2e-15 * (1 + abs(np.log(x))))


@given(x=st.floats(1e-5, 1 - 1e-5, **finite))
def test_logit_round_trip_is_exact_to_rounding(x):
    space = Space(a=logit(x))
    # a rounding of phi is multiplied by x (1 - x) phi
    assert space.natural(space.phi0)["a"] == pytest.approx(x, rel=1e-15 * (2 + abs(space.phi0[0])))


@given(low=st.floats(-1e3, 1e3, **finite), width=st.floats(1e-3, 1e3, **finite), share=st.floats(1e-3, 1 - 1e-3, **finite))
def test_box_round_trip_is_exact_to_rounding(low, width, share):
    x = low + width * share
    space = Space(a=box(x, low, low + width), b=identity(x))
    natural = space.natural(space.phi0)
    assert natural["a"] == pytest.approx(x, abs=1e-13 * (abs(low) + width))
    assert natural["b"] == x


def mixed():
    return Space(
        lr=log([0.1, 0.05, 0.01], knots=(0, 10, 30)),
        momentum=logit(0.9),
        l2=log([[1e-3, 1e-4], [1e-2, 1e-5]], knots=(0, 7), schedule="constant"),
        groups=box([0.2, 0.5], 0, 1),
        shift=identity(-3.0),
        decay=log([0.1, 0.3], knots=(0, 10, 30), factors=(1, 0.5, 0)),
    )


@pytest.mark.parametrize("t", [0, 5, 7, 10, 29, 30, 1000])
def test_seeds_are_the_derivatives_of_the_values(t):
    space, e = mixed(), 1e-6
    values, seeds = space.at(space.phi0, t)
    for j in range(space.q):
        step = np.zeros(space.q)
        step[j] = e
        up, down = space.at(space.phi0 + step, t).values, space.at(space.phi0 - step, t).values
        for name in space.names:
            difference = (np.asarray(up[name]) - down[name]) / (2 * e)
            # rounding of the value over the step, and its third derivative times the step squared
            np.testing.assert_allclose(seeds[name][j], difference, atol=1e-9 * (1 + np.abs(values[name]).max()))


def test_linear_schedule_is_linear_in_natural_values_and_constant_outside():
    space = Space(lr=log([0.1, 0.3], knots=(0, 10)))
    values = [space.at(space.phi0, t).values["lr"] for t in (0, 5, 10, 99)]
    np.testing.assert_allclose(values, [0.1, 0.2, 0.3, 0.3])


def test_constant_schedule_jumps_at_its_knots():
    space = Space(lr=log([0.1, 0.3], knots=(0, 10), schedule="constant"))
    values = [space.at(space.phi0, t).values["lr"] for t in (0, 9, 10, 99)]
    np.testing.assert_allclose(values, [0.1, 0.1, 0.3, 0.3])


def test_factors_are_multiples_of_one_value_at_the_knots():
    space = Space(
        lr=log(0.2, knots=(0, 10, 30), factors=(1, 1, 0)), m=logit(0.8, knots=(0, 5), factors=(0.5, 1), schedule="constant")
    )
    assert space.labels == ("lr", "m")
    assert space.scheduled
    values = [space.at(space.phi0, t).values for t in (0, 10, 20, 30, 99)]
    np.testing.assert_allclose([v["lr"] for v in values], [0.2, 0.2, 0.1, 0, 0])
    np.testing.assert_allclose([v["m"] for v in values], [0.4, 0.8, 0.8, 0.8, 0.8])
    assert space.natural(space.phi0)["lr"] == pytest.approx(0.2)  # the height


def test_shares_are_multiples_of_one_value_by_group():
    space = Space(
        wd=log(0.2, shares=(1, 0, 0.5)), lr=log([0.1, 0.3], knots=(0, 10), shares=(2, 1)), a=identity(3.0, shares=(1,))
    )
    assert space.labels == ("wd", "lr@0", "lr@10", "a")
    point = space.at(space.phi0, 5)
    np.testing.assert_allclose(point.values["wd"], [0.2, 0, 0.1])
    np.testing.assert_allclose(point.values["lr"], [0.4, 0.2])
    assert point.values["a"].shape == (1,)
    np.testing.assert_allclose(point.seeds["wd"], [[0.2, 0, 0.1], [0] * 3, [0] * 3, [0] * 3])
    np.testing.assert_allclose(point.seeds["lr"][1:3], [[0.1, 0.05], [0.3, 0.15]])
    assert space.natural(space.phi0)["wd"] == pytest.approx(0.2)  # the height


def test_labels_name_every_coordinate():
    assert mixed().labels == (
        "lr@0", "lr@10", "lr@30", "momentum", "l2[0]@0", "l2[1]@0", "l2[0]@7", "l2[1]@7", "groups[0]", "groups[1]", "shift",
        "decay[0]", "decay[1]",
    )  # fmt: skip


def test_phi_and_natural_are_inverse_and_clip_enforces_the_bounds():
    space = mixed()
    np.testing.assert_allclose(space.phi(space.natural(space.phi0)), space.phi0, rtol=1e-14)
    bounded = Space(lr=log(0.1, bounds=(1e-3, 1.0)), m=logit(0.5, bounds=(0.1, 0.9)))
    for far in (1e9, -1e9):
        natural = bounded.natural(bounded.clip(np.full(2, far)))
        assert 1e-3 <= natural["lr"] <= 1.0
        assert 0.1 <= natural["m"] <= 0.9


def test_gradient_divides_by_the_slope():
    space = Space(lr=log(0.1), m=logit(0.8), c=identity(2.0))
    assert space.gradient(space.phi0, np.ones(3)) == pytest.approx({"lr": 10.0, "m": 1 / 0.16, "c": 1.0})


def test_replace_moves_a_start_and_keeps_the_rest():
    space = mixed().replace(momentum=0.5)
    assert space.natural(space.phi0)["momentum"] == pytest.approx(0.5)
    assert space.labels == mixed().labels


@pytest.mark.parametrize("name", mixed().transforms)
def test_a_transform_is_found_by_its_name(name):
    found = transform(name)
    assert found.name == name
    assert found.to_natural(found.to_phi(0.25)) == pytest.approx(0.25)


def test_an_unknown_transform_is_refused():
    with pytest.raises(HyperparameterError, match="Did you mean 'log'"):
        transform("logg")


def test_the_start_is_the_users_array_no_more():
    value = np.array([0.1, 0.2])
    space = Space(lr=log(value))
    value[:] = 7
    assert space.natural(space.phi0)["lr"] == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: log(0.0), HyperparameterError, "0 < value"),
        (lambda: log(-1.0), HyperparameterError, "0 < value"),
        (lambda: log(float("nan")), HyperparameterError, "finite"),
        (lambda: log(float("inf")), HyperparameterError, "finite"),
        (lambda: log("fast"), ShapeError, "number"),
        (lambda: log([]), ShapeError, "shape"),
        (lambda: log(np.ones((2, 2))), ShapeError, "knots"),
        (lambda: log(np.ones((2, 2, 2)), knots=(0, 1)), ShapeError, "scalar"),
        (lambda: logit(1.0), HyperparameterError, "value < 1"),
        (lambda: logit(0.0), HyperparameterError, "0 < value"),
        (lambda: box(2.0, 0, 1), HyperparameterError, "value < 1"),
        (lambda: box(0.5, 1, 0), HyperparameterError, "low < high"),
        (lambda: log(0.1, bounds=(1, 2)), HyperparameterError, "exclude"),
        (lambda: log(0.1, bounds=(2, 1)), HyperparameterError, "low < high"),
        (lambda: log(0.1, bounds=(-1, 1)), HyperparameterError, "within"),
        (lambda: log(0.1, bounds=3), HyperparameterError, "pair"),
        (lambda: log([0.1, 0.2], knots=(0, 5, 9)), ShapeError, "3 knots"),
        (lambda: log([0.1, 0.2], knots=(1, 5)), HyperparameterError, "first one 0"),
        (lambda: log([0.1, 0.2], knots=(0, 0)), HyperparameterError, "increasing"),
        (lambda: log([0.1, 0.2], knots=(0, 2.5)), HyperparameterError, "whole"),
        (lambda: log([0.1, 0.2], knots=(0, 5), schedule="linaer"), HyperparameterError, "'linear'"),
        (lambda: log(0.1, knots=7), HyperparameterError, "knots"),
        (lambda: log(0.1, knots=(0, 5)), ShapeError, "factors="),
        (lambda: log(0.1, factors=(1, 0)), HyperparameterError, "need knots"),
        (lambda: log(0.1, knots=(0, 5), factors=(1, 0, 0)), ShapeError, "2 numbers"),
        (lambda: log(0.1, knots=(0, 5), factors=1), ShapeError, "2 numbers"),
        (lambda: log(0.1, knots=(0, 5), factors="ab"), ShapeError, "number"),
        (lambda: log(0.1, knots=(0, 5), factors=(1, -1)), HyperparameterError, "at least 0"),
        (lambda: log(0.1, knots=(0, 5), factors=(0, 1)), HyperparameterError, "first one above 0"),
        (lambda: log(0.1, knots=(0, 5), factors=(1, np.nan)), HyperparameterError, "finite"),
        (lambda: logit(0.9, knots=(0, 5), factors=(1, 1.05)), HyperparameterError, "at most 1"),
        (lambda: log([[0.1], [0.2]], knots=(0, 5), factors=(1, 0)), ShapeError, "scalar"),
        (lambda: log([0.1, 0.2], shares=(1, 0)), ShapeError, "multiples of one value, got 2"),
        (lambda: log(0.1, shares=[[1, 0]]), ShapeError, "one a group"),
        (lambda: log(0.1, shares=()), ShapeError, "one a group"),
        (lambda: log(0.1, shares=(0, 0)), HyperparameterError, "not all 0"),
        (lambda: log(0.1, shares=(1, -1)), HyperparameterError, "at least 0"),
        (lambda: log(0.1, shares=(1, np.nan)), HyperparameterError, "finite"),
        (lambda: logit(0.9, shares=(1, 1.05)), HyperparameterError, "at most 1"),
        (lambda: replace(box(2.0, 1, 3), shares=(1, 0)), HyperparameterError, "leave the domain"),
        (lambda: replace(box(2.0, 1, 3), knots=(0, 5), factors=(1, 0)), HyperparameterError, "leave the domain"),
        (lambda: replace(box(0.5, 0, 1), knots=(0, 5), factors=(1, 1.5)), HyperparameterError, "at most 1"),
        (lambda: Space(lr=0.1), HyperparameterError, r"lr=log\(0.1\)"),
        (lambda: mixed().phi({"shift": 1}), HyperparameterError, "no value for"),
        (lambda: mixed().phi({"momentun": 1}), HyperparameterError, "'momentum'"),
        (lambda: Space(a=log(1.0)).phi({"a": [1, 2]}), ShapeError, "shape"),
        (lambda: Space(a=log(1.0, bounds=(0.5, 2))).phi({"a": 3}), HyperparameterError, "bounds"),
        (lambda: mixed().natural(np.zeros(3)), ShapeError, "shape"),
        (lambda: Space(a=log(1.0)).natural([np.nan]), HyperparameterError, "finite"),
        (lambda: mixed().replace(lrr=1), HyperparameterError, "'lr'"),
    ],
)
def test_bad_input_is_refused_with_advice(make, error, says):
    with pytest.raises(error, match=says):
        make()
