"""Weights in blocks: the same numbers come back, from the smallest form that holds them."""

from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor

from specdec.kernels import weight_blocks
from specdec.kernels.weight_blocks import Form, for_dots, from_blocks, to_blocks


def from_file(kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> Tensor:
    """Returns the float32 numbers that a GGUF file of this kind gives."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    stored = gguf.quants.quantize((0.05 * values).numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(stored, kind))


KINDS = gguf.GGMLQuantizationType


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (KINDS.Q4_1, Form.INT4),
        (KINDS.Q4_0, Form.INT8),
        (KINDS.Q5_0, Form.INT8),
        (KINDS.Q8_0, Form.INT8),
        (KINDS.BF16, Form.BFLOAT16),
    ],
)
@pytest.mark.parametrize("shape", [(64, 128), (7, 96), (33, 32)])
def test_numbers_of_files_stay_integers(
    kind: gguf.GGMLQuantizationType, form: Form, shape: tuple[int, int]
) -> None:
    weight = from_file(kind, *shape)
    blocks = to_blocks(weight)
    assert blocks.form == form
    assert torch.equal(from_blocks(blocks), weight)
    others = for_dots(blocks)
    dots = {Form.INT4: Form.DOT4, Form.INT8: Form.DOT8}
    assert others.form == dots.get(form, form)
    assert others.data.shape == blocks.data.shape
    assert torch.equal(from_blocks(others), weight)


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 64), (129, 31)])
@pytest.mark.parametrize("form", [Form.FLOAT32, Form.BFLOAT16])
def test_any_shape(shape: tuple[int, int], form: Form) -> None:
    weight = torch.randn(shape).bfloat16().float()
    blocks = to_blocks(weight, form)
    assert blocks.data.dtype == torch.uint8
    assert torch.equal(from_blocks(blocks), weight)


def test_the_form_is_one_for_all_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last panel alone is no integers; a weight is looked at in parts."""
    monkeypatch.setattr(weight_blocks, "_ENTRIES", 1)
    weight = from_file(KINDS.Q4_1, 96, 64)
    assert to_blocks(weight).form == Form.INT4
    weight[95, 63] += 1e-7
    blocks = to_blocks(weight)
    assert blocks.form == Form.FLOAT32
    assert torch.equal(from_blocks(blocks), weight)


@pytest.mark.parametrize("special", [-0.0, torch.nan, torch.inf, 1e-45, 3e38])
@pytest.mark.parametrize("kind", [KINDS.Q4_1, KINDS.Q8_0])
def test_numbers_that_no_integer_is(kind: gguf.GGMLQuantizationType, special: float) -> None:
    weight = from_file(kind, 64, 64)
    weight[3, 40] = special
    back = from_blocks(to_blocks(weight))
    assert torch.equal(back.view(torch.int32), weight.view(torch.int32))


def test_blocks_of_equal_numbers() -> None:
    for value in (0.0, 1.0, -0.375):
        weight = torch.full((32, 64), value)
        assert torch.equal(from_blocks(to_blocks(weight)), weight)


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(ValueError, match="INT4 cannot hold the numbers"):
        to_blocks(torch.randn(32, 32), Form.INT4)
    with pytest.raises(ValueError, match=r"must be \[N, K\] float32, not empty; got \[32\]"):
        to_blocks(torch.randn(32))
    with pytest.raises(ValueError, match="float64"):
        to_blocks(torch.randn(2, 32, dtype=torch.float64))
