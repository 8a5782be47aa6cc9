"""The laws of suffix drafting in C."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

from specdec.drafters.native_automaton import NativeAutomaton
from specdec.drafters.native_drafter import NativeSource
from specdec.drafters.suffix_calibration import LENGTH_BUCKETS, SHARE_BUCKETS, SuffixCalibration
from specdec.drafters.suffix_law import Match, Source
from specdec.kernels.drafting import MOST_SUCCESSORS, FoundStruct, SuffixPartsStruct, functions
from specdec.kernels.step_structs import SUFFIXES
from specdec.trees.native_law import NativeLaw

_MOST_CONTEXTS = 1024  # of a node; ordinary text has fewer than ten


class Common(NamedTuple):
    """The `num` commonest tokens, likely first."""

    found: ctypes.Array[FoundStruct]
    num: int


class NativeSuffixLaws:
    """Does what `specdec.drafters.suffix_law.SuffixLaws` says, with the automata of C.

    Args:
        sources: the automata that are asked, this text's first.
        calibration: what guesses are worth now, and where they are counted.
        max_contexts: matches that are asked at a node.
        max_successors: guesses of each.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        calibration: SuffixCalibration,
        max_contexts: int,
        max_successors: int,
    ) -> None:
        tables = (calibration.hits_of_cells, calibration.trials_of_cells, calibration.chances)
        self._kept = sources, tables  # what the pointers point to
        parts = self._parts = SuffixPartsStruct()
        for place, (automaton, kind) in enumerate(sources):
            assert isinstance(automaton, NativeAutomaton)
            parts.sources[place] = (automaton.pointer, kind)
        parts.num_sources, parts.num_lengths = len(sources), len(LENGTH_BUCKETS)
        parts.share_buckets = SHARE_BUCKETS.buffer_info()[0]
        parts.length_buckets = LENGTH_BUCKETS.buffer_info()[0]
        parts.hits, parts.trials, parts.chances = [own.buffer_info()[0] for own in tables]
        parts.max_contexts = min(max_contexts, _MOST_CONTEXTS)
        parts.max_successors = max_successors
        self._at = ctypes.addressof(parts)

    def law(self, matches: Sequence[Match], common: Common) -> NativeLaw:
        """See `specdec.drafters.suffix_law.LawMaker.law`."""
        self._ask(matches, common)
        return NativeLaw(functions().suffix_law(self._at), self._kept, common)

    def _ask(self, matches: Sequence[Match], common: Common) -> None:
        parts = self._parts
        for place, match in enumerate(matches):
            parts.matches[place] = match
        parts.common, parts.num_common = ctypes.addressof(common.found), common.num

    def source(
        self,
        matches: Sequence[Match],
        common: Common,
        common_until: int,
        came: Callable[[Sequence[int], list[Match], Common, int], None],
    ) -> NativeSource:
        """Returns the automata as C code asks them in several steps; this text's grows by these.

        Args:
            matches: the longest ones.
            common: the commonest tokens.
            common_until: tokens of this text, from which on these are to be ranked anew.
            came: told afterwards the tokens that became text, and then what the others are.
        """
        parts = self._parts
        self._ask(matches, common)
        ranked = type(common.found).from_buffer_copy(common.found)  # C code writes there
        parts.common = ctypes.addressof(ranked)

        def went_on(until: int, tokens: Sequence[int]) -> None:
            longest = [(match.state, match.length) for match in parts.matches[: len(matches)]]
            came(tokens, longest, Common(ranked, parts.num_common), until)

        return NativeSource(SUFFIXES, self._at, common_until, went_on, (self, ranked))

    def commonest(self) -> Common:
        """See `specdec.drafters.suffix_law.LawMaker.commonest`."""
        found = (FoundStruct * (2 * MOST_SUCCESSORS))()
        return Common(found, functions().suffix_commonest(self._at, found))
