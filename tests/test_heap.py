"""Trees grown node by node: those of the levels, exact, and from every table's law."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from specdec.drafters import Hybrid, PromptLookup, Suffix, TokenRecycling, Trigram
from specdec.drafters.base import BaseDrafter
from specdec.drafters.listed_law import ListedLaw
from specdec.errors import LogitsError
from specdec.random import row_streams
from specdec.testing.toys import ToyDraft, ToyLaw, ToyLoop, ToyTarget, repetition_penalty
from specdec.trees import BestFirst, CoupledBestFirst, DraftTree
from specdec.trees.grow import grow_trees
from specdec.types import (
    Budget,
    DraftContext,
    Drafter,
    DraftLaw,
    Guesses,
    LawRows,
    Root,
    StepOutcome,
    TargetInfo,
    Verifier,
)
from specdec.verifiers import Coupled, Match, Rejection

EXACT = 1e-12
PREFIX = (0, 1)


class ListedDraft(ToyDraft):
    """A toy whose laws are looked up node by node; `asked` are the handles that were."""

    def law(self, prefix: tuple[int, ...]) -> ListedToyLaw:
        return ListedToyLaw(self, prefix)


class ListedToyLaw(ToyLaw):
    def __init__(self, draft: ToyDraft, prefix: tuple[int, ...]) -> None:
        super().__init__(draft, prefix)
        self.asked: list[int] = []

    def bound(self, handle: int) -> float:
        return 1.0

    def guesses(self, handle: int) -> Guesses:
        self.asked.append(handle)
        chances = self._draft.log_probs(self._prefixes[handle]).exp().tolist()
        ranked = sorted(range(len(chances)), key=lambda token: -chances[token])
        named = [token for token in ranked if chances[token] > 0]
        return Guesses(named, [chances[token] for token in named])


def never(_requests: object) -> list[LawRows]:
    raise AssertionError("a law that is looked up has no levels to answer")


def grown(
    policy: BestFirst | CoupledBestFirst,
    law: DraftLaw,
    budget: Budget,
    *,
    levels: bool = False,
    greedy: bool = True,
) -> DraftTree:
    root = Root(PREFIX[-1], len(PREFIX) - 1, greedy)
    plan = policy.grow(law, root, budget, row_streams(0, 0).draft)
    expand = (lambda asked: [one.rows(handles) for one, handles in asked]) if levels else never
    return grow_trees([(law, plan)], expand)[0]


def paths(tree: DraftTree) -> list[tuple[int, ...]]:
    return sorted(tuple(tree.path_tokens(node)) for node in range(1, len(tree)))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("least", [0.0, 0.02, 0.2])
def test_the_tree_is_that_of_the_levels(seed: int, least: float) -> None:
    options = {"sharpness": 1.5, "support": 4 if seed % 2 else None, "known_length": 5 + seed}
    for nodes, branching, depth in ((1, 3, 3), (5, 2, 9), (12, 3, 4), (30, 6, 3), (200, 3, 3)):
        budget = Budget(nodes, 7, least)
        kinds = (BestFirst, True), (CoupledBestFirst, True), (CoupledBestFirst, False)
        for kind, greedy in kinds:
            policy = kind(max_branching=branching, max_depth=depth)
            law = ListedDraft(6, seed, **options).law(PREFIX)
            tree = grown(policy, law, budget, greedy=greedy)
            leveled = ToyDraft(6, seed, **options).law(PREFIX)
            same = grown(policy, leveled, budget, levels=True, greedy=greedy)
            assert paths(tree) == paths(same)
            assert tree.kinds == same.kinds
            chances = {tuple(same.path_tokens(n)): same.chance_list[n] for n in range(1, len(same))}
            for node in range(1, len(tree)):
                path = tuple(tree.path_tokens(node))
                assert tree.chance_list[node] == pytest.approx(chances[path], rel=1e-5)
                assert law._prefixes[tree.handles[node]] == (*PREFIX, *path)


def test_only_nodes_of_the_tree_are_looked_up_once_each() -> None:
    law = ListedDraft(6, 1, sharpness=2.0).law(PREFIX)
    tree = grown(BestFirst(), law, Budget(8, 16))
    assert tree.num_drafted == 8
    assert set(law.asked) <= set(tree.handles)
    assert len(set(law.asked)) == len(law.asked)


class Bounded(ListedToyLaw):
    """Its bound is `slack` times the largest chance, at most 1."""

    slack = 1.0

    def bound(self, handle: int) -> float:
        chances = self._draft.log_probs(self._prefixes[handle]).exp()
        return min(self.slack * float(chances.max()), 1.0)


@pytest.mark.parametrize("slack", [1.0, 1.3])
def test_a_tighter_bound_makes_the_same_tree_of_fewer_looks(slack: float) -> None:
    draft = ListedDraft(6, 1, sharpness=2.0)
    loose, tight = draft.law(PREFIX), Bounded(draft, PREFIX)
    tight.slack = slack
    trees = [grown(BestFirst(), law, Budget(20, 16)) for law in (loose, tight)]
    assert trees[0].token_list == trees[1].token_list
    assert trees[0].parent_list == trees[1].parent_list
    assert set(trees[1].parent_list[1:]) <= {trees[1].handles.index(h) for h in tight.asked}
    assert len(tight.asked) < len(loose.asked)


def test_of_equal_paths_the_shallower_comes_first() -> None:
    class Even(ListedLaw):
        """The root's first child is certain; below it 1/2 and 1/4 follow every node."""

        def __init__(self) -> None:
            self.handles = 1

        def extend(self, parent: int, token: int) -> int:
            self.handles += 1
            return self.handles - 1

        def guesses(self, handle: int) -> Guesses:
            return Guesses([3, 2], [1.0 if handle == 0 else 0.5, 0.25])

    tree = grown(BestFirst(), Even(), Budget(4, 9))
    # behind 1 and 1/2 there are three paths of 1/4: (2), (3, 2) and (3, 3, 3)
    assert [tree.path_tokens(node) for node in range(1, 5)] == [[3], [3, 3], [2], [3, 2]]


