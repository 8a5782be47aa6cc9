"""`generate` in everything but speed is `model.generate`: arguments, outputs, streams, statistics.

Most tests hand the loop a drafter that knows the text, also behind the place where it must stop:
stops, processors and criteria then fall into the middle of accepted blocks.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from specdec import SpeculativeGenerator
from specdec.errors import ConfigError
from specdec.row_text import Step
from specdec.stats import DecodeStats

PROMPT = tiny.prompt(17, seed=1)
ROWS = [PROMPT, tiny.prompt(6, seed=2), tiny.prompt(11, seed=3)]
NEW = 40


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model("llama", seed=1)


@pytest.fixture(scope="module")
def free(model: Any) -> list[list[int]]:
    """What the model writes after each of ROWS when nothing stops it."""
    return [continuation(model, row) for row in ROWS]


@pytest.fixture
def defaults(model: Any) -> Iterator[GenerationConfig]:
    """The model's own generation config, put back after the test."""
    before = copy.deepcopy(model.generation_config)
    yield model.generation_config
    model.generation_config = before


def continuation(model: Any, row: Sequence[int], count: int = NEW) -> list[int]:
    output: Tensor = model.generate(tiny.ids(row), max_new_tokens=count, do_sample=False)
    return output[0, len(row) :].tolist()


def well_informed(
    model: Any, texts: Sequence[Sequence[int]], tokenizer: Any = None, **options: Any
) -> SpeculativeGenerator:
    return SpeculativeGenerator(
        model, tokenizer, drafter=tiny.Oracle(texts, gap=9), node_budget=10, **options
    )


def new_in_text(text: Sequence[int], after: int) -> int:
    """Returns a place behind `after` with a token that does not occur before it."""
    return next(i for i in range(after, len(text)) if text[i] not in text[:i])


def assert_same(
    generator: SpeculativeGenerator, inputs: Any, tokenizer: Any = None, **arguments: Any
) -> Tensor:
    """Asserts that the output is that of `model.generate`; inputs are ids or a padded batch."""
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    given = {**inputs, **arguments}
    expected = generator.model.generate(
        **copy.copy(given), **({} if tokenizer is None else {"tokenizer": tokenizer})
    )
    actual = generator.generate(**given)
    assert actual.dtype == expected.dtype
    assert actual.tolist() == expected.tolist()
    assert isinstance(actual, Tensor)
    return actual


# ---- lengths ----


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"max_new_tokens": 1}, id="one token"),
        pytest.param({"max_new_tokens": 2}, id="two tokens"),
        pytest.param({"max_new_tokens": 23}, id="max_new_tokens"),
        pytest.param({"max_length": 31}, id="max_length"),
        pytest.param({"max_length": 18}, id="max_length one behind the prompt"),
        pytest.param({}, id="transformers' default length"),
        pytest.param({"generation_config": GenerationConfig(max_new_tokens=9)}, id="config"),
        pytest.param(
            {"generation_config": GenerationConfig(max_new_tokens=9), "max_new_tokens": 5},
            id="argument over config",
        ),
    ],
)
def test_length(model: Any, free: list[list[int]], arguments: dict[str, Any]) -> None:
    assert_same(well_informed(model, free), tiny.ids(PROMPT), do_sample=False, **arguments)


@pytest.mark.parametrize(
    "drafter", [None, "token_recycling", "prompt_lookup", "suffix", "trigram", "hybrid"]
)
def test_the_named_drafters_and_none_write_the_same(model: Any, drafter: str | None) -> None:
    generator = SpeculativeGenerator(model, drafter=drafter)
    assert_same(generator, tiny.ids(PROMPT), max_new_tokens=NEW, do_sample=False)
    assert (generator.stats.num_accepted > 0) == (drafter is not None)


def test_the_prompt_may_be_positional(model: Any, free: list[list[int]]) -> None:
    output = well_informed(model, free).generate(
        tiny.ids(PROMPT), max_new_tokens=NEW, do_sample=False
    )
    assert output[0].tolist() == PROMPT + free[0]


def test_without_a_prompt_the_text_begins_with_bos(model: Any) -> None:
    generator = SpeculativeGenerator(model)
    expected = model.generate(bos_token_id=2, max_new_tokens=12, do_sample=False)
    actual = generator.generate(bos_token_id=2, max_new_tokens=12, do_sample=False)
    assert actual.tolist() == expected.tolist()


