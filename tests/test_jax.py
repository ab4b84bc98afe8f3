"""JAX: the conformance suite under the core's optimizers and under optax, state of every kind, and what is refused."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from koopman_hpo import (
    AdapterError,
    Global,
    Glocal,
    HyperparameterError,
    Inner,
    Local,
    ShapeError,
    Space,
    Tuner,
    check_hypergradient,
    checkpoint,
    hypergradient,
    inner,
    log,
    logit,
    outer,
    snapshots,
    trajectory,
)

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jax.config.update("jax_enable_x64", True)  # float32 is asked for by name below
jax.config.update("jax_disable_most_optimizations", True)  # most of the time here is compiling
import jax.numpy as jnp  # noqa: E402
from koopman_hpo_adapters import _jax_inner, _jax_root, _jax_tree  # noqa: E402
from koopman_hpo_adapters import jax as adapter  # noqa: E402
from koopman_hpo_adapters.conformance import Conformance  # noqa: E402
from threadpoolctl import threadpool_limits  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """NumPy's BLAS threads and JAX's would only wait for each other."""
    with threadpool_limits(1):
        yield


# -- the suite ---------------------------------------------------------------------------------------------------------


class TestProblem(Conformance):
    """JAX losses under the core's fused optimizers."""

    def problem(self, model, dtype):
        train, val = model.losses(jnp)
        return adapter.problem(train, val, jnp.asarray(model.params(dtype)))


def assert_exact(report):
    """Finite, not all zero, and within 1e-7 of central differences."""
    assert np.isfinite(report.forward).all(), str(report)
    assert report.forward.any(), str(report)
    assert report.error.max() < 1e-7, str(report)


def of_the_readme():
    """The adapter that adapters/README.md writes from nothing."""
    text = (Path(__file__).parent.parent / "adapters" / "README.md").read_text(encoding="utf-8")
    code = re.search(r"## Writing one.*?```python\n(.*?)```", text, re.DOTALL).group(1)
    names = {"__name__": "readme"}
    exec(compile(code, "adapters/README.md", "exec"), names)
    body = code[code.index("def problem") : code.index("class TestMine")]
    return names["TestMine"], len([line for line in body.splitlines() if line.strip()])


Readme, LINES = of_the_readme()


class TestReadme(Readme):
    """The whole suite, but for the network on digits, passes on 30 lines."""

    on_digits = False

    def test_is_thirty_lines(self):
        assert LINES <= 30


def wd(h):
    return optax.add_decayed_weights(h["weight_decay"])


def rms(h, scale):
    """torch's order: momentum before the rate (optax.rmsprop has it after, equal only while lr is constant)."""
    scaled = scale(decay=h["alpha"], eps=h["eps"], eps_in_sqrt=False)
    return optax.chain(wd(h), scaled, optax.trace(h["momentum"]), optax.scale_by_learning_rate(h["lr"]))


OPTAX = {  # where optax's formula is torch's; its SGD has no dampening, its Adagrad has eps within the root and no decay
    "nesterov": lambda h: optax.chain(wd(h), optax.sgd(h["lr"], h["momentum"], nesterov=True)),
    "adam": lambda h: optax.chain(wd(h), optax.adam(h["lr"], h["beta1"], h["beta2"], h["eps"])),
    "adamw": lambda h: optax.adamw(h["lr"], h["beta1"], h["beta2"], h["eps"], weight_decay=h["weight_decay"]),
    "rmsprop": lambda h: rms(h, optax.scale_by_rms),
    "centered": lambda h: rms(h, optax.scale_by_stddev),
    "lion": lambda h: optax.lion(h["lr"], h["beta1"], h["beta2"], weight_decay=h["weight_decay"]),
}


def sgd(s, g, h):
    d = g + h["weight_decay"] * s["theta"]
    buffer = jnp.where(s["t"] == 0, d, h["momentum"] * s["slot"] + (1 - h["dampening"]) * d)
    return {"theta": s["theta"] - h["lr"] * buffer, "slot": buffer, "t": s["t"] + 1}


def adagrad(s, g, h):
    g = g + h["weight_decay"] * s["theta"]
    square = s["slot"] + g**2
    rate = h["lr"] / (1 + s["t"] * h["lr_decay"])
    return {"theta": s["theta"] - rate * g / (jnp.sqrt(square) + h["eps"]), "slot": square, "t": s["t"] + 1}


class TestInner(Conformance):
    """Whole training steps: optax's where it agrees with torch, by hand with an integer counter elsewhere."""

    models = (
        "logistic",
        "mlp",
    )  # between them: direct dependence of the outer loss, vectors, every layer of the chain rule

    def inner(self, model, optimizer, space, dtype):
        train, val = model.losses(jnp)
        theta = model.params(dtype)
        if optimizer.name in OPTAX:
            step = adapter.train_step(train, OPTAX[optimizer.name])
            state, params = step.init(jnp.asarray(theta), space), lambda state: state.params
        else:
            rule = {"sgd": sgd, "adagrad": adagrad}[optimizer.name]
            state, params = {"theta": theta, "slot": np.zeros_like(theta), "t": 0}, lambda state: state["theta"]

            def step(state, hyper, batch):
                loss, g = jax.value_and_grad(train)(state["theta"], hyper, batch)
                return rule(state, g, hyper), loss

        at = lambda loss: lambda state, hyper, batch: loss(params(state), hyper, batch)
        return adapter.inner(step, at(val), state, space, params=params, loss=at(train))


# -- a model with everything in its state ------------------------------------------------------------------------------

SPACE = Space(lr=log(0.05), momentum=logit(0.7), keep=logit(0.8), l2=log(0.01))


def network(params, X, mask):
    return jnp.tanh(X @ params["W"] + params["b"]) * mask @ params["out"]


def noisy_step(state, hyper, batch):
    """Dropout with a key in the state, a running mean, and an integer counter."""
    X, y = batch
    key, now = jax.random.split(state["key"])
    mask = jax.random.bernoulli(now, 0.8, (4,)) / hyper["keep"]

    def loss_of(params):
        r = network(params, X - state["mean"], mask) - y
        return jnp.mean(r**2) + hyper["l2"] * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    loss, g = jax.value_and_grad(loss_of)(state["params"])
    velocity = jax.tree.map(lambda v, g: hyper["momentum"] * v + g, state["velocity"], g)
    params = jax.tree.map(lambda x, v: x - hyper["lr"] * v, state["params"], velocity)
    mean = 0.9 * state["mean"] + 0.1 * X.mean(0)
    return {"params": params, "velocity": velocity, "mean": mean, "key": key, "steps": state["steps"] + 1}, loss


def noisy_val(state, hyper, batch):
    X, y = batch
    return jnp.mean((network(state["params"], X - state["mean"], 1.0) - y) ** 2) + 0.01 * hyper["keep"]


def noisy_state(dtype=np.float64, key=None):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    params = {"W": draw(3, 4), "b": draw(4), "out": draw(4)}
    still = {name: np.zeros_like(x) for name, x in params.items()}
    key = jax.random.key(1) if key is None else key
    return {"params": params, "velocity": still, "mean": np.zeros(3, dtype), "key": key, "steps": 0}


