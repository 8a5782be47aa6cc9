"""The diffusion drafter in the loop: the target's text, its contexts, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusion_tiny import attached, saved

from specdec import SpeculativeGenerator
from specdec.backend.features import FeatureTap
from specdec.build import build_drafter
from specdec.drafters import Diffusion, Hybrid, MaskedDiffusion, Suffix
from specdec.drafters.block_law import BlockLaw, Guess
from specdec.errors import ConfigError
from specdec.trees import BestFirst, Chain, Marginals
from specdec.types import DraftContext, PromptRows, StepOutcome, TargetInfo

NEW = 24
ROWS = [tiny.prompt(length, seed=length) for length in (5, 14, 9)]
WIDTH = max(map(len, ROWS))
SEEDS = [5, 6, 7]
HALF = list(range(3, 51))  # a draft vocabulary


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model("llama", seed=1)


class Noting(Diffusion):
    """Keeps every guess, and the text and the given tokens that it was made from."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.noted: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []
        self.nodes = 0

    def _guess(self, laws: Sequence[BlockLaw], given: torch.Tensor) -> list[Guess]:
        guesses = super()._guess(laws, given)
        for law, block, guess in zip(laws, given, guesses, strict=True):
            self.noted.append((list(law.text[: law.length]), block, guess.logits))
        return guesses

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        super().observe(outcomes)
        self.nodes += sum(len(outcome.path) for outcome in outcomes)


def features_of(model: Any, tokens: Sequence[int], layers: Sequence[int]) -> torch.Tensor:
    tap = FeatureTap(model, layers)
    with torch.no_grad(), tap.reading():
        model(torch.tensor([list(tokens)]))
    return tap.take()[0]


