"""Trees of the most visited nodes of a PUCT search: shape, bounds, nearness to the best tree."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from specdec.errors import ConfigError
from specdec.random import row_streams
from specdec.testing.toys import ToyDraft
from specdec.trees import BestFirst, DraftTree, MonteCarlo
from specdec.trees.grow import grow_trees
from specdec.trees.monte_carlo import _Search
from specdec.types import Budget, DraftLaw, Draw, LawRows, Root, TreePolicy

PREFIX = (0, 1)
SEEDS = range(6)


def grow(
    policy: TreePolicy, draft: ToyDraft, budget: Budget, stream: int = 0
) -> tuple[DraftTree, list[int]]:
    """Returns the tree, and how many rows each draft call asked for."""
    law = draft.law(PREFIX)
    plan = policy.grow(law, Root(PREFIX[-1], 1), budget, row_streams(stream, 0).draft)
    calls: list[int] = []

    def expand(requests: list[tuple[DraftLaw, list[int]]]) -> list[LawRows]:
        calls.extend(len(handles) for _, handles in requests)
        return [law.rows(handles) for law, handles in requests]

    return grow_trees([(law, plan)], expand)[0], calls


def expected_accepted(tree: DraftTree) -> float:
    """Expected accepted tokens if the draft law is the target's."""
    values = [1.0]
    for node in range(1, len(tree)):
        values.append(values[tree.parent_list[node]] * tree.chance_list[node])
    return sum(values[1:])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("budget", [Budget(1, 1), Budget(5, 2), Budget(16, 4), Budget(64, 20)])
@pytest.mark.parametrize("seed", SEEDS)
def test_trees_keep_to_budget_depth_and_calls(seed: int, budget: Budget, sparse: bool) -> None:
    draft = ToyDraft(9, seed, sparse=sparse, support=5)
    policy = MonteCarlo(max_calls=4, max_depth=7)
    tree, calls = grow(policy, draft, budget)
    assert 1 <= tree.num_drafted <= budget.nodes
    assert max(tree.depth_list) <= min(budget.depth, 4, 7)
    assert len(calls) <= 4
    assert tree.kinds == {Draw.POINT}
    for children in tree.children:
        tokens = [tree.token_list[child] for child in children]
        assert len(set(tokens)) == len(tokens)
    for node in range(1, len(tree)):
        prefix = (*PREFIX, *tree.path_tokens(tree.parent_list[node]))
        chance = float(draft.log_probs(prefix)[tree.token_list[node]].exp())
        assert tree.chance_list[node] == pytest.approx(chance, rel=1e-5)
        assert chance > 0.0


def test_a_tree_fills_its_budget_beyond_the_iterations() -> None:
    tree, _ = grow(MonteCarlo(num_iterations=4), ToyDraft(9, 0), Budget(9, 3))
    assert tree.num_drafted == 9


def test_rows_asked_for_are_bounded_by_the_iterations() -> None:
    _, calls = grow(MonteCarlo(num_iterations=40, max_calls=5), ToyDraft(30, 0), Budget(32, 9))
    assert sum(calls) <= 1 + 40


def test_the_search_draws_nothing() -> None:
    trees = [grow(MonteCarlo(), ToyDraft(9, 1), Budget(20, 6), stream)[0] for stream in range(3)]
    assert trees[0].token_list == trees[1].token_list == trees[2].token_list
    assert trees[0].parent_list == trees[1].parent_list == trees[2].parent_list


def test_a_law_that_knows_nothing_gives_the_root_alone() -> None:
    draft = ToyDraft(3, 0, sparse=True, known_length=len(PREFIX) - 1)
    tree, calls = grow(MonteCarlo(), draft, Budget(8, 4))
    assert tree.num_drafted == 0
    assert calls == [1]


def test_a_law_that_ends_gives_the_nodes_before_its_end() -> None:
    draft = ToyDraft(3, 0, sparse=True, known_length=len(PREFIX) + 1)
    tree, _ = grow(MonteCarlo(), draft, Budget(30, 8))
    assert max(tree.depth_list) == 2
    assert tree.num_drafted == 3 + 9


class Certain(ToyDraft):
    """One continuation, without doubt."""

    def log_probs(self, prefix: tuple[int, ...]) -> torch.Tensor:
        row = torch.full((self.vocab_size,), -math.inf, dtype=torch.float64)
        row[len(prefix) % self.vocab_size] = 0.0
        return row


def test_a_certain_law_gives_a_chain() -> None:
    tree, _ = grow(MonteCarlo(), Certain(5), Budget(6, 6))
    assert tree.parent_list == [-1, 0, 1, 2, 3, 4, 5]


def test_trees_are_nearly_the_best() -> None:
    """The search must not lose much against the tree that maximises the same expectation."""
    found = best = 0.0
    for seed in SEEDS:
        for vocab_size, nodes in ((7, 8), (7, 32), (40, 32)):
            draft, budget = ToyDraft(vocab_size, seed, sharpness=2.0), Budget(nodes, 8)
            found += expected_accepted(grow(MonteCarlo(), draft, budget)[0])
            best += expected_accepted(grow(BestFirst(), draft, budget)[0])
    assert 0.97 * best < found <= best + 1e-6


class RewardsRepeating(_Search):
    """The public code's mistake: the reward looks up the token before, not the next one."""

    def expand(self, node: int, tokens: Sequence[int], probs: Sequence[float]) -> None:
        super().expand(node, tokens, probs)
        repeated = dict(zip(tokens, probs, strict=True)).get(self.tokens[node], 0.0)
        for child in self.children[node] or ():
            self._rewards_of[child] = self._rewards_of[node] + repeated


class ToyRepeats(ToyDraft):
    """Token 2 is followed by anything, itself among it; 3 by 1, nearly always."""

    def log_probs(self, prefix: tuple[int, ...]) -> torch.Tensor:
        after = {1: [0.1, 0.1, 0.41, 0.39], 2: [0.2, 0.2, 0.4, 0.2], 3: [0.0, 0.9, 0.1, 0.0]}
        return torch.tensor(after.get(prefix[-1], [0.25] * 4), dtype=torch.float64).log()


def test_a_reward_read_from_the_wrong_field_gives_a_worse_tree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a prior of little weight; at c1 = 32 the prior decides almost alone."""
    policy, budget = MonteCarlo(c1=2.0), Budget(3, 2)
    right, _ = grow(policy, ToyRepeats(4), budget)
    monkeypatch.setattr("specdec.trees.monte_carlo._Search", RewardsRepeating)
    wrong, _ = grow(policy, ToyRepeats(4), budget)
    assert expected_accepted(right) == pytest.approx(0.41 + 0.39 + 0.39 * 0.9)
    assert expected_accepted(wrong) < expected_accepted(right) - 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"num_iterations": 0},
        {"max_branching": 0},
        {"max_depth": 0},
        {"max_calls": 0},
        {"c1": -1.0},
        {"c2": 0.0},
        {"c2": math.nan},
    ],
)
def test_bad_arguments_say_what_was_expected(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="at least 1, c1 at least 0 and c2 above 0"):
        MonteCarlo(**options)
