"""Every supported family writes what `model.generate` writes; others are refused by reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor

from specdec import SpeculativeGenerator
from specdec.errors import ConfigError, UnsupportedModelError

NEW = 24
PROMPTS = [tiny.prompt(length, seed=i) for i, length in enumerate((23, 5, 30, 12))]
WIDTH = max(map(len, PROMPTS))
POLICIES = ("best_first", "static", "chain")
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": tiny.PAD}
WINDOWED = [
    name
    for name, (_, arguments, _) in tiny.FAMILIES.items()
    if arguments.get("sliding_window") is not None
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@dataclass
class Case:
    """A family's model, the text it writes after each prompt by itself, and a generator."""

    model: Any
    alone: list[list[int]]
    generator: SpeculativeGenerator


def texts(output: Tensor, start: int = WIDTH) -> list[list[int]]:
    return output[:, start:].tolist()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((family, attention), id=f"{family}-{attention}")
        for family, (_, _, attentions) in tiny.FAMILIES.items()
        for attention in attentions
    ],
)
def case(request: pytest.FixtureRequest) -> Case:
    model = tiny.make_model(*request.param, seed=1)
    alone = [texts(model.generate(tiny.ids(row), **GREEDY), len(row))[0] for row in PROMPTS]
    return Case(model, alone, SpeculativeGenerator(model, node_budget=12))