# ---- the text ----


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize(
    ("network", "options"),
    [
        ({}, {}),
        ({"sample_from_anchor": False, "mask_token_id": 2}, {}),
        ({"markov_rank": 4, "vocabulary": HALF, "confidence": True}, {"min_confidence": 0.5}),
        ({"markov_rank": 4}, {"num_steps": 2}),
        ({"vocabulary": HALF}, {"num_steps": 3, "order": "confident"}),
        ({"reads_last": True}, {}),
    ],
    ids=["plain", "dflash", "heads", "left_to_right", "confident", "reads_last"],
)
def test_text_is_that_of_plain_decoding(
    family: str, network: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    target = tiny.make_model(family, tiny.FAMILIES[family][2][0], seed=1)
    drafter = Diffusion(saved(tmp_path, target, **network), **options)
    plain = SpeculativeGenerator(target, drafter=None, verifier="coupled")
    generator = SpeculativeGenerator(target, drafter=drafter, node_budget=12)
    batch = {**tiny.padded(ROWS), "max_new_tokens": NEW, "pad_token_id": tiny.PAD}
    output: Any = generator.generate(**batch, do_sample=False)
    for row, prompt in enumerate(ROWS):
        alone = target.generate(
            tiny.ids(prompt), max_new_tokens=NEW, do_sample=False, pad_token_id=tiny.PAD
        )
        assert output[row, WIDTH:].tolist() == alone[0, len(prompt) :].tolist()
    sampled = {**batch, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "seed": SEEDS}
    assert torch.equal(plain.generate(**sampled), generator.generate(**sampled))
    assert generator.stats.num_drafted > NEW
    assert len(drafter._contexts) == 0


def test_rows_that_end_early_and_a_row_alone(model: Any, tmp_path: Path) -> None:
    texts = SpeculativeGenerator(model, drafter=None).generate(
        **tiny.padded(ROWS), max_new_tokens=NEW, do_sample=False
    )[:, WIDTH:]
    ends = [int(texts[0, 7]), int(texts[2, 15])]
    arguments = {"eos_token_id": ends, "pad_token_id": tiny.PAD, "max_new_tokens": NEW}
    given = {**tiny.padded(ROWS), **arguments, "do_sample": False}
    generator = SpeculativeGenerator(model, drafter=Diffusion(saved(tmp_path, model)))
    plain = SpeculativeGenerator(model, drafter=None)
    for _ in range(2):
        assert torch.equal(plain.generate(**given), generator.generate(**given))


# ---- what it sees ----


@pytest.mark.parametrize("policy", [BestFirst(), Marginals()], ids=["best_first", "marginals"])
@pytest.mark.parametrize(("num_steps", "reads_last"), [(1, False), (2, False), (1, True)])
def test_guesses_in_ragged_batches_are_those_of_the_whole_text_at_once(
    model: Any, tmp_path: Path, policy: Any, num_steps: int, reads_last: bool
) -> None:
    """Contexts that were kept, in a batch of uneven rows, against the text read anew."""
    arguments = {**tiny.padded(ROWS), "max_new_tokens": NEW, "do_sample": False}
    texts: Any = SpeculativeGenerator(model, drafter=None).generate(**arguments)
    # among few tokens a random network is right now and then, and paths are committed
    said = texts[:, WIDTH:].unique().tolist()
    folder = saved(tmp_path, model, vocabulary=said, markov_rank=4, reads_last=reads_last)
    drafter = Noting(folder, num_steps=num_steps)
    generator = SpeculativeGenerator(model, drafter=drafter, policy=policy, node_budget=24)
    generator.generate(**arguments)
    assert drafter.nodes > 0
    fresh = attached(folder, model)
    assert len({len(text) for text, _, _ in drafter.noted}) > NEW // 2
    for text, given, logits in drafter.noted:
        features = features_of(model, text[:-1], (0, 1))
        empty = torch.empty(len(text) - 1, 0)
        fresh.start(0, text[:-1], PromptRows(empty.long(), empty, features))
        law = fresh.law(DraftContext(0, text, 9))
        assert isinstance(law, BlockLaw)
        (guess,) = fresh._guess([law], given.unsqueeze(0))
        torch.testing.assert_close(guess.logits, logits, rtol=1e-3, atol=1e-3)


def test_an_earlier_turns_cache_has_no_features(model: Any, tmp_path: Path) -> None:
    """The contexts then begin in the middle of the text, at their own positions."""
    drafter = Noting(saved(tmp_path, model))
    generator = SpeculativeGenerator(model, drafter=drafter)
    plain = SpeculativeGenerator(model, drafter=None)
    arguments = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 9}
    ids = tiny.ids(ROWS[1])
    first: Any = generator.generate(ids, **arguments)
    drafter.noted.clear()
    longer = torch.cat([first.sequences, tiny.ids(ROWS[0])], dim=1)
    second: Any = generator.generate(longer, past_key_values=first.past_key_values, **arguments)
    expected: Any = plain.generate(longer, **arguments)
    assert torch.equal(second.sequences, expected.sequences)
    text, given, logits = drafter.noted[0]
    known = len(first.sequences[0]) - 1
    fresh = attached(drafter._weights, model)
    empty = torch.empty(len(text) - 1 - known, 0)
    features = features_of(model, text[:-1], (0, 1))[known:]
    fresh.start(0, text[:-1], PromptRows(empty.long(), empty, features))
    law = fresh.law(DraftContext(0, text, 9))
    assert isinstance(law, BlockLaw)
    (guess,) = fresh._guess([law], given.unsqueeze(0))
    torch.testing.assert_close(guess.logits, logits, rtol=1e-3, atol=1e-3)


def test_a_block_sees_its_own_context_and_neither_more_nor_less(model: Any, tmp_path: Path) -> None:
    drafter = attached(saved(tmp_path, model), model)
    features = features_of(model, ROWS[1], (0, 1))
    empty = torch.empty(len(ROWS[1]) - 1, 0)

    def guess(shown: torch.Tensor) -> torch.Tensor:
        drafter.start(0, ROWS[1][:-1], PromptRows(empty.long(), empty, shown[:-1]))
        law = drafter.law(DraftContext(0, ROWS[1], 9))
        assert isinstance(law, BlockLaw)
        return drafter._guess([law], torch.full((1, 4), -1))[0].logits

    base = guess(features)
    for place in range(len(features)):
        changed = features.clone()
        changed[place] += 1.0
        # the root's own features are not known yet
        assert torch.equal(guess(changed), base) == (place == len(features) - 1)


# ---- in a hybrid ----


