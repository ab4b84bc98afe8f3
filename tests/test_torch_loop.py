"""PyTorch in a loop of one's own: what a loop does, what is carried, and what is refused."""

import copy
import dataclasses
import logging

import numpy as np
import pytest
import torch
from koopman_hpo_adapters import torch as kt
from koopman_hpo_adapters.torch import HyperOptimizer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint as checkpointing

from koopman_hpo import (
    AdapterError,
    CheckpointError,
    Global,
    Glocal,
    Guard,
    HyperparameterError,
    Local,
    Space,
    Tuner,
    box,
    check_hypergradient,
    checkpoint,
    identity,
    log,
    logit,
    outer,
)
from koopman_hpo.errors import KoopmanHPOError

torch.set_num_threads(1)
F = nn.functional
STILL = outer.sgd(1e-12)
WIDE = torch.float64


def data(n=12, d=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=rng, dtype=WIDE), torch.arange(n) % 3


X, Y = data()


def mlp(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(WIDE)


def loss_of(model, shift=0.0):
    return F.cross_entropy(model(X + shift), Y)


def wrap(net, opt, /, **settings):
    """A HyperOptimizer that leaves phi where it is."""
    still = {"strategy": Local(), "outer": STILL, "guard": None, "forget": 1.0, "steps": 100, "window": 100}
    val = lambda: F.cross_entropy(net.eval()(X + 0.5), Y)
    return HyperOptimizer(opt, **{"val_loss": val, "model": net} | still | settings)


def same(one, two):
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def differences(run, e=1e-5):
    """Central differences of run(scale) -> outer loss, natural, fourth order, around 1."""
    return (8 * (run(1 + e) - run(1 - e)) - (run(1 + 2 * e) - run(1 - 2 * e))) / (12 * e)


# -- accumulation and clipping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.2])
def test_accumulated_losses_are_one_step(clip):
    whole, parts, plain = mlp(), mlp(), mlp()
    make = lambda m: torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.01)
    one, two = (wrap(m, make(m), tune=("lr", "weight_decay"), clip_norm=clip) for m in (whole, parts))
    opt = make(plain)
    for t in range(6):
        total = one.step(loss_of(whole))
        losses = [F.cross_entropy(parts(X[i : i + 4]), Y[i : i + 4]) / 3 for i in (0, 4, 8)]
        got = [two.accumulate(loss) for loss in losses[:2]]
        if t % 2:
            got.append(two.accumulate(losses[2]))
            assert two.step() == pytest.approx(total, rel=1e-12)
        else:
            assert two.step(losses[2]) == pytest.approx(total, rel=1e-12)
        assert got == [loss.item() for loss in losses[: len(got)]]
        opt.zero_grad()
        loss_of(plain).backward()
        if clip:
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
        opt.step()
    same(whole, parts)
    same(whole, plain)
    np.testing.assert_allclose(two.hypergradient().grad, one.hypergradient().grad, rtol=1e-10)


def test_a_clipped_run_agrees_with_differences():
    def run(scale):
        model = mlp()
        opt = torch.optim.SGD(model.parameters(), lr=0.3 * scale, momentum=0.5)
        hopt = wrap(model, opt, tune=("lr",), clip_norm=0.2)
        for _ in range(6):
            hopt.step(loss_of(model))
        return hopt.hypergradient()

    want = differences(lambda scale: run(scale).value)
    np.testing.assert_allclose(run(1.0).grad[0], want, rtol=1e-8)


def test_a_sum_that_no_step_has_taken_is_not_saved(tmp_path):
    model = mlp()
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    hopt.accumulate(loss_of(model))
    bad(hopt.state_dict, "Call step")
    bad(lambda: hopt.save(tmp_path / "run.npz"), "Call step")
    hopt.step()
    hopt.state_dict()


def test_a_step_whose_val_loss_failed_is_settled_by_the_next_call_and_adds_nothing():
    def run(fails):
        model, broken = mlp(), [False]

        def val_loss():
            if broken[0]:
                raise OSError("no data")
            return loss_of(model, 0.5)

        hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",), val_loss=val_loss, window=2)
        hopt.step(loss_of(model))
        broken[0] = fails
        if fails:
            with pytest.raises(OSError, match="no data"):
                hopt.step(loss_of(model))
            broken[0] = False
            hopt.accumulate(loss_of(model))
        hopt.step(loss_of(model))
        assert hopt.tuner.used == 2
        hopt.step(loss_of(model))
        return hopt.tuner.inner.params

    assert np.array_equal(run(True), run(False))


def test_step_without_a_loss_needs_accumulated_ones():
    model = mlp()
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    bad(hopt.step, "needs a scalar loss")


# -- parameters that a step does not use -------------------------------------------------------------------------------


