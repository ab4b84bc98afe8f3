"""How tangents pass the nodes of a PyTorch loss graph, forwards and backwards: forward over reverse, node by node.

A rule takes a node and its inputs' tangents, (q, *shape) each or None for what does not move, and returns
  push() -> the tangent of its output,
  pull(g, dg) -> the tangents of its inputs' adjoints, from its output's adjoint g and the tangent dg of that (None: zero).
For `y = f(x)`, adjoint `f'(x)^T g`, these are `f'(x) dx` and `f'(x)^T dg + (f''(x) dx)^T g`; a linear node lacks the
second part and does not ask for g.  Nodes that have rules have one output.

All q directions pass at once: a weight's as more output features, an input's as more examples.  So the examples lie
outermost in memory, though q is the first dimension everywhere.

Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import avg_pool2d

Tangent = Any  # (q, *shape), or None
Push = Callable[[], torch.Tensor]
Pull = Callable[[Any, Tangent], Sequence[Tangent]]
_aten = torch.ops.aten
_convolution_backward, _nll_loss_backward = _aten.convolution_backward.default, _aten.nll_loss_backward.default
_threshold_backward, _avg_pool2d_backward = _aten.threshold_backward.default, _aten.avg_pool2d_backward.default
_index_put = _aten.index_put_.default


class Unknown(Exception):
    """A node, or this use of it, has no rule."""


class Rule(NamedTuple):
    """How tangents pass a kind of node."""

    of: Callable[[Any, Sequence[Tangent]], tuple[Push, Pull]]
    curved: bool  # whether pull asks for g


RULES: dict[str, Rule] = {}


def _curved(*names: str) -> Callable[[Any], Any]:
    def enter(rule: Any) -> Any:
        RULES.update(dict.fromkeys(names, Rule(rule, True)))
        return rule

    return enter


def _linear(*names: str) -> Callable[[Any], Any]:
    """For linear nodes of one input: (node, q) -> (what takes a tangent ahead, what takes an adjoint's back)."""

    def enter(rule: Any) -> Any:
        def of(node: Any, moved: Sequence[Tangent]) -> tuple[Push, Pull]:
            ahead, back = rule(node, moved[0].shape[0])
            return lambda: ahead(moved[0]), lambda g, dg: (None if dg is None else back(dg),)

        RULES.update(dict.fromkeys(names, Rule(of, False)))
        return rule

    return enter


# -- shapes ------------------------------------------------------------------------------------------------------------


def _examples(d: torch.Tensor) -> torch.Tensor:
    """(q, B, ...) -> (B q, ...)."""
    return d.transpose(0, 1).flatten(0, 1)


def _features(d: torch.Tensor) -> torch.Tensor:
    """(q, B, C, ...) -> (B, q C, ...)."""
    return d.transpose(0, 1).flatten(1, 2)


def _of_examples(d: torch.Tensor, q: int) -> torch.Tensor:
    return d.view(-1, q, *d.shape[1:]).transpose(0, 1)


def _of_features(d: torch.Tensor, q: int) -> torch.Tensor:
    return d.view(d.shape[0], q, -1, *d.shape[2:]).transpose(0, 1)


def _shape(node: Any, i: int | None = None) -> Sequence[int]:
    """Of the output, or of input i."""
    of, nr = (node, 0) if i is None else node.next_functions[i]
    return of._input_metadata[nr].shape


def _lift(d: torch.Tensor, dims: int) -> torch.Tensor:
    """(q, *shape) as it broadcasts against (q, *longer shape)."""
    return d if d.dim() == dims + 1 else d.reshape(d.shape[0], *[1] * (dims + 1 - d.dim()), *d.shape[1:])


def _sum_to(d: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """What `_lift` and broadcasting transpose to."""
    if tuple(d.shape[1:]) == tuple(shape):
        return d
    q = d.shape[0]
    return d.sum_to_size(q, *[1] * (d.dim() - 1 - len(shape)), *shape).reshape(q, *shape)


def _signed(i: int) -> int:
    """A number that torch shows without its sign."""
    return i - 2**64 if i >= 2**63 else i


def _plus(a: Tangent, b: Tangent) -> Tangent:
    return b if a is None else a if b is None else a + b


# -- layers ------------------------------------------------------------------------------------------------------------


@_curved("AddmmBackward0", "MmBackward0")
def _product(node: Any, moved: Sequence[Tangent]) -> tuple[Push, Pull]:
    *bias, dx, dw = moved  # x (B, in) @ w (in, out) + bias (out,)
    db = bias[0] if bias else None
    if bias and (node._saved_alpha != 1 or node._saved_beta != 1 or (db is not None and (dw is None or db.dim() != 2))):
        raise Unknown
    x: Any = None if dw is None else node._saved_mat1 if bias else node._saved_self
    w: Any = None if dx is None else node._saved_mat2
    q = (dx if dw is None else dw).shape[0]

    def push() -> torch.Tensor:
        if dw is None:
            return _of_examples(_examples(dx) @ w, q)
        wide = dw.transpose(1, 2).flatten(0, 1).t()
        dy = x @ wide if db is None else torch.addmm(db.reshape(-1), x, wide)
        if dx is not None:
            dy.view(-1, w.shape[1]).addmm_(_examples(dx), w)
        return _of_features(dy, q)

    def pull(g: Any, dg: Tangent) -> Sequence[Tangent]:
        gx = gw = None
        if dx is not None and dw is not None:
            gx = g @ _features(dw.transpose(1, 2))
            if dg is not None:
                gx.view(-1, w.shape[0]).addmm_(_examples(dg), w.t())
            gx = _of_features(gx, q)
        elif dx is not None and dg is not None:
            gx = _of_examples(_examples(dg) @ w.t(), q)
        if dw is not None and dg is not None:
            gw = _of_features(x.t() @ _features(dg), q)
        if dw is not None and dx is not None:
            gw = _plus(gw, torch.matmul(g.t(), dx).transpose(1, 2))
        return *[None if db is None or dg is None else dg.sum(1)] * len(bias), gx, gw

    return push, pull


@_curved("ConvolutionBackward0")
def _convolution(node: Any, moved: Sequence[Tangent]) -> tuple[Push, Pull]:
    dx, dw, db = moved
    if node._saved_transposed or node._saved_groups != 1 or (db is not None and dw is None):
        raise Unknown
    x, w, q = node._saved_input, node._saved_weight, (dx if dw is None else dw).shape[0]
    how = (node._saved_stride, node._saved_padding, node._saved_dilation, False, node._saved_output_padding, 1)
    wide = None if dw is None else dw.flatten(0, 1)

    def push() -> torch.Tensor:
        dy: Any = None if dx is None else _of_examples(torch.convolution(_examples(dx), w, None, *how), q)
        if wide is None:
            return dy
        bias = None if db is None else db.reshape(-1)
        own = _of_features(torch.convolution(x, wide, bias, *how), q)
        return own if dy is None else own.add_(dy)

    def pull(g: Any, dg: Tangent) -> Sequence[Tangent]:
        gx = gw = gb = None
        if dg is not None and wide is not None:
            mask = (False, True, db is not None)
            _, gw, gb = _convolution_backward(_features(dg), x, wide, [wide.shape[0]], *how, mask)
            gw, gb = gw.view(dw.shape), None if db is None else gb.view(db.shape)
        if dx is not None and dg is not None:
            mask = (True, False, False)
            gx = _of_examples(_convolution_backward(_examples(dg), _examples(dx), w, None, *how, mask)[0], q)
        if dx is not None and dw is not None:
            mask = (True, True, False)
            gx2, gw2, _ = _convolution_backward(g, _features(dx), _features(dw), None, *how, mask)
            gx, gw = _plus(gx, _of_features(gx2, q)), _plus(gw, _of_features(gw2, q))
        return gx, gw, gb

    return push, pull


@_linear("MaxPool2DWithIndicesBackward0")
def _max_pool(node: Any, q: int) -> Any:
    where, size = node._saved_result1, node._saved_self.shape[-2:]
    place = where.flatten(-2).unsqueeze(1)
    place = place.expand(-1, q, *place.shape[2:])

    def back(d: torch.Tensor) -> torch.Tensor:
        out = torch.zeros((*place.shape[:-1], size.numel()), dtype=d.dtype, device=d.device)
        out.scatter_add_(-1, place, d.flatten(-2).transpose(0, 1))
        return out.unflatten(-1, size).transpose(0, 1)

    ahead = lambda d: d.flatten(-2).transpose(0, 1).gather(-1, place).unflatten(-1, where.shape[-2:]).transpose(0, 1)
    return ahead, back


@_linear("AvgPool2DBackward0")
def _avg_pool(node: Any, q: int) -> Any:
    x = node._saved_self
    if x.dim() != 4:
        raise Unknown
    how: tuple[Any, ...] = (node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_ceil_mode)
    how += (node._saved_count_include_pad, node._saved_divisor_override)
    like = x.new_empty((x.shape[0] * q, *x.shape[1:]))
    back = lambda d: _of_examples(_avg_pool2d_backward(_examples(d), like, *how), q)
    return lambda d: _of_examples(avg_pool2d(_examples(d), *how), q), back


@_linear("ReluBackward0")
def _relu(node: Any, q: int) -> Any:
    y = node._saved_result
    mask = lambda d: _threshold_backward(d, y, 0)
    return mask, mask


@_linear("MaskedFillBackward0")
def _masked_fill(node: Any, q: int) -> Any:
    where = node._saved_mask
    if list(_shape(node)) != list(_shape(node, 0)):
        raise Unknown
    mask = lambda d: d.masked_fill(where, 0)
    return mask, mask


# -- element by element --------------------------------------------------------------------------------------------------


def _unary(name: str, saved: str, slopes: Callable[[Any, Any], tuple[Any, Any]]) -> None:
    """slopes: (saved tensor, node) -> f', f''."""

    def rule(node: Any, moved: Sequence[Tangent]) -> tuple[Push, Pull]:
        (dx,), (slope, curvature) = moved, slopes(getattr(node, saved), node)

        def pull(g: Any, dg: Tangent) -> Sequence[Tangent]:
            d = dx * (curvature * g)
            return (d if dg is None else d.addcmul_(slope, dg),)

        return lambda: dx * slope, pull

    RULES[name] = Rule(rule, True)


def _tanh(y: torch.Tensor, node: Any) -> Any:
    slope = (y * y).neg_().add_(1)
    return slope, (y * slope).mul_(-2)


def _sigmoid(y: torch.Tensor, node: Any) -> Any:
    slope = y * (1 - y)
    return slope, slope * (1 - 2 * y)


def _silu(x: torch.Tensor, node: Any) -> Any:
    s = x.sigmoid()
    return s * (1 + x * (1 - s)), s * (1 - s) * (2 + x * (1 - 2 * s))


def _gelu(x: torch.Tensor, node: Any) -> Any:
    if node._saved_approximate != "none":
        raise Unknown
    density = (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density, density * (2 - x * x)


def _pow(x: torch.Tensor, node: Any) -> Any:
    n = node._saved_exponent
    if n < 2:  # where x = 0 is a matter of its own
        raise Unknown
    return n * x ** (n - 1), n * (n - 1) * x ** (n - 2)


_unary("TanhBackward0", "_saved_result", _tanh)
_unary("SigmoidBackward0", "_saved_result", _sigmoid)
_unary("ExpBackward0", "_saved_result", lambda y, node: (y, y))
_unary("LogBackward0", "_saved_self", lambda x, node: (1 / x, -1 / (x * x)))
_unary("ReciprocalBackward0", "_saved_result", lambda y, node: (-y * y, 2 * y**3))
_unary("SiluBackward0", "_saved_self", _silu)
_unary("GeluBackward0", "_saved_self", _gelu)
_unary("PowBackward0", "_saved_self", _pow)


@_curved("MulBackward0")
def _mul(node: Any, moved: Sequence[Tangent]) -> tuple[Push, Pull]:
    factors, dims = (node._saved_other, node._saved_self), len(_shape(node))
    wide = [None if d is None else _lift(d, dims) for d in moved]
    times = lambda d, a: None if d is None else d * a

    def pull(g: Any, dg: Tangent) -> Sequence[Tangent]:
        found: list[Tangent] = [None, None]
        for i in (i for i in (0, 1) if moved[i] is not None):
            d = _plus(times(dg, factors[i]), times(wide[1 - i], g))
            found[i] = None if d is None else _sum_to(d, _shape(node, i))
        return found

    def push() -> torch.Tensor:
        dy = _plus(*(times(d, a) for d, a in zip(wide, factors, strict=True)))
        assert dy is not None
        return dy

    return push, pull


@_curved("DivBackward0")
def _div(node: Any, moved: Sequence[Tangent]) -> tuple[Push, Pull]:
    top, bottom, dims = node._saved_self, node._saved_other, len(_shape(node))
    da, db = (None if d is None else _lift(d, dims) for d in moved)
    fall = None if db is None else db / bottom  # the relative move of the denominator

    def push() -> torch.Tensor:
        dy = _plus(None if da is None else da / bottom, None if fall is None else fall * (-top / bottom))
        assert dy is not None
        return dy

    def pull(g: Any, dg: Tangent) -> Sequence[Tangent]:
        first = _plus(None if dg is None else dg / bottom, None if fall is None else fall * (-g / bottom))
        found: list[Tangent] = [None, None]
        if da is not None and first is not None:
            found[0] = _sum_to(first, _shape(node, 0))
        if fall is not None and first is not None:
            slope = top / bottom
            d = _plus(fall * (slope * g / bottom) - first * slope, None if da is None else da * (-g / (bottom * bottom)))
            found[1] = None if d is None else _sum_to(d, _shape(node, 1))
        return found

    return push, pull


def _weighted(name: str, weights: Callable[[Any], Sequence[Any]]) -> None:
    """A node that sums its inputs, each under what does not move: node -> functions of a tangent, one an input."""

    def rule(node: Any, moved: Sequence[Tangent]) -> tuple[Push, Pull]:
        times, shape = weights(node), _shape(node)

        def push() -> torch.Tensor:
            terms = [by(_lift(d, len(shape))) for d, by in zip(moved, times, strict=False) if d is not None]
            return sum(terms[1:], terms[0]).expand(-1, *shape)

        def pull(g: Any, dg: Tangent) -> Sequence[Tangent]:
            found: list[Tangent] = [None] * len(moved)
            for i in (i for i, d in enumerate(moved) if d is not None and dg is not None):
                found[i] = _sum_to(times[i](dg), _shape(node, i))
            return found

        return push, pull

    RULES[name] = Rule(rule, False)


def _by(a: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda d: d if type(a) is int and a == 1 else d * a


_weighted("AddBackward0", lambda node: (_by(1), _by(node._saved_alpha)))
_weighted("SubBackward0", lambda node: (_by(1), _by(-node._saved_alpha)))
_weighted("RsubBackward1", lambda node: (_by(-node._saved_alpha),))
_weighted("NegBackward0", lambda node: (_by(-1),))
_weighted("MulBackward1", lambda node: (_by(node._saved_other),))
_weighted("CloneBackward0", lambda node: (_by(1),))


# -- shapes and sums -----------------------------------------------------------------------------------------------------


@_linear("ViewBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0", "SqueezeBackward1")
def _view(node: Any, q: int) -> Any:
    before, after = _shape(node, 0), _shape(node)
    return lambda d: d.reshape(q, *after), lambda d: d.reshape(q, *before)


@_linear("TBackward0")
def _t(node: Any, q: int) -> Any:
    turn = lambda d: d.transpose(-2, -1)
    return turn, turn


@_linear("IndexBackward0")
def _index(node: Any, q: int) -> Any:
    places, before = node._saved_indices, _shape(node, 0)
    if len(places) > 1:  # where the indexed dimensions go is a matter of its own
        raise Unknown

    def back(d: torch.Tensor) -> torch.Tensor:
        out = torch.zeros((q, *before), dtype=d.dtype, device=d.device)
        return _index_put(out, [None, *places], d, True)

    return lambda d: d[(slice(None), *places)], back


def _reduced(node: Any, q: int, mean: bool) -> Any:
    """Sums or means, over some dimensions or all."""
    shape, after = node._saved_self_sym_sizes, _shape(node)
    over = [_signed(i) % len(shape) for i in getattr(node, "_saved_dim", ())] or list(range(len(shape)))
    kept = [1 if i in over else n for i, n in enumerate(shape)]
    scale = 1 / math.prod(shape[i] for i in over) if mean else 1
    ahead = lambda d: (d.sum([i + 1 for i in over]) if over else d).reshape(q, *after) * scale
    return ahead, lambda d: (d * scale).reshape(q, *kept).expand(q, *shape)


_linear("SumBackward0", "SumBackward1")(lambda node, q: _reduced(node, q, mean=False))
_linear("MeanBackward0", "MeanBackward1")(lambda node, q: _reduced(node, q, mean=True))


# -- losses ------------------------------------------------------------------------------------------------------------


@_curved("LogSoftmaxBackward0")
def _log_softmax(node: Any, moved: Sequence[Tangent]) -> tuple[Push, Pull]:
    (dx,), y = moved, node._saved_result
    dim, share = _signed(node._saved_dim) % y.dim() - y.dim(), y.exp()
    dy = dx - (share * dx).sum(dim, keepdim=True)

    def pull(g: Any, dg: Tangent) -> Sequence[Tangent]:
        d = dy * (share * -g.sum(dim, keepdim=True))
        return (d if dg is None else d.add_(dg).addcmul_(share, dg.sum(dim, keepdim=True), value=-1),)

    return lambda: dy, pull


@_linear("NllLossBackward0")
def _nll(node: Any, q: int) -> Any:
    x, target, reduction = node._saved_self, node._saved_target, node._saved_reduction
    if x.dim() != 2:
        raise Unknown
    one = torch.ones(_shape(node), dtype=x.dtype, device=x.device)
    slope = _nll_loss_backward(
        one, x, target, node._saved_weight, reduction, _signed(node._saved_ignore_index), node._saved_total_weight
    )
    ahead = lambda d: (d * slope).sum((1, 2) if reduction else 2)
    return ahead, lambda d: slope * (d[:, None, None] if reduction else d[:, :, None])


@_curved("MseLossBackward0")
def _mse(node: Any, moved: Sequence[Tangent]) -> tuple[Push, Pull]:
    dx, target = moved
    if target is not None:
        raise Unknown
    slope, each = 2 * (node._saved_self - node._saved_target), node._saved_reduction == 0
    scale = 1 / slope.numel() if node._saved_reduction == 1 else 1
    wide = lambda g, extra: g if each else g.reshape(g.shape + (1,) * extra)

    def push() -> torch.Tensor:
        dy = dx * slope
        return dy if each else dy.flatten(1).sum(1) * scale

    def pull(g: Any, dg: Tangent) -> Sequence[Tangent]:
        d = dx * (2 * scale * g)
        return d if dg is None else d + slope * scale * wide(dg, slope.dim()), None

    return push, pull
