"""Rules of normalisations.  BatchNorm's passes are in terms of its input, the normalised one, and numbers of a channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._torch_rule import Tangent, Ways, curved, plus, signed, sum_to

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default
_group_norm_backward = torch.ops.aten.native_group_norm_backward.default
Project = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
BATCH_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0")


@curved(*BATCH_NORMS)
def _batch_norm(node: Any, moved: Sequence[Tangent]) -> Ways:
    """`y = w h + b` with `h = s (x - mean)` and s the inverse standard deviation, of the batch or, in evaluation, fixed.

    With <> the mean over a channel, of the batch `dh = s (dx - <dx> - h <h dx>)`, and the way back is likewise.
    """
    dx, dw, db = moved
    x, training = node._saved_input, node._saved_training
    over, wide = [1, *range(3, x.dim() + 1)], (1, -1, *[1] * (x.dim() - 2))
    n, (center, s) = x.numel() / x.shape[1], _moments(node, training)
    slope = s if node._saved_weight is None else s * node._saved_weight

    def mean(d: torch.Tensor) -> Any:
        return d.mean(over)

    def a_channel(c: Any) -> torch.Tensor:
        """(C,) or (q, C), as it broadcasts against (q, *shape)."""
        return c.reshape(*c.shape[:-1], *wide)

    def line(d: torch.Tensor, by: torch.Tensor, shift: Tangent) -> torch.Tensor:
        return d * a_channel(by) if shift is None else torch.addcmul(a_channel(shift), d, a_channel(by))

    h = (x - a_channel(center)) * a_channel(s)
    first: Any = mean(dx) if training and dx is not None else None
    second: Any = None if first is None else mean(dx * h)

    def push() -> torch.Tensor:
        shift, tilt = db, dw
        if first is not None:
            shift, tilt = plus(shift, -slope * first), plus(tilt, -slope * second)
        if dx is not None:
            dy = line(dx, slope, shift)
        else:
            dy = a_channel(torch.zeros_like(tilt) if shift is None else shift).expand(-1, *x.shape)
        return dy if tilt is None else torch.addcmul(dy, h, a_channel(tilt))

    def back(rows: torch.Tensor) -> Sequence[Tangent]:
        one: Any = mean(rows) if training or db is not None else None
        two: Any = mean(rows * h) if training or dw is not None else None
        gx: Tangent = None
        if dx is not None:
            gx = line(rows, slope, -slope * one if training else None)
            if training:
                gx.addcmul_(h, a_channel(-slope * two))
        return gx, None if dw is None else n * two, None if db is None else n * one

    def bend(g: torch.Tensor, found: Sequence[Tangent]) -> None:
        gx, gw, _ = found
        if gx is None:
            return
        one, two = mean(g[None])[0], mean((g * h)[None])[0]
        across = s * mean(dx * g)  # <dh g>
        if training:
            across -= s * (first * one + second * two)
        if gw is not None:
            gw.add_(n * across)
        turn = plus(None if dw is None else s * dw, None if second is None else -slope * s * second)
        if turn is not None:
            gx.addcmul_(g, a_channel(turn))
        if training:
            by = -slope * s * two
            gx.addcmul_(dx, a_channel(by)).add_(a_channel(-turn * one - by * first))
            gx.addcmul_(h, a_channel(-turn * two - by * second - slope * across))

    if first is None:
        return push, back, bend
    return push, back, bend, torch.stack((first, second * (2 * n / (n - 1)) / s), 1)


def _moments(node: Any, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the inverse standard deviation (C,) that the layer normalises with."""
    if training:
        return node._saved_result1, node._saved_result2
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon  # cuDNN's name
    return node._saved_running_mean, torch.rsqrt(node._saved_running_var + eps)