class Branches(nn.Module):
    """Layer i is used when asked for."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))

    def forward(self, x, used):
        return sum(self.parts[i](x) for i in used)


KINDS = {
    "SGD": {"lr": 0.1, "momentum": 0.8, "dampening": 0.1, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.01},
    "RMSprop": {"lr": 0.01, "alpha": 0.9, "momentum": 0.5, "eps": 1e-3, "weight_decay": 0.01},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1, "eps": 1e-3, "weight_decay": 0.01},
}
TURNS = [(0,), (0, 1), (0,), (1, 2), (0, 1, 2), (2,), (0, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_unused_in_a_step_are_skipped_as_torch_does(kind):
    def make():
        torch.manual_seed(2)
        model = Branches().to(WIDE)
        return model, getattr(torch.optim, kind)(model.parameters(), **KINDS[kind])

    (model, opt), (plain, theirs) = make(), make()
    train = lambda used: F.cross_entropy(model(X, used), Y)
    run = kt.inner(opt, train, lambda used: F.cross_entropy(model(X + 0.5, used), Y), tuple(KINDS[kind]), model=model)
    check = check_hypergradient(run, TURNS, (0, 1, 2))
    assert check.ok, str(check)
    for used in TURNS:
        run.step(run.space.phi0, used)
        theirs.zero_grad()
        F.cross_entropy(plain(X, used), Y).backward()
        theirs.step()
        same(model, plain)
        mine, real = opt.state_dict()["state"], theirs.state_dict()["state"]
        assert {i: set(s) for i, s in mine.items()} == {i: set(s) for i, s in real.items() if s}
        for i, slots in real.items():
            for name, value in slots.items():
                torch.testing.assert_close(mine[i][name], value, rtol=1e-10, atol=1e-14)


def test_accumulated_losses_use_what_any_of_them_uses():
    def run(apart):
        torch.manual_seed(2)
        model = Branches().to(WIDE)
        hopt = wrap(model, torch.optim.Adam(model.parameters(), lr=0.01), tune=("lr",), val_loss=lambda: val(model))
        for one, two in (((0,), (1,)), ((2,), (0,)), ((1,), (1, 2))):
            first, second = (F.cross_entropy(model(X, used), Y) for used in (one, two))
            if apart:
                hopt.accumulate(first)
            hopt.step(second if apart else first + second)
        return model, hopt.hypergradient().grad

    val = lambda model: F.cross_entropy(model(X + 0.5, (0, 1, 2)), Y)
    (whole, want), (parts, got) = run(False), run(True)
    same(whole, parts)
    np.testing.assert_allclose(got, want, rtol=1e-10)


def test_a_parameter_that_is_never_used_stays_without_state_or_tangent():
    model, idle = mlp(), nn.Parameter(torch.ones(2, dtype=WIDE))
    opt = torch.optim.AdamW([*model.parameters(), idle], lr=0.1, weight_decay=0.5)
    hopt = wrap(model, opt, tune=("lr", "weight_decay"), model=None)
    for _ in range(3):
        hopt.step(loss_of(model))
    assert torch.equal(idle.detach(), torch.ones(2, dtype=WIDE))
    assert idle not in opt.state
    assert not hopt.tuner.inner.tangents[:, -2:].any()


# -- layers ------------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.lstm(x[..., None])[0][:, -1])


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed((x * 3).long() % 7).mean(1))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 4, 2), nn.LayerNorm([4, 2])
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.norm(F.max_pool1d(F.relu(self.conv(x[:, None])), 2)).flatten(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x):
        z = self.embed((x * 3).long() % 7)[:, None]
        return self.out(F.scaled_dot_product_attention(z, z, z).mean((1, 2)))


LAYERS = {
    "batchnorm": lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
    "batchnorm, cumulative": lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 3)),
    "batchnorm, twice": lambda: nn.Sequential(nn.Linear(5, 5), *(nn.BatchNorm1d(5, affine=False),) * 2, nn.Linear(5, 3)),
    "batchnorm, in place": lambda: nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.SiLU(inplace=True), nn.Linear(6, 3)
    ),
    "groupnorm": lambda: nn.Sequential(nn.Linear(5, 6), nn.GroupNorm(2, 6), nn.GELU(), nn.Linear(6, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3)),
    "convolution": Convolutions,
    "lstm": Recurrent,
    "attention": Attention,
    "weight tying": Tied,
    "in place": lambda: nn.Sequential(nn.Linear(5, 6), nn.SiLU(inplace=True), nn.Linear(6, 3)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_agree_with_differences_and_move_as_torch_moves_them(layer):
    torch.manual_seed(3)
    model = LAYERS[layer]().to(WIDE)
    plain = copy.deepcopy(model)

    def losses(net):
        train = lambda shift: loss_of(net.train(), shift)
        return train, lambda shift: loss_of(net.eval(), shift)

    make = lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.8)
    run = kt.inner(make(model), *losses(model), ("lr", "momentum"), model=model)
    check = check_hypergradient(run, [0.0, 0.1] * 3, 0.5)
    assert check.ok, str(check)
    assert check.error.max() < 1e-7
    torch.manual_seed(5)
    for shift in (0.0, 0.1, 0.0):
        run.step(run.space.phi0, shift)
    torch.manual_seed(5)
    opt = make(plain)
    for shift in (0.0, 0.1, 0.0):
        opt.zero_grad()
        losses(plain)[0](shift).backward()
        opt.step()
    same(model, plain)  # running statistics too: moved once a step


@pytest.mark.parametrize(
    ("tuned", "said"), [(0, "torch says"), (2, "val_loss changed the input of a BatchNorm layer in place")]
)
def test_an_outer_loss_that_changes_what_its_batchnorm_has_used_is_refused(tuned, said):
    """By torch where the gradient passes the layer, else by us."""
    norm = nn.BatchNorm1d(5)
    model = nn.Sequential(nn.Linear(5, 5), norm, nn.Linear(5, 3)).to(WIDE)

    def val_loss():
        x = model.eval()[0](X)
        y = x.exp()
        out = norm(y)
        y.add_(1)
        return F.cross_entropy(model[2](out), Y)

    hopt = wrap(model, torch.optim.SGD(model[tuned].parameters(), lr=0.1), tune=("lr",), val_loss=val_loss)
    bad(lambda: (hopt.step(loss_of(model)), hopt.hypergradient()), said)


def test_a_batchnorm_that_evaluates_while_training_agrees_with_differences():
    """Statistics that have learnt, then are frozen: the inner loss depends on them too."""
    torch.manual_seed(3)
    model = LAYERS["batchnorm"]().to(WIDE)

    def train(frozen):
        model.train()
        model[1].train(not frozen)
        return loss_of(model)

    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
    run = kt.inner(opt, train, lambda _: loss_of(model.eval(), 0.5), ("lr", "momentum"), model=model)
    check = check_hypergradient(run, [False] * 3 + [True] * 4, None)
    assert check.ok, str(check)
    assert check.error.max() < 1e-7


def test_running_statistics_count_for_much_of_the_hypergradient():
    """What an adapter that takes them for constants gets wrong."""
    torch.manual_seed(3)
    model = LAYERS["batchnorm"]().to(WIDE)
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8), tune=("lr",))
    for _ in range(8):
        hopt.step(loss_of(model))
    right = hopt.hypergradient().grad
    hopt.tuner.inner.losses.statistics.forget(0)
    assert abs(hopt.hypergradient().grad / right - 1) > 0.05


class Own(nn.BatchNorm1d):
    """What BatchNorm does, in a class of its own."""

    def forward(self, x):
        return super().forward(x) * 1.0


@pytest.mark.parametrize("kind", ["hook before", "hook after", "class"])
def test_a_batchnorm_in_other_hands_agrees_with_differences(kind):
    torch.manual_seed(3)
    norm = Own(6) if kind == "class" else nn.BatchNorm1d(6)
    model = nn.Sequential(nn.Linear(5, 6), norm, nn.Tanh(), nn.Linear(6, 3)).to(WIDE)
    half = lambda layer, x, out: out * 0.5 if layer.training or kind == "hook after" else out * 1.0
    if kind == "hook before":
        norm.register_forward_hook(half)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
    losses = lambda shift: loss_of(model.train(), shift), lambda _: loss_of(model.eval(), 0.5)
    run = kt.inner(opt, *losses, ("lr", "momentum"), model=model)
    if kind == "hook after":
        norm.register_forward_hook(half)
    check = check_hypergradient(run, [0.0, 0.1] * 3, None)
    assert check.ok, str(check)
    assert check.error.max() < 1e-7


def test_a_batchnorm_that_evaluates_to_something_else_is_refused():
    norm = nn.BatchNorm1d(5)
    norm.register_forward_hook(lambda layer, x, out: out * 2)
    model = nn.Sequential(nn.Linear(5, 5), norm, nn.Linear(5, 3)).to(WIDE)
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    bad(lambda: (hopt.step(loss_of(model)), hopt.hypergradient()), "something else in evaluation than BatchNorm")


class Checkpointed(nn.Module):
    """A part whose activations are made again on the way back."""

    def __init__(self, norm, again=True):
        super().__init__()
        norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.part, self.out = nn.Sequential(nn.Linear(5, 6), norm, nn.Tanh(), nn.Dropout(0.2)), nn.Linear(6, 3)
        self.again = again

    def forward(self, x):
        return self.out(checkpointing.checkpoint(self.part, x, use_reentrant=False) if self.again else self.part(x))


def test_what_is_checkpointed_is_made_again_in_the_mode_it_was_made_in():
    found = []
    for again in (False, True):
        torch.manual_seed(3)
        model = Checkpointed(False, again).to(WIDE)
        hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8), tune=("lr", "momentum"))
        for _ in range(4):
            hopt.step(loss_of(model.train()))
        found.append(hopt.hypergradient().grad)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)


def test_a_batchnorm_that_is_checkpointed_is_refused_before_its_statistics_move_again():
    model = Checkpointed(True).to(WIDE)
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    bad(lambda: hopt.step(loss_of(model)), "runs again while tangents are made.*checkpoint")
    assert model.part[1].num_batches_tracked == 1


class Sigmoid(nn.BatchNorm1d):
    """What it normalises is not what it is given."""

    def forward(self, x):
        return super().forward(torch.sigmoid(x))


class Flat(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.flatten(0, 1)).reshape(x.shape)


def twin(a, b):
    """Two layers with one set of running statistics."""
    a.to(WIDE)
    b.running_mean, b.running_var = a.running_mean, a.running_var
    return nn.Sequential(nn.Linear(5, 6), a, b, nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 6), Sigmoid(6), nn.Linear(6, 3)), "something else in training than BatchNorm"),
        (
            lambda: nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (2, 3)), Flat(3), nn.Flatten(), nn.Linear(6, 3)),
            "something else in training than BatchNorm",
        ),
        (lambda: twin(nn.BatchNorm1d(6), nn.BatchNorm1d(6)), "share their running statistics"),
    ],
    ids=["another input", "another shape", "shared"],
)
def test_a_layer_that_is_no_batchnorm_is_refused(make, said):
    def steps():
        model = make().to(WIDE)
        hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
        for _ in range(2):
            hopt.step(loss_of(model))

    bad(steps, said)


@pytest.mark.parametrize("named", [False, True])
def test_statistics_that_move_under_no_grad_are_noticed_at_the_next_step(named):
    model = LAYERS["batchnorm"]().to(WIDE)
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    with torch.no_grad():
        model.train()(X)  # nothing has tangents yet
    hopt.step(loss_of(model.train()))
    with torch.no_grad():
        model.eval()(X)
        model.train()(X)
    bad(lambda: hopt.step((lambda: loss_of(model)) if named else loss_of(model)), "in training mode under no_grad")


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_batchnorm_that_evaluates_after_it_trained_in_a_step_is_refused(accumulated):
    model = LAYERS["batchnorm"]().to(WIDE)
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    hopt.step(loss_of(model.train()))
    trained = loss_of(model.train())
    loss_of(model.eval())  # of no account
    hopt.step(trained)
    first = loss_of(model.eval())  # on statistics of the steps before
    hopt.step(loss_of(model.train()) + first)
    one = loss_of(model.train())
    if accumulated:
        hopt.accumulate(one)
    late = loss_of(model.eval())
    bad(lambda: hopt.step(late if accumulated else one + late), "evaluates in a step after it has trained")


@pytest.mark.parametrize(
    "kind", ["input fixed for a while", "input fixed in a second call", "statistics off for a while", "by name"]
)
def test_batchnorm_in_unusual_use_agrees_with_differences(kind):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).to(WIDE)

    def train(late):
        model.train()
        model[1].track_running_stats = not (late and kind.startswith("statistics"))
        still = torch.cat((X, X[:, :1]), 1)
        z = still if late and kind == "input fixed for a while" else model[0](X)
        z = model[1](input=z) if kind == "by name" else model[1](z)
        if kind == "input fixed in a second call":
            model[1](still)
        return F.cross_entropy(model[2:](z), Y)

    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
    run = kt.inner(opt, train, lambda _: loss_of(model.eval(), 0.5), ("lr", "momentum"), model=model)
    check = check_hypergradient(run, [False] * 3 + [True] * 3, None)
    assert check.ok, str(check)
    assert check.error.max() < 1e-7


class Aside(nn.Module):
    """Statistics of a branch that the loss does not see, or that no tuned parameter moves, and that validation uses."""

    def __init__(self, fixed):
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)
        self.first.requires_grad_(not fixed)
        self.fixed = fixed

    def forward(self, x):
        x = self.first(x.clone().requires_grad_(self.fixed))
        aside = self.norm(x)
        return self.out(aside if not self.training or self.fixed else x.tanh())


@pytest.mark.parametrize("fixed", [False, True])
def test_running_statistics_of_what_the_loss_does_not_depend_on(fixed):
    torch.manual_seed(3)
    model = Aside(fixed).to(WIDE)

    def train(batch):
        return loss_of(model.train())

    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.8)
    run = kt.inner(opt, train, lambda _: loss_of(model.eval(), 0.5), ("lr", "momentum"), model=model)
    check = check_hypergradient(run, [None] * 5, None)
    assert check.ok, str(check)
    assert check.error.max() < 1e-7


def test_a_step_under_no_grad_is_the_same():
    def run(context):
        torch.manual_seed(3)
        model = LAYERS["batchnorm"]().to(WIDE)
        hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
        for _ in range(3):
            loss = loss_of(model)
            with context():
                hopt.step(loss)
        return hopt.hypergradient().grad

    assert run(torch.no_grad) == run(torch.enable_grad)


def test_an_optimizer_without_slots_keeps_no_state():
    model = mlp()
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    for _ in range(2):
        hopt.step(loss_of(model))
    assert hopt.opt.state_dict()["state"] == {}


def test_a_copy_of_the_model_is_a_model_of_its_own():
    model = LAYERS["batchnorm"]().to(WIDE)
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    loss = loss_of(model)
    twin = copy.deepcopy(model)
    loss_of(twin)
    hopt.step(loss)
    assert len(hopt.tuner.inner.losses.statistics.take()) == 0
    assert not torch.equal(twin[0].weight, model[0].weight)


@pytest.mark.parametrize("norm", ["", "norm", "own norm"])
def test_autocast_keeps_the_accuracy_of_its_type(norm):
    def run(dtype):
        torch.manual_seed(1)
        between = {"": nn.Tanh, "norm": nn.BatchNorm1d, "own norm": Own}[norm]
        model = nn.Sequential(nn.Linear(5, 16), between(16) if norm else between(), nn.Linear(16, 3))
        opt, x = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8), X.float()
        val = lambda: F.cross_entropy(model.eval()(x + 0.5), Y)
        hopt = wrap(model, opt, tune=("lr", "momentum"), val_loss=val)
        for _ in range(10):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = F.cross_entropy(model(x), Y)
            hopt.step(loss)
        return hopt.hypergradient().grad

    whole, half = run(torch.float32), run(torch.bfloat16)
    assert not np.array_equal(whole, half)
    assert np.linalg.norm(half - whole) < 0.05 * np.linalg.norm(whole)


# -- the way tangents are made -----------------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """`sin`, whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class Sine(nn.Module):
    def __init__(self, once):
        super().__init__()
        self.one, self.drop, self.two = nn.Linear(5, 6), nn.Dropout(0.2), nn.Linear(6, 3)
        self.sine = Once.apply if once else torch.sin

    def forward(self, x):
        return self.two(self.drop(self.sine(self.one(x))))


