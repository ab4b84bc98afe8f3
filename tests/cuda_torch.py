"""The torch adapter's card on the CPU's memory, under Numba's simulator, and on memory that nobody can read.

`test_cuda.py` runs this file.  `Simulated` is the adapter's `OnCard` but for how tensors and arrays share memory.
`Unreadable` has the model on torch's `meta` device: there whatever reads a tensor, or mixes it with the CPU's, raises.
"""

import copy
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from koopman_hpo_adapters import _torch_checks, _torch_device, _torch_graph, _torch_losses, _torch_memory
from koopman_hpo_adapters import torch as kt
from koopman_hpo_adapters._torch_inner import TorchInner
from koopman_hpo_adapters.torch import HyperOptimizer
from numba import config
from torch import nn

from koopman_hpo import Guard, Local, Space, Tuner, check_hypergradient, devices, log
from koopman_hpo.errors import AdapterError, HyperparameterError
from koopman_hpo.kernels.cuda import launch

torch.set_num_threads(1)
F = nn.functional


class Simulated(_torch_device.OnCard):
    """The card's code, with the CPU's tensors as its memory."""

    def _open(self):
        self.stream = lambda: 0

    def view(self, tensor):
        from numba.cuda.cudadrv.devicearray import FakeCUDAArray

        half = tensor.dtype == torch.bfloat16
        return FakeCUDAArray(tensor.view(torch.int16).numpy().view(np.uint16) if half else tensor.numpy())

    def tensor(self, a):
        return torch.from_numpy(a._ary)

    def random(self):
        return [torch.get_rng_state()]

    def set_random(self, states):
        torch.set_rng_state(states[0])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    if not config.ENABLE_CUDASIM:
        pytest.skip("of the simulator")
    monkeypatch.setattr(launch, "THREADS", 2)  # the simulator pays for each
    monkeypatch.setattr(launch, "BLOCKS", 1)
    monkeypatch.setattr(devices, "SHARES", 2)


@pytest.fixture
def on_card(monkeypatch):
    """Makes the adapter take every model for one on a card."""
    return lambda: monkeypatch.setattr(_torch_device, "of", Simulated)


def test_a_step_on_a_card_is_not_frozen(on_card):
    on_card()
    net, x = nn.Linear(4, 3), torch.ones(2, 4)
    more = {"tune": ("lr",), "val_loss": lambda: net(x).sum(), "strategy": Local(), "steps": 40}
    hopt = HyperOptimizer(torch.optim.SGD(net.parameters(), 0.1), **more)
    assert hopt.tuner.inner.beside == "device='cuda'"


def test_recurrent_layers_run_without_cudnn_on_a_card(on_card):
    """Whose kernels have no second derivative, and in evaluation mode not even a first."""
    seen = []

    class Layer(nn.LSTM):
        def forward(self, x):
            seen.append(torch.backends.cudnn.enabled)
            if x.isnan().any():
                raise ValueError("not a number")
            return super().forward(x)

    def wrap(net):
        opt, val_loss = torch.optim.SGD(net.parameters(), 0.1), lambda: net.eval()(torch.ones(3, 2, 2))[0].sum() * 1
        return HyperOptimizer(opt, tune=("lr",), val_loss=val_loss, model=net, strategy=Local(), steps=40)

    net, twin = Layer(2, 3), Layer(2, 3)
    wrap(twin).step(lambda: twin(torch.ones(3, 2, 2))[0].square().sum())
    assert set(seen) == {True}
    seen.clear()
    on_card()
    hopt = wrap(net)
    hopt.step(lambda: net(torch.ones(3, 2, 2))[0].square().sum())
    with pytest.raises(ValueError, match="not a number"):
        net(torch.full((3, 2, 2), torch.nan))
    copy.deepcopy(net)(torch.ones(3, 2, 2))
    assert set(seen) == {False}
    assert torch.backends.cudnn.enabled


class Net(nn.Module):
    """Normalised, with dropout, and with a branch that some steps do not use."""

    def __init__(self, dtype, drop, place):
        super().__init__()
        torch.manual_seed(1)
        self.one, self.norm, self.drop = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(drop)
        self.two, self.side = nn.Linear(5, 3), nn.Linear(3, 1)
        self.to(place, dtype)

    def forward(self, x, branch=True):
        out = self.two(self.drop(torch.tanh(self.norm(self.one(x)))))
        return out + self.side(out) * 0.1 * torch.arange(3, device=x.device) if branch else out


