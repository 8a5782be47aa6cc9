"""What draft models with a cache of their own share: they read each row's text."""

from __future__ import annotations

import logging
from abc import ABC
from collections.abc import Sequence

import torch

from specdec.backend.model import causal_ancestors
from specdec.drafters.model_drafter import ModelDrafter
from specdec.types import PromptRows, StepOutcome

logger = logging.getLogger(__name__)


class TextReader(ModelDrafter, ABC):
    """Reads what is new in every row's text before it guesses.

    Accepted nodes keep their place in the cache, so a step feeds the model nothing but the tokens
    it has not seen. The subclass gives `_backend` and `_vocabulary`, and calls `reset` then.
    """

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        """Begins a row; the draft model reads the prompt when the first tree is wanted."""
        self._waiting.append(row)

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        """Notes which of the drafted nodes became text."""
        for outcome in outcomes:
            law = self._laws.pop(outcome.row, None)
            if law is not None:
                run = law.run_along(outcome.tree, outcome.path)
                places = [law.places[handle] for handle in run]
                tokens = [self._vocabulary.draft_token(law.tokens[handle]) for handle in run]
                self._kept[outcome.row] = places, tokens

    def stop(self, row: int) -> None:
        """Takes the row out of the draft model's batch."""
        super().stop(row)
        if row in self._waiting:
            self._waiting.remove(row)
        if row not in self._places:
            return
        self._commit()
        place = self._places.index(row)
        self._cache.retire(place)
        self._places[place] = self._places[-1]
        self._places.pop()
        del self._read[row]
        self._vocabulary.forget(row)

    def reset(self) -> None:
        """Drops all rows; there is nothing learned."""
        self._laws.clear()
        self._places.clear()
        self._waiting: list[int] = []
        self._read: dict[int, list[int]] = {}  # the draft tokens of each row that are in the cache
        self._kept: dict[int, tuple[list[int], list[int]]] = {}  # pending places and their tokens
        self._told_the_end = False

    def _commit(self) -> None:
        """Keeps the accepted nodes of the last step in the cache."""
        kept = [self._kept.get(row, ([], [])) for row in self._places]
        self._cache.commit([places for places, _ in kept])
        for row, (_, tokens) in zip(self._places, kept, strict=True):
            self._read[row] += tokens
        self._kept.clear()

    def _read_roots(self) -> None:
        """Reads what is new in every row's text, its root included."""
        if self._waiting:
            self._places, self._waiting = self._waiting, []
            self._read = {row: [] for row in self._places}
            for row in self._places:  # nothing of a text that was never stopped
                self._vocabulary.forget(row)
            self._cache = self._backend.new_cache(len(self._places), capacity=256)
        self._commit()
        tails: list[list[int]] = []
        lengths = []
        for row in self._places:
            law = self._laws.get(row)
            read = self._read[row]
            tails.append([])
            if law is not None:
                kept, tail = self._vocabulary.reread(row, law.text, read)
                del read[kept:]
                if tail and self._in_reach(kept + len(tail)):
                    tails[-1] = tail
                else:
                    self._tell_the_end(row, ended=bool(tail))
                    self._know_nothing(law, 0)
            lengths.append(len(read))
            read += tails[-1]
        self._cache.roll_back(lengths)
        self._forget_positions()
        width = max(map(len, tails))
        if width == 0:
            return
        # padding shares the last position: a longer one may change a model's frequencies
        depths = [[min(i, max(len(tail) - 1, 0)) for i in range(width)] for tail in tails]
        ends = sorted({len(tail) - 1 for tail in tails if tail})
        logits = self._pass(
            tails, torch.tensor(depths), causal_ancestors(len(tails), width), torch.tensor(ends)
        )
        for place, (row, tail) in enumerate(zip(self._places, tails, strict=True)):
            if tail:
                self._know(self._laws[row], [0], logits[place, [ends.index(len(tail) - 1)]])
        self._cache.advance([len(tail) for tail in tails])
        self._forget_positions()

    def _tell_the_end(self, row: int, *, ended: bool) -> None:
        limit = self._backend.traits.positions
        if ended and limit is not None and not self._told_the_end:
            self._told_the_end = True
            logger.warning(
                "row %d is longer than the draft model's %d positions; it goes on without drafts",
                row,
                limit.num_positions,
            )
