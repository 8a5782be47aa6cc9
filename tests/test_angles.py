"""Rotary angles by position: the bits of the model's own module, looked up."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from specdec.backend.angles import Angles

HIDDEN = torch.zeros(1, 1, 1)
POSITIONS = [[[0]], [[5, 6, 7]], [[1023, 1024], [9, 3]], [list(range(3000, 3037))], [[2], [70000]]]


def rotary(kind: str = "default", **parameters: Any) -> Any:
    rope = {"rope_type": kind, "rope_theta": 1e4, **parameters}
    model = tiny.make_model("llama", rope_parameters=rope, max_position_embeddings=64)
    return model.model.rotary_emb


def of_positions(angles: Angles, positions: Tensor) -> list[Tensor]:
    """Returns cos and sin of positions, looked up where they are tables."""
    both = angles.of(HIDDEN, positions, int(positions.max()) + 1)
    return [own if own.dim() == 3 else own[positions] for own in both]


def count_calls(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    calls: list[Tensor] = []
    own = type(module).forward

    def forward(self: Any, hidden: Tensor, positions: Tensor) -> Any:
        calls.append(positions)
        return own(self, hidden, positions)

    monkeypatch.setattr(type(module), "forward", forward)
    return calls


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("default", {}),
        ("linear", {"factor": 2.0}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 16}),
        (
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
        ("dynamic", {"factor": 2.0}),
    ],
)
def test_bits_are_the_modules(kind: str, parameters: dict[str, Any]) -> None:
    module, other = rotary(kind, **parameters), rotary(kind, **parameters)
    angles = Angles(module)
    for wanted in POSITIONS:
        positions = torch.tensor(wanted)
        for got, expected in zip(
            of_positions(angles, positions), other(HIDDEN, positions), strict=True
        ):
            assert got.is_contiguous()
            assert torch.equal(got, expected)


def test_a_table_is_made_once_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    module = rotary()
    calls = count_calls(module, monkeypatch)
    angles = Angles(module)
    for position in range(1024):
        of_positions(angles, torch.tensor([[position]]))
    assert len(calls) == 1
    of_positions(angles, torch.tensor([[1024, 2]]))
    of_positions(angles, torch.tensor([[2047]]))
    assert len(calls) == 2


def test_other_frequencies_count(monkeypatch: pytest.MonkeyPatch) -> None:
    module = rotary()
    angles = Angles(module)
    positions = torch.tensor([[3, 8]])
    before, _ = of_positions(angles, positions)
    module.inv_freq.mul_(0.5)
    written, _ = of_positions(angles, positions)
    assert torch.equal(written, module(HIDDEN, positions)[0])
    assert not torch.equal(written, before)
    module.inv_freq = module.inv_freq * 2
    replaced, _ = of_positions(angles, positions)
    assert torch.equal(replaced, before)


def test_frequencies_that_follow_a_texts_length_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = rotary("dynamic", factor=2.0)
    calls = count_calls(module, monkeypatch)
    angles = Angles(module)
    for _ in range(3):
        of_positions(angles, torch.tensor([[3]]))
    assert len(calls) == 3
