"""Where the nodes of a tree stand in a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """Where a node stands: its depth, and its height in rows counted from the top."""

    depth: int
    y: float


def tidy_layout(parents: Sequence[int]) -> list[Place]:
    """Returns a place for each node of a tree: leaves on rows of their own, parents amid children.

    Args:
        parents: each node's parent, -1 for node 0; parents stand before their children.
    """
    children: list[list[int]] = [[] for _ in parents]
    depths = [0] * len(parents)
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
        depths[node] = depths[parent] + 1
    rows = [0.0] * len(parents)
    leaves, stack = 0, [0]
    while stack:
        node = stack.pop()
        stack += reversed(children[node])
        if not children[node]:
            rows[node] = leaves
            leaves += 1
    for node in reversed(range(len(parents))):  # children stand behind their parents
        if children[node]:
            rows[node] = sum(rows[child] for child in children[node]) / len(children[node])
    return [Place(depth, row) for depth, row in zip(depths, rows, strict=True)]
