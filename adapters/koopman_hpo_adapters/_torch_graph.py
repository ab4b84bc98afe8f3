"""Gradients and their tangents on a user's own PyTorch graph, by double backward."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from koopman_hpo.errors import AdapterError
from koopman_hpo.problem import Array

log = logging.getLogger("koopman_hpo")


class Graph:
    """Double backward on a loss graph: `d<(g, e), (z, dphi)> / dtheta`, with g, e the gradients of theta and phi.

    Attributes:
      params: the tuned model's parameters, in the order of the flat vector.
      hyper: {name: tensor} of the loss hyperparameters.
      path: "batched double backward", "looped double backward", or "" while unknown.
    """

    def __init__(self, params: Sequence[torch.Tensor], hyper: dict[str, torch.Tensor]):
        self.params, self.hyper, self.path = list(params), hyper, ""

    def gradient(self, loss: torch.Tensor, double: bool) -> list[torch.Tensor | None]:
        """Gradients along parameters and hyperparameters; None where the loss does not depend on one."""
        inputs = [*self.params, *self.hyper.values()]
        return list(torch.autograd.grad(loss, inputs, create_graph=double, allow_unused=True))

    def flat(self, grads: Sequence[torch.Tensor | None], out: Array) -> Array:
        """Write the parameters' gradients, each (*n, *shape), into out (*n, p)."""
        start = 0
        for p, grad in zip(self.params, grads, strict=True):
            part = out[..., start : start + p.numel()]
            part[...] = 0 if grad is None else grad.detach().numpy().reshape(part.shape)
            start += p.numel()
        return out

    def push(self, grads: Sequence[torch.Tensor | None], Z: Array, dhyper: dict[str, Array], out: Array) -> Array:
        """out (q, p) <- derivative of the gradient along each (Z[j], dhyper[j])."""
        outputs, along, start = [], [], 0
        rows = torch.from_numpy(Z.copy())
        for p, grad in zip(self.params, grads[: len(self.params)], strict=True):
            if grad is not None and grad.requires_grad:
                outputs.append(grad)
                along.append(rows[:, start : start + p.numel()].reshape(len(Z), *p.shape))
            start += p.numel()
        for (name, h), grad in zip(self.hyper.items(), grads[len(self.params) :], strict=True):
            if grad is not None and grad.requires_grad:
                outputs.append(grad)
                along.append(torch.as_tensor(np.array(dhyper[name]), dtype=h.dtype).reshape(len(Z), *h.shape))
        if not outputs:
            out[...] = 0
            return out
        return self._second(outputs, along, out)

    def _second(self, outputs: list[torch.Tensor], along: list[torch.Tensor], out: Array) -> Array:
        again: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
        if self.path != "looped double backward":
            try:
                dG = torch.autograd.grad(outputs, self.params, along, is_grads_batched=True, **again)
                self._say("batched double backward")
                return self.flat(dG, out)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                log.info("torch: a layer has no batched double backward (%s)", reason)
        try:
            for j in range(len(out)):
                self.flat(torch.autograd.grad(outputs, self.params, [a[j] for a in along], **again), out[j])
        except RuntimeError as error:
            raise AdapterError(
                f"HyperOptimizer.step: the loss cannot be differentiated twice: {error} For attention, compute the loss "
                f"under torch.nn.attention.sdpa_kernel(SDPBackend.MATH); replace in-place operations."
            ) from error
        self._say("looped double backward")
        return out

    def _say(self, path: str) -> None:
        if self.path != path:
            self.path = path
            log.info("torch: tangents by %s", path)


def clipped(g: Array, dG: Array, limit: float) -> None:
    """Clip g (p,) to a norm as torch's `clip_grad_norm_` does, and dG (q, p) with it, both in place."""
    norm = float(np.linalg.norm(g))
    scale = limit / (norm + 1e-6)
    if scale >= 1 or not np.isfinite(norm):
        return
    slope = (dG @ g) * (scale / ((norm + 1e-6) * norm))  # -d scale along each tangent
    dG *= dG.dtype.type(scale)
    dG -= np.outer(slope, g)
    g *= g.dtype.type(scale)