def optimizer(name, net):
    groups = [{"params": [*net.one.parameters(), *net.norm.parameters()]}, {"params": [*net.two.parameters()]}]
    groups.append({"params": [*net.side.parameters()]})
    make = {
        "sgd": lambda: torch.optim.SGD(groups, 0.1, 0.8, weight_decay=1e-2),
        "nesterov": lambda: torch.optim.SGD(groups, 0.1, 0.8, weight_decay=1e-2, nesterov=True),
        "adam": lambda: torch.optim.Adam(groups, 0.02, (0.8, 0.9), 1e-3, 1e-2),
        "adamw": lambda: torch.optim.AdamW(groups, 0.02, (0.8, 0.9), 1e-3, 1e-2),
        "rmsprop": lambda: torch.optim.RMSprop(groups, 0.02, 0.9, 1e-3, 1e-2, 0.5),
        "centered": lambda: torch.optim.RMSprop(groups, 0.02, 0.9, 1e-3, 1e-2, 0.5, centered=True),
        "adagrad": lambda: torch.optim.Adagrad(groups, 0.1, 0.1, 1e-2, eps=1e-3),
    }
    return make[name]()


TUNED = {"sgd": ("momentum",), "nesterov": ("momentum",), "adam": ("betas", "eps"), "adamw": ("betas", "eps")}
TUNED |= {"rmsprop": ("alpha", "momentum"), "centered": ("alpha", "eps"), "adagrad": ("lr_decay", "eps")}


def wrapped(name, dtype=torch.float64, lr=None, drop=0.2, place="cpu", **settings):
    """(network, its HyperOptimizer, a function that takes a step) over one set of random data."""
    net, make = Net(dtype, drop, place), torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=make, dtype=torch.float64).to(place, dtype)
    y = torch.arange(12, device=place) % 3
    smooth = torch.tensor([0.5, 1.0, 2.0], dtype=dtype, device=place)
    tune = dict.fromkeys(("lr", "weight_decay", *TUNED[name])) | {"weights": (smooth, log)}

    def val_loss():
        return F.cross_entropy(net.eval()(x + 0.5), y)

    ours = {"strategy": Local(), "window": 3, "steps": 6, "guard": None}
    opt = optimizer(name, net)
    for group in opt.param_groups:
        group["lr"] = lr or group["lr"]
    hopt = HyperOptimizer(opt, tune=tune, val_loss=val_loss, model=net, **ours | settings)
    steps = itertools.count()

    def step():
        each = F.cross_entropy(net.train()(x, next(steps) % 3 < 2), y, reduction="none")
        return hopt.step((smooth[y] * each).mean())

    torch.manual_seed(2)
    return net, hopt, step


def agree(one, two, rtol):
    """Whether two runs are the same: h, all of the state, and what torch shows."""
    h, other = one[1].hypergradient(), two[1].hypergradient()
    np.testing.assert_allclose(other.value, h.value, rtol=rtol)
    np.testing.assert_allclose(other.grad, h.grad, rtol=rtol, atol=rtol * np.abs(h.grad).max())
    state, twin = one[1].state_dict(), two[1].state_dict()
    assert state["meta"].keys() == twin["meta"].keys()
    assert all(isinstance(a, np.ndarray) for name, a in twin.items() if name != "meta")
    for name, a in state.items():
        if name not in ("meta", "inner/rng") and a.dtype.kind == "f":
            np.testing.assert_allclose(twin[name], a, rtol=rtol, atol=rtol * max(1, np.abs(a).max(initial=0)), err_msg=name)
    for p, q in zip(one[0].parameters(), two[0].parameters(), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=rtol, atol=rtol)