def follow(model, tune=("lr", "momentum"), function=True, steps=4, **settings):
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
    hopt = wrap(model, opt, tune=tune, **settings)
    for _ in range(steps):
        loss = lambda: (
            loss_of(model.train())
            + sum(h.sum() * (p**2).sum() for h, p in zip(hopt.hyper.values(), model.parameters(), strict=False))
        )
        hopt.step(loss if function else loss())
    return hopt


def test_central_differences_are_the_last_resort(caplog):
    torch.manual_seed(4)
    once, twice = Sine(True).to(WIDE), Sine(False).to(WIDE)
    twice.load_state_dict(once.state_dict())
    tune = {"lr": log, "momentum": logit, "l2": log(1e-2)}
    with caplog.at_level(logging.INFO, "koopman_hpo"):
        torch.manual_seed(9)
        a = follow(once, tune)
    told = [r.message for r in caplog.records if "central differences" in r.message]
    assert len(told) == 1
    assert "relative error about" in told[0]
    torch.manual_seed(9)
    b = follow(twice, tune)
    assert a.path.startswith("central differences")
    assert b.path == "batched double backward"
    same(once, twice)
    np.testing.assert_allclose(a.hypergradient().grad, b.hypergradient().grad, rtol=1e-8)


@pytest.mark.parametrize("tune", [("lr", "momentum"), {"lr": log, "l2": log(1e-2)}])
def test_the_error_of_central_differences_is_measured_where_tangents_are_not_zero(tune, caplog):
    with caplog.at_level(logging.INFO, "koopman_hpo"):
        torch.manual_seed(4)
        hopt = follow(Sine(True).to(WIDE), tune)
    (told,) = [r.message for r in caplog.records if "central differences" in r.message]
    assert 0 < float(told.split()[-1]) < 1e-6
    assert hopt.path.endswith(told.split()[-1])
    assert follow(Sine(True).to(WIDE), ("lr",), steps=1).path == "central differences"  # not measured yet


def test_attention_of_a_function_finds_its_kernel(caplog):
    torch.manual_seed(4)
    with caplog.at_level(logging.INFO, "koopman_hpo"):
        hopt = follow(Attention().to(WIDE))
    assert "double backward" in hopt.path
    assert any("MATH" in r.message for r in caplog.records)


def test_a_function_at_the_very_end_of_the_loss_is_found():
    """Its gradient has no graph at all: nothing would fail."""
    model = mlp()
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    bad(lambda: hopt.step(Once.apply(model(X)).sum()), "Once is marked once_differentiable")


def test_without_a_function_the_way_out_is_named():
    bad(
        lambda: follow(Sine(True).to(WIDE), function=False),
        "cannot be differentiated twice.*SDPBackend.MATH.*step\\(lambda",
    )
    bad(lambda: follow(Attention().to(WIDE), function=False), "cannot be differentiated twice.*SDPBackend.MATH")


@pytest.mark.parametrize("settings", [{"chunk": 1}, {"chunk": 2}])
def test_chunks_and_loops_give_the_same(settings, monkeypatch):
    whole = follow(mlp(), {"lr": log, "momentum": logit, "l2": log(1e-2)}).hypergradient().grad
    parts = follow(mlp(), {"lr": log, "momentum": logit, "l2": log(1e-2)}, **settings).hypergradient().grad
    np.testing.assert_allclose(parts, whole, rtol=1e-12)
    monkeypatch.setattr("koopman_hpo_adapters._torch_forward.RULES", {})
    parts = follow(mlp(), {"lr": log, "momentum": logit, "l2": log(1e-2)}, **settings).hypergradient().grad
    np.testing.assert_allclose(parts, whole, rtol=1e-12)
    monkeypatch.setattr("koopman_hpo_adapters._torch_graph._SMALL", 0)
    hopt = follow(mlp(), {"lr": log, "momentum": logit, "l2": log(1e-2)})
    assert hopt.path == "looped double backward"
    np.testing.assert_allclose(hopt.hypergradient().grad, whole, rtol=1e-12)


