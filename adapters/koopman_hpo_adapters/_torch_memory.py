"""One memory for torch and the engine: parameters and optimizer slots are views of flat arrays; what torch shows is true.

Letters: p parameters, q tangent directions, n parameter tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from koopman_hpo import Space, tangent
from koopman_hpo.errors import AdapterError
from koopman_hpo.problem import Array

from . import _torch_device as devices
from . import _torch_options as options

Device = devices.OnHost | devices.OnCard
_CALL = "HyperOptimizer"


class Buffer:
    """Room for a gradient and q tangents on a device: `flat`, (p,) and (q, p), and views of both.

    Attributes:
      g, dG: the gradient and its tangents (q, *shape) in the parameters' shapes.  arrays: both, as the kernels take them.
    """

    def __init__(self, device: Device, shapes: list[torch.Size], q: int, dtype: torch.dtype, kept: torch.dtype):
        p, place = sum(s.numel() for s in shapes), device.place
        self.flat = torch.empty(p, dtype=dtype, device=place), torch.empty((q, p), dtype=kept, device=place)
        self.g, self.dG = (cut(flat, shapes) for flat in self.flat)
        self.arrays = device.view(self.flat[0]), device.view(self.flat[1])


def cut(flat: torch.Tensor, shapes: list[torch.Size]) -> list[torch.Tensor]:
    """Views (..., *shape) of flat (..., p)."""
    parts = flat.split([s.numel() for s in shapes], dim=-1)
    return [part.view((*flat.shape[:-1], *s)) for part, s in zip(parts, shapes, strict=True)]


class Memory:
    """A torch optimizer's parameters and state on the arrays of a `TangentState`.

    Attributes:
      params: the n parameters that are trained, group by group.  shapes: theirs.
      counts: (n,) steps that each has taken: torch skips one that a step does not use.
      even: whether all have taken every step.
      blocks: for each parameter its runs (group, start, stop), as kernels take them.
      device: where they live, all of them.  dtype: theirs.
    """

    def __init__(self, opt: torch.optim.Optimizer, plan: options.Plan, space: Space):
        self._opt, self._plan, self._space = opt, plan, space
        self.groups = [[p for p in group["params"] if p.requires_grad] for group in opt.param_groups]
        self._frozen = [p for group in opt.param_groups for p in group["params"] if not p.requires_grad]
        self.params = [p for group in self.groups for p in group]
        self.shapes = [p.shape for p in self.params]
        self.device, self.dtype = devices.of(self.params[0].device), self.params[0].dtype
        self.counts, self.even = np.zeros(len(self.params), np.int64), True
        self._steps = torch.zeros(len(self.params))  # on the CPU, where torch keeps them too
        cuts = tangent.blocks(tuple(s.numel() for s in self.shapes))
        group = np.repeat(np.arange(len(self.groups)), [len(g) for g in self.groups])
        of = [cuts[cuts[:, 0] == i] for i in range(len(group))]
        self.blocks = [np.column_stack((np.full(len(c), g), c[:, 1:])) for c, g in zip(of, group, strict=True)]

    def flat(self) -> Array:
        """(p,) a copy of the parameters."""
        return np.concatenate([p.detach().cpu().numpy().ravel() for p in self.params])

    @property
    def segments(self) -> tuple[int, ...]:
        """Parameters in each group."""
        return tuple(sum(p.numel() for p in group) for group in self.groups)

    def room(self, q: int, wide: bool = False) -> Buffer:
        """A new buffer beside the parameters; its tangents in the type that the run keeps, or in the parameters'."""
        return Buffer(self.device, self.shapes, q, self.dtype, self.dtype if wide else self.device.tensors[2].dtype)

    def move_in(self) -> None:
        """Make every parameter, and every slot that torch would keep, a view of the engine's arrays."""
        self.theta, flat, self.Z, _ = self.device.tensors
        slots, self._states = cut(flat, self.shapes), []
        for i, (p, place) in enumerate(zip(self.params, cut(self.theta, self.shapes), strict=True)):
            p.data, p.grad = place, None
            group = next(
                g for g, mine in zip(self._opt.param_groups, self.groups, strict=True) if any(p is x for x in mine)
            )
            kept = {name: slots[i][k] for k, name in enumerate(self._plan.slots) if self._keeps(group, name)}
            self._states.append(kept | ({"step": self._steps[i]} if self._plan.counts else {}))
        self._pointers = [p.data_ptr() for p in self.params]
        self._lent: list[torch.Tensor | None] = [None] * len(self.params)
        self._sums: Sequence[torch.Tensor | None] = self._lent
        self._present: list[bool] = []
        self.key: tuple[bytes, int] = (b"", 0)
        self.touched(0)

    def _keeps(self, group: Mapping[str, Any], slot: str) -> bool:
        """Whether torch itself would keep this slot for a parameter of the group."""
        if slot == "momentum_buffer":
            return "momentum" in self._space or group["momentum"] != 0
        return slot != "grad_avg" or group["centered"]

    # -- what torch shows ----------------------------------------------------------------------------------------------

    def touched(self, t: int) -> None:
        """The parameters were written to: a loss graph made before is refused by torch's backward."""
        torch.autograd.graph.increment_version(self.params)
        self._versions = [p._version for p in self.params]
        self.even = bool((self.counts == t).all())

    def show(self, values: Mapping[str, Any] | None) -> None:
        """Bring `param_groups` (unless None: nothing new) and the optimizer's state to what is true now."""
        if values is not None:
            for name in (n for n in values if n in self._plan.rule.defaults):
                spread = np.broadcast_to(values[name], (len(self._opt.param_groups),))
                for group, x in zip(self._opt.param_groups, spread, strict=True):
                    options.write(group, name, float(x))
            self._reading = self._read()
        if self._plan.counts:
            self._steps.copy_(torch.from_numpy(self.counts))
        if self.even and self._present and all(self._present):
            return
        self._present = [self._plan.early or bool(n) for n in self.counts]
        for p, state, there in zip(self.params, self._states, self._present, strict=True):
            if there and state:
                self._opt.state[p] = state
            else:
                self._opt.state.pop(p, None)

    def lend(self, grads: Sequence[torch.Tensor | None]) -> None:
        """Show what was accumulated for a step as the parameters' gradients: copies, nobody's to write to."""
        self._lent, self._sums = [None if g is None else g.clone() for g in grads], grads
        for p, g in zip(self.params, self._lent, strict=True):
            p.grad = g

    def take_back(self) -> None:
        """The sum is used or forgotten; a gradient that is not ours stays, to be refused."""
        for p, g in zip(self.params, self._lent, strict=True):
            if g is not None and p.grad is g:
                p.grad = None
        self._sums = self._lent = [None] * len(self.params)

    def _read(self) -> list[list[float]]:
        return [[options.read(g, n) for n in self._plan.rule.defaults] for g in self._opt.param_groups]

    # -- what must not happen ------------------------------------------------------------------------------------------

    def check(self, over: bool) -> None:
        """Raise where the model or the optimizer was changed behind our back; over: whether tuning is."""
        self._check_lent()
        for p, pointer, version, lent in zip(self.params, self._pointers, self._versions, self._lent, strict=True):
            foreign = p.grad is not None and p.grad is not lent
            if p.data_ptr() != pointer or p._version != version or foreign or not p.requires_grad:
                self._refuse(p, p.data_ptr() == pointer and p.requires_grad, p._version == version)
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                raise AdapterError(
                    f"{_CALL}.step: a parameter has gradient hooks, which tangents cannot follow. Remove them."
                )
        if self._read() != self._reading:
            raise AdapterError(
                f"{_CALL}.step: param_groups were changed or added to from outside, but step trains on with what tuning, "
                f"which is over, has found. To train under a scheduler, or values of your own, use the optimizer from here "
                f"on: opt.zero_grad(), loss.backward(), opt.step(). It has the state and the values found."
                if over
                else f"{_CALL}.step: param_groups were changed or added to from outside, by a scheduler perhaps. A "
                f"schedule belongs into tune: {{'lr': log([.1, .01], knots=(0, 1000))}}, or log(.1, knots=..., "
                f"factors=...)."
            )
        if any(p.requires_grad for p in self._frozen):
            raise AdapterError(
                f"{_CALL}.step: a parameter that was frozen when it was wrapped requires a gradient now. Wrap with all "
                f"that will be trained; a step skips what its loss does not use."
            )
        first, state = self.params[0], self._states[0]
        if state and self._present[0] and self._opt.state.get(first) is not state:
            raise AdapterError(f"{_CALL}.step: the optimizer's state was replaced. Resume with HyperOptimizer.load(path).")

    def _check_lent(self) -> None:
        """Raise where a gradient that is shown is no longer the sum; a card is read only where one was written to."""
        for p, lent, g in zip(self.params, self._lent, self._sums, strict=True):
            if lent is None or g is None or p.grad is not lent or not (lent._version or lent.device.type == "cpu"):
                continue
            if not torch.allclose(lent, g, rtol=0, atol=0, equal_nan=True):
                raise AdapterError(
                    f"{_CALL}.step: the gradient that accumulate shows of a parameter of shape {tuple(p.shape)} was "
                    f"written to, by clipping or backward() perhaps, which tangents cannot follow. Pass clip_norm= to clip "
                    f"and call accumulate, not backward. To go on with the sum as it was, set .grad to None."
                )

    @staticmethod
    def _refuse(p: torch.Tensor, there: bool, same: bool) -> None:
        what = f"{_CALL}.step: a parameter of shape {tuple(p.shape)}"
        if not there:
            raise AdapterError(
                f"{what} was moved, cast, replaced or frozen after wrapping. Change the model first, then make the "
                f"HyperOptimizer."
            )
        if not same:
            raise AdapterError(
                f"{what} was written to in place after wrapping: its tangents know nothing of it. Load or initialise the "
                f"model before wrapping; resume with HyperOptimizer.load(path)."
            )
        raise AdapterError(
            f"{what} has a gradient: backward() was called on a loss. Gradients are made by step(loss): call "
            f"accumulate(loss) to add up several, pass clip_norm= to clip, and set .grad to None."
        )
