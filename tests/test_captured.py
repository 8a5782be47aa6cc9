"""Captured passes: the same logits, caches and texts as passes that run as they are.

A tape (tests/tape.py) stands for the CUDA graph: it freezes what a graph would freeze.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from tape import Tape
from torch import Tensor, nn

from specdec import SpeculativeGenerator
from specdec.backend import captured as captured_module
from specdec.backend.capture_check import captured_passes
from specdec.backend.captured import CapturedPasses, bucket
from specdec.backend.model import TreeModel
from specdec.backend.probe import probed
from specdec.backend.recorders import Recording
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.errors import ConfigError
from specdec.target import Scores, TargetModel
from specdec.trees.tree import DraftTree
from specdec.types import DrafterNeeds

NEW = 24
PROMPTS = [tiny.prompt(length, seed=i) for i, length in enumerate((23, 5, 30, 12))]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": tiny.PAD}
SAMPLED: dict[str, Any] = {**GREEDY, "do_sample": True, "top_k": 0, "temperature": 0.8}
CASES = [
    pytest.param(family, attention, id=f"{family}-{attention}")
    for family, (_, _, attentions) in tiny.FAMILIES.items()
    for attention in attentions
]
# sums over further slots, which weigh nothing, may be added up in other blocks
CLOSE = {torch.float64: 1e-12, torch.float32: 5e-6}  # relative to the largest entry


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture(autouse=True)
def _tapes() -> Iterator[None]:
    Tape.made.clear()
    yield
    Tape.made.clear()


def capturing(generator: SpeculativeGenerator, *, required: bool = True) -> CapturedPasses:
    """Has a generator run its passes from tapes."""
    backend = generator._backend
    backend.captured = captured_passes(backend, True if required else "auto", Tape)
    assert backend.captured is not None
    Tape.made.clear()
    return backend.captured


def num_replays() -> int:
    return sum(tape.replayed for tape in Tape.made)


def num_recorded() -> int:
    return sum(tape.recorded for tape in Tape.made)


def some_trees(sizes: list[int], generator: torch.Generator) -> list[DraftTree]:
    trees = []
    for size in sizes:
        tokens = torch.randint(4, tiny.VOCAB, (size,), generator=generator).tolist()
        above = [int(torch.randint(node, (), generator=generator)) for node in range(1, size)]
        trees.append(DraftTree.from_lists(tokens, [-1, *above]))
    return trees


def deepest_path(tree: DraftTree) -> list[int]:
    node = max(range(len(tree)), key=lambda n: tree.depth_list[n])
    path = []
    while node > 0:
        path.append(node)
        node = tree.parent_list[node]
    return path[::-1]


def run_steps(target: TargetModel, num_steps: int = 8) -> list[tuple[list[int], Scores]]:
    """Scores random trees of several sizes behind ragged prompts; at the end of fewer rows.

    Returns:
        For each step the sizes of the trees, and what was computed.
    """
    generator = torch.Generator().manual_seed(3)
    found = []
    with torch.no_grad():
        target.prefill(PROMPTS[:3])
        for step in range(num_steps):
            sizes = [4 - step % 2, 1 + step % 3, 5][: len(target.lengths)]
            trees = some_trees(sizes, generator)
            found.append((sizes, target.score(trees)))
            target.commit([deepest_path(tree) for tree in trees])
            if step == num_steps - 4:
                target.cache.retire(0)
    return found


def plain_target(backend: TreeModel, needs: DrafterNeeds | None = None) -> TargetModel:
    return TargetModel(backend, backend.new_cache(3, 128), needs)


def captured_target(
    backend: TreeModel, needs: DrafterNeeds | None = None, rows: int = 3
) -> TargetModel:
    passes = CapturedPasses(backend, Tape, required=True)
    return TargetModel(backend, passes.new_cache(rows, 128), needs, passes)


def assert_close(found: Tensor, expected: Tensor) -> None:
    bound = CLOSE[expected.dtype] * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def assert_same_steps(
    expected: list[tuple[list[int], Scores]], found: list[tuple[list[int], Scores]]
) -> None:
    for (sizes, own), (_, other) in zip(expected, found, strict=True):
        assert own.logits.shape == other.logits.shape
        for row, size in enumerate(sizes):  # rows past a tree's end mean nothing
            assert_close(other.logits[row, :size], own.logits[row, :size])
            if own.features is not None:
                assert other.features is not None
                assert_close(other.features[row, :size], own.features[row, :size])


@pytest.mark.parametrize(
    ("nodes", "padded"),
    [(1, 1), (2, 2), (3, 3), (4, 5), (6, 9), (17, 17), (33, 33), (34, 65), (66, 128), (129, 129)],
)
def test_buckets_are_a_root_and_a_power_of_two(nodes: int, padded: int) -> None:
    """But 128, the most that the tree attention kernel takes."""
    assert bucket(nodes) == padded


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_logits_and_caches_are_those_of_plain_passes(family: str, attention: str) -> None:
    exact = attention == "sdpa" and family != "mixtral"  # others compute partly in float32
    dtype = torch.float64 if exact else torch.float32
    backend = probed(tiny.make_model(family, attention, dtype=dtype), packed_weights=None)
    needs = DrafterNeeds(layers=(0, -1))
    plain, taped = plain_target(backend, needs), captured_target(backend, needs)
    assert_same_steps(run_steps(plain), run_steps(taped))
    assert num_replays() >= 2
    assert plain.lengths == taped.lengths
    assert len(plain.lengths) == 2
    for place, length in enumerate([*plain.lengths, len(PROMPTS[0])]):  # the retired row too
        both = (target.cache.row_states(place, length) for target in (plain, taped))
        for own, other in zip(*both, strict=True):
            for mine, theirs in zip(other, own, strict=True):
                assert_close(mine, theirs)


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_greedy_text_is_the_models_own(family: str, attention: str) -> None:
    """Ragged rows that go well past the windows; some end early and leave the batch."""
    model = tiny.make_model(family, attention=attention, seed=1)
    generator = SpeculativeGenerator(model, node_budget=8)
    capturing(generator)
    free = [model.generate(tiny.ids(p), **GREEDY)[0, len(p) :].tolist() for p in PROMPTS]
    eos = free[1][NEW // 3]
    output = generator.generate(**tiny.padded(PROMPTS), **GREEDY, eos_token_id=eos)
    assert num_replays() > 3
    for row, text in enumerate(free):
        expected = text[: text.index(eos) + 1] if eos in text else text
        assert output[row, len(PROMPTS[2]) :].tolist()[: len(expected)] == expected


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma2"])
@pytest.mark.parametrize("drafter", [None, "token_recycling", "early_exit"])
def test_coupled_text_is_that_of_plain_passes(family: str, drafter: str | None) -> None:
    attention = "eager" if family == "gemma2" else "sdpa"
    model = tiny.make_model(family, attention=attention, seed=2)
    generator = SpeculativeGenerator(model, drafter=drafter, node_budget=6)
    batch = tiny.padded(PROMPTS)
    expected = generator.generate(**batch, **SAMPLED, seed=11)
    capturing(generator)
    assert torch.equal(generator.generate(**batch, **SAMPLED, seed=11), expected)
    assert num_replays() > 3
    # the cache of the last call, and what was recorded for it
    before = num_recorded()
    assert torch.equal(generator.generate(**batch, **SAMPLED, seed=11), expected)
    if drafter is None:
        assert num_recorded() == before


def test_what_a_step_kept_is_not_written_over() -> None:
    """Drafters, `trace` and output_scores hold logits for as long as they like."""
    backend = probed(tiny.make_model())
    target = captured_target(backend, DrafterNeeds(layers=(0,)), rows=1)
    with torch.no_grad():
        target.prefill([PROMPTS[0]])
        kept: list[tuple[Scores, Tensor, Tensor]] = []
        for token in range(4, 10):
            scores = target.score([DraftTree.root_only(token)])
            assert scores.features is not None
            kept.append((scores, scores.logits.clone(), scores.features.clone()))
            target.commit([[]])
    assert num_replays() == 4
    for scores, logits, features in kept:
        assert torch.equal(scores.logits, logits)
        assert scores.features is not None
        assert torch.equal(scores.features, features)


class Watched(CapturedPasses):
    """Spoils everything that a pass is to write anew, and notes where it is."""

    places: list[tuple[int, int]]

    def run(self, cache: Any, tokens: Tensor, *args: Any) -> Any:
        shape = (tokens.shape[0], tokens.shape[1])
        if shape in self._inputs:
            self._inputs[shape].all.fill_(-77)
        for layer in cache.layers:
            for row, length in enumerate(cache.lengths):
                layer.keys[row, :, length:] = 1e3
                layer.values[row, :, length:] = -1e3
        outputs = super().run(cache, tokens, *args)
        self.places.append((self._inputs[shape].all.data_ptr(), outputs[0].data_ptr()))
        return outputs


def test_buffers_are_written_in_place_and_padding_does_not_leak() -> None:
    backend = probed(tiny.make_model("mistral", dtype=torch.float64), packed_weights=None)
    passes = Watched(backend, Tape, required=True)
    passes.places = []
    target = TargetModel(backend, passes.new_cache(3, 128), None, passes)
    expected = run_steps(plain_target(backend))
    assert_same_steps(expected, run_steps(target))
    replays = num_replays()
    assert replays >= 2
    # the inputs of a shape stay where they are, and so does what a recording puts out
    assert len({place for place, _ in passes.places[:5]}) == 1
    assert len(set(passes.places[2:5])) == 1


@pytest.mark.parametrize("part", ["lengths", "tokens", "positions", "words"])
def test_mutants_that_forget_an_input_are_caught(
    monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Each of the four inputs, kept as it was at the first pass, changes the logits."""
    fill = captured_module._Inputs.fill
    first: dict[int, Tensor] = {}
    place = ["lengths", "tokens", "positions", "words"].index(part)

    def stale(inputs: Any, *parts: Tensor) -> None:
        kept = list(parts)
        kept[place] = first.setdefault(id(inputs), parts[place])
        fill(inputs, *kept)

    backend = probed(tiny.make_model("llama", dtype=torch.float64), packed_weights=None)
    expected = run_steps(plain_target(backend))
    monkeypatch.setattr(captured_module._Inputs, "fill", stale)
    with pytest.raises(AssertionError):
        assert_same_steps(expected, run_steps(captured_target(backend)))


