"""The lexical-unit drafter: its laws, both forms, and that none of it changes the text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from specdec import SpeculativeGenerator
from specdec.drafters import EarlyExit, Hybrid, LexicalUnit, Suffix
from specdec.drafters.checkpoint import save_checkpoint
from specdec.drafters.lexical_unit import UnitLaw
from specdec.errors import ConfigError, StateError
from specdec.random import RandomSource
from specdec.testing.toys import ToyDraft, ToyLoop, ToyTarget, repetition_penalty
from specdec.trees import BestFirst, Chain, Marginals, Static
from specdec.trees.build import TreeBuilder
from specdec.trees.draws import choose_tokens
from specdec.types import (
    Budget,
    DraftContext,
    DraftLaw,
    Draw,
    GrowPlan,
    Root,
    StepOutcome,
    TargetInfo,
    TreePolicy,
    Verifier,
)
from specdec.verifiers import Coupled, Match, Rejection, Traversal

ROWS = [tiny.prompt(length, seed=length) for length in (5, 17, 11)]
WIDTH = max(map(len, ROWS))
NEW = 20
FORMS = [pytest.param(True, id="one_pass"), pytest.param(False, id="two_passes")]

one_thread = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)


# ---- exactness: the production law over toys ----

EXACT = 1e-12
PREFIX = (0, 1)
CONFIDENCE = 0.6  # some of the toys' laws are surer than that, some are not


class ToyUnits(ToyDraft):
    """Laws of depths from a random table; none of them knows the root's token or the path."""

    def __init__(self, seed: int, confidence: float = CONFIDENCE, depths: int = 2) -> None:
        super().__init__(3, seed, sharpness=1.2)
        self._confidence = confidence
        self._depths = depths

    def law(self, prefix: tuple[int, ...]) -> Any:
        law = UnitLaw(self._confidence)
        rows = [self.logits((*prefix[:-1], 7 + depth)) for depth in range(self._depths)]
        law.learn(torch.stack(rows), None)
        return law


def toy_loop(policy: TreePolicy, verifier: Verifier, seed: int, draft: ToyDraft) -> ToyLoop:
    target = ToyTarget(3, seed, sharpness=1.2, processors=[repetition_penalty(1.7)])
    return ToyLoop(policy, verifier, target, draft, Budget(3, 2))


DRAWN: dict[Draw, TreePolicy] = {
    draw: Static([(0,), (1,), (0, 0)], draw) for draw in (Draw.IID, Draw.WOR)
}
POINTS: list[TreePolicy] = [Chain(), BestFirst(max_branching=2), Marginals(max_branching=2)]
PAIRS: list[tuple[TreePolicy, Verifier]] = [
    *product(POINTS, [Match(), Rejection(), Traversal(), Coupled()]),
    *product([Chain(Draw.IID), *DRAWN.values()], [Rejection(), Traversal()]),
]


@pytest.mark.parametrize(
    ("policy", "verifier"),
    PAIRS,
    ids=[f"{p.name}-{min(p.draws).name}-{v.name}" for p, v in PAIRS],
)
def test_the_text_has_the_targets_law(policy: TreePolicy, verifier: Verifier) -> None:
    lengths = set()
    for seed in range(4):
        for confidence in (0.0, CONFIDENCE):
            draft = ToyUnits(seed, confidence)
            loop = toy_loop(policy, verifier, seed, draft)
            assert loop.error(PREFIX, [Budget(3, 2), Budget(1, 1)]) < EXACT
            lengths.add(draft.law(PREFIX)._length)
    assert lengths == {0, 1, 2}


class KeepsSureTokens(Chain):
    """A mutant: a drawn token stays only if it is itself probable enough."""

    least = 0.45

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        builder = TreeBuilder(root.token)
        node = 0
        for depth in range(1, min(budget.nodes, budget.depth) + 1):
            rows = yield [builder.handles[node]]
            (chosen,) = choose_tokens(rows, [1], Draw.IID, random, root, depth)
            if not chosen or chosen[0][1] < self.least:
                break
            token, chance = chosen[0]
            row = builder.add_law(rows, 0)
            handle = law.extend(builder.handles[node], token)
            node = builder.add(node, token, handle, Draw.IID, row, chance)
        return builder.build()


@pytest.mark.parametrize("seed", [0, 3, 6])  # 0.16, 0.11, 0.07
def test_keeping_a_drawn_token_by_its_own_probability_is_caught(seed: int) -> None:
    def error(policy: TreePolicy, confidence: float) -> float:
        return toy_loop(policy, Rejection(), seed, ToyUnits(seed, confidence)).error(PREFIX)

    assert error(Chain(Draw.IID), KeepsSureTokens.least) < EXACT
    assert error(KeepsSureTokens(Draw.IID), 0.0) > 0.05


