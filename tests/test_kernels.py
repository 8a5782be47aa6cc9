"""Raw tensor operations against their plain definitions."""

from __future__ import annotations

import pytest
import torch

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