@pytest.mark.parametrize("verifier", [Match(), Rejection(), Coupled()], ids=lambda one: one.name)
@pytest.mark.parametrize("least", [0.0, 0.25])
def test_two_steps_follow_the_target_exactly(verifier: Verifier, least: float) -> None:
    budget = Budget(4, 3, least)
    target = ToyTarget(3, 2, sharpness=1.2, processors=[repetition_penalty(1.7)])
    loop = ToyLoop(BestFirst(), verifier, target, ListedDraft(3, 2), budget)
    assert loop.error(PREFIX, [budget, Budget(budget.nodes, 1)]) < EXACT


class SecretlyRanked(BestFirst):
    """A mutant: it calls its nodes drawn without replacement, though it took the likeliest."""

    draws = CoupledBestFirst.draws

    def grow(self, law, root, budget, random):  # type: ignore[no-untyped-def]
        rows = law.rows([0])
        tree = yield from super().grow(law, root, budget._replace(depth=1), random)
        count = tree.num_drafted
        return DraftTree.from_lists(
            tree.token_list, tree.parent_list, [0, *[2] * count], [-1, *[0] * count], rows
        )


def test_a_mutant_that_calls_its_nodes_drawn_is_caught() -> None:
    budget = Budget(2, 1)
    target = ToyTarget(3, 2, sharpness=1.2)
    loop = ToyLoop(SecretlyRanked(), Rejection(), target, ListedDraft(3, 5), budget)
    assert loop.error(PREFIX, [budget]) > 1e-4


@pytest.mark.parametrize("chance", [math.nan, 1.5])
def test_chances_that_are_none_are_refused(chance: float) -> None:
    class Wrong(ListedLaw):
        def guesses(self, handle: int) -> Guesses:
            return Guesses([2], [chance])

    with pytest.raises(LogitsError, match="gives token 2 the chance"):
        grown(BestFirst(), Wrong(), Budget(4, 4))


