"""Sampling calls: with `coupled` the text is a function of model, prompt and seed, nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import DynamicCache

from specdec import SpeculativeGenerator
from specdec.drafters.base import BaseDrafter
from specdec.trees import BestFirst, Chain, Static
from specdec.types import DraftContext, Draw, LawRows

NEW = 24
SAMPLED: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "repetition_penalty": 1.2,
    "max_new_tokens": NEW,
    "pad_token_id": tiny.PAD,
}
ROWS = [tiny.prompt(17, seed=1), tiny.prompt(6, seed=2), tiny.prompt(11, seed=3)]
PROMPT = ROWS[0]
SEEDS = [71, 72, 73]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model("llama", seed=1)


@pytest.fixture(scope="module")
def plain(model: Any) -> SpeculativeGenerator:
    return SpeculativeGenerator(model, drafter=None, verifier="coupled")


@pytest.fixture(scope="module")
def alone(plain: SpeculativeGenerator) -> list[list[int]]:
    """The text of each row under its own seed, written by itself without any draft."""
    return [sampled(plain, row, seed=[seed]) for row, seed in zip(ROWS, SEEDS, strict=True)]


def sampled(generator: SpeculativeGenerator, row: Sequence[int], **arguments: Any) -> list[int]:
    output: Any = generator.generate(tiny.ids(row), **{**SAMPLED, **arguments})
    return output[0, len(row) :].tolist()


# ---- coupled: whatever is drafted ----

POLICIES: dict[str, Any] = {
    "best_first": BestFirst(),
    "static": Static(),
    "chain": Chain(),
    "chain, drawn": Chain(Draw.IID),
    "static, drawn with replacement": Static(draw=Draw.IID),
    "static, drawn without replacement": Static(draw=Draw.WOR),
    "chain, coupled": Chain(Draw.COUPLED),
    "static, coupled": Static(draw=Draw.COUPLED),
}


@pytest.mark.parametrize("budget", [1, 12])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("drafter", ["hybrid", "prompt_lookup", "suffix", "trigram", "oracle"])
def test_the_text_is_the_same_whatever_was_drafted(
    model: Any, alone: list[list[int]], drafter: Any, policy: str, budget: int
) -> None:
    known = drafter == "oracle"
    generator = SpeculativeGenerator(
        model,
        drafter=tiny.Oracle([alone[0]], gap=6) if known else drafter,
        policy=POLICIES[policy],
        verifier="coupled",
        node_budget=budget,
    )
    assert sampled(generator, PROMPT, seed=SEEDS[:1]) == alone[0]
    if known:
        assert generator.stats.num_accepted >= NEW // 6


def test_texts_are_worth_comparing(model: Any, alone: list[list[int]]) -> None:
    greedy = model.generate(tiny.ids(PROMPT), do_sample=False, max_new_tokens=NEW)
    assert alone[0] != greedy[0, len(PROMPT) :].tolist()
    assert all(len(set(text)) > NEW // 2 for text in alone)


def test_named_drafters_are_right_now_and_then(model: Any, plain: SpeculativeGenerator) -> None:
    """A sharper law repeats itself, so that the identities above do cover accepted guesses."""
    arguments = {"temperature": 0.1, "repetition_penalty": 1.0, "max_new_tokens": 60, "seed": 3}
    expected = sampled(plain, PROMPT, **arguments)
    for drafter in ("token_recycling", "prompt_lookup", "suffix", "trigram", "hybrid"):
        generator = SpeculativeGenerator(model, drafter=drafter, verifier="coupled", node_budget=8)
        assert sampled(generator, PROMPT, **arguments) == expected
        assert generator.stats.num_accepted > 3


# ---- coupled: whatever stands beside it ----


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("order", [(2, 1, 0), (2, 0), (1, 1, 2, 0, 0)], ids=str)
@pytest.mark.parametrize("drafter", [None, "token_recycling", "hybrid", "oracle"])
def test_the_text_is_the_same_in_every_batch(
    model: Any, alone: list[list[int]], drafter: Any, order: tuple[int, ...], side: str
) -> None:
    if drafter == "oracle":
        drafter = tiny.Oracle([alone[i] for i in order], gap=8)
    generator = SpeculativeGenerator(model, drafter=drafter, verifier="coupled")
    batch = tiny.padded([ROWS[i] for i in order], side)
    output: Any = generator.generate(**batch, seed=[SEEDS[i] for i in order], **SAMPLED)
    width = batch["input_ids"].shape[1]
    assert output[:, width:].tolist() == [alone[i] for i in order]


def test_more_padding_changes_nothing(model: Any, alone: list[list[int]]) -> None:
    generator = SpeculativeGenerator(model, verifier="coupled")
    for extra in (1, 9):
        ids = tiny.ids([tiny.PAD] * extra + PROMPT)
        mask = tiny.ids([0] * extra + [1] * len(PROMPT))
        output: Any = generator.generate(ids, attention_mask=mask, seed=SEEDS[:1], **SAMPLED)
        assert output[0, ids.shape[1] :].tolist() == alone[0]


def test_rows_that_end_early_do_not_disturb_the_others(model: Any, alone: list[list[int]]) -> None:
    eos = next(t for t in alone[1][3:] if t not in alone[0] + alone[2])
    end = alone[1].index(eos) + 1
    generator = SpeculativeGenerator(model, verifier="coupled")
    output: Any = generator.generate(**tiny.padded(ROWS), seed=SEEDS, eos_token_id=eos, **SAMPLED)
    texts = output[:, len(PROMPT) :].tolist()
    assert texts[0] == alone[0]
    assert texts[1] == alone[1][:end] + [tiny.PAD] * (NEW - end)
    assert texts[2] == alone[2]


@pytest.mark.parametrize("family", ["mistral", "gpt2", "gemma3_text", "gpt_oss"])
def test_other_families(family: str) -> None:
    # in float64: where two tokens are as good as equal, float32 may decide either way
    model = tiny.make_model(family, tiny.FAMILIES[family][2][0], torch.float64, seed=1)
    if model.get_experts_implementation():
        model.set_experts_implementation("eager")  # torch's grouped product takes no float64
    plain = SpeculativeGenerator(model, drafter=None)
    expected = [sampled(plain, row, seed=[s]) for row, s in zip(ROWS, SEEDS, strict=True)]
    for drafter in ("token_recycling", tiny.Oracle(expected)):
        generator = SpeculativeGenerator(model, drafter=drafter)
        output: Any = generator.generate(**tiny.padded(ROWS), seed=SEEDS, **SAMPLED)
        assert output[:, len(PROMPT) :].tolist() == expected


# ---- coupled: wherever it begins ----


@pytest.mark.parametrize("first", [1, 7, 20])
@pytest.mark.parametrize("cached", [False, True], ids=["afresh", "with the cache"])
def test_a_text_written_in_two_calls_is_the_text_written_in_one(
    model: Any, alone: list[list[int]], first: int, cached: bool
) -> None:
    """The noise is keyed by the absolute position, and so goes on where it stopped."""
    generator = SpeculativeGenerator(model, verifier="coupled")
    cache = DynamicCache(config=model.config) if cached else None
    arguments = {"seed": SEEDS[:1], "past_key_values": cache}
    begun = sampled(generator, PROMPT, **arguments, max_new_tokens=first)
    assert begun == alone[0][:first]
    rest = sampled(generator, PROMPT + begun, **arguments, max_new_tokens=NEW - first)
    assert begun + rest == alone[0]


def test_new_tokens_under_a_wide_mask_go_on_at_their_absolute_position(model: Any) -> None:
    """Without penalties: transformers' processors see the new ids only."""
    generator = SpeculativeGenerator(model, verifier="coupled")
    arguments: dict[str, Any] = {"seed": [5], "repetition_penalty": 1.0}
    text = sampled(generator, PROMPT, **arguments)
    cache = DynamicCache(config=model.config)
    begun = sampled(generator, PROMPT, **arguments, max_new_tokens=9, past_key_values=cache)
    rest = sampled(
        generator,
        begun[-1:],
        **arguments,
        attention_mask=torch.ones(1, len(PROMPT) + 9, dtype=torch.int64),
        past_key_values=cache,
        max_new_tokens=NEW - 9,
    )
    assert begun + rest == text


