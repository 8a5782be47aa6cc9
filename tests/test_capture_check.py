"""Which models' passes may be recorded: found by experiment, refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from tape import Tape
from torch import Tensor, nn

from specdec import SpeculativeGenerator
from specdec.backend.cache_name import cache_in
from specdec.backend.capture_check import HostReads, captured_passes
from specdec.backend.model_state import foreign_hook, model_state
from specdec.backend.probe import probed
from specdec.backend.recorders import Recording
from specdec.errors import ConfigError, UnsupportedModelError


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


VALUES = torch.tensor([3.0, 0.0, 2.0])


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda: VALUES.max().item(), "aten._local_scalar_dense"),
        (lambda: bool((VALUES > 1).any()), "aten._local_scalar_dense"),
        (lambda: VALUES.nonzero(), "aten.nonzero"),
        (lambda: VALUES[VALUES > 1], "aten.index"),
        (lambda: VALUES.clone().index_put_((VALUES > 1,), torch.ones(2)), "aten.index_put_"),
        (lambda: torch.masked_select(VALUES, VALUES > 1), "aten.masked_select"),
        (lambda: VALUES.unique(), "aten._unique2"),
        (lambda: VALUES.to("meta"), "aten._to_copy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_waits_for_the_host_is_seen(operation: Callable[[], Any], name: str) -> None:
    with HostReads() as reads:
        operation()
    assert reads.found == [name]


def test_what_stays_on_the_device_is_not() -> None:
    index = torch.tensor([0, 2])
    with HostReads() as reads:
        assert VALUES[index].shape == (2,)
        VALUES.clone()[index] = 1.0
        torch.where(VALUES > 1, VALUES, 0.0).masked_fill(VALUES > 2, 5.0)
        torch.topk(VALUES, 2)
        VALUES * torch.tensor(2.0)
    assert reads.found == []


class Wrapped(nn.Module):
    """A layer's module whose output goes through a function."""

    def __init__(self, base: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.base = base
        self.change = change

    def forward(self, states: Tensor) -> Tensor:
        return self.change(self.base(states))


def with_change(change: Callable[[Tensor], Tensor]) -> Any:
    model = tiny.make_model("llama")
    model.model.layers[0].mlp = Wrapped(model.model.layers[0].mlp, change)
    return model


def looks(states: Tensor) -> Tensor:
    return states if states.max().item() > -1e9 else -states


def test_a_model_that_looks_at_values_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    backend = probed(with_change(looks))
    message = r"LlamaForCausalLM reads values on the host inside its pass \(aten\._local_scalar"
    with pytest.raises(UnsupportedModelError, match=message):
        captured_passes(backend, True, Tape)
    with caplog.at_level("INFO", logger="specdec"):
        assert captured_passes(backend, "auto", Tape) is None
    assert "reads values on the host" in caplog.text


def test_a_model_that_fixes_something_on_the_host_is_refused() -> None:
    """A scale that goes by the cache's length: right in every pass, wrong when it is repeated."""
    model = tiny.make_model("llama")
    backend = probed(model)
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        length = cache_in(kwargs).get_seq_length()
        output, weights = forward(*args, **kwargs)
        return output * (1.0 + length), weights

    attention.forward = scaled
    with pytest.raises(UnsupportedModelError, match="it fixes something on the host"):
        captured_passes(backend, True, Tape)
    assert captured_passes(backend, "auto", Tape) is None


def test_a_recording_that_fails_is_a_reason() -> None:
    class Failing(Tape):
        def record(self, run: Callable[[], Any]) -> Recording:
            raise RuntimeError("operation not permitted when stream is capturing")

    backend = probed(tiny.make_model("llama"))
    with pytest.raises(UnsupportedModelError, match="failed: operation not permitted"):
        captured_passes(backend, True, Failing)
    assert captured_passes(backend, "auto", Failing) is None


@pytest.mark.usefixtures("small_layers_count")
def test_packed_weights_are_in_no_recording() -> None:
    """Their C code is no operation of torch's: repeated passes would leave it out."""
    backend = probed(tiny.make_model("llama"), "onednn")
    with pytest.raises(UnsupportedModelError, match="runs from packed weights"):
        captured_passes(backend, True, Tape)
    assert captured_passes(backend, "auto", Tape) is None


def test_frequencies_that_follow_the_length_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    backend = probed(tiny.make_model("llama", rope_parameters=rope))
    with pytest.raises(UnsupportedModelError, match="has dynamic rope"):
        captured_passes(backend, True, Tape)


def test_without_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    model = tiny.make_model("llama")
    with caplog.at_level("INFO", logger="specdec"):
        assert not SpeculativeGenerator(model).captured
    assert "passes are not captured: the model is on cpu" in caplog.text
    assert not SpeculativeGenerator(model, compile=False).captured
    with pytest.raises(ConfigError, match=r"compile=True records .* and the model is on cpu"):
        SpeculativeGenerator(model, compile=True)


@pytest.mark.parametrize("value", ["on", None, 1])
def test_another_value_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"compile must be True, False or 'auto', got"):
        SpeculativeGenerator(tiny.make_model("llama"), compile=value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("tree_attention", [None, "auto"])
def test_graphs_write_the_models_own_text(family: str, tree_attention: str | None) -> None:
    model = tiny.make_model(family, seed=1, dtype=torch.float32).to("cuda")
    generator = SpeculativeGenerator(
        model, node_budget=8, compile=True, tree_attention=tree_attention
    )
    batch = {k: v.to("cuda") for k, v in tiny.padded([tiny.prompt(20), tiny.prompt(9, 1)]).items()}
    arguments = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": tiny.PAD}
    for _ in range(2):
        output = generator.generate(**batch, **arguments)
        assert torch.equal(output, model.generate(**batch, **arguments))
    passes = generator._backend.captured
    assert passes is not None
    assert passes.num_recordings > 0


# what recordings depend on


def test_the_state_of_a_model() -> None:
    model = tiny.make_model("llama")
    state = model_state(model)
    assert model_state(model) == state
    with torch.no_grad():
        model(tiny.ids(tiny.prompt(5)))
    assert model_state(model) == state
    layer = model.model.layers[1]
    changes: list[Callable[[], object]] = [
        lambda: torch.no_grad()(layer.mlp.down_proj.weight.mul_)(2),
        lambda: setattr(layer.mlp.down_proj, "weight", nn.Parameter(torch.zeros(32, 48))),
        lambda: setattr(layer.mlp, "down_proj", nn.Linear(48, 32)),
        lambda: setattr(layer.mlp, "scaling", {"default": 1.0}),
        lambda: layer.mlp.scaling.update(default=2.0),
        lambda: setattr(layer.self_attn, "forward", lambda *_: None),
    ]
    for change in changes:
        change()
        assert model_state(model) != state
        state = model_state(model)


def test_hooks_of_others_are_found() -> None:
    model = tiny.make_model("llama")
    assert foreign_hook(model) is None
    handle = model.model.norm.register_forward_pre_hook(lambda *_: None)
    assert foreign_hook(model) == "model.norm"
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert foreign_hook(model) == "every module"
    handle.remove()
    assert foreign_hook(model) is None
