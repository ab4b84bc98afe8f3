"""Runs of the core on a card are those on the CPU; `test_cuda.py` runs this file under Numba's simulator."""

import dataclasses

import numpy as np
import pytest
from cuda_cases import ULP, opened, packed
from koopman_hpo_adapters.numpy import mlp
from numba import config, cuda

from koopman_hpo import Local, Space, Tuner, devices, final, inner, log, logit, unread
from koopman_hpo.errors import AdapterError, HyperparameterError, ShapeError
from koopman_hpo.kernels.cuda import launch

SPACES = {
    "sgd": Space(lr=log(0.1), momentum=logit(0.8), l2=log(1e-2)),
    "adam": Space(lr=log(0.02), beta1=logit(0.8), beta2=logit(0.9)),
    "adamw": Space(lr=log(0.02), weight_decay=log(0.1)),
    "rmsprop": Space(lr=log(0.02), alpha=logit(0.9), momentum=logit(0.3)),
    "adagrad": Space(lr=log(0.1), lr_decay=log(0.1)),
    "lion": Space(lr=log(0.01), weight_decay=log(0.1)),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(launch, "THREADS", 4)
    monkeypatch.setattr(launch, "BLOCKS", 2)
    monkeypatch.setattr(devices, "SHARES", 2)


def on_card(problem, loss_too=False):
    """The same model with its arrays on the card, and its loss where asked for."""
    host, wide = lambda a: a.copy_to_host(), lambda a: opened(a) if a.dtype.itemsize == 2 else a

    def grad_jvp(theta, hyper, Z, dhyper, batch):
        loss, g, dG = problem.grad_jvp(host(theta), hyper, wide(host(Z)), dhyper, batch)
        return loss, cuda.to_device(g), cuda.to_device(np.ascontiguousarray(dG))

    def outer(theta, hyper, batch):
        value, dE, direct = problem.outer(host(theta), hyper, batch)
        return value, cuda.to_device(dE), direct

    def outer_hvp(theta, hyper, V, batch):
        return cuda.to_device(problem.outer_hvp(host(theta), hyper, host(V), batch))

    def linearise(theta, hyper, batch, rough):
        push = problem.linearise(host(theta), hyper, batch, rough)
        return lambda V, dhyper: cuda.to_device(np.ascontiguousarray(push(host(V), dhyper)))

    if loss_too:  # in one place, which every call writes over
        kept, inside = cuda.to_device(np.zeros((), problem.params.dtype)), grad_jvp

        def grad_jvp(*args):
            loss, *rest = inside(*args)
            kept.copy_to_device(np.array(loss, kept.dtype))
            return kept, *rest

    moved = {"grad_jvp": grad_jvp, "outer": outer, "outer_hvp": outer_hvp, "linearise": linearise}
    return dataclasses.replace(problem, **moved)


def pair(name, dtype=np.float64, space=None, tangents=None, **options):
    model = mlp((2, 3, 2), dtype=dtype)
    make, space = getattr(inner, name), space or SPACES[name]
    return make(model, space, **options), make(on_card(model), space, device="cuda", tangents=tangents, **options)


def batches(n, dtype=np.float64):
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(4, 2)).astype(dtype), rng.integers(0, 2, 4)) for _ in range(n)]


def same(run, twin, val, tolerance=1e-11):
    h, other = run.hypergradient(val), twin.hypergradient(val)
    for x, y in (
        (h.value, other.value),
        (h.grad, other.grad),
        (run.params, twin.params),
        (run.tangents, twin.tangents),
        (run.tangent_norm(), twin.tangent_norm()),
    ):
        np.testing.assert_allclose(y, x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "dtype"), [*((name, np.float64) for name in SPACES), ("adam", np.float32)])
def test_a_run_is_the_one_on_the_cpu(name, dtype):
    run, twin = pair(name, dtype)
    data = batches(3, dtype)
    for batch in data:
        assert twin.step(run.space.phi0, batch) == pytest.approx(run.step(run.space.phi0, batch), rel=1e-5)
    same(run, twin, data[0], 1e-11 if dtype == np.float64 else 1e-4)


