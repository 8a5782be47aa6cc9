"""Texts of rows that have ended, indexed for later rows in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specdec.drafters.suffix_automaton import SEPARATOR, Automaton, SuffixAutomaton


class TextStore:
    """Earlier texts in two generations, each a suffix automaton over at most half the tokens.

    Texts join the younger generation. When it is full it becomes the elder one, and what was the
    elder is dropped whole: first in, first out, without ever rebuilding an automaton, which would
    stall a call for the time of indexing everything again. So the store holds between half and all
    of `max_tokens` once it has been filled. A text longer than half keeps its end.

    Args:
        max_tokens: of all texts together, one for each text's end included; 0 stores nothing.
        make_automaton: of a generation.
    """

    def __init__(
        self, max_tokens: int, make_automaton: Callable[[], Automaton] = SuffixAutomaton
    ) -> None:
        self._make = make_automaton
        self._half = max_tokens // 2
        # changes whenever a match into the automata would be out of date
        self.version = 0
        self.automata: list[Automaton] = []  # younger first
        self._texts: list[list[list[int]]] = []  # of each automaton

    def __len__(self) -> int:
        """Returns how many tokens are stored."""
        return sum(map(len, self.automata))

    @property
    def texts(self) -> list[list[int]]:
        """The texts, eldest first; added to an empty store they make this one again."""
        return [text for generation in reversed(self._texts) for text in generation]

    def add(self, tokens: Sequence[int]) -> None:
        """Stores a text."""
        text = list(tokens[-(self._half - 1) :]) if self._half > 1 else []
        if not text:
            return
        if not self.automata or len(self.automata[0]) + len(text) + 1 > self._half:
            self.automata = [self._make(), *self.automata[:1]]
            self._texts = [[], *self._texts[:1]]
        self.automata[0].extend([*text, SEPARATOR])
        self._texts[0].append(text)
        self.version += 1
