"""What drafting takes, followed as a text goes on."""

from __future__ import annotations

_MEMORY = 0.95  # for each step
_LEAST_SPREAD = 0.1  # of the numbers of nodes, to tell what one more costs


class DraftClock:
    """Running means of the seconds of a draft, of its levels, and of learning from a node.

    Args:
        draft_seconds: of a draft, learning included; None to go by what is measured.
    """

    def __init__(self, draft_seconds: float | None = None) -> None:
        self._follows = draft_seconds is None
        self.draft_seconds = draft_seconds or 0.0
        self.level_seconds = 0.0
        self.learn_seconds = 0.0  # for a node more
        self.plain_learn_seconds = 0.0  # of a step without a draft
        # weight, nodes, their squares, seconds, and nodes x seconds of what was learned from
        self._sums = 0.0, 0.0, 0.0, 0.0, 0.0

    def drafted(self, levels: int, seconds: float) -> None:
        """Notes what it took to draft a tree of so many levels."""
        if self._follows:
            self.draft_seconds = _followed(self.draft_seconds, seconds)
            self.level_seconds = _followed(self.level_seconds, seconds / levels)

    def learned(self, num_rows: int, seconds: float, *, drafted: bool = True) -> None:
        """Fits what a node more costs; what learning takes at least is spent without a tree too."""
        if not self._follows:
            return
        if not drafted:
            self.plain_learn_seconds = _followed(self.plain_learn_seconds, seconds)
        weight, nodes, squares, total, products = self._sums
        if weight:
            seconds = min(seconds, 4 * total / weight)  # a pause of the machine
        weight = _MEMORY * weight + 1.0
        nodes = _MEMORY * nodes + num_rows
        squares = _MEMORY * squares + num_rows * num_rows
        total = _MEMORY * total + seconds
        products = _MEMORY * products + num_rows * seconds
        self._sums = weight, nodes, squares, total, products
        spread = squares / weight - (nodes / weight) ** 2
        if spread > _LEAST_SPREAD:
            slope = (products / weight - nodes * total / weight**2) / spread
            self.learn_seconds = max(0.0, slope)


def _followed(known: float, seconds: float) -> float:
    """Returns a running mean of seconds, moved towards a new measurement."""
    if not known:
        return seconds
    # neither the first call, nothing of which is in a cache yet, nor a pause of the machine is what
    # drafting costs; a drafter that is left out has few steps to correct either
    rate = 0.5 if seconds < known else 0.1
    return known + rate * (min(seconds, 4 * known) - known)
