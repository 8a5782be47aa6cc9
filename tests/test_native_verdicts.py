"""Verdicts of C code about the trees of a step: texts, trees and counts are the verifier's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from test_multi_step import JUDGED
from transformers import TemperatureLogitsWarper

from specdec import SpeculativeGenerator
from specdec.errors import LogitsError
from specdec.kernels.token_choice import serves
from specdec.native_verdicts import NativeVerdicts

pytestmark = pytest.mark.skipif(not serves(), reason="no native code")
SAMPLED: dict[str, dict[str, Any]] = {
    "all": {"top_k": 0},
    "top_k": {"temperature": 0.8, "top_k": 10},
    "nucleus": {"temperature": 0.7, "top_p": 0.9},
    "nucleus_of_all": {"top_k": 0, "top_p": 0.8},
}
PARTS: dict[str, dict[str, Any]] = {
    "plain": {"drafter": None},
    "trigram": {"drafter": "trigram", "node_budget": 6},
    "static": {"drafter": "token_recycling", "policy": "static", "node_budget": 20},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each row of each step, whether there was a verdict."""
    seen: list[bool] = []
    of = NativeVerdicts.of

    def counted(self: NativeVerdicts, *args: Any) -> Any:
        verdicts = of(self, *args)
        seen.extend(verdict is not None for verdict in verdicts)
        return verdicts

    monkeypatch.setattr(NativeVerdicts, "of", counted)
    return seen


def written(parts: dict[str, Any], **arguments: Any) -> tuple[list[Any], Any]:
    """Returns the steps of a ragged batch of three, and what the rows came to."""
    generator = SpeculativeGenerator(tiny.make_model("llama"), verifier="coupled", **parts)
    prompts = tiny.ids(tiny.prompt(9), tiny.prompt(9, seed=1), tiny.prompt(9, seed=2))
    mask = torch.ones_like(prompts)
    mask[1, :3] = 0
    arguments = {"max_new_tokens": 40, "do_sample": True, "seed": 6} | arguments
    steps = list(generator.trace(prompts, attention_mask=mask, **arguments))
    assert generator.stats is not None
    rows = [row.to_dict() for row in generator.stats.rows]
    return [(step.row, step.tokens, step.path, step.tree.token_list) for step in steps], rows


