"""Gradients and their tangents on a user's own PyTorch graph, by double backward."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.autograd.variable import Variable

from koopman_hpo.errors import AdapterError

log = logging.getLogger("koopman_hpo")

Grads = list[torch.Tensor | None]
Rows = list[list[torch.Tensor]]  # q directions, one tensor an input or output
BATCHED, LOOPED, DIFFERENCES = "batched double backward", "looped double backward", "central differences"
_ONCE = once_differentiable(lambda *args: None).__code__  # what a function's backward becomes under this mark
_SMALL = 16_384  # q p up to which one batched call beats q calls: measured from 57 to 400,000 parameters, q = 1 to 30


class NotTwice(AdapterError):
    """The graph holds an operation that cannot be differentiated twice."""

    def __init__(self, said: str):
        super().__init__(
            f"HyperOptimizer.step: the loss cannot be differentiated twice: {said} For attention, compute the loss under "
            f"torch.nn.attention.sdpa_kernel(SDPBackend.MATH). Otherwise replace the operation, or pass the loss as a "
            f"function, step(lambda: loss(...)), for central differences."
        )


class Graph:
    """Double backward on a loss graph: the derivative of `<gradient, along>` with respect to what the graph depends on.

    Attributes:
      inputs: the tuned model's parameters, then the loss hyperparameters.
      path: how tangents were made last: one of the three names above, or "" while unknown.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], chunk: int | None = None):
        self.inputs, self.path, self._chunk = tuple(inputs), "", chunk
        self._one = torch.ones((), dtype=self.inputs[0].dtype, device=self.inputs[0].device)
        self._p, self._loops = sum(i.numel() for i in inputs), False

    def gradient(self, loss: torch.Tensor, also: Sequence[torch.Tensor] = (), *, double: bool) -> Grads:
        """Gradients along `inputs` and `also`; None where the loss does not depend on one."""
        if double:
            _refuse_once(loss.grad_fn)
        one = self._one if loss.dtype == self._one.dtype else torch.ones_like(loss)
        try:
            grads = _pull((loss,), (one,), (*self.inputs, *also), double, double)
        except RuntimeError as error:
            raise AdapterError(f"HyperOptimizer.step: {_advice(str(error))}") from error
        for g in grads:
            if g is not None and g.layout != torch.strided:
                raise AdapterError("HyperOptimizer.step: a gradient is sparse. Make the embedding with sparse=False.")
        return list(grads)

    def push(self, grads: Grads, along: Rows, inputs: Sequence[torch.Tensor], out: Rows) -> None:
        """out[j][i] <- derivative of `sum <grads, along[j]>` with respect to inputs[i], for each of q directions j.

        Raises:
          NotTwice: neither batched nor one by one.
        """
        kept = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        inputs, size = tuple(inputs), self._chunk or len(along)
        if not kept:
            for row in out:
                write(row, [None] * len(row))
            return
        if len(kept) < len(grads):
            grads, along = [grads[i] for i in kept], [[row[i] for i in kept] for row in along]
        for a in range(0, len(along), size):
            self._second(tuple(grads), along[a : a + size], inputs, out[a : a + size])

    def _second(self, outputs: Any, along: Rows, inputs: tuple[torch.Tensor, ...], out: Rows) -> None:
        if not self._loops and len(along) * self._p <= _SMALL:
            batch: dict[str, Any] = {"is_grads_batched": True, "retain_graph": True, "allow_unused": True}
            try:
                stacks = (torch.stack(column) for column in zip(*along, strict=True))
                columns = [c.to(g.dtype) for g, c in zip(outputs, stacks, strict=True)]
                found = torch.autograd.grad(outputs, inputs, columns, **batch)
                for j, row in enumerate(out):
                    write(row, [None if f is None else f[j] for f in found])
                self.say(BATCHED)
                return
            except RuntimeError as error:
                log.info("torch: a layer has no batched double backward (%s)", str(error).splitlines()[0])
                self._loops = True
        try:
            for row, into in zip(along, out, strict=True):
                if row[0].dtype != outputs[0].dtype:  # tangents in half precision: one direction at a time is widened
                    row = [r.to(g.dtype) for r, g in zip(row, outputs, strict=True)]  # noqa: PLW2901
                write(into, _pull(outputs, tuple(row), inputs, True, False))
        except RuntimeError as error:
            raise NotTwice(str(error).splitlines()[0]) from error
        self.say(LOOPED)

    def say(self, path: str) -> None:
        """Report the path, once."""
        if self.path != path:
            self.path = path
            log.info("torch: tangents by %s", path)


def _pull(outputs: Any, along: Any, inputs: Any, keep: bool, create: bool) -> tuple[torch.Tensor | None, ...]:
    """`torch.autograd.grad` on tuples of tensors without its Python: a fifth of a small network's step."""
    return Variable._execution_engine.run_backward(outputs, along, keep, create, inputs, True, accumulate_grad=False)


@torch.no_grad()
def write(out: Sequence[torch.Tensor], values: Sequence[torch.Tensor | None]) -> None:
    """out[i] <- values[i], zero where there is none."""
    for o, value in zip(out, values, strict=True):
        if value is None:
            o.zero_()
        else:
            o.copy_(value)


def _refuse_once(root: Any) -> None:
    """Raise where the graph holds a `once_differentiable` function, which double backward passes over in silence."""
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                stack.append(after)
        if isinstance(node, BackwardCFunction):
            function = node._forward_cls  # type: ignore[attr-defined]
            if getattr(function.backward, "__code__", None) is _ONCE:
                raise NotTwice(f"{function.__name__} is marked once_differentiable.")


def _advice(said: str) -> str:
    if "modified by an inplace operation" in said:
        return (
            "a tensor of the loss graph was changed in place after it was used: by a step taken since, so compute the "
            f"loss anew for each step, or by an in-place operation of the model, so replace it. torch says: {said}"
        )
    if "second time" in said:
        return "the loss graph was used already. Do not call backward or step twice on it; compute the loss anew."
    return f"the loss has no gradient. torch says: {said}"


def clipped(g: torch.Tensor, dG: torch.Tensor, limit: float) -> None:
    """Clip g (p,) to a norm as torch's `clip_grad_norm_` does, and dG (q, p) with it, both in place; no card is read."""
    norm = torch.linalg.vector_norm(g)
    scale = limit / (norm + 1e-6)
    long = (scale < 1) & norm.isfinite()
    if g.device.type == "cpu" and not long:  # reading costs nothing here
        return
    slope = (dG @ g) * (scale / ((norm + 1e-6) * norm))  # -d scale along each tangent
    dG.mul_(torch.where(long, scale, 1)).sub_(torch.where(long, torch.outer(slope, g), 0))
    g.mul_(torch.where(long, scale, 1))
