"""Token recycling's table written on the device, against a table written row by row."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from specdec.drafters.token_recycling import TokenRecycling
from specdec.kernels.recycle import recycle
from specdec.types import TargetInfo

pytestmark = pytest.mark.kernels
HAS_TRITON = importlib.util.find_spec("triton") is not None
triton_only = pytest.mark.skipif(not HAS_TRITON, reason="needs the package triton")
IMPLS = ["reference", pytest.param("triton", marks=triton_only)]
HALF_ULP = {"rtol": 1e-3, "atol": 1e-3}  # of the shares, which are float16


def by_hand(table, logits, tokens):
    """Returns the table, each row sorted in Python: value first, then the lower id."""
    expected = table.clone()
    for token, row in zip(tokens.tolist(), logits.double().tolist(), strict=True):
        if token < 0:
            continue
        values = [-np.inf if np.isnan(v) else v for v in row]
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        expected[token] = torch.tensor(order[: table.shape[1]])
    return expected


def poisoned(rows, k, device):
    """A table inside of a larger one, and shares likewise: what is not written must stay."""
    table = torch.full((rows + 2, 2 * k), -7, dtype=torch.int32, device=device)
    shares = torch.full((rows + 2, 2 * k), torch.nan, dtype=torch.float16, device=device)
    return table, shares


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "vocab_size", "k"),
    [(1, 1, 1), (7, 63, 8), (5, 4099, 3), (33, 129, 8), (1, 8193, 33)],
)
def test_the_table_by_hand(impl, rows, vocab_size, k, dtype, kernel_device):
    """Tokens that occur several times, rows that are left out and hold NaN, ties in bfloat16."""
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, vocab_size, generator=generator).to(dtype)
    tokens = torch.randint(-1, max(rows // 2, 1), (rows,), generator=generator)
    tokens[0] = 0
    logits[tokens < 0] = torch.nan
    size = max(rows // 2, 1)
    table, shares = poisoned(size, k, kernel_device)
    expected = by_hand(table[1:-1, ::2].cpu(), logits, tokens)
    arguments = (logits.to(kernel_device), tokens.to(kernel_device))
    recycle(table[1:-1, ::2], *arguments, shares[1:-1, ::2], impl=impl)
    assert torch.equal(table[1:-1, ::2].cpu(), expected)
    written = expected[:, 0] != -7
    own = shares[1:-1, ::2].float().cpu()
    assert torch.equal(own.isnan().all(1), ~written)
    for token in written.nonzero().flatten().tolist():
        last = max(row for row in range(rows) if tokens[row] == token)
        top = logits[last].float()[expected[token].long()]
        torch.testing.assert_close(own[token], torch.log_softmax(top, 0), **HALF_ULP)
    # around the table nothing was touched
    num_guards = int((table == -7).sum())
    assert num_guards == table.numel() - int(written.sum()) * k
    assert int(shares.isnan().sum()) == num_guards


@pytest.mark.parametrize("impl", IMPLS)
def test_the_last_node_of_a_token_wins(impl, kernel_device):
    logits = torch.eye(6)[[1, 2, 3, 4, 5]].to(kernel_device)
    tokens = torch.tensor([0, 1, 0, 1, 0], device=kernel_device)
    for _ in range(3):
        table = torch.zeros(2, 1, dtype=torch.int32, device=kernel_device)
        recycle(table, logits, tokens, impl=impl)
        assert table.tolist() == [[5], [4]]


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_nan_and_infinities(impl, kernel_device):
    """The lowest id first; NaN is the smallest, and so late that only small rows name it."""
    inf = torch.inf
    logits = torch.full((4, 5000), -inf)
    logits[0, [4999, 77, 4500, 78]] = 2.0
    logits[1] = torch.nan
    logits[1, 3000] = -5.0
    logits[2, 9] = inf
    recycle(
        table := torch.zeros(4, 5, dtype=torch.int32, device=kernel_device),
        logits.to(kernel_device),
        torch.arange(4, device=kernel_device),
        impl=impl,
    )
    assert table.tolist() == [
        [77, 78, 4500, 4999, 0],
        [3000, 0, 1, 2, 3],
        [9, 0, 1, 2, 3],
        [0, 1, 2, 3, 4],
    ]


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_logits_and_tokens(impl, kernel_device):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, 300, generator=generator)
    wide = torch.stack([logits, torch.full_like(logits, torch.nan)], dim=-1).flatten(1)
    tokens = torch.tensor([3, -1, 0, 3, 1])
    spread = torch.stack([tokens, torch.full_like(tokens, 9)], dim=-1).to(kernel_device)[:, 0]
    table = torch.zeros(4, 8, dtype=torch.int32, device=kernel_device)
    recycle(table, wide.to(kernel_device)[:, ::2], spread, impl=impl)
    expected = by_hand(torch.zeros(4, 8, dtype=torch.int32), logits, tokens)
    assert torch.equal(table.cpu(), expected)


@pytest.mark.slow
@triton_only
@pytest.mark.parametrize(
    ("rows", "vocab_size", "k"), [(3, 50_257, 8), (64, 300, 8), (128, 40, 2), (2, 9000, 64)]
)
def test_triton_writes_what_the_reference_does(rows, vocab_size, k, kernel_device):
    generator = torch.Generator().manual_seed(k)
    logits = torch.randn(rows, vocab_size, generator=generator).half()
    tokens = torch.randint(20, (rows,), generator=generator)
    expected = torch.zeros(20, k, dtype=torch.int32)
    recycle(expected, logits, tokens, impl="reference")
    table = torch.zeros(20, k, dtype=torch.int32, device=kernel_device)
    recycle(table, logits.to(kernel_device), tokens.to(kernel_device), impl="triton")
    assert torch.equal(table.cpu(), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_what_the_drafter_writes(impl, kernel_device):
    vocab_size, k = 60, 4
    drafter = TokenRecycling(k)
    drafter.attach(TargetInfo(vocab_size, ()))
    logits = torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(5))
    tokens = [4, 8, 4, 59, 0, 8, 8, 1, 4]
    top = logits.topk(k)
    drafter._write(tokens, top.indices, top.values, range(len(tokens)))
    table = torch.full((vocab_size, k), -1, dtype=torch.int32, device=kernel_device)
    shares = torch.full((vocab_size, k), -torch.inf, dtype=torch.float16, device=kernel_device)
    ids = torch.tensor(tokens, device=kernel_device)
    recycle(table, logits.to(kernel_device), ids, shares, impl=impl)
    assert np.array_equal(table.cpu().numpy(), drafter._successors)
    np.testing.assert_allclose(
        shares.cpu().numpy(), drafter._log_shares, rtol=HALF_ULP["rtol"], atol=HALF_ULP["atol"]
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_write(impl, kernel_device):
    table = torch.full((2, 2), -7, dtype=torch.int32, device=kernel_device)
    for rows in (0, 3):
        tokens = torch.full((rows,), -1, device=kernel_device)
        recycle(table, torch.zeros(rows, 5, device=kernel_device), tokens, impl=impl)
    assert bool((table == -7).all())


@triton_only
def test_triton_refuses_what_it_cannot_do(kernel_device):
    tokens = torch.zeros(1, dtype=torch.int64, device=kernel_device)
    table = torch.zeros(1, 65, dtype=torch.int32, device=kernel_device)
    with pytest.raises(ValueError, match="k up to 64; got 65"):
        recycle(table, torch.zeros(1, 99, device=kernel_device), tokens, impl="triton")
    logits = torch.zeros(1, 99, dtype=torch.float64, device=kernel_device)
    with pytest.raises(ValueError, match=r"up to 32 bits; got torch\.float64"):
        recycle(table[:, :2], logits, tokens, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits must be \[N, V\] floating point; got \[3\]"),
        ({"successors": torch.zeros(4, 6, dtype=torch.int32)}, r"k from 1 to V = 5; got \[4, 6\]"),
        ({"successors": torch.zeros(4, 2, dtype=torch.int64)}, "int32 on cpu; got .* torch.int64"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens must be \[2\] torch.int64"),
        ({"tokens": torch.zeros(2)}, "got .* torch.float32"),
        ({"tokens": torch.tensor([0, 4])}, "below the 4 rows of the table; got 4"),
        ({"log_shares": torch.zeros(4, 2)}, r"log_shares must be \[4, 2\] torch.float16"),
        ({"impl": "torch"}, "one of .*'reference', 'triton'.* got 'torch'"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {
        "successors": torch.zeros(4, 2, dtype=torch.int32),
        "logits": torch.zeros(2, 5),
        "tokens": torch.tensor([0, 3]),
    }
    recycle(**arguments)
    with pytest.raises(ValueError, match=message):
        recycle(**arguments | change)


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr("specdec.kernels.implementations.has_triton", lambda: False)
    table, tokens = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ImportError, match=r"pip install 'specdec-toolkit\[triton\]'"):
        recycle(table, torch.zeros(1, 2), tokens, impl="triton")
