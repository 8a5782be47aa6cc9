"""The tree attention kernel inside models: the same text, in every layer, family by family."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from specdec import SpeculativeGenerator
from specdec.backend import tree_layers
from specdec.backend.model import TreeModel
from specdec.backend.probe import probed
from specdec.errors import ConfigError
from specdec.kernels.implementations import has_triton
from specdec.kernels.tree_mask import ancestor_matrix

NEW = 20
PROMPTS = [tiny.prompt(length, seed=i) for i, length in enumerate((23, 5, 30, 12))]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": tiny.PAD}
PARENTS = [-1, 0, 0, 2, 1, 3]
CASES = [
    pytest.param(family, attention, id=f"{family}-{attention}")
    for family, (_, _, attentions) in tiny.FAMILIES.items()
    for attention in attentions
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of the kernel, with the query's shape and the window of each."""
    seen: list[dict[str, Any]] = []
    kernel = tree_layers.tree_attention

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append({"shape": tuple(query.shape), **kwargs})
        return kernel(query, *args, **kwargs)

    monkeypatch.setattr(tree_layers, "tree_attention", counted)
    return seen


def scored(backend: TreeModel, lengths: tuple[int, ...]) -> Tensor:
    """Returns ``[B, N, V]`` logits of a tree behind prefixes of these lengths."""
    cache = backend.new_cache(len(lengths), 64)
    width = max(lengths)
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(4, tiny.VOCAB, (len(lengths), width), generator=generator)
    positions = torch.arange(width).expand(len(lengths), -1)
    backend.forward(cache, prompts, positions, None)
    cache.advance(lengths)
    nodes = len(PARENTS)
    ancestors = ancestor_matrix(PARENTS, nodes).expand(len(lengths), -1, -1)
    depths = ancestors.sum(-1) - 1
    tokens = torch.randint(4, tiny.VOCAB, (len(lengths), nodes), generator=generator)
    return backend.forward(cache, tokens, torch.tensor(lengths).unsqueeze(1) + depths, ancestors)


@pytest.mark.parametrize(("family", "attention"), CASES)
@torch.no_grad()
def test_logits_are_those_under_a_mask(family: str, attention: str, calls: list[Any]) -> None:
    """Prefixes are longer than the windows of the families that have one."""
    # eager attention takes its softmax in float32 whatever it is given, and so does a router
    exact = attention == "sdpa" and family != "mixtral"
    dtype = torch.float64 if exact else torch.float32
    model = tiny.make_model(family, attention=attention, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend = probed(model, packed_weights=None, tree_attention="torch")
    assert backend.tree_attention == "torch"
    expected = scored(probed(model, packed_weights=None), (31, 9, 20))
    calls.clear()
    within = {"rtol": 1e-10, "atol": 1e-12} if exact else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(scored(backend, (31, 9, 20)), expected, **within)
    assert len(calls) == len(backend.specs)


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_text_is_the_models_own(family: str, attention: str, calls: list[Any]) -> None:
    model = tiny.make_model(family, attention=attention, seed=1)
    generator = SpeculativeGenerator(model, tree_attention="torch", node_budget=12)
    calls.clear()
    output = generator.generate(**tiny.padded(PROMPTS), **GREEDY)
    assert len(calls) % len(generator._backend.specs) == 0
    assert {13} <= {call["shape"][2] for call in calls}
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(tiny.ids(prompt), **GREEDY)[0, len(prompt) :]
        assert output[row, -NEW:].tolist()[: len(alone)] == alone.tolist()


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_each_layer_has_its_window(family: str, calls: list[Any]) -> None:
    model = tiny.make_model(family)
    generator = SpeculativeGenerator(model, tree_attention="torch", node_budget=4)
    calls.clear()
    generator.generate(tiny.ids(PROMPTS[0]), **GREEDY)
    kinds = getattr(model.config, "layer_types", None)
    window = model.config.sliding_window
    expected = [
        window if kinds is None or kind == "sliding_attention" else None
        for kind in kinds or [None] * model.config.num_hidden_layers
    ]
    assert [call["sliding_window"] for call in calls[-len(expected) :]] == expected


def test_a_long_prompt_and_a_draft_that_goes_on_are_not_whole_trees(calls: list[Any]) -> None:
    model = tiny.make_model("llama", max_position_embeddings=512)
    prompt = tiny.prompt(300, seed=3)
    arguments = {**GREEDY, "max_new_tokens": 6}
    # recycling the prompt's rows makes it a pass under a mask of ours
    rows = tiny.padded([prompt, prompt[:280]])
    generator = SpeculativeGenerator(model, tree_attention="torch", node_budget=4)
    calls.clear()
    output = generator.generate(**rows, **arguments)
    assert max(call["shape"][2] for call in calls) <= 5
    expected = model.generate(tiny.ids(prompt), **arguments)
    assert torch.equal(output[:1], expected)


def test_a_layer_that_hands_over_more_keeps_its_own_attention() -> None:
    model = tiny.make_model("llama")
    mask = torch.zeros(1, 1, 2, 5)
    trees = tree_layers.TreePass.of(ancestor_matrix([-1, 0], 2)[None], [3], [(mask, None)], "torch")
    key, value = torch.randn(2, 1, 2, 5, 8).unbind(0)
    query = torch.randn(1, 4, 2, 8)
    layer = model.model.layers[0].self_attn
    given = {tree_layers.ARGUMENT: trees, "scaling": 0.5}

    def attend(own: str = "sdpa", m: Tensor = mask, **more: Any) -> Tensor:
        return tree_layers.tree_layer(layer, query, key, value, m, own=own, **given | more)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend()
    for message, more in (
        ("position_bias", {"position_bias": torch.zeros(1, 4, 2, 5)}),
        ("does not pass on arguments", {tree_layers.ARGUMENT: None}),
        ("mask of its own", {"m": mask.clone()}),
        ("training mode", {"dropout": 0.5}),
    ):
        with pytest.warns(UserWarning, match=message):
            attend(**more)
        with pytest.raises(tree_layers.NotServedError, match=message):
            attend("eager", **more)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_is_not_served_goes_back_to_its_own(
    monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    def wrong(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(query)

    monkeypatch.setattr(tree_layers, "tree_attention", wrong)
    model = tiny.make_model("llama", attention=attention)
    with pytest.warns(UserWarning, match=r"keeps its own attention.*relative error"):
        backend = probed(model, tree_attention="torch")
    assert backend.tree_attention is None
    assert model.config._attn_implementation == attention


@pytest.mark.kernels
@pytest.mark.skipif(not has_triton(), reason="needs the package triton")
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_triton_kernel_in_a_model(
    family: str, kernel_device: torch.device, calls: list[Any]
) -> None:
    model = tiny.make_model(family, head_dim=64).to(kernel_device)
    prompt = tiny.ids(PROMPTS[3]).to(kernel_device)
    arguments = {**GREEDY, "max_new_tokens": 6}
    generator = SpeculativeGenerator(model, tree_attention="triton", node_budget=4)
    calls.clear()
    assert torch.equal(generator.generate(prompt, **arguments), model.generate(prompt, **arguments))
    assert generator._backend.tree_attention == "triton"
    assert calls


def test_what_cannot_be_is_refused() -> None:
    model = tiny.make_model("llama")
    with pytest.raises(ConfigError, match="tree_attention must be None or one of"):
        SpeculativeGenerator(model, tree_attention="flash")
    if not has_triton():
        with pytest.raises(ImportError, match="pip install"):
            SpeculativeGenerator(model, tree_attention="triton")
