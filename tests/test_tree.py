"""The draft tree's contract, and the policies that grow it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import pytest
import torch

from specdec.errors import ConfigError, TreeError
from specdec.random import row_streams
from specdec.testing.toys import ToyDraft, ToyLaw, expand
from specdec.trees import BestFirst, Chain, DraftTree, Static
from specdec.trees.build import TreeBuilder
from specdec.trees.draws import choose_tokens
from specdec.trees.grow import grow_trees
from specdec.types import Budget, DraftLaw, Draw, LawRows, Root, TreePolicy

HALVES = LawRows(torch.tensor([[0.5, 0.5, 0.0]]).log())
IID, WOR, POINT = Draw.IID, Draw.WOR, Draw.POINT


def grown(
    policy: TreePolicy, draft: ToyDraft, budget: Budget, prefix: Sequence[int] = (0, 1)
) -> DraftTree:
    prefix = tuple(prefix)
    law = draft.law(prefix)
    root = Root(prefix[-1], len(prefix) - 1)
    plan = policy.grow(law, root, budget, row_streams(3, 0).draft)
    return grow_trees([(law, plan)], expand)[0]


def paths(tree: DraftTree) -> list[tuple[int, ...]]:
    """The token path of every node, in index order."""
    return [tuple(tree.path_tokens(node)) for node in range(1, len(tree))]


# --------------------------------------------------------------------------- the contract


def test_nodes_know_depth_children_and_path() -> None:
    tree = DraftTree.from_lists([7, 1, 2, 1, 5, 6], [-1, 0, 0, 1, 1, 3])
    assert len(tree) == 6
    assert tree.num_drafted == 5
    assert tree.depth_list == [0, 1, 1, 2, 2, 3]
    assert tree.children == [[1, 2], [3, 4], [], [5], [], []]
    assert tree.path_to(5) == [1, 3, 5]
    assert tree.path_tokens(5) == [1, 1, 6]
    assert tree.path_to(0) == tree.path_tokens(0) == []
    assert tree.kinds == {POINT}
    assert tree.drawn_nodes == []
    assert (tree.tokens.dtype, tree.parents.dtype) == (torch.int64, torch.int32)
    assert (tree.draws.dtype, tree.q_row.dtype) == (torch.int8, torch.int32)


def test_a_root_alone_is_a_tree() -> None:
    tree = DraftTree.root_only(9)
    assert (len(tree), tree.num_drafted, tree.kinds, tree.children) == (1, 0, frozenset(), [[]])


def test_siblings_stand_in_index_order_even_between_other_nodes() -> None:
    tree = DraftTree.from_lists([0, 1, 2, 3, 4], [-1, 0, 1, 0, 0])
    assert tree.children[0] == [1, 3, 4]


def test_drawn_nodes_carry_their_law() -> None:
    tree = DraftTree.from_lists(
        [0, 1, 0, 2], [-1, 0, 0, 1], [POINT, IID, WOR, POINT], [-1, 0, 0, -1], HALVES
    )
    assert tree.drawn_nodes == [1, 2]
    assert tree.kinds == {POINT, IID, WOR}
    probs, ids = tree.draft_probs(0)
    assert ids is None
    assert probs.tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_independent_draws_may_repeat_a_token() -> None:
    tree = DraftTree.from_lists([0, 1, 1], [-1, 0, 0], [POINT, IID, IID], [-1, 0, 0], HALVES)
    assert tree.token_list == [0, 1, 1]


@pytest.mark.parametrize(
    ("tokens", "parents", "draws", "q_row", "q", "message"),
    [
        ([], [], None, None, None, "a tree has N >= 1 tokens, the root's first; got none"),
        ([0, 1], [-1], None, None, None, "parents must have 2 entries, one for each token, got 1"),
        ([0, 1], [-1, 0], [POINT], None, None, "draws must have 2 entries, .* got 1"),
        ([0, 1], [-1, 0], None, [-1], None, "q_row must have 2 entries, .* got 1"),
        ([0, 1], [0, 0], None, None, None, r"parents\[0\] must be -1 \(the root\), got 0"),
        ([0, 1], [-1, 1], None, None, None, r"parents\[1\] must be in 0\.\.0, got 1"),
        ([0, 1, 2], [-1, 0, -1], None, None, None, r"parents\[2\] must be in 0\.\.1, got -1"),
        ([0, 1, 2], [-1, 2, 0], None, None, None, r"parents\[1\] must be in 0\.\.0, got 2"),
        ([0, -1], [-1, 0], None, None, None, "token ids must not be negative"),
        ([0, 1], [-1, 0], [POINT, 4], None, None, r"draws must be Draw codes.*got \[0, 4\]"),
        ([0, 1], [-1, 0], [IID, POINT], [0, -1], HALVES, "POINT for the root"),
        ([0, 1], [-1, 0], [POINT, IID], [-1, 0], None, "need that law: q is missing"),
        (
            [0, 1],
            [-1, 0],
            [POINT, IID],
            [-1, 0],
            LawRows(torch.tensor([[0.5, 0.4]]).log()),
            r"each row of q must sum to 1, got \[0\.89",
        ),
        (
            [0, 1],
            [-1, 0],
            [POINT, IID],
            [-1, 0],
            LawRows(torch.tensor([[torch.nan, 0.0]])),
            "each row of q must sum to 1, got .nan",
        ),
        ([0, 1], [-1, 0], [POINT, IID], [-1, 1], HALVES, r"q_row\[1\] must be in 0\.\.0, got 1"),
        ([0, 1], [-1, 0], [POINT, IID], None, HALVES, r"q_row\[1\] must be in 0\.\.0, got -1"),
        ([0, 2], [-1, 0], [POINT, IID], [-1, 0], HALVES, "node 1 holds token 2, which its law"),
        ([0, 3], [-1, 0], [POINT, WOR], [-1, 0], HALVES, "node 1 holds token 3, which its law"),
        (
            [0, 8],
            [-1, 0],
            [POINT, IID],
            [-1, 0],
            LawRows(torch.zeros(1, 1), torch.tensor([[9]])),
            "node 1 holds token 8, which its law",
        ),
        (
            [0, 1, 1],
            [-1, 0, 0],
            [POINT, WOR, WOR],
            [-1, 0, 0],
            HALVES,
            "node 2 repeats a sibling that it was drawn without",
        ),
    ],
)
def test_broken_trees_are_refused(
    tokens: list[int],
    parents: list[int],
    draws: list[Draw] | None,
    q_row: list[int] | None,
    q: LawRows | None,
    message: str,
) -> None:
    with pytest.raises(TreeError, match=message):
        DraftTree.from_lists(tokens, parents, draws, q_row, q)


def test_laws_that_are_not_there() -> None:
    with pytest.raises(TreeError, match="no draft laws"):
        DraftTree.root_only(0).draft_probs(0)


# --------------------------------------------------------------------------- building


def test_builder_keeps_nodes_handles_and_normalised_laws() -> None:
    builder = TreeBuilder(5)
    law = builder.add_law(
        LawRows(torch.tensor([[9.0, 9.0], [3.0, 3.0 + float(torch.log(torch.tensor(3.0)))]])), 1
    )
    first = builder.add(0, 1, handle=42, draw=IID, q_row=law)
    builder.add(first, 0, handle=43)
    assert (len(builder), builder.handles, law) == (3, [0, 42, 43], 0)
    tree = builder.build()
    assert tree.token_list == [5, 1, 0]
    assert tree.parent_list == [-1, 0, 1]
    assert tree.draw_list == [POINT, IID, POINT]
    assert tree.q_row_list == [-1, 0, -1]
    assert tree.draft_probs(0).probs.tolist() == pytest.approx([0.25, 0.75])


def test_builder_takes_sparse_laws_of_different_width() -> None:
    builder = TreeBuilder(0)
    wide = LawRows(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[7, 2, 9]]))
    narrow = LawRows(torch.tensor([[1.0]]).log(), torch.tensor([[4]]))
    builder.add(0, 4, 1, IID, builder.add_law(narrow, 0))
    builder.add(1, 9, 2, IID, builder.add_law(wide, 0))
    tree = builder.build()
    assert tree.q is not None
    assert tree.q.ids is not None
    assert tree.q.ids.tolist() == [[4, -1, -1], [7, 2, 9]]
    assert tree.draft_probs(0).probs.tolist() == [1.0, 0.0, 0.0]


def test_a_tree_of_point_masses_has_no_laws() -> None:
    builder = TreeBuilder(0)
    builder.add(0, 1, 1)
    assert builder.build().q is None


# --------------------------------------------------------------------------- choosing tokens


@pytest.mark.parametrize("sparse", [False, True])
def test_ways_of_choosing_children(sparse: bool) -> None:
    draft = ToyDraft(6, 1, sparse=sparse, support=4)
    rows = draft.law((0,)).rows([0])
    best = torch.sort(draft.log_probs((0,)), descending=True).indices[:4].tolist()
    source = row_streams(5, 2).draft

    def choose(count: int, draw: Draw) -> list[int]:
        (chosen,) = choose_tokens(rows, [count], draw, source, Root(0, 10), 1)
        for token, chance in chosen:
            assert chance == pytest.approx(float(draft.log_probs((0,))[token].exp()))
        return [token for token, _ in chosen]

    assert choose(3, POINT) == best[:3]
    assert choose(9, POINT) == best
    assert sorted(choose(9, WOR)) == sorted(best)
    drawn = [tuple(choose(4, IID)) for _ in range(50)]
    assert any(len(set(tokens)) < 4 for tokens in drawn)
    assert {token for tokens in drawn for token in tokens} <= set(best)
    perturbed = draft.log_probs((0,)) + source.keyed_noise(11, torch.arange(6))
    expected = torch.sort(perturbed, descending=True).indices[:4].tolist()
    assert choose(2, Draw.COUPLED) == expected[:2]
    assert choose(9, Draw.COUPLED) == expected


@pytest.mark.parametrize("draw", list(Draw))
def test_a_law_that_names_no_token_gives_no_children(draw: Draw) -> None:
    for rows in (
        LawRows(torch.full((1, 3), -torch.inf)),
        LawRows(torch.full((1, 2), -torch.inf), torch.full((1, 2), -1)),
        LawRows(torch.empty(1, 0), torch.empty(1, 0, dtype=torch.int64)),
    ):
        assert choose_tokens(rows, [2], draw, row_streams(0, 0).draft, Root(0, 0), 1) == [[]]


# --------------------------------------------------------------------------- all policies


def all_policies() -> list[TreePolicy]:
    return [
        *(Chain(draw) for draw in Draw),
        *(Static(draw=draw) for draw in Draw),
        BestFirst(),
        BestFirst(max_branching=2, max_depth=2),
    ]


def policy_id(policy: TreePolicy) -> str:
    return "-".join([policy.name, *(draw.name for draw in policy.draws)])


@pytest.mark.parametrize("policy", all_policies(), ids=policy_id)
@pytest.mark.parametrize("sparse", [False, True])
def test_budgets_are_respected(policy: TreePolicy, sparse: bool) -> None:
    draft = ToyDraft(9, 2, sparse=sparse)
    for nodes in (1, 2, 5, 11, 100):
        for depth in (1, 2, 4):
            tree = grown(policy, draft, Budget(nodes, depth))
            assert 0 < tree.num_drafted <= nodes
            assert max(tree.depth_list) <= depth
            assert tree.kinds <= policy.draws


@pytest.mark.parametrize("policy", all_policies(), ids=policy_id)
@pytest.mark.parametrize("budget", [Budget(0, 0), Budget(0, 4), Budget(4, 0)])
def test_without_a_budget_the_law_is_not_asked(policy: TreePolicy, budget: Budget) -> None:
    law = ToyDraft().law((0,))
    plan = policy.grow(law, Root(4, 0), budget, row_streams(0, 0).draft)
    with pytest.raises(StopIteration) as stop:
        next(plan)
    assert stop.value.value.token_list == [4]


@pytest.mark.parametrize("policy", all_policies(), ids=policy_id)
@pytest.mark.parametrize("sparse", [False, True])
def test_trees_end_where_the_law_ends(policy: TreePolicy, sparse: bool) -> None:
    nothing = ToyDraft(4, 2, sparse=sparse, known_length=1)
    assert grown(policy, nothing, Budget(9, 4)).num_drafted == 0
    one_level = ToyDraft(4, 2, sparse=sparse, known_length=2)
    tree = grown(policy, one_level, Budget(9, 4))
    assert set(tree.depth_list) == {0, 1}


@pytest.mark.parametrize("policy", all_policies(), ids=policy_id)
def test_the_same_stream_gives_the_same_tree(policy: TreePolicy) -> None:
    trees = [grown(policy, ToyDraft(9, 4), Budget(12, 3)) for _ in range(2)]
    assert paths(trees[0]) == paths(trees[1])


class Counting:
    """Answers like a drafter, and writes down who asked for how much at each level."""

    def __init__(self) -> None:
        self.levels: list[list[int]] = []

    def __call__(self, requests: Sequence[tuple[DraftLaw, Sequence[int]]]) -> list[LawRows]:
        self.levels.append([len(handles) for _, handles in requests])
        return expand(requests)


def test_rows_of_a_batch_grow_in_lockstep() -> None:
    """One draft call a level, for all rows that still want one; each tree as if grown alone."""
    policies: list[TreePolicy] = [Chain(), BestFirst(max_branching=2), Static(), Chain(Draw.WOR)]
    budgets = [Budget(2, 9), Budget(6, 3), Budget(0, 5), Budget(4, 4)]
    drafts = [ToyDraft(9, seed) for seed in range(4)]
    laws = [draft.law((0, 1)) for draft in drafts]
    plans = [
        (law, policy.grow(law, Root(1, 1), budget, row_streams(3, 0).draft))
        for law, policy, budget in zip(laws, policies, budgets, strict=True)
    ]
    answer = Counting()
    trees = grow_trees(plans, answer)
    assert [len(level) for level in answer.levels] == [3, 3, 2, 1]
    assert answer.levels[0] == [1, 1, 1]
    for tree, policy, draft, budget in zip(trees, policies, drafts, budgets, strict=True):
        assert paths(tree) == paths(grown(policy, draft, budget))


def test_no_rows_no_calls() -> None:
    answer = Counting()
    assert grow_trees([], answer) == []
    assert answer.levels == []


# --------------------------------------------------------------------------- chain


def test_chain_follows_the_most_probable_token() -> None:
    draft = ToyDraft(5, 3)
    tree = grown(Chain(), draft, Budget(4, 9))
    prefix = (0, 1)
    for depth, token in enumerate(tree.token_list[1:]):
        assert token == int(torch.argmax(draft.log_probs(prefix)))
        assert tree.parent_list[depth + 1] == depth
        prefix += (token,)
    assert tree.num_drafted == 4


def test_chain_has_a_longest_length() -> None:
    assert grown(Chain(max_depth=2), ToyDraft(), Budget(9, 9)).num_drafted == 2
    assert grown(Chain(max_depth=2), ToyDraft(), Budget(9, 1)).num_drafted == 1
    assert grown(Chain(max_depth=0), ToyDraft(), Budget(9, 9)).num_drafted == 0


def test_drawn_chain_has_one_law_a_node() -> None:
    draft = ToyDraft(5, 3)
    tree = grown(Chain(Draw.IID), draft, Budget(3, 9))
    assert tree.q_row_list == [-1, 0, 1, 2]
    for node in range(1, 4):
        prefix = (0, 1, *tree.path_tokens(node)[:-1])
        expected = draft.log_probs(prefix).exp()
        torch.testing.assert_close(tree.draft_probs(node - 1).probs, expected, rtol=0, atol=1e-15)


# --------------------------------------------------------------------------- static


def test_token_recycling_template() -> None:
    tree = grown(Static(), ToyDraft(12, 1), Budget(80, 6))
    assert [tree.depth_list.count(depth) for depth in range(7)] == [1, 8, 21, 25, 15, 8, 3]


@pytest.mark.parametrize("draw", list(Draw))
def test_template_cut_to_a_budget_is_closed(draw: Draw) -> None:
    """Every budget is used up, and each node's children are its first ranks."""
    draft = ToyDraft(12, 1)
    kept: set[tuple[int, ...]] = set()
    for nodes in range(1, 81):
        tree = grown(Static(draw=draw), draft, Budget(nodes, 6))
        assert tree.num_drafted == nodes
        if draw == POINT:
            for node in range(len(tree)):
                ranks = torch.sort(
                    draft.log_probs((0, 1, *tree.path_tokens(node))), descending=True
                )
                children = [tree.token_list[child] for child in tree.children[node]]
                assert children == ranks.indices[: len(children)].tolist()
            assert kept < set(paths(tree))  # a larger budget only adds
            kept = set(paths(tree))


