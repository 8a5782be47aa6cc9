"""The one place that maps a drafter's name to its recipe. Heavy imports happen inside."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from specdec.training.corpus import OwnText
from specdec.training.trainer import Recipe
from specdec.types import Drafter


class Make(Protocol):
    """A recipe's function `make`."""

    def __call__(self, model: Any, texts: Sequence[OwnText], /, **settings: Any) -> Recipe:
        """Returns the recipe; the texts come without features."""
        ...


class Entry(NamedTuple):
    """One drafter that can be trained.

    Attributes:
        module: where its recipe is: a function `make`, and a dataclass of its settings.
        settings: that dataclass; its fields are options of the command.
        drafter: its class in `specdec.drafters`, made with ``weights=FOLDER``.
        help: one line.
        epochs: of a run that is not told how long to be.
        learning_rate: of a run that is not told another.
    """

    module: str
    settings: str
    drafter: str
    help: str
    epochs: float
    learning_rate: float

    def settings_class(self) -> type:
        """Imports the dataclass."""
        found: type = getattr(importlib.import_module(self.module), self.settings)
        return found

    def make(self) -> Make:
        """Imports the function."""
        found: Make = importlib.import_module(self.module).make
        return found

    def drafter_of(self, folder: Path) -> Drafter:
        """Returns the drafter with weights of a folder."""
        import specdec.drafters as drafters

        drafter: Drafter = getattr(drafters, self.drafter)(weights=folder)
        return drafter


RECIPES = {
    name: entry
    for name, entry in {
        "student": Entry(
            "specdec.training.student",
            "StudentSettings",
            "Student",
            "a few of the target's layers, distilled",
            10,
            2e-3,
        ),
        "diffusion": Entry(
            "specdec.training.diffusion",
            "DiffusionSettings",
            "Diffusion",
            "a block at once, from the target's states",
            10,
            6e-4,
        ),
        "lexical_unit": Entry(
            "specdec.training.lexical_unit",
            "UnitSettings",
            "LexicalUnit",
            "tokens that the target is sure of, at once",
            2,
            1e-2,
        ),
    }.items()
    if find_spec(entry.module) is not None
}
