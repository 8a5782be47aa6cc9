"""Prompt lookup: continue as the text continued the last time these words stood here."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from specdec.drafters.base import BaseDrafter
from specdec.drafters.listed_law import ListedLaw
from specdec.errors import ConfigError
from specdec.types import DraftContext, DrafterNeeds, DraftLaw, Guesses, PromptRows

# what a token that never followed here weighs against one occurrence; it makes long copies of one
# occurrence slowly less likely, so a tree does not stake everything on one chain
_UNSEEN_WEIGHT = 0.25


class PromptLookup(BaseDrafter):
    """Matches the last n tokens in the row's own text and copies what followed.

    The longest n-gram that occurred before wins. Where its occurrences go on differently the law
    has several tokens, weighted by how often and how lately they followed, so a tree can cover
    them; transformers' prompt lookup takes the first occurrence alone.

    Source: Saxena, "Prompt Lookup Decoding" (2023); the counts are ours.

    Args:
        max_matching_ngram_size: longest n-gram to look for (transformers' name and default 2
            there; 3 is better once all occurrences count).
        max_matches: occurrences to follow, the latest first.
    """

    name = "prompt_lookup"
    needs = DrafterNeeds(every_step=False)

    def __init__(self, max_matching_ngram_size: int = 3, max_matches: int = 16) -> None:
        if max_matching_ngram_size < 1 or max_matches < 1:
            raise ConfigError(
                "max_matching_ngram_size and max_matches must be at least 1, got "
                f"{max_matching_ngram_size} and {max_matches}"
            )
        self._max_ngram = max_matching_ngram_size
        self._max_matches = max_matches
        self._indices: dict[int, _NgramIndex] = {}

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        """Begins a row; its text is indexed as it grows."""
        self._indices[row] = _NgramIndex(self._max_ngram)

    def law(self, context: DraftContext) -> DraftLaw:
        """Returns the continuations of the longest match, none if nothing matches."""
        index = self._indices.setdefault(context.row, _NgramIndex(self._max_ngram))
        index.extend(context.tokens)
        return _ContinuationLaw(context.tokens, index.latest(context.tokens, self._max_matches))

    def stop(self, row: int) -> None:
        """Drops the row's index."""
        self._indices.pop(row, None)

    def reset(self) -> None:
        """Drops all indices."""
        self._indices.clear()


class _NgramIndex:
    """Where each n-gram of a growing text ends."""

    def __init__(self, max_ngram: int) -> None:
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._max_ngram = max_ngram
        self._indexed = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Indexes the n-grams that end before the last token: a match must have a continuation."""
        for end in range(self._indexed + 1, len(tokens)):
            for size in range(1, min(self._max_ngram, end) + 1):
                self._ends.setdefault(tuple(tokens[end - size : end]), []).append(end)
            self._indexed = end

    def latest(self, tokens: Sequence[int], count: int) -> list[int]:
        """Returns positions that followed the longest matching suffix, the latest first."""
        for size in range(min(self._max_ngram, len(tokens)), 0, -1):
            ends = self._ends.get(tuple(tokens[len(tokens) - size :]))
            if ends:
                return ends[: -count - 1 : -1]
        return []


class _ContinuationLaw(ListedLaw):
    """A law over copies: a handle stands for the text positions its path has been copied up to."""

    def __init__(self, tokens: Sequence[int], positions: list[int]) -> None:
        self._tokens = tokens
        self._end = len(tokens)
        self._positions = [positions]

    def extend(self, parent: int, token: int) -> int:
        matched = [
            position + 1
            for position in self._positions[parent]
            if position < self._end and self._tokens[position] == token
        ]
        self._positions.append(matched)
        return len(self._positions) - 1

    def guesses(self, handle: int) -> Guesses:
        """Returns what followed, likely first; the k-th latest occurrence weighs 1/k."""
        weights: dict[int, float] = {}
        for age, position in enumerate(self._positions[handle], start=1):
            if position < self._end:
                token = self._tokens[position]
                weights[token] = weights.get(token, 0.0) + 1 / age
        total = sum(weights.values()) + _UNSEEN_WEIGHT
        ranked = sorted(weights.items(), key=itemgetter(1), reverse=True)
        return Guesses([token for token, _ in ranked], [weight / total for _, weight in ranked])
