"""What "auto" chooses for a drafter and a call."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from specdec import SpeculativeGenerator
from specdec.auto import PartsForCalls
from specdec.call import Call
from specdec.cost import PassCost
from specdec.drafters import TokenRecycling
from specdec.errors import ConfigError
from specdec.trees import Chain, DySpecLayered, Iid
from specdec.types import Draw


class Honest(TokenRecycling):
    honest = True


class Foreign(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


def call(*, greedy: bool = False, foreign: bool = False) -> Call:
    return Call(
        input_ids=torch.zeros(1, 1, dtype=torch.int64),
        attention_mask=None,
        mask_length=0,
        processors=LogitsProcessorList([Foreign()] if foreign else []),
        criteria=[],
        config=GenerationConfig(do_sample=not greedy),
        past=None,
        fill_past=False,
    )


def names(drafter, policy="auto", verifier="auto", *, seeded=False, **kind) -> tuple[str, str]:
    parts = PartsForCalls(drafter, policy, verifier, 8).for_call(call(**kind), seeded=seeded)
    return parts.policy.name, parts.verifier.name


@pytest.mark.parametrize(
    ("drafter", "kind"),
    [
        (Honest(), {}),
        (Honest(), {"seeded": True}),
        (Honest(), {"greedy": True}),
        (TokenRecycling(), {"foreign": True}),
        (None, {}),
    ],
)
def test_both_automatic(drafter, kind) -> None:
    assert names(drafter, **kind) == ("coupled_best_first", "coupled")


def test_the_default_follows_the_costs_whatever_drafts() -> None:
    """Drawn nodes must not be cut by what they hold, so their trees could not."""
    cost = PassCost((1, 8), (64,), ((1.0, 1.1),))
    parts = PartsForCalls(Honest(), "auto", "auto", "auto", cost=cost)
    assert parts.for_call(call(), seeded=False).budget.setting == "auto"
    parts = PartsForCalls(Honest(), "sequoia", "traversal", "auto", cost=cost)
    assert parts.for_call(call(), seeded=False).budget.setting != "auto"


@pytest.mark.parametrize(
    ("policy", "seeded", "expected"),
    [
        (Chain(), False, "coupled"),
        (Chain(Draw.COUPLED), False, "coupled"),
        (DySpecLayered(), False, "traversal"),
        (DySpecLayered(), True, "coupled"),
        (Iid(), False, "traversal"),
    ],
)
def test_the_verifier_fits_the_policy(policy, seeded, expected) -> None:
    assert names(TokenRecycling(), policy, seeded=seeded)[1] == expected


@pytest.mark.parametrize(
    ("verifier", "drafter", "expected"),
    [
        ("coupled", Honest(), "coupled_best_first"),
        ("match", Honest(), "best_first"),
        ("rejection", Honest(), "sequoia"),
        ("rejection", TokenRecycling(), "best_first"),
        ("block", Honest(), "chain"),
        ("spectr", Honest(), "iid"),
    ],
)
def test_the_policy_fits_the_verifier(verifier, drafter, expected) -> None:
    assert names(drafter, verifier=verifier) == (expected, verifier)


def test_a_policy_that_learns_serves_every_call() -> None:
    parts = PartsForCalls(TokenRecycling(), "auto", "auto", 8)
    first = parts.for_call(call(), seeded=False)
    assert parts.for_call(call(greedy=True), seeded=True).policy is first.policy


def test_an_explicit_rule_that_looks_aside_is_obeyed_with_a_warning(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert names(Honest(), verifier="traversal", foreign=True)[1] == "traversal"
    assert "keeps state" in caplog.text


class TestClassesOfYours:
    """A part that is named by its path."""

    def test_serves_like_an_object(self) -> None:
        model = tiny.make_model("llama")
        arguments = {"do_sample": False, "max_new_tokens": 12}
        prompt = tiny.ids(tiny.prompt(9))
        generator = SpeculativeGenerator(
            model,
            drafter="specdec.testing.wrong.AlwaysWrong",
            policy="specdec.trees.BestFirst",
            verifier="specdec.verifiers.Match",
            node_budget=4,
        )
        expected = model.generate(prompt, **arguments)
        assert torch.equal(generator.generate(prompt, **arguments), expected)
        assert generator.stats.totals.num_drafted > 0
        assert generator.stats.totals.num_accepted == 0

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("nowhere.Drafter", r"drafter 'nowhere.Drafter' cannot be imported \(No module"),
            ("specdec.drafters.Nothing", "expected package.module.Class"),
            (".relative", "cannot be imported"),
            ("pathlib.Path", "an object with the members of specdec.types.Drafter, got PosixPath"),
        ],
    )
    def test_what_is_none_is_refused(self, path: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            SpeculativeGenerator(tiny.make_model("llama"), drafter=path)
