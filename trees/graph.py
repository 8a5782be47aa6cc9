"""A draft tree as a networkx graph, for analyses and other people's drawings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import networkx as nx

from specdec.trees.labels import draft_probs, target_probs_of
from specdec.trees.tree import DraftTree
from specdec.types import Draw


def tree_graph(
    tree: DraftTree,
    decode: Callable[[int], str] | None = None,
    path: Collection[int] = (),
    target_probs: Sequence[float] | None = None,
) -> nx.DiGraph:
    """Returns the tree as a graph; `DraftTree.to_networkx` says what it holds."""
    accepted = set(path)
    drafted, targeted = draft_probs(tree), target_probs_of(tree, target_probs)
    order = [0] * len(tree)
    for siblings in tree.children:
        for place, node in enumerate(siblings):
            order[node] = place
    graph = nx.DiGraph()
    for node, token in enumerate(tree.token_list):
        graph.add_node(
            node,
            token=token,
            **({} if decode is None else {"text": decode(token)}),
            depth=tree.depth_list[node],
            order=order[node],
            draw=Draw(tree.draw_list[node]).name.lower(),
            draft_prob=drafted[node],
            target_prob=targeted[node],
            accepted=node in accepted,
        )
    graph.add_edges_from((parent, node) for node, parent in enumerate(tree.parent_list) if node)
    return graph
