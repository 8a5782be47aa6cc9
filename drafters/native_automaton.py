"""A suffix automaton in C."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

from specdec.drafters.suffix_automaton import Successors
from specdec.kernels.drafting import MatchStruct, SuccessorsStruct, functions


class NativeAutomaton:
    """Does what `SuffixAutomaton` says; a token takes half of the memory.

    Args:
        tokens: the text to begin with.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        own = functions()
        self._end = own.automaton_end
        self.pointer: int = own.automaton_new()
        self.extend(tokens)

    def __del__(self) -> None:
        self._end(self.pointer)

    def __reduce__(self) -> str:
        raise TypeError("an automaton holds memory of C code; it can be neither copied nor saved")

    def __len__(self) -> int:
        """Returns how many tokens are indexed, separators included."""
        size: int = functions().automaton_size(self.pointer)
        return size

    @property
    def repeated(self) -> tuple[int, int]:
        """State and length in tokens of the longest suffix that occurred before; (0, 0): none."""
        return _pair(functions().automaton_repeated(self.pointer))

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens to the text."""
        listed = array("i", tokens)
        functions().automaton_extend(self.pointer, *listed.buffer_info())

    def advance(self, state: int, length: int, token: int) -> tuple[int, int]:
        """See `specdec.drafters.suffix_automaton.Automaton.advance`."""
        return self.follow(state, length, [token])

    def follow(self, state: int, length: int, tokens: Sequence[int]) -> tuple[int, int]:
        """Returns what `advance` comes to, token by token."""
        listed, match = array("i", tokens), MatchStruct(state, length)
        return _pair(functions().automaton_follow(self.pointer, match, *listed.buffer_info()))

    def shorter(self, state: int) -> tuple[int, int]:
        """Returns the longest shorter context that occurs elsewhere too, and its length."""
        return _pair(functions().automaton_shorter(self.pointer, state))

    def count(self, state: int) -> int:
        """Returns how often the state's phrases occur; of the empty phrase, the text's length."""
        count: int = functions().automaton_count(self.pointer, state)
        return count

    def successors(self, state: int) -> Successors:
        """Returns what followed the state's phrases."""
        found = SuccessorsStruct()
        functions().automaton_successors(self.pointer, state, ctypes.byref(found))
        ranked = zip(found.tokens[: found.num], found.counts[: found.num], strict=True)
        return Successors(list(ranked), found.total, found.latest)


def _pair(match: MatchStruct) -> tuple[int, int]:
    return match.state, match.length
