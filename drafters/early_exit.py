"""The target's own first layers as drafter: the same weights, and the same cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from specdec.backend.cut import first_layers
from specdec.backend.model import causal_ancestors
from specdec.backend.packed import already_packed
from specdec.backend.probe import probed
from specdec.drafters.model_drafter import NO_ROW, ModelDrafter
from specdec.drafters.vocabulary_bridge import SharedVocabulary
from specdec.errors import ConfigError, UnsupportedModelError
from specdec.types import PromptRows, StepOutcome, TargetInfo

_DEFAULT_SHARE = 4  # a quarter of the layers


class EarlyExit(ModelDrafter):
    """Drafts with the target's first layers, its last norm and its head; it has no weights.

    The keys and values of these layers are the target's own: a step runs nothing but the root and
    the drafted nodes, and no prompt. Models trained for it guess well from few layers; others need
    most of them, and are then better served by another drafter.

    Source: LayerSkip, Elhoushi et al. (arXiv 2404.16710), self-speculative decoding.
    There the verifying pass goes on from the drafted tokens' states after the exit; ours runs all
    layers over the tree, as for any drafter, and drafts trees.

    Args:
        num_layers: layers to draft with, 1 up to all of the target's; None for a quarter of them.
    """

    name = "early_exit"

    def __init__(self, num_layers: int | None = None) -> None:
        super().__init__()
        self._num_layers = num_layers
        self._whole: Any = None

    def attach(self, target: TargetInfo) -> None:
        """Takes the first layers of the target.

        Raises:
            ConfigError: if the target has fewer layers, or if the model is not known or not the
                one of an earlier generator.
            UnsupportedModelError: if the family's layers cannot be found or cut.
        """
        if target.model is None:
            raise ConfigError(
                "early_exit drafts with the target's own layers: give it to a "
                "SpeculativeGenerator, which hands it the model"
            )
        if self._whole is not None and self._whole is not target.model:
            raise ConfigError(
                "this EarlyExit drafts with another model's layers; make one for each model"
            )
        count = target.model.config.get_text_config(decoder=True).num_hidden_layers
        layers = max(1, count // _DEFAULT_SHARE) if self._num_layers is None else self._num_layers
        if not 1 <= layers <= count:
            raise ConfigError(f"num_layers must be 1 to {count}, the target's layers, got {layers}")
        self._backend = probed(first_layers(target.model, layers), packed_weights=None)
        self._backend.packed = already_packed(target.model)
        self._backend.refresh()
        if len(self._backend.specs) != layers:
            raise UnsupportedModelError(
                f"{type(target.model).__name__} ran {len(self._backend.specs)} layers when cut to "
                f"{layers}: something holds on to the whole model"
            )
        self._vocabulary = SharedVocabulary(target.vocab_size, target.vocab_size)
        self._whole = target.model

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        """Looks whether the target's weights or parts have changed since the last call."""
        self._backend.refresh()

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        """Forgets the step's laws; what became text is in the target's cache."""
        for outcome in outcomes:
            self._laws.pop(outcome.row, None)

    def reset(self) -> None:
        """Drops all rows; there is nothing learned."""
        self._laws.clear()

    def _read_roots(self) -> None:
        """Runs the roots, behind what the target has committed."""
        places: dict[int, int] = {}
        for row, law in self._laws.items():
            if law.target is None:
                raise ConfigError(
                    "early_exit reads the target's cache, which this context does not have"
                )
            self._cache = law.target.cache
            if self._in_reach(self._cache.lengths[law.target.place] + 1):
                places[law.target.place] = row
            else:
                self._know_nothing(law, 0)
        self._cache.drop_pending()
        self._forget_positions()
        size = self._cache.batch_size
        self._places = [places.get(place, NO_ROW) for place in range(size)]
        if not places:
            return
        roots = [[self._laws[row].tokens[0]] if row != NO_ROW else [] for row in self._places]
        even = min(self._cache.lengths) == max(self._cache.lengths)
        logits = self._pass(
            roots,
            torch.zeros(size, 1, dtype=torch.int64),
            None if even else causal_ancestors(size, 1),
        )
        for place, row in enumerate(self._places):
            if row != NO_ROW:
                self._laws[row].places[0] = 0
                self._know(self._laws[row], [0], logits[place])
