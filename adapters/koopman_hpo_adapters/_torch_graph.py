"""Gradients and their tangents on a user's own PyTorch graph: forward over reverse, or double backward."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.utils.hooks import RemovableHandle

from koopman_hpo.errors import AdapterError

from ._torch_forward import Columns, Walk
from ._torch_rules import Unknown

log = logging.getLogger("koopman_hpo")

Grads = list[torch.Tensor | None]
FORWARD = "forward over reverse"
BATCHED, LOOPED, DIFFERENCES = "batched double backward", "looped double backward", "central differences"
_ONCE = once_differentiable(lambda *args: None).__code__  # what a function's backward becomes under this mark
_ROOM = 2**24  # elements of all directions that forward over reverse pushes at a time: 128 MiB in float64
_OF_CARD = 16  # the same on a card: that part of its memory
_SMALL = 16_384  # q p up to which one batched call beats q calls: measured from 57 to 400,000 parameters, q = 1 to 30


class NotTwice(AdapterError):
    """The graph holds an operation that cannot be differentiated twice."""

    def __init__(self, said: str):
        super().__init__(
            f"HyperOptimizer.step: the loss cannot be differentiated twice: {said} For attention, compute the loss under "
            f"torch.nn.attention.sdpa_kernel(SDPBackend.MATH). For recurrent layers on a card, pass model=... Otherwise "
            f"replace the operation, or pass the loss as a function, step(lambda: loss(...)), for central differences."
        )


class Graph:
    """Derivatives on a loss graph: the gradient, and that of `<gradient, along>` for q directions.

    Attributes:
      inputs: the tuned model's parameters, then the loss hyperparameters.
      path: how tangents were made last: one of the four names above, or "" while unknown.
      handles: torch's count of hooks when the last step was taken.  A hook set since may act on the graph, which only
        double backward sees.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], chunk: int | None = None):
        self.inputs, self.path, self._chunk = tuple(inputs), "", chunk
        self.handles = RemovableHandle.next_id
        self._one = torch.ones((), dtype=self.inputs[0].dtype, device=self.inputs[0].device)
        self._p, self._loops = sum(i.numel() for i in inputs), False
        self._dtypes = {i.dtype for i in inputs}

    def both(self, loss: torch.Tensor, along: Columns, out: Columns) -> Grads:
        """Gradients along `inputs`; out[i] (q, *shape) <- tangents of that along inputs[i], for along[i] (q, *shape)."""
        ahead = self.ahead(loss, along, out)
        if ahead is not None:
            return ahead[0]
        grads = self.gradient(loss, double=True)
        self.push(grads, along, self.inputs[: len(out)], out)
        return grads

    @torch.no_grad()
    def ahead(
        self, loss: torch.Tensor, along: Columns, out: Columns, layers: Sequence[Any] = ()
    ) -> tuple[Grads, list[torch.Tensor | None]] | None:
        """The same by forward over reverse, and the tangents (q, 2, C) of what nodes of normalising layers met, or None.

        None where that does not know the graph, the loss does not depend on a layer, or torch is to watch it.
        """
        if self.handles != RemovableHandle.next_id or self._dtypes != {loss.dtype} or torch.is_anomaly_enabled():
            return None
        grads: Grads = []
        moments: list[Any] = []
        try:
            walk = Walk(loss)
            if not walk.has(layers):
                return None
            pieces = list(_pieces(self._chunk or max(1, self._room() // self._weight(walk, out)), out, along))
            for n, (into, moved) in enumerate(pieces):
                tangents = {id(i): m.to(i.dtype) for i, m in zip(self.inputs, moved, strict=True)}
                found = walk.rows(tangents, first=n == 0, more=n + 1 < len(pieces))
                rows = [found.get(id(i)) for i in self.inputs]
                moments.append([walk.met(layer) for layer in layers])
                if n == 0:
                    first = [None if r is None else r[0] for r in rows]
                    grads = first if len(pieces) == 1 else [None if r is None else r.clone() for r in first]
                    rows = [None if r is None else r[1:] for r in rows]
                write(into, rows[: len(into)])
        except Unknown:
            return None
        except RuntimeError:
            self.gradient(loss)  # raises with what to do, where the graph is at fault
            raise
        self.say(FORWARD)
        return grads, [None if m[0] is None else torch.cat(m) for m in zip(*moments, strict=True)]

    def _weight(self, walk: Walk, out: Columns) -> int:
        """Elements that one direction takes on its way: of the graph, and of tangents that are kept in less than they weigh
        on it, which are widened and found in full."""
        narrow = any(o.dtype.itemsize < i.dtype.itemsize for o, i in zip(out, self.inputs, strict=False))
        return max(1, walk.width, 2 * self._p if narrow else 0)

    def _room(self) -> int:
        """Elements that may be pushed at a time."""
        place = self.inputs[0].device
        if place.type != "cuda":
            return _ROOM
        return torch.cuda.get_device_properties(place).total_memory // (_OF_CARD * self.inputs[0].itemsize)

    def settle(self) -> None:
        """A step was taken: hooks set before act on no graph to come."""
        self.handles = RemovableHandle.next_id

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Hooks set within are of a loss that no step takes."""
        before = RemovableHandle.next_id
        try:
            yield
        finally:
            self.handles += RemovableHandle.next_id - before

    def gradient(self, loss: torch.Tensor, also: Sequence[Any] = (), *, double: bool = False) -> Grads:
        """Gradients along `inputs` and `also`, tensors or edges; None where the loss does not depend on one."""
        if double:
            _refuse_once(loss.grad_fn)
        one = self._one if loss.dtype == self._one.dtype else torch.ones_like(loss)
        with _explained():
            grads = _pull((loss,), (one,), (*self.inputs, *also), double, double)
        for g in grads:
            if g is not None and g.layout != torch.strided:
                raise AdapterError("HyperOptimizer.step: a gradient is sparse. Make the embedding with sparse=False.")
        return list(grads)

    def push(self, grads: Grads, along: Columns, inputs: Sequence[torch.Tensor], out: Columns) -> None:
        """out[i] (q, *shape) <- derivatives of `sum <grads, along[:, j]>` with respect to inputs[i], by double backward.

        Raises:
          NotTwice: neither batched nor one by one.
        """
        kept = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        if not kept:
            write(out, [None] * len(out))
            return
        outputs: tuple[Any, ...] = tuple(grads[i] for i in kept)
        along = [along[i] for i in kept]
        for into, moved in _pieces(self._chunk or len(along[0]), out, along):
            self._second(outputs, moved, tuple(inputs), into)

    def _second(self, outputs: Any, along: Columns, inputs: tuple[torch.Tensor, ...], out: Columns) -> None:
        if not self._loops and len(along[0]) * self._p <= _SMALL:
            batch: dict[str, Any] = {"is_grads_batched": True, "retain_graph": True, "allow_unused": True}
            try:
                write(out, torch.autograd.grad(outputs, inputs, _widened(along, outputs), **batch))
                self.say(BATCHED)
                return
            except RuntimeError as error:
                log.info("torch: a layer has no batched double backward (%s)", str(error).splitlines()[0])
                self._loops = True
        try:
            for row, into in zip(_rows(along), _rows(out), strict=True):
                write(into, _pull(outputs, _widened(row, outputs), inputs, True, False))
        except RuntimeError as error:
            raise NotTwice(str(error).splitlines()[0]) from error
        self.say(LOOPED)

    def say(self, path: str) -> None:
        """Report the path, once."""
        if self.path != path:
            self.path = path
            log.info("torch: tangents by %s", path)


def _widened(along: Columns, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tangents that are kept in half precision, in full; others as they are."""
    return [a.to(o.dtype) for a, o in zip(along, outputs, strict=True)]


def _pull(outputs: Any, along: Any, inputs: Any, keep: bool, create: bool) -> tuple[torch.Tensor | None, ...]:
    """`torch.autograd.grad`, None for an input that is not used."""
    return torch.autograd.grad(outputs, inputs, along, retain_graph=keep, create_graph=create, allow_unused=True)


def _pieces(size: int, *columns: Columns) -> Iterator[tuple[Columns, ...]]:
    """Columns cut to so many directions."""
    q = len(columns[0][0])
    if size >= q:
        yield columns
    else:
        for a in range(0, q, size):
            yield tuple([c[a : a + size] for c in column] for column in columns)


def _rows(columns: Columns) -> Iterator[tuple[torch.Tensor, ...]]:
    """For each direction its tensors."""
    return zip(*(c.unbind(0) for c in columns), strict=True)


@torch.no_grad()
def write(out: Sequence[torch.Tensor], values: Sequence[torch.Tensor | None]) -> None:
    """out[i] <- values[i], zero where there is none."""
    for o, value in zip(out, values, strict=True):
        if value is None:
            o.zero_()
        else:
            o.copy_(value)


def _refuse_once(root: Any) -> None:
    """Raise where the graph holds what double backward passes over in silence, or gets wrong."""
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                stack.append(after)
        kind = type(node).__name__
        if kind == "CheckpointFunctionBackward":
            raise AdapterError(
                "HyperOptimizer.step: torch.utils.checkpoint needs use_reentrant=False, to give derivatives."
            )
        if kind == "WeightNormInterfaceBackward0":
            raise NotTwice(
                "torch's second derivative of weight_norm is wrong; only beside layers that have rules is it made."
            )
        if kind == "EmbeddingBackward0" and node._saved_scale_grad_by_freq:
            raise AdapterError("HyperOptimizer.step: an embedding's scale_grad_by_freq makes no gradient. Set it to False.")
        if isinstance(node, BackwardCFunction):
            function = node._forward_cls  # type: ignore[attr-defined]
            if getattr(function.backward, "__code__", None) is _ONCE:
                raise NotTwice(f"{function.__name__} is marked once_differentiable.")


@contextmanager
def _explained() -> Iterator[None]:
    """Within, what torch says of a graph is told with what to do."""
    try:
        yield
    except RuntimeError as error:
        raise AdapterError(f"HyperOptimizer.step: {_advice(str(error))}") from error


def _advice(said: str) -> str:
    if "modified by an inplace operation" in said:
        return (
            "a tensor of the loss graph was changed in place after it was used: by a step taken since, so compute the "
            f"loss anew for each step, or by an in-place operation of the model, so replace it. torch says: {said}"
        )
    if "second time" in said:
        return "the loss graph was used already. Do not call backward or step twice on it; compute the loss anew."
    if "cudnn RNN backward" in said:
        return (
            "cuDNN's recurrent layers have no gradient in evaluation mode. Pass model=..., so that they run without cuDNN, "
            "or compute the losses under torch.backends.cudnn.flags(enabled=False)."
        )
    return f"the loss has no gradient. torch says: {said}"


def clipped(g: torch.Tensor, dG: torch.Tensor, limit: float) -> None:
    """Clip g (p,) to a norm as torch's `clip_grad_norm_` does, and dG (q, p) with it, both in place; no card is read.
    Tangents that are kept in half precision are clipped in full, one by one."""
    norm = torch.linalg.vector_norm(g)
    scale = limit / (norm + 1e-6)
    long = (scale < 1) & norm.isfinite()
    if g.device.type == "cpu" and not long:  # reading costs nothing here
        return
    for part in (dG,) if dG.dtype == g.dtype else dG.split(1):
        wide = part.to(g.dtype)
        slope = (wide @ g) * (scale / ((norm + 1e-6) * norm))  # -d scale along each tangent
        part.copy_(wide.mul_(torch.where(long, scale, 1)).sub_(torch.where(long, torch.outer(slope, g), 0)))
    g.mul_(torch.where(long, scale, 1))
