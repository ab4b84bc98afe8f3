"""A step of any optimizer from random states, as the oracle, the CPU kernels and the CUDA kernels take it."""

import numpy as np
import reference
from numba import cuda

from koopman_hpo import optimizers, tangent
from koopman_hpo.kernels import for_device
from koopman_hpo.kernels.arrays import Coefficients, Grads, TangentState
from koopman_hpo.optimizers import Dual

CPU, CUDA = for_device("cpu"), for_device("cuda")
SLOTS = {"sgd": "m", "adam": "mv", "adamw": "mv", "rmsprop": "vam", "adagrad": "v", "lion": "m"}
RULES = {
    "sgd": (optimizers.sgd(False), {}),
    "nesterov": (optimizers.sgd(True), {"nesterov": True}),
    "adam": (optimizers.adam(False), {}),
    "adamw": (optimizers.adam(True), {}),
    "rmsprop": (optimizers.rmsprop(False), {}),
    "centered": (optimizers.rmsprop(True), {"centered": True}),
    "adagrad": (optimizers.adagrad(0.0), {}),
    "lion": (optimizers.lion(), {}),
}
NATURAL = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.03, "beta1": 0.8, "beta2": 0.95, "eps": 0.01}
NATURAL |= {"alpha": 0.9, "lr_decay": 0.05}
T = 3  # the step: late enough for every bias correction and decay to count
NEAR = 1e-3  # to zero, for a sign
ULP = {np.float16: 2.0**-10, np.uint16: 2.0**-7}  # of a stored tangent, relative to it, at most


class Case:
    """A random state of training in the middle of a run, its gradients, and hyperparameters of several groups."""

    def __init__(self, name, segments, q, dtype, seed=0, run=8):
        self.rule, self.flags = RULES[name]
        self.segments, self.dtype = segments, dtype
        rng = np.random.default_rng(seed)
        k, p, n = self.rule.slots, sum(segments), len(segments)
        draw = lambda *shape: rng.normal(size=shape).astype(dtype)
        slots = draw(k, p)
        if "v" in SLOTS[self.rule.name]:
            i = SLOTS[self.rule.name].index("v")
            slots[i] = 4 + slots[i] ** 2  # also above the square of rmsprop's mean
        if self.rule.kernel == "rmsprop":
            slots[1] = np.tanh(slots[1])
        self.state = TangentState(draw(p), slots, draw(q, p), draw(k, q, p))
        self.grads = Grads(draw(p), draw(q, p))
        values = {h: NATURAL[h] * rng.uniform(0.7, 1.05, n) for h in self.rule.defaults}
        self.duals = {h: Dual(x, rng.normal(size=(q, n))) for h, x in values.items()}
        rows = [self.rule.row(i, self.duals, T) for i in range(len(self.rule.rows))]
        self.coefficients = Coefficients(np.array([r.x for r in rows], dtype), np.array([r.dx for r in rows], dtype))
        if self.rule.kernel == "lion":  # its sign is to be the same in every precision: far from zero
            _, b1, a1, *_ = np.repeat(self.coefficients.c, segments, axis=1)
            self.grads.g[np.abs(b1 * slots[0] + a1 * self.grads.g) < NEAR] += 1
        self.blocks = tangent.blocks(segments, run).reshape(-1, 3)

    def expected(self):
        """The oracle's step in float64: tangents as derivatives by complex steps."""
        wide = lambda arrays: [np.asarray(a, np.float64) for a in arrays]
        theta, slots, Z, dslots = wide(self.state)
        g, dG = wide(self.grads)
        h = {name: np.repeat(d.x, self.segments) for name, d in self.duals.items()}
        if "lr_decay" not in h:
            h["lr_decay"] = 0.0
        step = lambda theta, slots, g, h: reference.RULES[self.rule.name][0](
            {"theta": theta} | dict(zip(SLOTS[self.rule.name], slots, strict=True)), g, h, T, **self.flags
        )
        flat = lambda s: np.stack([s["theta"], *(s[k] for k in SLOTS[self.rule.name])])
        after = flat(step(theta, slots, g, h))
        pushed = []
        for j in range(len(Z)):
            i = 1j * reference.TINY
            along = {n: h[n] + i * np.repeat(d.dx[j], self.segments) for n, d in self.duals.items()}
            pushed.append(flat(step(theta + i * Z[j], slots + i * dslots[:, j], g + i * dG[j], h | along)).imag)
        moved = np.stack(pushed, 1) / reference.TINY if pushed else np.zeros((len(after), 0, theta.size))
        return TangentState(after[0], after[1:], moved[0], moved[1:])

    def on_cpu(self):
        state = TangentState(*(a.copy() for a in self.state))
        work = np.empty((self.rule.scratch, int(np.diff(self.blocks[:, 1:]).max(initial=0))), self.dtype)
        getattr(CPU, self.rule.kernel)(self.grads, self.coefficients, self.blocks, self.rule.flag, work, state)
        return state

    def on_cuda(self, stored=None, grads_too=False):
        """The CUDA twin's step, with tangents stored as float16 or as bfloat16's bits where asked for."""
        keep = lambda a: a if stored is None else packed(a, stored)
        (theta, slots, Z, dslots), (g, dG) = self.state, self.grads
        state = TangentState(*map(cuda.to_device, (theta, slots, keep(Z), keep(dslots))))
        grads = Grads(cuda.to_device(g), cuda.to_device(keep(dG) if grads_too else dG))
        coefficients, blocks = Coefficients(*map(cuda.to_device, self.coefficients)), cuda.to_device(self.blocks)
        getattr(CUDA, self.rule.kernel)(grads, coefficients, blocks, self.rule.flag, None, state)
        theta, slots, Z, dslots = (a.copy_to_host() for a in state)
        return TangentState(theta, slots, *((Z, dslots) if stored is None else (opened(Z), opened(dslots))))

    def rounded(self, stored):
        """The same case with tangents that `stored` can hold."""
        hold = lambda a: opened(packed(a, stored))
        self.state = self.state._replace(Z=hold(self.state.Z), dslots=hold(self.state.dslots))
        self.grads = self.grads._replace(dG=hold(self.grads.dG))
        return self


def packed(a, stored):
    if stored is np.float16:
        return a.astype(np.float16)
    bits = a.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def opened(a):
    return a.astype(np.float32) if a.dtype == np.float16 else (a.astype(np.uint32) << 16).view(np.float32)


def close(got, wanted, rtol):
    for name, x, y in zip(TangentState._fields, got, wanted, strict=True):
        assert x.shape == y.shape
        size = np.abs(y).max(initial=1.0)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * size, err_msg=name)


# Rounding of some ten operations, with cancellation.  In float32 arithmetic that stays float32 and in one that does not.
TOLERANCE = {np.float64: 1e-13, np.float32: 2e-5}
