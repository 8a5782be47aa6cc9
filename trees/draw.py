"""A draft tree as text: what was guessed, and the path that became text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from rich.text import Text
from rich.tree import Tree

from specdec.trees.labels import Odds, visible
from specdec.trees.tree import DraftTree


def draw_tree(
    tree: DraftTree,
    path: Collection[int],
    decode: Callable[[int], str],
    next_token: int | None = None,
    target_probs: Sequence[float] | None = None,
) -> Tree:
    """Returns a rich tree for a terminal: accepted nodes green with a tick, the others dim.

    Behind a token stands what is known of its probabilities, ".62 → .91": the drafter's and the
    target's. The root was not guessed; what the numbers mean stands in the place of its own.

    Args:
        tree: the tree.
        path: accepted nodes, root not included.
        decode: gives a token's text.
        next_token: the target's own token behind the path, shown at its end.
        target_probs: the target's probability of each node's token, from `Step.target_probs`.
    """
    accepted = set(path)
    odds = Odds(tree, target_probs)
    root = _label(decode(tree.token_list[0]), "bold", "", odds.legend)
    drawn = {0: Tree(root, guide_style="dim")}
    for node in range(1, len(tree)):
        style, note = ("bold green", " ✓") if node in accepted else ("dim", "")
        label = _label(decode(tree.token_list[node]), style, note, odds.texts[node])
        drawn[node] = drawn[tree.parent_list[node]].add(label)
    if next_token is not None:
        end = max(accepted, default=0)
        drawn[end].add(_label(decode(next_token), "bold yellow", " ← the target's own token"))
    return drawn[0]


def _label(text: str, style: str, note: str = "", odds: str = "") -> Text:
    return Text.assemble(
        (visible(text), style), (note, style), (f"  {odds}" if odds else "", "dim")
    )
