"""Path compaction in place, against a copy made slot by slot."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from specdec.kernels.commit import commit_paths

pytestmark = pytest.mark.kernels
HAS_TRITON = importlib.util.find_spec("triton") is not None
IMPLS = [
    "reference",
    pytest.param(
        "triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs the package triton")
    ),
]


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def compacted(pool, paths, counts, lengths):
    expected = pool.clone()
    for row, (path, count, length) in enumerate(zip(paths, counts, lengths, strict=True)):
        for place in range(count):
            expected[:, row, :, length + place] = pool[:, row, :, length + path[place]]
    return expected


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize("strided", [False, True])
def test_ragged_paths(impl, dtype, width, strided, kernel_device):
    """A path with gaps, one in order, nothing kept, one up to the last slot of a full cache."""
    generator = torch.Generator().manual_seed(0)
    slots = 24
    pool = torch.randn(2, 5, 3, slots, width, generator=generator).to(dtype)
    paths = [[0, 2, 3, 7, 9], [0, 1, 2, -9, 99], [5, 4, 3, 2, 1], [0, 6, 0, 0, 0], [1, 2, 3, 4, 5]]
    counts, lengths = [5, 3, 0, 2, 5], [4, 20, 24, 17, 0]
    expected = compacted(pool, paths, counts, lengths)
    # slots outside of a path may hold anything, and what stands around the pool must stay
    guarded = torch.full((4, 5, 3, slots, 2 * width), torch.nan, dtype=dtype)
    view = guarded[1:3, ..., ::2] if strided else guarded[1:3, ..., :width]
    view.copy_(pool)
    guarded = guarded.to(kernel_device)
    view = guarded[1:3, ..., ::2] if strided else guarded[1:3, ..., :width]
    arguments = [ints(part).to(kernel_device) for part in (paths, counts, lengths)]
    commit_paths(view, *arguments, impl=impl)
    assert torch.equal(view.cpu(), expected)
    assert int(guarded.isnan().sum()) == guarded.numel() - view.numel()


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_moves_as_it_is_and_full_rows_stay(impl, kernel_device):
    """A row that keeps nothing in a cache that is full must not write its last slot."""
    pool = torch.arange(2 * 4, dtype=torch.float32).reshape(1, 2, 1, 4, 1).to(kernel_device)
    pool[0, 0, 0, 3] = torch.nan
    commit_paths(
        pool,
        ints([[0, 2], [0, 1]]).to(kernel_device),
        ints([2, 0]).to(kernel_device),
        ints([1, 4]).to(kernel_device),
        impl=impl,
    )
    assert pool[0, 1].flatten().tolist() == [4, 5, 6, 7]
    assert pool[0, 0].flatten()[:2].tolist() == [0, 1]
    assert bool(pool[0, 0, 0, 2:].isnan().all())


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("nodes", [1, 7, 33, 64, 128])
def test_random_paths(impl, nodes, kernel_device):
    generator = torch.Generator().manual_seed(nodes)
    pool = torch.randn(1, 4, 2, 3 * nodes, 16, generator=generator)
    paths, counts = torch.zeros(4, nodes, dtype=torch.int32), []
    for row in range(4):
        kept = torch.rand(nodes, generator=generator) < 0.1 + 0.3 * row
        counts.append(int(kept.sum()))
        paths[row, : counts[-1]] = kept.nonzero().flatten()
    lengths = [0, 1, nodes, 2 * nodes]
    expected = compacted(pool, paths.tolist(), counts, lengths)
    pool = pool.to(kernel_device)
    arguments = [paths.to(kernel_device), *(ints(p).to(kernel_device) for p in (counts, lengths))]
    commit_paths(pool, *arguments, impl=impl)
    assert torch.equal(pool.cpu(), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_keep(impl, kernel_device):
    pool = torch.ones(1, 2, 1, 4, 8, device=kernel_device)
    empty = torch.zeros(2, 0, dtype=torch.int32, device=kernel_device)
    zero = torch.zeros(2, dtype=torch.int32, device=kernel_device)
    commit_paths(pool, empty, zero, zero, impl=impl)
    assert bool((pool == 1).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": torch.zeros(2, 1, 8, 4)}, r"pool must be \[L, B, H, S, D\]"),
        ({"paths": ints([0, 1])}, r"paths must be \[B, P\] int32 on cpu with B = 1; got \[2\]"),
        ({"paths": torch.tensor([[0, 1]])}, "got .* torch.int64"),
        ({"counts": ints([1, 1])}, r"counts must be \[B\] int32"),
        ({"counts": ints([3])}, "counts must be 0 to P = 2; row 0 has 3"),
        ({"paths": ints([[1, 1]])}, r"must ascend from 0 or more; row 0 has \[1, 1\]"),
        ({"paths": ints([[-1, 1]])}, r"row 0 has \[-1, 1\]"),
        ({"lengths": ints([7])}, r"in the 8 slots .* length 7 and path \[0, 2\]"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {
        "pool": torch.zeros(2, 1, 1, 8, 4),
        "paths": ints([[0, 2]]),
        "counts": ints([2]),
        "lengths": ints([3]),
    }
    commit_paths(**arguments)
    with pytest.raises(ValueError, match=message):
        commit_paths(**arguments | change)


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr("specdec.kernels.implementations.has_triton", lambda: False)
    arguments = (torch.zeros(1, 1, 1, 4, 2), ints([[0, 2]]), ints([2]), ints([1]))
    with pytest.raises(ImportError, match=r"pip install 'specdec-toolkit\[triton\]'"):
        commit_paths(*arguments, impl="triton")
    commit_paths(*arguments)
