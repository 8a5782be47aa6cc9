"""The cache of trees against a plain model of it, and its exchange with HuggingFace's caches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from specdec import SpeculativeGenerator
from specdec.backend.cache import LayerSpec, TreeCache
from specdec.backend.model import TreeModel, causal_ancestors
from specdec.backend.probe import probe
from specdec.errors import ConfigError
from specdec.kernels.tree_mask import ancestor_matrix


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


# ---- the cache by itself ----

CPU = torch.device("cpu")
NARROW = LayerSpec(2, 4, 4, torch.float32, CPU)
WIDE = LayerSpec(3, 8, 6, torch.float32, CPU)  # values narrower than keys, as in MLA
SPECS = [NARROW, WIDE, NARROW]


def states(spec: LayerSpec, layer: int, marks: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Returns keys and values of new nodes, every number telling its layer and node."""
    marked = torch.tensor(marks) + 0.25 * layer
    heads = torch.arange(spec.num_heads).view(1, -1, 1, 1) * 1000.0
    keys = (marked.view(len(marks), 1, -1, 1) + heads).repeat(1, 1, 1, spec.key_dim)
    values = -(marked.view(len(marks), 1, -1, 1) + heads).repeat(1, 1, 1, spec.value_dim)
    return keys, values


@dataclass
class Model:
    """What the cache should hold: for each row the marks of its committed nodes."""

    cache: TreeCache
    rows: list[list[float]]
    retired: list[list[float]] = field(default_factory=list)
    pending: list[list[float]] = field(default_factory=list)
    next_mark: float = 1.0

    def run_pass(self, count: int) -> None:
        marks = []
        for _ in self.rows:
            marks.append([self.next_mark + i for i in range(count)])
            self.next_mark += count
        self.cache.begin_pass(count)
        self.pending = self.pending or [[] for _ in self.rows]
        for earlier, new in zip(self.pending, marks, strict=True):
            earlier += new
        for index, spec in enumerate(SPECS):
            seen = self.cache.layers[index].update(*states(spec, index, marks))
            for row, committed in enumerate(self.rows):
                expected = states(spec, index, [committed + self.pending[row]])
                for actual, wanted in zip(seen, expected, strict=True):
                    length = len(committed) + len(self.pending[row])
                    assert torch.equal(actual[row, :, :length], wanted[0])
        assert self.cache.layers[0].get_mask_sizes(count) == (self.cache.visible, 0)
        self.cache.end_pass()

    def commit(self, paths: list[list[int]]) -> None:
        self.cache.commit(paths)
        for row, path in enumerate(paths):
            self.rows[row] += [self.pending[row][node] for node in path]
        self.pending = []
        self.check()

    def retire(self, row: int) -> None:
        self.cache.retire(row)
        self.rows[row], self.rows[-1] = self.rows[-1], self.rows[row]
        self.retired.insert(0, self.rows.pop())
        self.check()

    def check(self) -> None:
        assert self.cache.lengths == [len(row) for row in self.rows]
        for place, marks in enumerate(self.rows + self.retired):
            for index, (keys, values) in enumerate(self.cache.row_states(place, len(marks))):
                expected = states(SPECS[index], index, [marks])
                assert torch.equal(keys, expected[0][0])
                assert torch.equal(values, expected[1][0])


def new_model(rows: int, capacity: int) -> Model:
    return Model(TreeCache(SPECS, rows, capacity), [[] for _ in range(rows)])


def test_a_chain_is_committed_as_it_stands() -> None:
    model = new_model(2, 16)
    model.run_pass(4)
    model.commit([[0, 1, 2], [0]])
    assert model.cache.lengths == [3, 1]


def test_a_branching_path_is_moved_together_whatever_the_other_rows_keep() -> None:
    model = new_model(3, 32)
    model.run_pass(6)
    model.commit([[0, 2, 5], [0, 1, 2, 3], [0, 4]])
    model.run_pass(5)
    model.commit([[0], [0, 3, 4], [0, 1]])
    assert model.cache.lengths == [4, 7, 4]


