"""Several steps in one call of C: texts, trees and tables of steps asked for one by one."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec import SpeculativeGenerator, multi_step
from specdec.budget import AutoBudget
from specdec.budget.clock import DraftClock
from specdec.budget.pauses import Pauses
from specdec.cost import PassCost
from specdec.drafters import EarlyExit, Hybrid, PromptLookup, Suffix, TokenRecycling, Trigram
from specdec.errors import ConfigError, LogitsError
from specdec.kernels import step_structs
from specdec.kernels.decoder_layer import why_not_native
from specdec.kernels.multi_step import RowDecoder, serves, structure_sizes
from specdec.kernels.truncated_row import MOST_K, MOST_LEFT
from specdec.native_verdicts import NativeVerdicts
from specdec.row_text import Row, Step
from specdec.testing.wrong import AlwaysWrong
from specdec.trees import BestFirst, CoupledBestFirst
from specdec.trees.tree import DraftTree
from specdec.types import StepOutcome, Verdict
from specdec.verifiers import Coupled, Match

pytestmark = [
    pytest.mark.skipif(why_not_native() is not None, reason=f"no native code: {why_not_native()}"),
    pytest.mark.usefixtures("small_layers_count"),
]
WIDE = {"head_dim": 32, "hidden_size": 128}
LONG = 60
DRAFTERS: dict[str, Callable[[], Any]] = {
    "token_recycling": TokenRecycling,
    "trigram": lambda: Trigram(num_pairs=256),  # small: pairs are driven out
    "suffix": Suffix,
    "hybrid": lambda: Hybrid([Suffix(), Trigram(num_pairs=256), TokenRecycling()]),
    "suffix_alone_mixed": lambda: Hybrid([Suffix()]),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps came of each call; there is time for as many as there may be."""
    seen: list[int] = []
    run = RowDecoder.run

    def counted(self: RowDecoder, *args: Any) -> Any:
        ran = run(self, *args)
        seen.append(len(ran.steps))
        return ran

    monkeypatch.setattr(RowDecoder, "run", counted)
    monkeypatch.setattr(multi_step, "_SECONDS", 1e3)
    return seen


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has Python take each step, and its verifier decide."""
    monkeypatch.setattr(multi_step.MultiStep, "of", lambda *_: None)
    monkeypatch.setattr(NativeVerdicts, "of", lambda _, rows, *__: [None] * len(rows))


def generator_of(drafter: Any, family: str = "llama", **options: Any) -> SpeculativeGenerator:
    overrides = options.pop("overrides", {})
    model = tiny.make_model(family, **WIDE, **overrides)
    return SpeculativeGenerator(model, drafter=drafter, packed_weights="blocks", **options)


def traced(generator: SpeculativeGenerator, **arguments: Any) -> list[Step]:
    """Returns the steps of two texts, of which the second knows the first."""
    steps = list(generator.trace(tiny.ids(tiny.prompt(12)), max_new_tokens=LONG, **arguments))
    again = tiny.ids(tiny.prompt(9, seed=1))
    return steps + list(generator.trace(again, max_new_tokens=LONG, **arguments))


def streamed(stream: Iterator[tuple[int, list[int]]], text: list[int]) -> None:
    """Adds what comes to a text, until there is an error."""
    for _, tokens in stream:
        text += tokens


def assert_same_steps(mine: list[Step], theirs: list[Step]) -> None:
    assert [step.tokens for step in mine] == [step.tokens for step in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert one.path == other.path
        assert one.tree.token_list == other.tree.token_list
        assert one.tree.parent_list == other.tree.parent_list
        assert one.tree.draw_list == other.tree.draw_list
        assert one.tree.chance_list[1:] == other.tree.chance_list[1:]
        assert torch.equal(one.logits, other.logits)


def assert_same_tables(one: Any, other: Any) -> None:
    mine, theirs = one.state(), other.state()
    assert mine.facts == theirs.facts
    for name, table in mine.arrays.items():
        np.testing.assert_array_equal(table, theirs.arrays[name], err_msg=name)


SAMPLED: dict[str, Any] = {"do_sample": True, "seed": 3, "temperature": 0.7, "top_k": 20}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": SAMPLED | {"top_p": 0.9},
    "judged": SAMPLED | {"repetition_penalty": 1.1},
}


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each tree that C code handed back."""
    seen: list[int] = []
    judge = multi_step.MultiStep._judge

    def counted(self: Any, *args: Any) -> Any:
        seen.append(1)
        return judge(self, *args)

    monkeypatch.setattr(multi_step.MultiStep, "_judge", counted)
    return seen


