"""The one place that maps a drafter's name to its recipe. Heavy imports happen inside."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from specdec.training.corpus import OwnText
from specdec.training.trainer import Recipe
from specdec.types import Drafter


class RecipeModule(Protocol):
    """What a module of a recipe has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the recipe's own options; may set defaults, `default_epochs` among them."""
        ...

    def make(self, model: Any, texts: Sequence[OwnText], arguments: argparse.Namespace) -> Recipe:
        """Returns the recipe; the texts come without features."""
        ...


class Entry(NamedTuple):
    """One drafter that can be trained.

    Attributes:
        module: where its recipe is.
        drafter: its class in `specdec.drafters`, made with ``weights=FOLDER``.
        help: one line.
    """

    module: str
    drafter: str
    help: str

    def load(self) -> RecipeModule:
        """Imports the recipe."""
        return cast("RecipeModule", importlib.import_module(self.module))

    def drafter_of(self, folder: Path) -> Drafter:
        """Returns the drafter with weights of a folder."""
        import specdec.drafters as drafters

        drafter: Drafter = getattr(drafters, self.drafter)(weights=folder)
        return drafter


RECIPES = {
    name: entry
    for name, entry in {
        "student": Entry(
            "specdec.training.student", "Student", "a few of the target's layers, distilled"
        ),
        "diffusion": Entry(
            "specdec.training.diffusion", "Diffusion", "a block at once, from the target's states"
        ),
        "lexical_unit": Entry(
            "specdec.training.lexical_unit", "LexicalUnit", "units the target is sure of, at once"
        ),
    }.items()
    if find_spec(entry.module) is not None
}
