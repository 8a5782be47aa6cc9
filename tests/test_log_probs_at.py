"""Log-probabilities at a few tokens against torch's own softmax."""

from __future__ import annotations

import pytest
import torch

from specdec.training import log_probs_at as module
from specdec.training.log_probs_at import log_probs_at


@pytest.fixture(params=[1, 3, 64], ids="parts of {}".format, autouse=True)
def _parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_ON_CPU", request.param)


def example(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, 12, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(0, 12, (rows, 4), generator=generator)  # some of them twice
    return logits.requires_grad_(), ids


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_values_and_gradients_are_torchs(rows: int) -> None:
    logits, ids = example(rows, torch.float64)
    before = logits.detach().clone()
    log_probs, best = log_probs_at(logits, ids)
    assert torch.equal(best, logits.argmax(dim=-1))
    expected = torch.log_softmax(logits, dim=-1).gather(-1, ids)
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-12)
    weights = torch.randn(ids.shape, dtype=torch.float64)
    (own,) = torch.autograd.grad((log_probs * weights).sum(), logits)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(own, theirs, rtol=0, atol=1e-12)
    assert torch.equal(logits, before)


def test_half_precision_is_summed_in_float32() -> None:
    logits, ids = example(7, torch.bfloat16)
    log_probs, _ = log_probs_at(logits, ids)
    assert log_probs.dtype == torch.float32
    expected = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids)
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(log_probs.sum(), logits)
    assert gradient.dtype == torch.bfloat16