def pair(on_card, *args, **settings):
    host = wrapped(*args, **settings)
    on_card()
    card = wrapped(*args, **settings)
    assert isinstance(card[1]._inner._device, Simulated)
    return host, card


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float64) for name in TUNED), ("adam", torch.float32)])
def test_a_run_is_the_one_on_the_cpu(on_card, name, dtype):
    rtol = 1e-10 if dtype == torch.float64 else 1e-3
    host, card = pair(on_card, name, dtype, clip_norm=0.5)
    losses = []
    for run in (host, card):
        torch.manual_seed(3)
        losses.append([float(run[2]()) for _ in range(7)])  # two windows, and a plain step after them
    np.testing.assert_allclose(losses[1], losses[0], rtol=rtol)
    assert card[1].tuner.done
    agree(host, card, rtol)


@pytest.mark.parametrize("settings", [{"chunk": 2}, {"directions": 2, "seed": 3}])
def test_options_mean_the_same(on_card, settings):
    host, card = pair(on_card, "adam", **settings)
    for run in (host, card):
        torch.manual_seed(3)
        for _ in range(5):
            run[2]()
    agree(host, card, 1e-10)


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("kept", ["bfloat16", "float16"])
def test_tangents_in_half_the_memory_lose_what_their_type_loses(on_card, monkeypatch, kept, loops):
    if loops:
        monkeypatch.setattr(_torch_graph, "_SMALL", 0)
    full = wrapped("adam", torch.float32)
    with pytest.raises(HyperparameterError, match="got float32 on 'cpu'"):
        wrapped("adam", torch.float32, tangents=kept)
    on_card()
    half = wrapped("adam", torch.float32, tangents=kept)
    for run in (full, half):
        torch.manual_seed(3)
        for _ in range(3):
            run[2]()
    assert half[1].tuner.inner.memory.Z.dtype == getattr(torch, kept)
    h, exact = half[1].hypergradient().grad, full[1].hypergradient().grad
    error = np.abs(h - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 3 * (2**-7 if kept == "bfloat16" else 2**-10)


class Idle(Simulated):
    """A card whose kernels do nothing: the simulator would take minutes."""

    def kernel(self, name):
        return lambda *args: None

    def _product(self, Z, x):
        return np.zeros(len(Z))


def memory(step):
    """Bytes that a step takes beside what it leaves, at most."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    with tempfile.TemporaryDirectory() as folder:
        seen.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    moves = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(itertools.accumulate(n for _, n in moves))


def taken(looped, kept):
    """Bytes of tangents and of what a step of SGD on 100,000 parameters takes, and the path."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 300), nn.Softplus() if looped else nn.Tanh(), nn.Linear(300, 300), nn.Tanh())
    x = torch.randn(2, 20)
    opt = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=1e-3)
    settings = {"steps": 9, "window": 9, "every": 9, "guard": None, "strategy": Local(), "tangents": kept, "clip_norm": 1.0}
    val_loss = lambda: net.eval()(x).sum()
    hopt = HyperOptimizer(opt, tune=("lr", "momentum", "weight_decay"), val_loss=val_loss, model=net, **settings)
    step = lambda: hopt.step(net.train()(x).square().sum())
    step()
    run = hopt.tuner.inner
    held = (run.memory.Z, run._device.tensors[3], run.losses._rooms[3].flat[1])
    return sum(t.nbytes for t in held) + memory(step), hopt.path


@pytest.mark.parametrize(("looped", "path"), [(False, "forward over reverse"), (True, "looped double backward")])
def test_half_the_memory_is_less_memory_in_a_step_too(monkeypatch, looped, path):
    monkeypatch.setattr(_torch_device, "of", Idle)
    monkeypatch.setattr(_torch_graph, "_ROOM", 2**17)  # as small beside this model as it is beside a large one
    full, half = taken(looped, None), taken(looped, "bfloat16")
    assert full[1] == half[1] == path
    assert half[0] < 0.76 * full[0]