def test_rejected_nodes_are_overwritten_by_the_next_pass() -> None:
    model = new_model(1, 16)
    model.run_pass(6)
    model.commit([[0]])
    model.run_pass(2)
    model.commit([[0, 1]])
    assert model.cache.lengths == [3]


def test_a_tree_may_come_in_several_passes() -> None:
    model = new_model(2, 8)
    model.run_pass(1)
    model.commit([[0], [0]])
    model.run_pass(2)
    model.run_pass(3)
    model.run_pass(1)
    model.commit([[0, 1, 4, 5], [0, 3]])
    assert model.cache.lengths == [5, 3]


def test_growth_keeps_what_is_committed_pending_and_retired() -> None:
    model = new_model(3, 4)
    model.run_pass(4)
    model.commit([[0, 2], [0, 1, 2, 3], [0, 3]])
    model.retire(0)
    model.run_pass(3)
    model.run_pass(30)  # grows with nodes pending
    assert model.cache.capacity >= 37
    model.commit([[0, 1, 20], [0, 2, 32]])


def test_a_retired_row_swaps_places_with_the_last_active_one() -> None:
    model = new_model(3, 16)
    model.run_pass(3)
    model.commit([[0], [0, 1], [0, 1, 2]])
    model.retire(0)
    assert model.cache.lengths == [3, 2]
    assert model.cache.batch_size == 2
    assert model.cache.layers[0].keys.shape[0] == 2


@pytest.mark.parametrize("seed", range(8))
def test_any_history_leaves_what_was_committed(seed: int) -> None:
    rng = random.Random(seed)
    model = new_model(rng.randint(1, 4), rng.randint(1, 8))
    while model.rows and len(model.rows[0]) < 40:
        sizes = [rng.randint(1, 6) for _ in range(rng.randint(1, 3))]
        for size in sizes:
            model.run_pass(size)
        nodes = range(1, sum(sizes))
        paths = [[0, *sorted(rng.sample(nodes, rng.randint(0, len(nodes))))] for _ in model.rows]
        model.commit(paths)
        if rng.random() < 0.15:
            model.retire(rng.randrange(len(model.rows)))


def test_layers_of_different_shape_have_pools_of_their_own() -> None:
    cache = TreeCache(SPECS, 2, 10)
    assert cache.nbytes == 4 * 2 * 10 * (2 * 2 * (4 + 4) + 3 * (8 + 6))