@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_text_is_that_of_generate(case: Case, policy: str) -> None:
    """A drafter that is mostly right, so that long paths, straight and crooked, are kept."""
    for row, expected in zip(PROMPTS[:2], case.alone, strict=False):
        oracle = tiny.Oracle([expected], gap=7)
        generator = SpeculativeGenerator(case.model, drafter=oracle, policy=policy, node_budget=12)
        assert texts(generator.generate(tiny.ids(row), **GREEDY), len(row)) == [expected]
        assert generator.stats.num_accepted >= (4 if policy == "chain" else NEW // 2)


def test_left_padded_batch_is_that_of_generate_and_of_each_row_alone(case: Case) -> None:
    batch = tiny.padded(PROMPTS, "left")
    output = case.generator.generate(**batch, **GREEDY)
    assert texts(output) == case.alone
    assert output.tolist() == case.model.generate(**batch, **GREEDY).tolist()
    assert case.generator.stats.num_accepted > 0


def test_right_padded_batch_is_each_row_alone(case: Case) -> None:
    output = case.generator.generate(**tiny.padded(PROMPTS, "right"), **GREEDY)
    assert texts(output) == case.alone


def test_plain_decoding_in_a_batch_is_each_row_alone(case: Case) -> None:
    generator = SpeculativeGenerator(case.model, drafter=None)
    assert texts(generator.generate(**tiny.padded(PROMPTS, "left"), **GREEDY)) == case.alone


def test_texts_are_worth_comparing(case: Case) -> None:
    """A model that writes one word for ever, or the same after every prompt, would show nothing."""
    assert all(len(set(text)) > 2 for text in case.alone)
    assert len(set(map(tuple, case.alone))) == len(case.alone)


@pytest.mark.parametrize("family", WINDOWED)
def test_the_window_of_the_config_changes_the_text(family: str) -> None:
    """So that the identities above do compare windows."""
    attention = tiny.FAMILIES[family][2][0]
    narrow = tiny.make_model(family, attention)
    wide = tiny.make_model(family, attention, sliding_window=500)
    wide.load_state_dict(narrow.state_dict())
    row = tiny.ids(PROMPTS[0])
    assert narrow.generate(row, **GREEDY).tolist() != wide.generate(row, **GREEDY).tolist()


# ---- dtypes ----

FAMILY_ONCE = [
    pytest.param(family, attentions[0], id=family)
    for family, (_, _, attentions) in tiny.FAMILIES.items()
]


@pytest.mark.parametrize(("family", "attention"), FAMILY_ONCE)
def test_float64_text_is_that_of_generate(family: str, attention: str) -> None:
    model = tiny.make_model(family, attention, torch.float64, seed=1)
    if model.get_experts_implementation():
        model.set_experts_implementation("eager")  # torch's grouped product takes no float64
    generator = SpeculativeGenerator(model, node_budget=12)
    # one by one: transformers' own eager attention gives NaN in float64 where a batch is padded
    expected = [texts(model.generate(tiny.ids(row), **GREEDY), len(row))[0] for row in PROMPTS]
    assert texts(generator.generate(**tiny.padded(PROMPTS, "left"), **GREEDY)) == expected
    assert generator.stats.num_accepted > 0


# how far below the largest logit an emitted token may lie, as a share of the largest magnitude
ROUNDING = {torch.bfloat16: 0.12, torch.float16: 0.02}


@pytest.mark.parametrize("dtype", ROUNDING, ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("family", "attention"), FAMILY_ONCE)
def test_half_precision_tokens_are_argmaxes_up_to_rounding(
    family: str, attention: str, dtype: torch.dtype
) -> None:
    model = tiny.make_model(family, attention, dtype, seed=1)
    generator = SpeculativeGenerator(model, node_budget=8)
    output = generator.generate(**tiny.padded(PROMPTS[:2], "left"), **GREEDY)
    for prompt, row in zip(PROMPTS, texts(output, len(PROMPTS[0])), strict=False):
        whole = tiny.ids(prompt + row)
        with torch.no_grad():
            logits = model(whole).logits[0, len(prompt) - 1 : -1].float()
        emitted = logits.gather(1, torch.tensor(row).unsqueeze(1)).squeeze(1)
        lost = (logits.amax(dim=1) - emitted) / logits.abs().amax(dim=1)
        assert float(lost.max()) <= ROUNDING[dtype]
    assert generator.stats.num_accepted > 0


# ---- rotary positions ----

ROTARY = {
    "plain": {"rope_type": "default", "rope_theta": 100.0},
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_positions_go_on_past_the_configured_maximum(kind: str) -> None:
    model = tiny.make_model(
        "llama", max_position_embeddings=32, rope_parameters=ROTARY[kind], seed=1
    )
    _assert_identical(model, tiny.prompt(20), max_new_tokens=60)


def _dynamic_rope() -> Any:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    return tiny.make_model("llama", max_position_embeddings=32, rope_parameters=rope)


@pytest.mark.parametrize("make", [_dynamic_rope, lambda: _longrope()], ids=["dynamic", "longrope"])
def test_a_text_stops_where_the_meaning_of_positions_changes(make: Callable[[], Any]) -> None:
    """Draft nodes past the change would alter the logits of the tokens above them."""
    model, row = make(), tiny.prompt(20)
    generator = SpeculativeGenerator(model, node_budget=12)
    text = generator.generate(tiny.ids(row), do_sample=False, max_new_tokens=60)[0].tolist()
    expected = model.generate(tiny.ids(row), do_sample=False, max_new_tokens=60)[0].tolist()
    assert len(text) == 32 + 1
    assert text == expected[: len(text)]
    assert generator.stats.rows[0].finish_reason == "positions"


def test_a_prompt_past_the_change_is_refused_where_it_cannot_be_right() -> None:
    generator = SpeculativeGenerator(_dynamic_rope())
    with pytest.raises(ConfigError, match="50 tokens, the model has 32 dynamic positions"):
        generator.generate(tiny.ids(tiny.prompt(50)), max_new_tokens=5)
    generator = SpeculativeGenerator(_longrope())
    with pytest.raises(ConfigError, match="in separate calls"):
        generator.generate(**tiny.padded([tiny.prompt(50), tiny.prompt(5)]), max_new_tokens=5)


def _longrope() -> Any:
    return tiny.make_model(
        "phi3",
        sliding_window=None,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [4.0, 8.0, 2.0, 3.0],
            "rope_theta": 100.0,
            "original_max_position_embeddings": 32,
            "factor": 4.0,
        },
    )


def test_a_cache_from_before_the_change_is_refused_behind_it() -> None:
    """transformers runs such a text again from its beginning, with the other frequencies."""
    model = _longrope()
    generator = SpeculativeGenerator(model, node_budget=12)
    cache = transformers.DynamicCache(config=model.config)
    arguments: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
    first = generator.generate(tiny.ids(tiny.prompt(18)), past_key_values=cache, **arguments)
    whole = tiny.ids(first[0].tolist() + tiny.prompt(12, seed=4))
    with pytest.raises(ConfigError, match="leave past_key_values out"):
        generator.generate(whole, past_key_values=cache, **arguments)
    assert generator.generate(whole, **arguments).tolist() == (
        model.generate(whole, **arguments).tolist()
    )


@pytest.mark.parametrize("make", [_dynamic_rope, lambda: _longrope()], ids=["dynamic", "longrope"])
def test_padding_past_the_change_does_not_bring_it_about(make: Callable[[], Any]) -> None:
    model = make()
    generator = SpeculativeGenerator(model, node_budget=12)
    cache = transformers.DynamicCache(config=model.config)
    batch = tiny.padded([tiny.prompt(20), tiny.prompt(3)])
    first = generator.generate(
        **batch, past_key_values=cache, do_sample=False, max_new_tokens=6, pad_token_id=tiny.PAD
    )
    more = tiny.padded([tiny.prompt(2, seed=5), tiny.prompt(18, seed=6)], "right")
    ids = torch.cat([first, more["input_ids"]], dim=1)
    ones = torch.ones(2, 6, dtype=torch.int64)
    mask = torch.cat([batch["attention_mask"], ones, more["attention_mask"]], dim=1)
    output = generator.generate(
        ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=4
    )
    for row in range(2):
        alone = ids[row][mask[row].bool()].unsqueeze(0)
        expected = model.generate(
            alone, attention_mask=torch.ones_like(alone), do_sample=False, max_new_tokens=4
        )
        assert texts(output, ids.shape[1])[row] == texts(expected, alone.shape[1])[0]


@pytest.mark.parametrize(("start", "new"), [(5, 20), (50, 40)], ids=["short", "long"])
def test_longrope_on_one_side_of_its_switch(start: int, new: int) -> None:
    _assert_identical(_longrope(), tiny.prompt(start), max_new_tokens=new)


def _assert_identical(model: Any, row: list[int], **arguments: Any) -> None:
    generator = SpeculativeGenerator(model, node_budget=12)
    expected = model.generate(tiny.ids(row), do_sample=False, **arguments).tolist()
    assert generator.generate(tiny.ids(row), do_sample=False, **arguments).tolist() == expected
    assert generator.stats.num_accepted > 0


# ---- placement ----


def _placed(name: str, folder: Any) -> Any:
    import accelerate

    model = tiny.make_model("llama", seed=1)
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    everywhere = dict.fromkeys([*parts, "model.rotary_emb"], "cpu")
    if name == "hooks on every module":
        return accelerate.dispatch_model(model, everywhere, main_device="cpu", force_hooks=True)
    if name == "a layer and the head on disk":
        there = everywhere | {"model.layers.0": "disk", "lm_head": "disk"}
        return accelerate.dispatch_model(model, there, main_device="cpu", offload_dir=folder)
    if name == "everything offloaded":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="auto")


