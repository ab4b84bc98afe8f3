"""The guard: when a window is thrown away, and what the trajectory says about itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import names, number, whole
from .space import Space

Array = NDArray[Any]


@dataclass(frozen=True)
class Guard:
    """When to roll back or to disbelieve, and what to do then.

    **Rollback.**  A window is thrown away when a loss or hypergradient is not finite, or when a loss L strays above
    `L0 + (factor - 1) |L0|`: online, the validation loss, with L0 its value before training (and not the window's before:
    a slow climb would slip through); in mode restart, that and the mean inner loss of the run, with L0 its first.  The
    run goes back to the window's start and the hyperparameters in `shrink_names` are divided by `shrink`.  After `patience`
    rollbacks in a row tuning stops.

    **Disbelief.**  An estimate is recorded and not used when it cannot mean what it says:
    it is *excessive*, when one outer step of it promises a change of the validation loss above `excess |L0|`; it is
    *chaotic*, when the tangents grow by more than `chaos_growth` a step over `chaos_steps` steps while the
    hypergradient flips its sign at half of its records or more.  Both happen where the learning rate is beyond the edge
    of stability: the exact derivative explodes and is true only of a vanishing neighbourhood.

    Then too the hyperparameters in `shrink_names` are divided by `shrink`, but training goes on where it is.

    **Too short a sight** (mode online; both off by default).  A network that was trained at a rate far too high stays worse
    for good, so an excessive estimate in the first `again` of the run begins training again, and rollbacks in a row there
    divide by `shrink`, its square and then its cube.  The hypergradient of a window asks for the smaller rate that averages
    out today's noise, long before it pays: of steps that are believed, `fall` lets the `shrink_names` fall no faster than
    `fall` times a linear decay to zero over what is left of the run (1: that decay; inf: no limit).

    After either, tangents and the outer optimizer's memory start again: one explosion would dwarf every gradient after.
    A loss that starts at zero gives no scale: then only what is not finite is caught.  For a warm start near zero, or a
    loss with an arbitrary offset, choose `factor` and `excess` yourself.
    """

    factor: float = 1.5
    shrink: float = 3.0
    shrink_names: tuple[str, ...] = ("lr",)
    patience: int = 20
    excess: float = 1.0
    chaos_growth: float = 0.003
    chaos_steps: int = 100
    again: float = 0.0
    fall: float = math.inf

    def __post_init__(self) -> None:
        for name, low in (("factor", 1.0), ("excess", 0.0)):
            number("Guard", name, getattr(self, name), f"a number with {name} > {low:g}", low, open_low=True)
        need = "a finite number with shrink > 1"
        number("Guard", "shrink", self.shrink, need, 1.0, math.inf, open_low=True, open_high=True)
        number("Guard", "chaos_growth", self.chaos_growth)
        number("Guard", "again", self.again, "a share of the run in [0, 1]", 0.0, 1.0)
        number("Guard", "fall", self.fall, "a number > 0, or inf for no limit", 0.0, open_low=True)
        for name in ("patience", "chaos_steps"):
            whole("Guard", name, getattr(self, name))
        object.__setattr__(self, "shrink_names", names("Guard", "shrink_names", self.shrink_names))

    def stray(self, name: str, value: float, start: float) -> str:
        """Why a loss has strayed too far above its start, or an empty string."""
        limit = start + (self.factor - 1) * abs(start)
        return f"{name} {value:.4g} exceeds {limit:.4g}" if value > limit and start != 0 else ""

    def doubt(self, h: Array, lr: float, start: float, growth: float, recent: Array) -> str:
        """Why the hypergradient h (q,) cannot be believed, or an empty string.

        `lr` is the outer step, `start` L0, `growth` the tangents' growth a step (NaN if unknown), `recent` the
        trajectory (m, q) of the last `chaos_steps` steps.
        """
        promise = lr * float(np.abs(h).max())
        if start != 0 and promise > self.excess * abs(start):
            return f"excess: one step of phi promises {promise:.3g}, the starting loss is {start:.3g}"
        if growth > self.chaos_growth and flips(recent) >= 0.5:
            return f"chaos: tangents grow by {growth:.4f} a step and h flips its sign"
        return ""

    def early(self, used: int, steps: int) -> bool:
        """Whether so little of the run is spent that it can be begun again."""
        return used <= self.again * steps

    def shrunk(self, space: Space, phi: Array, times: int = 1) -> Array:
        """(q,) phi with the step sizes divided by `shrink`, `times` over, within the bounds; phi where there are none.

        What is not positive is no step size and stays.
        """
        phi = space.check(phi, "Guard.shrunk")
        return self._divided(space, phi, self.shrink, times)

    def slowed(self, space: Space, phi: Array, target: Array, length: int, left: int) -> Array:
        """(q,) target, step sizes no lower than `fall` allows after a window of `length` steps with `left` to go."""
        if math.isinf(self.fall):
            return target
        least = self._divided(space, phi, (left + length + 1) / (left + 1), self.fall)
        return np.where(least < phi, np.maximum(target, least), target)

    def _divided(self, space: Space, phi: Array, base: float, power: float) -> Array:
        """phi with the step sizes divided by `base**power`."""
        out = phi.copy()
        with np.errstate(over="ignore"):
            by = np.power(np.float64(base), power)
        for name in self.shrink_names:
            if name in space:
                h, where = space[name], space.where(name)
                x = h.transform.to_natural(phi[where])
                with np.errstate(divide="ignore"):  # a bound of zero lies at -inf
                    down = h.transform.to_phi(np.clip(x / by, *h.bounds))
                out[where] = np.where(x > 0, np.minimum(down, phi[where]), phi[where])
        return np.where(out == phi, phi, space.clip(out))


def coherence(H: Array) -> Array:
    """(q,) `|mean h| / mean |h|` of a trajectory (m, q): 1 where the sign never wavers, near 0 for a coin toss."""
    H = np.ldexp(H, -600) if np.abs(H).max(initial=0.0) > 1e150 else H  # the sums stay finite
    total = np.abs(H).mean(axis=0)
    return np.divide(np.abs(H.mean(axis=0)), total, out=np.ones(H.shape[1]), where=total > 0)


def flips(H: Array) -> float:
    """Largest share, over the coordinates, of neighbours in the trajectory (m, q) that differ in sign; 0 where m < 10."""
    if len(H) < 10:  # so few flip by chance
        return 0.0
    return float((np.sign(H[1:]) * np.sign(H[:-1]) < 0).mean(axis=0).max())