# ---- the law ----


def test_a_law_is_that_of_its_depth() -> None:
    law = UnitLaw(0.0)
    logits = torch.randn(3, tiny.VOCAB, generator=torch.Generator().manual_seed(0))
    law.learn(logits.clone(), lambda scores: scores.div_(0.5))
    left, right = law.extend(0, 4), law.extend(0, 5)
    below = law.extend(law.extend(right, 4), 4)
    rows = law.rows([0, left, right, below])
    assert rows.ids is not None
    expected = torch.log_softmax(logits * 2, -1)
    for row, depth in ((0, 0), (1, 1), (2, 1)):
        torch.testing.assert_close(rows.log_probs[row], expected[depth][rows.ids[row]])
        assert int(rows.ids[row, 0]) == int(logits[depth].argmax())
    assert torch.all(rows.ids[3] == -1)
    assert torch.all(rows.log_probs[3] == -torch.inf)


def test_a_unit_ends_in_front_of_the_first_unsure_depth() -> None:
    chances = torch.tensor([[0.8, 0.1, 0.1], [0.4, 0.3, 0.3], [0.9, 0.05, 0.05]])
    for confidence, length in ((0.0, 3), (0.4, 3), (0.5, 1), (0.85, 0)):
        law = UnitLaw(confidence)
        law.learn(chances.log() + 1e-6, None)
        handles = [0]
        for _ in range(3):
            handles.append(law.extend(handles[-1], 0))
        rows = law.rows(handles)
        assert rows.ids is not None
        assert (rows.ids[:, 0] >= 0).tolist() == [depth < length for depth in range(4)]


def test_a_law_without_slots_names_nothing() -> None:
    rows = UnitLaw(0.0).rows([0])
    assert rows.ids is not None
    assert rows.ids.tolist() == [[-1]]


# ---- drafting ----


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("one_pass", FORMS)
def test_the_text_is_the_targets_own(family: str, one_pass: bool) -> None:
    model = tiny.make_model(family)
    batch = tiny.padded(ROWS)
    given: dict[str, Any] = {"max_new_tokens": NEW, "pad_token_id": tiny.PAD}
    drafter = LexicalUnit(untrained_pads=3, one_pass=one_pass)
    generator = SpeculativeGenerator(model, drafter=drafter, node_budget=6)
    output: Any = generator.generate(**batch, **given, do_sample=False)
    assert generator.stats.num_drafted > NEW
    for row, prompt in enumerate(ROWS):
        alone = model.generate(tiny.ids(prompt), **given, do_sample=False)
        assert output[row, WIDTH:].tolist() == alone[0, len(prompt) :].tolist()
    plain = SpeculativeGenerator(model, drafter=None, verifier="coupled")
    sampled = {**batch, **given, "do_sample": True, "temperature": 0.8, "seed": [1, 2, 3]}
    assert torch.equal(generator.generate(**sampled), plain.generate(**sampled))
    assert not drafter._behind
    assert not drafter._asked


class Spy(LexicalUnit):
    """Keeps, for every tree, the text it was drafted for and the likeliest token of each depth."""

    def __init__(self, one_pass: bool) -> None:
        super().__init__(untrained_pads=3, one_pass=one_pass)
        self.drafts: list[tuple[list[int], list[int]]] = []
        self.texts: dict[int, list[int]] = {}

    def law(self, context: DraftContext) -> DraftLaw:
        self.texts[context.row] = list(context.tokens)
        return super().law(context)

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        for outcome in outcomes:
            tree = outcome.tree
            if tree.num_drafted:
                chain, node = [], 0
                while tree.children[node]:
                    node = tree.children[node][0]
                    chain.append(tree.token_list[node])
                self.drafts.append((self.texts[outcome.row], chain))
        super().observe(outcomes)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("one_pass", FORMS)
