"""The likeliest tokens behind a step's nodes: one selection, and what is read from it."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList

from specdec import top_tokens as module
from specdec.drafters.scored_nodes import ScoredNodes
from specdec.errors import LogitsError
from specdec.kernels.top_k_rows import takes_first
from specdec.sampling import Prefix, ProcessedLaw
from specdec.top_tokens import top_tokens
from specdec.trees.tree import DraftTree
from specdec.types import StepOutcome, TopTokens

CHAIN = DraftTree.from_lists([4, 5, 6], [-1, 0, 1])


def test_a_prefix_is_what_was_committed_however_late_it_is_asked_for() -> None:
    """Paths that were looked at and rejected leave nothing behind; the buffer grows meanwhile."""
    prefix, text = Prefix([1, 2, 4], torch.device("cpu")), [1, 2, 4]
    for count, path in ((1, [9, 8]), (70, []), (2, [7] * 200), (0, [6]), (300, [5])):
        tokens = list(range(count))
        prefix.extend(tokens)
        text += tokens
        assert prefix.length == len(text)
        assert prefix.followed_by(path).tolist() == [text + path]
        prefix.extend([3])
        text += [3]
        assert prefix.ids().tolist() == [text]
        assert prefix.followed_by(()).tolist() == [text]


def law(logits: torch.Tensor, top: TopTokens | None) -> ProcessedLaw:
    prefix = Prefix([1, 2, 4], logits.device)
    return ProcessedLaw(
        CHAIN,
        logits,
        prefix,
        LogitsProcessorList(),
        greedy=True,
        root_position=2,
        choices=None if top is None else top.choices,
    )


@pytest.mark.parametrize("most_copied", [0, 1 << 20], ids=["each by itself", "all in one"])
def test_every_tree_gets_its_own(monkeypatch: pytest.MonkeyPatch, most_copied: int) -> None:
    monkeypatch.setattr(module, "_MOST_COPIED", most_copied)
    generator = torch.Generator().manual_seed(0)
    trees = [torch.randn(nodes, 200, generator=generator) for nodes in (3, 1, 7)]
    for logits, top in zip(trees, top_tokens(trees, 5), strict=True):
        assert torch.equal(top.logits, logits.topk(5).values)
        assert torch.equal(logits.gather(1, top.ids), top.logits)


def test_an_argmax_takes_the_first_of_equals_with_them_and_without() -> None:
    logits = torch.zeros(3, 200)
    logits[1, [9, 150]] = 2.0
    logits[2, 199] = 1.0
    (top,) = top_tokens([logits], 4)
    for own in (None, top):
        assert [law(logits, own).argmax(node) for node in range(3)] == [0, 9, 199]
    wrong = TopTokens(torch.full((3, 1), 7), torch.zeros(3, 1), [(7, 0.0)] * 3)
    assert law(logits, wrong).argmax(1) == 7  # it is read, not computed again


def test_what_may_take_another_of_equals_is_no_argmax() -> None:
    logits = torch.zeros(3, 200, dtype=torch.bfloat16)
    assert not takes_first(logits, 4)
    (top,) = top_tokens([logits], 4)
    assert top.choices is None
    assert law(logits, top).argmax(1) == 0


@pytest.mark.parametrize(("value", "message"), [(torch.nan, "NaN"), (-torch.inf, "minus inf")])
def test_no_token_to_choose_is_an_error(value: float, message: str) -> None:
    logits = torch.zeros(3, 200)
    logits[1] = value
    for top in (None, top_tokens([logits], 4)[0]):
        assert law(logits, top).argmax(0) == 0
        with pytest.raises(LogitsError, match=message):
            law(logits, top).argmax(1)


def test_one_nan_among_numbers_is_an_error() -> None:
    logits = torch.zeros(3, 200)
    logits[1, 77] = torch.nan
    (top,) = top_tokens([logits], 4)
    with pytest.raises(LogitsError, match="NaN"):
        law(logits, top).argmax(1)


@pytest.mark.parametrize("kept", [None, 2, 3, 5])
def test_a_drafter_selects_what_it_was_not_given(kept: int | None) -> None:
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(4))
    top = None if kept is None else top_tokens([logits], kept)[0]
    scored = ScoredNodes.of([StepOutcome(0, CHAIN, [], [5], logits, top=top)], 3)
    assert torch.equal(scored.logits, logits.topk(3).values)
    assert torch.equal(scored.ids, logits.topk(3).indices)
