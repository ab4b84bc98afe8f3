"""Where a torch model lives: the core's device, whose arrays are views of torch's tensors, with nothing copied.

All that differs between the CPU and a card is here: `view` and `tensor`, the same memory as an array of the kernels and as
a tensor; whose random numbers a model draws; and whether a loss is read at once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from koopman_hpo import devices
from koopman_hpo.kernels.arrays import TangentState
from koopman_hpo.problem import Array

Tensors = tuple[torch.Tensor, ...]  # theta, slots, Z, dslots, as in a TangentState


class OnHost(devices.Host):
    """NumPy's arrays on the memory of CPU tensors.

    Attributes:
      place: torch's name of the device.  tensors: the run's state, as tensors.
    """

    def __init__(self, place: torch.device):
        self.place = place

    def init(self, params: Array, k: int, q: int, fill: float, kept: str | None) -> TangentState:
        state = super().init(params, k, q, fill, kept)
        self.tensors: Tensors = tuple(map(torch.from_numpy, state))
        return state

    def view(self, tensor: torch.Tensor) -> Array:
        """The tensor's memory as the kernels take it; the tensor is contiguous."""
        return tensor.numpy()

    def tensor(self, a: Array) -> torch.Tensor:
        """An array that the engine shows, as a tensor."""
        return torch.from_numpy(a.copy())  # what is locked would warn

    def kept(self, tensor: torch.Tensor) -> Array:
        """A copy, where it is, to go back to."""
        return hosted(tensor)

    def back(self, a: Any) -> torch.Tensor:
        """What was kept, or comes from a file, as a tensor to copy from."""
        return torch.from_numpy(np.array(a))

    def loss(self, loss: torch.Tensor) -> Any:
        """What a training step returns."""
        return float(loss.detach())

    def random(self) -> list[torch.Tensor]:
        """States of torch's own generators that a model here may draw from."""
        return [torch.get_rng_state()]

    def set_random(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])

    def prepare(self, model: torch.nn.Module) -> None:
        """Make the model's layers such that their gradients have derivatives."""


class OnCard(devices.Card):
    """Numba's arrays on the memory of CUDA tensors, on torch's current stream; nothing waits until a number is read."""

    def __init__(self, place: torch.device):
        super().__init__()
        self.place = place
        self._open()

    def _open(self) -> None:
        self._cuda.select_device(self.place.index)
        self.stream = lambda: torch.cuda.current_stream(self.place).cuda_stream or devices.LEGACY

    def init(self, params: Array, k: int, q: int, fill: float, kept: str | None) -> TangentState:
        theta, p = self._sent(params), params.size
        new = partial(theta.new_zeros, dtype=theta.dtype if kept is None else getattr(torch, kept))
        self.tensors: Tensors = (theta, theta.new_full((k, p), fill), new((q, p)), new((k, q, p)))
        return TangentState(*map(self.view, self.tensors))

    def view(self, tensor: torch.Tensor) -> Any:
        return self._kernels.device_array(tensor)

    def tensor(self, a: Any) -> torch.Tensor:
        return torch.as_tensor(a, device=self.place)

    def put(self, a: Array) -> Any:
        return self.view(self._sent(a))

    def keep(self, a: Any) -> Any:
        return self.view(self.tensor(a).clone())

    def unread(self, call: str, name: str, x: Any) -> Any:
        return x if isinstance(x, torch.Tensor) else super().unread(call, name, x)

    def kept(self, tensor: torch.Tensor) -> Any:
        if tensor.device != self.place:  # a buffer that stayed on the CPU
            return hosted(tensor)
        return self.view(tensor.detach().clone(memory_format=torch.contiguous_format))

    def back(self, a: Any) -> torch.Tensor:
        return self.tensor(a) if hasattr(a, "copy_to_host") else torch.from_numpy(np.array(a))

    def loss(self, loss: torch.Tensor) -> Any:
        return loss.detach().double()

    def random(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), torch.cuda.get_rng_state(self.place)]

    def set_random(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        torch.cuda.set_rng_state(states[1], self.place)

    def prepare(self, model: torch.nn.Module) -> None:
        for layer in model.modules():
            if isinstance(layer, torch.nn.RNNBase):
                plain = _Plain()
                layer.register_forward_pre_hook(plain)
                layer.register_forward_hook(plain, always_call=True)

    def _sent(self, a: Array) -> torch.Tensor:
        return torch.tensor(a).to(self.place, non_blocking=True)


class _Plain:
    """Hooks before and after a recurrent layer that leave cuDNN out, whose kernels have no second derivative, and in
    evaluation mode not even a first."""

    def __init__(self) -> None:
        self._within: list[Any] = []

    def __call__(self, layer: Any, args: Any, *out: Any) -> None:
        if out:
            self._within.pop().__exit__(None, None, None)
        else:
            self._within.append(torch.backends.cudnn.flags(enabled=False))
            self._within[-1].__enter__()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Plain, ()


def hosted(tensor: torch.Tensor) -> Array:
    """A copy on the host."""
    return tensor.detach().cpu().numpy().copy()


def like(tensor: torch.Tensor) -> Array:
    """A NumPy array of its shape and type, which takes no memory and holds nothing."""
    return np.broadcast_to(np.empty((), torch.empty((), dtype=tensor.dtype).numpy().dtype), tuple(tensor.shape))


def of(place: torch.device) -> OnHost | OnCard:
    """The device of a model's parameters.  Raises RuntimeError: a card that Numba cannot use."""
    return OnHost(place) if place.type == "cpu" else OnCard(place)
