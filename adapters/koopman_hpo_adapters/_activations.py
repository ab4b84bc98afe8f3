"""Activations of the MLP: value, slope, and how a tangent passes them on the way back.

A layer's tangent goes forward as `dH = slope dA` and comes back as `dD = slope dT + act''(A) T dA`, T the gradient
that arrives at the layer's output.  For tanh, act''(A) dA = -2 H dH, and for relu it is zero, so dA need not be kept:
`keeps_input` is False, and dA and dH are the same memory.
"""

from __future__ import annotations

import numpy as np

from . import _fused


class Tanh:
    keeps_input = False
    value = staticmethod(_fused.tanh)

    @staticmethod
    def chain(A, H, slope, dH, D):
        """D (1 + q, n, w) <- gradient at A and its tangents, from those at H, in place.

        A: (1 + q, n, w) inputs and their tangents, where kept; H: (n, w + 1); slope: (n, w); dH: (q, n, w).
        """
        _fused.tanh_chain(H, slope, dH, D)


class Relu:
    keeps_input = False
    value = staticmethod(_fused.relu)

    @staticmethod
    def chain(A, H, slope, dH, D):
        """As `Tanh.chain`; the kink has measure zero and bends nothing."""
        _fused.relu_chain(slope, D)


class Gelu:
    keeps_input = True
    value = staticmethod(_fused.gelu)

    @staticmethod
    def chain(A, H, slope, dH, D):
        """As `Tanh.chain`."""
        curve = np.empty_like(slope)
        _fused.gelu_curve(A[0], curve)
        _fused.gelu_chain(curve, slope, A[1:], D)


ACTIVATIONS = {"gelu": Gelu, "relu": Relu, "tanh": Tanh}