def test_random_directions_are_right_on_average():
    tune = {"lr": log, "momentum": logit, "l2": log([1e-2, 1e-2])}

    def run(**settings):
        model = LAYERS["batchnorm"]()
        return follow(model.to(WIDE), tune, **settings).hypergradient().grad

    torch.manual_seed(6)
    exact = run()
    mean = np.zeros(4)
    for seed in range(60):
        torch.manual_seed(6)
        mean += run(directions=2, seed=seed) / 60
    assert np.linalg.norm(mean - exact) < 0.35 * np.linalg.norm(exact)
    torch.manual_seed(6)
    np.testing.assert_allclose(run(directions=4), exact, rtol=1e-9)  # as many as there are: exact


# -- what can be tuned -------------------------------------------------------------------------------------------------


def two_groups(model, lr=(0.1, 0.3), **more):
    return torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": lr[0]}, {"params": model[2].parameters(), "lr": lr[1]}], **more
    )


def test_tune_takes_names_dicts_lists_and_spaces():
    box_of_lr = lambda value: box(value, 0.01, 2.0)

    def space(tune, opt=None):
        model = mlp()
        return wrap(model, opt(model) if opt else two_groups(model, momentum=0.9), tune=tune).tuner.inner.space

    assert space("lr")["lr"].value.tolist() == [0.1, 0.3]
    assert space(("lr", "momentum")).labels == ("lr[0]", "lr[1]", "momentum")
    assert space({"lr": box_of_lr, "momentum": None}).transforms == ("box(0.01, 2.0)",) * 2 + ("logit",)
    assert space({"momentum": [0, 1]}).labels == ("momentum[0]", "momentum[1]")
    assert space({"lr": log([0.1, 0.01], knots=(0, 9))}).labels == ("lr@0", "lr@9")
    per = space([{"lr": log(lr, bounds=(0.01, 1)), "momentum": logit} for lr in (0.2, 0.5)])
    assert per["lr"].value.tolist() == [0.2, 0.5]
    assert per["momentum"].value.tolist() == [0.9, 0.9]
    knots = space([{"lr": log([0.2, 0.1], knots=(0, 5))}, {"lr": log([0.5, 0.4], knots=(0, 5))}])
    assert knots["lr"].value.tolist() == [[0.2, 0.5], [0.1, 0.4]]
    decay = lambda lr, end=0: {"lr": log(lr, knots=(0, 5), factors=(1, end))}
    assert space([decay(0.2), decay(0.5)]).labels == ("lr[0]", "lr[1]")
    with pytest.raises(HyperparameterError, match="schedule"):
        space([decay(0.2), decay(0.5, 0.1)])
    adam = lambda model: torch.optim.Adam(model.parameters(), betas=(0.8, 0.95))
    betas = space({"betas": None}, adam)
    assert betas.names == ("beta1", "beta2")
    assert (betas["beta1"].value, betas["beta2"].value) == (0.8, 0.95)


@pytest.mark.parametrize(
    "tune",
    [
        {"lr": [0, 1], "momentum": None},
        {"lr": log([[0.1, 0.3], [0.2, 0.1]], knots=(0, 4))},
        {"lr": log([0.1, 0.3], knots=(0, 4), factors=(1, 0.5))},
    ],
)
def test_groups_and_schedules_agree_with_differences_and_show_in_param_groups(tune):
    model = mlp()
    opt = two_groups(model, momentum=0.9)
    run = kt.inner(opt, lambda _: loss_of(model), lambda _: loss_of(model, 0.5), tune, model=model)
    check = check_hypergradient(run, [None] * 6, None)
    assert check.ok, str(check)
    for _ in range(2):
        run.step(run.space.phi0, None)
    shown = [group["lr"] for group in opt.param_groups]
    constant, forms = "momentum" in tune, getattr(tune["lr"], "factors", None)
    np.testing.assert_allclose(shown, [0.1, 0.3] if constant else [0.075, 0.225] if forms else [0.15, 0.2], rtol=1e-12)


def test_tensors_of_the_loss_agree_with_differences():
    """Per-example weights, a regulariser and an augmentation's strength, as the user's own tensors."""
    model = mlp()
    weights = torch.full((12,), 0.7, dtype=WIDE)
    l2 = nn.Parameter(torch.tensor(1e-2, dtype=WIDE))
    strength = torch.tensor(0.3, dtype=WIDE)
    noise = data(seed=8)[0]

    def train(_):
        each = F.cross_entropy(model(X + strength * noise), Y, reduction="none")
        return (weights * each).mean() + l2 * sum((p**2).sum() for p in model.parameters())

    opt = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-3)
    tune = {
        "lr": log,
        "weights": (weights, logit),
        "l2": l2,
        "strength": (strength, lambda value: identity(value, bounds=(-9, 9))),
    }
    run = kt.inner(opt, train, lambda _: loss_of(model, 0.5), tune)
    assert run.space.transforms == ("log", *["logit"] * 12, "log", "identity")
    check = check_hypergradient(run, [None] * 5, None)
    assert check.ok, str(check)
    assert np.abs(check.forward).min() > 0
    hopt = HyperOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), tune=tune, val_loss=lambda: loss_of(model, 0.5), steps=10, window=5
    )
    assert hopt.hyper["l2"] is l2
    for _ in range(5):
        hopt.step(train(None))
    assert l2.item() == hopt.tuner.hyper["l2"] != 1e-2
    np.testing.assert_array_equal(weights.detach(), hopt.tuner.hyper["weights"])


def test_a_hyperparameter_of_the_outer_loss_counts_directly():
    model, c = mlp(), torch.tensor(0.5, dtype=WIDE)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    val = lambda _: loss_of(model, 0.5) + c**2
    run = kt.inner(opt, lambda _: c * loss_of(model), val, {"lr": log, "c": c})
    check = check_hypergradient(run, [None] * 4, None)
    assert check.ok, str(check)


def test_the_hypergradient_now_is_of_the_last_steps_hyperparameters():
    model, c = mlp(), torch.tensor(0.5, dtype=WIDE)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"steps": 4, "window": 1, "strategy": Local(), "outer": outer.sgd(0.1), "guard": None}
    hopt = HyperOptimizer(opt, tune={"lr": log, "c": c}, val_loss=lambda: loss_of(model, 0.5) + c**2, **settings)
    hopt.step(loss_of(model))
    moved, loss = c.item(), loss_of(model) * (1 + c)
    assert moved != 0.5
    assert hopt.hypergradient().natural["c"] == pytest.approx(1.0, rel=1e-14)
    assert c.item() == moved == hopt.tuner.hyper["c"]
    hopt.step(loss)


def test_tune_says_what_is_wrong():
    model = mlp()
    make = lambda tune, opt=None: wrap(model, opt or two_groups(mlp(), momentum=0.9), tune=tune, model=None)
    l2 = torch.tensor(1e-2)
    bad(lambda: make(3), "must be a Space, names")
    bad(lambda: make({}), "tune is empty")
    bad(lambda: make({"lr": [0]}), "all of the param groups' indices \\[0, 1\\]")
    bad(lambda: make({"lr": 0.1}), "must be log, logit")
    bad(lambda: make({"l2": None}), "tune names 'l2'")
    bad(lambda: make({"momentun": logit(0.9)}), "Did you mean 'momentum'")
    bad(lambda: make(Space(beta1=logit(0.9))), "sgd has")
    bad(lambda: make([{"lr": log}]), "one dict for each of 2")
    bad(lambda: make([{"lr": log}, {"momentum": logit}]), "all with the same names")
    bad(lambda: make([{"lr": log(0.1)}, {"lr": identity(0.1, bounds=(0.01, 1))}]), "of one transform")
    bad(lambda: make({"lr": l2}), "belongs to sgd")
    bad(lambda: make({"l2": (l2 * 1).requires_grad_() * 2}), "leaf tensor")
    bad(lambda: make({"l2": torch.ones(2, 2)}), "one dimension")
    p = next(model.parameters())
    bad(lambda: make({"l2": p}, torch.optim.SGD([p], lr=0.1)), "leaf tensor of floats|trained by the optimizer")
    bad(lambda: make({"weight_decay": None}), "small positive value")
    bad(lambda: make({"lr": log(0.1), "x": (torch.tensor(0.0), log)}), "no coordinate")