def noisy(space=SPACE, along=None, **options):
    params = lambda state: state["params"]
    return adapter.inner(noisy_step, noisy_val, noisy_state(**options), space, params=params, directions=along, seed=5)


def data(seed, dtype=np.float64, n=8):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 3)).astype(dtype), rng.normal(size=n).astype(dtype)


BATCHES, VAL = [data(t) for t in range(12)], data(99)


def test_dropout_statistics_and_counters_are_differentiated_right():
    run = noisy()
    report = check_hypergradient(run, BATCHES, VAL)
    assert report.error.max() < 1e-7, str(report)
    assert isinstance(run, Inner)


def test_the_state_comes_back_as_the_user_gave_it():
    run = noisy()
    for batch in BATCHES:
        run.step(SPACE.phi0, batch)
    state = run.state
    assert int(state["steps"]) == 12
    assert state["steps"].dtype == jnp.int64
    assert jnp.issubdtype(state["key"].dtype, jax.dtypes.prng_key)
    assert run.params.shape == (20,)
    assert run.tangents.shape == (4, 20)
    np.testing.assert_allclose(run.tangent_norm(), np.linalg.norm(run.tangents), rtol=1e-12)
    back = run.unravel(run.params)
    assert all(np.array_equal(back[name], state["params"][name]) for name in back)
    with pytest.raises(ShapeError, match=r"shape \(20,\)"):
        run.unravel(np.zeros(3))


def test_the_users_arrays_stay_apart():
    state = noisy_state()
    run = adapter.inner(noisy_step, noisy_val, state, SPACE)
    before = run.params
    state["params"]["W"] += 1
    assert np.array_equal(run.params, before)
    assert run.params.size == 20 + 20 + 3  # without params=, every real leaf


@pytest.mark.parametrize(
    "key", [jax.random.key(3), jax.random.key(3, impl="rbg"), jax.random.PRNGKey(3)], ids=["fry", "rbg", "raw"]
)
def test_a_run_with_keys_resumes_bit_for_bit(key, tmp_path):
    make = lambda: Tuner(noisy(key=key), Glocal(), steps=40, window=10)
    whole = make()
    want = whole.fit(BATCHES, [VAL])
    first, second = make(), make()
    for t in range(23):
        first.step(BATCHES[t % 12], VAL)
    checkpoint.load(checkpoint.save(tmp_path / "run.npz", first), second)
    got = second.fit(BATCHES, [VAL])
    assert np.array_equal(got.params, want.params)
    assert np.array_equal(got.phi, want.phi)
    data_of = lambda run: np.asarray(run.state["key"] if key.dtype == np.uint32 else jax.random.key_data(run.state["key"]))
    assert np.array_equal(data_of(second.inner), data_of(whole.inner))


def test_single_precision_stays_single():
    run = noisy(dtype=np.float32)
    batches = [data(t, np.float32) for t in range(12)]
    h = trajectory(run, batches, data(99, np.float32), every=4)
    run.step(SPACE.phi0, batches[0])
    assert run.params.dtype == run.tangents.dtype == np.float32
    want = trajectory(noisy(), BATCHES, VAL, every=4)
    np.testing.assert_allclose(h, want, atol=1e-4 * np.abs(want).max())  # 12 steps of rounding at 6e-8


def test_half_precision_weights_are_saved_by_their_bits():
    state = {"w": jnp.ones(3, jnp.bfloat16)}
    step = lambda s, h, b: ({"w": (s["w"] * (1 - h["lr"])).astype(jnp.bfloat16)}, jnp.sum(s["w"].astype(jnp.float32)))
    run = adapter.inner(step, lambda s, h, b: jnp.sum(s["w"].astype(jnp.float32)), state, Space(lr=log(0.1)))
    saved = run.snapshot()
    run.step([-2.0], None)
    assert saved["state/0"].dtype == np.uint16
    run.restore(saved)
    assert (run.state["w"] == 1).all()


class Counting:
    """NumPy, with a note of how large the JAX arrays are that it brings to the host."""

    def __init__(self, crossed):
        self._crossed = crossed

    def __getattr__(self, name):
        function = getattr(np, name)
        if name not in ("array", "asarray", "concatenate", "stack", "linalg"):
            return function

        def counted(x, *args, **more):
            self._crossed += [y.size for y in jax.tree.leaves(x) if isinstance(y, jax.Array)]
            return function(x, *args, **more)

        return counted


@pytest.mark.parametrize("loss", [1.0, np.nan], ids=["online", "rolled back"])
def test_nothing_of_the_size_of_the_model_crosses_in_a_window_or_on_the_way_back(monkeypatch, loss):
    crossed, kind = [], type(jnp.zeros(1))
    value = kind._value  # behind float(x), x.tolist(), jax.device_get(x)
    monkeypatch.setattr(kind, "_value", property(lambda x: crossed.append(x.size) or value.__get__(x)))
    for module in (_jax_inner, _jax_tree, snapshots):
        monkeypatch.setattr(module, "np", Counting(crossed))
    batches, val = jax.device_put((BATCHES, VAL))
    run = noisy()
    tuner = Tuner(run, Glocal(), steps=30, window=5, guard=None)
    assert max(crossed) >= 12  # a tuner's first snapshot
    crossed.clear()
    for t in range(15):
        tuner.step(jax.tree.map(lambda x, factor=loss if t == 7 else 1.0: x * factor, batches[t % 12]), val)
    assert any("rolled back" in r.event for r in tuner.history) == np.isnan(loss)
    assert 0 < max(crossed) <= run.space.q
    crossed.clear()
    result = tuner.result
    assert isinstance(result.best.params, np.ndarray)
    assert result.best.params.shape == result.params.shape == (20,)
    assert len(crossed) >= 2
    crossed.clear()
    run.run(run.space.phi0, batches[:4], val, every=2)  # a window in one go: its losses, outer losses and trajectory
    assert sorted(crossed) == [2, 4, 2 * run.space.q]
    with jax.transfer_guard_host_to_device("disallow"):
        run.step(run.space.phi0, batches[0])  # nothing goes there either, unless phi has moved
        run.hypergradient(val)


def test_losses_and_the_trajectory_come_to_the_host_once_a_window(monkeypatch):
    crossed, kind = [], type(jnp.zeros(1))
    value = kind._value
    monkeypatch.setattr(kind, "_value", property(lambda x: crossed.append(x.size) or value.__get__(x)))
    for module in (_jax_inner, _jax_tree, snapshots):
        monkeypatch.setattr(module, "np", Counting(crossed))
    run, twin = noisy(), noisy()
    tuner = Tuner(run, Local(), steps=20, window=10, every=2, guard=None)
    losses = []
    for n in range(1, 21):
        crossed.clear()
        losses.append(tuner.step(BATCHES[n % 12], VAL))
        assert isinstance(losses[-1], jax.Array)
        if n == 1:  # whether it is finite, and the outer loss before training
            assert sorted(crossed) == [1, 1, run.space.q]
        elif n % 10:
            assert crossed == []
        else:  # the first loss, the last, and the sum; five outer losses and the trajectory
            assert sorted(crossed) == [1] * 8 + [run.space.q] * 5
    np.testing.assert_allclose(tuner.history.loss, [np.mean(losses[:10]), np.mean(losses[10:])], rtol=1e-12)
    seen, step = [], twin.step
    twin.step = lambda *args: (seen.append(len(crossed)), step(*args))[1]
    crossed.clear()
    twin.run(SPACE.phi0, [*BATCHES[:5], data(5, n=6)], VAL, every=2)  # step by step, and still all at the end
    assert seen == [0, 1, 1, 1, 1, 1]
    assert sorted(crossed) == sorted([1] * 7 + 3 * [1, run.space.q])


