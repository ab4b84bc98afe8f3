"""The core's run on the memory of torch's tensors: one step of a torch optimizer, with tangents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from koopman_hpo import Hypergradient, Problem, Space
from koopman_hpo.engine import CoreInner
from koopman_hpo.errors import AdapterError
from koopman_hpo.kernels.arrays import Coefficients
from koopman_hpo.problem import Array

from . import _torch_options as options
from ._torch_device import hosted, like
from ._torch_graph import clipped
from ._torch_losses import Losses, Part, Source
from ._torch_memory import Memory


class TorchInner(CoreInner):
    """An `Inner` for a torch optimizer; its batches are what `source` makes losses of.

    Attributes:
      losses: the user's losses and how they are differentiated.
    """

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        space: Space,
        plan: options.Plan,
        source: Source,
        owned: Mapping[str, torch.Tensor],
        *,
        clip_norm: float | None = None,
        chunk: int | None = None,
        **settings: Any,
    ):
        self._opt, self._source, self._clip = opt, source, clip_norm
        self.memory = memory = Memory(opt, plan, space)
        names = [n for n in space.names if n not in plan.rule.defaults]
        derivatives = (self._gradients, self._outer_gradients)
        problem = Problem(memory.flat(), *derivatives, frozenset(names), memory.segments, self._outer_hvps)
        own = [n for n in plan.rule.defaults if n not in space]
        fixed = {n: np.array([options.read(group, n) for group in opt.param_groups]) for n in own}
        super().__init__(problem, space, plan.rule, fixed, device=memory.device, **settings)
        self._plain, self._kernel = self._kernel, self._update
        memory.move_in()
        hyper = {n: owned[n] if n in owned else _tensor(space, n, memory.params[0]) for n in names}
        self.losses = Losses(source, memory, hyper, len(self._state.Z), chunk)
        self._part: Part | None = None
        self._used: list[bool] = []
        self._key: tuple[bytes, int] = (b"", 0)
        self.show(self.phi)

    # -- what torch shows ----------------------------------------------------------------------------------------------

    def show(self, phi: ArrayLike) -> None:
        """Make `param_groups`, the loss hyperparameters and the optimizer's state those of phi at the step to come."""
        phi = np.asarray(phi, np.float64)
        key, values = self._shown_at(phi), None
        if key != self._key:
            self._key, values = key, self.space.at(phi, self._t).values
            self.losses.set_hyper(values)
        self.memory.show(values)

    def _shown_at(self, phi: Array) -> tuple[bytes, int]:
        return phi.tobytes(), self._t if self.space.scheduled else 0

    def check(self, phi: Array, over: bool = False) -> None:
        """Raise where model, optimizer or tuner were changed behind our back; over: whether tuning is."""
        self.memory.check(over)
        self.losses.check_hyper()
        if self._key != self._shown_at(phi):
            raise AdapterError("HyperOptimizer.step: the tuner was moved from outside. Resume with HyperOptimizer.load().")

    @property
    def settings(self) -> str:
        return super().settings + ("" if self._clip is None else f", clip_norm={self._clip}")

    @property
    def beside(self) -> str:
        if self._clip is not None:
            return "clip_norm"
        if self.losses.statistics.layers:
            return "BatchNorm"
        return "random numbers in its loss (dropout?)" if self.losses.drew else super().beside

    # -- running -------------------------------------------------------------------------------------------------------

    def step(self, phi: ArrayLike, batch: Any, *, tangents: bool = True) -> float:
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                loss = super().step(phi, batch, tangents=tangents)
        finally:
            self.drop()
        self.losses.graph.settle()
        self.memory.touched(self._t)
        self.show(self.phi)
        return loss

    def accumulate(self, phi: ArrayLike, batch: Any, *, tangents: bool = True) -> float:
        """Add a loss's gradient and tangents to those of the step to come; returns the loss."""
        cache, Z = self._prepare(phi), self._seen.Z if tangents else self._seen.none
        along = cache.along if tangents else {n: s[:0] for n, s in cache.along.items()}
        part = self.losses.train(batch, Z, along, own=True)
        kept = self.memory.room(len(Z))
        for into, flat in zip(kept.flat, part.room.flat, strict=True):
            into.copy_(flat)
        self._part = _sum(self._part, part._replace(room=kept))
        self.memory.lend([g if used else None for g, used in zip(kept.g, self._part.used, strict=True)])
        return part.loss

    def drop(self) -> None:
        """Forget what was accumulated for a step."""
        self._part = None
        self.memory.take_back()
        self.losses.statistics.drop()

    @property
    def accumulated(self) -> bool:
        return self._part is not None

    def hypergradient(self, batch: Any) -> Hypergradient:
        found = super().hypergradient(batch)
        if not self.losses.share.any():
            return found
        grad = found.grad + self._along.spread(self.losses.share.astype(np.float64))
        return found._replace(grad=grad, natural=self.space.gradient(self.phi, grad))

    def forget(self, rho: float) -> None:
        super().forget(rho)
        self.losses.statistics.forget(float(rho))

    def snapshot(self) -> dict[str, NDArray]:
        return super().snapshot() | self._own(hosted)

    def mark(self) -> dict[str, Any]:
        return super().mark() | self._own(self.memory.device.kept) | self.losses.statistics.moved()

    def restore(self, snapshot: Mapping[str, NDArray]) -> None:
        super().restore(snapshot)
        self.memory.counts[:] = snapshot["counts"]
        tensors = {name: self.memory.device.back(snapshot[name]) for name in self._tensors()}
        self.losses.statistics.restore(tensors, snapshot.get("moved"))
        self.losses.restore([t for k, t in tensors.items() if k.startswith("random/")], tensors)
        self._part = None
        self.memory.take_back()
        self.losses.graph.settle()
        self.memory.touched(self._t)
        self._key = (b"", 0)  # the loss hyperparameters, too
        self.show(self.phi)

    def _like(self) -> dict[str, NDArray]:
        return super()._like() | self._own(like)

    def _own(self, copied: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
        """What a snapshot holds beside the core's: step counts, tangents of running statistics, random states, buffers."""
        return {"counts": self.memory.counts.copy()} | {name: copied(t) for name, t in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        random = {f"random/{i}": state for i, state in enumerate(self.losses.random())}
        return self.losses.statistics.arrays() | random | self._buffers()

    def _buffers(self) -> dict[str, torch.Tensor]:
        return {f"buffer/{name}": b for name, b in self.losses.buffers().items()}

    def buffers(self) -> dict[str, Any]:
        return {name: self.memory.device.kept(b) for name, b in self._buffers().items()}

    def __getstate__(self) -> dict[str, Any]:
        raise AdapterError(
            "HyperOptimizer: a run lives in the memory of its model's tensors and cannot be copied. Wrap a copy of the "
            "model and its optimizer, and give it the state: hopt.load_state_dict(state)."
        )

    def _update(self, grads: Any, coefficients: Coefficients, blocks: Any, flag: bool, work: Any, state: Any) -> None:
        """The kernel, on the parameters that the step used, each at its own count of steps."""
        used, counts = self._used, self.memory.counts
        if self.memory.even and all(used):
            self._plain(grads, coefficients, blocks, flag, work, state)
        else:
            for count in np.unique(counts[used]):
                cuts = [b for b, n, u in zip(self.memory.blocks, counts, used, strict=True) if u and n == count]
                mine = self._device.put(np.concatenate(cuts))
                self._plain(grads, self._at_count(coefficients, int(count) + 1), mine, flag, work, state)
        counts += used
        if len(state.Z):
            self.losses.statistics.advance()

    def _at_count(self, coefficients: Coefficients, t: int) -> Coefficients:
        """The kernel's rows for parameters whose step is their t-th."""
        assert self._cache is not None
        c, dc = coefficients.c.copy(), coefficients.dc.copy()
        for i in self.rule.timed:
            row = self.rule.row(i, self._cache.duals, t)
            c[i], dc[i] = row.x, row.dx[: dc.shape[1]]
        return Coefficients(c, dc)

    # -- what the engine asks ------------------------------------------------------------------------------------------

    def _gradients(self, theta: Array, hyper: Any, Z: Array, dhyper: Any, batch: Any) -> tuple[float, Array, Array]:
        """`Problem.grad_jvp`: of the step to come where theta is the run's own memory, otherwise at any other point."""
        again = self._source.again(batch)
        if theta is not self._seen.theta:
            with self.losses.elsewhere(theta, hyper, again):
                part = self.losses.train(batch, Z, dhyper, own=False)
            return part.loss, *part.room.arrays
        if again:
            self.losses.set_hyper(hyper)
        part = self._part if batch is None and self._part else self.losses.train(batch, Z, dhyper, own=True)
        part = part if batch is None else _sum(self._part, part)
        if not all(part.used):
            self.losses.check_module()
        if not any(part.used):
            raise AdapterError(
                "HyperOptimizer.step: the loss depends on no parameter that the optimizer trains, so nothing would be "
                "learnt. Compute it with the model whose parameters were given to the optimizer."
            )
        self._used = list(part.used)
        if self._clip is not None:
            clipped(*part.room.flat, self._clip)
        return part.loss, *part.room.arrays

    def _outer_gradients(self, theta: Array, hyper: Any, batch: Any) -> tuple[float, Array, dict[str, Array]]:
        if theta is self._seen.theta:
            with self.losses.hyper_at(hyper):
                return self.losses.outer(batch)
        with self.losses.elsewhere(theta, hyper, True):
            return self.losses.outer(batch)

    def _outer_hvps(self, theta: Array, hyper: Any, V: Array, batch: Any) -> Array:
        return self.losses.outer_hvp(theta, hyper, V, batch)


def _sum(one: Part | None, two: Part) -> Part:
    """Both losses in one; the second's room is written over."""
    if one is None:
        return two
    for into, flat in zip(two.room.flat, one.room.flat, strict=True):
        into.add_(flat)
    return Part(one.loss + two.loss, two.room, [a or b for a, b in zip(one.used, two.used, strict=True)])


def _tensor(space: Space, name: str, like: torch.Tensor) -> torch.Tensor:
    h = space[name]
    start = h.value[0] if h.rows else h.value * h.weights(0)[0]
    return torch.tensor(start, dtype=torch.float64).to(like.detach()).requires_grad_()
