"""Rules of what acts element by element, of shapes, and of sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch

from ._torch_rule import RULES, Rule, Tangent, Unknown, Ways, curved, lift, linear, plus, shape_of, signed, sum_to

_index_put, _tanh_backward = torch.ops.aten.index_put_.default, torch.ops.aten.tanh_backward.default


# -- element by element --------------------------------------------------------------------------------------------------


def _unary(name: str, saved: str, slopes: Callable[[Any, Any], tuple[Any, Any]]) -> None:
    """slopes: (saved tensor, node) -> f', f''."""

    def rule(node: Any, moved: Sequence[Tangent]) -> Ways:
        (dx,), (slope, curvature) = moved, slopes(getattr(node, saved), node)

        def bend(g: torch.Tensor, found: Sequence[Tangent]) -> None:
            found[0].addcmul_(dx, curvature * g)

        return lambda: dx * slope, lambda rows: (rows * slope,), bend

    RULES[name] = Rule(rule, True)


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


_unary("SigmoidBackward0", "_saved_result", _sigmoid)
_unary("ExpBackward0", "_saved_result", lambda y, node: (y, y))
_unary("LogBackward0", "_saved_self", lambda x, node: (1 / x, -1 / (x * x)))
_unary("ReciprocalBackward0", "_saved_result", lambda y, node: (-y * y, 2 * y**3))
_unary("SiluBackward0", "_saved_self", _silu)
_unary("GeluBackward0", "_saved_self", _gelu)
_unary("PowBackward0", "_saved_self", _pow)


@curved("TanhBackward0")
def _tanh(node: Any, moved: Sequence[Tangent]) -> Ways:
    y = node._saved_result
    dy = _tanh_backward(moved[0], y)

    def bend(g: torch.Tensor, found: Sequence[Tangent]) -> None:
        found[0].addcmul_(dy, y * g, value=-2)  # f'' is -2 y f'

    return lambda: dy, lambda rows: (_tanh_backward(rows, y),), bend


@curved("MulBackward0")
def _mul(node: Any, moved: Sequence[Tangent]) -> Ways:
    factors, dims = (node._saved_other, node._saved_self), len(shape_of(node))
    wide = [None if d is None else lift(d, dims) for d in moved]
    times = lambda d, a: None if d is None else d * a

    def back(rows: torch.Tensor) -> Sequence[Tangent]:
        return [None if d is None else sum_to(rows * factors[i], shape_of(node, i)) for i, d in enumerate(moved)]

    def bend(g: torch.Tensor, found: Sequence[Tangent]) -> None:
        for i, (into, other) in enumerate(zip(found, reversed(wide), strict=True)):
            if into is not None and other is not None:
                into.add_(sum_to(other * g, shape_of(node, i)))

    def push() -> torch.Tensor:
        dy = plus(*(times(d, a) for d, a in zip(wide, factors, strict=True)))
        assert dy is not None
        return dy

    return push, back, bend


@curved("DivBackward0")
def _div(node: Any, moved: Sequence[Tangent]) -> Ways:
    top, bottom, dims = node._saved_self, node._saved_other, len(shape_of(node))
    da, db = (None if d is None else lift(d, dims) for d in moved)
    fall = None if db is None else db / bottom  # the relative move of the denominator

    def push() -> torch.Tensor:
        dy = plus(None if da is None else da / bottom, None if fall is None else fall * (-top / bottom))
        assert dy is not None
        return dy

    def back(rows: torch.Tensor) -> Sequence[Tangent]:
        first = rows / bottom
        second = None if fall is None else sum_to(first * (-top / bottom), shape_of(node, 1))
        return None if da is None else sum_to(first, shape_of(node, 0)), second

    def bend(g: torch.Tensor, found: Sequence[Tangent]) -> None:
        slope = -g / bottom
        if da is not None and fall is not None:
            found[0].add_(sum_to(fall * slope, shape_of(node, 0)))
        if fall is not None:
            d = plus(fall * (-2 * slope * top / bottom), None if da is None else da * (slope / bottom))
            found[1].add_(sum_to(d, shape_of(node, 1)))

    return push, back, bend