@pytest.mark.parametrize(("window", "every", "cut"), [(10, 1, 17), (60, 2, 57)])
def test_a_tuner_that_waits_once_a_window_finds_what_one_finds_that_always_waits(window, every, cut):
    tuners = [Tuner(noisy(), Glocal(), steps=60, window=window, every=every, guard=None) for _ in range(3)]
    tuners[1]._due = lambda w: "read" if Tuner._due(tuners[1], w) else ""
    reads, recorded = [], tuners[0].inner.recorded
    tuners[0].inner.recorded = lambda looks: reads.append(len(looks)) or recorded(looks)
    for tuner in tuners[:2]:
        for t in range(cut):
            tuner.step(BATCHES[t % 12], VAL)
    assert max(reads) == (9 if window == 10 else 12)  # of at most 25 steps, beside the one that is waited for
    tuners[2].restore(tuners[0].snapshot())
    for tuner in tuners:
        for t in range(cut, 60):
            tuner.step(BATCHES[t % 12], VAL)
        assert tuner.done
    first, *others = tuners
    assert len(first.history.trajectory) == 60 // every
    for other in others:
        np.testing.assert_array_equal(other.inner.params, first.inner.params)
        np.testing.assert_array_equal(other.history.trajectory, first.history.trajectory)
        np.testing.assert_array_equal(other.history.trajectory_step, first.history.trajectory_step)
        np.testing.assert_array_equal(other.phi, first.phi)
        np.testing.assert_allclose(other.history.loss, first.history.loss, rtol=1e-12)


def test_a_loss_in_half_precision_adds_up_in_full():
    state = {"w": jnp.ones(3, jnp.float32)}
    step = lambda s, h, b: ({"w": s["w"] * (1 - h["lr"])}, jnp.sum(s["w"]).astype(jnp.bfloat16))
    run = adapter.inner(step, lambda s, h, b: jnp.sum(s["w"]), state, Space(lr=log(0.1)))
    for tangents in (True, False):
        assert run.step([-2.0], None, tangents=tangents).dtype == np.float64


class Stalling(Global):
    """Asks for a learning rate that trains nothing: the first run stays the best."""

    def estimate(self, H, ahead):
        return dataclasses.replace(super().estimate(H, ahead), value=np.ones(H.shape[1]))


def test_in_mode_restart_the_state_is_left_at_the_best_run_with_its_statistics():
    def train_step(state, hyper, batch):
        w, mean = state["w"], 0.9 * state["mean"] + 0.1 * batch.mean(0)
        w = w - hyper["lr"] * jax.grad(lambda w: ((batch @ w - 1) ** 2).mean())(w)
        seen = state["seen"] + (100 * batch.mean()).astype(jnp.int32)
        return {"w": w, "mean": mean, "seen": seen}, jnp.zeros(())

    val_loss = lambda state, hyper, batch: (((batch - 0.1 * state["mean"]) @ state["w"] - 1) ** 2).mean()
    batch = np.random.default_rng(0).normal(size=(20, 3)) + 1.0
    start = {"w": jnp.zeros(3), "mean": jnp.zeros(3), "seen": jnp.int32(0)}
    run = adapter.inner(train_step, val_loss, start, Space(lr=log(0.05)), params=lambda s: s["w"])
    batches = lambda t: batch * (1 + 0.01 * t)  # the statistics of later runs are others
    tuner = Tuner(run, Stalling(), steps=20, runs=2, outer=outer.sgd(4.0))
    result = tuner.fit(batches, [batch])
    assert tuner.history.value[1] > result.value == tuner.history.value[0]
    want = start
    for t in range(20):
        want, _ = train_step(want, {"lr": 0.05}, batches(t))
    for name, array in want.items():
        np.testing.assert_allclose(run.state[name], array, rtol=1e-10)
    np.testing.assert_array_equal(run.params, result.params)
    assert float(val_loss(run.state, {}, batch)) == pytest.approx(result.value, rel=1e-10)


# -- random directions -------------------------------------------------------------------------------------------------


def test_random_directions_project_the_exact_hypergradient():
    exact, few = noisy(), noisy(along=2)
    for batch in BATCHES:
        exact.step(SPACE.phi0, batch)
        few.step(SPACE.phi0, batch)
    D = few.directions
    assert D.shape == (2, 4)
    np.testing.assert_allclose(D @ D.T, 4 * np.eye(2), atol=1e-12)
    np.testing.assert_allclose(few.tangents, D @ exact.tangents, rtol=1e-10, atol=1e-13)
    # what goes through the parameters is projected; keep's own part of the outer loss is not
    direct = SPACE.gradient(SPACE.phi0, np.ones(4))["keep"] ** -1 * 0.01 * np.eye(4)[2]
    want = (exact.hypergradient(VAL).grad - direct) @ D.T @ D / 2 + direct
    np.testing.assert_allclose(few.hypergradient(VAL).grad, want, rtol=1e-10, atol=1e-13)


def test_as_many_random_directions_as_hyperparameters_span_all():
    exact, all_of_them = noisy(), noisy(along=4)
    for run in (exact, all_of_them):
        _, H = run.run(SPACE.phi0, BATCHES, VAL, every=3)
        assert H.shape == (4, 4)
    want = exact.hypergradient(VAL).grad
    np.testing.assert_allclose(all_of_them.hypergradient(VAL).grad, want, rtol=1e-10)


def test_random_directions_are_drawn_afresh_with_the_past_and_kept_by_a_snapshot():
    one, two = noisy(along=2), noisy(along=2)
    first = one.directions.copy()
    assert np.array_equal(first, two.directions)
    one.step(SPACE.phi0, BATCHES[0])
    one.forget(0.5)
    assert np.array_equal(one.directions, first)
    one.forget(0)
    assert not np.array_equal(one.directions, first)
    two.restore(one.snapshot())
    for run in (one, two):
        run.run(SPACE.phi0, BATCHES, VAL)
        run.forget(0)
    assert np.array_equal(one.directions, two.directions)
    for run in (one, two):
        run.run(SPACE.phi0, BATCHES, VAL)
    assert np.array_equal(one.hypergradient(VAL).grad, two.hypergradient(VAL).grad)
    with pytest.raises(ShapeError, match="this run follows all q"):
        noisy().restore(noisy(along=4).snapshot())


def test_a_window_of_one_batch_by_mistake_is_refused():
    run = noisy()
    for batches in (None, VAL):
        with pytest.raises(ShapeError, match="batches must be a list or an iterator"):
            run.run(SPACE.phi0, batches, VAL)


@pytest.mark.parametrize(("along", "said"), [(0, "directions"), (5, "at most q = 4, got 5"), (1.5, "directions")])
def test_impossible_directions_are_refused(along, said):
    with pytest.raises(HyperparameterError, match=said):
        noisy(along=along)