def test_padding_is_inferred_from_the_pad_token_as_in_generate(model: Any) -> None:
    ids = tiny.padded(ROWS)["input_ids"]
    arguments = {"pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS}
    assert_same(SpeculativeGenerator(model), ids, max_new_tokens=20, do_sample=False, **arguments)


def test_the_callers_arguments_are_left_alone(model: Any) -> None:
    config = GenerationConfig(max_new_tokens=6, stop_strings=["zz"])
    before = config.to_dict()
    ids = tiny.ids(PROMPT)
    mask = torch.ones_like(ids)
    SpeculativeGenerator(model, tiny.letters()).generate(
        ids, attention_mask=mask, generation_config=config
    )
    assert config.to_dict() == before
    assert ids.tolist() == [PROMPT]
    assert mask.tolist() == [[1] * len(PROMPT)]


# ---- end of sequence ----


@pytest.mark.parametrize("kind", ["int", "list", "first of list", "config", "model's config"])
def test_eos_inside_an_accepted_block_ends_the_text(
    model: Any, free: list[list[int]], defaults: GenerationConfig, kind: str
) -> None:
    place = new_in_text(free[0], 12)
    eos = free[0][place]
    never = next(t for t in range(tiny.VOCAB) if t not in free[0])
    arguments: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    if kind == "config":
        arguments["generation_config"] = GenerationConfig(eos_token_id=[never, eos])
    elif kind == "model's config":
        defaults.eos_token_id = [never, eos]
    else:
        values = {"int": eos, "list": [never, eos], "first of list": [eos, never]}
        arguments["eos_token_id"] = values[kind]
    generator = well_informed(model, free)
    output = assert_same(generator, tiny.ids(PROMPT), **arguments)
    assert output[0].tolist() == PROMPT + free[0][: place + 1]
    stats = generator.stats
    assert stats.rows[0].finish_reason == "eos"
    assert stats.rows[0].num_generated == place + 1
    assert stats.num_emitted == place
    assert stats.num_accepted > place // 2


@pytest.mark.parametrize("place", range(16))
def test_eos_anywhere_in_a_block(model: Any, free: list[list[int]], place: int) -> None:
    """Wherever it falls: the root's child, the middle or the end of a path, the bonus token."""
    generator = well_informed(model, free)
    arguments = {"eos_token_id": free[0][place], "pad_token_id": 0, "do_sample": False}
    assert_same(generator, tiny.ids(PROMPT), max_new_tokens=NEW, **arguments)
    assert generator.stats.num_emitted == free[0].index(free[0][place])


@pytest.mark.parametrize("name", ["min_new_tokens", "min_length"])
def test_a_minimal_length_forbids_eos_on_each_nodes_own_length(
    model: Any, free: list[list[int]], name: str
) -> None:
    eos = free[0][new_in_text(free[0], 4)]
    least = 15 if name == "min_new_tokens" else 15 + len(PROMPT)
    arguments = {"eos_token_id": eos, "pad_token_id": 0, "do_sample": False, name: least}
    probe = SpeculativeGenerator(model)
    text = assert_same(probe, tiny.ids(PROMPT), max_new_tokens=NEW, **arguments)
    known = text[0, len(PROMPT) :].tolist() + [7] * 20
    generator = well_informed(model, [known])
    assert_same(generator, tiny.ids(PROMPT), max_new_tokens=NEW, **arguments)
    assert len(text[0]) >= len(PROMPT) + 15
    assert generator.stats.num_accepted > 5


@pytest.mark.parametrize("pad", [0, None], ids=["pad", "eos as pad"])
def test_rows_that_end_are_filled_up_with_padding(
    model: Any, free: list[list[int]], pad: int | None
) -> None:
    place = next(i for i in range(5, NEW) if free[0][i] not in free[0][:i] + free[1] + free[2])
    arguments = {"eos_token_id": free[0][place], "do_sample": False, "max_new_tokens": NEW}
    if pad is not None:
        arguments["pad_token_id"] = pad
    generator = well_informed(model, free)
    output = assert_same(generator, tiny.padded(ROWS), **arguments)
    assert output.shape[1] == len(PROMPT) + NEW
    assert [row.finish_reason for row in generator.stats.rows] == ["eos", "length", "length"]


def test_a_forced_eos_is_forced_at_the_last_place(model: Any, free: list[list[int]]) -> None:
    eos = next(t for t in range(tiny.VOCAB) if t not in free[0])
    known = [*free[0][:29], eos, 5, 6, 7]
    generator = well_informed(model, [known])
    output = assert_same(
        generator,
        tiny.ids(PROMPT),
        max_new_tokens=30,
        do_sample=False,
        forced_eos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=0,
    )
    assert output[0, -1] == eos
    assert generator.stats.num_accepted > 10


# ---- the model's own generation config ----


def test_the_models_defaults_apply(
    model: Any, free: list[list[int]], defaults: GenerationConfig
) -> None:
    defaults.max_new_tokens = 13
    defaults.repetition_penalty = 1.7
    defaults.do_sample = False
    output = assert_same(well_informed(model, free), tiny.ids(PROMPT))
    assert output.shape[1] == len(PROMPT) + 13
    assert output[0, len(PROMPT) :].tolist() != free[0][:13]


@pytest.mark.parametrize(
    "own",
    [
        {},  # transformers' own default keeps 50 tokens
        {"temperature": 0.3},
        {"top_k": 5},
        {"top_p": 0.6, "top_k": 0},
        {"min_p": 0.2},
        {"typical_p": 0.5, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_sampling_defaults_of_the_model_shape_the_scores(
    model: Any, defaults: GenerationConfig, own: dict[str, Any]
) -> None:
    defaults.do_sample = True
    for name, value in own.items():
        setattr(defaults, name, value)
    arguments = {
        "max_new_tokens": 1,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    expected = model.generate(tiny.ids(PROMPT), **arguments)
    actual = SpeculativeGenerator(model).generate(tiny.ids(PROMPT), seed=1, **arguments)
    torch.testing.assert_close(actual.scores[0], expected.scores[0], rtol=1e-4, atol=1e-4)
    assert bool((expected.scores[0] == -torch.inf).any()) or "temperature" in own


# ---- dictionary output ----

DETAILS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.mark.parametrize("penalty", [None, 1.3])
def test_scores_and_logits_of_each_token(
    model: Any, free: list[list[int]], penalty: float | None
) -> None:
    arguments = {"max_new_tokens": NEW, "do_sample": False, **DETAILS}
    if penalty is not None:
        arguments["repetition_penalty"] = penalty
    expected = model.generate(tiny.ids(PROMPT), **arguments)
    generator = well_informed(model, [expected.sequences[0, len(PROMPT) :].tolist()])
    actual = generator.generate(tiny.ids(PROMPT), **arguments)
    assert generator.stats.num_accepted > NEW // 2
    assert type(actual) is type(expected)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert isinstance(ours, tuple)
        assert len(ours) == len(theirs) == NEW
        for our, their in zip(ours, theirs, strict=True):
            assert our.dtype == their.dtype
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)
    assert actual.past_key_values.get_seq_length() == actual.sequences.shape[1] - 1
    assert expected.past_key_values.get_seq_length() == actual.sequences.shape[1] - 1


def test_scores_in_a_batch_until_each_row_ends(model: Any, free: list[list[int]]) -> None:
    place = next(i for i in range(5, NEW) if free[0][i] not in free[0][:i] + free[1] + free[2])
    arguments = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": free[0][place],
        "pad_token_id": 0,
        **DETAILS,
    }
    batch = tiny.padded(ROWS)
    expected = model.generate(**batch, **arguments)
    actual = well_informed(model, free).generate(**batch, **arguments)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert len(ours) == len(theirs)
        for step, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            assert our.shape == their.shape
            alive = [0, 1, 2] if step <= place else [1, 2]
            torch.testing.assert_close(our[alive], their[alive], rtol=1e-4, atol=1e-4)


def test_only_what_was_asked_for_is_returned(model: Any, free: list[list[int]]) -> None:
    arguments = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    output = well_informed(model, free).generate(tiny.ids(PROMPT), **arguments)
    assert output.scores is None
    assert output.logits is None
    output = well_informed(model, free).generate(tiny.ids(PROMPT), output_scores=True, **arguments)
    assert len(output.scores) == 5
    assert output.logits is None


# ---- stop strings ----


def pieces(tokenizer: Any, text: Sequence[int], begin: int, end: int) -> str:
    string: str = tokenizer.decode(text[begin:end])
    return string


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.letters()


@pytest.mark.parametrize("place", range(3, 16))
def test_a_stop_string_ends_the_text_wherever_it_falls(
    model: Any, free: list[list[int]], tokenizer: Any, place: int
) -> None:
    stop = pieces(tokenizer, free[0], place - 1, place + 1)
    generator = well_informed(model, free, tokenizer)
    output = assert_same(
        generator,
        tiny.ids(PROMPT),
        tokenizer,
        stop_strings=stop,
        max_new_tokens=NEW,
        do_sample=False,
    )
    assert len(output[0]) <= len(PROMPT) + place + 1
    assert generator.stats.rows[0].finish_reason == "criterion"
    assert generator.stats.num_emitted == len(output[0]) - len(PROMPT) - 1


@pytest.mark.parametrize("where", ["config", "model's config", "both, the config wins"])
def test_stop_strings_of_a_config(
    model: Any,
    free: list[list[int]],
    tokenizer: Any,
    defaults: GenerationConfig,
    where: str,
) -> None:
    stop = [pieces(tokenizer, free[0], 11, 13)]
    arguments: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
    if where == "model's config":
        defaults.stop_strings = stop
    else:
        arguments["generation_config"] = GenerationConfig(stop_strings=stop)
    if where.startswith("both"):
        defaults.stop_strings = [pieces(tokenizer, free[0], 4, 6)]
    before = copy.deepcopy(defaults.to_dict())
    generator = well_informed(model, free, tokenizer)
    output = assert_same(generator, tiny.ids(PROMPT), tokenizer, **arguments)
    assert len(output[0]) == len(PROMPT) + 13
    assert model.generation_config is defaults
    assert defaults.to_dict() == before


def test_stop_strings_in_a_batch_end_each_row_by_itself(
    model: Any, free: list[list[int]], tokenizer: Any
) -> None:
    stops = [pieces(tokenizer, text, 6 + 4 * row, 9 + 4 * row) for row, text in enumerate(free)]
    never = next(t for t in range(3, tiny.VOCAB) if all(t not in text for text in free))
    generator = well_informed(model, free, tokenizer)
    output = assert_same(
        generator,
        tiny.padded(ROWS),
        tokenizer,
        stop_strings=stops,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=never,  # without one, transformers lets finished rows write on
        pad_token_id=0,
    )
    assert output.shape[1] < len(PROMPT) + NEW
    assert {row.finish_reason for row in generator.stats.rows} == {"criterion"}


def test_stop_strings_without_a_tokenizer_are_refused(model: Any) -> None:
    generator = SpeculativeGenerator(model)
    with pytest.raises(ConfigError, match="tokenizer"):
        generator.generate(tiny.ids(PROMPT), stop_strings=["a"], max_new_tokens=4)
    assert generator.generate(tiny.ids(PROMPT), max_new_tokens=4).shape[1] == len(PROMPT) + 4


def test_the_tokenizer_may_come_with_the_call(
    model: Any, free: list[list[int]], tokenizer: Any
) -> None:
    stop = pieces(tokenizer, free[0], 8, 10)
    output = well_informed(model, free).generate(
        tiny.ids(PROMPT),
        tokenizer=tokenizer,
        stop_strings=stop,
        max_new_tokens=NEW,
        do_sample=False,
    )
    assert tokenizer.decode(output[0, len(PROMPT) :]).endswith(stop)


# ---- criteria ----


class Watcher(StoppingCriteria):
    """Notes what it is shown, and stops after `limit` new tokens of a row."""

    def __init__(self, limit: int = 10**9, start: int = 0) -> None:
        self.seen: list[list[int]] = []
        self.scores: list[Any] = []
        self._end = start + limit

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen += input_ids.tolist()
        self.scores.append(scores)
        return torch.full((len(input_ids),), input_ids.shape[1] >= self._end)


@pytest.mark.parametrize("verifier", ["match", "coupled", "rejection", "traversal", "block"])
def test_a_criterion_is_asked_once_for_each_token_with_the_text_so_far(
    model: Any, free: list[list[int]], verifier: str
) -> None:
    theirs, ours = Watcher(23, len(PROMPT)), Watcher(23, len(PROMPT))
    arguments = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(tiny.ids(PROMPT), stopping_criteria=[theirs], **arguments)
    policy = "chain" if verifier == "block" else "best_first"
    generator = well_informed(model, free, policy=policy, verifier=verifier)
    output = generator.generate(tiny.ids(PROMPT), stopping_criteria=[ours], **arguments)
    assert output.tolist() == expected.tolist()
    assert ours.seen == theirs.seen
    assert ours.seen == [PROMPT + free[0][: n + 1] for n in range(23)]
    assert generator.stats.rows[0].finish_reason == "criterion"
    assert generator.stats.num_accepted > (5 if policy == "chain" else 10)


def test_a_criterion_is_given_the_scores_so_far(model: Any, free: list[list[int]]) -> None:
    theirs, ours = Watcher(9, len(PROMPT)), Watcher(9, len(PROMPT))
    arguments = {"max_new_tokens": NEW, "do_sample": False, "repetition_penalty": 1.1, **DETAILS}
    expected = model.generate(tiny.ids(PROMPT), stopping_criteria=[theirs], **arguments)
    text = expected.sequences[0, len(PROMPT) :].tolist()
    well_informed(model, [text]).generate(tiny.ids(PROMPT), stopping_criteria=[ours], **arguments)
    assert [len(scores) for scores in ours.scores] == [len(scores) for scores in theirs.scores]
    for our, their in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(our[-1], their[-1], rtol=1e-4, atol=1e-4)


def test_a_criterion_in_a_batch_sees_every_row_with_its_padding(
    model: Any, free: list[list[int]]
) -> None:
    batch = tiny.padded(ROWS)
    theirs, ours = Watcher(), Watcher()
    arguments = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    model.generate(**batch, stopping_criteria=[theirs], **arguments)
    well_informed(model, free).generate(**batch, stopping_criteria=[ours], **arguments)
    assert sorted(ours.seen) == sorted(theirs.seen)


def test_a_time_limit_ends_the_text(model: Any, free: list[list[int]]) -> None:
    generator = well_informed(model, free)
    output = generator.generate(tiny.ids(PROMPT), max_time=0.0, max_new_tokens=NEW, do_sample=False)
    assert output[0].tolist() == PROMPT + free[0][:1]
    assert generator.stats.rows[0].finish_reason == "criterion"


def test_a_criterion_that_stops_at_the_first_token(model: Any, free: list[list[int]]) -> None:
    assert_same(
        well_informed(model, free),
        tiny.ids(PROMPT),
        max_new_tokens=NEW,
        do_sample=False,
        stopping_criteria=[Watcher(1, len(PROMPT))],
    )


# ---- logits processors ----


class Recorder(LogitsProcessor):
    """Notes the prefixes it is called with; its effect depends on the calls it has had."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen += input_ids.tolist()
        scores = scores.clone()
        scores[:, (11 * len(self.seen)) % tiny.VOCAB] += 4.0
        return scores


PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[62], [25, 78], [89, 25, 25]]},
    "sequence_bias": {"sequence_bias": [[[44], 3.0], [[50, 51], 5.0], [[9], -4.0]]},
    "suppress_tokens": {"suppress_tokens": list(range(40, 60))},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.6},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "exponential_decay": {
        "exponential_decay_length_penalty": (12, 1.1),
        "eos_token_id": 95,
        "pad_token_id": 0,
    },
    "all at once": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[25, 78]],
        "min_new_tokens": 12,
        "eos_token_id": 71,
        "pad_token_id": 0,
    },
}


def each_alone(
    model: Any, rows: Sequence[Sequence[int]], arguments: dict[str, Any], like: Tensor
) -> Tensor:
    """Returns a left-padded batch's output put together from rows written one by one."""
    width = max(map(len, rows))
    expected = torch.zeros_like(like)
    expected[:, :width] = tiny.padded(rows)["input_ids"]
    for index, row in enumerate(rows):
        text = model.generate(tiny.ids(row), **arguments)[0, len(row) :]
        expected[index, width : width + len(text)] = text
    return expected


@pytest.mark.parametrize("batch", [False, True], ids=["one row", "batch"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_run_on_the_prefix_of_each_node(model: Any, name: str, batch: bool) -> None:
    arguments = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | PROCESSORS[name]
    inputs: dict[str, Tensor] = (
        dict(tiny.padded(ROWS)) if batch else {"input_ids": tiny.ids(PROMPT)}
    )
    width = inputs["input_ids"].shape[1]
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    expected = model.generate(**inputs, **arguments)
    if "repetition_penalty" in arguments and batch:
        # padding is no text; before 5.23 transformers punished the padding token for it
        expected = each_alone(model, ROWS, arguments, expected)
    assert plain.tolist() != expected.tolist()  # the processor matters
    generator = well_informed(model, expected[:, width:].tolist())
    assert generator.generate(**inputs, **arguments).tolist() == expected.tolist()
    assert generator.stats.num_accepted > 5


@pytest.mark.parametrize("name", ["repetition_penalty", "no_repeat_ngram_size"])
def test_processors_in_a_right_padded_batch_work_on_each_row_alone(model: Any, name: str) -> None:
    """The padding goes in front of what they see, where it parts no n-gram."""
    arguments = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | PROCESSORS[name]
    output = SpeculativeGenerator(model).generate(**tiny.padded(ROWS, "right"), **arguments)
    expected = each_alone(model, ROWS, arguments, output)
    assert output[:, len(PROMPT) :].tolist() == expected[:, len(PROMPT) :].tolist()


@pytest.mark.parametrize("batch", [False, True], ids=["one row", "batch"])
def test_allowed_tokens_are_asked_with_the_row_of_the_batch(model: Any, batch: bool) -> None:
    def allowed(asked: list[tuple[int, tuple[int, ...]]]) -> Any:
        def function(row: int, ids: Tensor) -> list[int]:
            asked.append((row, tuple(ids.tolist())))
            return list(range(3 + 20 * row + int(ids[-1]) % 5, 30 + 20 * row))

        return function

    rows = ROWS if batch else ROWS[:1]
    inputs = tiny.padded(rows)
    arguments = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0}
    theirs: list[Any] = []
    ours: list[Any] = []
    expected = model.generate(**inputs, prefix_allowed_tokens_fn=allowed(theirs), **arguments)
    generator = well_informed(model, expected[:, inputs["input_ids"].shape[1] :].tolist())
    output = generator.generate(**inputs, prefix_allowed_tokens_fn=allowed(ours), **arguments)
    assert output.tolist() == expected.tolist()
    assert sorted(ours) == sorted(theirs)
    assert generator.stats.num_accepted > 5


def test_allowed_tokens_of_samples_of_one_prompt(model: Any) -> None:
    """transformers numbers the prompts; before 5.24 the expanded rows, with repeated prompts."""
    theirs: set[int] = set()
    ours: set[int] = set()

    def allowed(asked: set[int]) -> Any:
        def function(number: int, ids: Tensor) -> list[int]:
            asked.add(number)
            return list(range(10 + number * 10, 15 + number * 10))

        return function

    arguments = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8}
    prompts = tiny.ids(PROMPT, PROMPT)
    model.generate(prompts, prefix_allowed_tokens_fn=allowed(theirs), **arguments)
    output = SpeculativeGenerator(model).generate(
        prompts, prefix_allowed_tokens_fn=allowed(ours), seed=1, **arguments
    )
    assert ours == theirs
    for row, new in enumerate(output[:, len(PROMPT) :].tolist()):
        number = row * len(theirs) // len(output)
        assert all(10 + number * 10 <= token < 15 + number * 10 for token in new)


def test_a_processor_with_a_memory_sees_every_prefix_once_and_in_order(model: Any) -> None:
    theirs, ours = Recorder(), Recorder()
    arguments = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(tiny.ids(PROMPT), logits_processor=[theirs], **arguments)
    text = expected[0, len(PROMPT) :].tolist()
    generator = well_informed(model, [text])
    output = generator.generate(tiny.ids(PROMPT), logits_processor=[ours], **arguments)
    assert output.tolist() == expected.tolist()
    assert generator.stats.num_accepted > NEW // 2
    assert ours.seen == theirs.seen


# rules that walk down, each with a policy whose draws it accepts
WALKS = [
    ("best_first", "match"),
    ("best_first", "rejection"),
    ("best_first", "coupled"),
    ("iid", "spectr"),
]


@pytest.mark.parametrize("details", [False, True], ids=["ids", "details"])
@pytest.mark.parametrize(("policy", "verifier"), WALKS)
def test_no_verifier_shows_a_processor_a_rejected_branch(
    model: Any, policy: str, verifier: str, details: bool
) -> None:
    ours = Recorder()
    generator = SpeculativeGenerator(model, policy=policy, verifier=verifier, node_budget=10)
    output = generator.generate(
        tiny.ids(PROMPT),
        logits_processor=[ours],
        do_sample=True,
        temperature=0.4,
        max_new_tokens=NEW,
        seed=3,
        **(DETAILS if details else {}),
    )
    text = (output.sequences if details else output)[0].tolist()
    assert generator.stats.num_accepted > 0
    assert ours.seen == [text[:n] for n in range(len(PROMPT), len(text))]


def test_a_processor_keeps_the_prefixes_it_was_given(model: Any) -> None:
    """transformers makes new ids at every step; what a processor stored must not change later."""
    stored: list[tuple[Tensor, list[int]]] = []

    def keeping(input_ids: Tensor, scores: Tensor) -> Tensor:
        stored.append((input_ids, input_ids.tolist()))
        return scores

    SpeculativeGenerator(model).generate(
        tiny.ids(PROMPT), logits_processor=[keeping], max_new_tokens=NEW, do_sample=False
    )
    assert all(ids.tolist() == then for ids, then in stored)


@pytest.mark.parametrize("stop", ["eos", "stop string", "criterion"])
@pytest.mark.parametrize(("policy", "verifier"), WALKS)
def test_a_processor_is_not_called_behind_the_end(
    model: Any, free: list[list[int]], tokenizer: Any, policy: str, verifier: str, stop: str
) -> None:
    """A grammar, say, has nothing to answer there: it may well raise."""
    place = new_in_text(free[0], 12)
    end = len(PROMPT) + place + 1
    arguments: dict[str, Any] = {
        "eos": {"eos_token_id": free[0][place], "pad_token_id": 0},
        "stop string": {"stop_strings": pieces(tokenizer, free[0], place, place + 1)},
        "criterion": {"stopping_criteria": [Watcher(place + 1, len(PROMPT))]},
    }[stop]
    longest = []

    def strict(input_ids: Tensor, scores: Tensor) -> Tensor:
        longest.append(input_ids.shape[1])
        return scores

    generator = SpeculativeGenerator(
        model,
        tokenizer,
        drafter=tiny.Oracle(free),
        policy=policy,
        verifier=verifier,
        node_budget=16,
    )
    output = generator.generate(
        tiny.ids(PROMPT),
        logits_processor=[strict],
        do_sample=False,
        max_new_tokens=NEW,
        **arguments,
    )
    assert output.shape[1] == end
    assert longest == list(range(len(PROMPT), end))


@pytest.mark.parametrize("stop", ["eos", "stop string"])
def test_logits_behind_the_end_are_not_looked_at(
    model: Any, free: list[list[int]], tokenizer: Any, stop: str
) -> None:
    """Not even without processors: they may be NaN where a text has nothing more to say."""
    place = new_in_text(free[0], 12)
    end = len(PROMPT) + place + 1
    arguments: dict[str, Any] = {
        "eos": {"eos_token_id": free[0][place], "pad_token_id": 0},
        "stop string": {"stop_strings": pieces(tokenizer, free[0], place, place + 1)},
    }[stop]

    def spoil(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        kept = kwargs["position_ids"][:, -output.logits.shape[1] :]
        output.logits[kept >= end - 1] = torch.nan

    generator = SpeculativeGenerator(model, tokenizer, drafter=tiny.Oracle(free), node_budget=16)
    handle = model.register_forward_hook(spoil, with_kwargs=True)
    try:
        output = generator.generate(
            tiny.ids(PROMPT), do_sample=False, max_new_tokens=NEW, **arguments
        )
    finally:
        handle.remove()
    assert output[0].tolist() == PROMPT + free[0][: place + 1]


@pytest.mark.parametrize(("policy", "verifier"), WALKS)
def test_processors_and_criteria_take_turns_as_in_generate(
    model: Any, free: list[list[int]], policy: str, verifier: str
) -> None:
    """So that a processor and a criterion may share what they know."""

    def shared() -> tuple[list[tuple[str, list[int]]], dict[str, Any]]:
        calls: list[tuple[str, list[int]]] = []

        def processor(input_ids: Tensor, scores: Tensor) -> Tensor:
            calls.append(("processor", input_ids[0].tolist()))
            return scores

        def criterion(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            calls.append(("criterion", input_ids[0].tolist()))
            return torch.tensor([False])

        arguments = {"logits_processor": [processor], "stopping_criteria": [criterion]}
        return calls, {"max_new_tokens": NEW, "do_sample": False, **DETAILS, **arguments}

    theirs, arguments = shared()
    model.generate(tiny.ids(PROMPT), **arguments)
    ours, arguments = shared()
    generator = well_informed(model, free, policy=policy, verifier=verifier)
    generator.generate(tiny.ids(PROMPT), **arguments)
    assert generator.stats.num_accepted > 10
    assert ours == theirs


@pytest.mark.parametrize("where", ["left", "right", "middle"])
def test_processors_see_a_rows_real_tokens_together_behind_its_padding(
    model: Any, free: list[list[int]], where: str
) -> None:
    """So that no n-gram is torn apart by padding, be it of an earlier turn."""
    pads = [tiny.PAD] * 4
    cut = {"left": 0, "middle": 7, "right": len(PROMPT)}[where]
    ids = tiny.ids(PROMPT[:cut] + pads + PROMPT[cut:])
    mask = torch.ones_like(ids)
    mask[0, cut : cut + 4] = 0
    seen: list[list[int]] = []

    def note(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(input_ids[0].tolist())
        return scores

    output = well_informed(model, free).generate(
        ids, attention_mask=mask, logits_processor=[note], max_new_tokens=NEW, do_sample=False
    )
    assert output[0].tolist() == ids[0].tolist() + free[0]
    assert seen == [pads + PROMPT + free[0][:n] for n in range(NEW)]


def test_custom_processors_come_after_the_configs_own_and_before_the_warpers(model: Any) -> None:
    arguments = {
        "repetition_penalty": 1.3,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 7,
        "max_new_tokens": 1,
        "return_dict_in_generate": True,
        "output_scores": True,
    }

    def shift(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores * 1.5 + torch.arange(tiny.VOCAB) * 0.03

    expected = model.generate(tiny.ids(PROMPT), logits_processor=[shift], **arguments)
    actual = SpeculativeGenerator(model).generate(
        tiny.ids(PROMPT), logits_processor=[shift], **arguments
    )
    torch.testing.assert_close(actual.scores[0], expected.scores[0], rtol=1e-4, atol=1e-4)


def test_a_processor_that_writes_in_place_spoils_nothing(model: Any) -> None:
    def in_place(input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, int(input_ids[0, -1])] = -50.0
        return scores

    arguments = {"max_new_tokens": NEW, "do_sample": False, **DETAILS}
    expected = model.generate(tiny.ids(PROMPT), logits_processor=[in_place], **arguments)
    text = expected.sequences[0, len(PROMPT) :].tolist()
    actual = well_informed(model, [text]).generate(
        tiny.ids(PROMPT), logits_processor=[in_place], **arguments
    )
    assert actual.sequences.tolist() == expected.sequences.tolist()
    for our, their in zip(actual.scores, expected.scores, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)
    lowest = [float(raw.min()) for raw in actual.logits]
    assert min(lowest) > -49  # the raw logits were kept apart


@pytest.mark.parametrize("negative", [False, True], ids=["no negative prompt", "negative prompt"])
def test_classifier_free_guidance(model: Any, negative: bool) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "guidance_scale": 1.6}
    if negative:
        arguments["negative_prompt_ids"] = tiny.ids(tiny.prompt(5, seed=9))
    expected = model.generate(tiny.ids(PROMPT), **arguments)
    plain = model.generate(tiny.ids(PROMPT), max_new_tokens=24, do_sample=False)
    assert expected.tolist() != plain.tolist()
    generator = well_informed(model, [expected[0, len(PROMPT) :].tolist()])
    output = generator.generate(tiny.ids(PROMPT), **arguments)
    assert output.tolist() == expected.tolist()
    assert generator.stats.num_accepted > 10


@pytest.mark.parametrize("negative", [False, True], ids=["no negative prompt", "negative prompt"])
def test_classifier_free_guidance_in_a_batch_is_each_row_alone(model: Any, negative: bool) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "guidance_scale": 1.6}
    rows = [tiny.prompt(9, seed=s) for s in (1, 2, 3)]
    others = [tiny.prompt(4, seed=s) for s in (7, 8, 9)]
    given = [{"negative_prompt_ids": tiny.ids(row)} if negative else {} for row in others]
    expected = [
        model.generate(tiny.ids(row), **arguments, **own)[0].tolist()
        for row, own in zip(rows, given, strict=True)
    ]
    together = {"negative_prompt_ids": tiny.ids(*others)} if negative else {}
    generator = well_informed(model, [text[9:] for text in expected])
    output = generator.generate(tiny.ids(*rows), **arguments, **together)
    assert output.tolist() == expected


# ---- streamers ----


class Put(BaseStreamer):
    """Notes what is put."""

    def __init__(self) -> None:
        self.put_ids: list[list[int]] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        self.put_ids.append(value.flatten().tolist())

    def end(self) -> None:
        self.ends += 1


def test_a_streamer_is_given_the_prompt_then_the_tokens_then_the_end(
    model: Any, free: list[list[int]]
) -> None:
    streamer = Put()
    well_informed(model, free).generate(
        tiny.ids(PROMPT), streamer=streamer, max_new_tokens=NEW, do_sample=False
    )
    assert streamer.put_ids[0] == PROMPT
    assert [token for ids in streamer.put_ids[1:] for token in ids] == free[0]
    assert len(streamer.put_ids) < NEW // 2
    assert streamer.ends == 1


@pytest.mark.parametrize("skip", [False, True])
def test_a_text_streamer_prints_what_it_prints_under_generate(
    model: Any,
    free: list[list[int]],
    tokenizer: Any,
    skip: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = {"max_new_tokens": NEW, "do_sample": False}
    model.generate(tiny.ids(PROMPT), streamer=TextStreamer(tokenizer, skip), **arguments)
    expected = capsys.readouterr().out
    well_informed(model, free).generate(
        tiny.ids(PROMPT), streamer=TextStreamer(tokenizer, skip), **arguments
    )
    assert capsys.readouterr().out == expected
    assert len(expected) > 20


def test_an_iterator_streamer_is_fed_from_another_thread(
    model: Any, free: list[list[int]], tokenizer: Any
) -> None:
    from threading import Thread

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    generator = well_informed(model, free)
    arguments = {"streamer": streamer, "max_new_tokens": NEW, "do_sample": False}
    thread = Thread(target=generator.generate, args=(tiny.ids(PROMPT),), kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(free[0])


def test_a_text_streamer_of_a_batch_is_refused_as_by_generate(model: Any, tokenizer: Any) -> None:
    generator = SpeculativeGenerator(model)
    arguments = {"max_new_tokens": 4, "pad_token_id": 0}
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate(**tiny.padded(ROWS), streamer=TextStreamer(tokenizer), **arguments)
    with pytest.raises(ValueError, match="batch"):
        generator.generate(**tiny.padded(ROWS), streamer=TextStreamer(tokenizer), **arguments)
    generator.generate(**tiny.padded(ROWS), **arguments)


def test_a_streamer_of_ones_own_in_a_batch_is_refused(model: Any) -> None:
    """It could not tell the rows apart, which advance by different amounts."""
    streamer = Put()
    with pytest.raises(ConfigError, match=r"stream\(\)"):
        SpeculativeGenerator(model).generate(
            **tiny.padded(ROWS), streamer=streamer, max_new_tokens=4, pad_token_id=0
        )
    assert streamer.put_ids == []


# ---- stream ----


@pytest.mark.parametrize("rows", [1, 3])
def test_stream_yields_every_rows_tokens_in_order(
    model: Any, free: list[list[int]], rows: int
) -> None:
    generator = well_informed(model, free)
    inputs = tiny.padded(ROWS[:rows])
    arguments = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    streamed: list[list[int]] = [[] for _ in range(rows)]
    blocks = 0
    for row, tokens in generator.stream(**inputs, **arguments):
        assert tokens
        streamed[row] += tokens
        blocks += 1
    assert streamed == free[:rows]
    assert blocks < rows * NEW // 2
    assert generator.generate(**inputs, **arguments)[:, len(PROMPT) :].tolist() == streamed


def test_stream_delivers_a_step_before_the_next_begins(model: Any, free: list[list[int]]) -> None:
    oracle = tiny.Oracle(free)
    generator = SpeculativeGenerator(model, drafter=oracle, node_budget=8)
    for count, _ in enumerate(
        generator.stream(tiny.ids(PROMPT), max_new_tokens=NEW, do_sample=False)
    ):
        assert len(oracle.outcomes) == count  # the prefill is no step


def test_a_stream_that_is_closed_early_frees_the_generator(
    model: Any, free: list[list[int]]
) -> None:
    generator = well_informed(model, free)
    arguments = {"max_new_tokens": NEW, "do_sample": False}
    stream = generator.stream(tiny.ids(PROMPT), **arguments)
    first = [next(stream)[1], next(stream)[1]]
    stream.close()
    text = generator.generate(tiny.ids(PROMPT), **arguments)[0, len(PROMPT) :].tolist()
    assert text == free[0]
    assert first[0] + first[1] == free[0][: len(first[0]) + len(first[1])]


def test_a_stream_that_was_never_begun_holds_nothing(model: Any) -> None:
    generator = SpeculativeGenerator(model)
    unused = generator.stream(tiny.ids(PROMPT), max_new_tokens=4)
    assert generator.generate(tiny.ids(PROMPT), max_new_tokens=4).shape[1] == len(PROMPT) + 4
    del unused


def test_stream_checks_its_arguments_at_once(model: Any) -> None:
    with pytest.raises(ConfigError, match="streamer"):
        SpeculativeGenerator(model).stream(tiny.ids(PROMPT), streamer=Put())
    with pytest.raises(ValueError, match="not used by the model"):
        SpeculativeGenerator(model).stream(tiny.ids(PROMPT), nonsense=1)


# ---- the other way round ----


@pytest.mark.parametrize("rows", [1, 3])
def test_custom_generate_from_the_users_own_call(
    model: Any, free: list[list[int]], rows: int
) -> None:
    generator = well_informed(model, free)
    inputs = tiny.padded(ROWS[:rows])
    arguments = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    output = model.generate(**inputs, custom_generate=generator.custom_generate, **arguments)
    assert output[:, len(PROMPT) :].tolist() == free[:rows]
    assert generator.stats.num_accepted > NEW // 2


def test_custom_generate_returns_the_dictionary_and_fills_the_cache(
    model: Any, free: list[list[int]]
) -> None:
    generator = well_informed(model, free)
    arguments = {"max_new_tokens": 20, "do_sample": False, **DETAILS}
    expected = model.generate(tiny.ids(PROMPT), **arguments)
    actual = model.generate(
        tiny.ids(PROMPT), custom_generate=generator.custom_generate, **arguments
    )
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert len(actual.scores) == len(expected.scores)
    assert actual.past_key_values.get_seq_length() == expected.sequences.shape[1] - 1


def test_custom_generate_takes_a_seed(model: Any) -> None:
    generator = SpeculativeGenerator(model)
    arguments = {"max_new_tokens": 20, "do_sample": True, "seed": 5}
    expected = generator.generate(tiny.ids(PROMPT), **arguments)
    actual = model.generate(
        tiny.ids(PROMPT), custom_generate=generator.custom_generate, **arguments
    )
    assert actual.tolist() == expected.tolist()


def test_custom_generate_of_another_model_is_refused(model: Any) -> None:
    other = tiny.make_model("llama")
    generator = SpeculativeGenerator(other)
    with pytest.raises(ConfigError, match="another model"):
        model.generate(tiny.ids(PROMPT), custom_generate=generator.custom_generate)


def test_prompt_lookup_num_tokens_is_taken(model: Any, free: list[list[int]]) -> None:
    generator = SpeculativeGenerator(model)
    output = generator.generate(
        tiny.ids(PROMPT), prompt_lookup_num_tokens=4, max_new_tokens=NEW, do_sample=False
    )
    assert output[0].tolist() == PROMPT + free[0]
    assert generator.stats.settings["drafter"] == "prompt_lookup"
    assert generator.stats.settings["policy"] == "chain"
    assert generator.stats.settings["node_budget"] == 4
    assert generator.stats.num_accepted > 0
    generator.generate(tiny.ids(PROMPT), max_new_tokens=4, do_sample=False)
    assert generator.stats.settings["drafter"] == "hybrid"  # for that call only


def test_assistant_model_is_taken(model: Any, free: list[list[int]]) -> None:
    generator = SpeculativeGenerator(model)
    expected = model.generate(
        tiny.ids(PROMPT), assistant_model=model, max_new_tokens=NEW, do_sample=False
    )
    output = generator.generate(
        tiny.ids(PROMPT), assistant_model=model, max_new_tokens=NEW, do_sample=False
    )
    assert output.tolist() == expected.tolist() == [PROMPT + free[0]]
    assert generator.stats.settings["drafter"] == "small_model"
    assert generator.stats.num_accepted > NEW // 2


# ---- several sequences ----


def test_several_greedy_sequences_are_refused_as_by_generate(model: Any) -> None:
    arguments = {"num_return_sequences": 2, "do_sample": False, "max_new_tokens": 3}
    with pytest.raises(ValueError, match="num_return_sequences"):
        model.generate(tiny.ids(PROMPT), **arguments)
    with pytest.raises(ValueError, match="num_return_sequences"):
        SpeculativeGenerator(model).generate(tiny.ids(PROMPT), **arguments)


def test_several_sequences_keep_the_order_of_generate(model: Any) -> None:
    inputs = tiny.padded(ROWS)
    output = SpeculativeGenerator(model).generate(
        **inputs, num_return_sequences=2, do_sample=True, max_new_tokens=5, pad_token_id=0, seed=1
    )
    assert output.shape == (6, len(PROMPT) + 5)
    assert output[:, : len(PROMPT)].tolist() == (
        inputs["input_ids"].repeat_interleave(2, dim=0).tolist()
    )


# ---- statistics ----


def recount(steps: Sequence[Step], rows: int) -> list[dict[str, Any]]:
    """Counts each row's steps from their trees, the way the documentation defines the numbers."""
    counts: list[dict[str, Any]] = []
    for row in range(rows):
        own = [step for step in steps if step.row == row][1:]  # without the prefill
        tested = 0
        histogram: dict[int, int] = {}
        for step in own:
            children: dict[int, list[int]] = {}
            for node, parent in enumerate(step.tree.parents.tolist()):
                children.setdefault(parent, []).append(node)
            node, accepted = 0, 0
            for token in step.tokens:
                siblings = children.get(node, [])
                taken = [n for n in siblings if int(step.tree.tokens[n]) == token]
                if not taken:
                    tested += len(siblings)
                    break
                tested += siblings.index(taken[0]) + 1
                node = taken[0]
                accepted += 1
            histogram[accepted] = histogram.get(accepted, 0) + 1
        counts.append(
            {
                "num_emitted": sum(len(step.tokens) for step in own),
                "target_calls": len(own),
                "num_drafted": sum(len(step.tree.tokens) - 1 for step in own),
                "num_tested": tested,
                "num_accepted": sum(n * count for n, count in histogram.items()),
                "acceptance_histogram": [
                    histogram.get(n, 0) for n in range(max(histogram, default=-1) + 1)
                ],
            }
        )
    return counts


@pytest.mark.parametrize("gap", [0, 5])
@pytest.mark.parametrize("stop", ["length", "eos", "stop string"])
def test_the_counts_are_those_of_the_trace(
    model: Any, free: list[list[int]], tokenizer: Any, stop: str, gap: int
) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    if stop == "eos":
        arguments["eos_token_id"] = [text[new_in_text(text, 9)] for text in free]
    if stop == "stop string":
        arguments["stop_strings"] = [pieces(tokenizer, text, 14, 17) for text in free]
    oracle = tiny.Oracle([text + [3] * 20 for text in free], gap)
    generator = SpeculativeGenerator(model, tokenizer, drafter=oracle, node_budget=10)
    steps = list(generator.trace(**tiny.padded(ROWS), **arguments))
    stats = generator.stats
    expected = recount(steps, 3)
    for row, counts in zip(stats.rows, expected, strict=True):
        assert {name: getattr(row, name) for name in counts} == counts
        text = [
            token for step in steps if step.row == row_index(stats, row) for token in step.tokens
        ]
        assert row.num_generated == len(text) == row.num_emitted + 1
        assert row.block_efficiency == row.num_emitted / row.target_calls
        assert sum(row.acceptance_histogram) == row.target_calls
        assert sum(row.accepted_by_depth) == row.num_accepted
    for name in ("num_emitted", "target_calls", "num_drafted", "num_tested", "num_accepted"):
        assert getattr(stats, name) == sum(counts[name] for counts in expected)
    assert stats.num_accepted > 10
    assert stats.acceptance_rate == stats.num_accepted / stats.num_tested
    assert stats.draft_acceptance_rate == stats.num_accepted / stats.num_drafted
    assert stats.target_passes == max(row.target_calls for row in stats.rows)


def row_index(stats: Any, row: Any) -> int:
    return next(index for index, other in enumerate(stats.rows) if other is row)


def test_the_trace_holds_the_text_and_valid_paths(model: Any, free: list[list[int]]) -> None:
    generator = well_informed(model, free)
    text: list[int] = []
    for step in generator.trace(tiny.ids(PROMPT), max_new_tokens=NEW, do_sample=False):
        parent = 0
        for node, token in zip(step.path, step.tokens, strict=False):
            assert int(step.tree.parents[node]) == parent
            assert int(step.tree.tokens[node]) == token
            parent = node
        assert int(step.tree.tokens[0]) == (PROMPT + text)[-1]
        text += step.tokens
    assert text == free[0]


@pytest.mark.parametrize("batch", [False, True])
def test_plain_decoding_has_block_efficiency_one(model: Any, batch: bool) -> None:
    generator = SpeculativeGenerator(model, drafter=None)
    inputs: Any = tiny.padded(ROWS) if batch else {"input_ids": tiny.ids(PROMPT)}
    generator.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    stats = generator.stats
    assert stats.block_efficiency == 1.0
    assert stats.mean_acceptance_length == 1.0
    assert stats.target_passes == NEW - 1
    assert stats.num_drafted == stats.num_accepted == stats.num_tested == 0
    assert stats.rows[0].num_generated == NEW


def test_a_text_of_one_token_has_no_calls(model: Any) -> None:
    generator = SpeculativeGenerator(model)
    generator.generate(tiny.ids(PROMPT), max_new_tokens=1)
    assert generator.stats.target_calls == generator.stats.num_emitted == 0
    assert generator.stats.block_efficiency == 0.0
    assert generator.stats.rows[0].num_generated == 1
    assert isinstance(generator.stats.explain(), str)


def test_prompts_are_counted_without_padding(model: Any) -> None:
    generator = SpeculativeGenerator(model)
    generator.generate(**tiny.padded(ROWS), max_new_tokens=2, pad_token_id=0)
    assert [row.num_prompt_tokens for row in generator.stats.rows] == [17, 6, 11]


def test_to_dict_is_json_and_complete(model: Any, free: list[list[int]]) -> None:
    generator = well_informed(model, free)
    generator.generate(tiny.ids(PROMPT), max_new_tokens=NEW, do_sample=False)
    stats = generator.stats
    numbers = json.loads(json.dumps(stats.to_dict()))
    assert numbers["num_emitted"] == NEW - 1
    assert numbers["settings"]["drafter"] == "oracle"
    assert numbers["block_efficiency"] == stats.block_efficiency > 2
    assert len(numbers["rows"]) == 1
    assert numbers["rows"][0]["finish_reason"] == "length"
    assert set(numbers["seconds"]) >= {
        "draft",
        "target",
        "processors",
        "verify",
        "commit",
        "observe",
    }
    assert all(seconds >= 0 for seconds in numbers["seconds"].values())


def test_explain_mentions_the_numbers(model: Any, free: list[list[int]]) -> None:
    generator = well_informed(model, free)
    generator.generate(tiny.ids(PROMPT), max_new_tokens=NEW, do_sample=False)
    stats, words = generator.stats, generator.stats.explain()
    for number in (stats.num_emitted, stats.target_calls, stats.num_drafted, stats.num_accepted):
        assert f" {number} " in words
    assert f"{stats.block_efficiency:.2f}" in words
    assert "oracle" in words


def test_memory_beside_the_model_is_told(model: Any) -> None:
    generator = SpeculativeGenerator(model, drafter="hybrid")
    generator.generate(tiny.ids(PROMPT), max_new_tokens=4)
    tables = generator.drafter.nbytes
    assert tables > 10e6
    assert generator.stats.to_dict()["kept_bytes"] == {"packed_weights": 0, "drafter": tables}
    assert f"Beside the model stand {tables / 1e6:.0f} MB of the dra" in generator.stats.explain()
    stats = DecodeStats(1, kept_bytes={"packed_weights": 7_000_000})
    stats.rows[0].target_calls = 1
    assert "stand 7 MB of packed weights (packed_weights=None leaves them" in stats.explain()


def test_the_stats_are_those_of_the_last_call(model: Any) -> None:
    generator = SpeculativeGenerator(model)
    assert generator.stats is None
    generator.generate(tiny.ids(PROMPT), max_new_tokens=5)
    first = generator.stats
    generator.generate(tiny.ids(PROMPT), max_new_tokens=9)
    assert generator.stats is not first
    assert (first.num_emitted, generator.stats.num_emitted) == (4, 8)


# ---- the model afterwards ----


def snapshot(model: Any) -> dict[str, Any]:
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "config": model.config.to_dict(),
        "generation config": model.generation_config.to_dict(),
        "hooks": [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ],
        "forwards": [(name, module.forward) for name, module in model.named_modules()],
        "attributes": sorted(vars(model)),
        "attention": model.config._attn_implementation,
        "training": model.training,
    }


def test_the_model_is_left_as_it_was_found() -> None:
    model = tiny.make_model("llama", seed=1)
    before = snapshot(model)
    with SpeculativeGenerator(model) as generator:
        generator.generate(
            tiny.ids(PROMPT), max_new_tokens=NEW, do_sample=True, repetition_penalty=1.2, seed=1
        )
    after = snapshot(model)
    weights_before, weights_after = before.pop("weights"), after.pop("weights")
    assert before == after
    assert all(torch.equal(weights_before[name], weights_after[name]) for name in weights_before)


def test_gradients_are_neither_made_nor_switched_off(model: Any) -> None:
    generator = SpeculativeGenerator(model)
    stream = generator.stream(tiny.ids(PROMPT), max_new_tokens=6)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()
    assert torch.is_grad_enabled()
    for step in generator.trace(tiny.ids(PROMPT), max_new_tokens=6):
        assert not step.logits.requires_grad
        assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
