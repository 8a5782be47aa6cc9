"""Laws and trees in C beside those in Python: the same trees, the same counts, step by step."""

from __future__ import annotations

import copy
import ctypes
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch

from specdec.drafters import Hybrid, PromptLookup, Suffix, TokenRecycling, Trigram
from specdec.drafters.calibration import Calibration
from specdec.drafters.learning import LearningDrafter
from specdec.drafters.native_automaton import NativeAutomaton
from specdec.drafters.pair_store import PairStore
from specdec.drafters.pair_table import SOURCES
from specdec.drafters.suffix_calibration import SuffixCalibration
from specdec.errors import ConfigError, LogitsError
from specdec.kernels import drafting
from specdec.random import row_streams
from specdec.trees import BestFirst, CoupledBestFirst, DraftTree
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


def with_and_without_c(
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


def calibrations_of(drafter: LearningDrafter) -> list[Calibration]:
    if isinstance(drafter, Trigram):
        return list(drafter._table.calibrations)
    assert isinstance(drafter, TokenRecycling)
    return [drafter._calibration]


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
    drafters = with_and_without_c(MAKERS[name], monkeypatch)
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
    drafters = with_and_without_c(MAKERS[name], monkeypatch)
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
    for drafter in with_and_without_c(lambda: kind(num_successors=2), monkeypatch):  # type: ignore[call-arg]
        for token in range(VOCAB):
            logits = torch.full((1, VOCAB), -9.0)
            # behind token 1 another is certain, behind the others they have 1/2 and 1/4
            logits[0, (token + 1) % VOCAB] = 20.0 if token == 1 else 1.0
            logits[0, (token + 2) % VOCAB] = 0.0
            tree = DraftTree.root_only(token)
            drafter.observe([StepOutcome(0, tree, [], [0], logits)])
        for calibration in calibrations_of(drafter):
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


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_a_law_that_holds_nan_is_refused(greedy: bool) -> None:
    drafter = Suffix()
    drafter.attach(TargetInfo(VOCAB))
    drafter.start(0, (1, 2, 3, 1), None)
    for cell in range(len(drafter._calibration.chances)):
        drafter._calibration.chances[cell] = math.nan
    law = drafter.law(DraftContext(0, (1, 2, 3, 1, 2), 9))
    with pytest.raises(LogitsError, match="the chance nan"):
        grown(CoupledBestFirst(), law, Root(2, 4, greedy), Budget(4, 4))


def test_what_holds_memory_of_c_is_neither_copied_nor_saved() -> None:
    drafter = Trigram()
    drafter.attach(TargetInfo(VOCAB))
    for held in (NativeAutomaton([1, 2]), drafter.law(DraftContext(0, (1, 2), 9))):
        for save in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="memory of C code"):
                save(held)


def test_handles_that_were_not_issued_are_refused() -> None:
    for name in MAKERS:
        drafter = MAKERS[name]()
        drafter.attach(TargetInfo(VOCAB))
        law = drafter.law(DraftContext(0, (1, 2, 1, 2), 9))
        law.extend(0, 1)
        for handle in (-1, 2, 1 << 30):
            for ask in (
                lambda handle=handle, law=law: law.guesses(handle),
                lambda handle=handle, law=law: law.rows([0, handle]),
                lambda handle=handle, law=law: law.bound(handle),
                lambda handle=handle, law=law: law.extend(handle, 1),
                lambda handle=handle, law=law: law.learn([0, handle], [1, 2]),
                lambda handle=handle, law=law: law.fit([handle], [1], np.ones(4), np.ones(4)),
            ):
                with pytest.raises(IndexError, match="not issued"):
                    ask()
        law.learn([0, 1], [1, 2])
        law.learn_along([1, 2])


@pytest.mark.parametrize("kind", [BestFirst, CoupledBestFirst])
def test_trees_without_branches_or_levels_are_refused(kind: type[BestFirst]) -> None:
    for option in ("max_branching", "max_depth"):
        with pytest.raises(ConfigError, match="at least 1, got"):
            kind(**{option: 0})


def test_a_budget_is_no_promise_of_memory() -> None:
    drafter = Suffix()
    drafter.attach(TargetInfo(VOCAB))
    drafter.start(0, (1, 2, 3, 1), None)
    law = drafter.law(DraftContext(0, (1, 2, 3, 1, 2), 9))
    tree = grown(CoupledBestFirst(), law, Root(2, 4, greedy=True), Budget(10**15, 2))
    assert 1 < len(tree) < 50
    assert len(grown(CoupledBestFirst(), law, Root(2, 4), Budget(0, 2))) == 1


