"""Reverse mode: the exact hypergradient against forward mode, for sgd in all its variants and a network."""

import numpy as np
import pytest
from test_krylov import VARIANTS, after, network, quadratic, rest

from koopman_hpo import Space, inner, log, logit
from koopman_hpo.krylov import exactly


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"loss"}))
@pytest.mark.parametrize("begun", [0, 30])
def test_is_forward_mode_to_rounding(name, begun):
    run = after(VARIANTS[name](), begun)
    before = run.snapshot()
    found = exactly(run, None, None, 60)
    for key, value in run.snapshot().items():
        np.testing.assert_array_equal(value, before[key])
    want = rest(run, 60)
    np.testing.assert_allclose(found.value, want, rtol=1e-9, atol=1e-12 * np.abs(want).max())
    np.testing.assert_allclose(found.params, run.params, rtol=1e-12)
    np.testing.assert_allclose(found.outer_loss, run.hypergradient(None).value, rtol=1e-12)
    assert found.accepted
    assert not found.error.any()
    assert (found.gradients, found.hvps) == (60, 60)


def test_is_exact_where_curvature_changes_too():
    run, train, val = network(lr=log(0.05), momentum=logit(0.9), weight_decay=log(1e-2))
    after(run, 20, train)
    found = exactly(run, train, val, 80)
    np.testing.assert_allclose(found.value, rest(run, 80, train, val), rtol=1e-8)


def test_says_where_it_cannot():
    adam = inner.adam(quadratic(), Space(lr=log(1e-2)))
    penalised = inner.sgd(quadratic(penalty=True), Space(lr=log(0.1), l2=log(0.1)))
    plain = inner.sgd(quadratic(), Space(lr=log(0.1)))
    assert exactly(adam, None, None, 10) is exactly(penalised, None, None, 10) is exactly(plain, None, None, 0) is None
    assert exactly(plain, None, None, 10**7) is None  # its states cannot be kept
