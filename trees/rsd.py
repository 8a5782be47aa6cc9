"""Recursive speculative decoding: trees of draws without replacement."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence

from specdec.errors import ConfigError
from specdec.random import RandomSource
from specdec.trees.base import BasePolicy
from specdec.trees.build import TreeBuilder
from specdec.trees.static import all_drawn, grow_template
from specdec.trees.templates import branching_template, default_branching
from specdec.types import Budget, DraftLaw, Draw, GrowPlan, LawRows, Root


class RsdC(BasePolicy):
    """A fixed number of children at each level, drawn without replacement.

    Source: Jeon et al., RSD-C (arXiv 2402.14160), algorithm 3: Gumbel-top-k, here as draws one by
    one, which is the same law.

    Args:
        branching: children of each node by level; None for `default_branching(node_budget)`.

    Raises:
        ConfigError: if the vector is empty or not positive; when growing, if it needs more nodes.
    """

    name = "rsd_c"
    draws = frozenset({Draw.WOR})

    def __init__(self, branching: Sequence[int] | None = None) -> None:
        self._paths = None if branching is None else branching_template(branching)
        self._branching = branching

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""
        paths = self._paths
        if paths is None:
            paths = branching_template(default_branching(budget.nodes))
        elif len(paths) > budget.nodes:
            raise ConfigError(
                f"branching {list(self._branching or ())} makes {len(paths)} nodes, node_budget is "
                f"{budget.nodes}"
            )
        choose = all_drawn(Draw.WOR, root, random)
        return (yield from grow_template(paths, choose, law, root, budget))


class RsdS(BasePolicy):
    """Stochastic beam search: W sequences a level, drawn without replacement as sequences.

    Each beam has a perturbed log-probability G; its children's are Gumbel noise conditioned on
    their maximum being G. They are drawn in falling order, value by truncated Gumbel and identity
    by the draft law without the earlier ones, so no dense noise is needed; the W largest of a
    level go on. Siblings stand in falling order of G: order by their own probability is lossy.

    Source: Jeon et al., RSD-S (arXiv 2402.14160), algorithm 4; Kool et al. (arXiv 1903.06059).

    Args:
        width: W; None for a quarter of the node budget, at least 2.
    """

    name = "rsd_s"
    draws = frozenset({Draw.WOR})

    def __init__(self, width: int | None = None) -> None:
        if width is not None and width < 1:
            raise ConfigError(f"width must be at least 1, got {width}")
        self._width = width

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""
        builder = TreeBuilder(root.token)
        width = min(self._width or max(2, budget.nodes // 4), budget.nodes)
        beams = [(0, 0.0, 0.0)]  # node, log-probability, perturbed log-probability
        for _ in range(min(budget.depth, budget.nodes // width)):
            rows = yield [builder.handles[node] for node, _, _ in beams]
            draws = random.without_replacement(rows.log_probs)
            streams = [
                _children(rows, index, draws[index], log_prob, perturbed, random)
                for index, (_, log_prob, perturbed) in enumerate(beams)
            ]
            laws: dict[int, int] = {}
            survivors = []
            for negative, index, token, log_prob in _largest(streams, width):
                parent, above, _ = beams[index]
                if index not in laws:
                    laws[index] = builder.add_law(rows, index)
                handle = law.extend(builder.handles[parent], token)
                chance = math.exp(log_prob - above)
                node = builder.add(parent, token, handle, Draw.WOR, laws[index], chance)
                survivors.append((node, log_prob, -negative))
            beams = survivors
            if not beams:
                break
        return builder.build()


def _children(
    rows: LawRows,
    index: int,
    draws: Iterator[tuple[int, float]],
    log_prob: float,
    perturbed: float,
    random: RandomSource,
) -> Iterator[tuple[float, int, float]]:
    """Yields (perturbed value, token, log-probability) of a beam's children, values falling."""
    left, bound = 1.0, perturbed
    for place, probability in draws:
        if left < 1.0:
            # Gumbel of the mass that is left, conditioned to stay below the sibling before
            location = log_prob + math.log(max(left, 1e-300))
            noise = -math.log(max(random.uniform(), 1e-300))
            bound = location - math.log(math.exp(min(location - bound, 700.0)) + noise)
        token = place if rows.ids is None else int(rows.ids[index, place])
        yield bound, token, log_prob + math.log(probability)
        left -= probability
        if left <= 0.0:
            return


def _largest(
    streams: Sequence[Iterator[tuple[float, int, float]]], count: int
) -> list[tuple[float, int, int, float]]:
    """Returns the `count` largest of several falling streams: (-value, stream, token, log-prob)."""
    heap = []
    for index, stream in enumerate(streams):
        first = next(stream, None)
        if first is not None:
            heap.append((-first[0], index, first[1], first[2]))
    heapq.heapify(heap)
    largest: list[tuple[float, int, int, float]] = []
    while heap and len(largest) < count:
        item = heapq.heappop(heap)
        largest.append(item)
        following = next(streams[item[1]], None)
        if following is not None:
            heapq.heappush(heap, (-following[0], item[1], following[1], following[2]))
    return largest
