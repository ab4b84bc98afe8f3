"""Where a run's arrays live, and what the engine does with them there: NumPy's memory, or that of a card.

Both classes have the same methods.  What is small, q or a group's values, is made on the host; what has p in its shape
stays where it lives, until it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checks, tangent
from .errors import AdapterError, choice, short
from .kernels import DEVICES, for_device
from .kernels.arrays import Coefficients, Grads, TangentState
from .optimizers import Rule
from .problem import Array
from .unread import Slab

HALF = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16)}  # bfloat16 by its bits: NumPy has none
SHARES = 512  # of a sum over parameters, on a card
LOSSES = 512  # that a card keeps until somebody looks at one of them
LEGACY = 1  # CUDA's handle of the default stream: unlike 0, Numba copies on it without waiting


class Host:
    """NumPy's memory."""

    name = "cpu"

    def init(self, params: Array, k: int, q: int, fill: float, kept: str | None) -> TangentState:
        """The state before the first step, where it lives, with tangents kept in half precision if a name is given."""
        return tangent.init(params, k, q, fill)

    def still(self, state: TangentState) -> TangentState:
        """The same state without tangent directions: stepping it is plain training."""
        return tangent.still(state)

    def kernel(self, name: str) -> Callable[..., None]:
        return getattr(for_device(self.name), name)

    def layout(self, cuts: NDArray[np.int64], rule: Rule, dtype: np.dtype) -> tuple[Any, bool, Any]:
        """The kernel's (blocks, flag, work)."""
        return cuts, rule.flag, np.empty((rule.scratch, int((cuts[:, 2] - cuts[:, 1]).max())), dtype)

    def shown(self, a: Array) -> Array:
        """What a model sees of an array of the engine's: here it cannot be written to."""
        return checks.locked(a)

    def get(self, a: Array) -> Array:
        """A copy on the host, as it is kept."""
        return a.copy()

    def keep(self, a: Array) -> Array:
        """A copy where it lives."""
        return a.copy()

    def read(self, a: Array) -> Array:
        """On the host, to look at, in full precision: the array itself where it is there."""
        return a

    def put(self, a: Array) -> Array:
        """An array of the host, where the run's own live."""
        return a

    def assign(self, state: TangentState, source: TangentState) -> None:
        tangent.assign(state, source)

    def forget(self, state: TangentState, rho: float) -> None:
        tangent.forget(state, rho, for_device(self.name).scale)

    def project(self, state: TangentState, dE_dtheta: Array) -> Array:
        """(q,) float64 on the host: `Z dE_dtheta`."""
        return tangent.hypergradient(state, dE_dtheta).astype(np.float64)

    def norm(self, Z: Array) -> float:
        return float(np.linalg.norm(Z))

    def finite(self, g: Array) -> bool:
        return bool(np.isfinite(g).all())

    def number(self, call: str, name: str, x: Any) -> float:
        """A model's number, a value of a loss say."""
        return checks.number(call, name, x)

    def unread(self, call: str, name: str, x: Any) -> Any:
        """A training loss: here a float, elsewhere perhaps a number that nobody has waited for."""
        return checks.number(call, name, x)

    def array(self, call: str, name: str, a: Any, shape: tuple[int, ...], dtype: np.dtype, *others: np.dtype) -> Array:
        """A model's array, checked; `others` will do beside `dtype` where nothing is converted.  Raises AdapterError."""
        return checks.array(call, name, a, shape, dtype)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        return np.empty(shape, dtype)

    def write(self, into: Array, source: Array) -> None:
        into[...] = source


