"""What drawings write at a node: its token made visible, and its two probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

from specdec.errors import TreeError
from specdec.trees.tree import DraftTree

_MARKS = {"\n": "⏎", " ": "·", "\t": "⇥"}


def visible(text: str) -> str:
    """Returns `text` with its white space marked; "∅" for nothing at all.

    Control characters are escaped: a terminal would obey them, and XML forbids them.
    """
    return "".join(_MARKS.get(c) or (c if c.isprintable() else escaped(c)) for c in text) or "∅"


def escaped(character: str) -> str:
    r"""Returns a character as Python would write it: ``\x1b``, ``\u4f60``."""
    return character.encode("unicode_escape").decode("ascii")


def draft_probs(tree: DraftTree) -> list[float | None]:
    """Returns what the tree notes as each node's draft probability, None where it notes nothing."""
    return [None if math.isnan(chance) else chance for chance in tree.chance_list]


def target_probs_of(tree: DraftTree, target_probs: Sequence[float] | None) -> list[float | None]:
    """Returns one number for each node, None where it is not known.

    Raises:
        TreeError: if there are numbers, but not one for each node.
    """
    if target_probs is None:
        return [None] * len(tree)
    if len(target_probs) != len(tree):
        raise TreeError(
            f"target_probs must hold one number for each of the {len(tree)} nodes, the root "
            f"included, got {len(target_probs)}; they come from the tree's own Step.target_probs()"
        )
    return [None if math.isnan(p) else float(p) for p in target_probs]


class Odds:
    """The two probabilities of each drafted node, in as few characters as they can be told in.

    Attributes:
        texts: one for each node, such as ".62 → .91", ".62" or "→ .91"; "" where nothing is known,
            and for the root, which nobody guessed.
        legend: what the numbers mean; "" where there are none.
    """

    def __init__(self, tree: DraftTree, target_probs: Sequence[float] | None) -> None:
        pairs = list(zip(draft_probs(tree), target_probs_of(tree, target_probs), strict=True))
        pairs[0] = (None, None)
        self.texts = [_pair(draft, target) for draft, target in pairs]
        ours, theirs = (any(p is not None for p in side) for side in zip(*pairs, strict=True))
        names = [*(["draft"] if ours else []), *(["→ target"] if theirs else [])]
        self.legend = " ".join([*names, "probability"]) if names else ""


def _pair(draft: float | None, target: float | None) -> str:
    known = [] if draft is None else [_short(draft)]
    return " ".join(known if target is None else [*known, "→", _short(target)])


def _short(probability: float) -> str:
    if 0 < probability < 0.005:
        return "<.01"
    return f"{probability:.2f}".removeprefix("0").replace("1.00", "1.0")