# -- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batches", [BATCHES, [BATCHES[0]] * 12, [*BATCHES[:11], data(5, n=6)]], ids=["new", "one", "ragged"]
)
@pytest.mark.parametrize("every", [1, 5, 20])
def test_a_window_is_its_steps_whatever_the_batches(batches, every):
    scheduled = Space(
        lr=log([0.05, 0.01], knots=(0, 8)),
        momentum=logit(0.7, knots=(0, 6), factors=(0.5, 1)),
        keep=logit([0.8, 0.6], knots=(0, 5)),
        l2=log(0.01),
    )
    one, two = noisy(scheduled), noisy(scheduled)
    losses, H = one.run(scheduled.phi0, iter(batches), VAL, every)
    rows, want = [], []
    for n, batch in enumerate(batches, 1):
        want.append(two.step(scheduled.phi0, batch))
        if n % every == 0:
            rows.append(two.hypergradient(VAL).grad)
    assert H.shape == (12 // every, scheduled.q)
    assert one.t == 12
    np.testing.assert_allclose(losses, want, rtol=1e-12)
    np.testing.assert_allclose(H, np.reshape(rows, H.shape), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(one.params, two.params, rtol=1e-12)


def test_long_windows_are_cut_and_stay_right(monkeypatch):
    whole = noisy().run(SPACE.phi0, BATCHES, VAL, 2)
    monkeypatch.setattr(_jax_inner, "LONGEST", 5)
    parts = noisy().run(SPACE.phi0, BATCHES, VAL, 2)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)


def test_a_window_gives_outer_losses_and_natural_hypergradients():
    one, two = noisy(), noisy()
    found = one.window(SPACE.phi0, BATCHES, VAL, every=4)[1]
    want = []
    for n, batch in enumerate(BATCHES, 1):
        two.step(SPACE.phi0, batch)
        if n % 4 == 0:
            want.append(two.hypergradient(VAL))
    assert [h.t for h in found] == [4, 8, 12]
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a.value, b.value, rtol=1e-12)
        np.testing.assert_allclose(a.grad, b.grad, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose([*a.natural.values()], [*b.natural.values()], rtol=1e-10, atol=1e-14)


def test_a_window_that_fails_leaves_the_run_where_it_began(monkeypatch):
    monkeypatch.setattr(_jax_inner, "LONGEST", 4)
    run = noisy()
    run.step(SPACE.phi0, BATCHES[0])
    before = run.snapshot()
    wrong = [*BATCHES[:6], (BATCHES[6][0][:, :2], BATCHES[6][1]), *BATCHES[7:]]  # in its second scan
    with pytest.raises(ValueError, match="Incompatible shapes"):
        run.run(SPACE.phi0 + 0.1, wrong, VAL)
    after = run.snapshot()
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_pure_functions_scan_to_the_same_end():
    at = adapter.point(SPACE, SPACE.phi0)
    state = jax.tree.map(jnp.asarray, noisy_state())
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *BATCHES)

    @jax.jit
    def window(carry, batches):
        carry, losses = jax.lax.scan(lambda c, b: adapter.step(noisy_step, c, at, b), carry, batches)
        return losses, *adapter.hypergradient(noisy_val, carry, at, VAL)

    losses, value, h = window(adapter.init(state, SPACE.q), stacked)
    want = hypergradient(noisy(), BATCHES, VAL)
    np.testing.assert_allclose(h, want.grad, rtol=1e-10)
    np.testing.assert_allclose(value, want.value, rtol=1e-12)
    assert losses.shape == (12,)


# -- steps made of optax -----------------------------------------------------------------------------------------------


def regression(params, hyper, batch):
    X, y = batch
    return jnp.mean((X @ params["w"] - y) ** 2)


def test_a_weight_without_gradient_keeps_finite_tangents_under_adam():
    X, y = BATCHES[0]
    dead = (X * np.array([1.0, 0.0, 1.0]), y)
    space = Space(lr=log(0.05), beta2=logit(0.9), eps=log(1e-8))
    step = adapter.train_step(regression, lambda h: optax.adam(h["lr"], b2=h["beta2"], eps=h["eps"]))
    state = step.init({"w": jnp.ones(3)}, space)
    run = adapter.inner(jax.jit(step), lambda s, h, b: regression(s.params, h, b), state, space, params=lambda s: s.params)
    report = check_hypergradient(run, [dead] * 6, VAL)
    assert report.ok, str(report)
    assert np.isfinite(report.forward).all()


