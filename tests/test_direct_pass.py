"""A pass past the model's own code: the same bits, and the model's way wherever it is looked at."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from specdec import SpeculativeGenerator, target
from specdec.backend.direct_pass import DirectPass
from specdec.backend.model import TreeModel
from specdec.backend.probe import probed
from specdec.drafters import EarlyExit
from specdec.kernels.decoder_layer import why_not_native
from specdec.top_tokens import top_tokens
from specdec.trees.tree import DraftTree

pytestmark = [
    pytest.mark.skipif(why_not_native() is not None, reason=f"no native code: {why_not_native()}"),
    pytest.mark.usefixtures("small_layers_count"),
]
WIDE = {"head_dim": 32, "hidden_size": 128}
SERVED = ["llama", "qwen2", "qwen3", "mistral", "qwen3_all_window"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of each direct pass."""
    seen: list[tuple[int, ...]] = []
    run = DirectPass.run

    def counted(self: DirectPass, cache: Any, tokens: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(tokens.shape))
        return run(self, cache, tokens, *rest)

    monkeypatch.setattr(DirectPass, "run", counted)
    return seen


def backend_of(family: str = "llama", **overrides: Any) -> TreeModel:
    return probed(tiny.make_model(family, **WIDE, **overrides), "blocks")


def one_token(backend: TreeModel) -> Tensor:
    """Returns the logits of a pass over a token, which goes by a mask."""
    cache = backend.new_cache(1, 8)
    with torch.no_grad():
        return backend.forward(
            cache, tiny.ids([5]), torch.tensor([[0]]), torch.ones(1, 1, 1).bool()
        )


def test_the_likeliest_tokens_come_with_the_pass() -> None:
    """Of trees of unlike sizes, each its own; none where there are fewer logits than are wanted."""
    backend = backend_of()
    trees = [
        DraftTree.from_lists(list(range(5, 5 + size)), [-1, *range(size - 1)]) for size in (1, 4, 7)
    ]
    cache = backend.new_cache(3, 16)
    own = target.TargetModel(backend, cache)
    with torch.no_grad():
        own.prefill([tiny.prompt(n, seed=n) for n in (3, 6, 4)])
        for top_k in (1, 5, 64):
            scores = own.score(trees, top_k=top_k)
            assert scores.decoded.top is not None
            expected = top_tokens(scores.of(trees), top_k)
            for mine, theirs in zip(scores.top_tokens(trees, 0), expected, strict=True):
                assert mine is not None
                assert torch.equal(mine.ids, theirs.ids)
                assert torch.equal(mine.logits, theirs.logits)
                assert mine.choices == theirs.choices
        scores = own.score(trees, top_k=65)
        assert scores.decoded.top is None
        assert scores.top_tokens(trees, 0) == [None] * 3
        assert [len(top.ids) for top in scores.top_tokens(trees, 5) if top] == [1, 4, 7]


