"""All rules by which tangents pass the nodes of a PyTorch loss graph: forward over reverse, node by node."""

from . import _torch_rules_elements, _torch_rules_layers, _torch_rules_norm  # noqa: F401  they enter their rules
from ._torch_rule import RULES, Unknown

__all__ = ["RULES", "Unknown"]