# ---- seeds ----


@pytest.mark.parametrize("verifier", ["coupled", "match", "rejection"])
def test_a_seed_repeats_the_text_and_another_one_changes_it(model: Any, verifier: str) -> None:
    def text(seed: int) -> list[int]:
        return sampled(SpeculativeGenerator(model, verifier=verifier), PROMPT, seed=seed)

    assert text(5) == text(5)
    assert len({tuple(text(seed)) for seed in range(4)}) == 4


@pytest.mark.parametrize("verifier", ["match", "rejection"])
def test_draws_of_a_batch_repeat_under_a_seed(model: Any, verifier: str) -> None:
    outputs = []
    for _ in range(2):
        generator = SpeculativeGenerator(model, policy=Static(), verifier=verifier)
        outputs.append(generator.generate(**tiny.padded(ROWS), seed=9, **SAMPLED).tolist())
    assert outputs[0] == outputs[1]


def test_a_batch_under_one_seed_has_different_noise_in_each_row(plain: Any) -> None:
    output = plain.generate(tiny.ids(PROMPT, PROMPT, PROMPT), seed=5, **SAMPLED)
    assert len(set(map(tuple, output.tolist()))) == 3
    assert output[0, len(PROMPT) :].tolist() == sampled(plain, PROMPT, seed=5)


