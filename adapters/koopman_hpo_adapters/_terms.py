"""The loss hyperparameters of the ready models: L2 a layer, label smoothing, class weights, example weights.

    loss = 1/n sum_i example_weights[index_i] class_weights[y_i] loss_i(label_smoothing) + 1/2 sum_l l2_l |theta_l|^2

Weights are not normalised: all ones give the plain mean.  L2 acts on all parameters of a layer, its biases included.
Letters: n examples, q tangents, L layers, c classes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from koopman_hpo.errors import AdapterError, nearest, reals

DOMAINS = {
    "l2": (0.0, math.inf),
    "label_smoothing": (0.0, 1.0),
    "class_weights": (0.0, math.inf),
    "example_weights": (0.0, math.inf),
}


class Terms(NamedTuple):
    """The hyperparameters of one step, spread over its batch, and their tangents (None where there is none)."""

    weight: Any  # (n,) of the examples, 1 / n for a plain mean
    smoothing: float = 0.0
    l2: Any = None  # (L,) or None where it is zero throughout
    dweight: Any = None  # (q, n)
    dsmoothing: Any = None  # (q,)
    dl2: Any = None  # (q, L)

    def block(self, rows, part) -> Terms:
        """The terms of the examples in slice `rows` and the directions in slice `part`."""
        dweight = None if self.dweight is None else self.dweight[part, rows]
        dsmoothing = None if self.dsmoothing is None else self.dsmoothing[part]
        return Terms(self.weight[rows], self.smoothing, self.l2, dweight, dsmoothing, self.dl2)

    def of(self, dtype) -> Terms:
        """The same with the examples' weights in a dtype."""
        dweight = None if self.dweight is None else self.dweight.astype(dtype, copy=False)
        return self._replace(weight=self.weight.astype(dtype, copy=False), dweight=dweight)

    def push(self, residual, y, dD):
        """dD (q, n, c) += the tangents of `weight R` along weights and smoothing."""
        if self.dweight is not None:
            dD += self.dweight[:, :, None] * residual.R
        if self.dsmoothing is not None:
            c = dD.shape[2]
            slope = self.weight[:, None] * (np.eye(c)[y] - 1 / c)  # d(weight R) / d smoothing, R = P - target
            dD += (self.dsmoothing[:, None, None] * slope).astype(dD.dtype, copy=False)


class Settings(NamedTuple):
    """What a ready model was made with, and how many values each loss hyperparameter takes."""

    call: str
    fixed: dict[str, Any]  # {name: value} used where the space does not tune the name
    sizes: dict[str, int | None]  # {name: number of values of its vector form; None: any}
    dtype: Any

    def terms(self, hyper, dhyper, q, y, index) -> Terms:
        """The step's `Terms`.  hyper: {name: natural}; dhyper: {name: (q,) or (q, n)}; y: (n,); index: (n,) or None."""
        if not hyper and not self.fixed:
            return self.plain(len(y))
        value = {**self.fixed, **{name: self.check(name, hyper[name]) for name in hyper}}
        tangent = {name: self._tangent(name, dhyper[name], q) for name in hyper if name in dhyper} if q else {}
        weight, dweight = self._weights(value, tangent, y, index)
        l2, dl2, layers = value.get("l2"), tangent.get("l2"), self.sizes["l2"] or 1
        if l2 is not None:
            l2 = np.broadcast_to(l2, (layers,))
            dl2 = None if dl2 is None else np.broadcast_to(dl2.reshape(q, -1), (q, layers))
        smoothing = float(np.reshape(value.get("label_smoothing", 0.0), ()))
        ds = tangent.get("label_smoothing")
        return Terms(weight, smoothing, l2, dweight, None if ds is None else ds.reshape(q), dl2)

    def plain(self, n) -> Terms:
        """The terms of the outer loss: a plain mean over n examples, no penalty, no smoothing."""
        return _plain(n, self.dtype)

    def check(self, name, value):
        """`value` as a scalar or a vector of the model's dtype; raises AdapterError on a name or length it has not."""
        if name not in self.sizes:
            known = ", ".join(sorted(self.sizes))
            raise AdapterError(
                f"{self.call}: the loss has the hyperparameters {known}, got {name!r}.{nearest(name, self.sizes)} "
                f"Tune one of these, or write the model with `problem(params, grad=..., outer=...)`."
            )
        usual = isinstance(value, float) or (isinstance(value, np.ndarray) and value.dtype.kind == "f")
        value = value if usual else reals(self.call, name, value, AdapterError)
        array = np.asarray(value, dtype=self.dtype)
        n, scalar = self.sizes[name], name in ("l2", "label_smoothing")
        if not (array.shape == (n,) or (array.ndim == 1 and n is None and array.size) or (scalar and array.size == 1)):
            want = " or ".join(["a scalar"] * scalar + [f"({'n_train' if n is None else n},)"] * (n != 1))
            raise AdapterError(f"{self.call}: {name} must be {want}, got shape {array.shape}.")
        return array

    def _tangent(self, name, value, q):
        usual = isinstance(value, np.ndarray) and value.dtype.kind == "f"
        array = np.asarray(value if usual else reals(self.call, f"the tangent of {name}", value, AdapterError), self.dtype)
        if array.ndim not in (1, 2) or len(array) != q:
            raise AdapterError(
                f"{self.call}: the tangent of {name} must be (q,) or (q, n) with q = {q}, got shape {array.shape}."
            )
        return array

    def _weights(self, value, tangent, y, index):
        """(n,) the examples' weights over n, and (q, n) their tangents by the product rule, or None."""
        examples, classes, n = value.get("example_weights"), value.get("class_weights"), len(y)
        if examples is None and classes is None:
            return self.plain(n).weight, None
        if examples is not None:
            index = self._index(index, len(examples), n)
        of_example = self.plain(n).weight if examples is None else examples[index] / n
        of_class = np.ones(n, self.dtype) if classes is None else classes.take(y, mode="clip")  # the loss checks labels
        dweight = None
        if "example_weights" in tangent:
            dweight = tangent["example_weights"][:, index] * of_class / n
        if "class_weights" in tangent:
            along_class = tangent["class_weights"].take(y, axis=1, mode="clip") * of_example
            dweight = along_class if dweight is None else dweight + along_class
        return of_example * of_class, dweight

    def _index(self, index, n_train, n):
        if index is None:
            raise AdapterError(
                f"{self.call}: example_weights need the examples' positions in the training set, got a batch (X, y). "
                f"Pass batches (X, y, index) with index (n,) integers below {n_train}."
            )
        reals(self.call, "index", index, AdapterError, f"({n},) integers")
        index = np.asarray(index)
        if index.shape != (n,) or index.dtype.kind not in "iu" or index.min() < 0 or index.max() >= n_train:
            raise AdapterError(
                f"{self.call}: index must be ({n},) integers in 0..{n_train - 1}, the positions that example_weights "
                f"({n_train},) belong to, got shape {index.shape} of {index.dtype}"
                + (f" from {index.min()} to {index.max()}." if index.size and index.dtype.kind in "iu" else ".")
            )
        return index


@lru_cache(16)
def _plain(n, dtype) -> Terms:
    return Terms(np.full(n, 1 / n, dtype))
