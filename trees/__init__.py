"""Draft trees and the policies that grow them."""

from specdec.trees.best_first import BestFirst
from specdec.trees.chain import Chain
from specdec.trees.static import Static
from specdec.trees.tree import DraftTree

__all__ = ["BestFirst", "Chain", "DraftTree", "Static"]