@pytest.mark.parametrize("drafter", [None, "trigram"])
def test_nothing_is_selected_behind_a_greedy_pass(
    drafter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = SpeculativeGenerator(
        tiny.make_model("llama", **WIDE), drafter=drafter, packed_weights="blocks"
    )
    prompt, arguments = tiny.ids(tiny.prompt(8)), {"max_new_tokens": 12, "do_sample": False}
    expected = generator.generate(prompt, **arguments)

    def unwanted(*_: Any) -> None:
        raise AssertionError("selected twice")

    steps = generator.trace(prompt, **arguments)
    next(steps)  # of the prompt, which takes its argmax by itself
    monkeypatch.setattr("specdec.target.top_tokens", unwanted)
    monkeypatch.setattr("specdec.drafters.scored_nodes.top_tokens", unwanted)
    monkeypatch.setattr("specdec.sampling.argmax_row", unwanted)
    assert [token for step in steps for token in step.tokens] == expected[0, 9:].tolist()


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("drafter", [None, "token_recycling"])
@pytest.mark.parametrize("sampled", [False, True])
def test_logits_are_those_of_the_models_own_code(
    family: str,
    drafter: str | None,
    sampled: bool,
    runs: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Same layers, same bits, in a ragged batch that runs far past the windows."""
    monkeypatch.setattr(target, "_DIRECT_TOKENS", 0)  # prompts run in other orders of sums
    arguments: dict[str, Any] = {
        **tiny.padded([tiny.prompt(n, seed=n) for n in (5, 23, 12)]),
        "max_new_tokens": 24,
        "do_sample": sampled,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    if sampled:
        arguments["seed"] = 7
    texts = []
    model = tiny.make_model(family, **WIDE)
    for direct in (True, False):
        generator = SpeculativeGenerator(
            model, drafter=drafter, node_budget=6, packed_weights="blocks"
        )
        if not direct:
            generator._backend.direct = None
        runs.clear()
        texts.append(generator.generate(**arguments))
        assert bool(runs) == direct
    assert torch.equal(texts[0].sequences, texts[1].sequences)
    assert torch.equal(torch.stack(texts[0].logits), torch.stack(texts[1].logits))


@pytest.mark.parametrize("family", ["mistral", "qwen3_all_window"])
def test_plain_passes_far_behind_a_window(family: str) -> None:
    model = tiny.make_model(family, **WIDE)
    prompt = tiny.ids(tiny.prompt(2 * tiny.WINDOW))
    arguments: dict[str, Any] = {"max_new_tokens": 3 * tiny.WINDOW, "do_sample": False}
    plain = SpeculativeGenerator(model, drafter=None, packed_weights="blocks")
    assert plain._backend.direct is not None
    expected = model.generate(prompt, pad_token_id=0, **arguments)
    assert torch.equal(plain.generate(prompt, **arguments), expected)


@pytest.mark.parametrize("family", ["qwen3_window", "gemma3_text", "phi3", "mixtral", "gpt2"])
def test_other_models_go_their_own_way(family: str, runs: list[tuple[int, ...]]) -> None:
    wide = {} if family == "gpt2" else WIDE
    backend = probed(tiny.make_model(family, **wide), "blocks")
    assert backend.direct is None
    one_token(backend)
    assert not runs


def test_the_models_code_is_not_run(runs: list[tuple[int, ...]]) -> None:
    """What is gained: none of its modules is called but those that are asked for by name."""
    backend = backend_of()
    called: list[str] = []
    own = nn.Module.__call__

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        called.append(type(self).__name__)
        return own(self, *args, **kwargs)

    nn.Module.__call__ = noted  # type: ignore[method-assign]
    try:
        one_token(backend)
    finally:
        nn.Module.__call__ = own  # type: ignore[method-assign]
    assert runs[-1] == (1, 1)
    assert not called


@pytest.mark.parametrize(
    "name", ["", "model", "model.embed_tokens", "model.layers.1", "model.norm", "lm_head"]
)
def test_hooks_see_what_they_saw(name: str, runs: list[tuple[int, ...]]) -> None:
    backend = backend_of()
    expected = one_token(backend)
    module = backend.model.get_submodule(name)
    for register in (module.register_forward_pre_hook, module.register_forward_hook):
        seen: list[nn.Module] = []
        hook = register(lambda module, *_: seen.append(module))  # noqa: B023
        runs.clear()
        assert torch.equal(one_token(backend), expected)
        assert seen == [module]
        assert not runs
        hook.remove()
    assert torch.equal(one_token(backend), expected)
    assert runs


def test_hooks_on_all_modules_see_what_they_saw(runs: list[tuple[int, ...]]) -> None:
    backend = backend_of()
    seen: set[str] = set()
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.add(type(module).__name__)
    )
    runs.clear()
    try:
        one_token(backend)
    finally:
        hook.remove()
    assert not runs
    assert {"LlamaModel", "LlamaDecoderLayer", "LlamaMLP", "Linear", "Embedding"} <= seen


def test_parts_that_want_to_be_told_more_go_their_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    own = LlamaRotaryEmbedding.forward

    def forward(self: Any, x: Tensor, *, position_ids: Tensor) -> Any:
        return own(self, x, position_ids)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)
    backend = backend_of()
    assert backend.direct is None
    assert torch.isfinite(one_token(backend)).all()


@pytest.mark.parametrize(
    "name", ["model", "model.embed_tokens", "model.layers.1", "model.rotary_emb", "model.norm"]
)
def test_a_forward_of_somebody_else_counts(name: str, runs: list[tuple[int, ...]]) -> None:
    backend = backend_of()
    module = backend.model.get_submodule(name)
    own, called = module.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return own(*args, **kwargs)

    module.forward = forward
    runs.clear()
    one_token(backend)
    assert called or name in ("model.layers.1", "model.norm")  # our own stand in for these
    assert not runs


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.norm", "lm_head", "model.layers"])
def test_a_replaced_part_counts(name: str, runs: list[tuple[int, ...]]) -> None:
    model = tiny.make_model("llama", **WIDE)
    generator = SpeculativeGenerator(model, drafter=None, packed_weights="blocks")
    other = tiny.make_model("llama", **WIDE, seed=3)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, other.get_submodule(name))
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    prompt = tiny.ids(tiny.prompt(8))
    plain = SpeculativeGenerator(model, drafter=None, packed_weights=None)
    expected = plain.generate(prompt, **arguments)
    runs.clear()
    assert torch.equal(generator.generate(prompt, **arguments), expected)
    assert not runs


def test_what_a_model_does_besides_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """MUTANT of a Llama: its parts have the names, its logits another scale."""
    from transformers import LlamaForCausalLM

    own = LlamaForCausalLM.forward

    @functools.wraps(own)
    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        output.logits = output.logits * 1.001
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    backend = backend_of()
    assert backend.packed is not None
    assert backend.packed.fused
    assert backend.direct is None


def test_within_a_call_hooks_are_noticed(runs: list[tuple[int, ...]]) -> None:
    backend = backend_of()
    cache = backend.new_cache(1, 8)

    @torch.no_grad()
    def one_more() -> None:
        backend.forward(cache, torch.tensor([[3]]), torch.tensor([[cache.lengths[0]]]), None)
        cache.advance([1])

    one_more()
    assert runs
    runs.clear()
    seen: list[nn.Module] = []
    norm = backend.model.model.norm
    hook = norm.register_forward_hook(lambda module, *_: seen.append(module))
    one_more()
    assert seen == [norm]
    assert not runs
    hook.remove()
    backend.new_cache(1, 8)
    one_more()
    assert runs


def assert_it_follows(change: Callable[[Any], None], runs: list[tuple[int, ...]]) -> None:
    """Changes a model between two calls, the second of which goes directly again."""
    model = tiny.make_model("llama", **WIDE)
    generator = SpeculativeGenerator(model, drafter=None, packed_weights="blocks")
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    prompt = tiny.ids(tiny.prompt(8))
    before = generator.generate(prompt, **arguments)
    change(model)
    plain = SpeculativeGenerator(model, drafter=None, packed_weights=None)
    expected = plain.generate(prompt, **arguments)
    runs.clear()
    assert torch.equal(generator.generate(prompt, **arguments), expected)
    assert runs
    assert not torch.equal(expected, before)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens", "model.norm", "model.layers.1.input_layernorm"]
)
@pytest.mark.parametrize("replaced", [False, True])
def test_parameters_that_moved_are_read_where_they_are(
    name: str, replaced: bool, runs: list[tuple[int, ...]]
) -> None:
    def change(model: Any) -> None:
        module = model.get_submodule(name)
        other = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0))
        if replaced:
            module.weight = nn.Parameter(other)
        else:
            module.weight.data = other

    assert_it_follows(change, runs)


def test_within_a_call_autocast_and_another_attention_are_noticed(
    runs: list[tuple[int, ...]],
) -> None:
    backend = backend_of()
    cache = backend.new_cache(1, 8)

    @torch.no_grad()
    def one_more() -> bool:
        runs.clear()
        backend.forward(cache, torch.tensor([[3]]), torch.tensor([[cache.lengths[0]]]), None)
        cache.advance([1])
        return bool(runs)

    assert one_more()
    with torch.autocast("cpu", torch.bfloat16):
        assert not one_more()
    backend.model.set_attn_implementation("eager")
    assert not one_more()
    backend.model.set_attn_implementation("sdpa")
    assert one_more()


def test_training_autocast_and_gradients_go_the_models_way(runs: list[tuple[int, ...]]) -> None:
    backend = backend_of()
    runs.clear()
    backend.model.train()
    one_token(backend)
    backend.model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        one_token(backend)
    backend.model.set_attn_implementation("eager")
    one_token(backend)
    backend.model.set_attn_implementation("sdpa")
    with torch.enable_grad():
        cache = backend.new_cache(1, 8)
        backend.forward(cache, tiny.ids([5]), torch.tensor([[0]]), torch.ones(1, 1, 1).bool())
    assert not runs
    one_token(backend)
    assert runs


def test_weights_written_to_count_from_the_next_call_on(runs: list[tuple[int, ...]]) -> None:
    def change(model: Any) -> None:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(-1)
            model.model.embed_tokens.weight.mul_(0.5)
            model.lm_head.weight.roll(1, 0)

    assert_it_follows(change, runs)


def test_a_models_first_layers_go_directly_too(runs: list[tuple[int, ...]]) -> None:
    """`early_exit` drafts by a cut model that shares layers, packed weights and the cache."""
    model = tiny.make_model("llama", **WIDE, num_hidden_layers=3)
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    prompt = tiny.ids(tiny.prompt(8))
    expected = SpeculativeGenerator(model, drafter=None, packed_weights=None).generate(
        prompt, **arguments
    )
    generator = SpeculativeGenerator(
        model, drafter=EarlyExit(2), node_budget=5, packed_weights="blocks"
    )
    own = generator.drafter._backend.direct
    assert own is not None
    assert len(own._decoder.layers.layers) == 2
    runs.clear()
    assert torch.equal(generator.generate(prompt, **arguments), expected)
    # the prompt, and in a step the target's pass, the root's and two levels at least
    assert len(runs) > 2 * generator.stats.target_calls


def test_what_could_not_be_tried_out_is_not_used(runs: list[tuple[int, ...]]) -> None:
    model = tiny.make_model("llama", **WIDE)
    hook = model.model.norm.register_forward_hook(lambda *_: None)
    backend = probed(model, "blocks")
    assert backend.direct is None
    hook.remove()
    one_token(backend)
    assert not runs


def test_closing_gives_its_memory_back() -> None:
    generator = SpeculativeGenerator(tiny.make_model("llama", **WIDE), packed_weights="blocks")
    assert generator.packed_weights is not None
    assert generator.packed_weights["direct"]
    generator.close()
    assert generator._backend.direct is None
    assert generator.packed_weights is None


@pytest.mark.parametrize("length", [40, 130, 256])
def test_prompts_run_in_parts(length: int, runs: list[tuple[int, ...]]) -> None:
    """A short prompt goes past the model's code too, in passes of as many rows as these take."""
    model = tiny.make_model("llama", **WIDE, max_position_embeddings=1024)
    arguments: dict[str, Any] = {
        "max_new_tokens": 9,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    prompts = tiny.padded([tiny.prompt(length, seed=n) for n in (1, 2)])
    expected = model.generate(**prompts, **arguments)
    generator = SpeculativeGenerator(model, drafter="suffix", packed_weights="blocks")
    runs.clear()
    got = generator.generate(**prompts, **arguments)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    parts = [shape for shape in runs if shape[1] > 16]
    assert sum(nodes for _, nodes in parts) in range(length - 16, length + 1)


@pytest.mark.parametrize(("in_blocks", "most"), [(False, 256), (True, 1024)])
def test_long_prompts_run_whole(in_blocks: bool, most: int, runs: list[tuple[int, ...]]) -> None:
    """How long depends on whether blocks are the faster product for many rows, too."""
    model = tiny.make_model("llama", **WIDE, max_position_embeddings=2048)
    generator = SpeculativeGenerator(model, drafter=None, packed_weights="blocks")
    layers = generator._backend.packed
    assert layers is not None
    for group in layers._groups:
        group.for_prompts = in_blocks
    for length, expected in ((most, {1, 128}), (most + 1, {1})):
        runs.clear()
        generator.generate(tiny.ids(tiny.prompt(length)), max_new_tokens=3, do_sample=False)
        assert {nodes for _, nodes in runs} == expected
