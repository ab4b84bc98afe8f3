"""Arrays and launches: what every CUDA kernel does before it runs.  Nothing here copies or waits."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from numba import cuda

from koopman_hpo.errors import ShapeError

THREADS = 256  # of a block; a power of two, because sums halve it
BLOCKS = 65536  # at most; beyond them the loops stride
OCCUPIED = 128  # blocks below which Numba warns of an idle card: small models are no mistake

Arrays = TypeVar("Arrays", bound=tuple)


def device_array(x: Any) -> Any:
    """A view of x in device memory, which the kernels read and write in place.

    Args:
      x: an array of Numba's, or anything with `__cuda_array_interface__` (a torch CUDA tensor), C-contiguous.
        bfloat16 is seen as uint16, its bits.

    Raises:
      TypeError: x is not in device memory.  ShapeError: it is not contiguous.
    """
    if getattr(x, "__cuda_ndarray__", False):
        if not (x.is_c_contiguous() or _contiguous(x.shape, x.strides, x.dtype.itemsize)):  # which knows sizes 0 and 1
            raise _strided(x.shape)
        return x
    face = getattr(x, "__cuda_array_interface__", None)
    if face is None:
        raise TypeError(
            f"kernels.cuda: needs arrays in device memory, got {type(x).__module__}.{type(x).__name__}. Move it with "
            f"numba.cuda.to_device(x), or pass a torch CUDA tensor."
        )
    strides = face.get("strides")
    if strides is not None and not _contiguous(face["shape"], strides, int(face["typestr"][2:])):
        raise _strided(face["shape"])
    if face["typestr"] == "<V2":  # what torch and ml_dtypes call bfloat16
        face = {**face, "typestr": "<u2"}
    return cuda.from_cuda_array_interface(face, owner=x, sync=False)  # the caller names the stream


def device_arrays(arrays: Arrays) -> Arrays:
    """The named tuple with a `device_array` of each: made once, it saves the conversion at every launch."""
    return type(arrays)(*map(device_array, arrays))


def launch(kernel: Any, grid: tuple[int, int], stream: Any, *args: Any, sums: bool = False, parts: int = 1) -> None:
    """Run a kernel on `grid` blocks of THREADS / parts threads; no blocks, no run.  `sums`: each shares a float64."""
    if grid[0] * grid[1] == 0:
        return
    with warnings.catch_warnings():
        if grid[0] * grid[1] < OCCUPIED:
            warnings.filterwarnings("ignore", ".*Grid size")  # by its text: two classes, and on terminals in bold type
        configured = kernel[grid, THREADS // parts, device_stream(stream), 8 * THREADS if sums else 0]
    configured(*args)


def covering(n: int) -> int:
    """Blocks that give each of n elements a thread, as far as BLOCKS go."""
    return min(-(-n // THREADS), BLOCKS)


def device_stream(stream: Any) -> Any:
    """Numba's stream for a handle, a torch stream or one of Numba's own; 0 is the default stream."""
    handle = getattr(stream, "cuda_stream", stream)  # torch's
    if not isinstance(handle, int) or not handle:
        return handle
    return cuda.external_stream(handle) if hasattr(cuda, "external_stream") else 0  # the simulator has but one


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...], step: int) -> bool:
    if 0 in shape:
        return True
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n > 1 and stride != step:
            return False
        step *= n
    return True


def _strided(shape: tuple[int, ...]) -> ShapeError:
    return ShapeError(
        f"kernels.cuda: arrays must be C-contiguous, got one of shape {tuple(shape)} with gaps or another order. "
        f"Make a contiguous copy of it first."
    )
