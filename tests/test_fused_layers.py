"""Decoder layers as one call: what a model computes, and its own way wherever that is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from specdec import SpeculativeGenerator
from specdec.backend.probe import probed
from specdec.kernels.decoder_layer import DecoderLayers, why_not_native
from specdec.kernels.layer_parts import LayerCall

pytestmark = [
    pytest.mark.skipif(why_not_native() is not None, reason=f"no native code: {why_not_native()}"),
    pytest.mark.usefixtures("small_layers_count"),
]
WIDE = {"head_dim": 32, "hidden_size": 128}
SERVED = ["llama", "qwen2", "qwen3", "qwen3_window", "mistral"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each layer that the C code runs."""
    seen: list[int] = []
    run = DecoderLayers.run

    def counted(self: DecoderLayers, call: LayerCall, **kwargs: Any) -> Tensor:
        seen.extend([call.rows.shape[0] * call.rows.shape[1]] * len(self.layers))
        return run(self, call, **kwargs)

    monkeypatch.setattr(DecoderLayers, "run", counted)
    return seen


def model_of(family: str, **overrides: Any) -> Any:
    return tiny.make_model(family, **WIDE, **overrides)


def tree_logits(model: Any, form: str | None, calls: list[int]) -> Tensor:
    """Returns ``[4, V]`` logits of a tree behind a prompt of nine tokens."""
    backend = probed(model, form)
    backend.direct = None  # it runs them all at once, and is tested by itself
    calls.clear()  # those that tried the layers out
    cache = backend.new_cache(1, 32)
    prompt = tiny.ids(tiny.prompt(9))
    with torch.no_grad():
        backend.forward(cache, prompt, torch.arange(9).unsqueeze(0), None)
        cache.advance([9])
        sees = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]])
        positions = 9 + torch.tensor([[0, 1, 1, 2]])
        return backend.forward(cache, tiny.ids([5, 6, 7, 8]), positions, sees.bool()[None])[0]


@pytest.mark.parametrize("family", SERVED)
def test_logits_of_a_tree(family: str, calls: list[int]) -> None:
    model = model_of(family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(0.3 * torch.randn(weight.shape))
    expected = tree_logits(model, None, calls)
    assert not calls
    torch.testing.assert_close(tree_logits(model, "blocks", calls), expected, rtol=1e-4, atol=1e-4)
    assert calls.count(4) == len(model.model.layers)
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "phi3", "olmo2", "mixtral", "gpt2"])
def test_other_layers_stay_as_they_are(family: str, calls: list[int]) -> None:
    wide = {} if family == "gpt2" else WIDE
    attention = "eager" if family == "gemma2" else "sdpa"
    tree_logits(tiny.make_model(family, attention, **wide), "blocks", calls)
    assert not calls


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("sampled", [False, True])
def test_texts_of_ragged_batches(family: str, sampled: bool, calls: list[int]) -> None:
    model = model_of(family)
    prompts = [tiny.prompt(n, seed=n) for n in (5, 23, 12)]
    arguments: dict[str, Any] = {"max_new_tokens": 24, "pad_token_id": 0, "do_sample": sampled}
    plain = SpeculativeGenerator(model, drafter=None, packed_weights=None)
    fused = SpeculativeGenerator(
        model, drafter="token_recycling", node_budget=6, packed_weights="blocks"
    )
    fused._backend.direct = None
    seed = {"seed": 7} if sampled else {}
    calls.clear()
    expected = plain.generate(**tiny.padded(prompts), **arguments, **seed)
    assert not calls
    assert torch.equal(fused.generate(**tiny.padded(prompts), **arguments, **seed), expected)
    assert max(calls) > 3


def test_plain_and_tree_passes_give_the_same_bits() -> None:
    model = model_of("llama")
    arguments: dict[str, Any] = {
        "max_new_tokens": 30,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    prompt = tiny.ids(tiny.prompt(11))
    plain, trees = (
        SpeculativeGenerator(model, drafter=drafter, node_budget=7, packed_weights="blocks")
        for drafter in (None, "token_recycling")
    )
    one, other = plain.generate(prompt, **arguments), trees.generate(prompt, **arguments)
    assert trees.stats is not None
    assert trees.stats.block_efficiency > 1
    assert torch.equal(torch.cat(one.logits), torch.cat(other.logits))


def test_hooks_see_what_they_saw(calls: list[int]) -> None:
    model = model_of("llama")
    backend = probed(model, "blocks")
    backend.direct = None
    layer = model.model.layers[1]

    def shapes(module: nn.Module) -> list[tuple[int, ...]]:
        seen: list[tuple[int, ...]] = []
        hook = module.register_forward_hook(lambda *call: seen.append(tuple(call[2][0].shape)))
        calls.clear()
        cache = backend.new_cache(1, 8)
        with torch.no_grad():
            backend.forward(cache, tiny.ids([5]), torch.tensor([[0]]), torch.ones(1, 1, 1).bool())
        hook.remove()
        return seen

    assert shapes(layer) == [(1, 128)]
    assert len(calls) == 2
    assert shapes(layer.self_attn) == [(1, 1, 128)]
    assert len(calls) == 1  # the other layer
    assert shapes(layer.mlp.down_proj) == [(1, 128)]
    assert len(calls) == 1


@pytest.mark.parametrize("change", ["attention", "norm", "weight", "part", "adapter"])
def test_a_model_that_changes(change: str, calls: list[int]) -> None:
    """What is replaced or written to after the generator was made counts from the next call on."""
    model = model_of("llama")
    generator = SpeculativeGenerator(model, drafter=None, packed_weights="blocks")
    prompt = tiny.ids(tiny.prompt(8))
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    before = generator.generate(prompt, **arguments)
    layer = model.model.layers[0]
    with torch.no_grad():
        if change == "attention":
            own = layer.self_attn.forward
            layer.self_attn.forward = lambda *args, **kwargs: (
                -own(*args, **kwargs)[0],
                None,
            )
        elif change == "norm":
            layer.input_layernorm.weight = nn.Parameter(torch.randn(128))
        elif change == "weight":
            layer.mlp.down_proj.weight.mul_(-1)
        elif change == "part":
            layer.mlp = nn.Sequential(layer.mlp, nn.Tanh())
        else:
            layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj, nn.Tanh())
    expected = SpeculativeGenerator(model, drafter=None, packed_weights=None).generate(
        prompt, **arguments
    )
    calls.clear()
    assert torch.equal(generator.generate(prompt, **arguments), expected)
    assert not torch.equal(expected, before)


def test_names_alone_are_no_layer(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    own = LlamaDecoderLayer.forward

    def scaled(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return own(self, hidden_states, **kwargs) * 1.001

    monkeypatch.setattr(LlamaDecoderLayer, "forward", scaled)
    model = model_of("llama")
    expected = tree_logits(model, None, calls)
    torch.testing.assert_close(tree_logits(model, "blocks", calls), expected, rtol=1e-4, atol=1e-4)
    assert not calls


def test_training_goes_the_models_way(calls: list[int]) -> None:
    model = model_of("llama")
    backend = probed(model, "blocks")
    cache = backend.new_cache(1, 8)
    calls.clear()
    logits = backend.forward(cache, tiny.ids([5]), torch.tensor([[0]]), torch.ones(1, 1, 1).bool())
    assert logits.requires_grad
    assert not calls