def test_large_negative_and_numpy_seeds(plain: SpeculativeGenerator) -> None:
    seeds: list[Any] = [0, -1, 2**63, 2**64 - 2, 2**63 + 1, -(2**63)]
    texts = [tuple(sampled(plain, PROMPT, seed=seed)) for seed in seeds]
    # seeds are words of 64 bits: -(2**63) and 2**63 are one and the same
    assert texts[2] == texts[5]
    assert len(set(texts)) == 5
    assert sampled(plain, PROMPT, seed=np.int64(7)) == sampled(plain, PROMPT, seed=7)
    assert sampled(plain, PROMPT, seed=torch.tensor(7)) == sampled(plain, PROMPT, seed=7)


@pytest.mark.parametrize("verifier", ["coupled", "match", "rejection"])
def test_torchs_generator_governs_where_no_seed_is_given(model: Any, verifier: str) -> None:
    def text(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return sampled(SpeculativeGenerator(model, verifier=verifier), PROMPT)

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_calls_without_a_seed_differ(plain: SpeculativeGenerator) -> None:
    assert sampled(plain, PROMPT) != sampled(plain, PROMPT)


def test_a_call_draws_one_number_whatever_its_length_and_drafter(model: Any) -> None:
    states = []
    for drafter, length in ((None, 4), (None, 25), ("token_recycling", 25)):
        torch.manual_seed(8)
        sampled(SpeculativeGenerator(model, drafter=drafter), PROMPT, max_new_tokens=length)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


@pytest.mark.parametrize("arguments", [{"do_sample": False}, {"seed": 4}, {"seed": [4]}], ids=str)
def test_greedy_and_seeded_calls_leave_torchs_generator_alone(
    model: Any, arguments: dict[str, Any]
) -> None:
    torch.manual_seed(8)
    before = torch.get_rng_state()
    sampled(SpeculativeGenerator(model), PROMPT, **arguments)
    assert torch.equal(torch.get_rng_state(), before)


def test_numpys_and_pythons_generators_are_left_alone(model: Any) -> None:
    import random

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    state = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    sampled(SpeculativeGenerator(model, verifier="rejection"), PROMPT)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state  # noqa: NPY002


# ---- several sequences ----


def test_samples_of_one_prompt_differ_and_repeat(model: Any) -> None:
    outputs = [
        SpeculativeGenerator(model, drafter=drafter).generate(
            tiny.ids(PROMPT), num_return_sequences=4, seed=6, **SAMPLED
        )
        for drafter in (None, "token_recycling")
    ]
    assert outputs[0].shape == (4, len(PROMPT) + NEW)
    assert len(set(map(tuple, outputs[0].tolist()))) == 4
    assert outputs[0].tolist() == outputs[1].tolist()


def test_samples_under_seeds_of_their_prompts(model: Any, plain: SpeculativeGenerator) -> None:
    """A prompt's samples are the same whatever stands beside it in the batch."""
    arguments = {**SAMPLED, "num_return_sequences": 2}
    batch: Any = SpeculativeGenerator(model).generate(**tiny.padded(ROWS), seed=SEEDS, **arguments)
    for row, seed in enumerate(SEEDS):
        own: Any = plain.generate(tiny.ids(ROWS[row]), seed=[seed], **arguments)
        texts = own[:, len(ROWS[row]) :].tolist()
        assert batch[2 * row : 2 * row + 2, len(PROMPT) :].tolist() == texts
        assert texts[0] != texts[1]


def test_seeds_of_single_samples(plain: SpeculativeGenerator) -> None:
    arguments = {**SAMPLED, "num_return_sequences": 3}
    output: Any = plain.generate(tiny.ids(PROMPT), seed=SEEDS, **arguments)
    expected = [sampled(plain, PROMPT, seed=[seed]) for seed in SEEDS]
    assert output[:, len(PROMPT) :].tolist() == expected


# ---- streams and scores ----


def test_stream_yields_the_text_of_generate(model: Any, alone: list[list[int]]) -> None:
    texts: list[list[int]] = [[], [], []]
    generator = SpeculativeGenerator(model)
    for row, tokens in generator.stream(**tiny.padded(ROWS), seed=SEEDS, **SAMPLED):
        texts[row] += tokens
    assert texts == alone


def test_scores_are_those_of_generate_along_the_sampled_text(
    model: Any, alone: list[list[int]]
) -> None:
    details = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    generator = SpeculativeGenerator(model, drafter=tiny.Oracle(alone))
    output: Any = generator.generate(tiny.ids(PROMPT), seed=SEEDS[:1], **SAMPLED, **details)
    text = output.sequences[0, len(PROMPT) :].tolist()
    assert text == alone[0]
    assert generator.stats.num_accepted > NEW // 2

    def follow(row: int, ids: Tensor) -> list[int]:
        return [text[len(ids) - len(PROMPT)]]

    # transformers' own sampling, forced along our text; its logits are not yet restricted
    forced = model.generate(tiny.ids(PROMPT), prefix_allowed_tokens_fn=follow, **SAMPLED, **details)
    assert forced.sequences.tolist() == output.sequences.tolist()
    for ours, theirs in zip(output.logits, forced.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    kept = [int((scores > -torch.inf).sum()) for scores in output.scores]
    assert min(kept) < 20 < tiny.VOCAB


# ---- the law ----


class Hint(BaseDrafter):
    """Offers the same few tokens at every node, with the law of the second token on average."""

    name = "hint"

    def __init__(self, shares: dict[int, float]) -> None:
        self._log_probs = torch.full((tiny.VOCAB,), -torch.inf)
        for token, share in shares.items():
            self._log_probs[token] = math.log(share)

    def law(self, context: DraftContext) -> Any:
        return self

    def extend(self, parent: int, token: int) -> int:
        return parent + 1

    def rows(self, handles: Sequence[int]) -> LawRows:
        return LawRows(self._log_probs.repeat(len(handles), 1))


@pytest.mark.parametrize(
    ("verifier", "policy"),
    [
        ("coupled", Chain(Draw.COUPLED)),
        ("match", BestFirst()),
        ("rejection", BestFirst()),
        ("rejection", Static(draw=Draw.IID)),
        ("rejection", Static(draw=Draw.WOR)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_pairs_of_tokens_follow_the_models_law(model: Any, verifier: str, policy: Any) -> None:
    """Through the whole call, in one large batch; the enumeration tests are the exact ones."""
    count, kept = 1000, 3
    pairs: dict[tuple[int, int], float] = {}
    second_on_average: dict[int, float] = {}
    for first, share in next_law(model, PROMPT, kept).items():
        for second, then in next_law(model, [*PROMPT, first], kept).items():
            pairs[first, second] = share * then
            second_on_average[second] = second_on_average.get(second, 0.0) + share * then
    generator = SpeculativeGenerator(
        model, drafter=Hint(second_on_average), policy=policy, verifier=verifier, node_budget=3
    )
    output: Any = generator.generate(
        tiny.ids(PROMPT),
        do_sample=True,
        top_k=kept,
        temperature=TEMPERATURE,
        num_return_sequences=count,
        max_new_tokens=3,
        seed=17,
    )
    assert generator.stats.num_accepted > count // 10
    new = output[:, len(PROMPT) : len(PROMPT) + 2].tolist()
    assert {tuple(pair) for pair in new} <= set(pairs)
    observed = [sum(tuple(pair) == key for pair in new) for key in pairs]
    expected = [count * share for share in pairs.values()]
    assert min(expected) > 5
    assert chisquare(observed, expected).pvalue > 1e-3


TEMPERATURE = 4.0


def next_law(model: Any, row: Sequence[int], kept: int) -> dict[int, float]:
    with torch.no_grad():
        logits = model(tiny.ids(row)).logits[0, -1].double()
    top = torch.topk(logits / TEMPERATURE, kept)
    return dict(zip(top.indices.tolist(), torch.softmax(top.values, -1).tolist(), strict=True))
