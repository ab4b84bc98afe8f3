"""The model-based operator: training frozen at the current point, rolled to the horizon in a small Krylov space.

`koopman.extrapolate` sees only the trajectory of the hypergradient.  But the operator of training is known: with curvature
and preconditioner frozen, a step is affine, and many steps are a power of a small matrix.  `estimate` rolls the parameters
through a few such stages, linearised anew in each, and takes the outer gradient at the horizon back the same way.
"""

from __future__ import annotations

from .forecast import Forecast, Settings, check_run, estimate, exactly, neglected

__all__ = ["Forecast", "Settings", "check_run", "estimate", "exactly", "neglected"]