ADAM = lambda h: optax.adam(h["lr"], b2=h["beta2"])
WRAPPED = {
    "multi": lambda h: optax.MultiSteps(ADAM(h), 2, accumulator_dtype=float).gradient_transformation(),
    "if finite": lambda h: optax.apply_if_finite(ADAM(h), 3),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_weight_without_gradient_keeps_finite_tangents_in_a_branch(name):
    X, y = BATCHES[0]
    dead = (X * np.array([1.0, 0.0, 1.0]), y)
    space = Space(lr=log(0.05), beta2=logit(0.9))
    step = adapter.train_step(regression, WRAPPED[name])
    state = step.init({"w": jnp.ones(3)}, space)
    run = adapter.inner(step, lambda s, h, b: regression(s.params, h, b), state, space, params=lambda s: s.params)
    assert_exact(check_hypergradient(run, [dead] * 6, VAL))


def root_scan(x, n):
    body = lambda c, a: (c + jnp.sqrt(x) * a, jnp.sqrt(c * a))
    return jax.lax.scan(body, x, jnp.arange(1.0, 4.0), reverse=True)[1].sum(0)


def root_while(x, n):
    at = lambda c: (c[0] + 1, jnp.sqrt(c[1]) * x + 0.1 * jnp.sqrt(x))
    return jax.lax.while_loop(lambda c: jnp.sqrt(c[0] * 1.0) < n, at, (0, x))[1]


ROOTS = {
    "scan": root_scan,
    "while": root_while,
    "switch": lambda x, n: jax.lax.switch(n, [lambda x: x, lambda x: 2 * x, lambda x: jnp.sqrt(x) * n, jnp.cos], x),
    "cond in scan": lambda x, n: jax.lax.scan(
        lambda c, a: (jax.lax.cond(a > 1, jnp.sqrt, lambda c: c * 2.0, c), 0.0), x, jnp.arange(3)
    )[0],
    "jit in cond": lambda x, n: jax.lax.cond(n > 1, jax.jit(lambda x: jnp.sqrt(x) + 0.0), lambda x: 0 * x, x),
}


@pytest.mark.parametrize("name", ROOTS)
def test_a_root_in_a_body_is_the_same_but_for_its_derivative_at_nothing(name):
    f = lambda x: ROOTS[name](x, jnp.sum(x > 0))  # 2
    x, v = jnp.array([0.0, 2.0, 3.0]), jnp.ones(3)
    want, plain = jax.jvp(f, (x,), (v,))
    got, slope = jax.jvp(_jax_root.rooted(f), (x,), (v,))
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(slope[1:], plain[1:], rtol=1e-12)
    assert not np.isfinite(plain[0])
    assert np.isfinite(slope[0])
    assert np.array_equal(jax.vmap(jax.jit(_jax_root.rooted(f)))(x[None])[0], got)


def test_a_key_in_the_state_gives_fresh_noise_a_step():
    def loss(params, hyper, batch, key):
        X, y = batch
        return regression(params, hyper, (X + hyper["noise"] * jax.random.normal(key, X.shape), y))

    space = Space(lr=log(0.05), noise=log(0.3))
    step = adapter.train_step(loss, lambda h: optax.sgd(h["lr"]))
    state = step.init({"w": jnp.ones(3)}, space, key=jax.random.key(0))
    run = adapter.inner(step, lambda s, h, b: regression(s.params, h, b), state, space, params=lambda s: s.params)
    assert check_hypergradient(run, BATCHES, VAL).ok
    assert run.step(space.phi0, BATCHES[0]) != run.step(np.array([-20.0, space.phi0[1]]), BATCHES[0])


def test_a_key_in_each_batch_is_the_same_noise_for_primal_and_tangents():
    def loss(params, hyper, batch):
        X, y, key = batch
        return regression(params, hyper, (X * jax.random.bernoulli(key, 0.7, X.shape) / hyper["keep"], y))

    space = Space(lr=log(0.05), keep=logit(0.7))
    step = adapter.train_step(loss, lambda h: optax.sgd(h["lr"]))
    state = step.init({"w": jnp.ones(3)}, space)
    run = adapter.inner(step, lambda s, h, b: regression(s.params, h, b), state, space, params=lambda s: s.params)
    batches = [(*batch, jax.random.key(t)) for t, batch in enumerate(BATCHES)]
    report = check_hypergradient(run, batches, VAL)
    assert report.error.max() < 1e-7, str(report)
    np.testing.assert_allclose(run.run(space.phi0, batches, VAL, 12)[1][0], report.forward, rtol=1e-10)


def test_a_schedule_inside_the_step_and_one_in_the_space():
    val = lambda s, h, b: regression(s.params, h, b)
    inside = adapter.train_step(regression, lambda h: optax.adam(optax.linear_schedule(h["lr"], h["lr"] * h["end"], 8)))
    one = Space(lr=log(0.05), end=logit(0.1))
    assert check_hypergradient(adapter.inner(inside, val, inside.init({"w": jnp.ones(3)}, one), one), BATCHES, VAL).ok
    outside = adapter.train_step(regression, lambda h: optax.adam(h["lr"]))
    two = Space(lr=log([0.05, 0.005], knots=(0, 8)))
    run = adapter.inner(outside, val, outside.init({"w": jnp.ones(3)}, two), two)
    assert check_hypergradient(run, BATCHES, VAL).ok
    refused = adapter.train_step(regression, lambda h: optax.sgd(optax.exponential_decay(h["lr"], 4, h["end"])))
    run = adapter.inner(refused, val, refused.init({"w": jnp.ones(3)}, one), one)
    with pytest.raises(jax.errors.ConcretizationTypeError) as caught:
        run.step(one.phi0, BATCHES[0])
    assert sum(" at height 1 and multiply" in note for note in caught.value.__notes__) == 1


RISE = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=4, decay_steps=12, end_value=0.1)
SCHEDULES = {  # what optax refuses, and the exact way to write it
    "warmup": (
        lambda h: optax.warmup_cosine_decay_schedule(0.0, h["lr"], 4, 12, end_value=0.1 * h["lr"]),
        lambda h: lambda n: h["lr"] * RISE(n),
        lambda h: optax.warmup_cosine_decay_schedule(0.0, float(h["lr"]), 4, 12, end_value=0.1 * float(h["lr"])),
    ),
    "exponential": (
        lambda h: optax.exponential_decay(h["lr"], 4, decay_rate=h["end"]),
        lambda h: lambda n: h["lr"] * h["end"] ** (n / 4),
        lambda h: optax.exponential_decay(float(h["lr"]), 4, decay_rate=float(h["end"])),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_optax_refuses_is_exact_as_its_note_writes_it(name):
    refused, written, plain = SCHEDULES[name]
    space, val = Space(lr=log(0.05), end=logit(0.5)), lambda s, h, b: regression(s.params, h, b)
    made = lambda schedule: adapter.train_step(regression, lambda h: optax.adam(schedule(h)))
    state = made(written).init({"w": jnp.ones(3)}, space)
    with pytest.raises(jax.errors.ConcretizationTypeError) as caught:
        adapter.inner(made(refused), val, state, space).run(space.phi0, BATCHES[:2], VAL)
    assert sum("Hyperparameters are traced" in note for note in caught.value.__notes__) == 1
    run = adapter.inner(made(written), val, state, space, params=lambda s: s.params)
    assert_exact(check_hypergradient(run, BATCHES, VAL))
    run.run(space.phi0, BATCHES, VAL)
    want = state
    for batch in BATCHES:
        want, _ = made(plain)(want, {"lr": 0.05, "end": 0.5}, batch)
    np.testing.assert_allclose(run.params, want.params["w"], rtol=1e-7)  # optax rounds constants to float32


HELD = {
    "alone": lambda h: optax.inject_hyperparams(optax.adam)(learning_rate=h["lr"]),
    "in a chain": lambda h: optax.chain(
        optax.clip(1.0), optax.apply_if_finite(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1 * h["lr"]), 3)
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_a_value_held_in_the_optimizers_state_is_refused(name):
    with pytest.raises(AdapterError, match=r"inject_hyperparams keeps learning_rate in .* itself, as lambda hyper"):
        adapter.train_step(regression, HELD[name]).init({"w": jnp.ones(3)}, Space(lr=log(0.05)))


def test_what_is_injected_as_a_schedule_is_tuned():
    made = lambda h: optax.inject_hyperparams(optax.adam)(learning_rate=lambda n: h["lr"] / (n + 1.0))
    space, step = Space(lr=log(0.05)), adapter.train_step(regression, made)
    run = adapter.inner(step, lambda s, h, b: regression(s.params, h, b), step.init({"w": jnp.ones(3)}, space), space)
    assert_exact(check_hypergradient(run, BATCHES, VAL))


def test_what_a_loss_stops_is_a_constant_and_an_argument_of_its_own_is_not():
    space = Space(lr=log(0.05), l2=log(0.1))
    both = lambda w, held, h, b: regression({"w": w}, h, b) + h["l2"] * jnp.sum(w**2 * held**2)

    def step(state, hyper, batch, held):
        value, g = jax.value_and_grad(lambda w: both(w, held(w, state["w"]), hyper, batch))(state["w"])
        return {"w": state["w"] - hyper["lr"] * g}, value

    stopped = lambda s, h, b: step(s, h, b, lambda w, now: jax.lax.stop_gradient(w))
    apart = lambda s, h, b: step(s, h, b, lambda w, now: now)
    one, two = (adapter.inner(f, regression, {"w": jnp.ones(3)}, space) for f in (stopped, apart))
    assert not check_hypergradient(one, BATCHES, VAL).ok
    assert_exact(check_hypergradient(two, BATCHES, VAL))
    np.testing.assert_allclose(one.run(space.phi0, BATCHES, VAL)[0], two.run(space.phi0, BATCHES, VAL)[0], rtol=1e-12)


def test_functions_among_the_leaves_stay_what_they_are():
    model = {"w": jnp.ones(3), "activation": jnp.tanh}

    def loss(model, hyper, batch):
        X, y = batch
        return jnp.mean((model["activation"](X @ model["w"]) - y) ** 2)

    space = Space(lr=log(0.1))
    step = adapter.train_step(loss, lambda h: optax.adam(h["lr"]))
    state = step.init(model, space)
    run = adapter.inner(step, lambda s, h, b: loss(s.params, h, b), state, space, params=lambda s: s.params)
    assert check_hypergradient(run, BATCHES, VAL).ok
    assert run.state.params["activation"] is jnp.tanh
    assert run.unravel(run.params)["activation"] is jnp.tanh
    flat = adapter.problem(loss, loss, model)
    assert check_hypergradient(inner.sgd(flat, space), BATCHES, VAL).ok
    assert flat.unravel(flat.params)["activation"] is jnp.tanh


def test_equinox_and_nnx_models_train_as_they_are():
    eqx, nnx = pytest.importorskip("equinox"), pytest.importorskip("flax.nnx")
    space = Space(lr=log(0.05), momentum=logit(0.8))
    optimizer = lambda h: optax.sgd(h["lr"], h["momentum"])
    error = lambda out, y: jnp.mean((out[:, 0] - y) ** 2)
    mlp = eqx.nn.MLP(3, 1, 4, 1, activation=jnp.tanh, key=jax.random.key(0), dtype=jnp.float64)
    of_eqx = lambda model, hyper, batch: error(jax.vmap(model)(batch[0]), batch[1])
    graph, weights = nnx.split(nnx.Linear(3, 1, rngs=nnx.Rngs(0), param_dtype=jnp.float64))
    of_nnx = lambda weights, hyper, batch: error(nnx.merge(graph, weights)(batch[0]), batch[1])
    for model, loss in ((mlp, of_eqx), (weights, of_nnx)):
        step = adapter.train_step(loss, optimizer)
        val = lambda state, hyper, batch, loss=loss: loss(state.params, hyper, batch)
        run = adapter.inner(step, val, step.init(model, space), space, params=lambda state: state.params)
        report = check_hypergradient(run, BATCHES, VAL)
        assert report.ok, str(report)
        assert jax.tree.structure(run.unravel(run.params)) == jax.tree.structure(model)


ATTENTION = Space(lr=log(0.05), l2=log(0.01))


@pytest.mark.parametrize("where", ["state", "batch"])
def test_equinox_dropout_and_attention_train_with_a_key(where):
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        dropout: eqx.nn.Dropout
        last: eqx.nn.Linear
        temperature: float

        def __call__(self, X, key):
            keys = (None, None) if key is None else jax.random.split(key)
            hidden = self.dropout(self.attention(X, X, X, key=keys[0]), key=keys[1])
            return jax.vmap(self.last)(hidden)[:, 0] * self.temperature

    one, two = jax.random.split(jax.random.key(0))
    attention = eqx.nn.MultiheadAttention(1, 3, dropout_p=0.2, dtype=jnp.float64, key=one)
    model = Model(attention, eqx.nn.Dropout(0.2), eqx.nn.Linear(3, 1, dtype=jnp.float64, key=two), 2.0)

    def loss(model, hyper, batch, *key):
        X, y, *own = batch
        weights = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
        return jnp.mean((model(X, (*own, *key)[0]) - y) ** 2) + hyper["l2"] * sum(jnp.sum(w**2) for w in weights)

    def val(state, hyper, batch):
        return jnp.mean((eqx.nn.inference_mode(state.params)(batch[0], None) - batch[1]) ** 2)

    step = adapter.train_step(loss, lambda h: optax.adamw(h["lr"]))
    state = step.init(model, ATTENTION, key=jax.random.key(1) if where == "state" else None)
    run = adapter.inner(step, val, state, ATTENTION, params=lambda s: s.params)
    batches = BATCHES if where == "state" else [(*b, jax.random.key(t)) for t, b in enumerate(BATCHES)]
    assert_exact(check_hypergradient(run, batches, VAL))
    run.run(ATTENTION.phi0, batches, VAL)
    trained = run.unravel(run.params)
    assert trained.temperature == 2.0
    assert trained.dropout.inference is False
    assert type(trained.dropout.p) is float
    assert run.params.size == sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))


def test_equinox_batch_norm_trains_with_its_statistics_in_the_state():
    eqx = pytest.importorskip("equinox")
    norm = lambda: eqx.nn.BatchNorm(3, axis_name="batch", mode="batch", dtype=jnp.float64)
    linear = eqx.nn.Linear(3, 1, dtype=jnp.float64, key=jax.random.key(0))
    model, statistics = eqx.nn.make_with_state(lambda: eqx.nn.Sequential([norm(), linear]))()

    def forward(model, statistics, X):
        return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(X, statistics)

    def loss(model, statistics, batch):
        out, statistics = forward(model, statistics, batch[0])
        return jnp.mean((out[:, 0] - batch[1]) ** 2), statistics

    def step(state, hyper, batch):
        train = eqx.filter_value_and_grad(loss, has_aux=True)
        (value, statistics), g = train(state["model"], state["statistics"], batch)
        moved = eqx.apply_updates(state["model"], jax.tree.map(lambda g: -hyper["lr"] * g, g))
        return {"model": moved, "statistics": statistics}, value

    def val(state, hyper, batch):
        return loss(eqx.nn.inference_mode(state["model"]), state["statistics"], batch)[0]

    space = Space(lr=log(0.05))
    run = adapter.inner(step, val, {"model": model, "statistics": statistics}, space, params=lambda s: s["model"])
    assert_exact(check_hypergradient(run, BATCHES, VAL))
    run.step(space.phi0, BATCHES[0])
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), run.state["statistics"], statistics)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("optimizer", [lambda h: optax.sgd(h["lr"]), lambda h: optax.adam(h["lr"])], ids=["sgd", "adam"])
def test_python_numbers_among_the_params_are_constants(optimizer):
    loss = lambda p, h, b: regression(p, h, b) * p["temperature"] * p["power"] * (2.0 if p["twice"] else 1.0)
    space = Space(lr=log(0.05))
    step = adapter.train_step(loss, optimizer)
    state = step.init({"power": 3, "temperature": 2.0, "twice": True, "w": jnp.ones(3)}, space)
    run = adapter.inner(step, lambda s, h, b: loss(s.params, h, b), state, space, params=lambda s: s.params)
    assert check_hypergradient(run, BATCHES, VAL).ok
    run.run(space.phi0, BATCHES[:5], VAL)
    assert run.params.size == 3
    for params in (run.state.params, run.unravel(run.params)):
        assert (params["power"], params["temperature"], params["twice"]) == (3, 2.0, True)