def _weighted(name: str, weights: Callable[[Any], Sequence[Any]]) -> None:
    """A node that sums its inputs, each under what does not move: node -> functions of a tangent, one an input."""

    def rule(node: Any, moved: Sequence[Tangent]) -> Ways:
        times, shape = weights(node), shape_of(node)

        def push() -> torch.Tensor:
            terms = [by(lift(d, len(shape))) for d, by in zip(moved, times, strict=False) if d is not None]
            return sum(terms[1:], terms[0]).expand(-1, *shape)

        def back(rows: torch.Tensor) -> Sequence[Tangent]:
            return [None if d is None else sum_to(times[i](rows), shape_of(node, i)) for i, d in enumerate(moved)]

        return push, back, None

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


@linear("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "SqueezeBackward1")
def _view(node: Any) -> Any:
    before, after = shape_of(node, 0), shape_of(node)
    return lambda d: _reshaped(d, after), lambda rows: _reshaped(rows, before)


def _reshaped(d: torch.Tensor, after: Sequence[int]) -> torch.Tensor:
    """(q, *before) -> (q, *after).  Where that takes a copy, the examples come to lie outermost in it: the first of the
    dimensions after, or those before that become it."""
    try:
        return d.view(len(d), *after)
    except RuntimeError:
        sizes, outer = d.shape[1:], list(accumulate(d.shape[1:], mul))
        if not after or after[0] not in outer:
            return d.reshape(len(d), *after)
        k = outer.index(after[0]) + 1
        order = [*range(1, k + 1), 0, *range(k + 1, len(sizes) + 1)]
        return d.permute(order).reshape(after[0], len(d), *after[1:]).transpose(0, 1)


@linear("TBackward0")
def _t(node: Any) -> Any:
    turn = lambda d: d.transpose(-2, -1)
    return turn, turn


@linear("TransposeBackward0")
def _transpose(node: Any) -> Any:
    dims = len(shape_of(node))
    if not dims:
        raise Unknown
    one, two = signed(node._saved_dim0) % dims, signed(node._saved_dim1) % dims
    turn = lambda d: d.transpose(one + 1, two + 1)
    return turn, turn


@linear("PermuteBackward0")
def _permute(node: Any) -> Any:
    dims = [0, *(signed(i) % len(node._saved_dims) + 1 for i in node._saved_dims)]
    inverse = [dims.index(i) for i in range(len(dims))]
    return lambda d: d.permute(dims), lambda rows: rows.permute(inverse)


@linear("ExpandBackward0")
def _expand(node: Any) -> Any:
    before, after = shape_of(node, 0), shape_of(node)
    return lambda d: lift(d, len(after)).expand(-1, *after), lambda rows: sum_to(rows, before)


@linear("SelectBackward0")
def _select(node: Any) -> Any:
    return _part(node, signed(node._saved_index))


@linear("SliceBackward0")
def _slice(node: Any) -> Any:
    return _part(node, slice(signed(node._saved_start), signed(node._saved_end), node._saved_step))


def _part(node: Any, here: int | slice) -> Any:
    """A part of a tensor by basic indexing of one dimension."""
    before = shape_of(node, 0)
    place = (..., here, *[slice(None)] * (len(before) - 1 - signed(node._saved_dim) % len(before)))

    def back(rows: torch.Tensor) -> torch.Tensor:
        out = rows.new_zeros((len(rows), *before))
        out[place] = rows
        return out

    return lambda d: d[place], back


@linear("IndexBackward0")
def _index(node: Any) -> Any:
    places, before = node._saved_indices, shape_of(node, 0)
    if len(places) > 1:  # where the indexed dimensions go is a matter of its own
        raise Unknown

    def back(rows: torch.Tensor) -> torch.Tensor:
        return _index_put(rows.new_zeros((len(rows), *before)), [None, *places], rows, True)

    return lambda d: d[(slice(None), *places)], back


def _reduced(node: Any, mean: bool) -> Any:
    """Sums or means, over some dimensions or all."""
    shape, after = node._saved_self_sym_sizes, shape_of(node)
    over = [signed(i) % len(shape) for i in getattr(node, "_saved_dim", ()) if shape] or list(range(len(shape)))
    kept = [1 if i in over else n for i, n in enumerate(shape)]
    scale = 1 / math.prod(shape[i] for i in over) if mean else 1
    ahead = lambda d: (d.sum([i + 1 for i in over]) if over else d).reshape(len(d), *after) * scale
    return ahead, lambda rows: (rows * scale).reshape(len(rows), *kept).expand(-1, *shape)


linear("SumBackward0", "SumBackward1")(lambda node: _reduced(node, mean=False))
linear("MeanBackward0", "MeanBackward1")(lambda node: _reduced(node, mean=True))
