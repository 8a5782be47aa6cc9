"""Linear layers run from packed weights: the same products, and the model as it was found."""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.nn.functional import linear

from specdec import SpeculativeGenerator
from specdec.backend import linear_formats, packed
from specdec.backend.linear_formats import FORMATS, pack_fp16
from specdec.backend.packed import PackedLinears, packed_linears
from specdec.errors import ConfigError
from specdec.kernels.block_linear import MOST_ROWS, why_not_native

pytestmark = pytest.mark.usefixtures("small_layers_count")


@pytest.fixture(params=sorted(FORMATS))
def form(request: pytest.FixtureRequest) -> str:
    if FORMATS[request.param](torch.eye(16), None) is None:
        pytest.skip(f"this torch has no {request.param}")
    return request.param


def own_forwards(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def half(model: nn.Module) -> nn.Module:
    """Returns the model with weights that float16 can hold."""
    for weight in model.parameters():
        weight.data = weight.data.to(torch.float16).float()
    return model


@pytest.mark.parametrize("shape", [(1,), (3,), (17,), (2, 5), (1, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_the_same(form: str, shape: tuple[int, ...], bias: bool) -> None:
    layer = half(nn.Linear(48, 80, bias=bias)).requires_grad_(False)
    run = FORMATS[form](layer.weight, layer.bias).run
    rows = torch.randn(*shape, 48)
    torch.testing.assert_close(run(rows), layer(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("weight", "fits"),
    [
        (torch.randn(32, 32).to(torch.float16).float(), True),
        ((0.02 * torch.randn(512, 512)).to(torch.bfloat16).float(), True),
        (torch.randn(32, 32), False),
        (torch.full((32, 32), 70000.0), False),
        (torch.full((32, 32), torch.nan), False),
    ],
)
def test_float16_takes_only_weights_it_can_hold(weight: torch.Tensor, fits: bool) -> None:
    if pack_fp16(torch.eye(16), None) is None:
        pytest.skip("this torch has no FBGEMM")
    assert (pack_fp16(weight, None) is not None) == fits


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt_neox", "opt"])
def test_text_is_the_models_and_the_model_is_left_as_it_was(family: str, form: str) -> None:
    model = half(tiny.make_model(family))
    prompts = tiny.padded([tiny.prompt(9), tiny.prompt(14, 1)])
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tiny.PAD}
    expected = model.generate(**prompts, **settings)
    generator = SpeculativeGenerator(model, node_budget=5, packed_weights=form)
    [layout] = generator.packed_weights["layers"]
    assert layout.startswith(form)
    assert generator.generate(**prompts, **settings).tolist() == expected.tolist()
    assert own_forwards(model) == []
    assert model.generate(**prompts, **settings).tolist() == expected.tolist()


def test_layers_that_share_their_input_become_one_product() -> None:
    model = tiny.make_model("llama")
    layers = PackedLinears(model, "onednn")
    names = {module: name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    joined = {tuple(names[member] for member in group.members) for group in layers._groups}
    assert joined == {
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
        ("lm_head",),
    }


class Changing(nn.Module):
    """Hands two layers one tensor, changed in between; a third gets an equal tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.table = nn.Embedding(8, 16)

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        rows = self.table(input_ids)
        first = self.first(rows)
        rows += 1
        return first + self.second(rows) + self.third(rows.clone())


def test_a_tensor_that_was_written_to_is_another() -> None:
    model = Changing()
    layers = packed_linears(model, "onednn")
    assert layers is not None
    with torch.no_grad():
        expected = model(torch.arange(8))
        with layers.active():
            assert len(own_forwards(model)) == 3
            torch.testing.assert_close(model(torch.arange(8)), expected)


def test_other_inputs_than_the_shared_one_are_right_too() -> None:
    model = tiny.make_model("llama")
    layers = packed_linears(model, "onednn")
    attention = model.model.layers[0].self_attn
    rows, others = torch.randn(2, 3, 32)
    expected = attention.k_proj(others)
    with torch.no_grad(), layers.active():
        attention.q_proj(rows)
        assert torch.equal(attention.k_proj(others), expected)


def test_gradients_flow_through_the_models_own_layers() -> None:
    model = tiny.make_model("llama")
    layers = packed_linears(model, "onednn")
    with layers.active():
        model(input_ids=tiny.ids(tiny.prompt(5))).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_changed_weights_are_noticed() -> None:
    model = tiny.make_model("llama")
    other = tiny.make_model("llama", seed=1)
    settings = {"max_new_tokens": 8, "do_sample": False}
    generator = SpeculativeGenerator(model, packed_weights="onednn")
    generator.generate(tiny.ids(tiny.prompt(9)), **settings)
    model.load_state_dict(other.state_dict())
    expected = other.generate(tiny.ids(tiny.prompt(9)), **settings)
    assert generator.generate(tiny.ids(tiny.prompt(9)), **settings).tolist() == expected.tolist()
    model.lm_head.weight = nn.Parameter(-other.lm_head.weight.detach())
    expected = model.generate(tiny.ids(tiny.prompt(9)), **settings)
    assert generator.generate(tiny.ids(tiny.prompt(9)), **settings).tolist() == expected.tolist()


def test_a_model_can_be_copied_and_used_while_a_stream_is_open() -> None:
    model = tiny.make_model("llama")
    expected = model.generate(tiny.ids(tiny.prompt(9)), max_new_tokens=8, do_sample=False)
    generator = SpeculativeGenerator(model, packed_weights="onednn")
    stream = generator.stream(tiny.ids(tiny.prompt(9)), max_new_tokens=8, do_sample=False)
    next(stream)
    assert own_forwards(model) == []
    twin = copy.deepcopy(model)
    assert twin.generate(tiny.ids(tiny.prompt(9)), max_new_tokens=8, do_sample=False).equal(
        expected
    )


def test_generators_of_one_model_share_the_copies_and_free_them() -> None:
    model = tiny.make_model("llama")
    first, second = packed_linears(model, "onednn"), packed_linears(model, "onednn")
    assert first is second
    with first.active(), second.active():
        pass
    assert own_forwards(model) == []
    del first, second
    gc.collect()
    assert packed._known[model]() is None


def test_offloaded_layers_and_other_dtypes_are_left_alone() -> None:
    assert packed_linears(tiny.make_model("llama", dtype=torch.float64)) is None
    model = tiny.make_model("llama")
    model.lm_head.forward = model.lm_head.forward
    layers = packed_linears(model, "onednn")
    assert model.lm_head not in [member for group in layers._groups for member in group.members]


def test_memory_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 1000

    monkeypatch.setattr(packed.psutil, "virtual_memory", Memory)
    model = tiny.make_model("llama")
    assert packed_linears(model, "auto") is None
    assert packed_linears(model, "onednn") is not None


def test_the_choice_can_be_made_by_hand_or_left() -> None:
    model = tiny.make_model("llama")
    assert SpeculativeGenerator(model, packed_weights=None).packed_weights is None
    choice = SpeculativeGenerator(model).packed_weights
    assert choice is not None
    assert sum(choice["layers"].values()) == 2 * 7 + 1
    with pytest.raises(ConfigError, match="packed_weights must be 'auto', None, or one of"):
        SpeculativeGenerator(model, packed_weights="int8")


def test_a_layout_that_is_asked_for_is_had_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "mkl", lambda weight, bias: None)
    with pytest.raises(ConfigError, match="packed_weights='mkl' cannot be had here"):
        SpeculativeGenerator(tiny.make_model("llama"), packed_weights="mkl")
    monkeypatch.setattr(linear_formats, "why_not_native", lambda: "no C compiler")
    with pytest.raises(ConfigError, match="packed_weights='blocks' cannot be had here: no C comp"):
        SpeculativeGenerator(tiny.make_model("llama"), packed_weights="blocks")
    SpeculativeGenerator(tiny.make_model("llama"), packed_weights="auto")


@pytest.mark.parametrize("faster", [False, True])
def test_prompts_run_in_blocks_where_that_is_faster(
    faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decided by a measurement for each shape, whose outcome is given here."""
    if why_not_native() is not None:
        pytest.skip("no C compiler")
    own = packed._seconds

    def seconds(runs: Sequence[Any], rows: torch.Tensor) -> float:
        own(runs, rows)
        return float((runs[0].func is linear) == faster)

    monkeypatch.setattr(packed, "_seconds", seconds)
    model = tiny.make_model("llama")
    layers = packed_linears(model, "blocks")
    assert layers is not None
    asked = []
    for group in layers._groups:
        run = group.packed.run
        group.packed = group.packed._replace(
            run=lambda rows, run=run: asked.append(rows.shape) or run(rows)
        )
    prompt = tiny.ids(tiny.prompt(MOST_ROWS + 5))
    with torch.no_grad():
        expected = model(prompt).logits
        with layers.active():
            torch.testing.assert_close(model(prompt).logits, expected, rtol=1e-4, atol=1e-4)
    assert bool(asked) == faster


def test_many_rows_go_through_the_layers_own_weights() -> None:
    """Layers that share their input too: all of them, or the parts of one product would mix."""
    model = tiny.make_model("llama")
    layers = packed_linears(model, "onednn")
    assert layers is not None
    for group in layers._groups:
        group.packed, group.for_prompts = group.packed._replace(most_rows=4, run=None), False
    prompt = tiny.ids(tiny.prompt(5))
    with torch.no_grad():
        expected = model(prompt).logits
        with layers.active():
            torch.testing.assert_close(model(prompt).logits, expected, rtol=1e-4, atol=1e-4)
            with pytest.raises(TypeError, match="not callable"):
                model(prompt[:, :4])