def test_a_source_that_is_not_trusted_at_all_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for drafter in with_and_without_c(lambda: Hybrid([Suffix(), TokenRecycling()]), monkeypatch):
        state = drafter.state()
        for name, table in (("weights", [0.0, 1.0]), ("outcomes", 5.0)):
            state.arrays[f"mixture/{name}"] = np.zeros_like(
                state.arrays[f"mixture/{name}"]
            ) + np.array(table)
        drafter.restore(state)
        drafter.start(0, (1, 2, 3, 1), None)
        law = drafter.law(DraftContext(0, (1, 2, 3, 1, 2), 9))
        assert list(law.guesses(0).tokens) == []
        assert len(grown(CoupledBestFirst(), law, Root(2, 4), Budget(4, 4))) == 1


def test_structures_are_those_of_the_c_code() -> None:
    sizes = (ctypes.c_int64 * 17)()
    drafting.functions().drafting_sizes(sizes)
    structures = (
        *(drafting.MatchStruct, drafting.SuccessorsStruct, drafting.TableStruct),
        *(drafting.SeenStruct, drafting.FoundStruct, drafting.SuffixPartsStruct),
        *(drafting.TrustStruct, drafting.PlanStruct, drafting.TreeStruct),
    )
    hits = Calibration(3).state().arrays["hits"]
    cells, trust = SuffixCalibration().hits.size, Hybrid([Suffix()]).state()
    numbers = [len(SOURCES), hits.shape[1], cells, PairStore(64, 1).tables.keys.shape[1]]
    numbers += [len(trust.arrays["mixture/outcomes"]), drafting.MOST_MIXED]
    numbers += [drafting.MOST_SOURCES, drafting.MOST_SUCCESSORS]
    assert list(sizes) == [*map(ctypes.sizeof, structures), *numbers]


@pytest.mark.parametrize("scale", [1e-3, 0.3, 4.0, 60.0, 3e4])
def test_shares_are_stored_as_numpy_rounds_them(scale: float) -> None:
    drafter = TokenRecycling(num_successors=6)
    drafter.attach(TargetInfo(VOCAB))
    logits = scale * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))
    logits[:, 0] = logits.max(dim=1).values + torch.arange(VOCAB) * 0.5  # shares near one
    tree = DraftTree.from_lists(list(range(VOCAB)), list(range(-1, VOCAB - 1)))
    drafter.observe([StepOutcome(0, tree, [], [1], logits)])
    stored = drafter.state().arrays["log_shares"].astype(np.float64)
    top = logits.topk(6).values.double()
    exact = torch.log_softmax(top, dim=1).numpy()
    assert np.array_equal(np.isinf(stored), exact < -65519)
    finite = np.isfinite(stored)
    # half a step of a float16, and what float32 cannot hold of the difference
    np.testing.assert_allclose(stored[finite], exact[finite], rtol=2**-11 + 1e-5, atol=2e-6)


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", MAKERS)
def test_rows_of_a_batch_share_tables_as_in_the_reference(
    name: str, greedy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several laws at once, trees that were cut, and rows that end while others are asked."""
    drafters = with_and_without_c(MAKERS[name], monkeypatch)
    policies = [CoupledBestFirst() for _ in drafters]
    rng = np.random.default_rng(5)
    texts = {row: rng.integers(VOCAB, size=4 + row).tolist() for row in range(4)}
    for drafter in drafters:
        for row, text in texts.items():
            drafter.start(row, tuple(text[:-1]), None)
    for step in range(20):
        laws = [
            [drafter.law(DraftContext(row, tuple(text), 50)) for row, text in texts.items()]
            for drafter in drafters
        ]
        if step in (6, 12):  # a row's output comes into the store, and generations go
            ended = next(iter(texts))
            for drafter, own in zip(drafters, laws, strict=True):
                drafter.stop(ended)
                del own[0]
            del texts[ended]
        outcomes = []
        for place, (row, text) in enumerate(texts.items()):
            root = Root(text[-1], len(text) - 1, greedy)
            trees = [
                grown(policy, own[place], root, Budget(40, 8))
                for policy, own in zip(policies, laws, strict=True)
            ]
            assert trees[0].token_list == trees[1].token_list
            assert trees[0].parent_list == trees[1].parent_list
            if step % 3 == 0:
                trees = [tree.cut(range(len(tree) // 2)) for tree in trees]
            outcomes.append([outcome_of(row, tree, text[-2]) for tree in trees])
            text += outcomes[-1][0].emitted
        for drafter, policy, own in zip(
            drafters, policies, map(list, zip(*outcomes, strict=True)), strict=True
        ):
            for outcome in own:
                policy.observe(outcome)
            drafter.observe(own)
    if "crowded" not in name:  # many new keys of one set at once take other slots there
        assert_same_state(*drafters)
    assert policies[0].weights == pytest.approx(policies[1].weights, rel=1e-9)


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
