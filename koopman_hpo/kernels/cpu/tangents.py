"""What else is done with all tangents at once: BLAS and NumPy, which need no help here."""

from __future__ import annotations

import numpy as np


def project(Z, dE_dtheta, work, out):
    """out[j] <- Z[j] . dE_dtheta.  Z: (q, p); dE_dtheta: (p,); out: (q,).  `work` is for devices that sum in shares."""
    np.matmul(Z, dE_dtheta, out=out)


def scale(tangents, rho):
    """Multiply a tangent array of any shape by rho, in place; 0 clears it, also where it is not finite."""
    if rho == 0:
        tangents[...] = 0
    else:
        np.multiply(tangents, tangents.dtype.type(rho), out=tangents)