def test_slots_that_hold_nan_do_not_leak_through_the_kernel() -> None:
    """The kernel reads lengths on a CPU, which no graph could do: here the pass is just run."""
    model = tiny.make_model("llama", dtype=torch.float64)
    backend = probed(model, None, "torch")
    expected = run_steps(plain_target(backend))

    class Rerun:
        def record(self, run: Callable[[], Any]) -> Recording:
            kept = run()

            def replay() -> None:
                for old, new in zip(kept, run(), strict=True):
                    if new is not None:
                        old.copy_(new)

            return Recording(kept, replay)

    class Poisoned(CapturedPasses):
        def run(self, cache: Any, *args: Any) -> Any:
            for layer in cache.layers:
                for row, length in enumerate(cache.lengths):
                    layer.keys[row, :, length:] = torch.nan
                    layer.values[row, :, length:] = torch.nan
            return super().run(cache, *args)

    passes = Poisoned(backend, Rerun, required=True)
    target = TargetModel(backend, passes.new_cache(3, 128), None, passes)
    assert_same_steps(expected, run_steps(target))


def test_a_cache_that_grows_is_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_module, "_ROOM", 1)
    monkeypatch.setattr("specdec.session._INITIAL_ROOM", 6)
    model = tiny.make_model("llama", seed=1)
    generator = SpeculativeGenerator(model, drafter=None)
    passes = capturing(generator)
    output = generator.generate(tiny.ids(PROMPTS[0]), **GREEDY)
    assert torch.equal(output, model.generate(tiny.ids(PROMPTS[0]), **GREEDY))
    assert passes._cache is not None
    assert passes._cache.generation > 0
    assert len(Tape.made) == passes._cache.generation + 1
    assert num_recorded() > 1
    # and so it is if the cache has grown behind the last recorded pass of a call
    passes._cache._grow(2 * passes._cache.capacity)
    before = num_recorded()
    assert torch.equal(generator.generate(tiny.ids(PROMPTS[0]), **GREEDY), output)
    assert num_recorded() == before + 1


