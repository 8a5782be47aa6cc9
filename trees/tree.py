"""The draft tree: what every policy returns, the target scores and every verifier reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.errors import TreeError
from specdec.types import Draw, LawRows, ProbRow

if TYPE_CHECKING:
    import networkx as nx

_SUM_TOLERANCE = 1e-3  # float16 logits normalised in float32 stay well inside
# plain numbers: a comparison with an enum's member takes ten times as long
_DRAWS = frozenset(map(int, Draw))
_ROOT_DRAW = int(Draw.POINT)
_FROM_LAWS = frozenset({int(Draw.IID), int(Draw.WOR)})


@dataclass(frozen=True, eq=False)
class DraftTree:
    """One sequence's guesses, checked on construction; in plain lists, since trees are walked.

    Attributes:
        token_list: token of each of the N nodes. Node 0 is the last committed token.
        parent_list: its parent: -1 for node 0, else a node before it; siblings are TESTED IN INDEX
            ORDER.
        draw_list: its `Draw` code: how its token came to be (the root: POINT).
        q_row_list: the row of `q` that it was drawn from, -1 for a point mass.
        q: the draft laws, one row for each expanding parent: ``log_probs [R, V]``, or sparse
            ``[R, k]`` beside ``ids``. None when every node is a point mass.
        chance_list: the drafter's probability of each node's token at its parent, NaN where it is
            not known; of a COUPLED node the policy's, which has seen the noise. Drawings and cost
            models read it, no acceptance rule does.
        handles: what the draft law calls each node, so that drafter and policy find what they
            noted about it; None for a tree that was not grown from a law.
        grown: the tree that this one was cut from; None if nothing was cut.

    Raises:
        TreeError: if any of this does not hold.
    """

    token_list: list[int]
    parent_list: list[int]
    draw_list: list[int]
    q_row_list: list[int]
    q: LawRows | None
    chance_list: list[float]
    handles: tuple[int, ...] | None = None
    grown: DraftTree | None = None

    @classmethod
    def from_lists(
        cls,
        tokens: Sequence[int],
        parents: Sequence[int],
        draws: Sequence[int] | None = None,
        q_row: Sequence[int] | None = None,
        q: LawRows | None = None,
        chances: Iterable[float] | None = None,
        handles: Sequence[int] | None = None,
    ) -> DraftTree:
        """Returns a tree of copies of what is given; without `draws` every node is a point mass."""
        count = len(tokens)
        return cls(
            token_list=list(map(int, tokens)),
            parent_list=list(map(int, parents)),
            draw_list=list(map(int, draws)) if draws else [int(Draw.POINT)] * count,
            q_row_list=list(map(int, q_row)) if q_row else [-1] * count,
            q=q,
            chance_list=[math.nan] * count if chances is None else list(map(float, chances)),
            handles=None if handles is None else tuple(handles),
        )

    @classmethod
    def root_only(cls, token: int) -> DraftTree:
        """Returns the tree of plain decoding: nothing drafted."""
        return cls([token], [-1], [_ROOT_DRAW], [-1], None, [math.nan])

    def __post_init__(self) -> None:
        count = len(self.token_list)
        if count == 0:
            raise TreeError("a tree has N >= 1 tokens, the root's first; got none")
        columns: dict[str, Sequence[float]] = {
            "parents": self.parent_list,
            "draws": self.draw_list,
            "q_row": self.q_row_list,
            "chances": self.chance_list,
        }
        for name, column in columns.items():
            if len(column) != count:
                raise TreeError(
                    f"{name} must have {count} entries, one for each token, got {len(column)}"
                )
        if self.parent_list[0] != -1:
            raise TreeError(f"parents[0] must be -1 (the root), got {self.parent_list[0]}")
        for node, parent in enumerate(self.parent_list):
            if not 0 <= parent < node and node:
                raise TreeError(f"parents[{node}] must be in 0..{node - 1}, got {parent}")
        if min(self.token_list) < 0:
            raise TreeError("token ids must not be negative")
        if not _DRAWS.issuperset(self.draw_list) or self.draw_list[0] != _ROOT_DRAW:
            raise TreeError(f"draws must be Draw codes, POINT for the root, got {self.draw_list}")
        if self.drawn_nodes:
            self._check_laws()

    def _check_laws(self) -> None:
        if self.q is None:
            raise TreeError("nodes drawn from a law need that law: q is missing")
        sums = self.q.log_probs.exp().sum(dim=-1).tolist()
        # NaN is no sum either
        if not all(abs(total - 1.0) < _SUM_TOLERANCE for total in sums):
            raise TreeError(f"each row of q must sum to 1, got {sums}")
        for node in self.drawn_nodes:
            if not 0 <= self.q_row_list[node] < len(sums):
                row = self.q_row_list[node]
                raise TreeError(f"q_row[{node}] must be in 0..{len(sums) - 1}, got {row}")
        for node, possible in zip(self.drawn_nodes, self._can_be_drawn(self.q), strict=True):
            if not possible:
                token = self.token_list[node]
                raise TreeError(f"node {node} holds token {token}, which its law never draws")
        edges = list(zip(self.parent_list, self.token_list, strict=True))
        if len(set(edges)) == len(edges):
            return
        for node, edge in enumerate(edges):
            if self.draw_list[node] == Draw.WOR and edge in edges[:node]:
                raise TreeError(f"node {node} repeats a sibling that it was drawn without")

    def _can_be_drawn(self, q: LawRows) -> list[bool]:
        """Returns for each drawn node whether its law gives its token any probability."""
        rows = [self.q_row_list[node] for node in self.drawn_nodes]
        tokens = [self.token_list[node] for node in self.drawn_nodes]
        if q.ids is None:
            width = q.log_probs.shape[1]
            held = [min(token, width - 1) for token in tokens]
            chances = q.log_probs[rows, held].tolist()
            pairs = zip(chances, tokens, strict=True)
            return [chance > -math.inf and token < width for chance, token in pairs]
        named = torch.where(q.log_probs > -torch.inf, q.ids, -1).tolist()
        supports = [set(row) for row in named]
        for number, (row, support) in enumerate(zip(named, supports, strict=True)):
            if len(row) - row.count(-1) != len(support - {-1}):
                raise TreeError(f"row {number} of q names a token twice: {sorted(row)}")
        return [token in supports[row] for row, token in zip(rows, tokens, strict=True)]

    def __len__(self) -> int:
        return len(self.token_list)

    @property
    def num_drafted(self) -> int:
        """Nodes without the root."""
        return len(self.token_list) - 1

    @property
    def tokens(self) -> Tensor:
        """``[N]`` int64 of `token_list`."""
        return torch.tensor(self.token_list)

    @property
    def parents(self) -> Tensor:
        """``[N]`` int32 of `parent_list`."""
        return torch.tensor(self.parent_list, dtype=torch.int32)

    @property
    def draws(self) -> Tensor:
        """``[N]`` int8 of `draw_list`."""
        return torch.tensor(self.draw_list, dtype=torch.int8)

    @property
    def q_row(self) -> Tensor:
        """``[N]`` int32 of `q_row_list`."""
        return torch.tensor(self.q_row_list, dtype=torch.int32)

    @property
    def chances(self) -> Tensor:
        """``[N]`` float32 of `chance_list`."""
        return torch.tensor(self.chance_list)

    @cached_property
    def drawn_nodes(self) -> list[int]:
        """The nodes whose law is a row of `q`: drawn with or without replacement."""
        if _FROM_LAWS.isdisjoint(self.draw_list):
            return []
        return [i for i, draw in enumerate(self.draw_list) if draw in _FROM_LAWS]

    @cached_property
    def depth_list(self) -> list[int]:
        """Each node's depth; the root has depth 0."""
        return depths_of(self.parent_list)

    @cached_property
    def children(self) -> list[list[int]]:
        """Each node's children in index order, the order in which they are tested."""
        children: list[list[int]] = [[] for _ in range(len(self))]
        for node, parent in enumerate(self.parent_list[1:], start=1):
            children[parent].append(node)
        return children

    @cached_property
    def kinds(self) -> frozenset[Draw]:
        """The draw laws that occur among the drafted nodes."""
        return frozenset(map(Draw, set(self.draw_list[1:])))

    @cached_property
    def path_chances(self) -> list[float]:
        """Products of `chances` along the path to each node; an unknown one counts as even."""
        return path_chances_of(self.parent_list, self.chance_list)

    def cut(self, nodes: Sequence[int]) -> DraftTree:
        """Returns the tree of the root and some other nodes, in their old order.

        Lossless for nodes that are point masses, and for any choice that does not look at the
        token of a node drawn from a law.

        Args:
            nodes: what stays; the parent of each stays too. The root need not be named.

        Raises:
            TreeError: if a parent would be missing.
        """
        kept = sorted({0, *map(int, nodes)})
        places = {node: place for place, node in enumerate(kept)}
        missing = [node for node in kept[1:] if self.parent_list[node] not in places]
        if missing:
            raise TreeError(f"nodes {missing} would stay without their parents")
        return DraftTree(
            token_list=[self.token_list[node] for node in kept],
            parent_list=[-1, *(places[self.parent_list[node]] for node in kept[1:])],
            draw_list=[self.draw_list[node] for node in kept],
            q_row_list=[self.q_row_list[node] for node in kept],
            q=self.q,
            chance_list=[self.chance_list[node] for node in kept],
            handles=None if self.handles is None else tuple(self.handles[node] for node in kept),
            grown=self.grown or self,
        )

    def path_to(self, node: int) -> list[int]:
        """Returns the nodes from the first level down to `node`, the root not included."""
        path = []
        while node > 0:
            path.append(node)
            node = self.parent_list[node]
        return path[::-1]

    def path_tokens(self, node: int) -> list[int]:
        """Returns the tokens along `path_to(node)`."""
        return [self.token_list[i] for i in self.path_to(node)]

    def draft_probs(self, row: int) -> ProbRow:
        """Returns row `row` of q as probabilities, before any sibling was taken out."""
        if self.q is None:
            raise TreeError("this tree has no draft laws")
        ids = None if self.q.ids is None else self.q.ids[row]
        return ProbRow(self.q.log_probs[row].exp(), ids)

    def to_networkx(
        self,
        decode: Callable[[int], str] | None = None,
        path: Collection[int] = (),
        target_probs: Sequence[float] | None = None,
    ) -> nx.DiGraph:
        """Returns the tree as a graph with an edge from each parent to each of its children.

        The graph's nodes are the tree's, under the same numbers. Each has the attributes ``token``,
        ``text`` (with `decode`), ``depth``, ``order`` (its place among its siblings, from 0),
        ``draw`` (``"point"``, ``"iid"``, ``"wor"`` or ``"coupled"``), ``draft_prob`` (of
        `chances`), ``target_prob`` and ``accepted``. A probability that is not known is None. The
        values are plain Python ones: ``networkx.node_link_data`` of the graph is JSON.

        Args:
            decode: gives a token's text.
            path: accepted nodes, root not included.
            target_probs: one for each node, from `Step.target_probs`.

        Raises:
            TreeError: if `target_probs` has another length than the tree.
        """
        from specdec.trees.graph import tree_graph

        return tree_graph(self, decode, path, target_probs)


def depths_of(parents: Sequence[int]) -> list[int]:
    """Returns each node's depth, from the parents as `DraftTree` has them."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths


def path_chances_of(parents: Sequence[int], chances: Sequence[float]) -> list[float]:
    """Returns `DraftTree.path_chances`, from parents and chances as a tree has them."""
    products = [1.0]
    for chance, parent in zip(chances[1:], parents[1:], strict=True):
        products.append(products[parent] * (0.5 if math.isnan(chance) else chance))
    return products