def test_a_bool_that_a_step_changes_is_refused():
    step = lambda s, h, b: ({"w": s["w"] * h["lr"], "done": s["w"].sum() < 1}, s["w"].sum())
    run = adapter.inner(step, lambda s, h, b: s["w"].sum(), {"w": np.ones(3), "done": False}, Space(lr=log(0.1)))
    with pytest.raises(AdapterError, match=r"changes \['done'\], a Python bool.*jnp.asarray\(False\)"):
        run.step([-2.0], None)


@pytest.mark.parametrize("tangents", [True, False])
def test_a_step_may_return_a_plain_number_as_its_loss(tangents):
    run = adapter.inner(lambda s, h, b: (s * h["lr"], 0.0), lambda s, h, b: s.sum(), jnp.ones(3), Space(lr=log(0.1)))
    assert run.step(run.space.phi0, None, tangents=tangents) == 0
    losses, H = run.run(run.space.phi0, [None] * 2, None)
    assert (losses == 0).all()
    assert H.shape == (2, 1)


def test_a_step_without_jit_leaves_arrays_in_the_state():
    space = Space(lr=log(0.1))
    table = np.arange(3.0)
    step = lambda s, h, b: ({"w": s["w"] * h["lr"], "table": jnp.asarray(table), "n": jnp.asarray(0)}, 0.0)
    carry = adapter.init({"w": jnp.ones(3), "table": jnp.ones(3), "n": jnp.asarray(1)}, space.q)
    carry, loss = adapter.step(step, carry, adapter.point(space, space.phi0), None)
    assert all(isinstance(x, jax.Array) for x in [loss, *jax.tree.leaves(carry)])
    assert (carry.state["table"] == table).all()
    assert carry.state["n"].dtype == jnp.int64


