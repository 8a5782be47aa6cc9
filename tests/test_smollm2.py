"""The promises on a real model: SmolLM2-135M-Instruct in float32.

The quick tests use a few prompts of our own. The slow ones use the file named by the environment
variable SPECDEC_PROMPTS (Spec-Bench's question.jsonl, say), or our own prompts without it.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
import torch

from specdec import SpeculativeGenerator
from specdec.prompts import encode, read_prompts, spread_over_categories

OWN_PROMPTS = Path(__file__).parent / "data" / "prompts.jsonl"
TRAINED = ("student", "diffusion", "lexical_unit")
DRAFTERS = ("token_recycling", "prompt_lookup", "suffix", "trigram", "hybrid", *TRAINED)
POLICIES = ("best_first", "static", "chain")
NEW_TOKENS = 96
NUM_PROMPTS = 40

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def long_run(smollm2):
    """Inputs of the long tests, and what `model.generate` writes for each of them alone."""
    model, tokenizer = smollm2
    path = os.environ.get("SPECDEC_PROMPTS", OWN_PROMPTS)
    prompts = spread_over_categories(read_prompts(path), NUM_PROMPTS)
    inputs = [encode(tokenizer, prompt) for prompt in prompts]

    @cache
    def reference(index: int) -> list[int]:
        ids = inputs[index]
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
        )
        return output[0, ids.shape[1] :].tolist()

    return inputs, reference


def left_padded(inputs: list[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and mask ``[B, T]`` of prompts of different lengths."""
    width = max(ids.shape[1] for ids in inputs)
    ids = torch.full((len(inputs), width), pad)
    mask = torch.zeros((len(inputs), width), dtype=torch.int64)
    for row, prompt in enumerate(inputs):
        ids[row, width - prompt.shape[1] :] = prompt
        mask[row, width - prompt.shape[1] :] = 1
    return ids, mask


def without_padding(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_text_is_the_models_own(smollm2, drafter):
    model, tokenizer = smollm2
    generator = SpeculativeGenerator(model, tokenizer, drafter=drafter)
    accepted = 0
    for prompt in read_prompts(OWN_PROMPTS)[3:6]:
        ids = encode(tokenizer, prompt)
        arguments = {"do_sample": False, "max_new_tokens": 40}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
        assert torch.equal(generator.generate(ids, **arguments), expected)
        accepted += generator.stats.num_accepted
    assert accepted > 0


def test_a_ragged_batch_writes_what_each_row_writes_alone(smollm2):
    model, tokenizer = smollm2
    inputs = [encode(tokenizer, prompt) for prompt in read_prompts(OWN_PROMPTS)[3:6]]
    ids, mask = left_padded(inputs, tokenizer.pad_token_id)
    generator = SpeculativeGenerator(model, tokenizer)
    arguments = {"do_sample": False, "max_new_tokens": 32}
    batch = generator.generate(ids, attention_mask=mask, **arguments)[:, ids.shape[1] :]
    for row, prompt in enumerate(inputs):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)
        expected = alone[0, prompt.shape[1] :].tolist()
        assert batch[row, : len(expected)].tolist() == expected


def test_coupled_sampling_does_not_depend_on_the_drafter(smollm2):
    model, tokenizer = smollm2
    ids = encode(tokenizer, read_prompts(OWN_PROMPTS)[0])
    arguments = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "max_new_tokens": 32,
    }
    texts = [
        SpeculativeGenerator(model, tokenizer, drafter=drafter, policy=policy, verifier="coupled")
        .generate(ids, seed=7, **arguments)
        .tolist()
        for drafter, policy in ((None, "auto"), ("token_recycling", "static"), ("auto", "auto"))
    ]
    assert texts[0] == texts[1] == texts[2]
    other = SpeculativeGenerator(model, tokenizer).generate(ids, seed=8, **arguments)
    assert other.tolist() != texts[0]


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_identity_over_many_prompts(smollm2, long_run, drafter, policy):
    model, tokenizer = smollm2
    inputs, reference = long_run
    generator = SpeculativeGenerator(model, tokenizer, drafter=drafter, policy=policy)
    for index, ids in enumerate(inputs):
        output = generator.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)
        assert output[0, ids.shape[1] :].tolist() == reference(index), f"prompt {index}"


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_identity_in_ragged_batches_of_four(smollm2, long_run, drafter, policy):
    model, tokenizer = smollm2
    inputs, reference = long_run
    eos = tokenizer.eos_token_id
    generator = SpeculativeGenerator(model, tokenizer, drafter=drafter, policy=policy)
    for first in range(0, len(inputs), 4):
        ids, mask = left_padded(inputs[first : first + 4], tokenizer.pad_token_id)
        output = generator.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS
        )
        for row, tokens in enumerate(output[:, ids.shape[1] :].tolist()):
            assert without_padding(tokens, eos) == reference(first + row), f"prompt {first + row}"


@pytest.mark.slow
def test_coupled_sampling_over_drafters_trees_and_batches(smollm2, long_run):
    model, tokenizer = smollm2
    inputs, _ = long_run
    inputs = inputs[:8]
    eos = tokenizer.eos_token_id
    arguments = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "max_new_tokens": 64,
    }
    plain = SpeculativeGenerator(model, tokenizer, drafter=None)
    expected = [
        plain.generate(ids, seed=index, **arguments)[0, ids.shape[1] :].tolist()
        for index, ids in enumerate(inputs)
    ]
    for drafter in DRAFTERS:
        for policy, budget in (("best_first", 24), ("static", 40), ("chain", 5)):
            generator = SpeculativeGenerator(
                model, tokenizer, drafter=drafter, policy=policy, node_budget=budget
            )
            for first in range(0, len(inputs), 4):
                seeds = list(range(first, first + 4))
                ids, mask = left_padded(inputs[first : first + 4], tokenizer.pad_token_id)
                output = generator.generate(ids, attention_mask=mask, seed=seeds, **arguments)
                for row, tokens in enumerate(output[:, ids.shape[1] :].tolist()):
                    assert without_padding(tokens, eos) == expected[first + row]
