"""Draft trees and the policies that grow them."""

from specdec.trees.best_first import BestFirst, TopN
from specdec.trees.chain import Chain
from specdec.trees.coupled_best_first import CoupledBestFirst
from specdec.trees.dyspec import DySpec, DySpecLayered, DySpecThreshold
from specdec.trees.marginals import Marginals
from specdec.trees.monte_carlo import MonteCarlo
from specdec.trees.rsd import RsdC, RsdS
from specdec.trees.sampled_plus_top import SampledPlusTop
from specdec.trees.shapes import Iid, Sequoia, Stem
from specdec.trees.static import Static
from specdec.trees.tree import DraftTree

__all__ = [
    "BestFirst",
    "Chain",
    "CoupledBestFirst",
    "DraftTree",
    "DySpec",
    "DySpecLayered",
    "DySpecThreshold",
    "Iid",
    "Marginals",
    "MonteCarlo",
    "RsdC",
    "RsdS",
    "SampledPlusTop",
    "Sequoia",
    "Static",
    "Stem",
    "TopN",
]
