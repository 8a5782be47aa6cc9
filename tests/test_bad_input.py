"""Bad input gets a clear error, nothing is lost, and everything can be used again afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from specdec import SpeculativeGenerator
from specdec.backend.cache_name import CACHE_NAMES
from specdec.drafters import PromptLookup, TokenRecycling
from specdec.drafters.base import BaseDrafter
from specdec.errors import BusyError, ConfigError, LogitsError
from specdec.trees import Chain, Static
from specdec.types import DraftContext, Draw, LawRows, Verdict
from specdec.verifiers import Coupled, Match, Rejection

PROMPT = tiny.prompt(17, seed=1)
ROWS = [PROMPT, tiny.prompt(6, seed=2), tiny.prompt(11, seed=3)]
NEW = 30
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model("llama", seed=1)


@pytest.fixture(scope="module")
def free(model: Any) -> list[list[int]]:
    return [written(model, row) for row in ROWS]


def written(model: Any, row: Sequence[int], count: int = NEW) -> list[int]:
    output: Tensor = model.generate(tiny.ids(row), max_new_tokens=count, do_sample=False)
    return output[0, len(row) :].tolist()


def well_informed(
    model: Any, texts: Sequence[Sequence[int]], **options: Any
) -> SpeculativeGenerator:
    return SpeculativeGenerator(model, drafter=tiny.Oracle(texts), node_budget=10, **options)


def streamed_until(
    error: type[BaseException],
    generator: SpeculativeGenerator,
    rows: int = 1,
    message: str | None = None,
    **arguments: Any,
) -> list[list[int]]:
    """Returns what each row was given by stream() before the error came."""
    texts: list[list[int]] = [[] for _ in range(rows)]

    def consume() -> None:
        for row, tokens in generator.stream(**arguments, pad_token_id=tiny.PAD, **GREEDY):
            texts[row] += tokens

    with pytest.raises(error, match=message):
        consume()
    return texts


def assert_usable(generator: SpeculativeGenerator, free: Sequence[Sequence[int]]) -> None:
    """Asserts that model and generator write what they always write."""
    output = generator.generate(tiny.ids(PROMPT), **GREEDY)
    assert output[0].tolist() == PROMPT + list(free[0])
    assert written(generator.model, PROMPT, 8) == list(free[0][:8])


# ---- prompts ----


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        pytest.param({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "empty", id="no token"),
        pytest.param({"input_ids": torch.zeros(0, 4, dtype=torch.int64)}, "empty", id="no row"),
        pytest.param({"input_ids": torch.tensor([3, 4])}, r"\[B, T\]", id="one dimension"),
        pytest.param({"input_ids": [[3, 4]]}, r"\[B, T\]", id="lists"),
        pytest.param({"input_ids": torch.ones(1, 4)}, "float32", id="floats"),
        pytest.param(
            {
                "input_ids": torch.tensor([[3, 4], [5, 6]]),
                "attention_mask": torch.tensor([[1, 1], [0, 0]]),
            },
            "row 1 is empty",
            id="a row masked altogether",
        ),
        pytest.param(
            {
                "input_ids": torch.tensor([[3, 4, 5]]),
                "attention_mask": torch.tensor([[0, 1]]),
            },
            "3 columns, attention_mask 2",
            id="mask too narrow",
        ),
        pytest.param(
            {
                "input_ids": torch.tensor([[3, 4, 5]]),
                "attention_mask": torch.tensor([[1, 1]]),
            },
            "3 columns, attention_mask 2",
            id="mask too narrow, all ones",
        ),
        pytest.param(
            {
                "input_ids": torch.tensor([[3, 4, 5]]),
                "attention_mask": torch.tensor([[0, 1, 1, 1]]),
            },
            "3 columns, attention_mask 4",
            id="mask too wide",
        ),
    ],
)
def test_a_prompt_that_is_none(
    model: Any, free: list[list[int]], inputs: dict[str, Any], message: str
) -> None:
    generator = well_informed(model, free)
    with pytest.raises(ConfigError, match=message):
        generator.generate(**inputs, max_new_tokens=4)
    assert_usable(generator, free)


def test_all_masked_rows_beside_a_filled_cache(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    generator = SpeculativeGenerator(model)
    batch = tiny.ids(PROMPT, PROMPT)
    generator.generate(batch, past_key_values=cache, **GREEDY)
    mask = torch.ones(2, cache.get_seq_length() + 2, dtype=torch.int64)
    mask[1, -2:] = 0
    with pytest.raises(ConfigError, match="row 1 has no token"):
        generator.generate(
            torch.tensor([[5, 6], [5, 6]]), attention_mask=mask, past_key_values=cache, **GREEDY
        )


def test_two_caches_are_refused(model: Any) -> None:
    both = {name: DynamicCache(config=model.config) for name in CACHE_NAMES}
    with pytest.raises(ConfigError, match="cache and past_key_values are one argument"):
        SpeculativeGenerator(model).generate(tiny.ids(PROMPT), **both, **GREEDY)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_has_its_old_and_its_new_name(model: Any, name: str) -> None:
    cache = DynamicCache(config=model.config)
    output = SpeculativeGenerator(model).generate(tiny.ids(PROMPT), **{name: cache}, **GREEDY)
    assert cache.get_seq_length() == output.shape[1] - 1


# ---- drafters whose vocabulary does not fit ----


class Guessing(BaseDrafter):
    """Always guesses one token."""

    name = "guessing"

    def __init__(self, token: int) -> None:
        self._token = token

    def law(self, context: DraftContext) -> Any:
        return self

    def extend(self, parent: int, token: int) -> int:
        return parent + 1

    def rows(self, handles: Sequence[int]) -> LawRows:
        ids = torch.full((len(handles), 1), self._token)
        return LawRows(torch.full((len(handles), 1), -0.1), ids)


def test_a_guess_outside_the_vocabulary_is_reported_with_both_sizes(
    model: Any, free: list[list[int]]
) -> None:
    generator = SpeculativeGenerator(model, drafter=Guessing(tiny.VOCAB + 7))
    message = r"'guessing' guessed token 103.*vocabulary has 96"
    texts = streamed_until(ConfigError, generator, message=message, input_ids=tiny.ids(PROMPT))
    assert texts == [free[0][:1]]


def test_wrong_guesses_inside_the_vocabulary_cost_nothing_but_time(
    model: Any, free: list[list[int]]
) -> None:
    wrong = next(t for t in range(tiny.VOCAB) if t not in free[0])
    generator = SpeculativeGenerator(model, drafter=Guessing(wrong))
    assert_usable(generator, free)
    assert generator.stats.num_accepted == 0


def test_a_table_of_another_vocabulary_is_refused_at_construction(model: Any) -> None:
    drafter = TokenRecycling()
    SpeculativeGenerator(tiny.make_model("llama", vocab_size=50), drafter=drafter)
    with pytest.raises(ConfigError, match=r"50 tokens.*96"):
        SpeculativeGenerator(model, drafter=drafter)


def test_a_table_wider_than_the_vocabulary_is_refused() -> None:
    model = tiny.make_model("llama", vocab_size=20)
    with pytest.raises(ConfigError, match=r"21.*20"):
        SpeculativeGenerator(model, drafter=TokenRecycling(num_successors=21))


# ---- logits ----


class Poison:
    """A processor that spoils the scores from its n-th call on."""

    def __init__(self, value: float, after: int) -> None:
        self._value, self._after, self._calls = value, after, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._calls += 1
        return torch.full_like(scores, self._value) if self._calls > self._after else scores


@pytest.mark.parametrize("verifier", ["match", "rejection", "coupled"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "NaN"), (-float("inf"), "minus infinity")]
)
@pytest.mark.parametrize("after", [0, 9], ids=["at once", "later"])
def test_spoiled_scores(
    model: Any,
    free: list[list[int]],
    value: float,
    message: str,
    after: int,
    do_sample: bool,
    verifier: str,
) -> None:
    generator = SpeculativeGenerator(model, verifier=verifier)
    with pytest.raises(LogitsError, match=message):
        generator.generate(
            tiny.ids(PROMPT),
            logits_processor=[Poison(value, after)],
            do_sample=do_sample,
            max_new_tokens=NEW,
            top_k=0,
        )
    assert_usable(generator, free)


def test_one_nan_among_good_logits_is_an_error_too(model: Any) -> None:
    def one(input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, 3] = float("nan")
        return scores

    with pytest.raises(LogitsError, match="NaN"):
        SpeculativeGenerator(model).generate(tiny.ids(PROMPT), logits_processor=[one], **GREEDY)


@pytest.mark.parametrize("drafter", [None, "token_recycling"])
def test_a_model_that_gives_nan(drafter: str | None) -> None:
    model = tiny.make_model("llama", seed=1)
    generator = SpeculativeGenerator(model, drafter=drafter)
    weight = model.model.norm.weight.data
    kept = weight.clone()
    weight.fill_(float("nan"))
    with pytest.raises(LogitsError, match=r"position 17.*NaN"):
        generator.generate(tiny.ids(PROMPT), **GREEDY)
    weight.copy_(kept)
    assert_usable(generator, [written(model, PROMPT)])


def test_nan_that_a_processor_removes_is_no_error(model: Any) -> None:
    arguments = {**GREEDY, "remove_invalid_values": True}

    def one(input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, 3] = float("nan")
        return scores

    def rescue(input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.nan_to_num(scores)

    expected = model.generate(tiny.ids(PROMPT), logits_processor=[one, rescue], **arguments)
    generator = SpeculativeGenerator(model)
    actual = generator.generate(tiny.ids(PROMPT), logits_processor=[one, rescue], **arguments)
    assert actual.tolist() == expected.tolist()


# ---- positions that run out ----

LEARNED = ["gpt2", "opt"]


def learned(family: str, positions: int) -> tuple[Any, Any]:
    """Returns a model with few positions, and the same model with many."""
    name = "n_positions" if family == "gpt2" else "max_position_embeddings"
    long = tiny.make_model(family, **{name: 200}, seed=1)
    short = tiny.make_model(family, **{name: positions}, seed=1)
    state = long.state_dict()
    for key, value in short.state_dict().items():
        state[key] = state[key][: len(value)]
    short.load_state_dict(state)
    return short, long


@pytest.mark.parametrize("family", LEARNED)
def test_a_prompt_longer_than_the_positions(family: str) -> None:
    short, _ = learned(family, 16)
    generator = SpeculativeGenerator(short)
    with pytest.raises(ConfigError, match=r"17 tokens.*16 learned positions"):
        generator.generate(tiny.ids(PROMPT), **GREEDY)
    ok = generator.generate(tiny.ids(PROMPT[:10]), max_new_tokens=3, do_sample=False)
    assert ok.shape == (1, 13)


@pytest.mark.parametrize("family", LEARNED)
@pytest.mark.parametrize("drafter", [None, "token_recycling", "oracle"])
@pytest.mark.parametrize("positions", [17, 18, 19, 25])
def test_positions_that_run_out_while_decoding_end_the_text(
    family: str, drafter: Any, positions: int, caplog: pytest.LogCaptureFixture
) -> None:
    short, long = learned(family, positions)
    text = written(long, PROMPT)
    if drafter == "oracle":
        drafter = tiny.Oracle([text])
    generator = SpeculativeGenerator(short, drafter=drafter)
    output = generator.generate(tiny.ids(PROMPT), **GREEDY)
    # the token at the last position still has a successor, which has no position itself
    room = positions - len(PROMPT) + 1
    assert output[0].tolist() == PROMPT + text[:room]
    assert generator.stats.rows[0].finish_reason == "positions"
    assert generator.stats.rows[0].num_generated == room
    assert "learned positions" in caplog.text
    expected = short.generate(tiny.ids(PROMPT), max_new_tokens=room, do_sample=False)
    assert output.tolist() == expected.tolist()


@pytest.mark.parametrize("family", LEARNED)
def test_a_text_that_just_fits_ends_for_its_own_reason(family: str) -> None:
    short, long = learned(family, 20)
    generator = SpeculativeGenerator(short)
    output = generator.generate(tiny.ids(PROMPT), max_new_tokens=4, do_sample=False)
    assert output[0].tolist() == PROMPT + written(long, PROMPT, 4)
    assert generator.stats.rows[0].finish_reason == "length"


@pytest.mark.parametrize("family", LEARNED)
def test_positions_run_out_row_by_row_in_a_batch(family: str) -> None:
    short, long = learned(family, 24)
    generator = SpeculativeGenerator(short)
    output = generator.generate(**tiny.padded(ROWS), **GREEDY, pad_token_id=tiny.PAD)
    reasons = []
    for row, prompt in enumerate(ROWS):
        room = min(24 - len(prompt) + 1, NEW)
        text = output[row, len(PROMPT) :].tolist()
        assert text[:room] == written(long, prompt)[:room]
        assert set(text[room:]) <= {tiny.PAD}
        reasons.append(generator.stats.rows[row].finish_reason)
    assert reasons == ["positions", "positions", "positions"]


@pytest.mark.parametrize("family", LEARNED)
def test_positions_that_ran_out_leave_a_usable_cache(family: str) -> None:
    short, _ = learned(family, 25)
    generator = SpeculativeGenerator(short)
    cache = DynamicCache(config=short.config)
    output = generator.generate(tiny.ids(PROMPT), past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == output.shape[1] - 1 == 25
    with pytest.raises(ConfigError, match="learned positions"):
        generator.generate(
            torch.cat([output, output[:, -1:]], dim=1), past_key_values=cache, **GREEDY
        )


def test_rotary_positions_do_not_run_out() -> None:
    model = tiny.make_model("llama", max_position_embeddings=20, seed=1)
    generator = SpeculativeGenerator(model)
    output = generator.generate(tiny.ids(PROMPT), **GREEDY)
    assert output.tolist() == model.generate(tiny.ids(PROMPT), **GREEDY).tolist()
    assert generator.stats.rows[0].finish_reason == "length"


# ---- two callers ----


def test_two_generators_on_one_model_work_in_turn(model: Any, free: list[list[int]]) -> None:
    first, second = SpeculativeGenerator(model), well_informed(model, free)
    for _ in range(2):
        assert_usable(first, free)
        assert_usable(second, free)
    first.close()
    assert_usable(second, free)


def test_two_generators_on_one_model_may_be_interleaved(model: Any, free: list[list[int]]) -> None:
    streams = [
        generator.stream(tiny.ids(PROMPT), **GREEDY)
        for generator in (SpeculativeGenerator(model), well_informed(model, free))
    ]
    texts: list[list[int]] = [[], []]
    for _ in range(NEW):
        for text, stream in zip(texts, streams, strict=True):
            text += next(stream, (0, []))[1]
    assert texts == [free[0], free[0]]


def test_a_second_thread_in_one_generator_is_told_so(model: Any, free: list[list[int]]) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def waiting(input_ids: Tensor, scores: Tensor) -> Tensor:
        inside.set()
        assert go_on.wait(60)
        return scores

    generator = SpeculativeGenerator(model)
    outputs: list[Tensor] = []

    def first() -> None:
        outputs.append(generator.generate(tiny.ids(PROMPT), logits_processor=[waiting], **GREEDY))

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(60)
    try:
        with pytest.raises(BusyError, match="thread"):
            generator.generate(tiny.ids(PROMPT), **GREEDY)
        with pytest.raises(BusyError, match="thread"):
            next(iter(generator.stream(tiny.ids(PROMPT), **GREEDY)))
    finally:
        go_on.set()
        thread.join()
    assert outputs[0][0].tolist() == PROMPT + free[0]
    assert_usable(generator, free)


def test_an_unfinished_stream_keeps_the_generator_busy(model: Any, free: list[list[int]]) -> None:
    generator = SpeculativeGenerator(model)
    stream = generator.stream(tiny.ids(PROMPT), **GREEDY)
    text = next(stream)[1]
    with pytest.raises(BusyError, match="closed"):
        generator.generate(tiny.ids(PROMPT), **GREEDY)
    for _, tokens in stream:  # the refused call has not disturbed it
        text = text + tokens
    assert text == free[0]
    assert_usable(generator, free)


def test_many_threads_leave_the_models_own_stop_strings_alone(model: Any) -> None:
    """The stop strings of the model's config are hidden while a call is prepared."""
    tokenizer = tiny.letters()
    generators = [SpeculativeGenerator(model, tokenizer) for _ in range(3)]
    stop = tokenizer.decode(written(model, PROMPT)[5:7])
    model.generation_config.stop_strings = stop
    expected = model.generate(tiny.ids(PROMPT), tokenizer=tokenizer, **GREEDY).tolist()
    wrong: list[Any] = []

    def work(generator: SpeculativeGenerator) -> None:
        for _ in range(15):
            try:
                output = generator.generate(tiny.ids(PROMPT), **GREEDY)
            except BusyError:
                continue
            if output.tolist() != expected:
                wrong.append(output.tolist())

    threads = [threading.Thread(target=work, args=(g,)) for g in generators + generators[:1]]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert model.generation_config.stop_strings == stop
    finally:
        model.generation_config.stop_strings = None
    assert wrong == []


