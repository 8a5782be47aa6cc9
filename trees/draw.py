"""A draft tree as text: what was guessed, and the path that became text."""

from __future__ import annotations

from collections.abc import Callable, Collection

from rich.text import Text
from rich.tree import Tree

from specdec.trees.tree import DraftTree


def draw_tree(
    tree: DraftTree,
    path: Collection[int],
    decode: Callable[[int], str],
    next_token: int | None = None,
) -> Tree:
    """Returns a rich tree for a terminal: accepted nodes green with a tick, the others dim.

    Args:
        tree: the tree.
        path: accepted nodes, root not included.
        decode: gives a token's text.
        next_token: the target's own token behind the path, shown at its end.
    """
    accepted = set(path)
    drawn = {0: Tree(_label(decode(tree.token_list[0]), "bold"), guide_style="dim")}
    for node in range(1, len(tree)):
        text = decode(tree.token_list[node])
        label = _label(text, "bold green", " ✓") if node in accepted else _label(text, "dim")
        drawn[node] = drawn[tree.parent_list[node]].add(label)
    if next_token is not None:
        end = max(accepted, default=0)
        drawn[end].add(_label(decode(next_token), "bold yellow", " ← the target's own token"))
    return drawn[0]


def _label(text: str, style: str, note: str = "") -> Text:
    visible = text.replace("\n", "⏎").replace(" ", "·") or "∅"
    return Text.assemble((visible, style), (note, style))
