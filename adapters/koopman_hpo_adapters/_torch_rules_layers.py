"""Rules of layers and losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import avg_pool2d

from ._torch_rule import (
    Tangent,
    Unknown,
    Ways,
    curved,
    examples,
    features,
    linear,
    of_examples,
    of_features,
    shape_of,
    signed,
)

_aten = torch.ops.aten
_convolution_backward, _nll_loss_backward = _aten.convolution_backward.default, _aten.nll_loss_backward.default
_embedding_backward = _aten.embedding_dense_backward.default
_threshold_backward, _avg_pool2d_backward = _aten.threshold_backward.default, _aten.avg_pool2d_backward.default


# -- layers ------------------------------------------------------------------------------------------------------------


@curved("AddmmBackward0", "MmBackward0")
def _product(node: Any, moved: Sequence[Tangent]) -> Ways:
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

    def back(rows: torch.Tensor) -> Sequence[Tangent]:
        gx = None if dx is None else of_examples(examples(rows) @ w.t(), len(rows))
        gw = None if dw is None else (features(rows).t() @ x).view(len(rows), -1, x.shape[1]).transpose(1, 2)
        return *[None if db is None else rows.sum(1)] * len(bias), gx, gw  # gw as a weight that is transposed lies

    def bend(g: torch.Tensor, found: Sequence[Tangent]) -> None:
        *_, gx, gw = found
        if gx is not None and gw is not None:
            gx.transpose(0, 1).view(len(g), -1).addmm_(g, features(dw.transpose(1, 2)))
            gw.add_((g.t() @ features(dx)).view(g.shape[1], q, -1).permute(1, 2, 0))

    return push, back, bend


@curved("ConvolutionBackward0")
def _convolution(node: Any, moved: Sequence[Tangent]) -> Ways:
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

    def back(rows: torch.Tensor) -> Sequence[Tangent]:
        n, gx, gw, gb = len(rows), None, None, None
        if dw is not None:
            mask, like = (False, True, db is not None), w.new_empty((n * w.shape[0], *w.shape[1:]))
            _, gw, gb = _convolution_backward(features(rows), x, like, [len(like)], *how, mask)
            gw, gb = gw.view(n, *w.shape), None if db is None else gb.view(n, -1)
        if dx is not None:
            mask, like = (True, False, False), x.new_empty((len(x) * n, *x.shape[1:]))
            gx = of_examples(_convolution_backward(examples(rows), like, w, None, *how, mask)[0], n)
        return gx, gw, gb

    def bend(g: torch.Tensor, found: Sequence[Tangent]) -> None:
        gx, gw, _ = found
        if gx is not None and gw is not None:
            mask = (True, True, False)
            gx2, gw2, _ = _convolution_backward(g, features(dx), features(dw), None, *how, mask)
            gx.add_(of_features(gx2, q))
            gw.add_(of_features(gw2, q))

    return push, back, bend


@linear("MaxPool2DWithIndicesBackward0")
def _max_pool(node: Any) -> Any:
    where, size = node._saved_result1, node._saved_self.shape[-2:]
    place = where.flatten(-2).unsqueeze(1)
    places = lambda d: place.expand(-1, len(d), *place.shape[2:])

    def back(rows: torch.Tensor) -> torch.Tensor:
        at = places(rows)
        out = rows.new_zeros((*at.shape[:-1], size.numel())).scatter_add_(-1, at, rows.flatten(-2).transpose(0, 1))
        return out.unflatten(-1, size).transpose(0, 1)

    def ahead(d: torch.Tensor) -> torch.Tensor:
        return d.flatten(-2).transpose(0, 1).gather(-1, places(d)).unflatten(-1, where.shape[-2:]).transpose(0, 1)

    return ahead, back


@linear("AvgPool2DBackward0")
def _avg_pool(node: Any) -> Any:
    x = node._saved_self
    if x.dim() != 4:
        raise Unknown
    how: tuple[Any, ...] = (node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_ceil_mode)
    how += (node._saved_count_include_pad, node._saved_divisor_override)

    def back(rows: torch.Tensor) -> torch.Tensor:
        like = x.new_empty((len(x) * len(rows), *x.shape[1:]))
        return of_examples(_avg_pool2d_backward(examples(rows), like, *how), len(rows))

    return lambda d: of_examples(avg_pool2d(examples(d), *how), len(d)), back


@linear("ReluBackward0")
def _relu(node: Any) -> Any:
    y = node._saved_result
    mask = lambda d: _threshold_backward(d, y, 0)
    return mask, mask


@linear("MaskedFillBackward0")
def _masked_fill(node: Any) -> Any:
    where = node._saved_mask
    if list(shape_of(node)) != list(shape_of(node, 0)):
        raise Unknown
    mask = lambda d: d.masked_fill(where, 0)
    return mask, mask


@linear("EmbeddingBackward0")
def _embedding(node: Any) -> Any:
    places, n, padding = node._saved_indices, node._saved_weight_sym_argsize_0, signed(node._saved_padding_idx)
    if node._saved_sparse or node._saved_scale_grad_by_freq:
        raise Unknown

    def ahead(d: torch.Tensor) -> torch.Tensor:
        out = d.transpose(0, 1)[places].movedim(-2, 0)
        return out if padding < 0 else out.masked_fill((places == padding).unsqueeze(-1), 0)

    def back(rows: torch.Tensor) -> torch.Tensor:
        out = _embedding_backward(rows.movedim(0, -2).flatten(-2), places, n, padding, False)
        return out.unflatten(-1, (len(rows), -1)).transpose(0, 1)

    return ahead, back


@linear("NativeDropoutBackward0")
def _dropout(node: Any) -> Any:
    """A card's; the CPU multiplies."""
    keep = node._saved_result1 / (1 - node._saved_p) if node._saved_p < 1 else torch.zeros_like(node._saved_result1)
    mask = lambda d: d * keep
    return mask, mask