# ---- construction ----


@pytest.mark.parametrize("budget", [0, -1, 2.5, "many", True, None])
def test_a_budget_that_is_none_is_refused(model: Any, budget: Any) -> None:
    with pytest.raises(ConfigError, match=r"node_budget.*drafter=None"):
        SpeculativeGenerator(model, node_budget=budget)


@pytest.mark.parametrize(
    ("part", "known"),
    [
        ("drafter", ["hybrid", "prompt_lookup", "suffix", "token_recycling", "trigram"]),
        ("policy", ["best_first", "chain", "static"]),
        ("verifier", ["coupled", "match", "rejection"]),
    ],
)
def test_an_unknown_name_lists_the_known_ones(model: Any, part: str, known: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"unknown {part} 'nonsense'") as error:
        SpeculativeGenerator(model, **{part: "nonsense"})
    assert all(name in str(error.value) for name in [*known, "auto"])


@pytest.mark.parametrize("part", ["drafter", "policy", "verifier"])
def test_an_object_that_is_no_part_is_refused(model: Any, part: str) -> None:
    with pytest.raises(ConfigError, match=f"{part} must be"):
        SpeculativeGenerator(model, **{part: object()})


@pytest.mark.parametrize("part", ["policy", "verifier"])
def test_only_the_drafter_may_be_none(model: Any, part: str) -> None:
    with pytest.raises(ConfigError, match=f"{part} must be"):
        SpeculativeGenerator(model, **{part: None})