@pytest.fixture
def crossed(monkeypatch):
    """Sizes of the arrays that come to the host, as they come; what the model of the tests does is not counted."""
    sizes, get = [], devices.Card.get
    monkeypatch.setattr(devices.Card, "get", lambda card, a: sizes.append(a.size) or get(card, a))
    return sizes


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_loss_on_the_card_is_read_where_h_is_recorded_and_only_there(crossed, monkeypatch, dtype):
    monkeypatch.setattr(devices, "LOSSES", 7)  # windows of six: the second one's losses lie in two places
    model, space, data = mlp((2, 3, 2), dtype=dtype), SPACES["sgd"], batches(12, dtype)
    settings = {"steps": 12, "window": 6, "every": 3, "guard": None}
    tuner = Tuner(inner.sgd(on_card(model, loss_too=True), space, device="cuda"), Local(), **settings)
    twin = Tuner(inner.sgd(model, space), Local(), **settings)
    crossed.clear()
    losses, theirs = [], []
    for n, batch in enumerate(data, 1):
        before = len(crossed)
        losses.append(tuner.step(batch, data[0]))
        theirs.append(twin.step(batch, data[0]))
        assert isinstance(losses[-1], unread.Unread)
        read = crossed[before:]
        if n == 1:
            assert read == [space.q, 7, 1]  # the outer loss before training, and whether the first step is finite
        elif n % 3:
            assert read == []
        else:
            assert {space.q} <= set(read) <= {1, 7, space.q}  # losses of three steps at once, h, and a norm
    rtol = 1e-12 if dtype == np.float64 else 1e-5
    np.testing.assert_allclose([float(x) for x in losses], theirs, rtol=rtol)
    np.testing.assert_allclose(np.array(losses, float), theirs, rtol=rtol)
    np.testing.assert_allclose(tuner.history.loss, twin.history.loss, rtol=rtol)
    assert f"{losses[3]:.2f} {losses[3]}" == f"{float(losses[3]):.2f} {float(losses[3])}"


def test_a_loss_on_the_card_that_is_not_finite_is_noticed_where_h_is_recorded():
    model, factor = mlp((2, 3, 2)), [1.0]

    def spoiled(*args):
        loss, *rest = model.grad_jvp(*args)
        return factor[0] * loss, *rest

    new = lambda: inner.sgd(on_card(dataclasses.replace(model, grad_jvp=spoiled), True), SPACES["sgd"], device="cuda")
    run, data = new(), batches(4)
    start, tuner = run.params, Tuner(run, Local(), steps=8, window=4, every=4)
    for factor[0], batch in zip([1.0, np.nan, 1.0, 1.0], data, strict=True):
        assert not len(tuner.history)
        tuner.step(batch, data[0])
    assert tuner.history[-1].event == "rolled back: inner loss is nan"
    np.testing.assert_array_equal(run.params, start)
    factor[0] = np.nan
    with pytest.raises(AdapterError, match="got a loss nan that is not"):
        new().step(run.phi, data[0])


def test_a_window_in_one_go_brings_its_losses_at_the_end(crossed):
    run, data = inner.sgd(on_card(mlp((2, 3, 2)), loss_too=True), SPACES["sgd"], device="cuda"), batches(6)
    host = inner.sgd(mlp((2, 3, 2)), SPACES["sgd"])
    for each in (run, host):
        each.step(each.phi, data[0])
    crossed.clear()
    losses, H = run.run(run.phi, data, data[0], every=3)
    assert crossed == [run.space.q, run.space.q, devices.LOSSES]
    theirs, other = host.run(host.phi, data, data[0], every=3)
    assert losses.dtype == theirs.dtype
    np.testing.assert_allclose(losses, theirs, rtol=1e-12)
    np.testing.assert_allclose(H, other, rtol=1e-10, atol=1e-12)