def test_which_slot_answers_for_which_depth(family: str, one_pass: bool) -> None:
    """The model's own pass over the text, its vectors behind it, says what a draft must be."""
    model = tiny.make_model(family, dtype=torch.float64)
    spy = Spy(one_pass)
    generator = SpeculativeGenerator(
        model, drafter=spy, policy="chain", verifier="match", node_budget=4
    )
    batch: dict[str, Any] = tiny.padded(ROWS[:2])
    generator.generate(**batch, max_new_tokens=12, do_sample=False, pad_token_id=tiny.PAD)
    vectors = spy._vectors(TargetInfo(tiny.VOCAB, model=model))
    assert len(spy.drafts) > 8
    for text, chain in spy.drafts:
        seen = text[:-1] if one_pass else text  # in one pass nobody knew the root yet

        def put(_module: Any, _inputs: Any, output: Any, size: int = len(seen)) -> Any:
            return torch.cat([output[:, :size], vectors.unsqueeze(0)], dim=1)

        handle = model.get_input_embeddings().register_forward_hook(put)
        with torch.no_grad():
            logits = model(torch.tensor([seen + [0] * 3])).logits[0]
        handle.remove()
        guesses = logits[len(seen) if one_pass else len(seen) - 1 :].argmax(-1).tolist()
        assert chain == guesses[: len(chain)]


def test_in_two_passes_the_first_token_is_right() -> None:
    model = tiny.make_model(dtype=torch.float64)
    generator = SpeculativeGenerator(
        model,
        drafter=LexicalUnit(untrained_pads=2, one_pass=False),
        policy="chain",
        verifier="match",
        node_budget=3,
    )
    for step in generator.trace(tiny.ids(ROWS[0]), max_new_tokens=NEW, do_sample=False):
        assert step.path or not step.tree.num_drafted


def test_mixed_with_others() -> None:
    model = tiny.make_model()
    batch: dict[str, Any] = tiny.padded(ROWS)
    given: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": tiny.PAD}
    plain = SpeculativeGenerator(model, drafter=None).generate(**batch, **given)
    units = [LexicalUnit(untrained_pads=2, one_pass=one_pass) for one_pass in (True, False)]
    for unit, other in product(units, (EarlyExit(1), Suffix())):
        hybrid = Hybrid([unit, other])
        generator = SpeculativeGenerator(model, drafter=hybrid, node_budget=6)
        assert torch.equal(generator.generate(**batch, **given), plain)
        assert hybrid.needs.num_probes == unit.needs.num_probes
    assert units[0].needs.num_probes == 2
    units[1].name = "another"
    units[1]._one_pass = True
    with pytest.raises(ConfigError, match="not lexical_unit, another"):
        SpeculativeGenerator(model, drafter=Hybrid(units))


# ---- weights ----


def saved(folder: Path, tensors: dict[str, torch.Tensor], **of_target: Any) -> Path:
    save_checkpoint(folder, "lexical_unit", tiny.make_model(**of_target), tensors, {})
    return folder


def test_trained_weights_are_used(tmp_path: Path) -> None:
    vectors = torch.randn(2, 32)
    drafter = LexicalUnit(saved(tmp_path, {"pads": vectors}))
    SpeculativeGenerator(tiny.make_model().double(), drafter=drafter)
    torch.testing.assert_close(drafter.needs.probes, vectors.double())


def test_of_another_target(tmp_path: Path) -> None:
    folder = saved(tmp_path, {"pads": torch.zeros(2, 32)}, seed=1)
    with pytest.raises(StateError, match="train one for it"):
        SpeculativeGenerator(tiny.make_model(), drafter=LexicalUnit(folder))


@pytest.mark.parametrize(
    "tensors",
    [{"pads": torch.zeros(2, 31)}, {"pads": torch.zeros(32)}, {"other": torch.zeros(2, 32)}],
    ids=["width", "shape", "name"],
)
def test_of_another_form(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(StateError, match=r"one tensor 'pads' \[slots, 32\]"):
        SpeculativeGenerator(tiny.make_model(), drafter=LexicalUnit(saved(tmp_path, tensors)))


def test_by_name_it_needs_weights_that_come_with_the_toolkit() -> None:
    with pytest.raises(ConfigError, match=r"scripts/train_drafter\.py lexical_unit"):
        SpeculativeGenerator(tiny.make_model(), drafter="lexical_unit")


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="not both"):
        LexicalUnit("somewhere", untrained_pads=2)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        LexicalUnit(untrained_pads=0)
    with pytest.raises(ConfigError, match=r"from 0 to 1, got 1\.5"):
        LexicalUnit(untrained_pads=2, confidence=1.5)
    with pytest.raises(ConfigError, match="give it to a SpeculativeGenerator"):
        LexicalUnit(untrained_pads=2).attach(TargetInfo(tiny.VOCAB))
    drafter = LexicalUnit(untrained_pads=2, one_pass=False)
    drafter.attach(TargetInfo(tiny.VOCAB, model=tiny.make_model()))
    with pytest.raises(ConfigError, match="does not have"):
        drafter.law(DraftContext(0, ROWS[0], remaining=4))
