"""DySpec: spend the budget on the slots that verification is most likely to reach."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from specdec.errors import ConfigError
from specdec.random import RandomSource
from specdec.trees.base import BasePolicy
from specdec.trees.build import TreeBuilder
from specdec.trees.tree import DraftTree
from specdec.types import Budget, DraftLaw, Draw, GrowPlan, LawRows, Root


@dataclass(slots=True)
class _Node:
    """A node whose children are drawn one after another.

    `slot_value` is the chance, under the draft law, that verification reaches this node's slot; it
    does not contain the node's own token. `path_value` does. `next_slot` is the value of the slot
    of this node's next child.
    """

    token: int
    parent: int
    handle: int
    depth: int
    slot_value: float
    path_value: float
    next_slot: float
    chance: float = 1.0
    row: tuple[LawRows, int] | None = None
    ids: list[int] | None = None
    draws: Iterator[tuple[int, float]] | None = None
    mass_left: float = 1.0


@dataclass(slots=True)
class _Grower:
    """Nodes in order of creation, and the draws below them."""

    law: DraftLaw
    random: RandomSource
    nodes: list[_Node] = field(default_factory=list)

    def open(self, numbers: Sequence[int], rows: LawRows) -> None:
        """Gives nodes the laws to draw their children from."""
        ids = None if rows.ids is None else rows.ids.tolist()
        draws = self.random.without_replacement(rows.log_probs)
        for index, number in enumerate(numbers):
            node = self.nodes[number]
            node.row, node.draws = (rows, index), draws[index]
            node.ids = None if ids is None else ids[index]

    def draw(self, parent: int) -> int | None:
        """Draws the next child of a node; returns its number, None when the support is used up."""
        node = self.nodes[parent]
        assert node.draws is not None
        drawn = next(node.draws, None)
        if drawn is None:
            return None
        index, probability = drawn
        token = index if node.ids is None else node.ids[index]
        handle, slot = self.law.extend(node.handle, token), node.next_slot
        path = node.path_value * probability
        if path > slot:  # it is worth at least what is drawn from it, but for rounding
            path = slot
        nodes = self.nodes
        nodes.append(_Node(token, parent, handle, node.depth + 1, slot, path, path, probability))
        left = node.mass_left - probability
        node.mass_left = left = left if left > 0.0 else 0.0
        node.next_slot = node.path_value * left
        return len(nodes) - 1

    def tree(self, keep: list[int]) -> DraftTree:
        """Returns the tree of the nodes `keep`, ascending and closed under parents."""
        nodes = self.nodes
        builder = TreeBuilder(nodes[0].token)
        places, laws, add = {0: 0}, {}, builder.add
        for number in keep:
            node = nodes[number]
            parent = node.parent
            if parent not in laws:
                row = nodes[parent].row
                assert row is not None
                laws[parent] = builder.add_law(*row)
            places[number] = add(
                places[parent], node.token, node.handle, Draw.WOR, laws[parent], node.chance
            )
        return builder.build()


def _root(root: Root) -> _Node:
    return _Node(root.token, -1, 0, 0, 1.0, 1.0, 1.0)


class DySpec(BasePolicy):
    """The greedy tree: pop the most valuable slot, draw its token, push its two successors.

    A slot below node u after siblings of draft mass s is worth (path probability of u)(1 - s): the
    chance that verification gets there if the target agreed with the draft. It does not contain
    the token about to be drawn, which is what keeps acceptance lossless. One draft call for each
    node that gets children; `DySpecLayered` makes the same tree in a call a level.

    Source: Xiong et al., DySpec (arXiv 2410.11744), algorithm 1.
    """

    name = "dyspec"
    draws = frozenset({Draw.WOR})

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""
        grower = _Grower(law, random, [_root(root)])
        slots = [(-1.0, 0, 0)]  # (negative value, order of creation, node)
        created = 1
        while slots and len(grower.nodes) <= budget.nodes:
            _, _, number = heapq.heappop(slots)
            node = grower.nodes[number]
            if node.draws is None:
                rows = yield [node.handle]
                grower.open([number], rows)
            child = grower.draw(number)
            if child is None:
                continue
            for owner in (child, number):
                successor = grower.nodes[owner]
                if successor.next_slot > 0 and successor.depth < budget.depth:
                    heapq.heappush(slots, (-successor.next_slot, created, owner))
                    created += 1
        return grower.tree(list(range(1, len(grower.nodes))))


class DySpecLayered(BasePolicy):
    """DySpec's tree in one draft call a level.

    Each level draws every slot that may still be among the `budget.nodes` most valuable, then the
    best slots of all are kept. A sibling's or child's slot is never worth more than its origin, so
    the kept set is closed, and it is the heap's tree for the same draws.

    Source: the slots are DySpec's (arXiv 2410.11744); growing by level with an exact bound is ours.
    """

    name = "dyspec_layered"
    draws = frozenset({Draw.WOR})

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""
        return _grow_by_level(law, root, budget, random, floor=0.0)


class DySpecThreshold(BasePolicy):
    """Every slot worth at least a threshold, level by level; the most valuable ones if too many.

    Source: DySpec (arXiv 2410.11744), algorithm 2, whose printed loop condition is inverted.

    Args:
        threshold: least value of a slot; None for 1 / node budget.

    Raises:
        ConfigError: if the threshold is not in (0, 1].
    """

    name = "dyspec_threshold"
    draws = frozenset({Draw.WOR})

    def __init__(self, threshold: float | None = None) -> None:
        if threshold is not None and not 0.0 < threshold <= 1.0:
            raise ConfigError(f"threshold must be in (0, 1], got {threshold}")
        self._threshold = threshold

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""
        floor = 1.0 / max(budget.nodes, 1) if self._threshold is None else self._threshold
        return _grow_by_level(law, root, budget, random, floor)


def _grow_by_level(
    law: DraftLaw, root: Root, budget: Budget, random: RandomSource, floor: float
) -> GrowPlan:
    grower = _Grower(law, random, [_root(root)])
    nodes, draw = grower.nodes, grower.draw
    # the `budget.nodes` largest slot values so far, a min-heap: a slot must be worth more than the
    # least of them to be kept, and more than nothing while there are fewer
    best = [0.0] * budget.nodes
    level = [0]
    for _ in range(budget.depth):
        level = [n for n in level if best[0] < nodes[n].next_slot >= floor]
        if not level:
            break
        rows = yield [nodes[number].handle for number in level]
        grower.open(level, rows)
        below = []
        # the most valuable slot first, so that the bound rises early and few draws are in vain
        slots = [(-nodes[number].next_slot, number) for number in level]
        heapq.heapify(slots)
        while slots and best[0] < -slots[0][0] >= floor:
            value, number = slots[0]
            child = draw(number)
            if child is None:
                heapq.heappop(slots)
                continue
            heapq.heapreplace(slots, (-nodes[number].next_slot, number))
            heapq.heapreplace(best, -value)
            below.append(child)
        level = below
    ranked = sorted(range(1, len(nodes)), key=lambda n: -nodes[n].slot_value)  # stable
    return grower.tree(sorted(ranked[: budget.nodes]))
