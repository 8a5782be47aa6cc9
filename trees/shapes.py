"""Policies whose shape is a template: Sequoia, i.i.d. sequences, a stem with branches."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.errors import ConfigError
from specdec.random import RandomSource
from specdec.trees.base import BasePolicy
from specdec.trees.build import TreeBuilder
from specdec.trees.draws import choose_tokens
from specdec.trees.ranks import RankAcceptance
from specdec.trees.static import all_drawn, grow_template
from specdec.trees.templates import (
    chains_template,
    check_acceptance,
    sequoia_template,
    stem_template,
)
from specdec.types import Budget, DraftLaw, Draw, GrowPlan, Root, StepOutcome

# how acceptance falls by the rank for most drafters: where the measured vector starts
TYPICAL_ACCEPTANCE = (0.6, 0.15, 0.07, 0.04, 0.03, 0.02, 0.015, 0.01)


class Sequoia(BasePolicy):
    """The tree of a measured rank-acceptance vector, filled with draws without replacement.

    Source: Chen et al., Sequoia (arXiv 2402.12374). Where we differ: when the draft law has no more
    tokens, a node has fewer children, instead of uniform draws among the unseen.

    Args:
        acceptance: chance that the r-th child is accepted, falling with r; None to measure it as
            the text goes on.

    Raises:
        ConfigError: if the vector is empty, rises, or leaves [0, 1].
    """

    name = "sequoia"
    draws = frozenset({Draw.WOR})

    def __init__(self, acceptance: Sequence[float] | None = None) -> None:
        if acceptance is not None:
            check_acceptance(acceptance)
        self._given = acceptance
        self._measured = RankAcceptance(TYPICAL_ACCEPTANCE)

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""
        acceptance = self._measured.vector() if self._given is None else self._given
        paths = sequoia_template(acceptance, budget.nodes, budget.depth)
        choose = all_drawn(Draw.WOR, root, random)
        return (yield from grow_template(paths, choose, law, root, budget))

    def observe(self, outcome: StepOutcome) -> None:
        """Counts which ranks were accepted."""
        self._measured.observe(outcome)


class Stem(BasePolicy):
    """A drawn chain that branches late, where the guesses begin to differ.

    Source: delayed tree expansion (arXiv 2602.16994); children are drawn without replacement.

    Args:
        stem: nodes before the branches; None for a quarter of the budget.
        num_branches: branches at its end.
    """

    name = "stem"
    draws = frozenset({Draw.WOR})

    def __init__(self, stem: int | None = None, num_branches: int = 2) -> None:
        if (stem is not None and stem < 0) or num_branches < 1:
            raise ConfigError(
                f"stem must be >= 0 and num_branches >= 1, got {stem} and {num_branches}"
            )
        self._stem = stem
        self._num_branches = num_branches

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""
        stem = min(budget.nodes // 4 if self._stem is None else self._stem, budget.nodes)
        length = (budget.nodes - stem) // self._num_branches
        paths = stem_template(stem, self._num_branches, length)
        choose = all_drawn(Draw.WOR, root, random)
        return (yield from grow_template(paths, choose, law, root, budget))


class Iid(BasePolicy):
    """k sequences drawn independently, as SpecInfer and SpecTr draft them.

    As a tree (`merge=False`) equal tokens stay separate nodes, one a sequence: draws with
    replacement, for `rejection` and `spectr`. As a trie (`merge=True`) equal prefixes share their
    nodes, children in order of first occurrence: given that a draw is new, it follows q without
    the values seen, so the law is that of draws without replacement.

    Source: SpecInfer (arXiv 2305.09781); SpecTr (arXiv 2310.15141); the trie's law is ours.

    Args:
        num_sequences: k; None for a quarter of the budget, at least 2.
        merge: draft the trie.
    """

    name = "iid"

    def __init__(self, num_sequences: int | None = None, *, merge: bool = False) -> None:
        if num_sequences is not None and num_sequences < 1:
            raise ConfigError(f"num_sequences must be at least 1, got {num_sequences}")
        self._num_sequences = num_sequences
        self._merge = merge
        self.draws = frozenset({Draw.WOR if merge else Draw.IID})

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""
        sequences = min(self._num_sequences or max(2, budget.nodes // 4), budget.nodes)
        length = min(budget.depth, budget.nodes // sequences)
        if self._merge:
            return (yield from _grow_trie(law, root, sequences, length, random))
        paths = chains_template(sequences, length)
        choose = all_drawn(Draw.IID, root, random)
        return (yield from grow_template(paths, choose, law, root, budget))


def _grow_trie(
    law: DraftLaw, root: Root, sequences: int, length: int, random: RandomSource
) -> GrowPlan:
    builder = TreeBuilder(root.token)
    groups = {0: sequences}  # sequences that stand at each node
    for depth in range(1, length + 1):
        rows = yield [builder.handles[node] for node in groups]
        following: dict[int, int] = {}
        chosen = choose_tokens(rows, list(groups.values()), Draw.IID, random, root, depth)
        for index, node in enumerate(groups):
            children: dict[int, int] = {}
            q_row = builder.add_law(rows, index) if chosen[index] else -1
            for token, chance in chosen[index]:
                if token not in children:
                    handle = law.extend(builder.handles[node], token)
                    child = builder.add(node, token, handle, Draw.WOR, q_row, chance)
                    children[token] = child
                following[children[token]] = following.get(children[token], 0) + 1
        groups = following
        if not groups:
            break
    return builder.build()