# -- linearisation, problem --------------------------------------------------------------------------------------------


def test_linearises_when_it_knows_the_loss():
    space = Space(lr=log(0.05), l2=log(0.1))
    loss = lambda state, hyper, batch: regression(state, hyper, batch) + hyper["l2"] * jnp.sum(state["w"] ** 4)

    def step(state, hyper, batch):
        value, g = jax.value_and_grad(lambda w: loss({"w": w}, hyper, batch))(state["w"])
        return {"w": state["w"] - hyper["lr"] * g, "n": state["n"] + 1}, value

    state = {"w": np.ones(3), "n": 0}
    run = adapter.inner(step, regression, state, space, loss=loss)
    run.step(space.phi0, BATCHES[0])
    frozen = run.linearise(BATCHES[0], VAL)
    X, w = BATCHES[0][0], run.params
    H = 2 * X.T @ X / len(X) + np.diag(12 * 0.1 * w**2)
    np.testing.assert_allclose(frozen.hvp(np.eye(3)), H, rtol=1e-12)
    np.testing.assert_allclose(frozen.gradient, 2 * X.T @ (X @ w - BATCHES[0][1]) / len(X) + 0.4 * w**3, rtol=1e-12)
    np.testing.assert_allclose(frozen.outer_hvp(np.eye(3)), 2 * VAL[0].T @ VAL[0] / len(VAL[0]), rtol=1e-12)
    assert frozen.outer_gradient.shape == (3,)
    with pytest.raises(ShapeError, match="V must have shape"):
        frozen.hvp(np.ones(3))
    with pytest.raises(AdapterError, match=r"pass inner\(..., loss=...\)"):
        noisy().linearise(VAL)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_linearises_a_step_made_by_train_step_with_the_key_of_its_next_step(dtype):
    traces = []

    def loss(params, hyper, batch, key):
        traces.append(None)
        mask = jax.random.bernoulli(key, 0.7, (4,))
        r = network(params, batch[0], mask) - batch[1]
        return jnp.mean(r**2) + hyper["l2"] * jnp.sum(params["out"] ** 2)

    space = Space(lr=log(0.05), l2=log(0.1))
    params, batches, val = noisy_state(dtype)["params"], [data(t, dtype) for t in range(2)], data(99, dtype)
    made = adapter.train_step(loss, lambda h: optax.adam(h["lr"]))
    outer = lambda s, h, b: jnp.mean((network(s.params, b[0], 1.0) - b[1]) ** 2)
    run = adapter.inner(made, outer, made.init(params, space, key=jax.random.key(2)), space, params=lambda s: s.params)
    run.step(space.phi0, batches[0])
    before, frozen, state = run.snapshot(), run.linearise(batches[1], val), run.state
    assert frozen.gradient.dtype == frozen.hvp(np.eye(20)).dtype == frozen.outer_hvp(np.eye(20)).dtype == dtype
    next_key = jax.random.split(state.key)[1]
    at = lambda theta: run.unravel(theta.astype(dtype))
    inner_value = lambda theta: float(loss(at(theta), {"l2": 0.1}, batches[1], next_key))
    outer_value = lambda theta: float(outer(state._replace(params=at(theta)), {}, val))
    theta, rng = run.params.astype(np.float64), np.random.default_rng(0)
    step, rtol = (1e-4, 1e-6) if dtype == np.float64 else (3e-2, 1e-2)  # of second differences: eps / step^2, step^2
    for value, g, hvp in (
        (inner_value, frozen.gradient, frozen.hvp),
        (outer_value, frozen.outer_gradient, frozen.outer_hvp),
    ):
        v = rng.normal(size=20) / 4
        ahead, here, behind = (value(theta + s * step * v) for s in (1, 0, -1))
        np.testing.assert_allclose(g @ v, (ahead - behind) / (2 * step), rtol=rtol)
        np.testing.assert_allclose(hvp(v[None])[0] @ v, (ahead - 2 * here + behind) / step**2, rtol=30 * rtol)
    seen = len(traces)
    again = run.linearise(batches[1], val)
    assert np.array_equal(again.hvp(np.eye(20)), frozen.hvp(np.eye(20)))
    assert len(traces) == seen, "the same linearisation was compiled twice"
    assert all(np.array_equal(before[k], v) for k, v in run.snapshot().items())


def test_a_problem_has_its_leaves_as_segments_and_an_exact_outer_hessian():
    params = {"W": np.ones((3, 2)), "b": np.ones(2), "none": np.ones(0), "n": 3}

    def loss(params, hyper, batch):
        X, y = batch
        return jnp.mean((jnp.tanh(X @ params["W"] + params["b"]).sum(1) - y) ** 2) + hyper["l2"] @ jnp.array([1.0, 2.0])

    model = adapter.problem(loss, loss, params, hyper=("l2",))
    assert model.segments == (6, 2)
    assert model.unravel(model.params)["n"] == 3
    run = inner.sgd(model, Space(lr=log([0.05, 0.1]), l2=log([0.1, 0.2])))
    assert check_hypergradient(run, BATCHES, VAL).ok
    H = run.linearise(BATCHES[0]).outer_hvp(np.eye(8))
    np.testing.assert_allclose(H, H.T, atol=1e-14)
    np.testing.assert_allclose(H, run.linearise(BATCHES[0]).hvp(np.eye(8)), rtol=1e-12, atol=1e-14)


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD_STEPS = {
    r"return \(state, loss\), got dict": lambda s, h, b: s,
    "the state's own tree": lambda s, h, b: ((s["w"],), 0.0),
    r"\['w'\] as it came, \(3,\) of float64, got \(2,\)": lambda s, h, b: ({"w": s["w"][:2]}, 0.0),
    "got .* of float32. Cast it": lambda s, h, b: ({"w": s["w"].astype(np.float32)}, 0.0),
    r"loss must be a real scalar, got shape \(3,\)": lambda s, h, b: (s, s["w"]),
    r"reads hyper\['momentun'\].*Did you mean 'momentum'": lambda s, h, b: (s, h["momentun"]),
    r"return \['w'\] as it came, an array, got function": lambda s, h, b: ({"w": sgd}, 0.0),
    "loss must be finite at the initial state, got nan": lambda s, h, b: (s, jnp.nan * s["w"].sum()),
}


