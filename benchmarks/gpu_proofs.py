"""What has to hold on a card before anything is measured there: the kernels are right, and the tangents of a whole step."""

from __future__ import annotations

import numpy as np
import torch
from cuda_cases import CUDA, RULES, TOLERANCE, Case, close, opened, packed
from gpu_models import SHARES, Training, images, resnet, texts, transformer
from numba import cuda

from koopman_hpo.kernels.cuda import trajectory


def prove_kernels(segments, q, m, seed):
    """Every kernel against float64 NumPy; raises AssertionError where one differs."""
    for name in RULES:
        for dtype in (np.float64, np.float32):
            case = Case(name, segments, q, dtype, seed, run=1024)
            close(case.on_cuda(), case.expected(), TOLERANCE[dtype])
        for stored in (np.float16, np.uint16):
            case = Case(name, segments, q, np.float32, seed, run=1024).rounded(stored)
            got, wanted = case.on_cuda(stored), case.expected()
            close(got._replace(Z=wanted.Z, dslots=wanted.dslots), wanted, TOLERANCE[np.float32])
            np.testing.assert_allclose(got.Z, wanted.Z, rtol=4e-3, atol=1e-4)
    rng, p = np.random.default_rng(seed), sum(segments)
    Z, dE, H, c = rng.normal(size=(q, p)), rng.normal(size=p), rng.normal(size=(m, p)), rng.normal(size=m)
    d = cuda.to_device
    out, work = d(np.empty(q)), d(np.empty((SHARES, q)))
    scale = np.sqrt(p)
    CUDA.project(d(Z), d(dE), work, out)
    np.testing.assert_allclose(out.copy_to_host(), Z @ dE, atol=1e-13 * scale)
    bits = packed(Z, np.uint16)
    CUDA.project(d(bits), d(dE.astype(np.float32)), work, out)
    np.testing.assert_allclose(out.copy_to_host(), opened(bits).astype(float) @ dE.astype(np.float32), atol=1e-13 * scale)
    for call, wanted in (
        (lambda out: trajectory.gram_row(d(H), m, 0, d(np.empty((SHARES, m))), out), (H - H[0]) @ (H[-1] - H[0])),
        (lambda out: trajectory.gram(d(H[:, :500].copy()), out), (H - H[0])[:, :500] @ (H - H[0])[:, :500].T),
        (lambda out: trajectory.hankel_gram(d(H @ H.T), 2, out), (H @ H.T)[:-1, :-1] + (H @ H.T)[1:, 1:]),
        (lambda out: trajectory.combine(d(c), d(H), out), c @ H),
    ):
        out = d(np.empty(wanted.shape))
        call(out)
        np.testing.assert_allclose(out.copy_to_host(), wanted, rtol=1e-12, atol=1e-12 * scale)
    x = d(Z)
    CUDA.scale(x, 0.7)
    np.testing.assert_array_equal(x.copy_to_host(), 0.7 * Z)


def prove_training(device):
    """The tangents of the gradient that a whole step uses, against central differences of the gradient."""
    torch.manual_seed(0)
    small = (resnet(4), images(6, 8, device.name, torch.float64)), (transformer(11, 8, 1), texts(3, 5, 11, device.name))
    for model, batch in small:
        run = Training(model.double(), batch, device)
        for _ in range(3):
            run.step()
        h = run.hypergradient().clone()
        torch.testing.assert_close(h, run.state.Z @ run.grads.g, rtol=1e-12, atol=1e-14)
        theta, Z, e = run.state.theta.clone(), run.state.Z.clone(), 1e-6
        run.step()
        for j in range(len(Z)):
            sides = []
            for sign in (1, -1):
                run.state.theta.copy_(theta + sign * e * Z[j] / Z[j].norm())
                sides.append(torch.cat([x.reshape(-1) for x in torch.autograd.grad(run.loss(), run.params)]))
            slope = (sides[0] - sides[1]) * (Z[j].norm() / (2 * e))
            assert (slope - run.grads.dG[j]).norm() < 1e-5 * slope.norm(), "the tangents of the gradient are wrong"
