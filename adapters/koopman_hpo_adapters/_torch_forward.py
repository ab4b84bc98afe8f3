"""Forward over reverse on a user's own PyTorch graph: its gradient and the tangents of that, all directions at once.

The graph that torch recorded is walked twice: tangents of the layers' outputs from the parameters to the loss, and back
the adjoints with their tangents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ._torch_rules import RULES, Unknown

Columns = Sequence[torch.Tensor]  # (q, *shape), one an input


class Walk:
    """The nodes of a loss graph, inputs first.

    Attributes:
      width: elements of the outputs of the nodes that are not linear, which is about what one direction takes in memory.

    Raises:
      Unknown: a node has no rule.
    """

    def __init__(self, loss: torch.Tensor):
        self._loss, self._root = loss, loss.grad_fn
        self._leaves: list[Any] = []
        self._nodes: list[Any] = []
        for node, rule, before in _in_order(self._root):
            if rule is None:
                self._leaves.append(node)
            else:
                self._nodes.append((node, rule, before))
        self._kept: dict[Any, torch.Tensor] = {}
        self._moments: dict[Any, torch.Tensor] = {}
        sizes = [math.prod(node._input_metadata[0].shape) for node, rule, _ in self._nodes if rule.curved]
        if 0 in sizes:  # of no examples
            raise Unknown
        self.width = sum(sizes)

    def has(self, nodes: Sequence[Any]) -> bool:
        """Whether the loss depends on all these nodes."""
        return not nodes or set(nodes) <= {node for node, *_ in self._nodes}

    def met(self, node: Any) -> torch.Tensor | None:
        """(q, 2, C) tangents of the mean and variance of what a normalising layer met, in the last `rows`; None of none."""
        return self._moments.get(node)

    def rows(self, moved: Mapping[int, torch.Tensor], *, first: bool, more: bool = False) -> dict[int, torch.Tensor]:
        """For {id(leaf): (q, *shape) its tangents} {id(leaf): (1 + q, *shape) its gradient and the tangents of that}.

        A leaf that the loss does not reach is missing.  Where the directions come in pieces, all but the `first` give the
        tangents alone, (q, *shape), from the nodes' adjoints, which are kept as long as there is `more` to come.

        Raises:
          Unknown: a node has no rule for this use of it.
        """
        q = len(next(iter(moved.values())))
        d = {self._root: self._loss.new_zeros(first + q)}
        if first:
            d[self._root][0] = 1
        for node, before, back, bend in reversed(self._ahead(moved)):
            mine = d.pop(node)
            found = back(mine)
            if bend is not None:
                g = mine[0] if first else self._kept[node]
                bend(g, [None if x is None else x[first:] for x in found])
                if first and more:
                    self._kept[node] = g.clone()
            for f, x in zip(before, found, strict=True):
                if x is not None:
                    d[f] = d[f] + x if f in d else x
        return {id(leaf.variable): d[leaf] for leaf in self._leaves if leaf in d}

    def _ahead(self, moved: Mapping[int, torch.Tensor]) -> list[Any]:
        """Tangents up to the loss; returns the ways back."""
        d: dict[Any, Any] = {leaf: moved.get(id(leaf.variable)) for leaf in self._leaves}
        ways = []
        self._moments = {}
        for node, rule, before in self._nodes:
            inputs = [None if f is None else d[f] for f in before]
            if all(x is None for x in inputs):
                d[node] = None
                continue
            push, back, bend, *moments = rule.of(node, inputs)
            if moments:
                self._moments[node] = moments[0]
            ways.append((node, before, back, bend))
            d[node] = None if node is self._root else push()
        return ways


def _in_order(root: Any) -> list[tuple[Any, Any, list[Any]]]:
    """All nodes from root down, each after those it depends on, with its rule, None of a leaf, and those.

    Raises:
      Unknown: a node has no rule.
    """
    order, seen, stack = [], {root}, [_opened(root)]
    while stack:
        node, rule, before, rest = stack[-1]
        for after in rest:
            if after is not None and after not in seen:
                seen.add(after)
                stack.append(_opened(after))
                break
        else:
            order.append((node, rule, before))
            stack.pop()
    return order


def _opened(node: Any) -> tuple[Any, Any, list[Any], Any]:
    """A node, its rule, the nodes that it depends on (None for a constant), and a way through these."""
    kind = type(node).__name__
    rule = RULES.get(kind)
    if rule is None and kind != "AccumulateGrad":
        raise Unknown
    before = [f for f, _ in node.next_functions]
    return node, rule, before, iter(before)
