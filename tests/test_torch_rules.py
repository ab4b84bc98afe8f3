"""Forward over reverse on torch graphs: every rule against double backward, and what goes by double backward instead."""

import numpy as np
import pytest
import torch
from koopman_hpo_adapters._torch_forward import Walk
from koopman_hpo_adapters._torch_graph import FORWARD, Graph
from koopman_hpo_adapters._torch_rules import RULES
from koopman_hpo_adapters.torch import HyperOptimizer
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint as checkpointing

from koopman_hpo import log
from koopman_hpo.errors import AdapterError

Q = 3
LABELS = torch.tensor([0, 2, 1, 2, 0])


def leaves(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def fixed(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bent(y):
    """A scalar whose derivative by y depends on y in every entry."""
    return (torch.tanh(y) * fixed(*y.shape, seed=5)).sum()


X = fixed(5, 4)
PICTURES = fixed(2, 2, 7, 6)


def conv(x, W, b=None, **how):
    return F.conv2d(x, W, b, **how)


# name: (shapes of the leaves, their loss)
LOSSES = {
    "linear, input fixed": ([(3, 4), (3,)], lambda W, b: bent(F.linear(X, W, b))),
    "linear, input moves": ([(3, 4), (3,), (4,)], lambda W, b, s: bent(F.linear(X * s, W, b))),
    "linear, weight fixed": ([(5, 4)], lambda x: bent(F.linear(x, fixed(3, 4), fixed(3)))),
    "linear, no bias": ([(3, 4), (5, 4)], lambda W, x: bent(F.linear(x, W))),
    "linear, last layer": ([(3, 4), (3,), (4,)], lambda W, b, s: F.linear(X * s, W, b).sum()),
    "linear, weight fixed, last": ([(5, 4)], lambda x: F.linear(torch.tanh(x), fixed(3, 4), fixed(3)).sum()),
    "linear, three dimensions": ([(3, 4), (3,), (4,)], lambda W, b, s: bent(F.linear(fixed(2, 5, 4) * s, W, b))),
    "product": ([(5, 4), (4, 3)], lambda a, b: bent(a @ b)),
    "product, three dimensions": ([(4, 3), (4,)], lambda W, s: bent((fixed(2, 5, 4) * s) @ W)),
    "one weight twice": ([(4, 4), (4,)], lambda W, b: bent(F.linear(torch.tanh(F.linear(X, W, b)), W, b))),
    "conv, input fixed": ([(3, 2, 3, 2), (3,)], lambda W, b: bent(conv(PICTURES, W, b, stride=2, padding=1))),
    "conv, input moves": (
        [(3, 2, 3, 2), (3,), (2, 1, 1)],
        lambda W, b, s: bent(conv(PICTURES * s, W, b, stride=(2, 1), padding=(1, 0), dilation=(1, 2))),
    ),
    "conv, weight fixed": ([(2, 2, 7, 6)], lambda x: bent(conv(x, fixed(3, 2, 3, 2), fixed(3)))),
    "conv, no bias": ([(3, 2, 3, 2), (2, 1, 1)], lambda W, s: bent(conv(PICTURES * s, W))),
    "conv, last layer": ([(3, 2, 3, 2), (3,), (2, 1, 1)], lambda W, b, s: conv(PICTURES * s, W, b).sum()),
    "conv, one dimension": ([(3, 2, 3), (3,), (2, 1)], lambda W, b, s: bent(F.conv1d(fixed(5, 2, 7) * s, W, b, padding=1))),
    "max pool": ([(2, 2, 7, 6)], lambda x: bent(F.max_pool2d(torch.tanh(x), 3, stride=2, padding=1))),
    "max pool, no batch": ([(2, 7, 6)], lambda x: bent(F.max_pool2d(torch.tanh(x), 2, ceil_mode=True))),
    "average pool": ([(2, 2, 7, 6)], lambda x: bent(F.avg_pool2d(torch.tanh(x), 3, stride=2, padding=1))),
    "average over all": ([(2, 2, 7, 6)], lambda x: bent(F.adaptive_avg_pool2d(torch.tanh(x), 1).flatten(1))),
    "batch norm": (
        [(2, 2, 7, 6), (2,), (2,)],
        lambda x, w, b: bent(F.batch_norm(torch.tanh(x), None, None, w, b, True)),
    ),
    "batch norm, of vectors": ([(5, 4), (4,)], lambda x, w: bent(F.batch_norm(torch.tanh(x), None, None, w, None, True))),
    "batch norm, last": (
        [(5, 2, 3), (2,)],
        lambda x, w: (F.batch_norm(x, None, None, w, None, True) * fixed(5, 2, 3)).sum(),
    ),
    "batch norm, no weight": ([(5, 4)], lambda x: bent(F.batch_norm(torch.tanh(x), None, None, None, None, True))),
    "batch norm, weight alone": ([(4,)], lambda w: bent(F.batch_norm(X, None, None, w, fixed(4), True))),
    "batch norm, bias alone": ([(4,)], lambda b: bent(F.batch_norm(X, None, None, fixed(4), b, True))),
    "batch norm, input fixed": ([(4,), (4,)], lambda w, b: bent(F.batch_norm(X, None, None, w, b, True))),
    "batch norm, weight fixed": (
        [(5, 4)],
        lambda x: bent(F.batch_norm(torch.tanh(x), None, None, fixed(4), fixed(4), True)),
    ),
    "batch norm, fixed": (
        [(2, 2, 7, 6), (2,), (2,)],
        lambda x, w, b: bent(F.batch_norm(torch.tanh(x), fixed(2), fixed(2).abs(), w, b)),
    ),
    "batch norm, fixed, no weight": ([(5, 4)], lambda x: bent(F.batch_norm(torch.tanh(x), fixed(4), fixed(4).abs()))),
    "batch norm, fixed, weight alone": ([(4,)], lambda w: bent(F.batch_norm(X, fixed(4), fixed(4).abs(), w))),
    "layer norm": ([(2, 5, 4), (4,), (4,)], lambda x, w, b: bent(F.layer_norm(torch.tanh(x), (4,), w, b))),
    "layer norm, two dimensions": ([(2, 5, 4), (5, 4)], lambda x, w: bent(F.layer_norm(torch.tanh(x), (5, 4), w))),
    "layer norm, no weight": ([(5, 4)], lambda x: bent(F.layer_norm(torch.tanh(x), (4,)))),
    "layer norm, weight alone": ([(4,)], lambda w: bent(F.layer_norm(X, (4,), w, fixed(4)))),
    "layer norm, bias alone": ([(4,)], lambda b: bent(F.layer_norm(X, (4,), fixed(4), b))),
    "layer norm, weight fixed": ([(5, 4)], lambda x: bent(F.layer_norm(torch.tanh(x), (4,), fixed(4), fixed(4)))),
    "layer norm, last": ([(5, 4), (4,)], lambda x, w: (F.layer_norm(x, (4,), w) * fixed(5, 4)).sum()),
    "group norm": ([(3, 4, 2, 3), (4,), (4,)], lambda x, w, b: bent(F.group_norm(torch.tanh(x), 2, w, b))),
    "group norm, of vectors": ([(5, 6), (6,)], lambda x, w: bent(F.group_norm(torch.tanh(x), 2, w))),
    "group norm, no weight": ([(3, 4, 5)], lambda x: bent(F.group_norm(torch.tanh(x), 2))),
    "group norm, weight fixed": ([(3, 4, 5)], lambda x: bent(F.group_norm(torch.tanh(x), 4, fixed(4), fixed(4)))),
    "softmax": ([(5, 3)], lambda x: bent(torch.softmax(x, 0)) + bent(torch.softmax(x, -1))),
    "embedding": ([(6, 4)], lambda w: bent(F.embedding(LABELS.reshape(5, 1), torch.tanh(w)))),
    "embedding, padding": ([(6, 4)], lambda w: bent(F.embedding(LABELS, w, padding_idx=2).sum(0)) + bent(w)),
    "dropout of a card": ([(5, 4)], lambda x: bent(torch.native_dropout(torch.tanh(x), 0.5, True)[0])),
    "turned": ([(2, 5, 4)], lambda x: bent(x.transpose(0, -1)) + bent(torch.tanh(x).permute(2, -3, 1))),
    "expanded": ([(4,), (5, 1)], lambda x, y: bent(torch.tanh(x).expand(3, 5, 4)) + bent(y.expand(-1, 4))),
    "parts": ([(2, 5, 4)], lambda x: bent(x.tanh()[:, 1:4:2]) + bent(x.select(-1, 2)) + bent(x[-1]) + bent(x[..., -3:-1])),
    "relu": ([(5, 4)], lambda x: bent(torch.relu(x * x - 0.5))),
    "tanh": ([(5, 4)], lambda x: torch.tanh(x).sum()),
    "sigmoid": ([(5, 4)], lambda x: bent(torch.sigmoid(x))),
    "exp": ([(5, 4)], lambda x: bent(torch.exp(x))),
    "log": ([(5, 4)], lambda x: bent(torch.log(x * x + 1))),
    "silu": ([(5, 4)], lambda x: bent(F.silu(x))),
    "gelu": ([(5, 4)], lambda x: bent(F.gelu(x))),
    "power": ([(5, 4), (4,)], lambda x, y: bent(x**3) + (y**2).sum()),
    "product of two": ([(5, 4), (4,)], lambda x, y: bent(x * y)),
    "product with numbers": ([(5, 4), (4,)], lambda x, y: bent(2 * x * X + y * 3)),
    "product with itself": ([(5, 4)], lambda x: (x * x).sum()),
    "product with a scalar": ([(5, 4), ()], lambda x, a: bent(a * x) + a * 2),
    "sum of two": ([(5, 4), (4,), (5, 1)], lambda x, y, z: bent(torch.add(x, y, alpha=2) + z)),
    "sum with constants": ([(4,)], lambda y: bent((X + y).sum(0)) + bent(y + 1)),
    "difference": ([(5, 4), (4,)], lambda x, y: bent(torch.sub(x, y, alpha=3)) + bent(-y) + bent(1 - y)),
    "quotient": ([(5, 4)], lambda x: bent(x / (X * X + 1)) + bent(x / 3) + (x / torch.arange(1, 5)).sum()),
    "quotient of two": ([(5, 4), (4,)], lambda x, y: bent(torch.tanh(x) / (y * y + 1))),
    "quotient of two, last": ([(5, 4), (4,)], lambda x, y: (torch.tanh(x) / (y * y + 1)).sum()),
    "denominator": ([(4,)], lambda y: bent(X / (y * y + 1)) + bent(2 / (y * y + 1))),
    "index": ([(3,), (5, 4)], lambda w, x: bent(w[LABELS]) + bent(x[LABELS]) + bent(x[X[:, 0] > 0])),
    "shapes": ([(5, 4)], lambda x: bent(x.reshape(2, 10).unsqueeze(1)) + bent(x.sum(1, keepdim=True).squeeze(-1))),
    "shapes in place of batches": ([(3, 4), (2, 5, 4)], lambda W, x: bent((torch.tanh(x).view(10, 4) @ W.t()).view(2, 15))),
    "sum of a number": ([(5, 4)], lambda x: bent(x) + (x * x).mean().sum(0)),
    "shapes of a part": ([(2, 5, 4)], lambda x: bent(x.tanh().select(-1, 2).reshape(2, 5, 1))),
    "shapes after a turn": (
        [(2, 4, 5), (4, 3)],
        lambda x, W: bent(x.tanh().transpose(1, 2).reshape(10, 4) @ W) + bent(x.tanh().mT.reshape(5, 8) * 2),
    ),
    "transposed": ([(5, 4)], lambda x: bent(x.t()) + bent(x.t().reshape(20) * 2)),
    "sums": ([(5, 4)], lambda x: bent(x.sum(0)) + bent(x.sum((-1, 0), keepdim=True)) + (x * x).sum()),
    "means": ([(5, 4), ()], lambda x, a: bent(x.mean(-1)) + (x * x).mean() * 2 + bent(a.sum())),
    "cross entropy": ([(5, 3)], lambda x: F.cross_entropy(torch.tanh(x), LABELS)),
    "cross entropy, summed": ([(5, 3)], lambda x: bent(F.cross_entropy(x, LABELS, reduction="sum"))),
    "cross entropy, each": ([(5, 3), (5,)], lambda x, w: (F.cross_entropy(x, LABELS, reduction="none") * w).mean()),
    "cross entropy, weighted": ([(5, 3)], lambda x: F.cross_entropy(x, LABELS, weight=fixed(3).abs(), ignore_index=1)),
    "cross entropy, smoothed": ([(5, 3)], lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1)),
    "masked": ([(5, 4)], lambda x: bent(x.masked_fill(X > 0, 2.0))),
    "log softmax, first": ([(5, 3)], lambda x: bent(torch.log_softmax(x, 0)) + bent(torch.log_softmax(x, -1))),
    "a factor at the end": ([(5, 3), ()], lambda x, a: a * F.cross_entropy(torch.tanh(x), LABELS)),
    "squares": ([(5, 4)], lambda x: F.mse_loss(torch.tanh(x), X)),
    "squares, summed": ([(5, 4)], lambda x: bent(F.mse_loss(x, X, reduction="sum") / 40)),
    "squares, each": ([(5, 4)], lambda x: bent(F.mse_loss(x, X, reduction="none"))),
    "a leaf not used": ([(5, 4), (2,)], lambda x, y: bent(x)),
    "no curvature": ([(5, 4), (4,)], lambda x, y: (x * X).sum() + y.sum()),
    "dropout": ([(5, 4)], lambda x: bent(F.dropout(x, 0.5))),
    "another's leaf": ([(5, 4)], lambda x: bent(x * fixed(4).requires_grad_())),
}

# what has rules, but not for this use
REFUSED = {
    "grouped conv": ([(4, 1, 3, 2), (4,)], lambda W, b: bent(conv(PICTURES, W, b, groups=2))),
    "transposed conv": ([(2, 3, 3, 2)], lambda W: bent(F.conv_transpose2d(PICTURES, W))),
    "conv, bias alone": ([(3,)], lambda b: bent(conv(PICTURES, fixed(3, 2, 3, 2), b))),
    "linear, bias alone": ([(3,)], lambda b: bent(F.linear(X, fixed(3, 4), b))),
    "addmm with factors": ([(3,), (4, 3)], lambda b, W: bent(torch.addmm(b, X, W, beta=2, alpha=3))),
    "addmm with a matrix": ([(5, 3), (4, 3)], lambda b, W: bent(torch.addmm(b, X, W))),
    "average pool, no batch": ([(2, 7, 6)], lambda x: bent(F.avg_pool2d(torch.tanh(x), 2))),
    "root": ([(5, 4)], lambda x: bent((x * x + 1) ** 0.5)),
    "gelu, approximate": ([(5, 4)], lambda x: bent(F.gelu(x, approximate="tanh"))),
    "no examples": ([(3, 4), (3,)], lambda W, b: bent(F.linear(X, W, b)) + F.linear(X[:0], W, b).sum()),
    "softmax of a number": ([(5, 4)], lambda x: bent(x) + x.sum().softmax(0) + x.mean().log_softmax(-1)),
    "transpose of a number": ([(5, 4)], lambda x: bent(x) + (x * x).mean().transpose(0, -1)),
    "moving target": ([(5, 4), (5, 4)], lambda x, y: bent(F.mse_loss(x, torch.tanh(y), reduction="none"))),
    "mask that widens": ([(4,)], lambda x: bent(x.masked_fill(X > 0, 2.0))),
    "no batch": ([(3,)], lambda x: F.cross_entropy(torch.tanh(x), LABELS[1])),
    "two indices": ([(5, 4)], lambda x: bent(x[LABELS, LABELS])),
    "no rule": ([(5, 4)], lambda x: bent(torch.sin(x))),
    "many outputs": ([(5, 4)], lambda x: bent(x.split(2, 1)[1])),
    "another dtype": ([(5, 4)], lambda x: bent(x.float() * 2).double().float()),
}


def columns(inputs):
    return [torch.randn((Q, *i.shape), generator=torch.Generator().manual_seed(9), dtype=i.dtype) for i in inputs]


def by_double_backward(loss, inputs, along):
    grads = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
    used = [(g, z) for g, z in zip(grads, along, strict=True) if g.requires_grad]
    tangents = [[torch.zeros_like(i) for i in inputs] for _ in range(Q)]
    if used:
        outputs = [g for g, _ in used]
        for j in range(Q):
            rows = [z[j] for _, z in used]
            tangents[j] = torch.autograd.grad(outputs, inputs, rows, retain_graph=True, materialize_grads=True)
    return grads, [torch.stack(column) for column in zip(*tangents, strict=True)]


def check(loss_of, inputs, chunk=None, same=None):
    """Against double backward, of a loss that is the same where torch gets that one's wrong; returns the path."""
    graph, along = Graph(inputs, chunk), columns(inputs)
    out = [torch.full_like(z, torch.nan) for z in along]
    torch.manual_seed(2)
    grads = graph.both(loss_of(*inputs), along, out)
    torch.manual_seed(2)
    want, tangents = by_double_backward((same or loss_of)(*inputs), inputs, along)
    for g, w in zip(grads, want, strict=True):
        torch.testing.assert_close(torch.zeros_like(w) if g is None else g, w, rtol=1e-13, atol=1e-15)
    for o, t in zip(out, tangents, strict=True):
        torch.testing.assert_close(o, t, rtol=1e-11, atol=1e-12 * max(1.0, float(t.abs().max())))
    return graph.path


def weight_norm(v, g, dim):
    """As torch's, in its own operations."""
    return v * (g / torch.linalg.vector_norm(v, dim=[i for i in range(v.dim()) if i != dim], keepdim=True))


@pytest.mark.parametrize(
    ("shapes", "loss_of"),
    [
        ([(3, 4), (3, 1)], lambda norm, v, g: bent(norm(v, g, 0))),
        ([(2, 3, 4), (1, 1, 4)], lambda norm, v, g: bent(norm(torch.tanh(v), g, 2))),
        ([(3, 4), (3, 1)], lambda norm, v, g: bent(norm(v, fixed(3, 1), 0)) + bent(norm(fixed(3, 4), g, 0))),
    ],
    ids=["rows", "last dimension", "one fixed"],
)
def test_weight_norm_agrees_with_its_formula(shapes, loss_of):
    ours, written = (lambda v, g, norm=norm: loss_of(norm, v, g) for norm in (torch._weight_norm, weight_norm))
    assert check(ours, leaves(*shapes), same=written) == FORWARD


@pytest.mark.parametrize("name", LOSSES)
def test_a_rule_agrees_with_double_backward(name):
    shapes, loss_of = LOSSES[name]
    assert check(loss_of, leaves(*shapes)) == FORWARD


# (a (5, 4), b (5, 4), s (4,), W (4, 4)) -> (5, 4): what views, shares, widens and reduces, to be mixed at random
STEPS = [
    lambda a, b, s, W: a + b,
    lambda a, b, s, W: a - 0.5 * b,
    lambda a, b, s, W: a * b,
    lambda a, b, s, W: a * s + b.mean(0),
    lambda a, b, s, W: a / (b * b + 1),
    lambda a, b, s, W: torch.tanh(a @ W) + s,
    lambda a, b, s, W: F.linear(a, W.t(), s),
    lambda a, b, s, W: torch.sigmoid(a) * b.sum(1, keepdim=True) / 4,
    lambda a, b, s, W: torch.log_softmax(a, 1) + b,
    lambda a, b, s, W: a.t().reshape(5, 4) + b[LABELS],
    lambda a, b, s, W: F.mse_loss(a, X, reduction="none") * 0.3 + a,
    lambda a, b, s, W: a.reshape(2, 10).unsqueeze(0).squeeze(0).reshape(5, 4) * s.mean(),
    lambda a, b, s, W: torch.relu(a - 0.1) + b.masked_fill(X > 0.5, 0.0),
    lambda a, b, s, W: F.avg_pool2d((a * 1.0).view(1, 1, 5, 4), 3, 1, 1).view(5, 4) + F.silu(b),
]


def mixture(seed):
    """A loss of five leaves through nine such steps, each of two tensors met before."""

    def loss_of(x, y, s, u, W):
        rng, met = np.random.default_rng(seed), [x, y]
        for _ in range(9):
            a, b = (met[i] for i in rng.integers(len(met), size=2))
            made = STEPS[rng.integers(len(STEPS))](a, b, (s, u)[rng.integers(2)], W)
            met.append(made / (1 + made.detach().abs().max()))
        return bent(met[-1]) + met[-2].mean() + F.cross_entropy(met[-3], LABELS)

    return loss_of


@pytest.mark.parametrize("seed", range(25))
def test_rules_agree_in_any_graph(seed):
    inputs = leaves((5, 4), (5, 4), (4,), (4,), (4, 4), seed=seed)
    assert check(mixture(seed), inputs) == FORWARD
    assert check(mixture(seed), inputs, chunk=1) == FORWARD


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_goes_by_double_backward(name):
    shapes, loss_of = REFUSED[name]
    assert check(loss_of, leaves(*shapes)) not in ("", FORWARD)


@pytest.mark.parametrize(
    ("shapes", "loss_of", "said"),
    [
        ([(6, 4)], lambda w: bent(F.embedding(LABELS, w, scale_grad_by_freq=True)), "scale_grad_by_freq makes no gradient"),
        ([(3, 4), (3, 1)], lambda v, g: bent(F.softplus(torch._weight_norm(v, g, 0))), "of weight_norm is wrong"),
        (
            [(5, 4)],
            lambda x: bent(checkpointing.checkpoint(torch.tanh, x, use_reentrant=True)),
            "needs use_reentrant=False",
        ),
    ],
    ids=["frequency", "weight norm", "reentrant"],
)
def test_what_double_backward_gets_wrong_in_silence_is_refused(shapes, loss_of, said):
    inputs = leaves(*shapes)
    graph, along = Graph(inputs), columns(inputs)
    with pytest.raises(AdapterError, match=said):
        graph.both(loss_of(*inputs), along, [torch.zeros_like(a) for a in along])


def test_a_loss_of_another_dtype_goes_by_double_backward():
    weight = leaves((3, 4))[0].detach().float().requires_grad_()
    graph, along = Graph([weight]), columns([weight])
    out = [torch.zeros_like(along[0])]
    graph.both(bent(F.linear(X.float(), weight) * fixed(5, 3)), along, out)
    _, tangents = by_double_backward(bent(F.linear(X.float(), weight) * fixed(5, 3)), [weight], along)
    torch.testing.assert_close(out, tangents)
    assert graph.path not in ("", FORWARD)


def test_every_rule_is_tried():
    seen = set()
    for shapes, loss_of in LOSSES.values():
        walk = Walk(loss_of(*leaves(*shapes)))
        seen |= {type(node).__name__ for node, *_ in walk._nodes}
    elsewhere = {"CudnnBatchNormBackward0", "WeightNormInterfaceBackward0"}  # on a card; above
    assert seen == set(RULES) - elsewhere


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_give_the_same(chunk):
    shapes, loss_of = LOSSES["linear, input moves"]
    assert check(loss_of, leaves(*shapes), chunk) == FORWARD


def test_a_wide_network_is_pushed_in_pieces(monkeypatch):
    shapes, loss_of = LOSSES["linear, input moves"]
    pieces, rows = [], Walk.rows
    note = lambda walk, moved, **how: pieces.append(len(next(iter(moved.values())))) or rows(walk, moved, **how)
    monkeypatch.setattr(Walk, "rows", note)
    inputs = leaves(*shapes)
    monkeypatch.setattr("koopman_hpo_adapters._torch_graph._ROOM", 2 * Walk(loss_of(*inputs)).width)
    assert check(loss_of, inputs) == FORWARD
    assert pieces == [2, 1]
    monkeypatch.setattr("koopman_hpo_adapters._torch_graph._ROOM", 1)
    check(loss_of, inputs)
    assert pieces == [2, 1, 1, 1, 1]


def net():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def follow(model, change):
    """Path and hypergradient after four steps on a loss whose hidden layer goes through `change`."""
    hopt = HyperOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5),
        tune={"lr": log, "momentum": None},
        val_loss=lambda: F.cross_entropy(model(X + 0.3), LABELS),
        steps=9,
        window=9,
    )
    paths = []
    for t in range(4):
        hopt.step(F.cross_entropy(model[2](change(t, model[1](model[0](X)))), LABELS))
        paths.append(hopt.path)
    return paths, hopt.hypergradient().grad


def test_hooks_on_the_graph_are_left_to_double_backward():
    seen = []

    def hooked(t, h):
        h.register_hook(seen.append)
        return h

    paths, got = follow(net(), hooked)
    assert len(seen) >= 4
    assert FORWARD not in paths
    paths, want = follow(net(), lambda t, h: h)
    assert set(paths) == {FORWARD}
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_graph_that_torch_watches_for_anomalies_is_left_to_it():
    with torch.autograd.detect_anomaly():
        paths, got = follow(net(), lambda t, h: h)
        assert FORWARD not in paths
        with pytest.raises(AdapterError, match="returned nan values"):
            follow(net(), lambda t, h: h + (h - h).clamp(min=0).sqrt())
    np.testing.assert_allclose(got, follow(net(), lambda t, h: h)[1], rtol=1e-12)


def test_a_hook_costs_its_own_step_only():
    def hooked(t, h):
        if t == 1:
            h.register_hook(lambda g: 2 * g)
        return h

    paths, _ = follow(net(), hooked)
    assert [p == FORWARD for p in paths] == [True, False, True, True]
