"""The walk that `match` and `coupled` share: follow the child that carries the target's choice."""

from __future__ import annotations

from collections.abc import Callable

from specdec.trees.tree import DraftTree
from specdec.types import Verdict


def follow(tree: DraftTree, choose: Callable[[int], int]) -> Verdict:
    """Walks down from the root as long as a child carries the token chosen at its parent.

    Args:
        tree: the scored tree.
        choose: the target's choice at a node; called once for each node on the path.
    """
    node = 0
    path: list[int] = []
    while True:
        token = choose(node)
        child = next((c for c in tree.children[node] if tree.token_list[c] == token), None)
        if child is None:
            return Verdict(path, token)
        path.append(child)
        node = child
