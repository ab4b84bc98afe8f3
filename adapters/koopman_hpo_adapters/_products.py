"""Products with a value and its q tangents at once, in memory laid out beforehand.

A classifier's ten outputs are too narrow for BLAS, and one call a tangent costs more than the arithmetic: narrow
matrices are laid side by side and multiplied as one.  Wide ones are multiplied where they lie, without a copy.
"""

from __future__ import annotations

import math

import numpy as np

from . import _fused

NARROW = 32  # columns below which matrices are laid side by side


class Wide:
    """out <- A B, dout[j] <- A dB[j], the latter added to what is there if `add`."""

    def __init__(self, spare, m, b, q, add):
        """For out (m, b), dout (q, m, b)."""
        self.product = shaped(spare, (q, m, b)) if add else None

    def __call__(self, A, B, dB, out, dout):
        """A: (m, a); B: (a, b); dB: (q, a, b); out: (m, b); dout: (q, m, b)."""
        np.matmul(A, B, out=out)
        if self.product is None:
            np.matmul(A, dB, out=dout)
        else:
            dout += np.matmul(A, dB, out=self.product)


class Narrow:
    """The same with [B, dB[0], dB[1], ...] side by side in one product."""

    def __init__(self, spare, m, a, b, q, add):
        k = 1 + q
        self.add = add
        self.gathered, self.factor = (shaped(spare, shape) for shape in ((a, k, b), (a, k * b)))
        rest = spare[a * k * b :]
        self.product, self.result = (shaped(rest, shape) for shape in ((m, k, b), (m, k * b)))

    def __call__(self, A, B, dB, out, dout):
        _fused.gather(B, dB, self.gathered)
        np.matmul(A, self.factor, out=self.result)
        _fused.scatter(self.product, self.add, out, dout)


def product(spare, m, a, b, q, add):
    """The one that suits (m, a) times (a, b) with q tangents."""
    return Narrow(spare, m, a, b, q, add) if b < NARROW else Wide(spare, m, b, q, add)


def spare_size(m, a, b, q, add) -> int:
    """How many numbers of spare memory `product` takes."""
    return (1 + q) * (a + m) * b if b < NARROW else q * m * b * add


def empty(shape, dtype):
    """Uninitialised memory that starts on a cache line: passes over rows then load whole lines, 2 % of a step."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def shaped(spare, shape):
    """The first numbers of the flat `spare` in this shape."""
    return spare[: math.prod(shape)].reshape(shape)
