"""What the noise of mini-batches does: to the loss at the horizon, and to the mean of training on the way."""

from types import SimpleNamespace

import numpy as np
import pytest

from koopman_hpo import Hyperparameter, Problem, Space, inner, log, logit
from koopman_hpo.krylov import drift, estimate, noise, roll
from koopman_hpo.krylov.frozen import Coefficients, Piece, along, merged
from koopman_hpo.krylov.model import Model

SLOPE, BEND, SIZE = 1.0, 0.4, 0.5  # of a cubic loss, and its noise


def cubic(theta, bend=BEND):
    """`sum(SLOPE/2 theta^2 + bend/6 theta^3)`, whose batches add their own gradient; the outer loss is linear: its
    curvature is nothing, so that noise changes it through the mean alone."""

    def grad_jvp(theta, hyper, Z, dhyper, batch):
        own = 0.0 if batch is None else batch
        return (
            np.sum(SLOPE / 2 * theta**2 + bend / 6 * theta**3),
            SLOPE * theta + bend / 2 * theta**2 + own,
            Z * (SLOPE + bend * theta),
        )

    outer = lambda theta, hyper, batch: (theta.sum(), np.ones_like(theta), {})
    return Problem(theta, grad_jvp, outer, hyper=frozenset(), outer_hvp=lambda theta, hyper, V, batch: 0 * V)


def mean_of_all(run, mu, steps):
    """d E[theta] / d log lr after so many steps with independent noise: mean and covariance by recursion, in which the
    third moment is left out, and one complex step."""
    e = 1e-30
    now = run.snapshot()
    m, v = now["theta"][0] + 1j * e * now["Z"][0, 0], now["slots"][0][0] + 1j * e * now["dslots"][0][0, 0]
    dd = dv = vv = 0j
    for t in range(run.t, run.t + steps):
        at = run.space.at(run.phi, t)
        rate = at.values["lr"] + 1j * e * at.seeds["lr"][0]
        slope = SLOPE + BEND * m
        v = mu * v + SLOPE * m + BEND / 2 * (m**2 + dd)
        m = m - rate * v
        vv, dv = mu**2 * vv + 2 * mu * slope * dv + slope**2 * dd + SIZE**2, mu * dv + slope * dd
        dd, dv = dd - 2 * rate * dv + rate**2 * vv, dv - rate * vv
    return m.imag / e


def after_20(lr, mu):
    run = inner.sgd(cubic(np.array([0.3])), Space(lr=lr if isinstance(lr, Hyperparameter) else log(lr)), momentum=mu)
    for _ in range(20):
        run.step(run.space.phi0, None)
    return run


@pytest.mark.parametrize("mu", [0.0, 0.5])
@pytest.mark.parametrize(("lr", "steps"), [(0.01, 1000), (0.05, 100), (0.05, 1000), (0.2, 100)])
def test_a_cubic_loss_moves_the_mean_of_training(lr, mu, steps):
    run = after_20(lr, mu)
    batches = [np.array([s * SIZE]) for s in (1.0, -1.0, 1.0, -1.0)]
    found = estimate(run, None, None, steps, noise="independent", batches=batches, stages=12)
    np.testing.assert_allclose(found.estimate[0], mean_of_all(run, mu, steps), rtol=0.02)


@pytest.mark.parametrize("ends", [(1, 0), (1, 0.05), (0.05, 1)])
def test_the_pull_on_the_mean_knows_the_schedule(ends):
    """The last coefficients alone would say half of it where lr falls."""
    run = after_20(log(0.05, knots=(0, 220), factors=ends), 0.5)
    batches = [np.array([s * SIZE]) for s in (1.0, -1.0, 1.0, -1.0)]
    found = estimate(run, None, None, 200, noise="independent", batches=batches, stages=12)
    np.testing.assert_allclose(found.estimate[0], mean_of_all(run, 0.5, 200), rtol=0.12)


