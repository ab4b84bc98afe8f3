"""The losses of the ready models: value, residual, and the tangent of the residual along q directions.

Letters: n examples, c outputs, q tangents.  Each example i has a weight w_i; a loss is `sum_i w_i loss_i`, so that
w = 1 / n makes a plain mean.  With outputs A (n, c), `R = d loss_i / dA_i` is the residual and `D = w R` the gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import _fused


class Residual(NamedTuple):
    """What a loss leaves at the outputs.  `P` is what its tangent needs: the probabilities, or nothing."""

    P: Any  # (n, c)
    R: Any  # (n, c) gradient of each example's own loss
    D: Any  # (n, c) weight * R


class CrossEntropy:
    """`loss_i = -sum_c target_ic log softmax(A_i)_c`, target = (1 - s) onehot(y_i) + s / c, s the label smoothing."""

    name = "cross_entropy"

    @staticmethod
    def value(A, y, smoothing, weight, out):
        """Returns (loss, -1), or (0, i) where y[i] is no class; fills the `Residual` `out`."""
        return _fused.cross_entropy(A, y, smoothing, weight, out.P, out.R, out.D)

    @staticmethod
    def tangents(residual, weight, dA):
        """dA (q, n, c) <- d(D) along the outputs' tangents dA: `w (diag P - P P') dA`, in place."""
        _fused.cross_entropy_tangents(residual.P, weight, dA)


class SquaredError:
    """`loss_i = 1/2 |A_i - y_i|^2`, summed over the outputs of an example."""

    name = "squared_error"

    @staticmethod
    def value(A, y, smoothing, weight, out):
        np.subtract(A, y, out=out.R)
        np.multiply(out.R, weight[:, None], out=out.D)
        return 0.5 * float(np.vdot(out.R, out.D)), -1

    @staticmethod
    def tangents(residual, weight, dA):
        dA *= weight[:, None]


LOSSES = {"cross_entropy": CrossEntropy, "squared_error": SquaredError}
