"""The rule of BatchNorm: all its passes in terms of its input, the normalised input, and one number a channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._torch_rule import Tangent, Ways, curved, plus


@curved("NativeBatchNormBackward0", "CudnnBatchNormBackward0")
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
