"""Shapes that are known before anything is drawn: rank paths for `static` and its relatives."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import pairwise

from specdec.errors import ConfigError

Path = tuple[int, ...]


def branching_template(branching: Sequence[int]) -> list[Path]:
    """Returns the complete tree with `branching[l]` children below every node of level l.

    Raises:
        ConfigError: if the vector is empty or has an entry below 1.
    """
    if not branching or min(branching) < 1:
        raise ConfigError(f"branching must be a list of numbers >= 1, got {list(branching)}")
    paths: list[Path] = []
    level: list[Path] = [()]
    for count in branching:
        level = [(*path, rank) for path in level for rank in range(count)]
        paths += level
    return paths


def default_branching(nodes: int) -> list[int]:
    """Returns the branching that a budget alone suggests: twos as long as they fit, then ones.

    8 nodes give 2, 2; 16 give 2, 2, 2; 32 give 2, 2, 2, 2; whole levels of one child follow if
    the rest of the budget pays for them.
    """
    branching: list[int] = []
    width, left = 1, nodes
    while 2 * width <= left:
        width *= 2
        left -= width
        branching.append(2)
    branching += [1] * (left // width)
    return branching


def chains_template(num_sequences: int, length: int) -> list[Path]:
    """Returns `num_sequences` chains of `length` nodes below the root."""
    return [(s, *[0] * depth) for s in range(num_sequences) for depth in range(length)]


def stem_template(stem: int, num_branches: int, length: int) -> list[Path]:
    """Returns a chain of `stem` nodes with `num_branches` chains of `length` nodes at its end."""
    trunk = [(0,) * depth for depth in range(1, stem + 1)]
    return trunk + [(0,) * stem + path for path in chains_template(num_branches, length)]


def sequoia_template(acceptance: Sequence[float], nodes: int, depth: int) -> list[Path]:
    """Returns the tree that maximises the expected number of accepted tokens.

    A node of ranks r1, r2, ... is worth acceptance[r1] * acceptance[r2] * ...; as acceptance falls
    with the rank, taking the worthiest node next gives the optimum of Sequoia's dynamic programme
    (arXiv 2402.12374, section 3.1) in O(N log N).

    Args:
        acceptance: chance that the r-th child is accepted when its node was.
        nodes: budget.
        depth: deepest level.

    Raises:
        ConfigError: if `acceptance` is empty, rises somewhere, or leaves [0, 1].
    """
    check_acceptance(acceptance)
    heap: list[tuple[float, Path]] = [(-acceptance[0], (0,))]
    paths: list[Path] = []
    while heap and len(paths) < nodes:
        negative, path = heapq.heappop(heap)
        paths.append(path)
        rank = path[-1]
        if rank + 1 < len(acceptance) and acceptance[rank] > 0:
            sibling = negative / acceptance[rank] * acceptance[rank + 1]
            heapq.heappush(heap, (sibling, (*path[:-1], rank + 1)))
        if len(path) < depth:
            heapq.heappush(heap, (negative * acceptance[0], (*path, 0)))
    return paths


def sequoia_value(acceptance: Sequence[float], nodes: int, depth: int) -> float:
    """Returns the optimum of Sequoia's dynamic programme: accepted tokens of the best tree.

    T[n, b] is the best value of n nodes below a node whose next child has rank b. O(D N^2 B); the
    oracle beside `sequoia_template`.
    """
    check_acceptance(acceptance)
    below = [0.0] * (nodes + 1)  # best value of n nodes below a node, one level further down
    for _ in range(depth):
        best = [[0.0] * (len(acceptance) + 1) for _ in range(nodes + 1)]
        for n in range(1, nodes + 1):
            for rank in reversed(range(len(acceptance))):
                best[n][rank] = max(
                    acceptance[rank] * (1.0 + below[m]) + best[n - 1 - m][rank + 1]
                    for m in range(n)
                )
        below = [row[0] for row in best]
    return below[nodes]


def check_acceptance(acceptance: Sequence[float]) -> None:
    """Raises ConfigError unless the vector is non-empty, in [0, 1] and does not rise."""
    values = list(acceptance)
    if not values or any(math.isnan(v) or not 0.0 <= v <= 1.0 for v in values):
        raise ConfigError(f"acceptance must be numbers in [0, 1], at least one; got {values}")
    if any(later > earlier for earlier, later in pairwise(values)):
        raise ConfigError(f"acceptance must not rise with the rank, got {values}")
