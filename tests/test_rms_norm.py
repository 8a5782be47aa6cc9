"""RMS norms in one call: the same numbers, and the model's own modules when they are not ours."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from specdec.backend.norms import native_norms
from specdec.backend.packed import PackedLinears
from specdec.kernels.rms_norm import rms_norm, why_not_native

needs_compiler = pytest.mark.skipif(
    why_not_native() is not None, reason=f"no native code: {why_not_native()}"
)
IMPLS = ["reference", pytest.param("native", marks=needs_compiler)]
TOLERANCE = 1e-6  # float32, of numbers around one


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 3, 64), (129, 576)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_against_float64(impl: str, shape: tuple[int, ...], offset: float, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = size * torch.randn(shape, generator=generator)
    weight = torch.randn(shape[-1], generator=generator)
    exact = rows.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (weight + offset)
    got = rms_norm(rows, weight, eps=1e-6, offset=offset, impl=impl)
    torch.testing.assert_close(got.double(), exact, rtol=TOLERANCE, atol=TOLERANCE)


@needs_compiler
def test_rows_stand_alone_and_may_be_strided() -> None:
    rows, weight = torch.randn(48, 9).T, torch.randn(48)
    together = rms_norm(rows, weight, eps=1e-5)
    alone = torch.stack([rms_norm(row, weight, eps=1e-5) for row in rows])
    assert torch.equal(together, alone)
    spoiled = rows.clone()
    spoiled[4] = torch.nan
    assert torch.equal(rms_norm(spoiled, weight, eps=1e-5)[5:], together[5:])
    assert rms_norm(rows[:0], weight, eps=1e-5).shape == (0, 48)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"got \[2, 8\] torch.float64"):
        rms_norm(torch.zeros(2, 8, dtype=torch.float64), torch.ones(8), eps=0.1)
    with pytest.raises(ValueError, match=r"a weight \[D\] on the CPU; got \[2, 8\]"):
        rms_norm(torch.zeros(2, 8), torch.ones(4), eps=0.1)
    with pytest.raises(ValueError, match="impl must be one of"):
        rms_norm(torch.zeros(2, 8), torch.ones(8), eps=0.1, impl="triton")


@needs_compiler
@pytest.mark.parametrize(
    ("family", "count"),
    [("llama", 5), ("gemma3_text", 13), ("qwen3", 9), ("gpt2", 0), ("olmo2", 9)],
)
def test_norms_of_families(family: str, count: int) -> None:
    model = tiny.make_model(family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn(weight.shape))
    prompt = tiny.ids(tiny.prompt(9))
    assert len(native_norms(model)) == count
    layers = PackedLinears(model, "blocks")
    with torch.no_grad():
        expected = model(prompt).logits
        with layers.active():
            torch.testing.assert_close(model(prompt).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(prompt).logits, expected)


class OtherRMSNorm(nn.Module):
    """Carries the name, and leaves out the root."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-6

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.weight * rows / (rows.square().mean(-1, keepdim=True) + self.eps)


@needs_compiler
def test_a_name_alone_is_no_norm() -> None:
    assert native_norms(nn.Sequential(OtherRMSNorm())) == []


@needs_compiler
def test_weights_that_were_replaced_or_train_go_the_models_way() -> None:
    model = tiny.make_model("llama")
    layers = PackedLinears(model, "blocks")
    norm = model.model.norm
    rows = torch.randn(3, norm.weight.shape[0])
    with layers.active():
        norm(rows).sum().backward()
        assert norm.weight.grad is not None
        norm.weight = nn.Parameter(2 * torch.ones_like(norm.weight))
        with torch.no_grad():
            doubled = norm(rows)
    torch.testing.assert_close(doubled, norm(rows).detach())