# ---- the drafters that have such laws ----

TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4, 1, 5, 8, 9, 7, 9, 3, 1, 4, 2, 3]
VOCAB = 12


class Model(BaseDrafter):
    """Stands for a drafter with a model: its law has rows alone."""

    name = "model"

    def law(self, context: DraftContext) -> DraftLaw:
        return ToyDraft(VOCAB, 4, sparse=True).law(tuple(context.tokens))


def taught(drafter: Drafter) -> Drafter:
    """Returns the drafter after a text whose every token it has seen scored."""
    drafter.attach(TargetInfo(VOCAB))
    drafter.start(0, TEXT[:3], None)
    generator = torch.Generator().manual_seed(0)
    for place in range(3, len(TEXT) - 1):
        logits = 3 * torch.randn(1, VOCAB, generator=generator)
        drafter.law(DraftContext(0, TEXT[: place + 1], 9))
        tree = DraftTree.root_only(TEXT[place])
        drafter.observe([StepOutcome(0, tree, [], [TEXT[place + 1]], logits)])
    return drafter


TABLES: dict[str, Callable[[], Drafter]] = {
    "token_recycling": TokenRecycling,
    "trigram": Trigram,
    "suffix": Suffix,
    "prompt_lookup": PromptLookup,
    "hybrid": lambda: Hybrid([Suffix(), Trigram()]),
}


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("name", TABLES)
def test_a_tables_law_says_the_same_in_rows(name: str) -> None:
    drafter = TABLES[name]()
    law = taught(drafter).law(DraftContext(0, TEXT, 9))
    tree = grown(BestFirst(), law, Budget(20, 5))
    assert max(tree.depth_list) > 1
    other = drafter.law(DraftContext(0, TEXT, 9))
    handles = [0]
    for node in range(len(tree)):
        if node:
            parent = handles[tree.parent_list[node]]
            handles.append(other.extend(parent, tree.token_list[node]))
        (rows,) = drafter.expand([(other, [handles[node]])])
        own = law.guesses(tree.handles[node])
        count = len(own.tokens)
        assert max(own.chances, default=0.0) <= other.bound(handles[node]) * (1 + 1e-9) <= 1 + 1e-9
        assert rows.ids is not None
        assert rows.ids[0].tolist() == (list(own.tokens) or [-1])
        found = rows.log_probs[0, :count].exp().tolist()
        assert found == pytest.approx(list(own.chances), rel=1e-5)


def test_a_hybrid_is_looked_up_only_where_all_its_sources_are() -> None:
    both = taught(Hybrid([Suffix(), Trigram()])).law(DraftContext(0, TEXT, 9))
    mixed = taught(Hybrid([Trigram(), Model()])).law(DraftContext(0, TEXT, 9))
    assert hasattr(both, "guesses")
    assert not hasattr(mixed, "guesses")
    assert grown(BestFirst(), mixed, Budget(8, 4), levels=True).num_drafted == 8


def test_a_law_that_merely_keeps_guesses_is_not_looked_up() -> None:
    law = ToyDraft(6, 1).law(PREFIX)
    law.guesses, law.bound = {(): 3}, 1.0  # type: ignore[attr-defined]
    assert grown(BestFirst(), law, Budget(5, 3), levels=True).num_drafted == 5


@pytest.mark.usefixtures("each_way")
def test_a_hybrid_learns_from_what_was_looked_up() -> None:
    drafter = taught(Hybrid([Suffix(), Trigram()]))
    before = drafter.state().arrays["mixture/weights"]
    law = drafter.law(DraftContext(0, TEXT, 9))
    tree = grown(BestFirst(), law, Budget(6, 3))
    logits = torch.zeros(len(tree), VOCAB)
    token = tree.token_list[1]
    drafter.observe([StepOutcome(0, tree, [1], [token, 5], logits)])
    assert (drafter.state().arrays["mixture/weights"] != before).any()
