"""The user's losses in PyTorch, their gradients, and the tangents of these by whatever means the layers allow."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from koopman_hpo.errors import AdapterError
from koopman_hpo.oracle import central_hvp
from koopman_hpo.problem import Array

from ._differences import along as differences
from ._torch_forward import Columns
from ._torch_graph import DIFFERENCES, Grads, Graph, NotTwice, log, write
from ._torch_memory import Buffer, Memory, cut
from ._torch_statistics import Seen, Statistics, strict

_CALL = "HyperOptimizer"


class Source(NamedTuple):
    """How the user's losses are asked for.

    Fields:
      train: batch -> scalar tensor.  val: likewise, the outer loss.
      again: whether the training loss of this batch can be asked for a second time.
      module: the model, if it is known.  generators: random generators beside torch's own.
    """

    train: Callable[[Any], torch.Tensor]
    val: Callable[[Any], torch.Tensor]
    again: Callable[[Any], bool]
    module: torch.nn.Module | None
    generators: tuple[torch.Generator, ...]


class Part(NamedTuple):
    """Gradient and tangents of one loss; several may add up to a step."""

    loss: Any  # a float, or a tensor that nobody has waited for
    room: Buffer  # the gradient, then its tangents
    used: Sequence[bool]  # (n,) which parameters the loss depends on


class World(NamedTuple):
    """What a forward pass moves beside the graph."""

    random: list[torch.Tensor]
    buffers: list[torch.Tensor]


class Losses:
    """Derivatives of the user's losses on the tensors that he trains.

    Attributes:
      hyper: {name: tensor} of the loss hyperparameters, natural values.  graph: says how tangents are made.
      share: (s,) the part of the last hypergradient that goes through running statistics.
    """

    def __init__(self, source: Source, memory: Memory, hyper: dict[str, torch.Tensor], s: int, chunk: int | None):
        self._source, self._memory, self.hyper = source, memory, hyper
        if source.module is not None:
            memory.device.prepare(source.module)
        self.statistics, self.share = Statistics(source.module, s), np.zeros(s)
        self.graph = Graph([*memory.params, *hyper.values()], chunk)
        self._size = 0 if source.module is None else len(list(source.module.parameters()))
        self._rooms = {q: memory.room(q) for q in (0, s)}
        self._written: dict[str, tuple[bytes, int]] = {}
        self._Z = cut(memory.Z, memory.shapes)
        self._math = self._differ = self._probing = self._looked = self.drew = False

    # -- the world -----------------------------------------------------------------------------------------------------

    def buffers(self) -> dict[str, torch.Tensor]:
        module = self._source.module
        return {} if module is None else dict(module.named_buffers())

    def random(self) -> list[torch.Tensor]:
        """Copies of the random states."""
        return [*self._memory.device.random(), *(g.get_state() for g in self._source.generators)]

    def world(self) -> World:
        """Copies of the random states and the model's buffers."""
        return World(self.random(), [b.detach().clone() for b in self.buffers().values()])

    def back_to(self, world: World) -> None:
        n = len(world.random) - len(self._source.generators)
        self._memory.device.set_random(world.random[:n])
        for generator, state in zip(self._source.generators, world.random[n:], strict=True):
            generator.set_state(state)
        for b, kept in zip(self.buffers().values(), world.buffers, strict=True):
            b.data.copy_(kept)  # not b itself: a graph that holds it would be refused by backward

    def restore(self, random: list[torch.Tensor], arrays: Mapping[str, torch.Tensor]) -> None:
        """Random states and buffers of a snapshot; the loss hyperparameters are to be set anew."""
        self.back_to(World(random, [arrays[f"buffer/{name}"] for name in self.buffers()]))
        self._written.clear()  # whatever the user wrote

    def set_hyper(self, values: Mapping[str, Any]) -> None:
        """Write the loss hyperparameters' natural values, where they are others."""
        for name, h in self.hyper.items():
            value = _value(values[name], h)
            if self._written.get(name) != (key := value.numpy().tobytes(), h._version):
                with torch.no_grad():
                    h.copy_(value, non_blocking=True)
                self._written[name] = key, h._version

    def check_hyper(self) -> None:
        """Raise where a loss hyperparameter was written to or frozen; on a card its values are not read."""
        for name, h in self.hyper.items():
            key, version = self._written[name]
            read = h.device.type == "cpu" and h.detach().numpy().tobytes() != key
            if h._version != version or read or not h.requires_grad:
                raise AdapterError(
                    f"{_CALL}.step: the tensor of {name} was written to or frozen from outside, but its value is the "
                    f"tuner's. Give its start before wrapping: tune={{{name!r}: tensor}}. To go on with the tuner's value, "
                    f"call load_state_dict(state_dict())."
                )

    @contextmanager
    def hyper_at(self, values: Mapping[str, Any]) -> Iterator[None]:
        """Within, the loss hyperparameters have other values; graphs made before stay good."""
        kept = [h.detach().clone() for h in self.hyper.values()]
        for name, h in self.hyper.items():
            h.data.copy_(_value(values[name], h), non_blocking=True)
        try:
            yield
        finally:
            for h, value in zip(self.hyper.values(), kept, strict=True):
                h.data.copy_(value)

    @contextmanager
    def elsewhere(self, theta: Array, hyper: Mapping[str, Any], again: bool) -> Iterator[None]:
        """Within, the model has other parameters; after, everything is as before."""
        now, at = self._memory.theta, self._memory.device.tensor(theta)
        kept, world = now.clone(), self.world()
        if not again and not torch.equal(at, now):
            raise AdapterError(
                f"{_CALL}: derivatives away from the current parameters need the loss as a function, `lambda: loss`, "
                f"not its graph."
            )
        self._probing = True
        try:
            with self.statistics.apart(on=False), self.hyper_at(hyper):
                now.copy_(at)
                yield
        finally:
            self._probing = False
            now.copy_(kept)
            self.drew = self.drew or not all(map(torch.equal, self.random(), world.random))
            self.back_to(world)

    # -- training loss -------------------------------------------------------------------------------------------------

    def train(self, batch: Any, Z: Array, dhyper: Mapping[str, Array], own: bool) -> Part:
        """Gradient of the training loss and its tangents along Z (q, p) and dhyper; own: Z is the run's own memory.

        The result is of the moment: the next call writes over it, unless it was asked for `elsewhere`.
        """
        room = self._memory.room(len(Z), wide=True) if self._probing else self._rooms[len(Z)]
        if not len(Z):
            return self._by_graph(batch, None, room)
        if self._differ:
            return self._by_differences(batch, Z, dhyper, room)
        along = self._Z if own else cut(self._memory.device.tensor(Z), self._memory.shapes)
        along = [*along, *(_column(dhyper[name], len(Z), h) for name, h in self.hyper.items())]
        before = self.world() if self._source.again(batch) and not self.graph.path else None
        try:
            return self._by_graph(batch, along, room)
        except NotTwice:
            if before is None:
                raise
            self.back_to(before)
        try:
            self._math = True  # the usual reason is attention, whose plain kernel can be differentiated twice
            part = self._by_graph(batch, along, room)
            log.info("torch: training losses are computed under attention's MATH kernel")
            return part
        except NotTwice:
            self._math, self._differ = False, True
            self.back_to(before)
        return self._by_differences(batch, Z, dhyper, room)

    def _loss(self, batch: Any) -> torch.Tensor:
        kernel = sdpa_kernel(SDPBackend.MATH) if self._math else nullcontext()
        with torch.enable_grad(), kernel:
            return scalar(f"{_CALL}.step", self._source.train(batch))

    def _by_graph(self, batch: Any, along: Columns | None, room: Buffer) -> Part:
        """On the loss graph; the gradient alone where along is None."""
        n, loss = len(self._memory.params), self._loss(batch)
        if along is None:
            grads = self.graph.gradient(loss, double=self._probing)
        else:
            grads = self._tangents(loss, self.statistics.take(), along, room.dG)
        write(room.g, grads[:n])
        return Part(self._memory.device.loss(loss), room, [g is not None for g in grads[:n]])

    def _tangents(self, loss: torch.Tensor, seen: Sequence[Seen], along: Columns, out: Columns) -> Grads:
        """The gradient and its tangents, through BatchNorm's running statistics and with theirs."""
        trained, fixed = [c for c in seen if c.zero is None], [c for c in seen if c.zero is not None]
        moved = [c for c in trained if c.x.requires_grad]
        ahead: Any = None
        with self.statistics.still():
            if not fixed and all(c.node is not None for c in moved):
                ahead = self.graph.ahead(loss, along, out, [c.node for c in moved])
            if ahead is None:
                ahead = self._twice(loss, moved, fixed, along, out)
                self.statistics.refuse(seen, ahead[0][len(self.graph.inputs) :])
        news = dict(zip(map(id, moved), ahead[1], strict=True))
        self.statistics.due(trained, [news.get(id(c)) for c in trained])  # in the order of the calls
        return ahead[0]

    def _twice(
        self, loss: torch.Tensor, moved: Sequence[Seen], fixed: Sequence[Any], along: Columns, out: Columns
    ) -> tuple[Grads, Sequence[torch.Tensor | None]]:
        """The same by double backward."""
        zeros = []
        with torch.enable_grad():
            for call in moved:
                zero, term = self.statistics.term(call)
                zeros.append(zero)
                loss = loss + term
        grads = self.graph.gradient(loss, [c.zero for c in fixed], double=True)
        news = [z.new_empty((len(along[0]), *z.shape), requires_grad=False) for z in zeros]
        along = [*along, *(self.statistics.tangents[c.layer] for c in fixed)]
        self.graph.push(grads, along, [*self._memory.params, *zeros], [*out, *news])
        return grads, news

    def _by_differences(self, batch: Any, Z: Array, dhyper: Mapping[str, Array], room: Buffer) -> Part:
        if self.statistics.layers:
            raise AdapterError(f"{_CALL}.step: central differences cannot follow BatchNorm's running statistics.")
        if not self._source.again(batch):
            raise NotTwice("this loss came as a graph.")
        before, now, Z = self.world(), self._memory.theta, self._memory.device.read(Z)
        theta, hyper = now.cpu().numpy().copy(), {n: _natural(h) for n, h in self.hyper.items()}

        def gradient(at: Array, values: Mapping[str, Any]) -> Array:
            now.copy_(torch.from_numpy(at))
            self.set_hyper(values)
            self.back_to(before)
            return self._by_graph(batch, None, self._memory.room(0)).room.flat[0].cpu().numpy()

        try:
            found = np.empty((len(Z), theta.size), theta.dtype)
            for j, z in enumerate(Z):
                differences(gradient, theta, hyper, z, {n: d[j] for n, d in dhyper.items()}, found[j])
            room.flat[1].copy_(torch.from_numpy(found))
            self.graph.path = self.graph.path or DIFFERENCES
            moved = [j for j, z in enumerate(Z) if z.any() or any(d[j].any() for d in dhyper.values())]
            if moved and self.graph.path == DIFFERENCES:  # at the first step tangents may be zero
                j = moved[0]
                self._report(gradient, theta, hyper, Z[j], {n: d[j] for n, d in dhyper.items()}, found[j])
        finally:
            now.copy_(torch.from_numpy(theta))
            self.set_hyper(hyper)
            self.back_to(before)
        return self._by_graph(batch, None, room)

    def _report(self, gradient: Any, theta: Array, hyper: Any, z: Array, d: Any, found: Array) -> None:
        """Say the path and the error of the differences, against those of half the step."""
        half = np.empty_like(theta)
        differences(gradient, theta, hyper, z, d, half, shrink=0.5)
        size = float(np.linalg.norm(half))
        self.graph.say(f"{DIFFERENCES}, relative error about {np.linalg.norm(found - half) / size if size else 0:.0e}")

    def check_module(self) -> None:
        """Raise where the model has gained or lost a parameter."""
        if self._source.module is None:
            return
        present = {id(p) for p in self._source.module.parameters()}
        if len(present) != self._size or not all(id(p) in present for p in self._memory.params):
            raise AdapterError(
                f"{_CALL}.step: the model has other parameters than when it was wrapped, {len(present)} of them, then "
                f"{self._size}. Change the model first, then make the optimizer and the HyperOptimizer."
            )

    # -- outer loss ----------------------------------------------------------------------------------------------------

    def outer(self, batch: Any) -> tuple[float, Array, dict[str, Array]]:
        """The outer loss, its gradient (p,), and its direct derivatives; keeps `share`."""
        n = len(self._memory.params)
        with self.graph.apart(), self.statistics.apart(on=True), self._outer_loss(batch) as loss:
            seen = self.statistics.take()
            grads = self.graph.gradient(loss, [self.statistics.at(call) for call in seen], double=False)
        into = self._memory.room(0)
        write(into.g, grads[:n])
        hyper = zip(self.hyper, grads[n : n + len(self.hyper)], strict=True)
        direct = {name: _natural(g) for name, g in hyper if g is not None}
        self.share = self.statistics.pull(seen, grads[n + len(self.hyper) :])
        return float(loss.detach()), into.arrays[0], direct

    @contextmanager
    def _outer_loss(self, batch: Any) -> Iterator[torch.Tensor]:
        """Within, the model's modules are in the modes of val_loss: what is checkpointed runs again on the way back."""
        self.check_module()
        modules = [] if self._source.module is None else list(self._source.module.modules())
        modes, versions = [m.training for m in modules], [b._version for b in self.buffers().values()]
        try:
            with torch.enable_grad(), self._strict() as quiet:
                loss = scalar(f"{_CALL}: val_loss", self._source.val(batch))
            if versions != [b._version for b in self.buffers().values()]:
                raise AdapterError(
                    f"{_CALL}: val_loss changed the model's buffers. Call model.eval() in it, train() after."
                )
            self._looked = True
            if self._source.module is None:
                _left(quiet)
            yield loss
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode

    def _strict(self) -> AbstractContextManager[list[Any]]:
        """Looks at the layers of val_loss, the first time."""
        return nullcontext([]) if self._looked else strict(self.statistics.layers)

    def outer_hvp(self, theta: Array, hyper: Mapping[str, Any], V: Array, batch: Any) -> Array:
        """(n, p) Hessian of the outer loss at theta times each row of V (n, p)."""
        into = self._memory.room(len(V), wide=True)
        try:
            with self.graph.apart(), self.elsewhere(theta, hyper, True), self._outer_loss(batch) as loss:
                along = cut(self._memory.device.tensor(V), self._memory.shapes)
                along = [*along, *(h.new_zeros((len(V), *h.shape)) for h in self.hyper.values())]
                self.graph.both(loss, along, into.dG)
            return into.arrays[1]
        except NotTwice:
            put, read = self._memory.device.put, self._memory.device.read
            return put(central_hvp(lambda at: read(self._outer_at(put(at), hyper, batch)), read(theta), read(V)))

    def _outer_at(self, theta: Array, hyper: Mapping[str, Any], batch: Any) -> Array:
        with self.elsewhere(theta, hyper, True):
            return self.outer(batch)[1]


