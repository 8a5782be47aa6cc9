"""Static trees: a fixed template of ranks, filled level by level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from specdec.errors import ConfigError
from specdec.random import RandomSource
from specdec.trees.base import BasePolicy
from specdec.trees.build import TreeBuilder
from specdec.trees.draws import choose_tokens
from specdec.types import Budget, DraftLaw, Draw, GrowPlan, LawRows, Root

Template = Sequence[Sequence[int]]


def _paths(text: str) -> list[tuple[int, ...]]:
    """Returns rank paths from 'parent:count' entries, a parent written as its digits."""
    paths = []
    for entry in text.split():
        parent, count = entry.split(":")
        paths += [(*map(int, parent), rank) for rank in range(int(count))]
    return paths


# Token recycling's 80 nodes, 8/21/25/15/8/3 a level (arXiv 2408.08696, the tree "2.2.2" of its
# code), written as the number of children of each node.
TOKEN_RECYCLING_80: Template = _paths(
    ":8 0:8 1:4 2:3 3:2 4:1 5:1 6:1 7:1 "
    "00:8 01:3 02:2 03:1 04:1 05:1 06:1 07:1 10:2 11:1 20:1 30:1 40:1 50:1 "
    "000:5 001:2 002:1 003:1 004:1 010:1 020:1 100:1 200:1 300:1 "
    "0000:3 0001:1 0002:1 0010:1 0100:1 1000:1 00000:2 00010:1"
)

# How likely the r-th guess is the right one, measured once for token recycling on chat prompts; it
# only ranks a template's nodes, to cut it to a smaller budget.
_RANK_PRIOR = (0.45, 0.12, 0.07, 0.05, 0.035, 0.03, 0.025, 0.02)


class Static(BasePolicy):
    """The same tree every step: node (r1, r2, ...) is the r-th choice below node (r1, ...).

    A template with more nodes than the budget is cut to its most promising ones; ranks that the
    law does not have are left out with everything below them.

    Args:
        template: rank paths, each prefix of a path in it too; None for token recycling's 80.
        draw: how the children of a node are chosen. IID and WOR take them in order of drawing.

    Raises:
        ConfigError: if a path's parent or an earlier rank is missing.
    """

    name = "static"

    def __init__(self, template: Template | None = None, draw: Draw = Draw.POINT) -> None:
        self.draws = frozenset({draw})
        self._draw = draw
        paths = [tuple(path) for path in (TOKEN_RECYCLING_80 if template is None else template)]
        known = {(), *paths}
        for path in paths:
            if not path or path[:-1] not in known:
                raise ConfigError(f"template path {path} needs its parent {path[:-1]} too")
            if path[-1] > 0 and (*path[:-1], path[-1] - 1) not in known:
                raise ConfigError(f"template path {path} needs the rank before it too")
        self._paths = sorted(set(paths), key=_promise)

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""
        paths = self._paths[: budget.nodes]
        choose = all_drawn(self._draw, root, random)
        return (yield from grow_template(paths, choose, law, root, budget))


class Guess(NamedTuple):
    """A child to be: its token, how it was drawn, the law it was drawn from, its probability."""

    token: int
    draw: Draw
    q_row: int
    chance: float


# gives up to counts[i] children below the i-th node of a level, in the order of testing, from the
# nodes' laws, which it adds to the builder where tokens are drawn from them
Choose = Callable[[LawRows, Sequence[int], int, TreeBuilder], list[list[Guess]]]


def all_drawn(draw: Draw, root: Root, random: RandomSource) -> Choose:
    """Returns the way of choosing in which every child comes to be by `draw`."""

    def choose(
        rows: LawRows, counts: Sequence[int], depth: int, builder: TreeBuilder
    ) -> list[list[Guess]]:
        chosen = choose_tokens(rows, counts, draw, random, root, depth)
        guesses = []
        for index, children in enumerate(chosen):
            drawn = bool(children) and draw in (Draw.IID, Draw.WOR)
            q_row = builder.add_law(rows, index) if drawn else -1
            guesses.append([Guess(token, draw, q_row, chance) for token, chance in children])
        return guesses

    return choose


def grow_template(
    paths: Iterable[tuple[int, ...]], choose: Choose, law: DraftLaw, root: Root, budget: Budget
) -> GrowPlan:
    """Grows the tree of rank paths, level by level, no deeper than the budget allows.

    Ranks that the law does not have are left out with everything below them.
    """
    width: dict[tuple[int, ...], int] = {}
    for path in paths:
        width[path[:-1]] = width.get(path[:-1], 0) + 1
    builder = TreeBuilder(root.token)
    level: list[tuple[tuple[int, ...], int]] = [((), 0)]
    for depth in range(1, budget.depth + 1):
        expanding = [(path, node) for path, node in level if path in width]
        if not expanding:
            break
        rows = yield [builder.handles[node] for _, node in expanding]
        chosen = choose(rows, [width[path] for path, _ in expanding], depth, builder)
        level = []
        for (path, node), guesses in zip(expanding, chosen, strict=True):
            for rank, guess in enumerate(guesses):
                handle = law.extend(builder.handles[node], guess.token)
                child = builder.add(
                    node, guess.token, handle, guess.draw, guess.q_row, guess.chance
                )
                level.append(((*path, rank), child))
    return builder.build()


def _promise(path: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """Sorts by falling product of rank priors; a parent always comes before its children."""
    value = 1.0
    for rank in path:
        value *= _RANK_PRIOR[min(rank, len(_RANK_PRIOR) - 1)]
    return (-value, path)
