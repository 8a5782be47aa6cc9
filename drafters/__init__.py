"""Drafters: cheap guesses about what the target will write."""

from specdec.drafters.diffusion import Diffusion
from specdec.drafters.early_exit import EarlyExit
from specdec.drafters.hybrid import Hybrid
from specdec.drafters.lexical_unit import LexicalUnit
from specdec.drafters.masked_diffusion import MaskedDiffusion
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.small_model import SmallModel
from specdec.drafters.student import Student
from specdec.drafters.suffix import Suffix
from specdec.drafters.token_recycling import TokenRecycling
from specdec.drafters.trigram import Trigram

__all__ = [
    "Diffusion",
    "EarlyExit",
    "Hybrid",
    "LexicalUnit",
    "MaskedDiffusion",
    "PromptLookup",
    "SmallModel",
    "Student",
    "Suffix",
    "TokenRecycling",
    "Trigram",
]