def _left(quiet: Sequence[torch.nn.Module]) -> None:
    """Warn where val_loss has left layers in evaluation mode, which nobody puts back."""
    names = sorted({type(m).__name__ for m in quiet if not m.training})
    if names:
        warnings.warn(
            f"{_CALL}: val_loss leaves {', '.join(names)} in evaluation mode, so that training goes on without its random "
            f"numbers. Pass model=..., whose modes are put back, or call model.train() at the end of val_loss.",
            UserWarning,
            stacklevel=2,
        )


def _value(value: Any, h: torch.Tensor) -> torch.Tensor:
    """A natural value in a hyperparameter's dtype, rounded once."""
    return torch.as_tensor(np.asarray(value, np.float64)).to(h.dtype)


def _column(tangents: Array, q: int, h: torch.Tensor) -> torch.Tensor:
    """(q, *shape) tangents of a loss hyperparameter in its dtype."""
    rows = torch.as_tensor(np.array(tangents), dtype=h.dtype).reshape(q, *h.shape)
    return rows.to(h.device, non_blocking=True)


def _natural(h: torch.Tensor) -> Array:
    """A copy on the host, float64."""
    return h.detach().cpu().numpy().astype(np.float64)


def scalar(call: str, loss: Any) -> torch.Tensor:
    """The loss as a tensor of no dimensions, or an error."""
    fits = isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.is_floating_point()
    if not fits or loss.grad_fn is None:
        graph = " without a graph" if isinstance(loss, torch.Tensor) and loss.grad_fn is None else ""
        what = f"{tuple(loss.shape)} of {loss.dtype}{graph}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise AdapterError(f"{call}: needs a scalar loss tensor with its graph, got {what}. Do not call backward or item.")
    return loss if loss.dim() == 0 else loss.reshape(())
