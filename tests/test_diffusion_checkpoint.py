"""Weights of diffusion drafters: both layouts read back, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusion_tiny import saved, tiny_net
from safetensors.torch import load_file, save_file

from specdec.drafters.diffusion_checkpoint import read_diffusion, save_diffusion
from specdec.errors import StateError

# what the authors of DFlash publish, apart from the layers
DFLASH = {
    "fc.weight",
    "hidden_norm.weight",
    "norm.weight",
    *(
        f"layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "self_attn.q_norm",
            "self_attn.k_norm",
            "input_layernorm",
            "post_attention_layernorm",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model("llama")


def published(folder: Path, target: Any, **changes: Any) -> Path:
    """Writes a folder as DFlash's authors do: no target, no heads, a token for a mask."""
    saved(folder, target, sample_from_anchor=False, mask_token_id=2, qk_norm=True, block_size=5)
    config = json.loads((folder / "config.json").read_text())
    for name in ("specdec_drafter", "version", "target", "recipe", "sample_from_anchor"):
        config.pop(name)
    config.pop("draft_vocab_size")
    config["num_target_layers"] = 2
    config["layer_types"] = ["full_attention"] * 2
    config["dflash_config"] = {"mask_token_id": 2, "target_layer_ids": [0, 1]} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"markov_rank": 4, "confidence": True, "reads_last": True, "vocabulary": [90, 3, 17]},
        {"mask_token_id": 2, "sample_from_anchor": False, "final_logit_softcapping": 30.0},
    ],
)
def test_what_is_written_is_read(model: Any, tmp_path: Path, overrides: dict[str, Any]) -> None:
    loaded = read_diffusion(saved(tmp_path, model, **overrides), model)
    vocabulary = overrides.pop("vocabulary", None)
    size = {} if vocabulary is None else {"draft_vocab_size": len(vocabulary)}
    net = tiny_net(model, **overrides, **size)
    assert loaded.config == net.config
    torch.testing.assert_close(dict(loaded.net.state_dict()), dict(net.state_dict()))
    ids = None if loaded.vocabulary is None else loaded.vocabulary.tolist()
    assert ids == vocabulary


def test_a_published_folder(model: Any, tmp_path: Path) -> None:
    folder = published(tmp_path, model)
    assert set(load_file(folder / "model.safetensors")) == DFLASH
    loaded = read_diffusion(folder, model)
    assert loaded.config.num_predicted == 4
    assert not loaded.config.sample_from_anchor
    assert loaded.config.mask_token_id == 2
    net = tiny_net(model, sample_from_anchor=False, mask_token_id=2, qk_norm=True, block_size=5)
    torch.testing.assert_close(dict(loaded.net.state_dict()), dict(net.state_dict()))
    save_diffusion(tmp_path / "own", model, loaded.net, None, {}, dtype=torch.float32)
    again = read_diffusion(tmp_path / "own", model)
    assert again.config == loaded.config
    torch.testing.assert_close(dict(again.net.state_dict()), dict(net.state_dict()))


def test_a_block_size_beside_the_mask(model: Any, tmp_path: Path) -> None:
    folder = published(tmp_path, model, block_size=7)
    config = json.loads((folder / "config.json").read_text())
    del config["block_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert read_diffusion(folder, model).config.block_size == 7


def test_a_markov_table_over_the_targets_vocabulary(model: Any, tmp_path: Path) -> None:
    """DSpark's has a row for each of the target's tokens, ours for those that can be drafted."""
    folder = saved(tmp_path, model, vocabulary=[5, 9, 40], markov_rank=4)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["markov_head.markov_w1.weight"] = torch.arange(tiny.VOCAB * 4.0).view(-1, 4)
    save_file(tensors, path)
    table = read_diffusion(folder, model).net.markov_head.markov_w1.weight
    assert table[:, 0].tolist() == [20.0, 36.0, 160.0]


def test_of_another_target(model: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, model)
    with pytest.raises(StateError, match="train one for it"):
        read_diffusion(folder, tiny.make_model("llama", seed=1))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"hidden_size": 64}, "of width 32, this LlamaForCausalLM has 64"),
        ({"num_hidden_layers": 1}, r"layers \[0, 1\]; this LlamaForCausalLM has 1"),
    ],
)
def test_a_published_folder_for_another_target(
    target: dict[str, Any], message: str, model: Any, tmp_path: Path
) -> None:
    folder = published(tmp_path, model)
    with pytest.raises(StateError, match=message):
        read_diffusion(folder, tiny.make_model("llama", **target))


def test_a_mask_that_the_target_does_not_have(model: Any, tmp_path: Path) -> None:
    folder = published(tmp_path, model, mask_token_id=5000)
    with pytest.raises(StateError, match="tokens up to 5000; the target's vocabulary has 96"):
        read_diffusion(folder, model)


def edited(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def configured(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return edit


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (edited(lambda t: t["fc.weight"].fill_(torch.nan)), "fc.weight holds NaN"),
    "vocabulary": (edited(lambda t: t["d2t"].add_(90)), "made for another tokenizer"),
    "features": (
        edited(lambda t: t.update({"fc.weight": torch.zeros(32, 96)})),
        r"differ in fc.weight \[32, 64\], fc.weight \[32, 96\]",
    ),
    "more": (edited(lambda t: t.update({"lm_head.weight": torch.zeros(2)})), "lm_head.weight"),
    "less": (edited(lambda t: t.update(norm=t.pop("norm.weight"))), r"norm.weight \[32\]"),
    "incomplete": (configured(dflash_config={}), "config.json is incomplete: 'target_layer_ids'"),
    "rope": (configured(rope_parameters={"rope_type": "yarn"}), "yarn.* not supported"),
    "window": (configured(layer_types=["sliding_attention"]), "sliding window are not supported"),
    "another": (configured(specdec_drafter="student"), "'student', not 'diffusion'"),
    "none": (lambda folder: (folder / "config.json").write_text("{}"), "neither"),
    "damaged": (lambda folder: (folder / "config.json").write_text("{"), "damaged"),
    "missing": (lambda folder: (folder / "config.json").unlink(), "no trained drafter"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_refused(name: str, model: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, model, vocabulary=[5, 9, 40])
    change, message = BROKEN[name]
    change(folder)
    with pytest.raises(StateError, match=message):
        read_diffusion(folder, model)