class Card:
    """The memory of an NVIDIA card.  Models give and take anything with `__cuda_array_interface__`.

    Only a hypergradient (q values) and what is asked for crosses to the host, and a loss that the model gives as a number
    there; only coefficients that have changed cross to the card.  Arrays that a model is shown are the engine's own, and
    not protected: it must not write to them.

    Attributes:
      stream: gives the stream to run on, at every call; the default stream unless an adapter sets it.
    """

    name = "cuda"

    def __init__(self) -> None:
        self._kernels = for_device("cuda")
        from numba import cuda

        self._cuda = cuda
        self.stream: Callable[[], Any] = lambda: LEGACY
        self._losses: dict[np.dtype, Slab] = {}
        self._rows: dict[tuple[int, ...], tuple[Coefficients, list[bytes]]] = {}
        self._sums: dict[int, tuple[Any, Any]] = {}

    def init(self, params: Array, k: int, q: int, fill: float, kept: str | None) -> TangentState:
        return TangentState(*map(self.put, tangent.init(params, k, q, fill, None if kept is None else HALF[kept])))

    def still(self, state: TangentState) -> TangentState:
        dtype, p, k = state.Z.dtype, state.theta.size, len(state.slots)
        none = (self._cuda.device_array(shape, dtype) for shape in ((0, p), (k, 0, p)))
        return TangentState(state.theta, state.slots, *none)

    def kernel(self, name: str) -> Callable[..., None]:
        launch = getattr(self._kernels, name)

        def step(grads: Grads, rows: Coefficients, blocks: Any, flag: bool, work: Any, state: TangentState) -> None:
            launch(grads, self._uploaded(rows), blocks, flag, work, state, stream=self._on())

        return step

    def layout(self, cuts: NDArray[np.int64], rule: Rule, dtype: np.dtype) -> tuple[Any, bool, Any]:
        return self.put(cuts), rule.flag, None

    def shown(self, a: Any) -> Any:
        return a

    def wide(self, a: Array) -> Array:
        if a.dtype == HALF["bfloat16"]:
            return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return a.astype(np.float32) if a.dtype == HALF["float16"] else a

    def get(self, a: Any) -> Array:
        on = self._on()
        out = a.copy_to_host(stream=on)
        if on:  # the copy may be under way
            on.synchronize()
        return out

    def keep(self, a: Any) -> Any:
        out = self.empty(a.shape, a.dtype)
        self.write(out, a)
        return out

    def read(self, a: Any) -> Array:
        return self.wide(self.get(a))

    def put(self, a: NDArray) -> Any:
        return self._cuda.to_device(np.ascontiguousarray(a), stream=self._on()).bind(0)  # else its readers would not wait

    def assign(self, state: TangentState, source: TangentState) -> None:
        for into, out in zip(state, source, strict=True):
            self.write(into, out)

    def forget(self, state: TangentState, rho: float) -> None:
        tangent.forget(state, rho, partial(self._kernels.scale, stream=self._on()))

    def project(self, state: TangentState, dE_dtheta: Any) -> Array:
        return self._product(state.Z, dE_dtheta)

    def norm(self, Z: Any) -> float:
        return float(np.sqrt(self._product(Z.reshape(1, Z.size), Z.reshape(Z.size))[0]))

    def finite(self, g: Any) -> bool:
        return bool(np.isfinite(self._product(g.reshape(1, g.size), g)[0]))

    def number(self, call: str, name: str, x: Any) -> float:
        return checks.number(call, name, x.item() if hasattr(x, "item") else self.get(x) if _there(x) else x)

    def unread(self, call: str, name: str, x: Any) -> Any:
        one = self._kernels.device_array(x) if _there(x) else None
        if one is None or one.size != 1 or one.dtype not in (np.float32, np.float64):
            return self.number(call, name, x)
        if one.dtype not in self._losses or self._losses[one.dtype].full:
            self._losses[one.dtype] = Slab(self.empty((LOSSES,), one.dtype), self.write, self.get)
        return self._losses[one.dtype].keep(one)

    def array(self, call: str, name: str, a: Any, shape: tuple[int, ...], dtype: np.dtype, *others: np.dtype) -> Any:
        try:
            out = self._kernels.device_array(a)
        except TypeError as error:
            raise AdapterError(f"{call}: {name} must lie on the device, got {short(a)} ({error})") from None
        if tuple(out.shape) != shape or out.dtype not in (dtype, *others):
            what = " or ".join(dict.fromkeys(map(str, (dtype, *others))))
            raise AdapterError(f"{call}: {name} must be {shape} of {what}, got {tuple(out.shape)} of {out.dtype}.")
        return out

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return self._cuda.device_array(tuple(shape), dtype)

    def write(self, into: Any, source: Any) -> None:
        if into.size:
            into.copy_to_device(source, stream=self._on())

    def _on(self) -> Any:
        return self._kernels.device_stream(self.stream())

    def _uploaded(self, rows: Coefficients) -> Coefficients:
        """The kernel's coefficients on the card, written there only where they have changed."""
        rows = Coefficients(*map(np.ascontiguousarray, rows))
        if rows.dc.shape not in self._rows:
            self._rows[rows.dc.shape] = Coefficients(*map(self.put, rows)), [a.tobytes() for a in rows]
        there, known = self._rows[rows.dc.shape]
        for i, (into, a) in enumerate(zip(there, rows, strict=True)):
            if a.tobytes() != known[i]:
                self.write(into, a)
                known[i] = a.tobytes()
        return there

    def _product(self, Z: Any, x: Any) -> Array:
        """(q,) on the host: Z x."""
        q = len(Z)
        if q not in self._sums:
            self._sums[q] = self.empty((SHARES, q), np.dtype(np.float64)), self.empty((q,), np.dtype(np.float64))
        work, out = self._sums[q]
        self._kernels.project(Z, x, work, out, stream=self._on())
        return self.get(out)


def _there(x: Any) -> bool:
    """Whether x is an array in a card's memory."""
    return getattr(x, "__cuda_ndarray__", False) or hasattr(x, "__cuda_array_interface__")


def of(name: Any) -> Host | Card:
    """The device of that name; an adapter brings its own.

    Raises:
      HyperparameterError: no such one.  RuntimeError: no card.
    """
    if isinstance(name, Host | Card):
        return name
    return Host() if choice("inner", "device", name, DEVICES) == "cpu" else Card()