@pytest.mark.parametrize("kept", ["bfloat16", "float16"])
def test_tangents_in_half_the_memory_are_clipped_and_accumulated(on_card, kept):
    runs = [wrapped("sgd", torch.float32, clip_norm=0.5)]
    on_card()
    runs.append(wrapped("sgd", torch.float32, clip_norm=0.5, tangents=kept))
    x, y = torch.ones(6, 4).cumsum(0), torch.arange(6) % 3
    for net, hopt, _ in runs:
        for _ in range(2):
            for part in (slice(0, 3), slice(3, 6)):
                hopt.accumulate(F.cross_entropy(net.eval()(x[part]), y[part]))
            hopt.step()
    assert runs[1][1].tuner.inner.losses._rooms[6].flat[1].dtype == getattr(torch, kept)
    h, exact = runs[1][1].hypergradient().grad, runs[0][1].hypergradient().grad
    error = np.abs(h - exact).max() / np.abs(exact).max()
    assert 1e-6 < error < 3 * (2**-7 if kept == "bfloat16" else 2**-10)


def test_accumulated_losses_are_the_same(on_card):
    runs = pair(on_card, "sgd")
    x, y = torch.ones(6, 4, dtype=torch.float64).cumsum(0), torch.arange(6) % 3
    for net, hopt, _ in runs:
        for _ in range(2):
            for part in (slice(0, 3), slice(3, 6)):
                hopt.accumulate(F.cross_entropy(net.eval()(x[part]), y[part]))
            hopt.step()
    agree(*runs, 1e-10)


def resumes(tmp_path, place="cpu"):
    """A run that is saved and resumed is the uninterrupted one, bit for bit, dropout's masks included."""
    whole, first, again = (wrapped("adam", place=place) for _ in range(3))
    torch.manual_seed(3)
    for _ in range(6):
        whole[2]()
    torch.manual_seed(3)
    for _ in range(4):
        first[2]()
    first[1].save(tmp_path / "run.npz")
    for _ in range(4):  # as many as the saved run, whose branches follow a count of their own
        again[2]()
    again[1].load(tmp_path / "run.npz")
    for _ in range(2):
        again[2]()
    one, two = whole[1].state_dict(), again[1].state_dict()
    for name in one:
        if name != "meta":
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(on_card, tmp_path):
    on_card()
    resumes(tmp_path)


def test_a_window_that_diverges_is_taken_back(on_card):
    host, card = pair(on_card, "sgd", guard=Guard(), lr=100.0)
    for run in (host, card):
        torch.manual_seed(3)
        for _ in range(4):
            run[2]()
    for run in (host, card):
        assert run[1].tuner.history[0].event.startswith("rolled back: validation loss")
    agree(host, card, 1e-10)


def test_a_loss_that_is_not_finite_is_noticed_where_h_is_recorded(on_card):
    on_card()
    net = nn.Linear(2, 1).double()
    x = torch.ones(3, 2, dtype=torch.float64)
    opt = torch.optim.SGD(net.parameters(), 0.1)
    settings = {"steps": 8, "window": 4, "every": 4, "strategy": Local()}
    hopt = HyperOptimizer(opt, tune=("lr",), val_loss=lambda: net(x).square().mean(), **settings)
    start = hopt.tuner.inner.params
    for factor in (1.0, np.nan, 1.0, 1.0):
        assert isinstance(hopt.step(net(x).square().mean() * factor), torch.Tensor)
    assert hopt.tuner.history[-1].event == "rolled back: inner loss is nan"
    np.testing.assert_array_equal(hopt.tuner.inner.params, start)
    assert hopt.tuner.hyper["lr"] < 0.05
    for _ in range(2):
        hopt.step(net(x).square().mean())
    state = hopt.state_dict()  # in the middle of a window, whose losses have not been read
    assert isinstance(state["meta"]["window"]["loss"], float)


def test_the_exact_tools_and_central_differences_work(on_card):
    on_card()
    net, x = nn.Linear(3, 2).double(), torch.arange(12, dtype=torch.float64).reshape(4, 3) / 12
    loss = lambda batch: (net(x) - batch).square().mean()
    run = kt.inner(torch.optim.SGD(net.parameters(), 0.1, 0.5), loss, loss, ("lr", "momentum"))
    assert isinstance(run._device, Simulated)
    assert check_hypergradient(run, [0.1, 0.2, 0.3], 0.4).ok
    result = Tuner(run, mode="restart", steps=4, runs=2).fit([0.1, 0.2], [0.4])
    assert result.value < 0.5