@pytest.mark.parametrize(
    "name",
    [
        "hooks on every module",
        "a layer and the head on disk",
        "everything offloaded",
        "device_map auto",
    ],
)
def test_device_map(name: str, tmp_path: Any) -> None:
    model = _placed(name, tmp_path)
    whole = tiny.make_model("llama", seed=1)
    generator = SpeculativeGenerator(model, node_budget=12)
    batch = tiny.padded(PROMPTS, "left")
    expected = whole.generate(**batch, **GREEDY).tolist()
    assert generator.generate(**batch, **GREEDY).tolist() == expected
    assert generator.stats.num_accepted > 0


# ---- refusals ----

_SMALL = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

REFUSED = {
    "bloom": ("BloomConfig", _SMALL | {"n_head": 4}, "alibi"),
    "mpt": ("MptConfig", {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4}, "alibi"),
    "falcon with alibi": (
        "FalconConfig",
        _SMALL | {"num_attention_heads": 4, "alibi": True},
        "alibi",
    ),
    "mamba": ("MambaConfig", _SMALL | {"state_size": 4}, "recurrent"),
    "lfm2": (
        "Lfm2Config",
        _SMALL | _HEADS | {"layer_types": ["conv", "full_attention"]},
        "conv",
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        _SMALL
        | _HEADS
        | _EXPERTS
        | {
            "head_dim": 8,
            "shared_expert_intermediate_size": 48,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "linear_attention|recurrent",
    ),
    "llama4": (
        "Llama4TextConfig",
        _SMALL | _HEADS | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2},
        "chunked_attention",
    ),
    "gpt_neo with local layers": (
        "GPTNeoConfig",
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": tiny.WINDOW,
        },
        "local attention",
    ),
    "openai-gpt without a cache": (
        "OpenAIGPTConfig",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4},
        "keys and values",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_take_trees_is_refused_with_the_reason(family: str) -> None:
    name, arguments, reason = REFUSED[family]
    config = getattr(transformers, name)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(UnsupportedModelError, match=reason):
        SpeculativeGenerator(model.eval())


def test_gpt_neo_without_local_layers_is_served() -> None:
    config = transformers.GPTNeoConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global"], 2]],
        max_position_embeddings=256,
        initializer_range=0.35,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    _assert_identical(model.eval(), tiny.prompt(20), max_new_tokens=30)


def test_an_encoder_decoder_model_is_refused_by_name() -> None:
    config = transformers.T5Config(
        vocab_size=tiny.VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        SpeculativeGenerator(model)


def test_another_attention_implementation_is_refused_by_name() -> None:
    model = tiny.make_model("llama", "flex_attention")
    with pytest.raises(UnsupportedModelError, match=r"flex_attention.*sdpa"):
        SpeculativeGenerator(model)


def test_a_model_in_training_mode_with_dropout_is_refused_with_the_remedy() -> None:
    model = tiny.make_model("llama", attention_dropout=0.5).train()
    with pytest.raises(UnsupportedModelError, match=r"model\.eval\(\)"):
        SpeculativeGenerator(model)
