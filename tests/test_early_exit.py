"""The target's own first layers as drafter: its weights, its cache, its text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache

from specdec import SpeculativeGenerator
from specdec.backend.cut import first_layers
from specdec.drafters import EarlyExit, SmallModel
from specdec.errors import ConfigError, UnsupportedModelError
from specdec.trees import Chain, Static
from specdec.types import DraftContext, Draw, TargetInfo

NEW = 24
ROWS = [tiny.prompt(length, seed=length) for length in (5, 14, 9)]
WIDTH = max(map(len, ROWS))
THREE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_window": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "mistral": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "gpt2": {},
    "opt": {},
    "gpt_neox": {},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


def deep(family: str = "llama", **overrides: Any) -> Any:
    """Returns a model of three layers."""
    layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": 3}
    return tiny.make_model(family, seed=1, **layers, **THREE[family], **overrides)


@pytest.fixture(scope="module")
def model() -> Any:
    return deep()


# ---- the cut model ----


@pytest.mark.parametrize("family", THREE)
def test_the_first_layers_share_all_weights_and_leave_the_model_alone(family: str) -> None:
    model = deep(family)
    before = model.config.to_dict()
    shorter = first_layers(model, 2)
    weights = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in shorter.parameters()} < weights
    assert model.config.to_dict() == before
    assert model(tiny.ids(ROWS[0]), use_cache=True).past_key_values.layers[2].keys is not None
    assert len(shorter(tiny.ids(ROWS[0]), use_cache=True).past_key_values.layers) == 2


def test_the_cut_model_is_the_norm_and_the_head_on_a_layers_output(model: Any) -> None:
    ids = tiny.ids(ROWS[0])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
        expected = model.lm_head(model.model.norm(hidden[2]))
        torch.testing.assert_close(first_layers(model, 2)(ids).logits, expected)


def test_layers_that_cannot_be_found_are_refused() -> None:
    bloom = tiny.make_model("llama")
    bloom.model.blocks = bloom.model.layers
    del bloom.model.layers
    with pytest.raises(UnsupportedModelError, match=r"layers of LlamaForCausalLM are not found"):
        first_layers(bloom, 1)


def test_a_wrapped_forward_pass_is_refused() -> None:
    """A wrapper is bound to the whole model; copied along, it would run every layer."""
    for part in (lambda model: model, lambda model: model.model):
        model = deep()
        wrapped = part(model)
        wrapped.forward = wrapped.forward
        with pytest.raises(UnsupportedModelError, match="is wrapped"):
            SpeculativeGenerator(model, drafter="early_exit")


# ---- drafting ----


@pytest.mark.parametrize("family", THREE)
def test_the_text_is_the_targets_own(family: str) -> None:
    model = deep(family)
    batch = tiny.padded(ROWS)
    given: dict[str, Any] = {"max_new_tokens": NEW, "pad_token_id": tiny.PAD}
    generator = SpeculativeGenerator(model, drafter=EarlyExit(2), node_budget=6)
    output: Any = generator.generate(**batch, **given, do_sample=False)
    assert generator.stats.num_accepted > 3
    for row, prompt in enumerate(ROWS):
        alone = model.generate(tiny.ids(prompt), **given, do_sample=False)
        assert output[row, WIDTH:].tolist() == alone[0, len(prompt) :].tolist()
    plain = SpeculativeGenerator(model, drafter=None, verifier="coupled")
    sampled = {**batch, **given, "do_sample": True, "temperature": 0.8, "seed": [1, 2, 3]}
    assert torch.equal(generator.generate(**sampled), plain.generate(**sampled))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_the_targets_cache_serves_as_one_of_its_own_would(family: str) -> None:
    """The same trees as from the same layers behind a cache that they filled themselves."""
    model = deep(family, dtype=torch.float64)
    trees = []
    for drafter in (EarlyExit(2), SmallModel(first_layers(model, 2))):
        generator = SpeculativeGenerator(
            model, drafter=drafter, policy="best_first", verifier="coupled", node_budget=7
        )
        trace = generator.trace(
            **tiny.padded(ROWS), max_new_tokens=NEW, do_sample=True, top_p=0.9, seed=3
        )
        trees.append([(step.row, step.tree.token_list, step.tree.parent_list) for step in trace])
    assert trees[0] == trees[1]
    assert sum(len(tokens) > 4 for _, tokens, _ in trees[0]) > NEW


@pytest.mark.parametrize(
    ("policy", "verifier"),
    [
        (Chain(Draw.IID), "rejection"),
        (Static([(0,), (1,), (0, 0), (0, 1)], Draw.WOR), "traversal"),
        (Chain(Draw.COUPLED), "coupled"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_all_layers_are_always_right(temperature: float, policy: Any, verifier: str) -> None:
    model = deep(dtype=torch.float64)
    generator = SpeculativeGenerator(
        model, drafter=EarlyExit(3), policy=policy, verifier=verifier, node_budget=4
    )
    for step in generator.trace(
        **tiny.padded(ROWS),
        max_new_tokens=NEW,
        do_sample=True,
        temperature=temperature,
        top_p=0.9,
        seed=3,
    ):
        leaf = step.path[-1] if step.path else 0
        assert not step.tree.children[leaf] or step.next_token is None
    assert generator.stats.num_accepted > NEW


def test_rows_that_end_early_do_not_disturb_the_others(model: Any) -> None:
    plain = SpeculativeGenerator(model, drafter=None)
    free = plain.generate(**tiny.padded(ROWS), max_new_tokens=NEW, do_sample=False)
    ends = [int(free[0, WIDTH + 4]), int(free[2, WIDTH + 9])]
    given: dict[str, Any] = {
        **tiny.padded(ROWS),
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": ends,
        "pad_token_id": tiny.PAD,
    }
    drafter = EarlyExit(2)
    generator = SpeculativeGenerator(model, drafter=drafter)
    assert torch.equal(generator.generate(**given), plain.generate(**given))
    assert not drafter._laws


def test_a_conversation_goes_on_from_the_targets_cache(model: Any) -> None:
    generator = SpeculativeGenerator(model, drafter=EarlyExit(2))
    cache = DynamicCache(config=model.config)
    given = {"do_sample": False, "past_key_values": cache}
    first = generator.generate(tiny.ids(ROWS[1]), max_new_tokens=9, **given)
    longer = torch.cat([first, tiny.ids(ROWS[0])], dim=1)
    second = generator.generate(longer, max_new_tokens=NEW, **given)
    expected = model.generate(longer, max_new_tokens=NEW, do_sample=False)
    assert second.tolist() == expected.tolist()
    assert generator.stats.num_drafted > 0


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_text_up_to_the_end_of_the_positions(family: str) -> None:
    name = "n_positions" if family == "gpt2" else "max_position_embeddings"
    model = deep(family, **{name: 32})
    texts = [
        SpeculativeGenerator(model, drafter=drafter).generate(
            **tiny.padded(ROWS), max_new_tokens=40, do_sample=False, pad_token_id=tiny.PAD
        )
        for drafter in (EarlyExit(2), None)
    ]
    assert torch.equal(texts[0], texts[1])


def test_prompts_past_a_longropes_switch_are_not_drafted_for() -> None:
    """The target's text has other frequencies there from its first token on."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = tiny.make_model(
        "phi3",
        max_position_embeddings=512,
        original_max_position_embeddings=8,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )
    generator = SpeculativeGenerator(model, drafter=EarlyExit(1))
    prompt = tiny.ids(ROWS[1])
    output = generator.generate(prompt, max_new_tokens=NEW, do_sample=False)
    expected = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert output.tolist() == expected.tolist()
    assert generator.stats.num_drafted == 0


