"""The draw laws of block drafters: the law of the text is the target's, computed over all draws.

The drafters are the production ones over tiny random networks in float64; features are a random
table keyed by the text. The mutants are the mistakes that laws of several slots invite.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusion_tiny import attached, saved

from specdec.drafters.block_law import BlockDrafter, BlockLaw
from specdec.drafters.diffusion import Diffusion
from specdec.drafters.masked_diffusion import MaskedDiffusion
from specdec.random import RandomSource
from specdec.testing.toys import ToyDraft, ToyLoop, ToyTarget, random_logits, repetition_penalty
from specdec.trees import BestFirst, Chain, DySpec, Marginals, Sequoia, Static
from specdec.trees.build import TreeBuilder
from specdec.types import (
    Budget,
    DraftContext,
    DraftLaw,
    Draw,
    GrowPlan,
    LawRows,
    PromptRows,
    Root,
    TargetInfo,
    TreePolicy,
    Verifier,
)
from specdec.verifiers import Block, Match, Rejection, Traversal

EXACT = 1e-12
PREFIX = (0, 1)
VOCAB = 3
FEATURES = 64  # two layers of width 32

POLICIES: dict[str, tuple[TreePolicy, Budget]] = {
    "chain": (Chain(), Budget(3, 3)),
    "chain of draws": (Chain(Draw.IID), Budget(3, 3)),
    "marginals": (Marginals(), Budget(4, 3)),
    "best_first": (BestFirst(), Budget(4, 3)),
    "dyspec": (DySpec(), Budget(3, 3)),
    "sequoia": (Sequoia([0.6, 0.3]), Budget(3, 2)),
    "siblings": (Static([(0,), (1,), (0, 0)], Draw.IID), Budget(3, 2)),
}
VERIFIERS: tuple[Verifier, ...] = (Match(), Rejection(), Traversal(), Block())
# what makes the law of a node, one case each
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "independent": ({}, {}),
    "behind the anchor": ({"sample_from_anchor": False}, {}),
    "markov": ({"markov_rank": 4, "reads_last": True}, {}),
    "two tokens of three": ({"markov_rank": 4, "vocabulary": [2, 0]}, {}),
    "unsure slots left out": (
        {"markov_rank": 4, "confidence": True},
        {"min_confidence": 0.5},
    ),
    "two candidates": ({}, {"num_candidates": 2}),
    "left to right": ({}, {"num_steps": 4}),
    "left to right by twos": ({"markov_rank": 4}, {"num_steps": 2}),
    "confident": ({}, {"num_steps": 3, "order": "confident"}),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model("llama", dtype=torch.float64, vocab_size=VOCAB)


class ProductionDraft(ToyDraft):
    """Asks a production drafter for the law of every text, at a temperature."""

    def __init__(self, drafter: BlockDrafter, temperature: float = 0.8) -> None:
        super().__init__(VOCAB)
        self.drafter = drafter
        self._temperature = temperature
        self._made: dict[tuple[int, ...], _Through] = {}

    def law(self, prefix: tuple[int, ...]) -> Any:
        if prefix not in self._made:
            row = len(self._made)  # each text is a row, so that none loses its contexts
            features = [random_logits(FEATURES, prefix[: i + 1], 1.0) for i in range(len(prefix))]
            empty = torch.empty(len(prefix) - 1, 0)
            rows = PromptRows(empty.long(), empty, torch.stack(features)[:-1])
            self.drafter.start(row, prefix[:-1], rows)
            context = DraftContext(row, list(prefix), 9, self._warp)
            self._made[prefix] = _Through(self.drafter, self.drafter.law(context))
        return self._made[prefix]

    def _warp(self, logits: torch.Tensor) -> torch.Tensor:
        return logits / self._temperature


class _Through:
    """A law whose rows come the way that the decoding loop asks for them."""

    def __init__(self, drafter: BlockDrafter, law: DraftLaw) -> None:
        self.drafter = drafter
        self.law = law

    def extend(self, parent: int, token: int) -> int:
        return self.law.extend(parent, token)

    def rows(self, handles: Sequence[int]) -> LawRows:
        log_probs, ids = self.drafter.expand([(self.law, handles)])[0]
        return LawRows(log_probs.double(), ids)


def diffusion(folder: Path, model: Any, form: str, seed: int = 0) -> Diffusion:
    network, options = FORMS[form]
    return attached(saved(folder, model, seed=seed, **network), model, **options)


def toy_target(seed: int) -> ToyTarget:
    return ToyTarget(VOCAB, seed, sharpness=1.2, processors=[repetition_penalty(1.7)])


# a chosen chain, drawn ones, a drawn tree, and the tree that shares a depth's law among its nodes
FEW = {"chain of draws-rejection", "dyspec-traversal", "best_first-match", "marginals-match"}


def cases() -> list[object]:
    """Every policy with every verifier for one form of law, and a few of them for the others."""
    params = []
    pairs = itertools.product(POLICIES.items(), VERIFIERS, FORMS)
    for (name, (policy, budget)), verifier, form in pairs:
        fits = policy.draws <= verifier.accepts and (verifier.name != "block" or "chain" in name)
        pair = f"{name}-{verifier.name}"
        if fits and (form == "markov" or pair in FEW):
            params.append(pytest.param(form, policy, budget, verifier, id=f"{pair}-{form}"))
    return params


@pytest.mark.parametrize(("form", "policy", "budget", "verifier"), cases())
def test_text_follows_the_target(
    form: str, policy: TreePolicy, budget: Budget, verifier: Verifier, model: Any, tmp_path: Path
) -> None:
    draft = ProductionDraft(diffusion(tmp_path, model, form))
    loop = ToyLoop(policy, verifier, toy_target(1), draft, budget)
    # a second step behind every text is for one form: it tests the loop, not the form
    assert loop.error(PREFIX, [budget, Budget(1, 1)] if form == "markov" else [budget]) < EXACT


@pytest.mark.parametrize("order", ["left_to_right", "confident"])
@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("policy", ["chain of draws", "best_first", "dyspec"])
def test_text_follows_the_target_with_a_model_that_fills_masks(
    policy: str, num_steps: int, order: str
) -> None:
    drafter = MaskedDiffusion(mask_filler(), block_size=3, num_steps=num_steps, order=order)
    drafter.attach(TargetInfo(VOCAB))
    rules, budget = POLICIES[policy]
    loop = ToyLoop(rules, Rejection(), toy_target(2), ProductionDraft(drafter), budget)
    assert loop.error(PREFIX, [budget]) < EXACT


def mask_filler() -> Any:
    """Returns a tiny BERT over the toy's tokens and a mask."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=1.0,
    )
    config.mask_token_id = 2
    return BertForMaskedLM(config).eval()


