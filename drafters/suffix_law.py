"""The law of suffix drafting: what followed the longest matches, as likely as it has been."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from operator import itemgetter, neg
from typing import NamedTuple

from specdec.drafters.listed_law import ListedLaw
from specdec.drafters.suffix_automaton import SuffixAutomaton
from specdec.drafters.suffix_calibration import OWN, SuffixCalibration
from specdec.types import Guesses

_OWN_BONUS = 1  # tokens by which a match in an earlier text must be longer to come first
_ENOUGH = 0.8  # when the guesses so far are as likely together, no shorter match is asked
_CERTAIN = 0.98  # the guesses of one match are together never more likely than this
_LEAST_CHANCE = 0.002  # of a path; a guess that makes it less likely is left out
_MAX_GUESSES = 16  # of a row

Match = tuple[int, int]  # a state and the matched length in tokens
Source = tuple[SuffixAutomaton, int]  # and OWN or STORED
Context = tuple[int, int, int, Source]  # precedence, state, length


Found = tuple[float, int, int, int]  # chance, token, cell of the calibration, rank of the match


class _Guesses(NamedTuple):
    """What may follow a match.

    Attributes:
        ranked: from likely to unlikely.
        found: all guesses, as they were found.
        rest: chance that none of them is right; 0 where the commonest tokens are not asked.
        complete: whether the commonest tokens are among them, if they are asked at all.
    """

    ranked: Guesses
    found: dict[int, Found]
    rest: float
    complete: bool


class SuffixLaw(ListedLaw):
    """A law that walks the automata: a handle stands for its longest match in each of them.

    A match may run into the tokens of the path, which are text if the path is right.

    Attributes:
        match_length: tokens of the longest match at the root; 0 if nothing matched.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        matches: tuple[Match, ...],
        calibration: SuffixCalibration,
        max_contexts: int,
        max_successors: int,
    ) -> None:
        self._sources = sources
        self._automata = [automaton for automaton, _ in sources]
        self._calibration_chances = calibration.chances[:]
        self._max_contexts = max_contexts
        self._max_successors = max_successors
        self._matches = [matches]
        self._paths = [1.0]  # the chance of each handle's path
        self._known: dict[tuple[Match, ...], _Guesses] = {}
        self._bounded: dict[int, Guesses] = {}  # what a bound was taken from, by handle
        # the same behind every node, so they are ranked once
        common: dict[int, Found] = {}
        self._ask([(0, 0, 0, source) for source in sources[:2]], common, 1.0, rank=max_contexts)
        self._common = sorted(common.values(), key=itemgetter(0), reverse=True)
        self.match_length = max(length for _, length in matches)

    def extend(self, parent: int, token: int) -> int:
        """Returns a new handle for `parent` followed by `token`."""
        matches = self._matches[parent]
        guesses = self._known.get(matches)
        path = self._paths[parent]
        guess = guesses.found.get(token) if guesses is not None else None
        if guess is not None:
            longer = path * guess[0]
            if longer >= _LEAST_CHANCE:  # it stands in the node's row
                path = longer
        self._paths.append(path)
        advanced = [
            automaton.advance(state, length, token)
            for automaton, (state, length) in zip(self._automata, matches, strict=True)
        ]
        self._matches.append(tuple(advanced))
        return len(self._matches) - 1

    def guesses(self, handle: int) -> Guesses:
        """Returns the chances of what may follow; paths that are hardly likely are left out."""
        bounded = self._bounded.pop(handle, None)
        if bounded is not None:
            return bounded
        least = _LEAST_CHANCE / self._paths[handle]
        ranked = self._guesses(handle, least).ranked
        if not ranked.tokens or ranked.chances[-1] >= least:
            return ranked
        count = bisect_right(ranked.chances, -least, key=neg)
        return Guesses(ranked.tokens[:count], ranked.chances[:count])

    def bound(self, handle: int) -> float:
        """Returns the largest chance."""
        bounded = self._bounded[handle] = self.guesses(handle)
        return bounded.chances[0] if bounded.chances else 0.0

    def record(self, handle: int, token: int, calibration: SuffixCalibration) -> None:
        """Counts the guesses at a handle, whose true successor has become known.

        A context that comes after the one that was right is not counted: its chances are those of
        guesses that the contexts before it leave open.
        """
        found = self._guesses(handle, least=0.0).found
        last = found[token][3] if token in found else math.inf
        for _, guess, cell, rank in found.values():
            if rank > last:
                break
            calibration.record(cell, guess == token)

    def _guesses(self, handle: int, least: float) -> _Guesses:
        """Returns all guesses at a handle that may be at least so likely."""
        matches = self._matches[handle]
        guesses = self._known.get(matches)
        if guesses is None:
            found: dict[int, Found] = {}
            rest = self._ask(self._contexts(matches), found, 1.0)
            guesses = self._known[matches] = _sorted(found, rest, complete=not self._common)
        # most nodes are too unlikely for the commonest tokens, which would take half the time
        if not guesses.complete and guesses.rest * self._common[0][0] >= least:
            found, rest = guesses.found.copy(), guesses.rest
            for chance, token, cell, rank in self._common:
                if len(found) >= _MAX_GUESSES:
                    break
                if token not in found:
                    found[token] = chance * rest, token, cell, rank
            guesses = self._known[matches] = _sorted(found, rest, complete=True)
        return guesses

    def _contexts(self, matches: tuple[Match, ...]) -> list[Context]:
        """Returns the matches to ask, the best one first."""
        contexts = []
        for source, (state, length) in zip(self._sources, matches, strict=True):
            bonus = _OWN_BONUS if source[1] == OWN else 0
            for _ in range(self._max_contexts):
                if state == 0:
                    break
                contexts.append((length + bonus, state, length, source))
                state, length = source[0].shorter(state)
        contexts.sort(key=itemgetter(0), reverse=True)  # stable: this text, then the younger store
        return contexts[: self._max_contexts]

    def _ask(
        self, contexts: Sequence[Context], found: dict[int, Found], rest: float, rank: int = 0
    ) -> float:
        """Adds what followed each match to `found`; returns the chance left for other tokens."""
        known = self._calibration_chances
        for _, state, length, (automaton, source) in contexts:
            ranked, total, latest = automaton.successors(state)
            if found:
                fresh = []
                for pair in ranked:
                    if pair[0] in found:
                        total -= pair[1]
                    else:
                        fresh.append(pair)
                ranked = fresh
            if ranked:
                ranked = ranked[: self._max_successors]
                cells = SuffixCalibration.cells(source, length, ranked, total, latest)
                chances = [known[cell] for cell in cells]
                together = sum(chances)
                scale = rest if together <= _CERTAIN else rest * _CERTAIN / together
                for (token, _), chance, cell in zip(ranked, chances, cells, strict=True):
                    found[token] = chance * scale, token, cell, rank
                rest *= 1.0 - min(together, _CERTAIN)
                if rest < 1.0 - _ENOUGH:
                    return 0.0
            rank += 1
        return rest


def _sorted(found: dict[int, Found], rest: float, *, complete: bool) -> _Guesses:
    best = sorted(found.values(), key=itemgetter(0), reverse=True)[:_MAX_GUESSES]
    return _Guesses(
        Guesses([guess[1] for guess in best], [guess[0] for guess in best]),
        found,
        rest,
        complete or rest == 0.0,
    )