def test_so_do_many_real_runs():
    """200,000 of them, each a coordinate, which the loss keeps apart: their mean is known to a twentieth."""
    lr, mu, p, draw = 0.2, 0.5, 200000, np.random.default_rng(0)
    run = inner.sgd(cubic(np.full(p, 0.3)), Space(lr=log(lr)), momentum=mu)
    one = inner.sgd(cubic(np.array([0.3])), Space(lr=log(lr)), momentum=mu)
    found = estimate(one, None, None, 60, noise="independent", batches=[np.array([SIZE]), np.array([-SIZE])], stages=12)
    for _ in range(60):
        run.step(run.space.phi0, SIZE * draw.normal(size=p))
    h = run.hypergradient(None).grad / p
    np.testing.assert_allclose(found.estimate, h, rtol=0.1)
    assert found.error > 0.4 * np.abs(found.estimate)  # all of it is a pull, of which half is doubted


def test_a_quadratic_loss_does_not():
    run = inner.sgd(cubic(np.array([0.3, -0.2, 0.5]), bend=0.0), Space(lr=log(0.1), momentum=logit(0.5)))
    draw = np.random.default_rng(0)
    batches = [SIZE * draw.normal(size=3) for _ in range(16)]
    found = estimate(run, None, None, 100, noise="independent", batches=batches)
    np.testing.assert_array_equal(found.estimate, estimate(run, None, None, 100).estimate)


def settled(batches, samples, seed=0, size=4, lr=0.1):
    """The model of a run on a cubic loss, its stages for 50 steps, and its noise after them."""
    run = inner.sgd(cubic(np.linspace(-0.3, 0.5, size)), Space(lr=log(lr), momentum=logit(0.5)))
    model = Model(run.dynamics(), run.space, None, None, None)
    rolled = roll.forward(model, 50, 6, size, 0.0, True, 0.0)
    stages = [stage for stage, _ in rolled.stages]
    return model, stages, noise.measured(model, rolled, batches, None, samples, size, seed, False)