# -- exact tools -------------------------------------------------------------------------------------------------------


def test_linearise_agrees_with_differences_and_moves_nothing():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 3)).to(WIDE)
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune={"lr": log, "l2": log(0.1)})
    train = lambda: loss_of(model.train()) + hopt.hyper["l2"] * sum((p**2).sum() for p in model.parameters())
    for _ in range(3):
        hopt.step(train())
    before = {k: v for k, v in hopt.state_dict().items() if k != "meta"}
    theta, V = hopt.tuner.inner.params, np.random.default_rng(0).normal(size=(2, hopt.tuner.inner.params.size))
    lin = hopt.linearise(train)

    def moved(direction, loss):
        random, buffers = torch.get_rng_state(), copy.deepcopy(dict(model.named_buffers()))
        nn.utils.vector_to_parameters(torch.tensor(theta + direction), model.parameters())
        g = torch.autograd.grad(loss(), list(model.parameters()))
        nn.utils.vector_to_parameters(torch.tensor(theta), model.parameters())
        torch.set_rng_state(random)
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
        return nn.utils.parameters_to_vector(g).numpy()

    val = lambda: loss_of(model.eval(), 0.5)
    one, again = lin.hvp(V), lin.hvp(V[:1])
    np.testing.assert_allclose(again, one[:1], rtol=1e-12)
    got_outer = lin.outer_hvp(V)
    after = {k: v for k, v in hopt.state_dict().items() if k != "meta"}
    assert all(np.array_equal(before[k], after[k]) for k in before)
    e = 1e-5
    np.testing.assert_allclose(lin.gradient, moved(0 * V[0], train), rtol=1e-12)
    np.testing.assert_allclose(lin.outer_gradient, moved(0 * V[0], val), rtol=1e-12)
    for found, loss in ((one, train), (got_outer, val)):
        want = np.stack([(moved(e * v, loss) - moved(-e * v, loss)) / (2 * e) for v in V])
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-8)


def test_looking_elsewhere_leaves_no_trace_in_what_follows():
    def run(look):
        torch.manual_seed(3)
        model = LAYERS["batchnorm"]().to(WIDE)
        hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
        for _ in range(4):
            loss = loss_of(model)
            if look:
                lin = hopt.linearise(lambda: loss_of(model.train(), 0.3))
                lin.hvp(np.ones((1, lin.gradient.size)))
                lin.outer_hvp(np.ones((1, lin.gradient.size)))
            hopt.step(loss)
        return hopt.hypergradient().grad

    assert run(False) == run(True)


def test_linearise_takes_a_graph_and_goes_on():
    model = mlp()
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    V = np.eye(hopt.tuner.inner.params.size)[:3]
    loss = loss_of(model)
    lin = hopt.linearise(loss)
    np.testing.assert_array_equal(lin.hvp(V), hopt.linearise(lambda: loss_of(model)).hvp(V))
    hopt.step(loss)
    bad(lambda: lin.hvp(V), "as a function")


def test_restart_mode_and_the_exact_tools_through_inner():
    torch.manual_seed(0)
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = kt.inner(opt, lambda b: F.cross_entropy(model(b[0]), b[1]), lambda b: F.cross_entropy(model(b[0]), b[1]), "lr")
    result = Tuner(run, Local(), steps=30, runs=6, mode="restart").fit([(X, Y)], [(X + 0.1, Y)])
    assert result.hyper["lr"] > 5e-3
    assert opt.param_groups[0]["lr"] == result.hyper["lr"]
    np.testing.assert_array_equal(nn.utils.parameters_to_vector(model.parameters()).detach(), result.params)
    bad(lambda: wrap(mlp(), torch.optim.SGD(mlp().parameters(), lr=0.1), tune="lr", mode="restart"), "torch.inner")


class Stalling(Global):
    """Asks for a learning rate that trains nothing: the first run stays the best."""

    def estimate(self, H, ahead):
        return dataclasses.replace(super().estimate(H, ahead), value=np.full(H.shape[1], 1.0))


def test_in_mode_restart_the_model_is_left_at_the_best_run_with_its_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    loss = lambda b: F.cross_entropy(model.train()(b[0]), b[1])
    val_loss = lambda b: F.cross_entropy(model.eval()(b[0]), b[1])
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    run = kt.inner(opt, loss, val_loss, "lr", model=model)
    settings = {"steps": 30, "runs": 2, "mode": "restart", "outer": outer.sgd(4.0)}
    batch, val = [(X.double(), Y)], (X.double() + 0.1, Y)
    tuner = Tuner(run, Stalling(), **settings)
    result = tuner.fit(batch, [val])
    assert result.hyper["lr"] == pytest.approx(0.1)
    assert tuner.history.value[1] > tuner.history.value[0] + 0.01
    np.testing.assert_array_equal(nn.utils.parameters_to_vector(model.parameters()).detach(), result.params)
    assert float(val_loss(val).detach()) == pytest.approx(result.value, rel=1e-12)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1)
    kept = tuner.snapshot()
    run.restore(run.snapshot() | {f"buffer/1.{n}": np.zeros(8) for n in ("running_mean", "running_var")})
    tuner.restore(kept)
    assert float(val_loss(val).detach()) == pytest.approx(result.value, rel=1e-12)
    for name, b in tuner.result.best.buffers.items():
        np.testing.assert_array_equal(b, dict(model.named_buffers())[name.removeprefix("buffer/")])
    bad(lambda: tuner.restore({k: v for k, v in kept.items() if "best/buffers/" not in k}), "best/buffers")


# -- state -------------------------------------------------------------------------------------------------------------


def build(seed=5, steps=20, **settings):
    torch.manual_seed(seed)
    layers = (nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
    model, rng = nn.Sequential(*layers).to(WIDE), torch.Generator().manual_seed(seed)
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    val = lambda: loss_of(model.eval(), 0.5)
    tune = {"lr": log, "betas": None, "noise": identity(0.1)}
    hopt = HyperOptimizer(opt, tune=tune, val_loss=val, steps=steps, window=5, model=model, generators=[rng], **settings)

    def step():
        noise = torch.randn(X.shape, generator=rng, dtype=WIDE)
        return hopt.step(F.cross_entropy(model(X + hopt.hyper["noise"] * noise), Y))

    return model, hopt, step


@pytest.mark.parametrize("way", ["file", "dict"])
def test_a_saved_run_goes_on_bit_for_bit(tmp_path, way):
    model, hopt, step = build()
    for _ in range(7):
        step()
    state = hopt.save(tmp_path / "run.npz") if way == "file" else copy.deepcopy(hopt.state_dict())
    losses = [step() for _ in range(16)]
    again, other, step = build(seed=6)
    (other.load if way == "file" else other.load_state_dict)(state)
    assert [step() for _ in range(16)] == losses
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    mine, theirs = hopt.opt.state_dict(), other.opt.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert all(torch.equal(s[n], theirs["state"][i][n]) for i, s in mine["state"].items() for n in s)
    assert other.tuner.done
    assert np.array_equal(hopt.tuner.history.trajectory, other.tuner.history.trajectory)


def test_a_foreign_state_is_refused_and_nothing_moves(tmp_path):
    _, hopt, step = build()
    step()
    path, before = hopt.save(tmp_path / "run.npz"), hopt.state_dict()
    model = mlp()
    other = HyperOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.1),
        tune={"lr": log, "betas": None, "noise": identity(0.1)},
        val_loss=lambda: loss_of(model),
        steps=20,
        window=5,
    )
    kept = other.state_dict()
    bad(lambda: other.load(path), "when it was saved")
    assert all(np.array_equal(kept[k], v) for k, v in other.state_dict().items() if k != "meta")
    bad(lambda: hopt.load_state_dict(before | {"inner/statistics/0": np.zeros(3)}), "statistics/0")
    with pytest.raises(CheckpointError):
        build(steps=30)[1].load_state_dict(before)


