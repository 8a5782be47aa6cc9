"""The law of suffix drafting: what followed the longest matches, as likely as it has been."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter, neg
from typing import Any, NamedTuple, Protocol

from specdec.drafters.listed_law import ListedLaw
from specdec.drafters.suffix_automaton import Automaton
from specdec.drafters.suffix_calibration import OWN, SuffixCalibration
from specdec.types import Guesses

_OWN_BONUS = 1  # tokens by which a match in an earlier text must be longer to come first
_ENOUGH = 0.8  # when the guesses so far are as likely together, no shorter match is asked
_CERTAIN = 0.98  # the guesses of one match are together never more likely than this
_LEAST_CHANCE = 0.002  # of a path; a guess that makes it less likely is left out
_MAX_GUESSES = 16  # of a row

Match = tuple[int, int]  # a state and the matched length in tokens
Source = tuple[Automaton, int]  # and OWN or STORED
Context = tuple[int, int, int, Source]  # precedence, state, length


Found = tuple[float, int, int, int]  # chance, token, cell of the calibration, rank of the match


@dataclass(slots=True)
class _Place:
    """A longest match in each source, shared by the handles that have it, and what follows it.

    Attributes:
        matches: one for each source.
        found: what followed them, by token, in the order of asking; None until asked.
        rest: chance that none of `found` is right; 0 where the commonest tokens are not asked.
        ranked: all guesses from likely to unlikely; None until looked up.
        all: those that `ranked` is of; the commonest tokens are among them where `complete`.
        complete: whether nothing is to be added to `all`.
    """

    matches: tuple[Match, ...]
    found: dict[int, Found] | None = None
    rest: float = 1.0
    ranked: Guesses | None = None
    all: dict[int, Found] | None = None
    complete: bool = False


class LawMaker(Protocol):
    """Makes the laws of a text as it grows; see `SuffixLaws`."""

    def law(self, matches: Sequence[Match], common: Any) -> Any:
        """Returns the law behind the text.

        Args:
            matches: the longest one in each source.
            common: what `commonest` gave, for nodes behind which it is not known better.
        """
        ...

    def commonest(self) -> Any:
        """Returns the commonest tokens of this text and of the younger store, likely first."""
        ...


class SuffixLaws(NamedTuple):
    """Makes the laws of a text as it grows.

    Attributes:
        sources: the automata that are asked, this text's first.
        calibration: what guesses are worth now, and where they are counted.
        max_contexts: matches that are asked at a node.
        max_successors: guesses of each.
    """

    sources: Sequence[Source]
    calibration: SuffixCalibration
    max_contexts: int
    max_successors: int

    def law(self, matches: Sequence[Match], common: Sequence[Found]) -> SuffixLaw:
        """See `LawMaker.law`."""
        return SuffixLaw(self, tuple(matches), common)

    def commonest(self) -> Sequence[Found]:
        """See `LawMaker.commonest`."""
        found: dict[int, Found] = {}
        contexts = [(0, 0, 0, source) for source in self.sources[:2]]
        # behind the matches in rank
        rank, chances = self.max_contexts, self.calibration.chances
        _ask(contexts, found, chances, self.max_successors, rank)
        return sorted(found.values(), key=itemgetter(0), reverse=True)


class SuffixLaw(ListedLaw):
    """A law that walks the automata: a handle stands for its longest match in each of them.

    A match may run into the tokens of the path, which are text if the path is right.

    Args:
        laws: of the text.
        matches: the longest one in each source.
        common: what `SuffixLaws.commonest` gave.
    """

    def __init__(
        self, laws: SuffixLaws, matches: tuple[Match, ...], common: Sequence[Found]
    ) -> None:
        self._sources = laws.sources
        self._automata = [automaton for automaton, _ in laws.sources]
        self._calibration = laws.calibration
        self._chances = laws.calibration.chances[:]
        self._max_contexts = laws.max_contexts
        self._max_successors = laws.max_successors
        root = _Place(matches)
        self._places = [root]  # of each handle
        self._known = {matches: root}
        self._paths = [1.0]  # the chance of each handle's path
        self._common = common
        self._most_common = common[0][0] if common else 0.0

    def extend(self, parent: int, token: int) -> int:
        """Returns a new handle for `parent` followed by `token`."""
        place = self._places[parent]
        path = self._paths[parent]
        guess = place.all.get(token) if place.all else None
        if guess is not None:
            longer = path * guess[0]
            if longer >= _LEAST_CHANCE:  # it stands in the node's row
                path = longer
        self._paths.append(path)
        advanced = [
            automaton.advance(state, length, token)
            for automaton, (state, length) in zip(self._automata, place.matches, strict=True)
        ]
        matches = tuple(advanced)
        below = self._known.get(matches)
        if below is None:
            below = self._known[matches] = _Place(matches)
        self._places.append(below)
        return len(self._places) - 1

    def guesses(self, handle: int) -> Guesses:
        """Returns the chances of what may follow; paths that are hardly likely are left out."""
        least = _LEAST_CHANCE / self._paths[handle]
        ranked = self._ranked(self._places[handle], least)
        if not ranked.tokens or ranked.chances[-1] >= least:
            return ranked
        count = bisect_right(ranked.chances, -least, key=neg)
        return Guesses(ranked.tokens[:count], ranked.chances[:count])

    def bound(self, handle: int) -> float:
        """Returns the largest chance; guesses that are left out count too."""
        place = self._places[handle]
        found = self._what_followed(place)
        most = place.rest * self._most_common
        return max([most, *[guess[0] for guess in found.values()]])

    def learn_along(self, tokens: Sequence[int]) -> None:
        """Counts that tokens came, one behind the other, from the root on."""
        handle = 0
        for token in tokens:
            self._record(self._places[handle], token)
            handle = self.extend(handle, token)

    def _record(self, place: _Place, token: int) -> None:
        """Counts the guesses at a place, whose true successor has become known.

        A context that comes after the one that was right is not counted: its chances are those of
        guesses that the contexts before it leave open.
        """
        self._ranked(place, least=0.0)
        found = place.all or {}
        last = found[token][3] if token in found else math.inf
        for _, guess, cell, rank in found.values():
            if rank > last:
                break
            self._calibration.record(cell, guess == token)

    def _ranked(self, place: _Place, least: float) -> Guesses:
        """Returns all guesses at a place that may be at least so likely."""
        known = place.ranked
        if known is not None and place.complete:
            return known
        found = self._what_followed(place)
        rest = place.rest
        most_common = rest * self._most_common
        # most nodes are too unlikely for the commonest tokens, which would take half the time
        if most_common and most_common >= least:
            found = found.copy()
            for chance, token, cell, rank in self._common:
                if len(found) >= _MAX_GUESSES:
                    break
                if token not in found:
                    found[token] = chance * rest, token, cell, rank
            place.complete = True
        elif known is not None:
            return known
        else:
            place.complete = not most_common
        best = sorted(found.values(), key=itemgetter(0), reverse=True)[:_MAX_GUESSES]
        place.all = found
        place.ranked = ranked = Guesses([guess[1] for guess in best], [guess[0] for guess in best])
        return ranked

    def _what_followed(self, place: _Place) -> dict[int, Found]:
        found = place.found
        if found is None:
            found = place.found = {}
            contexts = self._contexts(place.matches)
            place.rest = _ask(contexts, found, self._chances, self._max_successors, rank=0)
        return found

    def _contexts(self, matches: tuple[Match, ...]) -> list[Context]:
        """Returns the matches to ask, the best one first."""
        contexts: list[Context] = []
        several = False
        for source, (state, length) in zip(self._sources, matches, strict=True):
            if state == 0:
                continue
            several = bool(contexts)
            automaton, kind = source
            bonus = _OWN_BONUS if kind == OWN else 0
            for _ in range(self._max_contexts):
                contexts.append((length + bonus, state, length, source))
                state, length = automaton.shorter(state)
                if state == 0:
                    break
        if several:  # stable: this text, then the younger store
            contexts.sort(key=itemgetter(0), reverse=True)
        return contexts[: self._max_contexts]


def _ask(
    contexts: Sequence[Context],
    found: dict[int, Found],
    known: Sequence[float],
    max_successors: int,
    rank: int,
) -> float:
    """Adds what followed each match to `found`; returns the chance left for other tokens.

    Args:
        contexts: in the order of asking.
        found: what came before.
        known: chances of the calibration's cells.
        max_successors: guesses of each match.
        rank: of the first match.
    """
    rest, cells_of = 1.0, SuffixCalibration.cells
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
            ranked = ranked[:max_successors]
            cells = cells_of(source, length, ranked, total, latest)
            chances = [known[cell] for cell in cells]
            together, scale = sum(chances), rest
            if together > _CERTAIN:
                together, scale = _CERTAIN, rest * _CERTAIN / together
            for (token, _), chance, cell in zip(ranked, chances, cells, strict=True):
                found[token] = chance * scale, token, cell, rank
            rest *= 1.0 - together
            if rest < 1.0 - _ENOUGH:
                return 0.0
        rank += 1
    return rest
