"""Forward over reverse on a user's own PyTorch graph: the tangents of its gradient, all directions at once.

The graph that torch recorded is walked twice: tangents of the layers' outputs from the parameters to the loss, and
tangents of their adjoints back.  The adjoints themselves are torch's, taken on its own way through the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from ._torch_rules import RULES, Unknown

Columns = Sequence[torch.Tensor]  # (q, *shape), one an input


class Walk:
    """The nodes of a loss graph, inputs first.

    Attributes:
      edges: where the nodes that are not linear have their adjoints: what to ask torch for beside the gradient.
      width: elements of these nodes' outputs, which is about what one direction takes in memory.

    Raises:
      Unknown: a node has no rule.
    """

    def __init__(self, loss: torch.Tensor):
        self._root = loss.grad_fn
        self._leaves: list[Any] = []
        self._nodes: list[Any] = []
        for node, rule, before in _in_order(self._root):
            if rule is None:
                self._leaves.append(node)
            else:
                self._nodes.append((node, rule, before))
        self.edges = [GradientEdge(node, 0) for node, rule, _ in self._nodes if rule.curved]
        self.width = sum(math.prod(edge.node._input_metadata[0].shape) for edge in self.edges)

    def ahead(self, moved: Mapping[int, torch.Tensor]) -> list[Any]:
        """Tangents up to the loss, for {id(leaf): (q, *shape) its tangents}; returns what `back` needs.

        Raises:
          Unknown: a node has no rule for this use of it.
        """
        d: dict[Any, Any] = {leaf: moved.get(id(leaf.variable)) for leaf in self._leaves}
        pulls = []
        for node, rule, before in self._nodes:
            inputs = [None if f is None else d[f] for f in before]
            if all(x is None for x in inputs):
                d[node] = None
                continue
            push, pull = rule.of(node, inputs)
            pulls.append((node, before, pull))
            d[node] = None if node is self._root else push()
        return pulls

    def back(self, pulls: list[Any], adjoints: Iterable[torch.Tensor | None]) -> dict[int, torch.Tensor]:
        """{id(leaf): (q, *shape)} tangents of the gradient, from adjoints at `edges`; a leaf that is missing has none."""
        found = dict(zip((edge.node for edge in self.edges), adjoints, strict=True))
        d: dict[Any, Any] = {}
        for node, before, pull in reversed(pulls):
            for f, x in zip(before, pull(found.get(node), d.pop(node, None)), strict=True):
                if x is not None:
                    d[f] = d[f] + x if f in d else x
        return {id(leaf.variable): d[leaf] for leaf in self._leaves if leaf in d}


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
