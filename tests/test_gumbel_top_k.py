"""Gumbel top-k with keyed noise, against a sort of noise made id by id."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter

import pytest
import torch

from specdec.kernels.gumbel_top_k import gumbel_top_k
from specdec.kernels.philox import keyed_gumbel
from specdec.random import SeededRandom

pytestmark = pytest.mark.kernels
HAS_TRITON = importlib.util.find_spec("triton") is not None
triton_only = pytest.mark.skipif(not HAS_TRITON, reason="needs the package triton")
IMPLS = ["reference", pytest.param("triton", marks=triton_only)]
# logarithms of float64 differ in the last bits between libraries; noise is below 23
CLOSE = {"rtol": 0.0, "atol": 1e-12}


def some_keys(rows):
    # seeds with both words in use, a row number, a position past 16 bits, a nonce
    seeds = [-(2**63), 2**63 - 1, 12345678901234567, 7]
    return torch.tensor([[seeds[i % 4], 3 * i, 70_000 + i, i % 2] for i in range(rows)])


def some_log_probs(rows, vocab_size, dtype=torch.float32, seed=0):
    logits = 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    return torch.log_softmax(logits, dim=-1).to(dtype)


def by_hand(row, key, k):
    """Returns (id, score) of the k largest sums, each token's noise asked for by itself."""
    seed, number, position, nonce = key.tolist()
    ids = torch.arange(len(row))
    noise = keyed_gumbel(seed, number, position, ids, nonce=nonce).tolist()
    sums = [(float(p) + g, -i) for i, (p, g) in enumerate(zip(row.double(), noise, strict=True))]
    best = sorted((s for s in sums if s[0] > -math.inf), reverse=True)[:k]
    return [(-i, s) for s, i in best] + [(-1, -math.inf)] * (k - len(best))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "vocab_size", "k"), [(1, 1, 1), (7, 5, 5), (2, 4097, 3), (3, 63, 8), (1, 129, 33)]
)
def test_draws_are_the_largest_sums(impl, rows, vocab_size, k, dtype, kernel_device):
    log_probs, keys = some_log_probs(rows, vocab_size, dtype), some_keys(rows)
    drawn = gumbel_top_k(log_probs.to(kernel_device), keys.to(kernel_device), k, impl=impl)
    assert (drawn.ids.dtype, drawn.scores.dtype) == (torch.int64, torch.float64)
    for row in range(rows):
        expected = by_hand(log_probs[row], keys[row], k)
        assert drawn.ids[row].tolist() == [token for token, _ in expected]
        scores = torch.tensor([score for _, score in expected], dtype=torch.float64)
        torch.testing.assert_close(drawn.scores[row].cpu(), scores, **CLOSE)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_first_is_what_coupled_chooses(impl, kernel_device):
    log_probs = some_log_probs(4, 5000, seed=1)
    keys = some_keys(4)
    keys[:, 3] = 0
    drawn = gumbel_top_k(log_probs.to(kernel_device), keys.to(kernel_device), 2, impl=impl)
    for row, (seed, number, position, _) in enumerate(keys.tolist()):
        source = SeededRandom(seed, number, stream=1)
        assert int(drawn.ids[row, 0]) == source.gumbel_argmax(log_probs[row], position)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_support_may_be_smaller_than_k(impl, kernel_device):
    """Tokens without probability are never drawn; a row of none, and one with NaN, give -1."""
    log_probs = torch.full((4, 4200), -torch.inf)
    log_probs[0, [5, 4150]] = -0.7
    log_probs[1] = 0.0
    log_probs[1, 4199] = torch.nan
    log_probs[3, 17] = 0.0
    drawn = gumbel_top_k(log_probs.to(kernel_device), some_keys(4).to(kernel_device), 3, impl=impl)
    ids = drawn.ids.tolist()
    assert sorted(ids[0]) == [-1, 5, 4150]
    assert ids[0][2] == -1
    assert ids[1:] == [[-1] * 3, [-1] * 3, [17, -1, -1]]
    assert torch.equal(drawn.scores.cpu() == -torch.inf, drawn.ids.cpu() == -1)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_poison_around_the_rows(impl, kernel_device):
    log_probs, keys = some_log_probs(3, 300), some_keys(3)
    expected = gumbel_top_k(log_probs, keys, 4, impl="reference")
    wide = torch.full((5, 600), torch.nan)
    wide[1:4, ::2] = log_probs
    strided = torch.stack([keys, -keys], dim=-1).to(kernel_device)[..., 0]
    drawn = gumbel_top_k(wide.to(kernel_device)[1:4, ::2], strided, 4, impl=impl)
    assert torch.equal(drawn.ids.cpu(), expected.ids)
    torch.testing.assert_close(drawn.scores.cpu(), expected.scores, **CLOSE)