@pytest.mark.parametrize(
    ("policy", "verifier", "names"),
    [
        (Chain(Draw.IID), Match(), ["chain", "iid", "match", "rejection"]),
        (Static(draw=Draw.WOR), Match(), ["static", "wor", "match", "rejection"]),
        (Static(draw=Draw.COUPLED), Rejection(), ["static", "coupled", "rejection"]),
        (Chain(Draw.COUPLED), Match(), ["chain", "coupled", "match"]),
    ],
)
def test_a_policy_whose_draws_the_verifier_refuses(
    model: Any, policy: Any, verifier: Any, names: list[str]
) -> None:
    with pytest.raises(ConfigError, match="would not be lossless") as error:
        SpeculativeGenerator(model, policy=policy, verifier=verifier)
    assert all(name in str(error.value) for name in names)
    SpeculativeGenerator(model, policy=policy, verifier=Coupled())


def test_bad_sizes_of_parts_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_successors"):
        TokenRecycling(num_successors=0)
    with pytest.raises(ConfigError, match="max_matching_ngram_size"):
        PromptLookup(max_matching_ngram_size=0)
    with pytest.raises(ConfigError, match="parent"):
        Static([(0, 0)])
    with pytest.raises(ConfigError, match="rank"):
        Static([(1,)])