def test_a_tuner_restored_from_outside_is_noticed(tmp_path):
    _, hopt, step = build()
    for _ in range(5):
        step()
    path = hopt.save(tmp_path / "run.npz")
    _, other, step = build()
    checkpoint.load(path, other.tuner)
    bad(step, "HyperOptimizer.load")


def test_divergence_takes_everything_back():
    model, hopt, step = build()
    for _ in range(5):
        step()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    step()
    hopt.step(loss_of(model) * float("nan"))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not hopt.tuner.inner.losses.statistics.tangents[0].any()
    step()
    assert np.isfinite(hopt.hypergradient().grad).all()


def test_tuning_in_the_loop_is_the_tuner_on_the_core():
    """The same run by `inner` and `Tuner.fit`, with a guard that acts."""
    one, two = mlp(), mlp()
    settings = {"steps": 60, "window": 10, "guard": Guard()}
    hopt = HyperOptimizer(
        torch.optim.SGD(one.parameters(), lr=0.2, momentum=0.9),
        tune=("lr", "momentum"),
        val_loss=lambda: loss_of(one, 0.1),
        **settings,
    )
    while not hopt.tuner.done:
        hopt.step(loss_of(one))
    opt = torch.optim.SGD(two.parameters(), lr=0.2, momentum=0.9)
    run = kt.inner(opt, lambda _: loss_of(two), lambda _: loss_of(two, 0.1), ("lr", "momentum"))
    result = Tuner(run, **settings).fit([None], [None])
    same(one, two)
    assert np.array_equal(result.phi, hopt.tuner.phi)


# -- bad input ---------------------------------------------------------------------------------------------------------


def bad(make, match):
    with pytest.raises(KoopmanHPOError, match=match):
        make()


@pytest.mark.parametrize("divided", [False, True])
def test_a_scaled_loss_is_refused(divided):
    model = mlp()
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    scaler = torch.amp.GradScaler("cpu")
    bad(lambda: hopt.step(scaler.scale(loss_of(model)) / (2 if divided else 1)), "GradScaler")
    weight = torch.tensor(3.0)
    for _ in range(2):
        hopt.step(loss_of(model) * weight)
    off = torch.amp.GradScaler("cpu", enabled=False)
    hopt.step(off.scale(loss_of(model)))


def test_what_was_done_behind_its_back_is_refused_before_anything_moves():
    def case(act, match, kind=torch.optim.SGD):
        model = mlp()
        hopt = wrap(model, kind(model.parameters(), lr=0.1), tune=("lr",))
        hopt.step(loss_of(model))
        before = hopt.tuner.inner.params
        bad(lambda: act(model, hopt), match)
        assert np.array_equal(hopt.tuner.inner.params, before) or match == "written to in place"
        assert hopt.tuner.used == 1

    def backward(model, hopt):
        loss = loss_of(model)
        loss.backward(retain_graph=True)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        hopt.step(loss)

    def backward_without_grad(model, hopt):
        loss = loss_of(model)
        loss.backward()
        hopt.opt.zero_grad()
        hopt.step(loss)

    def load(model, hopt):
        model.load_state_dict(mlp(7).state_dict())
        hopt.step(loss_of(model))

    def hook(model, hopt):
        model[0].weight.register_hook(lambda g: g.clamp(-1, 1))
        hopt.step(loss_of(model))

    def freeze(model, hopt):
        model[0].weight.requires_grad_(False)
        hopt.step(loss_of(model))

    def thaw(model, hopt):
        p = nn.Parameter(torch.ones(3, dtype=WIDE), requires_grad=False)
        opt = torch.optim.SGD([*mlp().parameters(), p], lr=0.1)
        other = wrap(model, opt, tune=("lr",), model=None)
        p.requires_grad_()
        other.step(loss_of(model))

    def replaced(model, hopt):
        model[2] = nn.Linear(6, 3).to(WIDE)
        hopt.step(loss_of(model))

    def cast(model, hopt):
        model.float()
        hopt.step(F.cross_entropy(model(X.float()), Y))

    def group(model, hopt):
        extra = nn.Parameter(torch.ones((), dtype=WIDE))
        hopt.opt.add_param_group({"params": [extra]})
        hopt.step(loss_of(model) * extra)

    def scheduler(model, hopt):
        hopt.opt.param_groups[0]["lr"] *= 0.5
        hopt.step(loss_of(model))

    def state(model, hopt):
        hopt.opt.load_state_dict(hopt.opt.state_dict())
        hopt.step(loss_of(model))

    def vector(model, hopt):
        hopt.step(F.cross_entropy(model(X), Y, reduction="none"))

    def number(model, hopt):
        hopt.step(loss_of(model).item())

    def in_place(model, hopt):
        z = model[0](X).exp()
        y = z.sin()
        z.mul_(2)
        hopt.step(F.cross_entropy(model[2](y), Y))

    def elsewhere(model, hopt):
        hopt.step(loss_of(mlp()))

    case(backward, "accumulate\\(loss\\).*clip_norm=")
    case(backward_without_grad, "used already")
    case(load, "written to in place")
    case(hook, "gradient hooks")
    case(freeze, "moved, cast, replaced or frozen")
    case(thaw, "was frozen when it was wrapped")
    case(replaced, "other parameters than when it was wrapped")
    case(cast, "moved, cast, replaced or frozen")
    case(group, "knots")
    case(scheduler, "knots")
    case(state, "state was replaced", torch.optim.Adam)
    case(vector, "needs a scalar loss")
    case(number, "needs a scalar loss")
    case(in_place, "in-place operation of the model")
    model = mlp()
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    first, stale = loss_of(model), loss_of(model)
    hopt.step(first)
    bad(lambda: hopt.step(stale), "compute the\\s+loss anew")


def test_a_model_that_grew_is_noticed():
    model = mlp()
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    model.add_module("more", nn.Linear(3, 3).to(WIDE))
    bad(lambda: hopt.step(loss_of(model)), "other parameters than when it was wrapped")


def test_wrapping_says_what_is_wrong_and_moves_nothing():
    model = mlp()
    sgd = lambda **more: torch.optim.SGD(model.parameters(), lr=0.1, **more)
    pointer = model[0].weight.data_ptr()
    used = sgd(momentum=0.9)
    loss_of(model).backward()
    used.step()
    used.zero_grad()
    make = lambda opt, **more: wrap(model, opt, **{"tune": ("lr",)} | more)
    bad(lambda: make(used), "taken steps already")
    bad(lambda: make(torch.optim.Rprop(model.parameters())), "Use torch's SGD")
    bad(lambda: make(torch.optim.Adam(model.parameters(), amsgrad=True)), "amsgrad=True")
    bad(lambda: make(sgd(), val_loss=3), "val_loss must be a function")
    bad(lambda: make(sgd(), model=3), "torch.nn.Module")
    bad(lambda: make(sgd(), model=mlp()), "trains no parameter of the model")
    bad(lambda: make(sgd(), clip_norm=-1.0), "clip_norm")
    bad(lambda: make(sgd(), generators=[3]), "torch.Generators")
    bad(
        lambda: make(torch.optim.SGD([torch.ones(2, dtype=torch.float16, requires_grad=True)], lr=1.0), model=None),
        "float16",
    )
    bad(lambda: make(torch.optim.SGD([torch.ones(2)], lr=1.0), model=None), "requires a gradient")
    norm = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True, affine=True)).to(WIDE)
    bad(lambda: make(torch.optim.SGD(norm.parameters(), lr=1.0), model=norm), "InstanceNorm")
    assert model[0].weight.data_ptr() == pointer


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("layer", [nn.Dropout(0.2), nn.BatchNorm1d(6)])
def test_val_loss_must_evaluate(layer, known):
    model = nn.Sequential(nn.Linear(5, 6), copy.deepcopy(layer), nn.Linear(6, 3)).to(WIDE)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    hopt = wrap(model, opt, tune=("lr",), model=model if known else None, val_loss=lambda: loss_of(model, 0.5))
    before = hopt.tuner.inner.params
    bad(lambda: hopt.step(loss_of(model)), f"{type(layer).__name__} in training mode")
    assert np.array_equal(hopt.tuner.inner.params, before)


def test_val_loss_must_leave_buffers_alone():
    model = mlp()
    model.register_buffer("seen", torch.zeros(()))

    def val_loss():
        model.seen += 1
        return loss_of(model, 0.5)

    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",), val_loss=val_loss)
    before = hopt.tuner.inner.params
    bad(lambda: hopt.step(loss_of(model)), "changed the model's buffers")
    assert np.array_equal(hopt.tuner.inner.params, before)