@pytest.mark.slow
@triton_only
@pytest.mark.parametrize(
    ("rows", "vocab_size", "k"), [(1, 50_257, 8), (3, 12_289, 64), (33, 100, 4), (128, 60, 3)]
)
def test_triton_draws_what_the_reference_does(rows, vocab_size, k, kernel_device):
    log_probs, keys = some_log_probs(rows, vocab_size, seed=2), some_keys(rows)
    expected = gumbel_top_k(log_probs, keys, k, impl="reference")
    drawn = gumbel_top_k(log_probs.to(kernel_device), keys.to(kernel_device), k, impl="triton")
    assert torch.equal(drawn.ids.cpu(), expected.ids)
    torch.testing.assert_close(drawn.scores.cpu(), expected.scores, **CLOSE)


def test_the_draws_follow_the_law_without_replacement():
    """Pairs of a law over three tokens, 4000 positions: chi-square, fixed seed.

    With 5 degrees of freedom a right sampler exceeds 25.7 once in 10 000 seeds.
    """
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    count = 4000
    keys = torch.tensor([[99, 0, position, 0] for position in range(count)])
    ids = gumbel_top_k(probs.log().expand(count, 3), keys, 2).ids.tolist()
    seen = Counter(map(tuple, ids))
    statistic = 0.0
    for first in range(3):
        for second in {0, 1, 2} - {first}:
            p = float(probs[first] * probs[second] / (1 - probs[first]))
            statistic += (seen[first, second] - count * p) ** 2 / (count * p)
    assert statistic < 25.7


@triton_only
def test_triton_refuses_what_it_cannot_do(kernel_device):
    keys = some_keys(1).to(kernel_device)
    with pytest.raises(ValueError, match=r"up to 32 bits; got torch\.float64"):
        gumbel_top_k(torch.zeros(1, 9, device=kernel_device).double(), keys, 1, impl="triton")
    with pytest.raises(ValueError, match="k up to 64; got 65"):
        gumbel_top_k(torch.zeros(1, 99, device=kernel_device), keys, 65, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": torch.zeros(3)}, r"log_probs must be \[N, V\] floating point; got \[3\]"),
        ({"log_probs": torch.zeros(2, 3, dtype=torch.int64)}, "floating point; got .* torch.int64"),
        ({"log_probs": torch.zeros(2, 0)}, r"got \[2, 0\]"),
        ({"noise_keys": torch.zeros(2, 3, dtype=torch.int64)}, r"noise_keys must be \[2, 4\]"),
        ({"noise_keys": torch.zeros(2, 4)}, "torch.int64 on cpu; got .* torch.float32"),
        ({"k": 0}, "k must be 1 to V = 3; got 0"),
        ({"k": 4}, "k must be 1 to V = 3; got 4"),
        ({"impl": "torch"}, "one of .*'reference', 'triton'.* got 'torch'"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {
        "log_probs": torch.zeros(2, 3),
        "noise_keys": torch.zeros(2, 4, dtype=torch.int64),
        "k": 2,
    }
    gumbel_top_k(**arguments)
    with pytest.raises(ValueError, match=message):
        gumbel_top_k(**arguments | change)


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr("specdec.kernels.implementations.has_triton", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'specdec-toolkit\[triton\]'"):
        gumbel_top_k(torch.zeros(1, 3), some_keys(1), 1, impl="triton")
