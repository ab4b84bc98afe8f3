"""Rules of layers and losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import avg_pool2d

from ._torch_rule import (
    Pull,
    Push,
    Tangent,
    Unknown,
    curved,
    examples,
    features,
    linear,
    of_examples,
    of_features,
    plus,
    shape_of,
    signed,
)

_aten = torch.ops.aten
_convolution_backward, _nll_loss_backward = _aten.convolution_backward.default, _aten.nll_loss_backward.default
_log_softmax_backward = _aten._log_softmax_backward_data.default
_threshold_backward, _avg_pool2d_backward = _aten.threshold_backward.default, _aten.avg_pool2d_backward.default


# -- layers ------------------------------------------------------------------------------------------------------------


@curved("AddmmBackward0", "MmBackward0")
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
            return of_examples(examples(dx) @ w, q)
        wide = dw.transpose(1, 2).flatten(0, 1).t()
        dy = x @ wide if db is None else torch.addmm(db.reshape(-1), x, wide)
        if dx is not None:
            dy.view(-1, w.shape[1]).addmm_(examples(dx), w)
        return of_features(dy, q)

    def pull(g: Any, dg: Tangent) -> Sequence[Tangent]:
        gx = gw = None
        if dx is not None and dw is not None:
            gx = g @ features(dw.transpose(1, 2))
            if dg is not None:
                gx.view(-1, w.shape[0]).addmm_(examples(dg), w.t())
            gx = of_features(gx, q)
        elif dx is not None and dg is not None:
            gx = of_examples(examples(dg) @ w.t(), q)
        if dw is not None and dg is not None:
            gw = (features(dg).t() @ x).view(q, -1, x.shape[1]).transpose(1, 2)  # as a weight that is transposed lies
        if dw is not None and dx is not None:
            gw = plus(gw, torch.matmul(g.t(), dx).transpose(1, 2))
        return *[None if db is None or dg is None else dg.sum(1)] * len(bias), gx, gw

    return push, pull


@curved("ConvolutionBackward0")
def _convolution(node: Any, moved: Sequence[Tangent]) -> tuple[Push, Pull]:
    dx, dw, db = moved
    if node._saved_transposed or node._saved_groups != 1 or (db is not None and dw is None):
        raise Unknown
    x, w, q = node._saved_input, node._saved_weight, (dx if dw is None else dw).shape[0]
    how = (node._saved_stride, node._saved_padding, node._saved_dilation, False, node._saved_output_padding, 1)
    wide = None if dw is None else dw.flatten(0, 1)

    def push() -> torch.Tensor:
        dy: Any = None if dx is None else of_examples(torch.convolution(examples(dx), w, None, *how), q)
        if wide is None:
            return dy
        bias = None if db is None else db.reshape(-1)
        own = of_features(torch.convolution(x, wide, bias, *how), q)
        return own if dy is None else own.add_(dy)

    def pull(g: Any, dg: Tangent) -> Sequence[Tangent]:
        gx = gw = gb = None
        if dg is not None and wide is not None:
            mask = (False, True, db is not None)
            _, gw, gb = _convolution_backward(features(dg), x, wide, [wide.shape[0]], *how, mask)
            gw, gb = gw.view(dw.shape), None if db is None else gb.view(db.shape)
        if dx is not None and dg is not None:
            mask = (True, False, False)
            gx = of_examples(_convolution_backward(examples(dg), examples(dx), w, None, *how, mask)[0], q)
        if dx is not None and dw is not None:
            mask = (True, True, False)
            gx2, gw2, _ = _convolution_backward(g, features(dx), features(dw), None, *how, mask)
            gx, gw = plus(gx, of_features(gx2, q)), plus(gw, of_features(gw2, q))
        return gx, gw, gb

    return push, pull


@linear("MaxPool2DWithIndicesBackward0")
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


@linear("AvgPool2DBackward0")
def _avg_pool(node: Any, q: int) -> Any:
    x = node._saved_self
    if x.dim() != 4:
        raise Unknown
    how: tuple[Any, ...] = (node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_ceil_mode)
    how += (node._saved_count_include_pad, node._saved_divisor_override)
    like = x.new_empty((x.shape[0] * q, *x.shape[1:]))
    back = lambda d: of_examples(_avg_pool2d_backward(examples(d), like, *how), q)
    return lambda d: of_examples(avg_pool2d(examples(d), *how), q), back


@linear("ReluBackward0")
def _relu(node: Any, q: int) -> Any:
    y = node._saved_result
    mask = lambda d: _threshold_backward(d, y, 0)
    return mask, mask


@linear("MaskedFillBackward0")
def _masked_fill(node: Any, q: int) -> Any:
    where = node._saved_mask
    if list(shape_of(node)) != list(shape_of(node, 0)):
        raise Unknown
    mask = lambda d: d.masked_fill(where, 0)
    return mask, mask


# -- losses ------------------------------------------------------------------------------------------------------------


@curved("LogSoftmaxBackward0")
def _log_softmax(node: Any, moved: Sequence[Tangent]) -> tuple[Push, Pull]:
    (dx,), y = moved, node._saved_result
    dim, share = signed(node._saved_dim) % y.dim() - y.dim(), y.exp()
    dy = dx - (share * dx).sum(dim, keepdim=True)

    def pull(g: Any, dg: Tangent) -> Sequence[Tangent]:
        bent = share * g.sum(dim, keepdim=True)
        if dg is None:
            return (dy * bent.neg_(),)
        return (_log_softmax_backward(dg, y.expand_as(dg), dim, y.dtype).addcmul_(dy, bent, value=-1),)

    return lambda: dy, pull


@linear("NllLossBackward0")
def _nll(node: Any, q: int) -> Any:
    x, target, reduction = node._saved_self, node._saved_target, node._saved_reduction
    if x.dim() != 2:
        raise Unknown
    one = torch.ones(shape_of(node), dtype=x.dtype, device=x.device)
    slope = _nll_loss_backward(
        one, x, target, node._saved_weight, reduction, signed(node._saved_ignore_index), node._saved_total_weight
    )
    ahead = lambda d: (d * slope).sum((1, 2) if reduction else 2)
    return ahead, lambda d: slope * (d[:, None, None] if reduction else d[:, :, None])


@curved("MseLossBackward0")
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