def test_honest_are_the_laws_that_are_given_the_path(model: Any, tmp_path: Path) -> None:
    honest = {form: diffusion(tmp_path / form, model, form).honest for form in FORMS}
    assert honest == {form: form != "confident" for form in FORMS}


# --------------------------------------------------------------------------- mutants


class RightToLeft:
    """Draws the last token of a block first, then those before it, given what was drawn.

    Args:
        draw: what the tokens are said to be. IID hands out the law of each one's own step, which
            is not its law given the tokens before it. POINT claims nothing.
    """

    name = "right_to_left"

    def __init__(self, draw: Draw, drafter: BlockDrafter) -> None:
        self.draws = frozenset({draw})
        self._draw = draw
        self._drafter = drafter

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        yield [0]
        own = law.law if isinstance(law, _Through) else law
        assert isinstance(own, BlockLaw)
        length = self._drafter.num_predicted
        given = torch.full((1, length), -1)
        rows: list[LawRows] = []
        for slot in reversed(range(length)):
            (guess,) = self._drafter._guess([own], given)
            log_probs = guess.logits[slot].double().log_softmax(-1)
            given[0, slot] = random.categorical(log_probs.exp())
            rows.insert(0, LawRows(log_probs.unsqueeze(0)))
        builder = TreeBuilder(root.token)
        for node, token in enumerate(given[0].tolist()):
            q_row = builder.add_law(rows[node], 0) if self._draw == Draw.IID else -1
            builder.add(node, token, 0, self._draw, q_row)
        return builder.build()


@pytest.mark.parametrize(("seed", "threshold"), [(0, 0.002), (1, 0.002)])
def test_tokens_drawn_from_right_to_left_are_no_draws_of_their_steps(
    seed: int, threshold: float, model: Any, tmp_path: Path
) -> None:
    """As a multi-step sampler would do it; the very same tokens are lossless as point masses."""
    # where slots stand at the places of their own tokens, the last one is seen by the others
    folder = saved(tmp_path, model, seed=seed, block_size=3, sample_from_anchor=False)
    drafter = attached(folder, model)
    draft, budget = ProductionDraft(drafter), Budget(2, 2)
    errors = {
        draw: ToyLoop(
            RightToLeft(draw, drafter), Rejection(), toy_target(seed), draft, budget
        ).error(PREFIX, [budget])
        for draw in (Draw.IID, Draw.POINT)
    }
    assert errors[Draw.IID] > threshold
    assert errors[Draw.POINT] < EXACT


class ArgmaxUnderSoftmax:
    """Takes the most probable token, and says that it was drawn from the law."""

    name = "argmax_under_softmax"
    draws = frozenset({Draw.IID})

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        builder = TreeBuilder(root.token)
        for node in range(budget.depth):
            rows = yield [builder.handles[node]]
            assert rows.ids is not None
            token = int(rows.ids[0, 0])
            handle = law.extend(builder.handles[node], token)
            builder.add(node, token, handle, Draw.IID, builder.add_law(rows, 0))
        return builder.build()


def test_the_most_probable_token_is_no_draw(model: Any, tmp_path: Path) -> None:
    draft = ProductionDraft(attached(saved(tmp_path, model), model))
    loop = ToyLoop(ArgmaxUnderSoftmax(), Rejection(), toy_target(0), draft, Budget(2, 2))
    assert loop.error(PREFIX, [Budget(2, 2)]) > 0.05