@curved("NativeLayerNormBackward0")
def _layer_norm(node: Any, moved: Sequence[Tangent]) -> Ways:
    x, scaled = node._saved_input, list(node._saved_normalized_shape)
    lead = x.dim() - len(scaled)

    def project(d: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """In one pass of torch's, each direction an example beside x again."""
        at = 0 if d.is_contiguous() else lead
        d = d.movedim(0, at)
        again = lambda a: a.unsqueeze(at).expand(*d.shape[: lead + 1], *a.shape[lead:]).contiguous()
        saved = again(x), scaled, again(node._saved_result1), again(node._saved_result2)
        return _layer_norm_backward(d.contiguous(), *saved, weight, None, [True, False, False])[0].movedim(at, 0)

    return _normalised(node, moved, list(x.shape), list(range(lead, x.dim())), scaled, project)


@curved("NativeGroupNormBackward0")
def _group_norm(node: Any, moved: Sequence[Tangent]) -> Ways:
    x, n, c, area, groups = node._saved_input, node._saved_N, node._saved_C, node._saved_HxW, node._saved_group
    view = [n, groups, c // groups, area]

    def project(d: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """The same."""
        q, at = len(d), 0 if d.is_contiguous() else 1
        d = d.movedim(0, at).contiguous()
        again = lambda a: a.unsqueeze(at).expand(*d.shape[:2], *a.shape[1:]).flatten(0, 1).contiguous()
        saved = again(x), again(node._saved_result1), again(node._saved_result2)
        weight = None if weight is None else weight.flatten()
        found = _group_norm_backward(d.view(n * q, c, area), *saved, weight, n * q, c, area, groups, [True, False, False])
        return found[0].view(d.shape).movedim(at, 0)

    return _normalised(node, moved, view, [2, 3], [groups, c // groups, 1], project)


def _normalised(
    node: Any, moved: Sequence[Tangent], view: list[int], over: list[int], scaled: list[int], project: Project
) -> Ways:
    """`y = w h + b` with `h = s (x - <x>)`, <> the mean over some dimensions of x in this view; w and b of shape `scaled`.

    `dh = P dx` with `P v = s (v - <v> - h <h v>)`, and the way back is likewise.  project: (v, weight) -> P (weight v).
    """
    shape, one = node._saved_input.shape, [1 if i in over else n for i, n in enumerate(view)]
    s, weight = node._saved_result2.reshape(one), node._saved_weight
    h = (node._saved_input.reshape(view) - node._saved_result1.reshape(one)) * s
    grouped = lambda d, to: None if d is None else d.reshape(len(d), *to)
    dx, dw, db = grouped(moved[0], view), grouped(moved[1], scaled), grouped(moved[2], scaled)
    wide = lambda d: d.reshape(len(d), *[1] * (len(view) - len(scaled)), *scaled)
    w = None if weight is None else weight.reshape(scaled)
    mean = lambda d: d.mean([i + 1 for i in over], keepdim=True)
    to_weight = lambda d, like: sum_to(d, scaled).reshape(len(d), *like.shape[1:])
    dh: Any = None if dx is None else project(dx, None)

    def push() -> torch.Tensor:
        dy: Any = None if db is None else wide(db)
        for d, by in ((dh, w), (None if dw is None else wide(dw), h)):
            if d is not None:
                own = d if by is None else d * by
                dy = own if dy is None else own.add_(dy) if by is not None else own + dy
        return dy.expand(-1, *view).reshape(-1, *shape)

    def back(rows: torch.Tensor) -> Sequence[Tangent]:
        rows = rows.reshape(len(rows), *view)
        gx = None if dx is None else project(rows, w).reshape(-1, *shape)
        gw = None if dw is None else to_weight(rows * h, moved[1])
        return gx, gw, None if db is None else to_weight(rows, moved[2])

    def bend(g: torch.Tensor, found: Sequence[Tangent]) -> None:
        gx, gw, _ = found
        if gx is None:
            return
        g = g.reshape(1, *view)
        v, gx = g if w is None else g * w, gx.view(len(gx), *view)
        across = dh * v
        gx.addcmul_(project(v, None), s * mean(dx * h), value=-1)
        gx.addcmul_(dh, s * mean(v * h), value=-1).addcmul_(h, s * mean(across), value=-1)
        if gw is not None:
            gx.add_(project(wide(dw) * g, None))
            gw.add_(to_weight(dh * g, moved[1]))

    return push, back, bend


@curved("WeightNormInterfaceBackward0")
def _weight_norm(node: Any, moved: Sequence[Tangent]) -> Ways:
    """`w = g u` with `u = v / |v|`, whose second derivative torch gets wrong.  `du = (dv - u <u dv>) / |v|`, <> the sum."""
    dv, dg = moved
    v, g = node._saved_v, node._saved_g
    over = [i for i in range(v.dim()) if i != signed(node._saved_dim) % v.dim()]
    inside = lambda d: d.sum([i + 1 for i in over], keepdim=True)
    norm = torch.linalg.vector_norm(v, dim=over, keepdim=True)
    u = v / norm
    across = lambda d: (d - u * inside(u * d)) / norm
    du: Any = None if dv is None else across(dv)

    def push() -> torch.Tensor:
        dw = plus(None if du is None else g * du, None if dg is None else dg * u)
        assert dw is not None
        return dw

    def back(rows: torch.Tensor) -> Sequence[Tangent]:
        return None if dv is None else g * across(rows), None if dg is None else inside(rows * u)

    def bend(adjoint: torch.Tensor, found: Sequence[Tangent]) -> None:
        gv, gg = found
        if gv is None:
            return
        one = adjoint[None]
        turn = du * inside(u * one) + u * inside(du * one)
        gv.sub_(g * (across(one) * inside(u * dv) + turn) / norm)
        if gg is not None:
            gv.add_(dg * across(one))
            gg.add_(inside(du * one))

    return push, back, bend