@pytest.mark.parametrize("policy", [BestFirst, CoupledBestFirst])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nodes", [1, 5, 40])
@pytest.mark.parametrize("name", DRAFTERS)
def test_steps_and_tables_are_those_of_steps_one_by_one(
    name: str,
    nodes: int,
    way: str,
    policy: Any,
    lengths: list[int],
    judged: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, sampled = WAYS[way], way != "greedy"
    drafters = [DRAFTERS[name]() for _ in range(2)]
    policies = [policy(), policy()]
    texts, stats = [], []
    for drafter, own in zip(drafters, policies, strict=True):
        generator = generator_of(drafter, policy=own, node_budget=nodes, verifier="coupled")
        texts.append(traced(generator, **arguments))
        assert generator.stats is not None
        stats.append(generator.stats)
        if drafter is drafters[0]:
            assert max(lengths) > 8 // nodes
            lengths.clear()
            one_by_one(monkeypatch)
    assert not lengths
    assert_same_steps(*texts)
    assert_same_tables(*drafters)
    assert stats[0].rows[0].to_dict() == stats[1].rows[0].to_dict()
    assert stats[0].target_passes == stats[1].target_passes
    assert any(step.path for step in texts[0])
    assert (len(judged) > 10) == (way == "judged")
    if policy is CoupledBestFirst:
        np.testing.assert_array_equal(policies[0].weights, policies[1].weights)
        np.testing.assert_array_equal(policies[0].squares, policies[1].squares)
        assert sampled == (policies[0].squares != 1).any()


# what stays is certain nearly everywhere, nowhere (all chances together are the border), or where
# two tokens are not so alike that either may be half
CHOICES: dict[str, tuple[dict[str, Any], float, float]] = {
    "all": ({"top_k": 0}, 0, 0),
    "temperature": ({"top_k": 0, "temperature": 1.7}, 0, 0),
    "top_k": ({"top_k": 7}, 0, 0),
    "top_k_of_all": ({"top_k": 64, "temperature": 0.9}, 0, 0),
    "nucleus": ({"top_k": 50, "temperature": 0.7, "top_p": 0.9}, 0, 0.2),
    "one_token": ({"top_k": 20, "temperature": 0.1, "top_p": 0.05}, 0, 0.2),
    "border_at_all": ({"top_k": 20, "top_p": 0.0}, 1, 1),
    "border_at_some": ({"top_k": 2, "temperature": 1e5, "top_p": 0.5}, 0.05, 0.95),
    "large_top_k": ({"top_k": 65}, 1, 1),
    "no_top_k": ({"top_k": 0, "top_p": 0.8, "temperature": 0.8}, 0, 0.2),
    "min_p": ({"min_p": 0.05}, 1, 1),
    "scores_kept": ({"output_scores": True, "return_dict_in_generate": True}, 1, 1),
}


@pytest.mark.parametrize("drafter", [None, "hybrid"])
@pytest.mark.parametrize("name", CHOICES)
def test_c_code_draws_what_the_rule_draws(
    name: str,
    drafter: str | None,
    lengths: list[int],
    judged: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the trees of steps one by one; it hands over what it cannot be sure of."""
    own, least, most = CHOICES[name]
    texts = []
    for _ in range(2):
        generator = generator_of(drafter, node_budget=6)
        texts.append(
            [
                step
                for seed in (1, 2)
                for step in traced(generator, do_sample=True, seed=seed, **own)
            ]
        )
        one_by_one(monkeypatch)
    assert_same_steps(*texts)
    assert max(lengths) > 3
    assert least <= len(judged) / sum(lengths) <= most


class Ends(StoppingCriteria):
    """Ends a text of some length, or fails there."""

    def __init__(self, length: int, *, fails: bool = False) -> None:
        self.length, self.fails = length, fails

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        if self.fails and input_ids.shape[1] == self.length:
            raise RuntimeError("no criterion")
        return torch.tensor([input_ids.shape[1] >= self.length])


class OwnCoupled(Coupled):
    """A rule of somebody else's."""


class OwnTemperature(TemperatureLogitsWarper):
    """A processor of somebody else's."""


JUDGED: dict[str, dict[str, Any]] = {
    "rule_subclass": {"verifier": OwnCoupled()},
    "processor_subclass": {"logits_processor": [OwnTemperature(0.7)], "top_k": 0},
    "two_temperatures": {"logits_processor": [TemperatureLogitsWarper(0.7)], "temperature": 0.8},
    "top_k_first": {"logits_processor": [TopKLogitsWarper(9)], "temperature": 0.8, "top_k": 0},
    "not_minus_infinity": {"logits_processor": [TopKLogitsWarper(9, -1e4)], "top_k": 0},
    "nucleus_of_another_value": {"logits_processor": [TopPLogitsWarper(0.9, -1e4)], "top_k": 0},
    "criterion": {"stopping_criteria": [Ends(10_000)]},
    "huge_temperature": {"temperature": 1e39, "top_k": 0},
}


@pytest.mark.parametrize("name", JUDGED)
def test_the_rule_is_asked_where_c_code_may_not_choose(
    name: str, lengths: list[int], judged: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, texts = dict(JUDGED[name]), []
    verifier = own.pop("verifier", "coupled")
    for _ in range(2):
        generator = generator_of("trigram", node_budget=4, verifier=verifier)
        texts.append(traced(generator, do_sample=True, seed=4, **own))
        one_by_one(monkeypatch)
    assert_same_steps(*texts)
    assert max(lengths) > 3
    assert len(judged) == sum(lengths)


@pytest.mark.parametrize("seed", [-5, 2**63 + 11, 2**70 + 3])
def test_seeds_of_any_size_draw_the_same_in_c_code(
    seed: int, judged: list[int], lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for _ in range(2):
        texts.append(traced(generator_of("trigram", node_budget=4), do_sample=True, seed=seed))
        one_by_one(monkeypatch)
    assert_same_steps(*texts)
    assert max(lengths) > 3
    assert not judged


def test_a_processor_may_be_turned_between_tokens(lengths: list[int], judged: list[int]) -> None:
    """Whoever streams holds it; the next call of C code goes by what it says then."""
    texts: list[list[int]] = []
    for turned in (0.3, 3.0):
        warper = TemperatureLogitsWarper(0.3)
        stream = generator_of(None).stream(
            tiny.ids(tiny.prompt(8)),
            max_new_tokens=160,
            do_sample=True,
            seed=1,
            top_k=0,
            logits_processor=[warper],
        )
        texts.append([])
        for _, tokens in stream:
            texts[-1] += tokens
            warper.temperature = turned if len(texts[-1]) > 4 else 0.3
    assert texts[0][:5] == texts[1][:5]
    assert texts[0] != texts[1]
    assert max(lengths) > 3
    assert not judged


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("verifier", ["match", "rejection", "traversal"])
def test_other_rules_decide_as_they_do(
    verifier: str, sampled: bool, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for way in range(2):
        generator = generator_of("trigram", policy="best_first", node_budget=6, verifier=verifier)
        texts.append(traced(generator, do_sample=sampled, seed=5))
        assert bool(lengths) == (way == 0)
        lengths.clear()
        one_by_one(monkeypatch)
    assert_same_steps(*texts)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("drafter", [None, "auto", "token_recycling"])
def test_text_is_the_models_own(family: str, drafter: str | None, lengths: list[int]) -> None:
    generator = generator_of(drafter, family)
    for seed in range(3):
        prompt = tiny.ids(tiny.prompt(10, seed=seed))
        arguments: dict[str, Any] = {"max_new_tokens": LONG, "do_sample": False}
        expected = generator.model.generate(prompt, pad_token_id=0, **arguments)
        assert torch.equal(generator.generate(prompt, **arguments), expected)
    assert max(lengths) > 4


class Scores(LogitsProcessor):
    """Notes the texts it is asked about; refuses one of some length."""

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.asked: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.asked.append(input_ids[0].tolist())
        if input_ids.shape[1] > self.most:
            raise RuntimeError("no further")
        return scores + 0.0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["length", "eos", "criterion"])
@pytest.mark.parametrize("drafter", [None, "hybrid"])
def test_texts_end_where_they_must(
    drafter: str | None, what: str, way: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within an accepted path too; a further text finds the drafter as it should be."""
    written = (
        generator_of(None)
        .generate(tiny.ids(tiny.prompt(8)), max_new_tokens=50, **WAYS[way])[0, 8:]
        .tolist()
    )
    endings: dict[str, dict[str, Any]] = {
        "length": {"max_new_tokens": 33},
        "eos": {"max_new_tokens": 50, "eos_token_id": [written[31], written[20]]},
        "criterion": {"max_new_tokens": 50, "stopping_criteria": [Ends(8 + 29)]},
    }
    texts, reasons = [], []
    for native in (True, False):
        generator = generator_of(drafter, node_budget=7)
        for _ in range(3):
            steps = generator.trace(tiny.ids(tiny.prompt(8)), **WAYS[way], **endings[what])
            texts.append([(step.tokens, step.path, step.tree.token_list) for step in steps])
            assert generator.stats is not None
            row = generator.stats.rows[0]
            reasons.append((row.finish_reason, row.num_generated, row.num_accepted))
        assert generator.drafter is None or generator.drafter._laws == {}  # type: ignore[attr-defined]
        assert (max(lengths, default=0) > 3) == native
        lengths.clear()
        one_by_one(monkeypatch)
    assert texts[:3] == texts[3:]
    assert reasons[:3] == reasons[3:]
    assert sum(len(tokens) for tokens, *_ in texts[0]) < 50


def test_processors_are_asked_as_in_steps_one_by_one(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores and logits come as well; texts that no one accepted are asked about by none."""
    outputs, asked = [], []
    for _ in range(2):
        generator, noting = generator_of("trigram", node_budget=6), Scores()
        for _ in range(2):
            outputs.append(
                generator.generate(
                    tiny.ids(tiny.prompt(8)),
                    max_new_tokens=40,
                    do_sample=False,
                    logits_processor=[noting],
                    return_dict_in_generate=True,
                    output_scores=True,
                    output_logits=True,
                )
            )
        asked.append(noting.asked)
        one_by_one(monkeypatch)
    assert max(lengths) > 3
    assert asked[0] == asked[1]
    text = outputs[0].sequences[0].tolist()
    assert all(own == text[: len(own)] for own in asked[0])
    for mine, theirs in zip(outputs[:2], outputs[2:], strict=True):
        assert torch.equal(mine.sequences, theirs.sequences)
        assert torch.equal(torch.stack(mine.scores), torch.stack(theirs.scores))
        assert torch.equal(torch.stack(mine.logits), torch.stack(theirs.logits))


@pytest.mark.parametrize("what", ["processor", "criterion"])
def test_what_became_text_before_an_error_is_delivered(
    what: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[list[int]] = []
    for _ in range(2):
        arguments: dict[str, Any] = {"logits_processor": [Scores(most=8 + 23)]}
        if what == "criterion":
            arguments = {"stopping_criteria": [Ends(8 + 23, fails=True)]}
        generator = generator_of("trigram", node_budget=6)
        prompt, greedy = tiny.ids(tiny.prompt(8)), {"max_new_tokens": 40, "do_sample": False}
        text: list[int] = []
        with pytest.raises(RuntimeError, match="no "):
            streamed(generator.stream(prompt, **greedy, **arguments), text)
        assert generator.stats is not None
        assert generator.stats.rows[0].num_generated == len(text)
        texts.append(text)
        again = generator.generate(prompt, **greedy)
        assert again[0, 8 : 8 + len(text)].tolist() == text
        one_by_one(monkeypatch)
    assert max(lengths) > 3
    assert texts[0] == texts[1]
    assert len(texts[0]) in (23, 24)


@pytest.mark.parametrize("way", WAYS)
def test_numbers_that_are_none_are_told_of_by_the_step_they_come_in(
    way: str, lengths: list[int]
) -> None:
    prompt, arguments = tiny.ids(tiny.prompt(8)), {"max_new_tokens": 50, **WAYS[way]}
    plain = generator_of(None)
    written = plain.generate(prompt, **arguments)[0, 8:].tolist()
    place = next(i for i in range(25, 50) if written[i] not in written[:i] + tiny.prompt(8))
    model = tiny.make_model("llama", **WIDE)
    with torch.no_grad():
        model.model.embed_tokens.weight[written[place]] = torch.nan
    lengths.clear()
    generator = SpeculativeGenerator(model, drafter=None, packed_weights="blocks")
    text: list[int] = []
    with pytest.raises(LogitsError, match=f"position {8 + place + 1} are NaN"):
        streamed(generator.stream(prompt, **arguments), text)
    assert max(lengths) > 3
    assert text == written[: place + 1]


def test_guesses_that_are_no_tokens_are_told_of(lengths: list[int]) -> None:
    """By the step that C code leaves out."""
    drafter = TokenRecycling()
    generator = generator_of(drafter, node_budget=4)
    steps = generator.trace(tiny.ids(tiny.prompt(8)), max_new_tokens=200, do_sample=False)
    for _ in range(6):
        next(steps)
    drafter._successors[:, 0] = tiny.VOCAB
    with pytest.raises(ConfigError, match="guessed token"):
        list(steps)
    assert lengths[0] > 3
    assert lengths[-1] == 0


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that interrupt")
def test_nothing_comes_behind_a_step_that_an_interrupt_cuts_short(
    lengths: list[int], judged: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the steps between two that are handed back, or within them, at any token."""
    own = {"do_sample": True, "seed": 2, "max_new_tokens": 60, **CHOICES["border_at_some"][0]}
    prompt, append = tiny.ids(tiny.prompt(8)), Row._append
    written = generator_of(None).generate(prompt, **own)[0, 8:].tolist()
    for place in range(6, 50):
        left = [place]

        def interrupted(self: Row, *args: Any, left: list[int] = left) -> None:
            if [len(self.generated)] == left:
                left.clear()  # it comes once
                raise KeyboardInterrupt
            append(self, *args)

        text: list[int] = []
        generator = generator_of("hybrid", node_budget=6)
        with monkeypatch.context() as patch:
            patch.setattr(Row, "_append", interrupted)
            with pytest.raises(KeyboardInterrupt):
                streamed(generator.stream(prompt, **own), text)
        assert len(text) >= place  # what C code had chosen may come still
        assert text == written[: len(text)]
        assert generator.generate(prompt, **own)[0, 8:].tolist() == written
    assert max(lengths) > 3
    assert 0 < len(judged) < sum(lengths)


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_within_a_pass_ends_the_call(way: str, lengths: list[int]) -> None:
    """It is raised wherever it comes, and what was text by then has come."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        generator = generator_of("trigram", node_budget=2)
        text: list[int] = []
        stream = generator.stream(tiny.ids(tiny.prompt(8)), max_new_tokens=100_000, **WAYS[way])
        next(stream)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            streamed(stream, text)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert generator.stats is not None
    assert generator.stats.rows[0].num_generated > len(text) > 32
    again = generator.generate(tiny.ids(tiny.prompt(8)), max_new_tokens=30, **WAYS[way])
    assert again[0, 9:].tolist() == text[:29]
    assert max(lengths) > 3


class BadPath(Match):
    """A rule of somebody else's that is wrong."""

    def verify(self, *args: Any) -> Verdict:
        path, token = super().verify(*args)
        return Verdict([*path[:-1], -1], token) if path else Verdict(path, token)


def test_paths_of_rules_are_looked_at() -> None:
    generator = generator_of("trigram", policy="best_first", verifier=BadPath(), node_budget=4)
    with pytest.raises((ValueError, IndexError, ConfigError)):
        traced(generator, do_sample=False)


@pytest.mark.parametrize("way", ["greedy", "sampled"])
def test_a_conversation_goes_on_with_its_cache(
    way: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for _ in range(2):
        generator = generator_of("hybrid", node_budget=6)
        first = generator.generate(
            tiny.ids(tiny.prompt(8)),
            max_new_tokens=30,
            **WAYS[way],
            return_dict_in_generate=True,
        )
        longer = torch.cat([first.sequences, tiny.ids(tiny.prompt(5, seed=3))], dim=1)
        texts.append(
            generator.generate(
                longer,
                past_key_values=first.past_key_values,
                max_new_tokens=30,
                **WAYS[way],
            )
        )
        one_by_one(monkeypatch)
    assert max(lengths) > 3
    assert torch.equal(*texts)
    assert torch.equal(texts[0], generator.generate(longer, max_new_tokens=30, **WAYS[way]))


@pytest.mark.parametrize("drafter", [None, "hybrid"])
def test_caches_grow_between_calls_of_c_code(
    drafter: str | None, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that is full ends the steps; an ordinary one makes room, at another place."""
    monkeypatch.setattr("specdec.session._INITIAL_ROOM", 4)
    generator = generator_of(drafter, node_budget=6)
    prompt = tiny.ids(tiny.prompt(8))
    expected = generator.model.generate(prompt, max_new_tokens=120, do_sample=False, pad_token_id=0)
    assert torch.equal(generator.generate(prompt, max_new_tokens=120, do_sample=False), expected)
    assert lengths.count(0) > 2
    assert max(lengths) > 3


def test_slow_processors_make_calls_short(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens stream at the end of a call, which counts what others take in it."""

    class Slow(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            time.sleep(0.02 if input_ids.shape[1] > quick else 0)
            return scores

    monkeypatch.setattr(multi_step, "_SECONDS", 0.1)
    for quick in (0, 8 + 20):  # from the beginning, and when it is no longer foreseen
        lengths.clear()
        generator_of(None).generate(
            tiny.ids(tiny.prompt(8)), max_new_tokens=50, do_sample=False, logits_processor=[Slow()]
        )
        assert max(lengths, default=0) < quick + 6
        assert max(lengths[-3:], default=0) < 6


class Subclass(BestFirst):
    """A policy of somebody else's, of which nothing is known."""


class SubclassOfTrigram(Trigram):
    """A drafter of somebody else's."""


ELSEWHERE: dict[str, Callable[[], dict[str, Any]]] = {
    "policy_subclass": lambda: {"policy": Subclass()},
    "policy_static": lambda: {"policy": "static"},
    "prompt_lookup": lambda: {"drafter": PromptLookup()},
    "one_source": lambda: {"drafter": Hybrid([Suffix(), PromptLookup()])},
    "mixture_of_mixtures": lambda: {
        "drafter": Hybrid([Hybrid([Suffix(), Trigram()]), TokenRecycling()])
    },
    "early_exit": lambda: {"drafter": EarlyExit(1)},
    "drafter_subclass": lambda: {"drafter": SubclassOfTrigram()},
    "always_wrong": lambda: {"drafter": AlwaysWrong()},
    "large_trees": lambda: {"node_budget": 200},
    "tree_attention": lambda: {"tree_attention": "torch"},
    "window": lambda: {"family": "mistral"},
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_not_in_c_goes_step_by_step(name: str, lengths: list[int]) -> None:
    generator = generator_of(**{"drafter": "trigram", "node_budget": 6} | ELSEWHERE[name]())
    arguments: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    prompt = tiny.ids(tiny.prompt(8))
    expected = generator.model.generate(prompt, pad_token_id=0, **arguments)
    assert torch.equal(generator.generate(prompt, **arguments), expected)
    assert not lengths


def test_models_that_are_looked_at_and_batches_go_step_by_step(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_step, "MOST_STEPS", 2)
    generator = generator_of("trigram", node_budget=6)
    arguments: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    generator.generate(tiny.ids(tiny.prompt(8), tiny.prompt(8, seed=1)), **arguments)
    assert not lengths
    steps = generator.stream(tiny.ids(tiny.prompt(8)), **arguments)
    for _ in range(4):
        next(steps)
    before, calls = len(lengths), []
    assert before
    with generator.model.model.norm.register_forward_hook(lambda *_: calls.append(1)):
        next(steps)
    assert len(lengths) == before
    assert calls
    steps.close()


def test_slow_passes_are_asked_for_one_by_one(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_step, "_SECONDS", 1e-9)
    generator_of("trigram").generate(tiny.ids(tiny.prompt(8)), max_new_tokens=20, do_sample=False)
    assert not lengths


def test_structures_are_those_of_the_c_code() -> None:
    assert serves()
    structures = (
        *(step_structs.TargetStruct, step_structs.DrafterStruct, step_structs.AllowanceStruct),
        *(step_structs.TextStruct, step_structs.DoneStruct, step_structs.RecordStruct),
        *(step_structs.GoingStruct, step_structs.ChoosingStruct),
    )
    numbers = [step_structs.MOST_NODES, step_structs.MOST_ENDS, MOST_K, MOST_LEFT]
    assert structure_sizes() == [*map(ctypes.sizeof, structures), *numbers]


# ---- automatic budgets ----

COST = PassCost(rows=(1, 9, 65), contexts=(64,), seconds=((1.0, 1.4, 3.0),))


def budget_of() -> AutoBudget:
    budget = AutoBudget(COST)
    for _ in range(30):  # known well enough that a draft pays
        budget.learned(4, 0.01)
    return budget


class Both:
    """Two budgets: one of which steps in C code are told of, and one that is asked as for each."""

    setting, max_nodes = "auto", 32

    def __init__(self) -> None:
        self.one, self.other = budget_of(), budget_of()
        self.drafted = self.plain = 0

    def ahead(self, row: int, context: float, *, drafts: bool) -> Any:
        return self.one.ahead(row, context, drafts=drafts)

    def went(self, ahead: Any, row: int, done: Any, context: float) -> None:
        self.one.went(ahead, row, done, context)
        scored = done.scored
        tree = DraftTree.from_lists(scored.tokens, scored.parents, chances=scored.chances)
        outcome = StepOutcome(row, tree, done.path, done.emitted, scored.logits)
        other = self.other
        (own,) = other.allot([0], context)
        assert own == ahead.budget
        if own.nodes == 0:
            self.plain += 1
            assert not other.learns()
        else:
            self.drafted += tree.num_drafted
            if max(done.levels, 0) == max(tree.depth_list):
                # what was cut off is not known, but is not missed either
                assert other.cut([0], [tree], context, done.drafting)[0] is tree
            else:
                other._clock.drafted(done.levels, done.drafting)
                plain = ahead.seconds[0]
                other._weighed(ahead.seconds, done.width, done.expected, plain, grown=True)
            other.observe(outcome)
            other.learned(len(tree), done.learning)
        other.scored(len(tree), context, done.scoring)

    def __getattr__(self, name: str) -> Any:
        def both(*args: Any) -> Any:
            mine, theirs = (getattr(own, name)(*args) for own in (self.one, self.other))
            if name == "cut":
                assert [t.token_list for t in mine] == [t.token_list for t in theirs]
            else:
                assert mine == theirs
            return mine

        return both


@pytest.mark.parametrize("quiet", [False, True], ids=["learning", "quiet"])
def test_cuts_and_what_a_budget_learns_are_those_of_steps_one_by_one(
    quiet: bool, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of C code for one step at a time, with the times that it took."""
    if quiet:  # learning is dear: no step of a pause is worth it
        monkeypatch.setattr(DraftClock, "learned", lambda *_, **__: None)
        monkeypatch.setattr(DraftClock, "drafted", lambda *_: None)
    monkeypatch.setattr(multi_step, "_FEWEST", 1)
    monkeypatch.setattr(multi_step, "MOST_STEPS", 1)
    generator, both = generator_of("trigram"), Both()
    if quiet:
        for own in (both.one, both.other):
            own._clock.draft_seconds, own._clock.plain_learn_seconds = 0.5, 1.0
    generator._parts._costed = both  # type: ignore[assignment]
    for seed in range(16):
        generator.generate(
            tiny.ids(tiny.prompt(12, seed=seed)), max_new_tokens=LONG, do_sample=False
        )
        one, other = both.one, both.other
        assert one._chances.shares_of(0) == other._chances.shares_of(0)
        assert one._passes.of([1, 4], 30) == other._passes.of([1, 4], 30)
        assert one._clock.draft_seconds == other._clock.draft_seconds
        assert one._levels.reach() == other._levels.reach()
        assert vars(one._pauses) == pytest.approx(vars(other._pauses))
    assert (both.plain if quiet else both.drafted) > 4
    assert len(lengths) > 50


@pytest.mark.parametrize("seed", range(4))
def test_c_code_cuts_where_a_budget_does(seed: int, lengths: list[int]) -> None:
    """A row's allowance over a tree that was grown whole: the width of `AutoBudget.cut`."""
    rng = np.random.default_rng(seed)
    generator = generator_of("hybrid", node_budget=20)
    whole: list[tuple[Any, Any]] = []
    run = RowDecoder.run

    def twice(self: RowDecoder, text: Any, start: int, allowance: Any, drafter: Any, *rest: Any):
        """Cuts by random seconds and shares, and notes both, and what the tree was."""
        count = allowance.plan.nodes + 1
        seconds = (ctypes.c_double * count)(*np.sort(rng.uniform(1, 1 + 0.3 * count, count)))
        edges = (ctypes.c_double * 3)(0.05, 0.2, 0.5)
        shares = (ctypes.c_double * 4)(*np.sort(rng.uniform(0, 0.9, 4)))
        allowance.seconds, allowance.most = ctypes.addressof(seconds), count - 1
        allowance.edges, allowance.shares = ctypes.addressof(edges), ctypes.addressof(shares)
        allowance.num_edges, allowance.drafting, allowance.gain = 3, 0.1, 1e9
        allowance.least = count - 1  # all are scored, so that all are known
        ran = run(self, text, start, allowance, drafter, *rest)
        for done in ran.steps:
            whole.append((done, (list(seconds), list(edges), list(shares))))
        return ran

    RowDecoder.run = twice  # type: ignore[method-assign]
    try:
        list(generator.trace(tiny.ids(tiny.prompt(12)), max_new_tokens=LONG, do_sample=False))
    finally:
        RowDecoder.run = run  # type: ignore[method-assign]
    widths = set()
    for done, (seconds, edges, shares) in whole:
        scored = done.scored
        tree = DraftTree.from_lists(scored.tokens, scored.parents, chances=scored.chances)
        paths = tree.path_chances
        gains = [shares[int(np.searchsorted(edges, chance))] for chance in paths[1:]]
        emitted = np.concatenate([[1.0], 1.0 + np.cumsum(gains)])
        rates = emitted / (0.1 + np.array(seconds[: len(emitted)]))
        assert int(rates.argmax()) == done.width
        assert done.expected == pytest.approx(emitted[done.width])
        widths.add(done.width)
    assert len(widths) > 1


def test_steps_end_when_drafts_lose(lengths: list[int]) -> None:
    """The running mean of what they save falls below zero: the budget is asked again."""
    dear = PassCost(rows=(1, 65), contexts=(64,), seconds=((1.0, 65.0),))
    generator = generator_of("trigram")
    budget = AutoBudget(dear)
    generator._parts._costed = budget
    generator.generate(tiny.ids(tiny.prompt(12)), max_new_tokens=LONG, do_sample=False)
    assert budget._pauses.gain < 0
    assert lengths[0] == 1


def test_a_pause_is_quiet_until_there_is_something_to_learn() -> None:
    pauses = Pauses()
    assert pauses.quiet(0.01, 1.0) == 0
    while not pauses.paused or pauses._pause < 64:
        if pauses.paused:
            pauses.skip()
        else:
            pauses.drafted(gain=-1.0, loss=1.0, plain=1.0)
    for learning in (0.0, 0.01, 0.02, 0.1):
        ahead = pauses.quiet(learning, 1.0)
        assert 0 <= ahead <= pauses._owed
        for _ in range(ahead):
            assert pauses.paused
            pauses.skip()
            assert not pauses.learns(learning, 1.0)
        if pauses.paused:
            pauses.skip()
            assert pauses.learns(learning, 1.0)
    assert Pauses().quiet(0.1, 0.0) == 0


@pytest.mark.parametrize("make", [Trigram, AlwaysWrong, PromptLookup])
def test_steps_of_a_pause_are_plain(
    make: Any, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where drafts lose: long pauses, run in C code for any drafter, with one try between them."""
    generator = generator_of(make())
    dear = PassCost(rows=(1, 65), contexts=(64,), seconds=((1.0, 65.0),))
    generator._parts._costed = budget = AutoBudget(dear)
    budget._clock.plain_learn_seconds = 1.0
    monkeypatch.setattr(budget._clock, "learned", lambda *_, **__: None)
    allowed: list[int] = []
    ahead = budget.ahead

    def noted(*args: Any, **kwargs: Any) -> Any:
        own = ahead(*args, **kwargs)
        if own is not None and own.steps != 0:
            allowed.append(own.steps or 1000)
        return own

    monkeypatch.setattr(budget, "ahead", noted)
    steps = list(generator.trace(tiny.ids(tiny.prompt(12)), max_new_tokens=400, do_sample=False))
    assert sum(len(step.tokens) for step in steps) == 400
    assert max(lengths) > 30
    assert all(own <= most for own, most in zip(lengths, allowed, strict=True))
    assert min(allowed) == 1 or make is not Trigram  # tries are Python's where laws are
    assert 0 < sum(step.tree.num_drafted for step in steps) < 40
