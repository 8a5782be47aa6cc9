"""Laws and trees in C beside those in Python: the same trees, the same counts, step by step."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch

from specdec.drafters import Hybrid, PromptLookup, Suffix, TokenRecycling, Trigram
from specdec.drafters.learning import LearningDrafter
from specdec.drafters.native_automaton import NativeAutomaton
from specdec.errors import ConfigError, LogitsError
from specdec.kernels import drafting
from specdec.random import row_streams
from specdec.trees import CoupledBestFirst, DraftTree
from specdec.trees.grow import grow_trees
from specdec.trees.native_law import NativeLaw
from specdec.types import Budget, DraftContext, DraftLaw, Root, StepOutcome, TargetInfo

pytestmark = pytest.mark.skipif(not drafting.serves(), reason="no C compiler")
VOCAB = 40
MAKERS: dict[str, Callable[[], LearningDrafter]] = {
    "token_recycling": TokenRecycling,
    "trigram": Trigram,
    "crowded trigram": lambda: Trigram(num_pairs=64, num_successors=3),
    "suffix": Suffix,
    "forgetful suffix": lambda: Suffix(max_store_tokens=60, max_contexts=5, max_successors=3),
    "hybrid": lambda: Hybrid([Suffix(), Trigram()]),
    "hybrid of long rows": lambda: Hybrid([Suffix(max_contexts=4), Trigram(num_successors=24)]),
    "hybrid of three": lambda: Hybrid([TokenRecycling(num_successors=4), Suffix(), Trigram()]),
}


def each_way(
    make: Callable[[], LearningDrafter], monkeypatch: pytest.MonkeyPatch
) -> list[LearningDrafter]:
    """Returns a drafter with C code, and one without."""
    drafters: list[LearningDrafter] = []
    for serves in (True, False):
        with monkeypatch.context() as patched:
            patched.setattr(drafting, "serves", lambda serves=serves: serves)
            drafters.append(make())
            drafters[-1].attach(TargetInfo(VOCAB))
    return drafters


def logits_behind(before: int, token: int) -> torch.Tensor:
    """A target that looks at two tokens, so that its text repeats itself now and then."""
    generator = torch.Generator().manual_seed(1000 * before + token)
    return 4 * torch.randn(VOCAB, generator=generator)


def outcome_of(row: int, tree: DraftTree, before: int) -> StepOutcome:
    """What a greedy target makes of a tree."""
    above = [before, *(tree.token_list[parent] for parent in tree.parent_list[1:])]
    logits = torch.stack(
        [logits_behind(*pair) for pair in zip(above, tree.token_list, strict=True)]
    )
    path, node, emitted = [], 0, []
    while True:
        token = int(logits[node].argmax())
        emitted.append(token)
        node = next((c for c in tree.children[node] if tree.token_list[c] == token), 0)
        if not node:
            return StepOutcome(row, tree, path, emitted, logits, before=before)
        path.append(node)


def grown(policy: CoupledBestFirst, law: DraftLaw, root: Root, budget: Budget) -> DraftTree:
    plan = policy.grow(law, root, budget, row_streams(7, 1).draft)
    return grow_trees([(law, plan)], lambda _: pytest.fail("a table has no levels to answer"))[0]


def assert_same_state(one: LearningDrafter, other: LearningDrafter) -> None:
    mine, theirs = one.state(), other.state()
    assert mine.facts == theirs.facts
    for name, table in mine.arrays.items():
        if table.dtype == np.float16:  # the sums of shares round apart
            np.testing.assert_allclose(table, theirs.arrays[name], rtol=2e-3, atol=1e-3)
        else:
            np.testing.assert_allclose(table, theirs.arrays[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", MAKERS)
def test_trees_and_what_is_learned_are_those_of_the_reference(
    name: str, greedy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafters = each_way(MAKERS[name], monkeypatch)
    policies = [CoupledBestFirst(max_branching=5, max_depth=7) for _ in drafters]
    for policy in policies:
        policy.weights[:3] = 0.05, 0.7, 0.05  # they reach zero, where they are held
    rng = np.random.default_rng(3)
    drafted = 0
    for row in range(6):
        text = rng.integers(VOCAB, size=5).tolist()
        for drafter in drafters:
            drafter.start(row, tuple(text[:-1]), None)
        for step in range(25):
            budget = Budget(1 + int(rng.integers(30)), 1 + step % 9, 0.02 * (step % 3))
            trees = []
            for drafter, policy in zip(drafters, policies, strict=True):
                law = drafter.law(DraftContext(row, tuple(text), 50))
                assert isinstance(law, NativeLaw) == (drafter is drafters[0])
                trees.append(grown(policy, law, Root(text[-1], len(text) - 1, greedy), budget))
            mine, theirs = trees
            assert mine.token_list == theirs.token_list
            assert mine.parent_list == theirs.parent_list
            assert mine.draw_list == theirs.draw_list
            assert mine.chance_list[1:] == pytest.approx(theirs.chance_list[1:], rel=1e-9)
            drafted += mine.num_drafted
            for drafter, policy, tree in zip(drafters, policies, trees, strict=True):
                outcome = outcome_of(row, tree, text[-2])
                policy.observe(outcome)
                drafter.observe([outcome])
            text += outcome.emitted
            if step % 5 == 0:
                assert_same_state(*drafters)
        for drafter in drafters:
            drafter.stop(row)
    assert drafted > 300
    assert_same_state(*drafters)
    assert policies[0].weights == pytest.approx(policies[1].weights, rel=1e-9)
    assert (policies[0].weights[1] != 0.7) != greedy


@pytest.mark.parametrize("name", MAKERS)
def test_a_law_answers_single_handles_as_the_reference_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For policies that go level by level, and sources of mixtures that are not all in C."""
    drafters = each_way(MAKERS[name], monkeypatch)
    text = np.random.default_rng(0).integers(VOCAB // 4, size=120).tolist()
    for place in range(2, 60):
        for drafter in drafters:
            drafter.law(DraftContext(0, tuple(text[: place + 1]), 9))
            tree = DraftTree.root_only(text[place])
            logits = logits_behind(text[place - 1], text[place])[None]
            drafter.observe([StepOutcome(0, tree, [], [text[place + 1]], logits)])
    mine, theirs = (drafter.law(DraftContext(0, tuple(text[:61]), 9)) for drafter in drafters)
    handles = [0]
    for token in [*text[61:66], VOCAB - 1, *text[:3]]:
        handles.append(mine.extend(handles[-1], token))
        assert theirs.extend(handles[-2], token) == handles[-1]
    for handle in handles:
        own, other = mine.guesses(handle), theirs.guesses(handle)
        assert list(own.tokens) == list(other.tokens)
        assert list(own.chances) == pytest.approx(list(other.chances), rel=1e-12)
        assert mine.bound(handle) == pytest.approx(theirs.bound(handle), rel=1e-12)
    for own, other in zip(mine.rows(handles), theirs.rows(handles), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("kind", [TokenRecycling, Trigram])
def test_of_equal_paths_the_shallower_comes_first(
    kind: type[LearningDrafter], monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = []
    for drafter in each_way(lambda: kind(num_successors=2), monkeypatch):  # type: ignore[call-arg]
        for token in range(VOCAB):
            logits = torch.full((1, VOCAB), -9.0)
            # behind token 1 another is certain, behind the others they have 1/2 and 1/4
            logits[0, (token + 1) % VOCAB] = 20.0 if token == 1 else 1.0
            logits[0, (token + 2) % VOCAB] = 0.0
            tree = DraftTree.root_only(token)
            drafter.observe([StepOutcome(0, tree, [], [0], logits)])
        for calibration in getattr(drafter, "_calibrations", [getattr(drafter, "_calibration", 0)]):
            half = len(calibration.of_cells) // 2
            first = [0.5] * (half - 1) + [1.0]
            second = [2.0**-60] + [0.25] * (half - 1)
            for cell, chance in enumerate([*first, *second]):
                calibration.of_cells[cell] = chance
        law = drafter.law(DraftContext(0, (VOCAB - 1, 0), 9))
        trees.append(grown(CoupledBestFirst(), law, Root(0, 1, greedy=True), Budget(11, 9)))
    mine, theirs = trees
    # values: twice 1/2, twice 1/4, then 1/8, of which the first has the later parent
    assert mine.depth_list[:8] == [0, 1, 2, 1, 3, 2, 3, 4]
    assert mine.parent_list[5:7] == [3, 2]
    assert (mine.token_list, mine.parent_list) == (theirs.token_list, theirs.parent_list)


def test_a_token_beyond_the_vocabulary_has_no_row() -> None:
    drafter = TokenRecycling()
    drafter.attach(TargetInfo(VOCAB))
    law = drafter.law(DraftContext(0, (1, 2), 9))
    assert list(law.guesses(law.extend(0, VOCAB)).tokens) == []
    assert list(law.guesses(law.extend(0, 10**9)).tokens) == []


def test_a_mixture_with_a_source_of_python_stays_one_of_python() -> None:
    drafter = Hybrid([PromptLookup(), Trigram()])
    drafter.attach(TargetInfo(VOCAB))
    text = (1, 2, 3, 4, 1, 2)
    law = drafter.law(DraftContext(0, text, 9))
    assert not isinstance(law, NativeLaw)
    tree = grown(CoupledBestFirst(), law, Root(2, 5, greedy=True), Budget(3, 3))
    assert tree.token_list[1:3] == [3, 4]


def test_laws_outlive_the_tables_they_were_made_of() -> None:
    drafter = Hybrid([Suffix(), Trigram()])
    drafter.attach(TargetInfo(VOCAB))
    text = [1, 2, 3, 1, 2, 3, 1, 2]
    drafter.start(0, tuple(text[:-1]), None)
    law = drafter.law(DraftContext(0, tuple(text), 9))
    before = law.guesses(0)
    drafter.stop(0)
    drafter.reset()
    del drafter
    assert law.guesses(law.extend(0, 3)).tokens[0] == 1
    assert law.guesses(0) == before


def test_a_law_that_holds_nan_is_refused() -> None:
    drafter = Suffix()
    drafter.attach(TargetInfo(VOCAB))
    drafter.start(0, (1, 2, 3, 1), None)
    for cell in range(len(drafter._calibration.chances)):
        drafter._calibration.chances[cell] = math.nan
    law = drafter.law(DraftContext(0, (1, 2, 3, 1, 2), 9))
    with pytest.raises(LogitsError, match="the chance nan"):
        grown(CoupledBestFirst(), law, Root(2, 4, greedy=True), Budget(4, 4))


def test_what_holds_memory_of_c_is_neither_copied_nor_saved() -> None:
    drafter = Trigram()
    drafter.attach(TargetInfo(VOCAB))
    for held in (NativeAutomaton([1, 2]), drafter.law(DraftContext(0, (1, 2), 9))):
        for save in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="memory of C code"):
                save(held)


def test_a_mixture_of_too_many_is_refused() -> None:
    sources = [TokenRecycling() for _ in range(drafting.MOST_MIXED + 1)]
    for number, source in enumerate(sources):
        source.name = f"source {number}"  # type: ignore[misc]
    with pytest.raises(ConfigError, match="1 to 8 sources"):
        Hybrid(sources)


@pytest.mark.parametrize("size", [1, 5, 16, 17, 40])
def test_noise_is_that_of_the_verifier(size: int) -> None:
    """Chances of one level tell the noise: weights that see nothing else give it back."""
    drafter = Suffix(max_contexts=1, max_successors=16)
    drafter.attach(TargetInfo(VOCAB))
    text = [t for token in range(1, size + 1) for t in (0, token)] + [0]
    drafter.start(0, tuple(text[:-1]), None)
    law = drafter.law(DraftContext(0, tuple(text), 9))
    policy = CoupledBestFirst(max_branching=64)
    policy.weights[:] = (0.0, 1.0, 0.0, 0.0)
    random = row_streams(11, 3).draft
    plan = policy.grow(law, Root(0, len(text) - 1), Budget(64, 1), random)
    tree = grow_trees([(law, plan)], lambda _: [])[0]
    tokens = torch.tensor(tree.token_list[1:])
    noise = random.keyed_noise(len(text), tokens)
    differences = np.diff(np.log(tree.chance_list[1:]))
    np.testing.assert_allclose(differences, np.diff(noise.numpy()), rtol=1e-6, atol=1e-9)
    assert len(tokens) >= min(size, 16)
