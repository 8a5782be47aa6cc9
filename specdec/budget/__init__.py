"""How many nodes a tree may have: a fixed number, or what measured costs say is worth it."""

from specdec.budget.auto import AutoBudget
from specdec.budget.base import FixedBudget, NodeBudget

__all__ = ["AutoBudget", "FixedBudget", "NodeBudget"]
