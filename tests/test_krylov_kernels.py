"""What the model-based operator has compiled, against the same in NumPy."""

import numpy as np
import pytest
import toys

from koopman_hpo.krylov import basis, frozen, modal
from koopman_hpo.krylov.frozen import Coefficients, Small


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 13])
def test_modes_of_their_own_move_as_systems_of_one_column(nesterov, steps):
    draw, m, q = np.random.default_rng(3), 4, 7
    few = lambda *shape: draw.normal(size=(m, *shape))
    one = np.ones((m, 1, 1, 1))
    small = Small(few(1, 1), few(1), one, one, few(1, 1), few(1, 1), np.array([0.5]), nesterov, False)
    at = Coefficients(0.5 * draw.normal(size=(6, 1)), draw.normal(size=(6, q, 1)))
    A, J = frozen.step(small, at.c)
    for got, want in zip(modal.step(small, at.c), (A, J), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
    y, lam = few(3), few(3)
    np.testing.assert_allclose(modal.moved(A, y, steps), frozen.moved(A, y, steps), rtol=1e-9)
    Gamma, before = frozen.swept(A, lam, y, steps)
    for got, want in zip(modal.swept(A, lam, y, steps), (Gamma, before), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())
    np.testing.assert_allclose(modal.sensitivity(small, at, Gamma), frozen.sensitivity(small, at, Gamma), rtol=1e-9)


def grown(H, starts, more=()):
    """(the basis of one growth after the other, products asked for)."""
    asked = []

    def operator(V):
        asked.append(len(V))
        return V @ H

    found = basis.empty(len(H))
    for start, columns in (starts, *more):
        found = basis.grow(found, np.atleast_2d(start), operator, columns)
    return found, sum(asked)


@pytest.mark.parametrize("first", [1, 2])
def test_a_basis_is_orthonormal_and_knows_its_operator_and_what_it_leaves_out(first):
    draw, p = np.random.default_rng(0), 30
    H = toys.spd(draw, p, 0.01, 2.0)
    (Q, T, rest), asked = grown(H, (draw.normal(size=(first, p)), 6), [(draw.normal(size=p), 5)])
    assert len(Q) == asked == 11
    np.testing.assert_allclose(Q @ Q.T, np.eye(11), atol=1e-12)
    np.testing.assert_allclose(T, Q @ H @ Q.T, atol=1e-12)
    image = Q @ H
    np.testing.assert_allclose(rest, np.linalg.norm(image - image @ Q.T @ Q, axis=1), atol=1e-7)


def test_a_chain_spans_the_powers_of_its_operator_and_stops_where_they_end():
    draw, p = np.random.default_rng(1), 20
    H, start = np.diag(np.repeat([0.5, 1.0, 2.0, 3.0], 5)), draw.normal(size=p)
    Q, _, rest = grown(H, (start, 9))[0]
    assert len(Q) == 4  # as many as there are eigenvalues
    np.testing.assert_allclose(rest, 0, atol=1e-9)
    powers = np.array([np.linalg.matrix_power(H, k) @ start for k in range(4)])
    np.testing.assert_allclose(powers @ Q.T @ Q, powers, rtol=1e-9)


def test_a_chain_ends_within_its_tolerance():
    draw, p = np.random.default_rng(2), 60
    H, start = toys.spd(draw, p, 1e-3, 1.0), draw.normal(size=p)
    within = lambda tolerance: basis.grow(basis.empty(p), start[None], lambda V: V @ H, p, 20.0, tolerance)
    found = {tolerance: within(tolerance) for tolerance in (0.1, 1e-3)}
    assert len(found[0.1].Q) < len(found[1e-3].Q) < p
    for tolerance, (Q, T, _) in found.items():
        y = basis.flown(T, Q @ start, 20.0)
        outside = H @ (y @ Q) - Q.T @ (T @ y)
        assert np.linalg.norm(outside) < tolerance * np.linalg.norm(start)