# ---- arguments of a call ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 3}, "beam search"),
        ({"num_beams": 3, "do_sample": True}, "beam sample"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"dola_layers": "low"}, "dola"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group beam"),
        ({"num_beams": 3, "force_words_ids": [[5]]}, "constrained beam"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"position_ids": torch.arange(17).unsqueeze(0)}, "position_ids"),
        ({"inputs_embeds": torch.zeros(1, 17, 32)}, "not both"),
        ({"custom_generate": lambda **_: None}, "custom_generate"),
        ({"seed": [1, 2]}, "2 entries.*1 row"),
        ({"stop_strings": ["a"]}, "tokenizer"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens must be a positive int"),
        ({"prompt_lookup_num_tokens": -2}, "prompt_lookup_num_tokens must be a positive int"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_what_cannot_be_served_is_refused_by_name(
    model: Any, free: list[list[int]], arguments: dict[str, Any], message: str
) -> None:
    generator = well_informed(model, free)
    with pytest.raises(ConfigError, match=message):
        generator.generate(tiny.ids(PROMPT), **{**GREEDY, **arguments})
    assert_usable(generator, free)


def test_two_kinds_of_speculation_at_once_are_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="assistant_model or prompt_lookup_num_tokens"):
        SpeculativeGenerator(model).generate(
            tiny.ids(PROMPT), assistant_model=model, prompt_lookup_num_tokens=3, **GREEDY
        )


def test_an_assistant_of_another_vocabulary_is_refused(model: Any, free: list[list[int]]) -> None:
    generator = SpeculativeGenerator(model)
    with pytest.raises(ConfigError, match=r"50.*96"):
        generator.generate(
            tiny.ids(PROMPT), assistant_model=tiny.make_model("llama", vocab_size=50), **GREEDY
        )
    assert_usable(generator, free)


def test_embeddings_alone_are_refused_by_name(model: Any) -> None:
    with pytest.raises(ConfigError, match="inputs_embeds"):
        SpeculativeGenerator(model).generate(inputs_embeds=torch.zeros(1, 3, 32), **GREEDY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": None, "max_length": 3}, "max_length"),
        ({"temperature": -1.0, "do_sample": True}, "temperature"),
    ],
)
def test_what_generate_refuses_is_refused_alike(
    model: Any, free: list[list[int]], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as theirs:
        model.generate(tiny.ids(PROMPT), **{**GREEDY, **arguments})
    generator = well_informed(model, free)
    with pytest.raises(ValueError, match=message) as ours:
        generator.generate(tiny.ids(PROMPT), **{**GREEDY, **arguments})
    assert str(ours.value) == str(theirs.value)
    assert_usable(generator, free)


@pytest.mark.parametrize("seed", ["one", 1.5, [1.5], [None]])
def test_a_seed_that_is_no_number_is_refused(model: Any, seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed"):
        SpeculativeGenerator(model).generate(tiny.ids(PROMPT), do_sample=True, seed=seed)


# ---- exceptions from the user's own parts ----


class InterruptedByTestError(Exception):
    """The test's own, so that nothing else is caught by mistake."""


class FailingStreamer(BaseStreamer):
    def __init__(self, error: type[BaseException], at: str) -> None:
        self._error, self._at, self._calls = error, at, 0
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self._calls += 1
        if self._at == "prompt" or (self._at == "tokens" and self._calls == 4):
            raise self._error
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        if self._at == "end":
            raise self._error


class FailingCriterion(StoppingCriteria):
    def __init__(self, error: type[BaseException], calls: int) -> None:
        self._error, self._left = error, calls
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append(input_ids[0].tolist())
        self._left -= 1
        if self._left == 0:
            raise self._error
        return torch.zeros(len(input_ids), dtype=torch.bool)


def failing_processor(error: type[BaseException], calls: int) -> Callable[..., Tensor]:
    left = [calls]

    def processor(input_ids: Tensor, scores: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise error
        return scores

    return processor


ERRORS = pytest.mark.parametrize("error", [InterruptedByTestError, KeyboardInterrupt])


@ERRORS
@pytest.mark.parametrize("at", ["prompt", "tokens", "end"])
def test_a_streamer_that_fails(
    model: Any, free: list[list[int]], error: type[BaseException], at: str
) -> None:
    generator = well_informed(model, free)
    with pytest.raises(error):
        generator.generate(tiny.ids(PROMPT), streamer=FailingStreamer(error, at), **GREEDY)
    assert_usable(generator, free)


@ERRORS
@pytest.mark.parametrize("calls", [1, 2, 12])
@pytest.mark.parametrize("kind", ["processor", "criterion"])
@pytest.mark.parametrize("batch", [False, True], ids=["one row", "batch"])
def test_a_processor_or_criterion_that_fails(
    model: Any,
    free: list[list[int]],
    error: type[BaseException],
    calls: int,
    kind: str,
    batch: bool,
) -> None:
    generator = well_informed(model, free)
    inputs: Any = tiny.padded(ROWS) if batch else {"input_ids": tiny.ids(PROMPT)}
    arguments: dict[str, Any] = {"pad_token_id": tiny.PAD, **GREEDY}
    if kind == "processor":
        arguments["logits_processor"] = [failing_processor(error, calls)]
    else:
        arguments["stopping_criteria"] = [FailingCriterion(error, calls)]
    with pytest.raises(error):
        generator.generate(**inputs, **arguments)
    assert_usable(generator, free)
    output = generator.generate(**tiny.padded(ROWS), pad_token_id=tiny.PAD, **GREEDY)
    assert output[:, len(PROMPT) :].tolist() == free


@ERRORS
@pytest.mark.parametrize("where", ["embedding", "attention", "head"])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_an_interrupt_in_the_middle_of_a_pass(
    model: Any, free: list[list[int]], error: type[BaseException], where: str, call: int
) -> None:
    generator = well_informed(model, free)
    module = {
        "embedding": model.model.embed_tokens,
        "attention": model.model.layers[1].self_attn,
        "head": model.lm_head,
    }[where]
    left = [call]

    def interrupt(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error

    handle = module.register_forward_hook(interrupt)
    try:
        streamed = streamed_until(error, generator, input_ids=tiny.ids(PROMPT))[0]
    finally:
        handle.remove()
    assert streamed == free[0][: len(streamed)]
    assert (len(streamed) > 0) == (call > 1)
    assert generator.stats.rows[0].num_generated == len(streamed)
    assert_usable(generator, free)


class FailingDrafter(tiny.Oracle):
    """Fails in one of its methods, the second time it is called."""

    def __init__(self, texts: Sequence[Sequence[int]], method: str) -> None:
        super().__init__(texts)
        self._method, self._calls = method, 0
        self.running: set[int] = set()

    def _maybe_fail(self, method: str) -> None:
        if method == self._method:
            self._calls += 1
            if self._calls == 2:
                raise InterruptedByTestError

    def start(self, row: int, *arguments: Any) -> None:
        self.running.add(row)
        super().start(row, *arguments)
        self._maybe_fail("start")

    def law(self, context: DraftContext) -> Any:
        self._maybe_fail("law")
        return super().law(context)

    def expand(self, requests: Any) -> list[LawRows]:
        self._maybe_fail("expand")
        return super().expand(requests)

    def observe(self, outcomes: Any) -> None:
        self._maybe_fail("observe")

    def stop(self, row: int) -> None:
        self.running.discard(row)
        super().stop(row)


@pytest.mark.parametrize("method", ["start", "law", "expand", "observe"])
def test_a_drafter_that_fails_is_stopped_for_every_row(
    model: Any, free: list[list[int]], method: str
) -> None:
    drafter = FailingDrafter(free, method)
    generator = SpeculativeGenerator(model, drafter=drafter, node_budget=10)
    with pytest.raises(InterruptedByTestError):
        generator.generate(**tiny.padded(ROWS), pad_token_id=tiny.PAD, **GREEDY)
    assert drafter.running == set()
    assert_usable(generator, free)
    assert drafter.running == set()


def test_a_kept_traceback_does_not_disturb_a_later_call(model: Any, free: list[list[int]]) -> None:
    """It keeps the frames of the failed call alive; what they still do must not be done later."""
    generator = well_informed(model, free)
    kept = None
    try:
        generator.generate(
            tiny.ids(PROMPT), streamer=FailingStreamer(InterruptedByTestError, "tokens"), **GREEDY
        )
    except InterruptedByTestError as error:
        kept = error
    stream = generator.stream(tiny.ids(PROMPT), **GREEDY)
    text = next(stream)[1] + next(stream)[1]
    del kept
    for _, tokens in stream:
        text = text + tokens
    assert text == free[0]


# ---- what stream() has delivered ----


def assert_counted(generator: SpeculativeGenerator, texts: Sequence[Sequence[int]]) -> None:
    """Asserts that an interrupted call counted the tokens that it delivered, and no others."""
    for row, text in zip(generator.stats.rows, texts, strict=True):
        assert row.num_generated == len(text)
        assert row.num_emitted == max(len(text) - 1, 0)
        assert sum(row.acceptance_histogram) == row.target_calls <= generator.stats.target_passes
        assert sum(row.accepted_by_depth) == row.num_accepted


@ERRORS
@pytest.mark.parametrize("calls", [1, 2, 7, 12])
@pytest.mark.parametrize("verifier", ["coupled", "match", "rejection"])
def test_after_a_processor_failed_the_stream_has_delivered_every_token_before(
    model: Any, free: list[list[int]], error: type[BaseException], verifier: str, calls: int
) -> None:
    generator = well_informed(model, free, verifier=verifier)
    texts = streamed_until(
        error,
        generator,
        input_ids=tiny.ids(PROMPT),
        logits_processor=[failing_processor(error, calls)],
    )
    assert texts == [free[0][: calls - 1]]
    assert_counted(generator, texts)
    assert_usable(generator, free)


@ERRORS
@pytest.mark.parametrize("calls", [1, 2, 12])
@pytest.mark.parametrize("verifier", ["coupled", "traversal"])
def test_after_a_criterion_failed_the_stream_has_delivered_the_tokens_it_was_shown(
    model: Any, free: list[list[int]], error: type[BaseException], verifier: str, calls: int
) -> None:
    """The last one too: it was drawn, and `generate` puts it before it asks the criteria."""
    criterion = FailingCriterion(error, calls)
    generator = well_informed(model, free, verifier=verifier)
    texts = streamed_until(
        error, generator, input_ids=tiny.ids(PROMPT), stopping_criteria=[criterion]
    )
    assert PROMPT + texts[0] == criterion.seen[-1] == PROMPT + free[0][:calls]
    assert_counted(generator, texts)
    assert_usable(generator, free)


@ERRORS
@pytest.mark.parametrize("calls", [1, 2, 3, 4, 7, 16, 30])
@pytest.mark.parametrize("kind", ["processor", "criterion"])
def test_after_an_error_in_one_row_the_stream_has_delivered_the_others(
    model: Any, free: list[list[int]], error: type[BaseException], kind: str, calls: int
) -> None:
    shown: list[Tensor] = []  # copies of a part share it, as they share a function

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            shown.append(input_ids)
            if len(shown) == calls:
                raise error
            return torch.tensor([False])

    arguments: dict[str, Any] = {
        "processor": {"logits_processor": [failing_processor(error, calls)]},
        "criterion": {"stopping_criteria": [Criterion()]},
    }[kind]
    generator = well_informed(model, free)
    texts = streamed_until(error, generator, 3, **tiny.padded(ROWS), **arguments)
    assert texts == [text[: len(own)] for text, own in zip(free, texts, strict=True)]
    assert sum(map(len, texts)) == (calls - 1 if kind == "processor" else calls)
    assert_counted(generator, texts)
    assert_usable(generator, free)


@ERRORS
def test_a_streamer_is_given_every_token_before_an_error(
    model: Any, free: list[list[int]], error: type[BaseException]
) -> None:
    streamer = FailingStreamer(error, "never")
    with pytest.raises(error):
        well_informed(model, free).generate(
            tiny.ids(PROMPT),
            streamer=streamer,
            logits_processor=[failing_processor(error, 12)],
            **GREEDY,
        )
    assert streamer.tokens == PROMPT + free[0][:11]


def test_a_trace_ends_with_the_part_of_a_step_before_an_error(
    model: Any, free: list[list[int]]
) -> None:
    steps = []
    trace = well_informed(model, free).trace(
        tiny.ids(PROMPT), logits_processor=[failing_processor(InterruptedByTestError, 12)], **GREEDY
    )
    with pytest.raises(InterruptedByTestError):
        steps.extend(trace)
    assert [token for step in steps for token in step.tokens] == free[0][:11]
    assert steps[-1].tokens == steps[-1].tree.path_tokens(steps[-1].path[-1])


def test_a_stream_closed_before_an_error_is_raised_ends_in_peace(
    model: Any, free: list[list[int]]
) -> None:
    drafter = FailingDrafter(free, "none")
    generator = SpeculativeGenerator(model, drafter=drafter, node_budget=10)
    stream = generator.stream(
        **tiny.padded(ROWS),
        pad_token_id=tiny.PAD,
        logits_processor=[failing_processor(InterruptedByTestError, 3)],
        **GREEDY,
    )
    assert next(stream) == (0, free[0][:1])
    stream.close()
    assert drafter.running == set()
    assert_usable(generator, free)


@pytest.mark.parametrize("calls", [1, 2, 5, 17])
def test_the_drafter_is_stopped_for_every_row_when_a_processor_fails(
    model: Any, free: list[list[int]], calls: int
) -> None:
    drafter = FailingDrafter(free, "none")
    generator = SpeculativeGenerator(model, drafter=drafter, node_budget=10)
    processor = failing_processor(InterruptedByTestError, calls)
    streamed_until(
        InterruptedByTestError, generator, 3, **tiny.padded(ROWS), logits_processor=[processor]
    )
    assert drafter.running == set()
    assert_usable(generator, free)


def test_logits_that_go_wrong_inside_a_block_lose_nothing_before_them(
    model: Any, free: list[list[int]]
) -> None:
    def spoil(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        kept = kwargs["position_ids"][:, -output.logits.shape[1] :]
        output.logits[kept >= len(PROMPT) + 10] = torch.nan

    generator = well_informed(model, free)
    handle = model.register_forward_hook(spoil, with_kwargs=True)
    try:
        texts = streamed_until(LogitsError, generator, input_ids=tiny.ids(PROMPT))
    finally:
        handle.remove()
    assert texts == [free[0][:11]]
    assert_counted(generator, texts)
    assert_usable(generator, free)


class Wanderer(Match):
    """Says that it walks down, but looks everywhere first."""

    name = "wanderer"

    def verify(self, tree: Any, target: Any, random: Any) -> Verdict:
        for node in range(len(tree)):
            target.argmax(node)
        return super().verify(tree, target, random)


def test_a_verifier_that_turns_back_on_its_walk_is_an_error(
    model: Any, free: list[list[int]]
) -> None:
    generator = well_informed(model, free, verifier=Wanderer())
    with pytest.raises(ConfigError, match="walks_down"):
        generator.generate(tiny.ids(PROMPT), **GREEDY)