def test_the_final_run_of_mode_restart_looks_at_its_losses_now_and_then(crossed, monkeypatch):
    train, data, found = final._run, batches(4), []

    def counted(*args):
        crossed.clear()
        out = train(*args)
        found.append(crossed.copy())
        return out

    monkeypatch.setattr(final, "_run", counted)
    monkeypatch.setattr(final, "LOOK", 4)
    results = []
    for model, device in ((on_card(mlp((2, 3, 2)), loss_too=True), "cuda"), (mlp((2, 3, 2)), "cpu")):
        run = inner.sgd(model, SPACES["sgd"], device=device)
        results.append(Tuner(run, Local(), mode="restart", steps=10, runs=1).fit(data, data[:1]))
    card, cpu = results
    assert sum(n == devices.LOSSES for n in found[0]) == 4  # the first loss, and after 4, 8 and 10 steps
    np.testing.assert_allclose(card.params, cpu.params, rtol=1e-10)
    np.testing.assert_allclose(card.value, cpu.value, rtol=1e-10)


def test_a_loss_of_another_type_is_read_at_once():
    model = on_card(mlp((2, 3, 2)))

    def half(*args):
        loss, *rest = model.grad_jvp(*args)
        return cuda.to_device(np.array(loss, np.float16)), *rest

    run = inner.sgd(dataclasses.replace(model, grad_jvp=half), SPACES["sgd"], device="cuda")
    assert isinstance(run.step(run.phi, batches(1)[0]), float)


@pytest.mark.parametrize("options", [{"chunk": 2}, {"directions": 2, "seed": 3}, {"groups": (9, 8)}])
def test_options_mean_the_same(options):
    space = Space(lr=log([0.1, 0.05]), momentum=logit(0.8)) if "groups" in options else None
    run, twin = pair("sgd", space=space, **options)
    for batch in batches(2):
        for each in (run, twin):
            each.step(each.space.phi0, batch)
    same(run, twin, batches(1)[0])


def test_plain_steps_leave_the_tangents():
    run, twin = pair("adam")
    first, second = batches(2)
    for each in (run, twin):
        each.step(each.space.phi0, first)
        each.step(each.space.phi0, second, tangents=False)
    same(run, twin, first)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_forgets_and_goes_back(rho):
    run, twin = pair("rmsprop")
    first, second = batches(2)
    for each in (run, twin):
        each.step(each.space.phi0, first)
    start = twin.snapshot()
    for each in (run, twin):
        each.forget(rho)
        each.step(each.space.phi0 + 0.1, second)
    same(run, twin, first)
    twin.restore(start)
    for name, array in twin.snapshot().items():
        np.testing.assert_array_equal(array, start[name])
    run.restore(start)
    for each in (run, twin):
        each.step(each.space.phi0, second)
    same(run, twin, first)


