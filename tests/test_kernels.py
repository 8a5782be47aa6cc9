"""Raw tensor operations against their plain definitions."""

from __future__ import annotations

import pytest
import torch

from specdec.kernels import native
from specdec.kernels import top_k_rows as top_k
from specdec.kernels.argmax import argmax_row
from specdec.kernels.tree_mask import ancestor_matrix

needs_compiler = pytest.mark.skipif(
    native.why_not(top_k._SOURCE) is not None, reason="no C code can be compiled here"
)
TOP_K = [
    top_k.top_k_rows,
    top_k.top_k_rows_blocked,
    pytest.param(top_k.top_k_rows_native, marks=needs_compiler),
]
SIZES = [(1, 7, 3), (7, 129, 8), (3, 4099, 8), (2, 64, 1), (65, 200, 64), (4, 8, 8), (0, 9, 2)]


@pytest.mark.parametrize("function", TOP_K)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "k"), SIZES)
def test_top_k_of_rows(function, rows, width, k, dtype):
    if function is top_k.top_k_rows_native and dtype != torch.float32:
        pytest.skip("float32 only; top_k_rows chooses")
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    values, ids = function(logits, k)
    assert torch.equal(values, torch.topk(logits, k).values)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("function", TOP_K)
@pytest.mark.parametrize(
    "view", [lambda x: x[:, ::2], lambda x: x[::2], lambda x: x[:, 3:], torch.t]
)
def test_top_k_reads_a_strided_input(function, view):
    logits = view(torch.randn(70, 1280))
    assert torch.equal(function(logits, 4)[1], torch.topk(logits, 4).indices)


@pytest.mark.parametrize("function", TOP_K)
@pytest.mark.parametrize("place", [0, 5, 130, 299])
def test_nan_is_the_largest(function, place):
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    best = logits[0].argmax()
    logits[:, place] = torch.nan
    logits[1, 17] = torch.nan
    values, ids = function(logits, 3)
    assert ids[0, :2].tolist() == [place, int(best)]
    assert set(ids[1, :2].tolist()) == {place, 17}
    assert values.isnan().tolist() == [[True, False, False], [True, True, False]]


@needs_compiler
def test_native_top_k_takes_the_first_of_equal_entries():
    logits = torch.zeros(3, 300)
    logits[1, 100:] = 1.0
    logits[2] = -torch.inf
    logits[2, [7, 250, 299]] = torch.tensor([2.0, 3.0, 2.0])
    values, ids = top_k.top_k_rows_native(logits, 4)
    assert ids.tolist() == [[0, 1, 2, 3], [100, 101, 102, 103], [250, 7, 299, 0]]
    assert values[2].tolist() == [3.0, 2.0, 2.0, -torch.inf]


def test_ancestors_of_a_tree_by_hand():
    matrix = ancestor_matrix([-1, 0, 0, 2], size=5).int().tolist()
    assert matrix == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],  # padding sees itself alone
    ]


def test_ancestors_agree_with_walking_up():
    generator = torch.Generator().manual_seed(1)
    parents = [-1] + [int(torch.randint(0, i, (), generator=generator)) for i in range(1, 60)]
    matrix = ancestor_matrix(parents, 60)
    for node in range(60):
        seen, up = set(), node
        while up >= 0:
            seen.add(up)
            up = parents[up]
        assert set(torch.nonzero(matrix[node]).flatten().tolist()) == seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 4096])
def test_argmax_is_torchs(width: int, dtype: torch.dtype) -> None:
    for row in torch.randn(20, width, generator=torch.Generator().manual_seed(3)).to(dtype):
        assert argmax_row(row) == int(torch.argmax(row))
        assert argmax_row(row[::2]) == int(torch.argmax(row[::2]))


def test_argmax_takes_the_first_of_equals_and_nan_for_the_largest() -> None:
    scores = torch.tensor([0.0, 2.0, 1.0, 2.0])
    assert argmax_row(scores) == 1
    scores[2] = torch.nan
    assert argmax_row(scores) == 2
    assert argmax_row(torch.full((5,), -torch.inf)) == 0
