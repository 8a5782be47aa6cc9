"""Raw tensor operations against their plain definitions."""

from __future__ import annotations

import pytest
import torch

from specdec.kernels.argmax import argmax_row
from specdec.kernels.top_k_rows import top_k_rows
from specdec.kernels.tree_mask import ancestor_matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "k"), [(1, 7, 3), (7, 129, 8), (3, 4099, 8), (2, 64, 1)])
def test_top_k_of_rows(rows, width, k, dtype):
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    values, ids = top_k_rows(logits, k)
    assert torch.equal(values, torch.topk(logits, k).values)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_top_k_reads_a_strided_input():
    logits = torch.randn(5, 2 * 640)[:, ::2]
    assert torch.equal(top_k_rows(logits, 4)[1], torch.topk(logits, 4).indices)


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