def test_each_stage_pulls_with_the_covariance_that_it_has_by_then():
    """The third derivative is known, and with one parameter the deviations are exact."""
    batches = [np.array([s * SIZE]) for s in (1.0, -1.0, 1.0, -1.0)]
    model, stages, found = settled(batches, 4, size=1, lr=0.01)
    assert len(stages) > 3
    middle = [stage.start.t + stage.steps // 2 for stage in stages]
    adjoint = [np.array([1.0 / t]) for t in middle]
    change = [along(noise.left(found, [Piece(found.at, t)]), found.at, batch=1).mean(axis=(1, 2, 3)) for t in middle]
    want = sum(BEND / 2 * found.scale**2 * dS / t for dS, t in zip(change, middle, strict=True))
    np.testing.assert_allclose(drift.pull(model, found, list(zip(stages, adjoint, strict=True))), want, rtol=1e-9)


def test_stages_that_hardly_count_cost_nothing():
    model, stages, found = settled([np.ones(4), -np.ones(4)], 4)
    adjoint = [np.full(4, 1e-6 if i < 2 else 1.0) for i in range(len(stages))]
    before = model.hvps
    drift.pull(model, found, list(zip(stages, adjoint, strict=True)))
    assert model.hvps - before == 2 * 2 * (len(stages) - 2)


def test_deviations_have_the_covariance_of_the_noise_and_change_with_it():
    draw = np.random.default_rng(1)
    _, _, found = settled([draw.normal(size=4) for _ in range(4)], samples=4)
    at, columns = found.at, (found.scale * found.Q)
    D, dD = drift.deviations(found, [Piece(at, 30)], 16)  # as many as there are columns: their signs are orthogonal
    whole = lambda S: np.einsum("...nab,nap,nbq->...pq", S, columns, columns) / len(columns)
    left = noise.left(found, [Piece(at, 30)])
    Sigma = whole(left(at.c[:, None]))
    np.testing.assert_allclose(D.T @ D / 16, Sigma, rtol=1e-9, atol=1e-12 * np.abs(Sigma).max())
    change = np.einsum("qkp,kr->qpr", dD, D) / 16
    np.testing.assert_allclose(change + change.swapaxes(1, 2), whole(along(left, at, batch=1)), rtol=1e-7, atol=1e-12)


def test_a_root_and_its_change_of_a_singular_covariance():
    draw = np.random.default_rng(0)
    U, dU = draw.normal(size=(2, 5, 3, 2))
    S, dS = U @ U.swapaxes(1, 2), U @ dU.swapaxes(1, 2) + dU @ U.swapaxes(1, 2)
    root, change = drift.root_along(S, dS[None])
    np.testing.assert_allclose(root @ root.swapaxes(1, 2), S, atol=1e-12)
    assert np.isfinite(change).all()
    inside = np.linalg.qr(U)[0]  # what S has no part in has no root to change
    got = root @ change[0].swapaxes(1, 2)
    np.testing.assert_allclose(
        inside.swapaxes(1, 2) @ (got + got.swapaxes(1, 2)) @ inside, inside.swapaxes(1, 2) @ dS @ inside, atol=1e-9
    )


@pytest.mark.parametrize("seed", range(3))
def test_one_batch_that_has_all_the_noise_is_not_missed(seed):
    batches = [np.zeros(4) for _ in range(16)]
    batches[5] = np.array([1.0, 2.0, 0.0, 0.0])
    _, _, few = settled(batches, samples=4, seed=seed)
    _, _, all_ = settled(batches, samples=16, seed=seed)
    power = lambda found: found.C[:, 0, 0].mean()
    np.testing.assert_allclose(power(few), power(all_), rtol=1e-9)
    assert len(few.Q) == 4
    run = inner.sgd(cubic(np.linspace(-0.3, 0.5, 4)), Space(lr=log(0.1)))
    assert estimate(run, None, None, 50, noise="independent", batches=batches, samples=4, seed=seed).noise_share > 0


def test_signs_are_orthogonal():
    S = noise.signs(8, 32, 3)
    np.testing.assert_array_equal(S @ S.T, 32 * np.eye(8))
    assert noise.signs(25, 7, 0).shape == (25, 7)
    assert not np.array_equal(noise.signs(8, 32, 4), S)


def test_pieces_are_merged_by_their_means_and_lengths():
    at = lambda x: Coefficients(np.full((6, 1), x), np.full((6, 2, 1), 2 * x))
    parts = [Piece(at(1.0), 3), Piece(at(4.0), 1), Piece(at(2.0), 7)]
    found = merged(parts, 4)
    assert [piece.steps for piece in found] == [4, 4, 3]
    assert [piece.at.c[0, 0] for piece in found] == [1.75, 2.0, 2.0]
    assert [piece.at.dc[0, 1, 0] for piece in found] == [3.5, 4.0, 4.0]
    assert sum(p.steps * p.at.c[2, 0] for p in parts) == sum(p.steps * p.at.c[2, 0] for p in found)


@pytest.mark.parametrize(("epoch", "length"), [(None, 2), (8, 8), (5, 5), (30, 30)])
def test_pieces_of_a_schedule_are_whole_epochs(epoch, length):
    """A part of an epoch would leave noise that the rest of it takes back."""
    at, found = Coefficients(np.zeros((6, 1)), np.zeros((6, 1, 1))), SimpleNamespace(epoch=epoch)
    model = SimpleNamespace(space=SimpleNamespace(scheduled=True), pieces=lambda t, steps: [Piece(at, 1)] * steps)
    steps = [piece.steps for piece in noise.way(model, found, at, 3, 100)]
    assert steps[:-1] == [length] * (len(steps) - 1)
    assert sum(steps) == 100
    model.space.scheduled = False
    assert noise.way(model, found, at, 3, 100) == [Piece(at, 100)]
