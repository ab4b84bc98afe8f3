"""What a rule is: how tangents pass a node of a PyTorch loss graph, forwards and backwards.

A rule takes a node and its inputs' tangents, (q, *shape) each or None for what does not move, and returns
  push() -> the tangent of its output,
  pull(g, dg) -> the tangents of its inputs' adjoints, from its output's adjoint g and the tangent dg of that (None: zero).
For `y = f(x)`, adjoint `f'(x)^T g`, these are `f'(x) dx` and `f'(x)^T dg + (f''(x) dx)^T g`; a linear node lacks the
second part and does not ask for g.  Nodes that have rules have one output.

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
Pull = Callable[[Any, Tangent], Sequence[Tangent]]


class Unknown(Exception):
    """A node, or this use of it, has no rule."""


class Rule(NamedTuple):
    """How tangents pass a kind of node."""

    of: Callable[[Any, Sequence[Tangent]], tuple[Push, Pull]]
    curved: bool  # whether pull asks for g


RULES: dict[str, Rule] = {}


def curved(*names: str) -> Callable[[Any], Any]:
    def enter(rule: Any) -> Any:
        RULES.update(dict.fromkeys(names, Rule(rule, True)))
        return rule

    return enter


def linear(*names: str) -> Callable[[Any], Any]:
    """For linear nodes of one input: (node, q) -> (what takes a tangent ahead, what takes an adjoint's back)."""

    def enter(rule: Any) -> Any:
        def of(node: Any, moved: Sequence[Tangent]) -> tuple[Push, Pull]:
            ahead, back = rule(node, moved[0].shape[0])
            return lambda: ahead(moved[0]), lambda g, dg: (None if dg is None else back(dg),)

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
