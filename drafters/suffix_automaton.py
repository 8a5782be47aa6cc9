"""A suffix automaton of token ids: where a phrase occurred before, found in constant time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

SEPARATOR = -1  # ends a text when several are indexed together; never a successor

# A new token counts for its longest contexts, at most this many. Ordinary text has fewer than ten;
# a text that repeats one token has one for each, and would take quadratic time.
_MAX_COUNTED = 64
_MAX_SUCCESSORS = 16  # of a ranking; the rarer ones are in its total only
_KEPT_FROM = 6  # a state with more successors keeps their ranking until it changes


class Successors(NamedTuple):
    """What followed a phrase.

    Attributes:
        ranked: (token, count), often before rare, late before early; the 16 first.
        total: counts of all, the ends of texts among them.
        latest: the token that followed last, SEPARATOR where a text ended.
    """

    ranked: Sequence[tuple[int, int]]
    total: int
    latest: int


_NOTHING = Successors((), 0, SEPARATOR)


class Automaton(Protocol):
    """What suffix drafting asks of an automaton; see `SuffixAutomaton`."""

    def __len__(self) -> int: ...

    @property
    def repeated(self) -> tuple[int, int]:
        """State and length in tokens of the longest suffix that occurred before; (0, 0): none."""
        ...

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens to the text."""
        ...

    def advance(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Returns state and length in tokens of the longest suffix of "match, token" that occurs.

        Args:
            state: of the match.
            length: of the match; it may be shorter than the state's longest phrase.
            token: what follows.
        """
        ...

    def follow(self, state: int, length: int, tokens: Sequence[int]) -> tuple[int, int]:
        """Returns what `advance` comes to, token by token."""
        ...

    def shorter(self, state: int) -> tuple[int, int]:
        """Returns the longest shorter context that occurs elsewhere too, and its length."""
        ...

    def count(self, state: int) -> int:
        """Returns how often the state's phrases occur; of the empty phrase, the text's length."""
        ...

    def successors(self, state: int) -> Successors:
        """Returns what followed the state's phrases."""
        ...


class SuffixAutomaton:
    """The smallest automaton that reads every phrase of a growing text.

    A state stands for phrases that end at the same places; state 0 is the empty phrase, which
    precedes every token. Each state links to its longest suffix that also ends elsewhere. Hence
    the link of the whole text is its longest suffix that occurred before: see `repeated`.

    Appending a token takes constant time on average. A state's number of occurrences is kept by
    climbing the links from each new token (three or four steps in ordinary text), so that it is
    exact at any time; only contexts more than 64 links up, as periodic text has, are counted too
    low. Counting traversed edges instead would take the same climb.

    Source: Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985), used
    for drafting by SAM-Decoding (arXiv 2411.10666). There a state knows where it ended first; here
    it knows where it ended last, and how often.

    Args:
        tokens: the text to begin with.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._nexts: list[dict[int, int]] = [{}]
        self._links = [-1]
        self._lengths = [0]  # of a state's longest phrase
        self._counts = [0]
        self._ends = [0]  # where its phrases ended last
        self._last = 0
        self._size = 0
        self._rankings: dict[int, tuple[int, Successors]] = {}
        self._common: set[int] = set()  # the tokens that rank first behind the empty phrase
        self._least_common = 0  # count of the rarest of them
        self.extend(tokens)

    def __len__(self) -> int:
        """Returns how many tokens are indexed, separators included."""
        return self._size

    @property
    def repeated(self) -> tuple[int, int]:
        """State and length in tokens of the longest suffix that occurred before; (0, 0): none."""
        state = max(self._links[self._last], 0)
        return state, self._lengths[state]

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens to the text."""
        nexts, links, lengths = self._nexts, self._links, self._lengths
        counts, ends = self._counts, self._ends
        last, size, common = self._last, self._size, self._common
        for token in tokens:
            size += 1
            new = len(nexts)
            nexts.append({})
            lengths.append(size)
            links.append(0)
            counts.append(0)
            ends.append(size)
            state = last
            while state >= 0 and token not in nexts[state]:
                nexts[state][token] = new
                state = links[state]
            if state >= 0:
                target = nexts[state][token]
                if lengths[state] + 1 < lengths[target]:
                    # the shorter phrases of the target now end at a place where the longer do not
                    target = self._split(state, token, target)
                links[new] = target
            last = state = new
            for _ in range(_MAX_COUNTED):
                counts[state] += 1
                ends[state] = size
                state = links[state]
                if state <= 0:
                    break
            if token not in common and counts[nexts[0][token]] >= self._least_common:
                self._note_common(token)
        self._last, self._size = last, size

    def _split(self, state: int, token: int, old: int) -> int:
        """Gives the phrases of `old` that end "a phrase of `state`, token" a state of their own."""
        nexts, links = self._nexts, self._links
        shorter = len(nexts)
        nexts.append(nexts[old].copy())
        self._lengths.append(self._lengths[state] + 1)
        links.append(links[old])
        self._counts.append(self._counts[old])
        self._ends.append(self._ends[old])
        links[old] = shorter
        while state >= 0 and nexts[state].get(token) == old:
            nexts[state][token] = shorter
            state = links[state]
        return shorter

    def _note_common(self, token: int) -> None:
        if token == SEPARATOR:
            return
        common, first = self._common, self._nexts[0]
        common.add(token)
        if len(common) > _MAX_SUCCESSORS:
            common.remove(min(common, key=lambda t: (self._counts[first[t]], self._ends[first[t]])))
            # counts only grow, so this stays a lower bound for whoever wants to come in
            self._least_common = min([self._counts[first[t]] for t in common])

    def advance(self, state: int, length: int, token: int) -> tuple[int, int]:
        """See `Automaton.advance`."""
        nexts = self._nexts
        after = nexts[state].get(token)
        if after is not None:
            return after, length + 1
        while state > 0:
            state = self._links[state]
            after = nexts[state].get(token)
            if after is not None:
                return after, self._lengths[state] + 1
        return 0, 0

    def follow(self, state: int, length: int, tokens: Sequence[int]) -> tuple[int, int]:
        """Returns what `advance` comes to, token by token."""
        for token in tokens:
            state, length = self.advance(state, length, token)
        return state, length

    def shorter(self, state: int) -> tuple[int, int]:
        """Returns the longest shorter context that occurs elsewhere too, and its length."""
        link = max(self._links[state], 0)
        return link, self._lengths[link]

    def count(self, state: int) -> int:
        """Returns how often the state's phrases occur; of the empty phrase, the text's length."""
        return self._counts[state] if state else self._size

    def successors(self, state: int) -> Successors:
        """Returns what followed the state's phrases."""
        after = self._nexts[state]
        if len(after) <= _KEPT_FROM:
            return self._ranked(after)
        # a state gets a successor one token after it was counted, the empty phrase every time
        version = self._counts[state] - (self._ends[state] == self._size) if state else self._size
        kept = self._rankings.get(state)
        if kept is not None and kept[0] == version:
            return kept[1]
        if state:
            found = self._ranked(after)
        else:
            found = self._ranked({token: after[token] for token in self._common})
            found = found._replace(total=self._size)
        self._rankings[state] = version, found
        return found

    def _ranked(self, after: dict[int, int]) -> Successors:
        counts, ends = self._counts, self._ends
        if len(after) == 1:
            for token, state in after.items():
                pairs = ((token, counts[state]),) if token != SEPARATOR else ()
                return Successors(pairs, counts[state], token)
        if not after:
            return _NOTHING
        every = [(counts[state], ends[state], token) for token, state in after.items()]
        every.sort(reverse=True)
        latest = max(every, key=_end)[2]
        total = sum([count for count, _, _ in every])
        best = every[: _MAX_SUCCESSORS + 1]
        ranked = [(token, count) for count, _, token in best if token != SEPARATOR]
        return Successors(ranked[:_MAX_SUCCESSORS], total, latest)


def _end(entry: tuple[int, int, int]) -> int:
    return entry[1]