# -- losses ------------------------------------------------------------------------------------------------------------


def _dimension(node: Any) -> int:
    """The one that a softmax is over, counted from the last."""
    dims = len(shape_of(node))
    if not dims:  # of a number
        raise Unknown
    return signed(node._saved_dim) % dims - dims


@curved("SoftmaxBackward0")
def _softmax(node: Any, moved: Sequence[Tangent]) -> Ways:
    (dx,), y, dim = moved, node._saved_result, _dimension(node)
    centred = lambda d: d - (y * d).sum(dim, keepdim=True)
    dy = y * centred(dx)

    def bend(g: torch.Tensor, found: Sequence[Tangent]) -> None:
        found[0].addcmul_(dy, centred(g)).addcmul_(y, (dy * g).sum(dim, keepdim=True), value=-1)

    return lambda: dy, lambda rows: (y * centred(rows),), bend


@curved("LogSoftmaxBackward0")
def _log_softmax(node: Any, moved: Sequence[Tangent]) -> Ways:
    (dx,), y, dim = moved, node._saved_result, _dimension(node)
    share = y.exp()
    dy = dx - (share * dx).sum(dim, keepdim=True)

    def bend(g: torch.Tensor, found: Sequence[Tangent]) -> None:
        found[0].addcmul_(dy, share * g.sum(dim, keepdim=True), value=-1)

    def back(rows: torch.Tensor) -> Sequence[Tangent]:
        return (torch.addcmul(rows, share, rows.sum(dim, keepdim=True), value=-1),)

    return lambda: dy, back, bend


@linear("NllLossBackward0")
def _nll(node: Any) -> Any:
    x, target, reduction = node._saved_self, node._saved_target, node._saved_reduction
    if x.dim() != 2:
        raise Unknown
    one = torch.ones(shape_of(node), dtype=x.dtype, device=x.device)
    slope = _nll_loss_backward(
        one, x, target, node._saved_weight, reduction, signed(node._saved_ignore_index), node._saved_total_weight
    )
    ahead = lambda d: (d * slope).sum((1, 2) if reduction else 2)
    return ahead, lambda rows: slope * (rows[:, None, None] if reduction else rows[:, :, None])


@curved("MseLossBackward0")
def _mse(node: Any, moved: Sequence[Tangent]) -> Ways:
    dx, target = moved
    if target is not None:
        raise Unknown
    slope, each = 2 * (node._saved_self - node._saved_target), node._saved_reduction == 0
    scale = 1 / slope.numel() if node._saved_reduction == 1 else 1

    def push() -> torch.Tensor:
        dy = dx * slope
        return dy if each else dy.flatten(1).sum(1) * scale

    def back(rows: torch.Tensor) -> Sequence[Tangent]:
        return slope * scale * (rows if each else rows.reshape(-1, *[1] * slope.dim())), None

    def bend(g: torch.Tensor, found: Sequence[Tangent]) -> None:
        found[0].add_(dx * (2 * scale * g))

    return push, back, bend