def test_val_loss_may_leave_the_model_evaluating():
    model = LAYERS["dropout"]().to(WIDE)
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    hopt.step(loss_of(model))
    assert all(module.training for module in model.modules())


def test_running_statistics_of_a_model_not_given_are_refused():
    model = LAYERS["batchnorm"]().to(WIDE)
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",), model=None)
    bad(lambda: hopt.step(loss_of(model)), "Pass model=")


def test_a_run_cannot_be_copied_away_from_its_model():
    model = nn.Linear(5, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    hopt = HyperOptimizer(opt, tune="lr", val_loss=lambda: model(torch.ones(1, 5)).sum(), steps=50)
    with pytest.raises(KoopmanHPOError, match="load_state_dict"):
        copy.deepcopy(hopt)


class Scaled(nn.Module):
    """A linear model times a parameter of no dimensions."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(5, 3), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.scale * self.linear(x)


def test_a_parameter_of_no_dimensions_agrees_with_differences():
    def run(scale):
        torch.manual_seed(1)
        model = Scaled().to(WIDE)
        hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1 * scale, momentum=0.5), tune=("lr",))
        for _ in range(4):
            hopt.step(loss_of(model))
        return hopt.hypergradient()

    np.testing.assert_allclose(run(1.0).grad[0], differences(lambda scale: run(scale).value), rtol=1e-8)


def test_a_loss_that_is_a_leaf_or_complex_is_refused():
    model = Scaled().to(WIDE)
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    before = hopt.tuner.inner.params
    bad(lambda: hopt.step(model.scale), "HyperOptimizer.step: needs a scalar loss.*without a graph")
    bad(lambda: hopt.step(lambda: model.scale), "HyperOptimizer.step: needs a scalar loss.*without a graph")
    bad(lambda: hopt.accumulate(model.scale), "HyperOptimizer.accumulate: needs a scalar loss.*without a graph")
    bad(lambda: hopt.step(loss_of(model).to(torch.complex128)), "needs a scalar loss.*complex128")
    assert np.array_equal(hopt.tuner.inner.params, before)


def test_a_state_is_of_one_clip_norm():
    def build(**settings):
        model = mlp()
        hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",), **settings)
        hopt.step(loss_of(model))
        return hopt

    state = build(clip_norm=1.0).state_dict()
    build(clip_norm=1.0).load_state_dict(state)
    for other in ({}, {"clip_norm": 2.0}):
        with pytest.raises(CheckpointError, match="clip_norm"):
            build(**other).load_state_dict(state)


def test_a_loss_of_another_model_is_refused():
    model, other = mlp(), mlp(2)
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5), tune=("lr",))
    hopt.step(loss_of(model))
    before = hopt.tuner.inner.params
    bad(lambda: hopt.step(loss_of(other)), "HyperOptimizer.step: the loss depends on no parameter")
    bad(lambda: hopt.step(lambda: loss_of(other)), "HyperOptimizer.step: the loss depends on no parameter")
    assert np.array_equal(hopt.tuner.inner.params, before)
    assert hopt.tuner.used == 1
    hopt.accumulate(loss_of(other))
    hopt.step(loss_of(model))  # the sum depends on them


def test_a_scaled_loss_of_a_function_and_a_mean_of_scaled_losses_are_refused():
    model = mlp()
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    scaler = torch.amp.GradScaler("cpu")
    each = lambda: F.cross_entropy(model(X), Y, reduction="none")
    before = hopt.tuner.inner.params
    bad(lambda: hopt.step(lambda: scaler.scale(loss_of(model))), "GradScaler")
    bad(lambda: hopt.accumulate(lambda: scaler.scale(loss_of(model))), "GradScaler")
    for reduce in (torch.mean, torch.sum, lambda t: t.mean(0), lambda t: t.sum(0) / 12):
        bad(lambda reduce=reduce: hopt.step(reduce(scaler.scale(each()))), "GradScaler")
    assert np.array_equal(hopt.tuner.inner.params, before)
    loss = loss_of(model) * torch.tensor(2.0)
    loss.backward()
    model.zero_grad()
    bad(lambda: hopt.step(loss), "used already")
    hopt.step(lambda: each().mean())


@pytest.mark.parametrize("through", [lambda w: w, lambda w: w.data])
def test_a_loss_hyperparameter_written_to_is_noticed(through):
    model, weights = mlp(), torch.ones(3, dtype=WIDE)
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune={"lr": log, "weights": weights})
    loss = lambda: weights[Y] @ F.cross_entropy(model(X), Y, reduction="none")
    for _ in range(2):
        hopt.step(loss())
    with torch.no_grad():
        through(weights).fill_(5.0)
    before = hopt.tuner.inner.params
    for call in (hopt.step, hopt.accumulate):
        bad(lambda call=call: call(loss()), "the tensor of weights was written to")
    assert np.array_equal(hopt.tuner.inner.params, before)
    hopt.load_state_dict(hopt.state_dict())
    assert weights.tolist() == [1.0, 1.0, 1.0]
    hopt.step(loss())


class Drops(nn.Module):
    """A layer that draws random numbers in training, on six features."""

    def __init__(self, kind):
        super().__init__()
        made = {
            "attention": lambda: nn.MultiheadAttention(6, 2, dropout=0.2, batch_first=True),
            "lstm": lambda: nn.LSTM(6, 6, 2, dropout=0.2, batch_first=True),
            "gru": lambda: nn.GRU(6, 6, 2, dropout=0.2, batch_first=True),
            "rrelu": nn.RReLU,
            "dropout": lambda: nn.Dropout(0.2),
        }
        self.one, self.layer, self.two = nn.Linear(5, 6), made[kind](), nn.Linear(6, 3)

    def forward(self, x):
        x = self.one(x)
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.two(self.layer(x[:, None], x[:, None], x[:, None])[0][:, 0])
        if isinstance(self.layer, nn.RNNBase):
            return self.two(self.layer(x[:, None])[0][:, 0])
        return self.two(self.layer(x))


@pytest.mark.parametrize("kind", ["attention", "lstm", "gru", "rrelu", "dropout"])
def test_val_loss_must_evaluate_whatever_draws_random_numbers(kind):
    model = Drops(kind).to(WIDE)
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",), val_loss=lambda: loss_of(model, 0.5))
    before = hopt.tuner.inner.params
    bad(lambda: hopt.step(loss_of(model)), f"val_loss runs {type(model.layer).__name__} in training mode")
    assert np.array_equal(hopt.tuner.inner.params, before)
    model.eval()
    with sdpa_kernel(SDPBackend.MATH):
        hopt.step(loss_of(model))


@pytest.mark.parametrize("kind", ["attention", "lstm", "rrelu", "dropout"])
def test_a_model_not_given_that_val_loss_leaves_evaluating_is_warned_of_once(kind):
    def run(leaves, **settings):
        model = Drops(kind).to(WIDE)

        def val_loss():
            loss = loss_of(model.eval(), 0.5)
            model.train(not leaves)
            return loss

        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        hopt = wrap(model, opt, tune=("lr",), val_loss=val_loss, window=2, **settings)
        with sdpa_kernel(SDPBackend.MATH):
            for _ in range(6):
                hopt.step(loss_of(model))

    with pytest.warns(UserWarning, match="leaves .* in evaluation mode.*Pass model=.*model.train") as told:
        run(True, model=None)
    assert len(told) == 1
    run(False, model=None)  # warnings are errors here
    run(True)


def test_bounds_are_the_same_in_all_param_groups():
    make = lambda *each: wrap(m := mlp(), two_groups(m), tune=[{"lr": h} for h in each]).tuner.inner.space["lr"]
    said = r"lr must have the same bounds in all param groups, got \[\(1e-10, 10000.0\), \(0.001, 1.0\)\]"
    bad(lambda: make(log(0.1), log(0.3, bounds=(1e-3, 1.0))), said)
    bad(lambda: make(log(0.1, bounds=(0.1, 1.0)), log(0.3, bounds=(0.1, 2.0))), "same bounds")
    assert make(log(0.1, bounds=(1e-3, 1.0)), log(0.3, bounds=(1e-3, 1.0))).bounds == (1e-3, 1.0)
    assert make(log(1e-12), log(0.3)).bounds == (1e-12, 1e4)  # the default ones, widened to admit the starts


def test_wrong_inputs_are_refused_in_words():
    model, weights = mlp(), torch.ones(3, dtype=WIDE)
    make = lambda opt=None, **more: wrap(
        model, opt or torch.optim.SGD(model.parameters(), lr=0.1), **{"tune": ("lr",)} | more
    )
    loss = lambda batch: loss_of(model)
    said = "the first argument must be a torch.optim.Optimizer, got Sequential. Make one"
    bad(lambda: make(model), f"HyperOptimizer: {said}")
    bad(lambda: kt.inner(model, loss, loss, ("lr",)), f"inner: {said}")
    for chunk in (-1, 1.5, "a", 0):
        bad(lambda chunk=chunk: make(chunk=chunk), f"HyperOptimizer: chunk must be .*got {chunk!r}")
    for given in (5, torch.Generator(), None):
        bad(lambda given=given: make(generators=given), "HyperOptimizer: generators must be a list of .*, got")
    bad(lambda: make(tune={"lr": log, "w": (weights, "log")}), r"tune\['w'\] must be .*got 'log' for a transform")
    assert not weights.requires_grad
    make(chunk=2, generators=[torch.Generator()], tune={"lr": log, "w": (weights, log)})


@pytest.mark.parametrize("kind", ["SGD", "Adam", "RMSprop", "Adagrad"])
def test_after_tuning_the_optimizer_itself_trains_on_under_a_scheduler(kind):
    model, plain = mlp(), mlp()
    more = {"momentum": 0.9} if kind == "SGD" else {}
    opt, other = (getattr(torch.optim, kind)(m.parameters(), lr=0.01, **more) for m in (model, plain))
    hopt = wrap(model, opt, tune=("lr",), steps=3, window=3)
    for _ in range(4):
        hopt.step(loss_of(model))
    assert hopt.tuner.done
    plain.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for o in (opt, other):
        o.param_groups[0]["lr"] *= 0.5
    bad(lambda: hopt.step(loss_of(model)), r"tuning, which is over.*opt.zero_grad\(\), loss.backward\(\), opt.step\(\)")
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (opt, other)]
    for _ in range(3):
        for net, o, scheduler in zip((model, plain), (opt, other), schedulers, strict=True):
            o.zero_grad()
            loss_of(net).backward()
            o.step()
            scheduler.step()
    same(model, plain)
    assert opt.param_groups[0]["lr"] == other.param_groups[0]["lr"] < 0.002


@pytest.mark.parametrize("detached", [False, True])
def test_what_the_training_loss_detaches_is_a_constant_and_the_check_shows_it(detached):
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)

    def train_loss(batch):
        losses = F.cross_entropy(model(X), Y, reduction="none")
        weights = losses.softmax(0)
        return (weights.detach() if detached else weights) @ losses

    run = kt.inner(opt, train_loss, lambda batch: loss_of(model, 0.5), ("lr", "momentum"))
    assert check_hypergradient(run, [None] * 10, None).ok is not detached


def test_what_was_accumulated_is_shown_as_a_gradient_that_nobody_writes_to():
    model, plain = mlp(), mlp()
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    before = hopt.tuner.inner.params
    for shift in (0.0, 0.3):
        hopt.accumulate(loss_of(model, shift))
        loss_of(plain, shift).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    assert nn.utils.clip_grad_norm_(model.parameters(), np.inf) > 0  # looks at the norm, and writes the same values
    hopt.accumulate(loss_of(model))
    loss_of(plain).backward()
    said = "the gradient that accumulate shows .* was written to.*clip_norm=.*set .grad to None"
    clip = lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    through = lambda: model[0].weight.grad.data.mul_(0.5)
    for write in (through, clip, lambda: loss_of(model).backward()):
        write()
        bad(hopt.step, said)
        bad(lambda: hopt.accumulate(loss_of(model)), said)
    assert np.array_equal(hopt.tuner.inner.params, before)
    hopt.opt.zero_grad()
    hopt.step()  # the sum as it was
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    same(model, plain)
    assert all(p.grad is None for p in model.parameters())
    state = hopt.state_dict()
    hopt.accumulate(loss_of(model))
    hopt.load_state_dict(state)
    assert all(p.grad is None for p in model.parameters())
    hopt.step(loss_of(model))


@pytest.mark.parametrize("used", [0, 1])
def test_a_parameter_that_was_not_used_shows_no_gradient(used):
    model = mlp()
    hopt = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), tune=("lr",))
    hopt.accumulate((model[2].weight if used else model[0].weight).square().sum())
    assert [p.grad is not None for p in model.parameters()] == [not used, False, bool(used), False]
    hopt.step()
    assert all(p.grad is None for p in model.parameters())


# -- the model-based operator ------------------------------------------------------------------------------------------


def rolled(estimator, tmp_path=None, stop=None, said=False, **more):
    """A run whose windows are closed by `Glocal(estimator=...)`, saved and resumed on the way if asked for.

    said: that there is no other batch.
    """

    def make(seed):
        model = mlp(seed)
        loss = lambda: loss_of(model)
        strategy = Glocal(estimator=estimator, train_batch=loss, batches=[loss] if said else None, settings={"gate": 1e9})
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        settings = {"tune": ("lr", "momentum"), "steps": 12, "window": 6, "outer": None, "strategy": strategy}
        return model, wrap(model, opt, **settings | more)

    model, hopt = make(1)
    for t in range(12):
        if t == stop:
            hopt.save(tmp_path / "run")
            model, hopt = make(2)
            hopt.load(tmp_path / "run")
        hopt.step(loss_of(model))
    return hopt.tuner.history


def test_glocal_rolls_a_torch_run_and_resumes_it(tmp_path):
    whole, resumed = rolled("krylov"), rolled("krylov", tmp_path, stop=4)
    assert whole.method[0] == "krylov"
    for name, column in whole.arrays().items():
        np.testing.assert_array_equal(column, resumed.arrays()[name])


@pytest.mark.parametrize("estimator", ["krylov", "auto"])
def test_a_loss_that_draws_random_numbers_is_not_frozen(estimator):
    """With one mask for all steps it would be another loss; the run goes on, and so do the generator's numbers."""
    histories = []
    for name in (estimator, "trajectory"):
        torch.manual_seed(0)
        model = LAYERS["dropout"]().to(WIDE)
        loss = lambda model=model: loss_of(model)
        strategy = Glocal(estimator=name, train_batch=loss, batches=[loss], settings={"gate": 1e9})
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        hopt = wrap(model, opt, tune=("lr", "momentum"), steps=12, window=6, outer=None, strategy=strategy)
        for _ in range(12):
            hopt.step(loss_of(model))
        histories.append(hopt.tuner.history)
    rolled, plain = histories
    assert all("random numbers" in reason for reason in rolled.reason)
    np.testing.assert_array_equal(rolled.estimate, plain.estimate)
    np.testing.assert_array_equal(rolled.loss, plain.loss)


@pytest.mark.parametrize("tune", [("lr", "weight_decay"), {"lr": log, "weight_decay": log}])
def test_a_group_without_weight_decay_keeps_none(tune):
    """The commonest use of groups: biases are not decayed.  The others' decay is tuned, in its proportions."""
    model = mlp(1)
    weights, biases = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.05}]
    opt = torch.optim.SGD([*groups, {"params": biases}], lr=0.1)
    hopt = wrap(model, opt, tune=tune, steps=12, window=3)
    for _ in range(12):
        hopt.step(loss_of(model))
        first, second, none = (group["weight_decay"] for group in opt.param_groups)
        assert none == 0
        assert second == pytest.approx(first / 2)
    assert hopt.tuner.inner.space.labels == ("lr", "weight_decay")
    assert first != 0.1


def test_auto_is_told_that_a_loop_has_one_batch():
    """Which examples a loss is made of nobody sees."""
    assert "not all on train_batch" in rolled("auto").reason[0]
    assert rolled("auto", said=True).method[0] == "krylov"


def test_a_clipped_step_is_not_frozen():
    with pytest.raises(AdapterError, match="clip_norm cannot be frozen"):
        rolled("krylov", clip_norm=1.0)
    history = rolled("auto", clip_norm=1.0)
    assert history.method[0] != "krylov"
    assert "clip_norm" in history.reason[0]
