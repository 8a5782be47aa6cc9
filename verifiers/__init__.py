"""Lossless acceptance rules."""

from specdec.verifiers.coupled import Coupled
from specdec.verifiers.match import Match
from specdec.verifiers.rejection import Rejection

__all__ = ["Coupled", "Match", "Rejection"]
