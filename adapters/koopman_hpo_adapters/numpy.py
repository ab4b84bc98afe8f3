"""NumPy models: hand-written ones through `problem`, and two ready ones, `softmax_regression` and `mlp`.

    model = mlp((64, 128, 10))                                        # or softmax_regression(64, 10)
    model = problem(params, grad=grad, outer=outer)                   # your own: loss, gradient, validation loss

All return a `koopman_hpo.Problem`.  Letters: n examples, f features, p parameters, q tangent directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from zlib import crc32

import numpy as np

from koopman_hpo.errors import AdapterError, choice, flag, reals, short, single_or_double, whole
from koopman_hpo.problem import Array, Problem

from ._differences import difference_error
from ._handwritten import problem
from ._losses import LOSSES
from ._mlp import ACTIVATIONS, Network
from ._ready import Ready
from ._terms import DOMAINS, Settings

MOST = 2**31  # parameters of a ready model
__all__ = ["Model", "difference_error", "mlp", "problem", "softmax_regression"]


@dataclass(frozen=True)
class Model(Problem):
    """A ready model: a `Problem` that also predicts.  `sizes` are the widths of its layers, input first."""

    sizes: tuple[int, ...] = ()
    ready: Any = None

    def predict(self, theta: Array, X: Array) -> Array:
        """(n, out): the last layer's outputs at X (n, f), logits for a classifier, with parameters theta (p,)."""
        return self.ready.predict(theta, X)

    def accuracy(self, theta: Array, X: Array, y: Array) -> float:
        """The fraction of the labels y (n,) that the largest output of each row of X (n, f) hits."""
        return self.ready.accuracy(theta, X, y)


def softmax_regression(
    n_features: int,
    n_classes: int,
    *,
    bias: bool = True,
    seed: int = 0,
    dtype: Any = np.float64,
    l2: Any = 0.0,
    label_smoothing: float = 0.0,
    class_weights: Any = None,
    example_weights: Any = None,
    params: Any = None,
) -> Model:
    """Multinomial logistic regression: `mlp((n_features, n_classes))`, convex in its parameters.

    Args and batches as in `mlp`; bias: whether each class has an intercept.
    """
    terms = _terms("softmax_regression", l2, label_smoothing, class_weights, example_weights)
    return _ready(
        "softmax_regression",
        (n_features, n_classes),
        "tanh",
        "cross_entropy",
        bias,
        seed,
        dtype,
        terms,
        params,
    )


def mlp(
    sizes: Sequence[int],
    *,
    activation: str = "tanh",
    loss: str = "cross_entropy",
    seed: int = 0,
    dtype: Any = np.float64,
    l2: Any = 0.0,
    label_smoothing: float = 0.0,
    class_weights: Any = None,
    example_weights: Any = None,
    params: Any = None,
) -> Model:
    """A multilayer perceptron with exact gradients, Hessian products and mixed derivatives.

    The inner loss over a batch of n examples, and the outer one (no weights, no smoothing, no penalty):

        1/n sum_i example_weights[index_i] class_weights[y_i] loss_i + 1/2 sum_l l2_l |theta_l|^2
        1/n sum_i loss_i

    with loss_i the cross-entropy to `(1 - label_smoothing) onehot + label_smoothing / classes`, or half the squared
    error summed over the outputs.  Weights are not normalised: ones give the plain mean.  L2 acts on all parameters,
    biases included.  A space that names `l2` (one value, or one a layer), `label_smoothing`, `class_weights` or
    `example_weights` tunes it; the keyword's value is used otherwise.

    Batches are `(X (n, f), y (n,) integer labels)`, for the squared error `(X, y (n, out))`; where example weights are
    used, `(X, y, index (n,))` with the examples' positions in the training set.  X is taken in the model's dtype.

    Args:
      sizes: widths of the layers, input first, e.g. (64, 128, 10).
      activation: "tanh", "relu" (zero second derivative) or "gelu" (the exact one), between the layers.
      loss: "cross_entropy" or "squared_error".
      seed: of the initial weights, normal with variance 1 / inputs (2 / inputs for relu and gelu); biases are zero.
      dtype: float32 or float64, of everything.
      l2: scalar or (layers,); label_smoothing: scalar; class_weights: (out,); example_weights: (n_train,).
      params: (p,) initial parameters instead of random ones, layer by layer W.ravel() (inputs, outputs), then b.

    Returns:
      `Model`, a `Problem` with `predict` and `accuracy`; its segments are the layers.

    Raises:
      AdapterError: an unknown activation or loss, wrong sizes, or params of another length.
    """
    terms = _terms("mlp", l2, label_smoothing, class_weights, example_weights)
    return _ready("mlp", sizes, activation, loss, True, seed, dtype, terms, params)