@pytest.mark.parametrize("way", SAMPLED)
@pytest.mark.parametrize("parts", PARTS)
def test_batches_are_those_of_the_verifier(
    parts: str, way: str, told: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = written(PARTS[parts], **SAMPLED[way])
    assert sum(told) > 0.8 * len(told) > 30
    monkeypatch.setattr(NativeVerdicts, "of", lambda _, rows, *__: [None] * len(rows))
    assert mine == written(PARTS[parts], **SAMPLED[way])


def test_rows_end_where_they_must(told: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within an accepted path too."""
    steps, _ = written(PARTS["trigram"], **SAMPLED["all"])
    ends = [tokens[0] for _, tokens, path, _ in steps[6:] if path][:3]
    mine = written(PARTS["trigram"], eos_token_id=ends, **SAMPLED["all"])
    assert sum(told) > 30
    monkeypatch.setattr(NativeVerdicts, "of", lambda _, rows, *__: [None] * len(rows))
    assert mine == written(PARTS["trigram"], eos_token_id=ends, **SAMPLED["all"])
    assert any(row["num_emitted"] < 39 for row in mine[1])
    assert any(path and len(path) == len(tokens) for _, tokens, path, _ in mine[0])


@pytest.mark.parametrize("name", JUDGED)
def test_others_are_asked_where_c_code_may_not_choose(name: str, told: list[bool]) -> None:
    own = dict(JUDGED[name])
    generator = SpeculativeGenerator(
        tiny.make_model("llama"), drafter="trigram", verifier=own.pop("verifier", "coupled")
    )
    generator.generate(
        tiny.ids(tiny.prompt(8), tiny.prompt(8, seed=1)), max_new_tokens=9, do_sample=True, **own
    )
    assert told
    assert not any(told)


@pytest.mark.parametrize("arguments", [{"do_sample": False}, {"verifier": "rejection"}])
def test_other_rules_decide_themselves(arguments: dict[str, Any], told: list[bool]) -> None:
    verifier = arguments.get("verifier", "coupled")
    generator = SpeculativeGenerator(tiny.make_model("llama"), drafter=None, verifier=verifier)
    sample = arguments.get("do_sample", True)
    generator.generate(
        tiny.ids(tiny.prompt(8), tiny.prompt(8, seed=1)), max_new_tokens=9, do_sample=sample
    )
    assert told
    assert not any(told)


def test_numbers_that_are_none_are_told_of(
    told: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the text of all rows before them."""
    generator = SpeculativeGenerator(tiny.make_model("llama"), drafter=None)
    prompts, text = tiny.ids(tiny.prompt(8), tiny.prompt(8, seed=1)), []
    sampled = {"max_new_tokens": 30, "do_sample": True, "seed": 3, "top_k": 0}
    for row, tokens in generator.stream(prompts, **sampled):
        text += [tokens[0]] if row == 1 else []
    place = next(i for i in range(12, 30) if text[i] not in text[:i] + tiny.prompt(8, seed=1))
    with torch.no_grad():
        generator.model.model.embed_tokens.weight[text[place]] = torch.nan
    texts = []
    for _ in range(2):
        came: list[tuple[int, list[int]]] = []
        with pytest.raises(LogitsError, match="are NaN"):
            delivered(generator.stream(prompts, **sampled), came)
        texts.append(came)
        assert any(told)
        monkeypatch.setattr(NativeVerdicts, "of", lambda _, rows, *__: [None] * len(rows))
    assert texts[0] == texts[1]
    assert sum(len(tokens) for _, tokens in texts[0]) > 20


def delivered(stream: Iterator[tuple[int, list[int]]], came: list[tuple[int, list[int]]]) -> None:
    """Adds what comes, until there is an error."""
    for one in stream:
        came.append(one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lone_row_with_a_drafter_of_pythons(
    dtype: torch.dtype, told: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step; logits of another dtype are the verifier's."""
    steps = []
    for _ in range(2):
        generator = SpeculativeGenerator(
            tiny.make_model("llama").to(dtype), drafter="prompt_lookup", node_budget=4
        )
        prompt = tiny.ids(tiny.prompt(9))
        run = generator.trace(prompt, max_new_tokens=40, do_sample=True, seed=2, top_k=20)
        steps.append([(step.tokens, step.path, step.tree.token_list) for step in run])
        assert generator.stats is not None
        seconds = generator.stats.seconds
        assert all(phase >= 0 for phase in seconds.values())
        assert any(told) == (dtype is torch.float32)
        monkeypatch.setattr(NativeVerdicts, "of", lambda _, rows, *__: [None] * len(rows))
    assert steps[0] == steps[1]


def test_rows_of_one_prompt_are_told_apart(
    told: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for _ in range(2):
        generator = SpeculativeGenerator(tiny.make_model("llama"), drafter="trigram")
        prompt = tiny.ids(tiny.prompt(9))
        sampled = {"max_new_tokens": 20, "do_sample": True, "seed": 2**63 + 5}
        texts.append(generator.generate(prompt, num_return_sequences=3, **sampled))
        assert any(told)
        monkeypatch.setattr(NativeVerdicts, "of", lambda _, rows, *__: [None] * len(rows))
    assert torch.equal(*texts)
    assert len({tuple(row) for row in texts[0].tolist()}) == 3


def test_a_temperature_may_be_turned_between_tokens(
    told: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for _ in range(2):
        warper = TemperatureLogitsWarper(0.3)
        generator = SpeculativeGenerator(
            tiny.make_model("llama"), drafter="prompt_lookup", node_budget=4
        )
        stream = generator.stream(
            tiny.ids(tiny.prompt(9)),
            max_new_tokens=60,
            do_sample=True,
            seed=1,
            top_k=0,
            logits_processor=[warper],
        )
        texts.append([])
        for _, tokens in stream:
            texts[-1] += tokens
            warper.temperature = 0.3 if len(texts[-1]) % 20 < 10 else 4.0
        assert any(told)
        monkeypatch.setattr(NativeVerdicts, "of", lambda _, rows, *__: [None] * len(rows))
    assert texts[0] == texts[1]