@pytest.mark.parametrize("message", BAD_STEPS)
@pytest.mark.parametrize("whole_window", [False, True])
def test_refuses_a_step_that_breaks_the_contract(message, whole_window):
    space = Space(lr=log(0.1), momentum=logit(0.9))
    run = adapter.inner(BAD_STEPS[message], lambda s, h, b: s["w"].sum(), {"w": np.ones(3)}, space)
    before = run.snapshot()
    with pytest.raises(AdapterError, match=message):
        run.run(space.phi0, [None] * 4, None) if whole_window else run.step(space.phi0, None)
    assert all(np.array_equal(before[k], v) for k, v in run.snapshot().items())


def test_a_carry_starts_from_numbers_among_the_arrays():
    space = Space(lr=log(0.1))
    step = lambda s, h, b: ({"w": s["w"] * h["lr"], "steps": s["steps"] + 1, "sum": s["sum"] + 1}, s["w"].sum())
    carry, at = adapter.init({"w": np.ones(3), "steps": 0, "sum": 0.0}, space.q), adapter.point(space, space.phi0)
    assert carry.tangents["sum"].shape == (1,)
    carry, _ = jax.lax.scan(lambda c, b: adapter.step(step, c, at, b), carry, length=2)
    assert carry.state["steps"] == carry.state["sum"] == 2
    with pytest.raises(ShapeError, match=r"jax.init: directions must have shape \(s, 1\), got \(2, 3\)"):
        adapter.init({"w": np.ones(3)}, 1, np.ones((2, 3)))
    with pytest.raises(HyperparameterError, match=r"jax.init: q must be a whole number"):
        adapter.init({"w": np.ones(3)}, space)
    for leaf, said in ((jnp.tanh, "a PjitFunction"), (False, "a bool"), ("a", "a str")):
        with pytest.raises(AdapterError, match=rf"jax.init: state\['x'\] is {said}.*equinox.partition.*jax.inner"):
            adapter.init({"w": np.ones(3), "x": leaf}, 1)
    state = adapter.train_step(regression, lambda h: optax.sgd(h["lr"])).init({"w": np.ones(3), "scale": 2.0}, space)
    with pytest.raises(AdapterError, match=r"jax.init: state.params\['scale'\] is a float"):
        adapter.init(state, 1)


def test_refuses_what_is_not_of_its_kind():
    step, val, space = lambda s, h, b: (s, s["w"].sum()), lambda s, h, b: s["w"].sum(), Space(lr=log(0.1))
    carry, at = adapter.init({"w": np.ones(3)}, 1), adapter.point(space, space.phi0)
    with pytest.raises(HyperparameterError, match=r"jax.point: space must be a Space, got dict. Make one"):
        adapter.point({"lr": 0.1}, space.phi0)
    for call, function in (("step", step), ("hypergradient", val)):
        run = getattr(adapter, call)
        with pytest.raises(AdapterError, match=rf"jax.{call}: carry must be a Carry, got dict. Take jax.init\("):
            run(function, {"w": np.ones(3)}, at, None)
        with pytest.raises(AdapterError, match=rf"jax.{call}: at must be a Point, got dict. Take jax.point\("):
            run(function, carry, {"lr": 0.1}, None)
        with pytest.raises(AdapterError, match=rf"jax.{call}: .* must be a function, got NoneType"):
            run(None, carry, at, None)


def test_a_made_step_refuses_what_is_not_of_its_kind():
    space, params = Space(lr=log(0.1)), {"w": jnp.ones(3)}
    made = adapter.train_step(regression, lambda h: optax.sgd(h["lr"]))
    with pytest.raises(HyperparameterError, match=r"jax.train_step.init: space must be a Space, got dict"):
        made.init(params, {"lr": 0.1})
    for key, got in ((0, "int 0"), ("a", "str 'a'"), (jnp.ones(2), r"shape \(2,\) of float64")):
        with pytest.raises(AdapterError, match=rf"init: key must be one PRNG key, got {got}. Pass key=jax.random.key\(0\)"):
            made.init(params, space, key=key)
    with pytest.raises(AdapterError, match=r"init: params has no real array.*jnp.asarray\(1.0\)"):
        made.init({"w": 3.0}, space)
    with pytest.raises(AdapterError, match=r"optimizer must return an optax.GradientTransformation, got NoneType"):
        adapter.train_step(regression, lambda h: None).init(params, space)
    with pytest.raises(AdapterError, match="train_step: the state must be a TrainState, got dict"):
        adapter.inner(made, lambda s, h, b: 0.0, params, space).step(space.phi0, VAL)
    state = made.init(params, space)
    for loss, got in (
        (lambda p, h, b: (regression(p, h, b), p), "got tuple. Return the loss alone"),
        (lambda p, h, b: None, "got NoneType. Return the loss alone"),
        (lambda p, h, b: p["w"], r"got shape \(3,\)"),
    ):
        val = lambda s, h, b, loss=loss: loss(s.params, h, b)
        run = adapter.inner(adapter.train_step(loss, made.optimizer), val, state, space)
        with pytest.raises(AdapterError, match=f"the loss of train_step must be a real scalar, {got}"):
            run.step(space.phi0, VAL)
        with pytest.raises(AdapterError, match=f"val_loss must be a real scalar, {got}"):
            run.hypergradient(VAL)


def test_refuses_what_it_cannot_train():
    step, val, space = lambda s, h, b: (s, s["w"].sum()), lambda s, h, b: s["w"], Space(lr=log(0.1))
    make = lambda state, **options: adapter.inner(step, val, state, space, **options)
    with pytest.raises(AdapterError, match="no real leaf"):
        make({"w": 3})
    with pytest.raises(AdapterError, match="complex leaf"):
        make({"w": np.ones(2) + 1j})
    with pytest.raises(AdapterError, match="train_step must be a function, got NoneType"):
        adapter.inner(None, val, {"w": np.ones(2)}, space)
    with pytest.raises(HyperparameterError, match="space must be a Space"):
        adapter.inner(step, val, {"w": np.ones(2)}, {"lr": 0.1})
    with pytest.raises(AdapterError, match="params must pick a subtree"):
        make({"w": np.ones(2), "n": 1}, params=lambda s: s["n"])
    with pytest.raises(AdapterError, match="val_loss must be a real scalar"):
        make({"w": np.ones(2)}).hypergradient(None)
    with pytest.raises(HyperparameterError, match="every must be a whole number"):
        make({"w": np.ones(2)}).run(space.phi0, [None], None, every=0)
    with pytest.raises(AdapterError, match="optimizer must be a function"):
        adapter.train_step(step, optax.sgd(0.1))
    with pytest.raises(AdapterError, match="no real leaf"):
        adapter.problem(step, val, {"w": 3})
    with pytest.raises(AdapterError, match=r"use \('l2',\)"):
        adapter.problem(step, val, np.ones(2), hyper="l2")
    vector = inner.sgd(adapter.problem(lambda p, h, b: p, lambda p, h, b: p, np.ones(2)), space)
    with pytest.raises(AdapterError, match="train_loss must be a real scalar"):
        vector.step(space.phi0, None)
