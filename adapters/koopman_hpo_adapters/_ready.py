"""The ready models' face: a batch is checked, the network's gradient taken, the penalty added.

Letters: n examples, f features, c outputs, p parameters, q tangents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from koopman_hpo.errors import AdapterError, reals

from . import _linear
from ._mlp import CHUNK, ROWS, Network
from ._terms import Settings

MOST_KEPT = 2**22  # numbers that a linearisation may keep


@dataclass(frozen=True)
class Ready:
    """A network and its loss terms: the three functions of a `Problem`, and the outputs."""

    network: Network
    settings: Settings

    def grad_jvp(self, theta, hyper, Z, dhyper, batch):
        """`Problem.grad_jvp`: loss, g (p,), dG (q, p)."""
        X, y, index = self._batch("grad_jvp", batch)
        q = self._flat("grad_jvp", theta, Z)
        terms = self.settings.terms(hyper, dhyper, q, y, index)
        with np.errstate(over="ignore", invalid="ignore"):  # divergence is the guard's business
            loss, g, dG = self._sum("grad_jvp", theta, Z, X, y, terms)
            if terms.l2 is not None:
                loss += self._penalise(theta, Z, terms, g, dG)
        return loss, g, dG

    def outer(self, theta, hyper, batch):
        """`Problem.outer`: the plain mean loss, without weights, smoothing or penalty; no direct dependence."""
        X, y, _ = self._batch("outer", batch)
        self._flat("outer", theta)
        with np.errstate(over="ignore", invalid="ignore"):
            loss, g, _ = self._sum("outer", theta, theta[None][:0], X, y, self.settings.plain(len(y)))
        return loss, g, {}

    def outer_hvp(self, theta, hyper, V, batch):
        """`Problem.outer_hvp`: (n, p), the outer Hessian times each row of V (n, p)."""
        X, y, _ = self._batch("outer_hvp", batch)
        self._flat("outer_hvp", theta, V)
        with np.errstate(over="ignore", invalid="ignore"):
            return self._sum("outer_hvp", theta, V, X, y, self.settings.plain(len(y)))[2]

    def linearise(self, theta, hyper, batch, rough):
        """`Problem.linearise`: pushes tangents (q, p) through one gradient that is worked out now."""
        X, y, index = self._batch("linearise", batch)
        self._flat("linearise", theta)
        if _linear.size(self.network, len(y)) > MOST_KEPT:
            return lambda Z, dhyper: self.grad_jvp(theta, hyper, Z, dhyper, batch)[2]
        dtype = np.dtype(np.float32) if rough else theta.dtype
        terms = self.settings.terms(hyper, {}, 0, y, index).of(dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            bad, first, kept = _linear.linearise(self.network, theta.astype(dtype), X, y, terms)
        self._verify("linearise", first, X, y, bad, 0)

        def push(Z, dhyper):
            q = self._flat("linearise", theta, Z)
            along = self.settings.terms(hyper, dhyper, q, y, index).of(dtype) if dhyper else terms
            dG = np.empty(Z.shape, dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                for j, (z, out) in enumerate(zip(Z.astype(dtype, copy=False), dG, strict=True)):
                    _linear.push(self.network, kept, z, y, along.block(slice(None), slice(j, j + 1)), out)
                dG = dG.astype(theta.dtype, copy=False)
                if along.l2 is not None:
                    self._penalise(theta, Z, along, np.zeros_like(theta), dG)
            return dG

        return push

    def _sum(self, call, theta, Z, X, y, terms):
        """loss, g (p,), dG (q, p) of `sum_i weight_i loss_i`, by blocks of examples and chunks of directions."""
        g, dG = np.empty(theta.shape, theta.dtype), np.empty(Z.shape, Z.dtype)
        if len(y) <= ROWS and len(Z) <= CHUNK:
            loss, bad = self.network.gradient(theta, Z, X, y, terms, g, dG)
            self._verify(call, self._first(g), X, y, bad, 0)
            return loss, g, dG
        total, sum_g, sum_dG = 0.0, np.zeros_like(g), np.zeros_like(dG)
        for rows in _slices(len(y), ROWS):
            for part in _slices(max(len(Z), 1), CHUNK):
                block = terms.block(rows, part)
                loss, bad = self.network.gradient(theta, Z[part], X[rows], y[rows], block, g, dG[part])
                self._verify(call, self._first(g), X, y, bad, rows.start)
                sum_dG[part] += dG[part]
            total += loss
            sum_g += g
        return total, sum_g, sum_dG

    def predict(self, theta, X):
        """(n, c): outputs of the last layer (logits for a classifier) at X (n, f)."""
        X = self._features("predict", X)
        self._flat("predict", theta)
        self._finite("predict", "X", X)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.concatenate([self.network.outputs(theta, X[rows]).copy() for rows in _slices(len(X), ROWS)])

    def accuracy(self, theta, X, y):
        """The fraction of the labels y (n,) that the largest output of each row of X (n, f) hits."""
        X = self._features("accuracy", X)
        y = self._labels("accuracy", y, len(X))
        c = self.network.layers[-1].outputs
        if y.min() < 0 or y.max() >= c:
            self._no_class("accuracy", y, int(np.flatnonzero((y < 0) | (y >= c))[0]))
        return float(np.mean(self.predict(theta, X).argmax(axis=1) == y))

    def _penalise(self, theta, Z, terms, g, dG):
        """Adds the gradient of 1/2 sum_l l2_l |theta_l|^2 to g and its tangents to dG; returns its value."""
        value = 0.0
        for l, layer in enumerate(self.network.layers):
            part = layer.where
            value += 0.5 * float(terms.l2[l]) * float(theta[part] @ theta[part])
            g[part] += terms.l2[l] * theta[part]
            dG[:, part] += terms.l2[l] * Z[:, part]
            if terms.dl2 is not None:
                dG[:, part] += terms.dl2[:, l, None] * theta[part]
        return value

    def _flat(self, call, theta, Z=None):
        """Number of tangents q; raises unless theta is (p,) and Z (q, p), both of the model's dtype."""
        p, dtype = self.network.size, self.network.dtype
        arrays = isinstance(theta, np.ndarray) and (Z is None or isinstance(Z, np.ndarray))
        if arrays and theta.shape == (p,) and theta.dtype == dtype and (Z is None or Z.dtype == dtype):
            if Z is None:
                return 0
            if Z.ndim == 2 and Z.shape[1] == p:
                return len(Z)
        got = _kind(theta) + ("" if Z is None else f" and {_kind(Z)}")
        raise AdapterError(
            f"{self.settings.call}.{call}: theta must be ({p},)"
            + ("" if Z is None else f" and the tangents (q, {p})")
            + f" of {dtype}, got {got}. Start from the model's own params, or pass dtype= to the model."
        )

    def _batch(self, call, batch):
        """(X (n, f), y, index or None), shapes and dtypes checked; values are checked by `_verify` after the pass."""
        if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
            got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
            raise AdapterError(f"{self.settings.call}.{call}: a batch is (X, y) or (X, y, index), got {got}.")
        X = self._features(call, batch[0])
        network = self.network
        if network.loss.name == "cross_entropy":
            y = np.ascontiguousarray(self._labels(call, batch[1], len(X)), dtype=np.int64)
            return X, y, batch[2] if len(batch) == 3 else None
        y = self._array(call, "y", batch[1])
        if y.shape != (len(X), network.layers[-1].outputs) or y.dtype.kind not in "fiu":
            raise AdapterError(
                f"{self.settings.call}.{call}: y must be ({len(X)}, {network.layers[-1].outputs}) real targets, got "
                f"shape {y.shape} of {y.dtype}. One output: y[:, None]."
            )
        return X, y, batch[2] if len(batch) == 3 else None

    def _labels(self, call, y, n):
        """y (n,) as integers; whether each is a class shows later."""
        y = self._array(call, "y", y)
        if y.shape != (n,) or y.dtype.kind not in "iu":
            raise AdapterError(
                f"{self.settings.call}.{call}: y must be ({n},) integer labels, one a row of X, got shape "
                f"{y.shape} of {y.dtype}. Use y.astype(int), or loss='squared_error' for real targets."
            )
        return y

    def _array(self, call, name, given):
        if isinstance(given, np.ndarray):
            return given
        reals(f"{self.settings.call}.{call}", name, given, AdapterError, "an array of numbers")
        return np.asarray(given)

    def _features(self, call, X):
        X = self._array(call, "X", X)
        f = self.network.layers[0].inputs
        if X.ndim != 2 or X.shape[1] != f or len(X) == 0 or X.dtype.kind not in "fiub":
            raise AdapterError(
                f"{self.settings.call}.{call}: X must be (n, {f}) real features with n >= 1, got shape {X.shape} of "
                f"{X.dtype}. Flatten images with X.reshape(len(X), -1); leave empty batches out."
            )
        return X

    def _first(self, g):
        """(inputs + bias,): the first column of the first layer's part of g (p,)."""
        return g[self.network.layers[0].where][:: self.network.layers[0].outputs]

    def _verify(self, call, first, X, y, bad, start):
        """Raises on a label that is no class, and where X or y is not finite, as `_first` of a gradient tells.

        A NaN or inf in X makes the first layer's gradient `X' D` non-finite in every column, whatever the rest (NaN and
        inf times zero are NaN too), so a batch needs to be searched only where the first column is.  Parameters that
        diverged pass in silence.
        """
        if bad >= 0:
            self._no_class(call, y, start + bad)
        if math.isfinite(first @ first):
            return
        for name, array in (("X", X), ("y", y)):
            self._finite(call, name, array)

    def _no_class(self, call, y, i):
        c = self.network.layers[-1].outputs
        raise AdapterError(f"{self.settings.call}.{call}: labels must be in 0..{c - 1}, got y[{i}] = {y[i]}.")

    def _finite(self, call, name, array):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise AdapterError(
                f"{self.settings.call}.{call}: the batch must be finite, got {name}{list(at)} = {array[at]}. "
                f"Clean the data before training, for example with np.nan_to_num."
            )


def _kind(a):
    return f"{a.shape} of {a.dtype}" if isinstance(a, np.ndarray) else type(a).__name__


def _slices(n, most):
    """0..n in as few slices of nearly equal length as `most` allows."""
    pieces = -(-n // most)
    cuts = [n * i // pieces for i in range(pieces + 1)]
    return [slice(a, b) for a, b in pairwise(cuts)]