def test_a_hybrid_hands_each_source_its_own_features(model: Any, tmp_path: Path) -> None:
    low = Noting(saved(tmp_path / "low", model, target_layer_ids=(0,)))
    high = Noting(saved(tmp_path / "high", model, target_layer_ids=(1, 0), seed=1))
    low.name, high.name = "low", "high"
    hybrid = Hybrid([Suffix(), low, high])
    generator = SpeculativeGenerator(model, drafter=hybrid, policy=Chain(), node_budget=4)
    assert hybrid.needs.layers == (0, 1)
    plain = SpeculativeGenerator(model, drafter=None)
    arguments = {**tiny.padded(ROWS), "max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(plain.generate(**arguments), generator.generate(**arguments))
    for drafter, layers in ((low, (0,)), (high, (1, 0))):
        fresh = attached(drafter._weights, model)
        text, given, logits = drafter.noted[-1]
        empty = torch.empty(len(text) - 1, 0)
        features = features_of(model, text[:-1], layers)
        fresh.start(0, text[:-1], PromptRows(empty.long(), empty, features))
        law = fresh.law(DraftContext(0, text, 9))
        assert isinstance(law, BlockLaw)
        (guess,) = fresh._guess([law], given.unsqueeze(0))
        torch.testing.assert_close(guess.logits, logits, rtol=1e-3, atol=1e-3)


# ---- an independent model ----


@pytest.mark.parametrize("shifted", [False, True])
def test_a_model_that_fills_masks_drafts_too(model: Any, shifted: bool) -> None:
    filler = mask_filler()
    drafter = MaskedDiffusion(filler, 2, block_size=4, shifted=shifted, max_context=20)
    generator = SpeculativeGenerator(model, drafter=drafter, node_budget=8)
    plain = SpeculativeGenerator(model, drafter=None)
    arguments = {**tiny.padded(ROWS), "max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(plain.generate(**arguments), generator.generate(**arguments))
    assert generator.stats.num_drafted > NEW


@pytest.mark.parametrize("shifted", [False, True])
def test_rows_of_a_batch_do_not_see_each_others_padding(shifted: bool) -> None:
    drafter = MaskedDiffusion(mask_filler(), 2, block_size=4, shifted=shifted)
    drafter.attach(TargetInfo(tiny.VOCAB))
    laws: Any = [drafter.law(DraftContext(i, row, 9)) for i, row in enumerate(ROWS)]
    given = torch.full((3, 4), -1)
    together = drafter._guess(laws, given)
    ids = torch.tensor([[*ROWS[0], 2, 2, 2, 2]])
    alone = drafter._model(input_ids=ids).logits[0]
    first = len(ROWS[0]) - int(shifted)
    expected = alone[first : first + 4].detach()
    expected[:, 2] = -torch.inf
    torch.testing.assert_close(together[0].logits, expected, rtol=1e-4, atol=1e-4)


def mask_filler() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return BertForMaskedLM(config).eval()


# ---- what is refused ----


def test_the_name_means_the_weights_that_ship(model: Any) -> None:
    assert isinstance(build_drafter("diffusion"), Diffusion)
    with pytest.raises(ConfigError, match="no trained diffusion drafter comes with the toolkit"):
        SpeculativeGenerator(model, drafter="diffusion")
    with pytest.raises(ConfigError, match=r"MaskedDiffusion\(draft_model\)"):
        build_drafter("masked_diffusion")


def test_features_of_another_width(model: Any, tmp_path: Path) -> None:
    drafter = attached(saved(tmp_path, model), model)
    empty = torch.empty(3, 0)
    with pytest.raises(ConfigError, match=r"expected 64 features a token .*got 32"):
        drafter.start(0, [4, 5, 6], PromptRows(empty.long(), empty, torch.zeros(3, 32)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "right_to_left"}, "order must be one of left_to_right, confident"),
        ({"num_steps": 0}, "num_steps and num_candidates must be at least 1"),
        ({"min_confidence": 1.0}, r"min_confidence must be in \[0, 1\)"),
    ],
)
def test_arguments_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Diffusion(**options)


def test_a_confidence_head_that_is_not_there(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a confidence head"):
        attached(saved(tmp_path, model), model, min_confidence=0.5)


def test_another_model_than_before(model: Any, tmp_path: Path) -> None:
    drafter = attached(saved(tmp_path, model), model)
    with pytest.raises(ConfigError, match="drafts for another model"):
        drafter.attach(TargetInfo(tiny.VOCAB, model=tiny.make_model("llama", seed=2)))
    with pytest.raises(ConfigError, match="give it to a SpeculativeGenerator"):
        Diffusion(tmp_path).attach(TargetInfo(tiny.VOCAB))


def test_a_mask_filler_without_a_mask() -> None:
    with pytest.raises(ConfigError, match=r"pass mask_token_id"):
        MaskedDiffusion(mask_filler())
    with pytest.raises(ConfigError, match=r"training mode: call model.eval\(\)"):
        MaskedDiffusion(mask_filler().train(), 2)
