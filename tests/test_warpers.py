"""The cheaper truncations keep the very tokens that transformers' keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.kernels.truncated_row import truncated_row
from specdec.row_copies import row_copies
from specdec.sampling import warp_logits
from specdec.warpers import (
    JoinedLogitsWarper,
    NativeTopKLogitsWarper,
    SortedTopPLogitsWarper,
    _ascending,
    cheaper,
    joined,
)

IDS = torch.zeros(1, 1, dtype=torch.int64)


def logits(kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = 3.0 * torch.randn(1 + seed % 3, 700, generator=generator)
    if kind == "with ties":
        made = made.round()
    elif kind == "truncated":
        made[:, torch.randperm(700, generator=generator)[:600]] = -torch.inf
    elif kind == "NaN":
        made[:, 5] = torch.nan
    elif kind == "infinite":
        made[:, 5] = torch.inf
    elif kind == "one of them":
        made[:, 7] = 200.0
    elif kind == "all equal":
        made[:] = 1.5
    elif kind == "zeros of both signs":
        made = torch.where(made > 0, 0.0, -0.0)
    return made


KINDS = [
    "plain",
    "with ties",
    "truncated",
    "NaN",
    "infinite",
    "one of them",
    "all equal",
    "zeros of both signs",
]


def assert_same_bits(theirs: LogitsProcessor, ours: LogitsProcessor, kind: str) -> None:
    for seed in range(6):
        scores = logits(kind, seed)
        before = scores.clone()
        expected, got = theirs(IDS, scores), ours(IDS, scores)
        assert torch.equal(expected.view(torch.int32), got.view(torch.int32))
        assert torch.equal(scores.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 3, 50, 64, 65, 700, 900])
def test_it_is_transformers_top_k_bit_for_bit(kind: str, top_k: int) -> None:
    for kept in (1, 5):
        theirs = TopKLogitsWarper(top_k, filter_value=-1e4, min_tokens_to_keep=kept)
        ours = cheaper(theirs)
        assert type(ours) is NativeTopKLogitsWarper
        assert_same_bits(theirs, ours, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("kept", [1, 3, 700, 900])
def test_it_is_transformers_nucleus_bit_for_bit(kind: str, top_p: float, kept: int) -> None:
    theirs = TopPLogitsWarper(top_p, filter_value=-1e4, min_tokens_to_keep=kept)
    ours = cheaper(theirs)
    assert type(ours) is SortedTopPLogitsWarper
    assert_same_bits(theirs, ours, kind)


@pytest.mark.parametrize("vocab_size", [49152, 262144])
def test_it_is_theirs_over_a_vocabulary(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 4.0 * torch.randn(4, vocab_size, generator=generator)
    for top_p in (0.3, 0.9, 0.999):
        theirs = TopPLogitsWarper(top_p)
        assert torch.equal(theirs(IDS, scores), cheaper(theirs)(IDS, scores))
    theirs = TopKLogitsWarper(50)
    few = theirs(IDS, scores)
    assert torch.equal(few, cheaper(theirs)(IDS, scores))
    few[0] = scores[0]
    for rows in (few, few[1:], few[3:]):
        for top_p in (0.3, 0.9, 0.999, 1.0):
            theirs = TopPLogitsWarper(top_p)
            assert torch.equal(theirs(IDS, rows), cheaper(theirs)(IDS, rows))


@pytest.mark.parametrize("width", [700, 1031, 49152])
def test_sums_without_what_cannot_be_are_the_same_bits(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    for count in (*range(1, 140), width // 3):
        scores = torch.full((1, width), -torch.inf)
        scores[0, torch.randperm(width, generator=generator)[:count]] = 5.0 * torch.randn(
            count, generator=generator
        )
        short = torch.from_numpy(_ascending(scores.numpy()))
        assert count + 64 <= short.shape[1] < count + 128
        whole = scores.sort(dim=-1).values
        expected = whole.softmax(dim=-1).cumsum(dim=-1)
        assert torch.equal(short.softmax(dim=-1).cumsum(dim=-1), expected[:, -short.shape[1] :])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [None, 0.3, 0.7, 3.0, 1e-30, 1e30])
@pytest.mark.parametrize("top_k", [1, 5, 50, 64, 65, 900])
@pytest.mark.parametrize("top_p", [None, 0.0, 0.5, 0.9, 1.0])
def test_together_they_give_the_bits_of_one_after_the_other(
    kind: str, temperature: float | None, top_k: int, top_p: float | None
) -> None:
    theirs: list[LogitsProcessor] = [TopKLogitsWarper(top_k)]
    if temperature is not None:
        theirs.insert(0, TemperatureLogitsWarper(temperature))
    if top_p is not None:
        theirs.append(TopPLogitsWarper(top_p, min_tokens_to_keep=2))
    (ours,) = joined([cheaper(part) for part in theirs])
    assert type(ours) is JoinedLogitsWarper
    for seed in range(3):
        for scores in logits(kind, seed).split(1):
            before, expected = scores.clone(), scores
            for part in theirs:
                expected = part(IDS, expected)
            assert torch.equal(expected.view(torch.int32), ours(IDS, scores).view(torch.int32))
            assert torch.equal(scores.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("vocab_size", [49152, 262144])
def test_what_division_makes_equal_stays_together(vocab_size: int) -> None:
    """Below 1 floats lie twice as close as above it, where division by .7 carries these."""
    joins = 0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        scores = 0.9 + 2e-6 * torch.randn(vocab_size, generator=generator)
        left = truncated_row(scores, 50, 0.7)
        assert left is not None
        divided = scores / 0.7
        kept = torch.nonzero(divided >= divided.topk(50).values[-1])[:, 0]
        assert left.ids.tolist() == kept.tolist()
        assert left.values.tolist() == divided[kept].tolist()
        assert np.isneginf(left.scores).all()
        joins += int(scores[kept].min() < scores.topk(50).values[-1])
    assert joins > 1


def test_what_stands_between_them_keeps_them_apart() -> None:
    kinds = [
        [TemperatureLogitsWarper(0.5), MinPLogitsWarper(0.1), TopKLogitsWarper(5)],
        [TopPLogitsWarper(0.5), TopKLogitsWarper(5), TopPLogitsWarper(0.5), TopPLogitsWarper(0.4)],
        [TopKLogitsWarper(5, filter_value=-1e4), TopPLogitsWarper(0.5)],
        [TopKLogitsWarper(5), TopPLogitsWarper(0.5, filter_value=-1e4)],
        [TemperatureLogitsWarper(0.5), TopPLogitsWarper(0.5)],
    ]
    names = [[type(part).__name__ for part in joined(list(map(cheaper, own)))] for own in kinds]
    temperature, nucleus = "TemperatureLogitsWarper", "SortedTopPLogitsWarper"
    together, top_k = "JoinedLogitsWarper", "NativeTopKLogitsWarper"
    assert names == [
        [temperature, "MinPLogitsWarper", together],
        [nucleus, together, nucleus],
        [top_k, nucleus],
        [together, nucleus],
        [temperature, nucleus],
    ]


class OneMore(SortedTopPLogitsWarper):
    """MUTANT: equal logits at the border all stay."""

    def __call__(self, input_ids, scores):
        ordered = scores.sort(dim=-1).values
        fallen = (ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p).sum(-1, keepdim=True)
        fallen = fallen.clamp(max=scores.shape[-1] - self.min_tokens_to_keep)
        return scores.masked_fill(scores < ordered.gather(-1, fallen), self.filter_value)


def test_equal_logits_at_the_border_fall_as_theirs_do() -> None:
    scores = logits("all equal", 0)
    theirs = TopPLogitsWarper(0.5)(IDS, scores)
    assert torch.equal(theirs, SortedTopPLogitsWarper(0.5)(IDS, scores))
    assert not torch.equal(theirs, OneMore(0.5)(IDS, scores))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_go_the_way_of_transformers(dtype: torch.dtype) -> None:
    scores = logits("plain", 1).to(dtype)
    for theirs in (TopPLogitsWarper(0.8), TopKLogitsWarper(9)):
        assert torch.equal(theirs(IDS, scores), cheaper(theirs)(IDS, scores))


def test_rows_get_it_and_drafters_see_it() -> None:
    class Own(TopPLogitsWarper):
        pass

    given = [TopPLogitsWarper(0.9), TopKLogitsWarper(50), TopPLogitsWarper(0.7), Own(0.7)]
    for num_rows in (1, 2):
        kinds = [type(part) for part in row_copies(given, 0, num_rows, 0)]
        assert kinds == [SortedTopPLogitsWarper, JoinedLogitsWarper, Own]
    scores = logits("plain", 2)
    expected = warp_logits(LogitsProcessorList(given), scores)
    own = LogitsProcessorList(row_copies(given, 0, 1, 0))
    assert torch.equal(expected, warp_logits(own, scores))
