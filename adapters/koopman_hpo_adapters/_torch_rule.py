"""What a rule is: how tangents pass a node of a PyTorch loss graph, forwards and backwards.

A rule takes a node and its inputs' tangents, (q, *shape) each or None for what does not move, and returns
  push() -> the tangent of its output,
  back(rows) -> its inputs' adjoints, from n of its output's, (n, *shape): `f'(x)^T` applied to each row,
  bend(g, found): adds `(f''(x) dx)^T g` to the last q rows of each, in place; None of a linear node.
For `y = f(x)` with the adjoint g the inputs' is `f'(x)^T g` and its tangent `f'(x)^T dg + (f''(x) dx)^T g`: the adjoint and
its q tangents go back as rows together.  What `back` gives is new memory wherever there is a bend.  Nodes that have rules
have one output.  A layer that keeps running statistics returns, beside these, the tangents (q, 2, C) of its input's mean
and variance.

All q directions pass at once: a weight's as more output features, an input's as more examples.  So the examples lie
outermost in memory, though q is the first dimension everywhere.

Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Tangent = Any  # (q, *shape), or None
Push = Callable[[], torch.Tensor]
Back = Callable[[torch.Tensor], Sequence[Tangent]]
Bend = Callable[[torch.Tensor, Sequence[Tangent]], None] | None
Ways = tuple[Push, Back, Bend] | tuple[Push, Back, Bend, torch.Tensor]


class Unknown(Exception):
    """A node, or this use of it, has no rule."""


class Rule(NamedTuple):
    """How tangents pass a kind of node."""

    of: Callable[[Any, Sequence[Tangent]], Ways]
    curved: bool  # whether it may bend


RULES: dict[str, Rule] = {}


def curved(*names: str) -> Callable[[Any], Any]:
    def enter(rule: Any) -> Any:
        RULES.update(dict.fromkeys(names, Rule(rule, True)))
        return rule

    return enter


def linear(*names: str) -> Callable[[Any], Any]:
    """For linear nodes of one input: node -> (what takes tangents ahead, what takes adjoints back), row by row."""

    def enter(rule: Any) -> Any:
        def of(node: Any, moved: Sequence[Tangent]) -> Ways:
            ahead, back = rule(node)
            return lambda: ahead(moved[0]), lambda rows: (back(rows),), None

        RULES.update(dict.fromkeys(names, Rule(of, False)))
        return rule

    return enter


def examples(d: torch.Tensor) -> torch.Tensor:
    """(q, B, ...) -> (B q, ...)."""
    return d.transpose(0, 1).flatten(0, 1)


def features(d: torch.Tensor) -> torch.Tensor:
    """(q, B, C, ...) -> (B, q C, ...)."""
    return d.transpose(0, 1).flatten(1, 2)


def of_examples(d: torch.Tensor, q: int) -> torch.Tensor:
    return d.view(-1, q, *d.shape[1:]).transpose(0, 1)


def of_features(d: torch.Tensor, q: int) -> torch.Tensor:
    return d.view(d.shape[0], q, -1, *d.shape[2:]).transpose(0, 1)


def shape_of(node: Any, i: int | None = None) -> Sequence[int]:
    """Of the output, or of input i."""
    of, nr = (node, 0) if i is None else node.next_functions[i]
    return of._input_metadata[nr].shape


def lift(d: torch.Tensor, dims: int) -> torch.Tensor:
    """(q, *shape) as it broadcasts against (q, *longer shape)."""
    return d if d.dim() == dims + 1 else d.reshape(d.shape[0], *[1] * (dims + 1 - d.dim()), *d.shape[1:])


def sum_to(d: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """What `lift` and broadcasting transpose to."""
    if tuple(d.shape[1:]) == tuple(shape):
        return d
    q = d.shape[0]
    return d.sum_to_size(q, *[1] * (d.dim() - 1 - len(shape)), *shape).reshape(q, *shape)


def signed(i: int) -> int:
    """A number that torch shows without its sign."""
    return i - 2**64 if i >= 2**63 else i


def plus(a: Tangent, b: Tangent) -> Tangent:
    return b if a is None else a if b is None else a + b