def test_template_of_a_users_own() -> None:
    draft = ToyDraft(5, 6)
    tree = grown(Static([(0,), (1,), (1, 0), (1, 0, 0)]), draft, Budget(9, 9))
    assert tree.parent_list == [-1, 0, 0, 2, 3]
    assert grown(Static([]), draft, Budget(9, 9)).num_drafted == 0


def test_template_shrinks_with_the_support_of_the_law() -> None:
    tree = grown(Static(), ToyDraft(12, 1, support=2), Budget(80, 3))
    assert max(len(children) for children in tree.children) == 2
    assert set(tree.depth_list) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ([(0, 0)], r"template path \(0, 0\) needs its parent \(0,\) too"),
        ([()], r"template path \(\) needs its parent"),
        ([(0,), (2,)], r"template path \(2,\) needs the rank before it too"),
        ([(0,), (0, 1)], r"template path \(0, 1\) needs the rank before it too"),
    ],
)
def test_templates_with_holes_are_refused(template: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Static(template)


# --------------------------------------------------------------------------- best first


def heap_paths(
    draft: ToyDraft, prefix: tuple[int, ...], nodes: int, branching: int, depth: int
) -> list[tuple[int, ...]]:
    """The paths that a heap of slots pops, one law at a time; among equals the shallower first,
    then the one with better ranks."""
    heap: list[tuple[float, int, tuple[int, ...], tuple[int, ...]]] = []

    def push_children(value: float, ranks: tuple[int, ...], path: tuple[int, ...]) -> None:
        if len(path) == depth:
            return
        log_probs = draft.log_probs(prefix + path)
        values, ids = torch.sort(log_probs, descending=True, stable=True)
        for rank in range(min(branching, len(ids))):
            if values[rank] > -torch.inf:
                child = (*path, int(ids[rank]))
                total = value + float(values[rank])
                heapq.heappush(heap, (-total, len(child), (*ranks, rank), child))

    push_children(0.0, (), ())
    popped = []
    while heap and len(popped) < nodes:
        negative, length, ranks, path = heapq.heappop(heap)
        popped.append((length, ranks, path))
        push_children(-negative, ranks, path)
    return [path for _, _, path in sorted(popped)]


class Coarse(ToyDraft):
    """Log-probabilities are multiples of 1/2, zero among them: ties everywhere."""

    def log_probs(self, prefix: tuple[int, ...]) -> torch.Tensor:
        return (super().logits(prefix) * 2).round().clamp(max=0) / 2


@pytest.mark.parametrize("seed", range(12))
def test_best_first_is_the_heap_of_slots(seed: int) -> None:
    draft = ToyDraft(6, seed, sharpness=1.5, support=4 if seed % 2 else None)
    for nodes, branching, depth in ((1, 3, 3), (5, 2, 9), (12, 3, 4), (30, 6, 3), (200, 3, 3)):
        policy = BestFirst(branching, depth)
        tree = grown(policy, draft, Budget(nodes, 99))
        assert paths(tree) == heap_paths(draft, (0, 1), nodes, branching, depth)
        assert paths(grown(policy, draft, Budget(nodes, 2))) == heap_paths(
            draft, (0, 1), nodes, branching, min(depth, 2)
        )


@pytest.mark.parametrize("seed", range(12))
def test_best_first_breaks_ties_by_order_of_creation(seed: int) -> None:
    draft = Coarse(5, seed, sparse=True)  # sparse: the law itself says which of two equals is first
    for nodes, branching, depth in ((1, 2, 3), (4, 5, 4), (9, 2, 9), (15, 3, 4), (40, 5, 3)):
        tree = grown(BestFirst(branching, depth), draft, Budget(nodes, 99))
        assert paths(tree) == heap_paths(draft, (0, 1), nodes, branching, depth)


def test_best_first_asks_once_a_level_and_only_where_it_may_matter() -> None:
    draft = ToyDraft(6, 1, sharpness=2.0)
    law: ToyLaw = draft.law((0, 1))
    plan = BestFirst().grow(law, Root(1, 1), Budget(8, 16), row_streams(0, 0).draft)
    answer = Counting()
    (tree,) = grow_trees([(law, plan)], answer)
    assert len(answer.levels) <= max(tree.depth_list) + 1
    assert all(wanted <= 8 for level in answer.levels for wanted in level)


def test_a_law_that_names_a_token_twice() -> None:
    q = LawRows(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[3, 3]]))
    with pytest.raises(TreeError, match="row 0 of q names a token twice"):
        DraftTree.from_lists([0, 3], [-1, 0], [Draw.POINT, Draw.IID], [-1, 0], q)
