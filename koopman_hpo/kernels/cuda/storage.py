"""How tangents are kept: in the arithmetic's own type, or in half of float32, as float16 or bfloat16.

Kernels read a stored tangent with `load` and write one with `store`; the arithmetic between them is that of the parameters.
bfloat16 is kept as uint16, its bits: the upper half of a float32, rounded to nearest, ties to even.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from koopman_hpo.errors import ShapeError


class Storage(NamedTuple):
    load: Any
    store: Any


@cuda.jit(device=True)
def _same(x):
    return x


@cuda.jit(device=True)
def _from_float16(x):
    return np.float32(x)


@cuda.jit(device=True)
def _to_float16(x):
    return np.float16(x)


@cuda.jit(device=True)
def _from_bfloat16(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@cuda.jit(device=True)
def _to_bfloat16(x):
    bits = np.float32(x).view(np.uint32)
    if x != x:  # noqa: PLR0124 - a NaN, whose rounding could carry into infinity
        return np.uint16((bits >> np.uint32(16)) | np.uint32(64))
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


_FULL = Storage(_same, _same)
_HALF = {
    np.dtype(np.float16): Storage(_from_float16, _to_float16),
    np.dtype(np.uint16): Storage(_from_bfloat16, _to_bfloat16),
}


def storage(dtype: np.dtype, arithmetic: np.dtype) -> Storage:
    """How an array of `dtype` is read and written by a kernel that computes in `arithmetic`.

    Raises:
      ShapeError: no kernel for that pair.
    """
    if dtype == arithmetic and arithmetic in (np.float32, np.float64):
        return _FULL
    if arithmetic == np.float32 and dtype in _HALF:
        return _HALF[np.dtype(dtype)]
    raise ShapeError(
        f"kernels.cuda: parameters must be float32 or float64 and tangents of the same type, or float16 or bfloat16 "
        f"(as uint16) beside float32; got parameters of {arithmetic} and tangents of {dtype}."
    )
