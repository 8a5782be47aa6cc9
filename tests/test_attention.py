"""Attention with the query heads of a group as rows: transformers' "sdpa", and the model's own."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from specdec import SpeculativeGenerator
from specdec.backend.attention import GROUPED, attention_of, grouped_attention
from specdec.backend.probe import probed


class Layer:
    is_causal = True

    def __init__(self, groups: int) -> None:
        self.num_key_value_groups = groups


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("batch", [1, 2])
def test_grouped_attention_is_sdpa(groups: int, rows: int, batch: int) -> None:
    query = torch.randn(batch, 2 * groups, rows, 16)
    key, value = torch.randn(2, batch, 2, 100, 16)[..., :90, :].unbind(0)
    mask = torch.rand(batch, 1, rows, 90) < 0.4
    mask[..., 0] = True
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected, _ = sdpa_attention_forward(Layer(groups), query, key, value, mask, scaling=0.3)
    actual, weights = grouped_attention(Layer(groups), query, key, value, additive, scaling=0.3)
    assert weights is None
    torch.testing.assert_close(actual, expected)


def test_a_position_bias_is_left_to_sdpa() -> None:
    query, key, value = torch.randn(3, 1, 2, 3, 16).unbind(0)
    bias, mask = torch.randn(1, 2, 3, 3), torch.zeros(1, 1, 3, 3)
    expected, _ = sdpa_attention_forward(Layer(1), query, key, value, bias)
    actual, _ = grouped_attention(Layer(1), query, key, value, mask, position_bias=bias)
    torch.testing.assert_close(actual, expected)


def test_the_models_own_attention_is_back_after_a_pass() -> None:
    model = tiny.make_model("llama")
    generator = SpeculativeGenerator(model)
    assert generator._backend.attention == GROUPED
    generator.generate(tiny.ids(tiny.prompt(9)), max_new_tokens=8, do_sample=False)
    assert model.config._attn_implementation == "sdpa"


def test_overlapping_passes_leave_the_models_own_attention() -> None:
    model = tiny.make_model("llama")
    first = attention_of(model.config, GROUPED, "sdpa")
    second = attention_of(model.config, GROUPED, "sdpa")
    with first:
        second.__enter__()
        assert probed(model).traits.attention == "sdpa"
    assert model.config._attn_implementation == "sdpa"
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_computes_otherwise_with_it_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(*arguments: torch.Tensor, **settings: object) -> torch.Tensor:
        return torch.zeros_like(arguments[0])

    monkeypatch.setattr("specdec.backend.attention.scaled_dot_product_attention", wrong)
    assert probed(tiny.make_model("llama")).attention is None


def test_eager_attention_stays() -> None:
    assert probed(tiny.make_model("llama", attention="eager")).attention is None