@pytest.mark.parametrize("kept", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_tangents_in_half_the_memory_are_those_of_a_run_that_rounds_them_each_step(name, kept):
    stored = {"bfloat16": np.uint16, "float16": np.float16}[kept]
    run, _ = pair(name, np.float32)
    full, _ = pair(name, np.float32)
    _, twin = pair(name, np.float32, tangents=kept, chunk=2)
    data = batches(4, np.float32)
    for batch in data:
        for each in (run, full, twin):
            each.step(each.space.phi0, batch)
        for tangents in (run._state.Z, run._state.dslots):
            tangents[...] = opened(packed(tangents, stored))
    np.testing.assert_allclose(twin.params, run.params, rtol=1e-5, atol=1e-6)  # which no rounding has touched
    size = np.abs(run.tangents).max()
    np.testing.assert_allclose(twin.tangents, run.tangents, rtol=ULP[stored], atol=1e-5 * size)  # float32 tips a few over
    assert twin.tangents.dtype == np.float32
    assert twin.tangent_norm() == pytest.approx(np.linalg.norm(twin.tangents), rel=1e-6)
    h, exact = twin.hypergradient(data[0]).grad, full.hypergradient(data[0]).grad
    error = np.abs(h - exact).max() / np.abs(exact).max()
    assert 1e-6 < error < len(data) * ULP[stored]  # half a unit a step, and what follows from it
    start = twin.snapshot()
    assert start["Z"].dtype == stored
    twin.forget(0.5)
    np.testing.assert_allclose(twin.tangents, opened(start["Z"]) / 2, atol=1e-7)
    twin.restore(start)
    np.testing.assert_array_equal(twin.snapshot()["Z"], start["Z"])
    with pytest.raises(ShapeError, match="Z must be"):
        full.restore(start)


@pytest.mark.parametrize("options", [{}, {"chunk": 2}])
@pytest.mark.parametrize("kept", ["bfloat16", "float16"])
def test_a_model_may_give_the_gradients_tangents_in_half_the_memory_too(kept, options):
    stored = {"bfloat16": np.uint16, "float16": np.float16}[kept]
    model, data = mlp((2, 3, 2), dtype=np.float32), batches(3, np.float32)
    card = on_card(model)

    def halved(*args):
        loss, g, dG = card.grad_jvp(*args)
        return loss, g, cuda.to_device(packed(dG.copy_to_host(), stored))

    def rounded(*args):
        loss, g, dG = model.grad_jvp(*args)
        return loss, g, opened(packed(dG, stored))

    run = inner.sgd(dataclasses.replace(model, grad_jvp=rounded), SPACES["sgd"], **options)
    twin = inner.sgd(dataclasses.replace(card, grad_jvp=halved), SPACES["sgd"], device="cuda", tangents=kept, **options)
    for batch in data:
        for each in (run, twin):
            each.step(each.space.phi0, batch)
        for tangents in (run._state.Z, run._state.dslots):
            tangents[...] = opened(packed(tangents, stored))
    size = np.abs(run.tangents).max()
    np.testing.assert_allclose(twin.tangents, run.tangents, rtol=ULP[stored], atol=1e-5 * size)
    full = inner.sgd(dataclasses.replace(card, grad_jvp=halved), SPACES["sgd"], device="cuda")
    with pytest.raises(AdapterError, match=r"dG must be \(3, 17\) of float32, got \(3, 17\) of"):
        full.step(full.space.phi0, data[0])


def test_half_precision_needs_a_card_and_single_precision():
    model = mlp((2, 3, 2), dtype=np.float32)
    with pytest.raises(HyperparameterError, match=r"float32 parameters on device 'cuda', got float32 on 'cpu'"):
        inner.sgd(model, SPACES["sgd"], tangents="bfloat16")
    with pytest.raises(HyperparameterError, match="got float64 on 'cuda'"):
        pair("sgd", np.float64, tangents="float16")
    with pytest.raises(HyperparameterError, match=r"tangents must be one of .*'bfloat16'.*got 'bf16'"):
        inner.sgd(on_card(model), SPACES["sgd"], device="cuda", tangents="bf16")


def test_coefficients_cross_to_the_card_only_when_they_change(monkeypatch):
    sent = []
    write = devices.Card.write
    monkeypatch.setattr(devices.Card, "write", lambda card, into, a: sent.append(a.shape) or write(card, into, a))
    _, twin = pair("sgd")
    phi, batch = twin.space.phi0, batches(1)[0]
    for _ in range(2):  # dampening begins with the second step
        twin.step(phi, batch)
    sent.clear()
    twin.step(phi, batch)
    assert sent == []
    twin.step(phi + 0.1, batch)
    assert sent == [(4, 2), (4, 3, 2)]


def test_a_model_that_stays_on_the_host_is_refused():
    model = mlp((2, 3, 2))
    lazy = lambda theta, hyper, Z, *rest: model.grad_jvp(theta.copy_to_host(), hyper, Z.copy_to_host(), *rest)
    run = inner.sgd(dataclasses.replace(model, grad_jvp=lazy), SPACES["sgd"], device="cuda")
    with pytest.raises(AdapterError, match="g must lie on the device"):
        run.step(run.space.phi0, batches(1)[0])
    assert run.t == 0


@pytest.mark.parametrize("spoil", [lambda g: g.astype(np.float32), lambda g: g[:-1].copy()])
def test_a_gradient_of_another_shape_or_type_is_refused(spoil):
    model = on_card(mlp((2, 3, 2)))

    def bad(*args):
        loss, g, dG = model.grad_jvp(*args)
        return loss, cuda.to_device(spoil(g.copy_to_host())), dG

    run = inner.sgd(dataclasses.replace(model, grad_jvp=bad), SPACES["sgd"], device="cuda")
    with pytest.raises(AdapterError, match=r"g must be \(17,\) of float64, got"):
        run.step(run.space.phi0, batches(1)[0])


def test_a_diverged_start_is_refused():
    model = on_card(mlp((2, 3, 2)))

    def bad(*args):
        loss, g, dG = model.grad_jvp(*args)
        return loss, cuda.to_device(np.full(g.size, np.nan)), dG

    run = inner.sgd(dataclasses.replace(model, grad_jvp=bad), SPACES["sgd"], device="cuda")
    with pytest.raises(AdapterError, match="must be finite at the initial parameters"):
        run.step(run.space.phi0, batches(1)[0])


@pytest.mark.parametrize("exact", [True, False])
def test_derivatives_at_any_point_are_the_hosts(exact):
    runs, (first, second) = pair("sgd"), batches(2)
    V = np.random.default_rng(5).normal(size=(2, 17))
    found = []
    for run in runs:
        if not exact:
            run._oracle.problem = dataclasses.replace(run.problem, outer_hvp=None, linearise=None)
        run.step(run.space.phi0, first)
        here, there = run.linearise(first, second), run.dynamics()
        loss, grads = there.grads(here.gradient, run.space.at(run.phi, 0), V, {"l2": np.ones(2)}, second)
        products = here.hvp(V), here.outer_hvp(V), there.outer_hvp(here.gradient, run.space.at(run.phi, 0), V, second)
        outer = there.outer(here.gradient, run.space.at(run.phi, 0), second)
        found.append([here.gradient, here.outer_gradient, *products, loss, *grads, *outer[:2], *there.state])
    for x, y in zip(*found, strict=True):
        assert type(x) is type(y)
        np.testing.assert_allclose(y, x, rtol=1e-10, atol=1e-10)
    same(*runs, second)


def test_everything_runs_on_the_stream_that_is_set(monkeypatch):
    used = []
    monkeypatch.setattr(cuda, "external_stream", lambda handle: used.append(handle) or 0, raising=False)
    _, twin = pair("sgd")
    twin._device.stream = type("Stream", (), {"cuda_stream": 7})
    for act in (
        lambda: twin.step(twin.space.phi0, batches(1)[0]),
        lambda: twin.hypergradient(batches(1)[0]),
        lambda: twin.params,
        lambda: twin.forget(0.5),
        lambda: twin.restore(twin.snapshot()),
    ):
        used.clear()
        act()
        assert set(used) == {7}


def test_arrays_of_the_run_name_no_stream(monkeypatch):
    """Numba copies an array that names one without waiting, for a model that reads it too."""
    plain = cuda.to_device
    monkeypatch.setattr(cuda, "external_stream", lambda handle: type("Stream", (), {"synchronize": id})(), raising=False)
    monkeypatch.setattr(cuda, "to_device", lambda a, stream=0: plain(a).bind(stream))  # as on a card
    _, twin = pair("sgd")
    assert [a.stream for a in twin._state] == [0] * 4


@pytest.mark.skipif(not config.ENABLE_CUDASIM, reason="a card takes its own streams only")
def test_copies_wait_for_the_stream_and_not_for_the_card(monkeypatch):
    class Stream:
        def __init__(self, handle):
            self.handle = handle

        def synchronize(self):
            waited.append(self.handle)

    waited = []
    monkeypatch.setattr(cuda, "external_stream", Stream, raising=False)
    _, twin = pair("sgd")
    batch = batches(1)[0]
    twin.step(twin.space.phi0, batch)
    waited.clear()
    twin.step(twin.space.phi0 + 0.1, batch)  # which sends coefficients, on CUDA's default stream by its own handle
    assert waited == []
    twin.hypergradient(batch)
    assert waited == [devices.LEGACY]