def test_a_window_in_one_go_brings_its_losses_one_by_one(on_card, monkeypatch):
    def refuse(tensor, dtype=None):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    found = []
    for place in (lambda: None, on_card):
        place()
        net, x = nn.Linear(3, 2).double(), torch.arange(12, dtype=torch.float64).reshape(4, 3) / 12
        with torch.no_grad():
            net.weight.fill_(0.1).T.cumsum_(0), net.bias.zero_()
        loss = lambda batch, net=net, x=x: (net(x) - batch).square().mean()
        run = kt.inner(torch.optim.SGD(net.parameters(), 0.1, 0.5), loss, loss, ("lr", "momentum"))
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__array__", refuse)  # as a tensor on a card does
            found.append(run.run(run.phi, [0.1, 0.2, 0.3, 0.4], 0.4, every=2))
    assert found[0][0].dtype == found[1][0].dtype == np.float64
    for cpu, card in zip(*found, strict=True):
        np.testing.assert_allclose(card, cpu, rtol=1e-12)


@pytest.mark.parametrize("lr", [None, 100.0])
def test_nothing_of_the_size_of_the_model_crosses_in_a_window_or_on_the_way_back(on_card, monkeypatch, lr):
    on_card()
    crossed = []
    get, cpu = devices.Card.get, torch.Tensor.cpu
    monkeypatch.setattr(devices.Card, "get", lambda self, a: crossed.append(a.size) or get(self, a))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: crossed.append(self.numel()) or cpu(self))
    _, hopt, step = wrapped("adam", lr=lr, window=2, steps=8, guard=Guard(), directions=2)
    tuner = hopt.tuner
    assert max(crossed) >= tuner.inner.params.size  # wrapping does
    crossed.clear()
    for _ in range(6):
        step()
    assert len(tuner.history) == 3
    assert tuner.history[0].event.startswith("rolled back") == (lr is not None)
    assert (tuner.state.best is not None) == (lr is None)
    statistics, q = [t.numel() for t in tuner.inner.losses.statistics.tangents], tuner.inner.space["weights"].value.size
    assert 0 < max(crossed) <= q < 5 < min(statistics)  # neither BatchNorm's statistics, of 5 channels, nor their tangents
    crossed.clear()
    result = tuner.result
    assert isinstance(result.params, np.ndarray)
    assert result.best is None or isinstance(result.best.params, np.ndarray)
    assert max(crossed) == result.params.size


# -- a card that cannot be read ------------------------------------------------------------------------------------------


