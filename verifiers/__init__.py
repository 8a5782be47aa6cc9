"""Lossless acceptance rules."""

from specdec.verifiers.block import Block
from specdec.verifiers.coupled import Coupled
from specdec.verifiers.match import Match
from specdec.verifiers.rejection import Rejection
from specdec.verifiers.spectr import SpecTr
from specdec.verifiers.traversal import Traversal

__all__ = ["Block", "Coupled", "Match", "Rejection", "SpecTr", "Traversal"]