# ---- how it is asked for ----


def test_by_name_it_takes_a_quarter_of_the_layers() -> None:
    for layers, expected in ((2, 1), (9, 2)):
        model = tiny.make_model("llama", num_hidden_layers=layers)
        generator = SpeculativeGenerator(model, drafter="early_exit")
        drafter: Any = generator.drafter
        assert len(drafter._backend.specs) == expected
        generator.generate(tiny.ids(ROWS[0]), max_new_tokens=8, do_sample=False)
        assert generator.stats.settings["drafter"] == "early_exit"


@pytest.mark.parametrize("layers", [0, 4, -1])
def test_layers_that_the_target_has_not(model: Any, layers: int) -> None:
    with pytest.raises(ConfigError, match=rf"must be 1 to 3, the target's layers, got {layers}"):
        SpeculativeGenerator(model, drafter=EarlyExit(layers))


def test_it_serves_one_model(model: Any) -> None:
    drafter = EarlyExit(1)
    SpeculativeGenerator(model, drafter=drafter)
    SpeculativeGenerator(model, drafter=drafter)
    with pytest.raises(ConfigError, match="make one for each model"):
        SpeculativeGenerator(deep(), drafter=drafter)


def test_it_belongs_into_a_generator(model: Any) -> None:
    drafter = EarlyExit(1)
    with pytest.raises(ConfigError, match="give it to a SpeculativeGenerator"):
        drafter.attach(TargetInfo(tiny.VOCAB))
    drafter.attach(TargetInfo(tiny.VOCAB, model=model))
    law = drafter.law(DraftContext(0, ROWS[0], remaining=4))
    with pytest.raises(ConfigError, match="which this context does not have"):
        drafter.expand([(law, [0])])