# ---- the cache under a model ----


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_keys_after_crooked_paths_are_those_of_the_text_run_afresh(family: str) -> None:
    backend = TreeModel(tiny.make_model(family, dtype=torch.float64))
    probe(backend)
    rng = random.Random(5)
    rows = [tiny.prompt(9, seed=1), tiny.prompt(9, seed=2)]
    cache = backend.new_cache(2, 4)  # it must grow as well
    backend.forward(cache, torch.tensor(rows), torch.arange(9).repeat(2, 1), None)
    cache.advance([9, 9])
    for paths in ([[0, 2, 3], [0]], [[0, 1], [0, 2, 4]], [[0], [0, 1, 4]], [[0, 2, 4], [0, 2, 3]]):
        # node:      0   1  2  3  4
        parents = [[-1, 0, 0, 2, 2], [-1, 0, 0, 2, 2]]
        for row, path in enumerate(paths):
            if 1 in path and 4 in path:
                parents[row] = [-1, 0, 0, 2, 1]
        tokens = [[rng.randrange(3, tiny.VOCAB) for _ in range(5)] for _ in rows]
        depths = torch.tensor([[0, 1, 1, 2, 2]]).repeat(2, 1)
        ancestors = torch.stack([ancestor_matrix(parent, 5) for parent in parents])
        positions = torch.tensor(cache.lengths).unsqueeze(1) + depths
        backend.forward(cache, torch.tensor(tokens), positions, ancestors)
        cache.commit(paths)
        for row, path in enumerate(paths):
            rows[row] += [tokens[row][node] for node in path]
    assert cache.lengths == [len(row) for row in rows]
    for place, row in enumerate(rows):
        fresh = DynamicCache()  # without the config: full layers everywhere
        backend.model(torch.tensor([row]), past_key_values=fresh)
        for ours, theirs in zip(cache.row_states(place, len(row)), fresh.layers, strict=True):
            torch.testing.assert_close(ours[0], theirs.keys[0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(ours[1], theirs.values[0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_an_error_in_a_pass_leaves_the_committed_text() -> None:
    backend = TreeModel(tiny.make_model("llama"))
    probe(backend)
    cache = backend.new_cache(1, 32)
    backend.forward(cache, tiny.ids(tiny.prompt(6)), torch.arange(6).unsqueeze(0), None)
    cache.advance([6])
    with pytest.raises(IndexError):
        backend.forward(cache, torch.tensor([[10**6]]), torch.tensor([[6]]), causal_ancestors(1, 1))
    assert cache.lengths == [6]


# ---- turns of a conversation ----

# full attention everywhere; a window everywhere; some layers with a window; learned positions
CHAT = ["llama", "mistral", "gemma3_text", "gpt_oss", "gpt2"]
TURN = {"do_sample": False, "max_new_tokens": 16}


@pytest.fixture(scope="module", params=CHAT)
def chat(request: pytest.FixtureRequest) -> tuple[Any, SpeculativeGenerator]:
    model = tiny.make_model(request.param, tiny.FAMILIES[request.param][2][0], seed=1)
    return model, SpeculativeGenerator(model, node_budget=12)


Chat = tuple[Any, SpeculativeGenerator]
FIRST, SECOND, THIRD = tiny.prompt(19, seed=3), tiny.prompt(7, seed=4), tiny.prompt(5, seed=5)


def written_alone(model: Any, row: Sequence[int], **arguments: Any) -> list[int]:
    output: Tensor = model.generate(tiny.ids(row), **{**TURN, **arguments})
    return output[0, len(row) :].tolist()


def assert_holds(cache: Any, model: Any, text: Sequence[int]) -> None:
    """Asserts that a cache of one row is what the model makes of the text, as far as it is kept."""
    assert cache.get_seq_length() == len(text)
    fresh = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tiny.ids(text), past_key_values=fresh)
    for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
        assert type(ours) is type(theirs)
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", ["whole sequence", "new tokens only"])
def test_three_turns_through_one_cache(chat: Chat, given: str) -> None:
    model, generator = chat
    cache = DynamicCache(config=model.config)
    text: list[int] = []
    accepted = 0
    for turn in (FIRST, SECOND, THIRD):
        text += turn
        expected = written_alone(model, text)
        new, arguments = text, dict(TURN)
        if given == "new tokens only":
            new = text[cache.get_seq_length() :]
            arguments["attention_mask"] = torch.ones(1, len(text), dtype=torch.int64)
        output = generator.generate(tiny.ids(new), past_key_values=cache, **arguments)
        assert output[0].tolist() == new + expected
        text += expected
        accepted += generator.stats.num_accepted
        assert_holds(cache, model, text[:-1])
    assert accepted > 0


def test_new_tokens_without_a_mask_are_refused_with_both_ways_named() -> None:
    """transformers needs the mask to tell them from a whole sequence; it fails unintelligibly."""
    model = tiny.make_model("llama")
    cache = DynamicCache(config=model.config)
    generator = SpeculativeGenerator(model)
    generator.generate(tiny.ids(FIRST), past_key_values=cache, **TURN)
    with pytest.raises(ConfigError, match="whole sequence, or the new tokens"):
        generator.generate(tiny.ids(SECOND), past_key_values=cache, **TURN)


def test_our_cache_serves_generate_of_transformers(chat: Chat) -> None:
    model, generator = chat
    cache = DynamicCache(config=model.config)
    output = generator.generate(tiny.ids(FIRST), past_key_values=cache, **TURN)
    text = output[0].tolist() + SECOND
    expected = written_alone(model, text)
    output = model.generate(tiny.ids(text), past_key_values=cache, **TURN)
    assert output[0].tolist() == text + expected


def test_a_cache_of_transformers_serves_us(chat: Chat) -> None:
    model, generator = chat
    cache = DynamicCache(config=model.config)
    output = model.generate(tiny.ids(FIRST), past_key_values=cache, **TURN)
    text = output[0].tolist() + SECOND
    expected = written_alone(model, text)
    output = generator.generate(tiny.ids(text), past_key_values=cache, **TURN)
    assert output[0].tolist() == text + expected
    assert_holds(cache, model, (text + expected)[:-1])


def test_the_returned_cache_goes_on(chat: Chat) -> None:
    model, generator = chat
    first = generator.generate(tiny.ids(FIRST), return_dict_in_generate=True, **TURN)
    text = first.sequences[0].tolist()
    assert_holds(first.past_key_values, model, text[:-1])
    text += SECOND
    output = generator.generate(tiny.ids(text), past_key_values=first.past_key_values, **TURN)
    assert output[0].tolist() == text + written_alone(model, text)


def test_a_cache_made_without_the_config_is_taken_too(chat: Chat) -> None:
    """It keeps everything, in windowed layers as well, and still does afterwards."""
    model, generator = chat
    cache = DynamicCache()
    with torch.no_grad():
        model(tiny.ids(FIRST), past_key_values=cache)
    text = FIRST + SECOND
    output = generator.generate(tiny.ids(text), past_key_values=cache, **TURN)
    assert output[0].tolist() == text + written_alone(model, text)
    assert {layer.keys.shape[-2] for layer in cache.layers} == {output.shape[1] - 1}
    text = output[0].tolist() + THIRD
    expected = written_alone(model, text)
    assert model.generate(tiny.ids(text), past_key_values=cache, **TURN)[0].tolist() == (
        text + expected
    )


@pytest.mark.parametrize("order", ["ours first", "theirs first"])
def test_a_static_cache_goes_on(chat: Chat, order: str) -> None:
    model, generator = chat
    turns = [generator, model] if order == "ours first" else [model, generator]
    cache = StaticCache(config=model.config, max_cache_len=100)
    text = turns[0].generate(tiny.ids(FIRST), past_key_values=cache, **TURN)[0].tolist() + SECOND
    output = turns[1].generate(tiny.ids(text), past_key_values=cache, **TURN)
    assert output[0].tolist() == text + written_alone(model, text)


@pytest.mark.parametrize("given", ["whole sequence", "new tokens only"])
def test_a_left_padded_batch_goes_on(chat: Chat, given: str) -> None:
    model, generator = chat
    prompts = [FIRST, THIRD, SECOND]
    cache = DynamicCache(config=model.config)
    batch = tiny.padded(prompts, "left")
    first = generator.generate(**batch, past_key_values=cache, **TURN)
    assert cache.get_seq_length() == first.shape[1] - 1
    more = torch.tensor([[40, 41, 42], [50, 51, 52], [60, 61, 62]])
    ids = torch.cat([first, more], dim=1)
    width = batch["input_ids"].shape[1]
    mask = torch.cat(
        [batch["attention_mask"], torch.ones(3, ids.shape[1] - width, dtype=torch.int64)], dim=1
    )
    taken = 0 if given == "whole sequence" else cache.get_seq_length()
    output = generator.generate(ids[:, taken:], attention_mask=mask, past_key_values=cache, **TURN)
    for row in range(3):
        real = ids[row][mask[row].bool()].tolist()
        expected = written_alone(model, real)
        assert output[row, ids.shape[1] - taken :].tolist() == expected


def _eos_of(model: Any, row: Sequence[int], others: Sequence[Sequence[int]], within: int) -> int:
    """Returns a token that the row writes early and the others do not."""
    elsewhere = {token for other in others for token in written_alone(model, other)}
    early = [token for token in written_alone(model, row)[2:within] if token not in elsewhere]
    return early[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_batch_goes_on_behind_a_row_that_ended_early(family: str) -> None:
    """The padding behind its end lies in the middle of its sequence in the next turn."""
    model = tiny.make_model(family, seed=1)
    generator = SpeculativeGenerator(model, node_budget=12)
    output, expected = _second_turn_behind_an_early_end(model, generator)
    assert output == expected


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_windowed_layers_that_dropped_what_an_ended_row_still_sees_are_refused(family: str) -> None:
    """Windowed layers keep the last columns; behind an early end these are padding."""
    model = tiny.make_model(family, seed=1)
    generator = SpeculativeGenerator(model, node_budget=12)
    with pytest.raises(ConfigError, match=r"row 0.*DynamicCache\(\)"):
        _second_turn_behind_an_early_end(model, generator)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_cache_that_keeps_everything_goes_on_behind_a_row_that_ended_early(family: str) -> None:
    model = tiny.make_model(family, seed=1)
    generator = SpeculativeGenerator(model, node_budget=12)
    output, expected = _second_turn_behind_an_early_end(model, generator, DynamicCache())
    assert output == expected


def test_the_last_token_of_a_row_that_ended_early_is_in_the_cache(chat: Chat) -> None:
    """The ended row's last token is in the cache too, since the cache is as long as the others."""
    model, generator = chat
    prompts = [FIRST, THIRD]
    eos = _eos_of(model, prompts[0], prompts[1:], within=8)
    cache = DynamicCache()
    batch = tiny.padded(prompts, "left")
    arguments = {**TURN, "eos_token_id": eos, "pad_token_id": tiny.PAD}
    first = generator.generate(**batch, past_key_values=cache, **arguments)
    end = first[0].tolist().index(eos, batch["input_ids"].shape[1]) + 1
    assert end < cache.get_seq_length()
    text = first[0][batch["attention_mask"].shape[1] - len(FIRST) : end].tolist()
    fresh = DynamicCache()
    with torch.no_grad():
        model(tiny.ids(text), past_key_values=fresh)
    start = batch["input_ids"].shape[1] - len(FIRST)
    for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
        kept = ours.keys[:1, :, start:end]
        torch.testing.assert_close(kept, theirs.keys, rtol=1e-4, atol=1e-4)
        assert float(ours.keys[0, :, end:].abs().max()) == 0  # behind its end there is nothing


def _second_turn_behind_an_early_end(
    model: Any, generator: SpeculativeGenerator, cache: DynamicCache | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    prompts = [FIRST, THIRD]
    eos = _eos_of(model, prompts[0], prompts[1:], within=6)
    arguments = {**TURN, "eos_token_id": eos, "pad_token_id": tiny.PAD}
    batch = tiny.padded(prompts, "left")
    cache = DynamicCache(config=model.config) if cache is None else cache
    first = generator.generate(**batch, past_key_values=cache, **arguments)
    written = first[0, batch["input_ids"].shape[1] :].tolist()
    end = written.index(eos) + 1
    assert 0 < end < len(written)
    assert set(written[end:]) == {tiny.PAD}
    new = batch["attention_mask"].new_ones(2, len(written))
    new[0, end:] = 0
    ids = torch.cat([first, torch.tensor([[40, 41, 42], [50, 51, 52]])], dim=1)
    mask = torch.cat([batch["attention_mask"], new, new.new_ones(2, 3)], dim=1)
    output = generator.generate(ids, attention_mask=mask, past_key_values=cache, **TURN)
    expected = [written_alone(model, ids[row][mask[row].bool()].tolist()) for row in range(2)]
    return output[:, ids.shape[1] :].tolist(), expected


def test_several_samples_go_on_from_one_cache(chat: Chat) -> None:
    model, generator = chat
    cache = DynamicCache(config=model.config)
    first = generator.generate(tiny.ids(FIRST), past_key_values=cache, **TURN)
    text = first[0].tolist() + SECOND
    arguments = {**TURN, "do_sample": True, "num_return_sequences": 3, "top_k": 0}
    output = generator.generate(tiny.ids(text), past_key_values=cache, seed=4, **arguments)
    fresh = generator.generate(tiny.ids(text), seed=4, **arguments)
    assert output.tolist() == fresh.tolist()
    assert len(set(map(tuple, output.tolist()))) == 3
    assert cache.get_seq_length() == output.shape[1] - 1
    # and each of them may go on by itself
    ids = torch.cat([output, torch.tensor([[40, 41]] * 3)], dim=1)
    again = generator.generate(ids, past_key_values=cache, **TURN)
    assert again[:, ids.shape[1] :].tolist() == [written_alone(model, row) for row in ids.tolist()]


def test_a_cache_of_another_model_is_refused() -> None:
    model = tiny.make_model("llama", num_hidden_layers=3)
    other = tiny.make_model("llama")
    cache = DynamicCache(config=model.config)
    model.generate(tiny.ids(FIRST), past_key_values=cache, **TURN)
    with pytest.raises(ConfigError, match="3 layers"):
        SpeculativeGenerator(other).generate(
            tiny.ids(FIRST + FIRST + FIRST), past_key_values=cache, **TURN
        )


def test_a_cache_of_another_shape_is_refused() -> None:
    model = tiny.make_model("llama", num_key_value_heads=4)
    other = tiny.make_model("llama")
    cache = DynamicCache(config=model.config)
    model.generate(tiny.ids(FIRST), past_key_values=cache, **TURN)
    with pytest.raises(ConfigError, match="another model"):
        SpeculativeGenerator(other).generate(
            tiny.ids(FIRST + FIRST + FIRST), past_key_values=cache, **TURN
        )


def test_a_cache_of_another_batch_is_refused() -> None:
    model = tiny.make_model("llama")
    cache = DynamicCache(config=model.config)
    model.generate(tiny.ids(FIRST, FIRST), past_key_values=cache, **TURN)
    text = FIRST + FIRST + FIRST
    with pytest.raises(ConfigError, match="2 rows"):
        SpeculativeGenerator(model).generate(
            tiny.ids(text, text, text), past_key_values=cache, **TURN
        )


def test_a_cache_that_already_holds_the_whole_prompt_is_refused() -> None:
    model = tiny.make_model("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tiny.ids(FIRST), past_key_values=cache)
    with pytest.raises(ConfigError, match="no token behind"):
        SpeculativeGenerator(model).generate(tiny.ids(FIRST), past_key_values=cache, **TURN)


def test_ragged_continuation_with_learned_positions_near_their_end() -> None:
    """Padding behind a short piece must not ask for a position that the table lacks."""
    model = tiny.make_model("gpt2", n_positions=48, seed=1)
    generator = SpeculativeGenerator(model, node_budget=4)
    long, short = tiny.prompt(36, seed=6), tiny.prompt(4, seed=7)
    cache = DynamicCache(config=model.config)
    batch = tiny.padded([long, short], "left")
    with torch.no_grad():
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        model(**batch, position_ids=positions, past_key_values=cache)
    more = tiny.padded([tiny.prompt(2, seed=8), tiny.prompt(20, seed=9)], "right")
    mask = torch.cat([batch["attention_mask"], more["attention_mask"]], dim=1)
    arguments = {**TURN, "max_new_tokens": 4}
    output = generator.generate(
        more["input_ids"], attention_mask=mask, past_key_values=cache, **arguments
    )
    ids = torch.cat([batch["input_ids"], more["input_ids"]], dim=1)
    for row in range(2):
        real = ids[row][mask[row].bool()].tolist()
        assert output[row, 20:].tolist() == written_alone(model, real, max_new_tokens=4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_failed_call_leaves_the_cache_as_it_was(family: str) -> None:
    model = tiny.make_model(family, seed=1)
    generator = SpeculativeGenerator(model, node_budget=12)
    cache = DynamicCache(config=model.config)
    first = generator.generate(tiny.ids(FIRST), past_key_values=cache, **TURN)
    text = first[0].tolist() + SECOND
    calls = []

    def failing(input_ids: Tensor, scores: Tensor) -> Tensor:
        calls.append(input_ids.shape[1])
        if len(calls) == 5:
            raise RuntimeError("on purpose")
        return scores

    with pytest.raises(RuntimeError, match="on purpose"):
        generator.generate(
            tiny.ids(text), past_key_values=cache, logits_processor=[failing], **TURN
        )
    assert_holds(cache, model, first[0].tolist()[:-1])
    output = generator.generate(tiny.ids(text), past_key_values=cache, **TURN)
    assert output[0].tolist() == text + written_alone(model, text)