def test_more_slots_than_a_recording_attends_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_module, "_FEWEST_SLOTS", 8)
    model = tiny.make_model("llama", seed=1)
    generator = SpeculativeGenerator(model, drafter=None)
    capturing(generator)
    output = generator.generate(tiny.ids(PROMPTS[1]), **GREEDY)
    assert torch.equal(output, model.generate(tiny.ids(PROMPTS[1]), **GREEDY))
    assert num_recorded() == 3  # 8, 16 and 32 slots


class Adapter(nn.Module):
    """As LoRA layers are: switched and scaled by plain attributes."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.active = ["one"]
        self.scaling = {"one": 0.5, "two": -0.5}

    def forward(self, states: Tensor) -> Tensor:
        output: Tensor = self.base(states)
        return output * (1 + sum(self.scaling[name] for name in self.active))


def load_adapter(model: Any) -> None:
    model.model.layers[1].mlp.down_proj = Adapter(model.model.layers[1].mlp.down_proj)


def switch_adapter(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.active = ["two"]


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(-1)


def other_storage(model: Any) -> None:
    weight = model.model.layers[0].self_attn.o_proj.weight
    weight.data = weight.data.flip(0).clone()


def test_a_model_that_has_changed_is_recorded_anew() -> None:
    model = tiny.make_model("llama", seed=1)
    generator = SpeculativeGenerator(model, drafter=None, packed_weights=None)
    capturing(generator)
    texts = []
    for change in (None, load_adapter, switch_adapter, in_place, other_storage):
        if change is not None:
            change(model)
        before = num_recorded()
        output = generator.generate(tiny.ids(PROMPTS[0]), **GREEDY)
        assert torch.equal(output, model.generate(tiny.ids(PROMPTS[0]), **GREEDY))
        assert num_recorded() > before
        texts.append(output.tolist())
        # and no second time
        before = num_recorded()
        generator.generate(tiny.ids(PROMPTS[0]), **GREEDY)
        assert num_recorded() == before
    assert all(text not in texts[:place] for place, text in enumerate(texts))


def test_calls_of_other_sizes_share_or_replace_the_cache() -> None:
    model = tiny.make_model("llama", seed=1)
    generator = SpeculativeGenerator(model, node_budget=4)
    passes = capturing(generator)
    caches = []
    for rows in (PROMPTS[:3], PROMPTS[1:2], PROMPTS, PROMPTS[:3]):
        output = generator.generate(**tiny.padded(rows), **GREEDY)
        for row, prompt in enumerate(rows):
            alone = model.generate(tiny.ids(prompt), **GREEDY)[0, -NEW:]
            assert torch.equal(output[row, -NEW:], alone)
        caches.append(passes._cache)
    assert caches[0] is caches[1]
    assert caches[1] is not caches[2]
    assert caches[2] is caches[3]
    generator.close()
    assert passes._cache is None
    assert passes.num_recordings == 0
    generator.generate(tiny.ids(PROMPTS[0]), **GREEDY)


def test_a_conversation_goes_on_from_a_cache_of_the_users() -> None:
    """What the user was given must not be the memory that the next call writes to."""
    model = tiny.make_model("llama", seed=1)
    generator = SpeculativeGenerator(model, node_budget=4)
    capturing(generator)
    first = generator.generate(
        tiny.ids(PROMPTS[0]), **GREEDY, return_dict_in_generate=True, use_cache=True
    )
    generator.generate(tiny.ids(PROMPTS[2]), **GREEDY)
    text = torch.cat([first.sequences, tiny.ids([7, 8, 9])], dim=1)
    output = generator.generate(text, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(output, model.generate(text, **GREEDY))


def test_inference_mode_and_no_grad_share_recordings() -> None:
    model = tiny.make_model("llama", seed=1)
    generator = SpeculativeGenerator(model, drafter=None)
    capturing(generator)
    expected = model.generate(tiny.ids(PROMPTS[0]), **GREEDY)
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            assert torch.equal(generator.generate(tiny.ids(PROMPTS[0]), **GREEDY), expected)
    assert num_recorded() == 1


def test_calls_that_cannot_be_served() -> None:
    """Automatic, they run as they are; asked for, they are refused with the reason."""
    model = tiny.make_model("llama", seed=1)
    generator = SpeculativeGenerator(model, drafter=None)
    expected = generator.generate(tiny.ids(PROMPTS[0]), **GREEDY)
    seen: list[int] = []

    def serve(required: bool) -> Tensor:
        capturing(generator, required=required)
        output = generator.generate(tiny.ids(PROMPTS[0]), **GREEDY)
        assert isinstance(output, Tensor)
        return output

    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ConfigError, match="autocast"):
        serve(True)
    layer = model.model.layers[1]
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(ConfigError, match=r"compile=True .* hook on model\.layers\.1 of the model"):
        serve(True)
    assert torch.equal(serve(False), expected)
    assert len(seen) >= NEW
    assert num_replays() == 0
    handle.remove()
    # transformers leaves hooks of its own behind, which do nothing in other passes
    model(tiny.ids(PROMPTS[0]), output_hidden_states=True)
    assert torch.equal(serve(True), expected)
    assert num_replays() > 0


def test_slots_behind_the_nodes_are_not_served(caplog: pytest.LogCaptureFixture) -> None:
    passes = CapturedPasses(probed(tiny.make_model()), Tape, required=False)
    with caplog.at_level("INFO", logger="specdec"):
        assert not passes.serves(probes=True)
        assert not passes.serves(probes=True)
    assert [record.message for record in caplog.records] == [
        "passes are not captured: the drafter reads slots behind the nodes"
    ]
    with pytest.raises(ConfigError, match="slots behind the nodes"):
        CapturedPasses(probed(tiny.make_model()), Tape, required=True).serves(probes=True)


@pytest.mark.parametrize("choice", ["auto", True])
def test_a_drafter_of_such_slots(monkeypatch: pytest.MonkeyPatch, choice: bool | str) -> None:
    """Refused when the generator is made, or served by passes as they are."""
    monkeypatch.setattr(
        "specdec.generator.captured_passes",
        lambda backend, choice: captured_passes(backend, choice, Tape),
    )
    model = tiny.make_model("llama", seed=1)

    class Slots(PromptLookup):
        needs = DrafterNeeds(probes=torch.randn(2, 32))

    if choice is True:
        with pytest.raises(ConfigError, match="the drafter reads slots behind the nodes"):
            SpeculativeGenerator(model, drafter=Slots(), compile=choice)
        return
    generator = SpeculativeGenerator(model, drafter=Slots(), compile=choice, node_budget=4)
    Tape.made.clear()
    output = generator.generate(tiny.ids(PROMPTS[0]), **GREEDY)
    assert torch.equal(output, model.generate(tiny.ids(PROMPTS[0]), **GREEDY))
    assert num_replays() == 0


@pytest.mark.parametrize("required", [False, True])
def test_memory_for_recordings_may_be_full(required: bool) -> None:
    class Full(Tape):
        def record(self, run: Callable[[], Any]) -> Recording:
            raise torch.OutOfMemoryError("on purpose")

    model = tiny.make_model("llama", seed=1)
    generator = SpeculativeGenerator(model, drafter=None)
    generator._backend.captured = CapturedPasses(generator._backend, Full, required=required)
    if required:
        with pytest.raises(torch.OutOfMemoryError):
            generator.generate(tiny.ids(PROMPTS[0]), **GREEDY)
        return
    output = generator.generate(tiny.ids(PROMPTS[0]), **GREEDY)
    assert torch.equal(output, model.generate(tiny.ids(PROMPTS[0]), **GREEDY))


def test_only_so_many_recordings_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_module, "_MOST_RECORDINGS", 2)
    backend = probed(tiny.make_model())
    passes = CapturedPasses(backend, Tape, required=True)
    target = TargetModel(backend, passes.new_cache(1, 128), None, passes)
    with torch.no_grad():
        target.prefill([PROMPTS[0]])
        generator = torch.Generator().manual_seed(0)
        for size in [1, 2, 3] * 4 + [3] * 3:
            target.score(some_trees([size], generator))
    assert passes.num_recordings == 2
    assert num_recorded() > 3