class Ghost:
    """An array that has a shape and a type, and no values."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype, self.size = tuple(shape), dtype, int(np.prod(shape))

    def __len__(self):
        return self.shape[0]


class Unreadable(Simulated):
    """A card whose kernels do nothing and whose memory cannot be read."""

    launched: list[str] = []  # noqa: RUF012 - kernels, by name
    locked = False

    def view(self, tensor):
        assert tensor.is_contiguous()
        assert tensor.device.type == "meta"
        return Ghost(tensor.shape, np.dtype(str(tensor.dtype).removeprefix("torch.")))

    def kernel(self, name):
        return lambda *args: self.launched.append(name)

    def array(self, call, name, a, shape, *dtypes):
        assert a.shape == shape
        assert a.dtype in dtypes
        return a

    def get(self, a):
        assert not self.locked, "an array was copied to the host"
        return np.zeros(a.shape, a.dtype)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.still, self.group, self.out = nn.BatchNorm2d(2), nn.LayerNorm(8), nn.Linear(8, 3)
        self.drop, self.unused = nn.Dropout(0.1), nn.Linear(2, 2)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.still(self.norm(self.conv(x)))), 2)
        return self.out(self.drop(self.group(x.flatten(1))))


class Soft(Layers):
    """One layer without a rule."""

    def forward(self, x):
        return F.softplus(super().forward(x))


class Plain(nn.Module):
    """Every layer has a rule of its own for tangents."""

    def __init__(self):
        super().__init__()
        self.conv, self.out, self.still = nn.Conv2d(1, 2, 3), nn.Linear(8, 3), nn.Linear(3, 3)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        x = F.avg_pool2d(F.max_pool2d(F.relu(self.conv(x)), 3, 1), 1).flatten(1)
        return torch.sigmoid(self.still(F.gelu(self.out(self.drop(torch.tanh(x))))) / 2) ** 2


@pytest.mark.parametrize("directions", [None, 2])
@pytest.mark.parametrize(
    ("make", "kind", "path"),
    [
        (Soft, torch.optim.SGD, "batched double backward"),
        (Soft, torch.optim.Adam, "batched double backward"),
        (Layers, torch.optim.SGD, "forward over reverse"),
        (Plain, torch.optim.Adam, "forward over reverse"),
    ],
)
def test_a_step_reads_nothing_and_mixes_nothing(monkeypatch, make, kind, path, directions):
    monkeypatch.setattr(_torch_device, "of", Unreadable)
    monkeypatch.setattr(_torch_checks, "_PLACES", ("meta",))
    with torch.device("meta"):
        net, x, y, weights = make(), torch.randn(2, 1, 6, 6), torch.zeros(2, dtype=torch.long), torch.ones(3)
    p = sum(w.numel() for w in net.parameters())
    monkeypatch.setattr(_torch_memory.Memory, "flat", lambda self: np.zeros(p, np.float32))  # wrapping reads them once
    for copied in ("snapshot", "mark"):  # the tuner's, at the start
        monkeypatch.setattr(TorchInner, copied, lambda self: {})
    monkeypatch.setattr(_torch_losses.Losses, "world", lambda self: None)  # of the first step
    space = Space(lr=log([0.1, 0.01], knots=(0, 10)), l2=log(1e-3), weights=log([1.0, 1.0, 1.0]))
    more = {"clip_norm": 1.0, "directions": directions, "guard": None, "strategy": Local()}
    hopt = HyperOptimizer(
        kind(net.parameters(), 0.1),
        tune=space,
        val_loss=lambda: net(x).sum(),
        model=net,
        steps=50,
        window=50,
        every=50,
        **more,
    )
    run, weights = hopt.tuner.inner, hopt.hyper["weights"]
    run._t, run.memory.counts[:] = 1, 1  # the first loss is looked at, and the value of the outer loss before training
    run.memory.touched(1)
    hopt.tuner.state = hopt.tuner.state._replace(value0=1.0, t=1)
    run.show(hopt.tuner.phi)
    each = lambda: weights[y] * F.cross_entropy(net(x), y, reduction="none")
    loss = lambda: each().mean() + hopt.hyper["l2"] * net.out.weight.square().sum()
    Unreadable.launched.clear()
    monkeypatch.setattr(Unreadable, "locked", True)
    for n in range(4):
        net.train()
        if n == 2:
            net.still.eval()
        hopt.accumulate(loss())
        lost = hopt.step(loss if n % 2 else loss())
        assert isinstance(lost, torch.Tensor)
        assert lost.device.type == "meta"
    assert Unreadable.launched == [kind.__name__.lower()] * 4
    assert hopt.path == path


@pytest.mark.parametrize("read", [float, bool, torch.Tensor.cpu, torch.Tensor.numpy, lambda a: a + torch.ones(3)])
def test_what_reads_or_mixes_would_be_caught(read):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        read(torch.ones(3, device="meta").sum())


def test_models_on_several_devices_and_tensors_elsewhere_are_refused():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(AdapterError, match=r"one CUDA device, .* on meta beside torch.float32 on cpu"):
        HyperOptimizer(torch.optim.SGD(net.parameters(), 0.1), tune=("lr",), val_loss=lambda: None, steps=1)
    tune = {"lr": log, "l2": torch.ones((), device="meta")}
    with pytest.raises(
        HyperparameterError, match=r"l2 must be a leaf tensor of floats on cpu, as the parameters.* on meta"
    ):
        HyperOptimizer(torch.optim.SGD(net[:1].parameters(), 0.1), tune=tune, val_loss=lambda: None, steps=1)


def test_a_model_that_moves_after_wrapping_is_refused(on_card):
    on_card()
    net, hopt, step = wrapped("sgd")
    step()
    net.to(torch.float32)
    with pytest.raises(AdapterError, match=r"moved, cast, replaced or frozen after wrapping\. Change the model first"):
        hopt.step(torch.zeros((), requires_grad=True))
