"""What kernels take and move, as named tuples of arrays; the same for every device."""

from __future__ import annotations

from typing import NamedTuple

from numpy.typing import NDArray


class TangentState(NamedTuple):
    """Training state and its tangents, moved in place.  k optimizer slots, p parameters, q tangent directions."""

    theta: NDArray  # (p,)
    slots: NDArray  # (k, p)
    Z: NDArray  # (q, p) dtheta / dphi along each direction
    dslots: NDArray  # (k, q, p) tangents of the slots


class Grads(NamedTuple):
    """The inner gradient and its tangents."""

    g: NDArray  # (p,)
    dG: NDArray  # (q, p)


class Coefficients(NamedTuple):
    """Hyperparameters of one step, n groups, in the rows that the optimizer names, and their tangents."""

    c: NDArray  # (rows, n)
    dc: NDArray  # (rows, q, n)