def _terms(call, l2, label_smoothing, class_weights, example_weights) -> dict[str, Any]:
    """The keywords that do something, as {name: value}."""
    given = {"class_weights": class_weights, "example_weights": example_weights}
    given = {name: value for name, value in given.items() if value is not None}
    given |= {"l2": l2, "label_smoothing": label_smoothing}
    checked = {name: reals(call, name, value, AdapterError) for name, value in given.items()}
    return {name: value for name, value in checked.items() if name.endswith("_weights") or np.any(value)}


def _ready(call, sizes, activation, loss, bias, seed, dtype, terms, params) -> Model:
    sizes = _check_sizes(call, sizes)
    dtype = single_or_double(call, dtype, AdapterError)
    seed = whole(call, "seed", seed, 0, error=AdapterError)
    activation = choice(call, "activation", activation, ACTIVATIONS, AdapterError)
    loss = choice(call, "loss", loss, LOSSES, AdapterError)
    network = Network(sizes, ACTIVATIONS[activation], LOSSES[loss], flag(call, "bias", bias, AdapterError), dtype)
    names: dict[str, int | None] = {"l2": len(sizes) - 1, "example_weights": None}
    if loss == "cross_entropy":
        names |= {"class_weights": sizes[-1], "label_smoothing": 1}
    settings = Settings(call, {}, names, dtype)
    _check_terms(call, terms, dtype)
    settings = settings._replace(fixed={name: settings.check(name, value) for name, value in terms.items()})
    ready = Ready(network, settings)
    gain = 1.0 if activation == "tanh" else 2.0
    return Model(
        params=_initial(network, seed, gain) if params is None else _given(call, network, params),
        grad_jvp=ready.grad_jvp,
        outer=ready.outer,
        outer_hvp=ready.outer_hvp,
        linearise=ready.linearise,
        hyper=frozenset(names),
        domains={name: DOMAINS[name] for name in names},
        segments=tuple(layer.shape[0] * layer.shape[1] for layer in network.layers),
        name=f"{call}(sizes={sizes}, activation={activation}, loss={loss}, bias={network.bias}, {_told(terms)})",
        sizes=sizes,
        ready=ready,
    )


def _told(terms) -> str:
    """The fixed terms of the loss in a few words: a long array by a checksum."""
    say = lambda value: value.tolist() if value.size <= 16 else f"crc32 {crc32(np.ascontiguousarray(value).tobytes()):08x}"
    return ", ".join(f"{name}={say(np.asarray(value, np.float64))}" for name, value in sorted(terms.items()))


def _check_terms(call, terms, dtype) -> None:
    for name, value in terms.items():
        if not ((value >= 0) & (value <= np.finfo(dtype).max)).all():
            raise AdapterError(f"{call}: {name} must be finite and not negative, got {short(value)}.")
    if np.max(terms.get("label_smoothing", 0.0)) > 1:
        raise AdapterError(f"{call}: label_smoothing must lie in [0, 1], got {short(terms['label_smoothing'])}.")


def _check_sizes(call, sizes) -> tuple[int, ...]:
    sized = isinstance(sizes, Sequence | np.ndarray) and not isinstance(sizes, str)
    positive = sized and all(isinstance(s, int | np.integer) and not isinstance(s, bool) and s >= 1 for s in sizes)
    if not positive or len(sizes) < 2:
        raise AdapterError(f"{call}: sizes must be two or more positive widths, such as (64, 128, 10), got {short(sizes)}.")
    widths = tuple(int(s) for s in sizes)
    if sum((a + 1) * b for a, b in pairwise(widths)) >= MOST:
        raise AdapterError(f"{call}: sizes {short(widths)} make {MOST:,} parameters or more. Take narrower layers.")
    return widths


def _initial(network, seed, gain) -> Array:
    rng = np.random.default_rng(seed)
    theta = np.zeros(network.size, network.dtype)
    for layer in network.layers:
        shape = (layer.inputs, layer.outputs)
        layer.of(theta)[: layer.inputs] = rng.normal(size=shape) * np.sqrt(gain / layer.inputs)
    return theta


def _given(call, network, params) -> Array:
    with np.errstate(over="ignore"):  # `Problem` finds what is not finite
        theta = np.array(reals(call, "params", params, AdapterError), dtype=network.dtype)
    if theta.shape != (network.size,):
        raise AdapterError(
            f"{call}: params must be ({network.size},), layer by layer W.ravel() then b, got shape {theta.shape}."
        )
    return theta
