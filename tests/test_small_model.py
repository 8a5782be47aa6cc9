"""A draft model of the target's tokenizer: always right for itself, and robust where it differs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from transformers import MambaConfig, MambaForCausalLM

from specdec import SpeculativeGenerator
from specdec.build import POLICIES, VERIFIERS
from specdec.drafters import SmallModel
from specdec.errors import ConfigError, UnsupportedModelError
from specdec.trees import Chain, CoupledBestFirst, Static
from specdec.types import Draw, TargetInfo

NEW = 40
ROWS = [tiny.prompt(length, seed=length) for length in (5, 14, 9)]
WIDTH = max(map(len, ROWS))
SEEDS = [5, 6, 7]
TREE = [(0,), (1,), (0, 0), (0, 1), (0, 0, 0)]
TRUNCATIONS: dict[str, dict[str, Any]] = {
    "whole": {"top_k": 0},
    "top_p": {"top_k": 0, "top_p": 0.8},
    "top_k and min_p": {"top_k": 7, "min_p": 0.02},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture(scope="module")
def model() -> Any:
    """In float64: q and p are then the same number in the float32 of the laws, all but always."""
    return tiny.make_model("llama", dtype=torch.float64, seed=1)


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny.make_model("llama", seed=1)


def sampling(temperature: float, truncation: str = "whole") -> dict[str, Any]:
    if temperature == 0.0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, **TRUNCATIONS[truncation]}


# ---- a model that drafts for itself ----


@pytest.mark.parametrize(
    ("drawn", "verifier"),
    [
        (Chain(Draw.IID), "rejection"),
        (Chain(Draw.WOR), "traversal"),
        (Chain(Draw.IID), "block"),
        (Static(TREE, Draw.WOR), "rejection"),
        (Static(TREE, Draw.IID), "traversal"),
        (Chain(Draw.COUPLED), "coupled"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
@pytest.mark.parametrize(
    ("temperature", "truncation"),
    [(0.0, "whole"), *((t, name) for t in (0.5, 1.0, 2.0) for name in TRUNCATIONS)],
)
def test_a_model_that_drafts_for_itself_is_always_right(
    model: Any, temperature: float, truncation: str, drawn: Any, verifier: str
) -> None:
    """transformers applies temperature and truncations twice to its assistant.

    At temperature 0 nothing is drawn: there the most probable token is the right one.
    """
    policy = drawn
    if temperature == 0.0:
        policy = Chain() if isinstance(drawn, Chain) else Static(TREE)
    generator = SpeculativeGenerator(
        model, drafter=SmallModel(model), policy=policy, verifier=verifier, node_budget=5
    )
    accepted = 0
    for step in generator.trace(
        **tiny.padded(ROWS),
        max_new_tokens=NEW,
        seed=SEEDS,
        pad_token_id=tiny.PAD,
        **sampling(temperature, truncation),
    ):
        # every first child is right, down to a leaf
        leaf = step.path[-1] if step.path else 0
        assert not step.tree.children[leaf] or step.next_token is None
        accepted += len(step.path)
    assert accepted > NEW


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_trees_that_see_the_noise_hold_the_next_token_nearly_always(
    model: Any, temperature: float
) -> None:
    """Not always: their estimate is learned, and ranks fewer candidates than there are."""
    generator = SpeculativeGenerator(
        model, drafter=SmallModel(model), policy=CoupledBestFirst(), node_budget=5
    )
    generator.generate(
        **tiny.padded(ROWS),
        max_new_tokens=NEW,
        seed=SEEDS,
        pad_token_id=tiny.PAD,
        **sampling(temperature, "top_p"),
    )
    histogram = generator.stats.acceptance_histogram
    assert histogram[0] < 0.1 * sum(histogram)


def test_a_penalty_costs_acceptance_and_no_exactness(model: Any) -> None:
    """The draft law follows temperature and truncations only."""
    plain = SpeculativeGenerator(model, drafter=None, verifier="coupled")
    generator = SpeculativeGenerator(model, drafter=SmallModel(model), verifier="coupled")
    arguments = {
        **tiny.padded(ROWS),
        **sampling(1.0, "top_p"),
        "repetition_penalty": 1.5,
        "max_new_tokens": NEW,
        "seed": SEEDS,
        "pad_token_id": tiny.PAD,
    }
    assert torch.equal(plain.generate(**arguments), generator.generate(**arguments))
    assert 0 < generator.stats.num_accepted < 3 * NEW


# ---- draft models that differ ----


def identical(target: Any, drafter: Any, **options: Any) -> SpeculativeGenerator:
    """Asserts that greedy and coupled text are those of plain decoding; returns the generator."""
    plain = SpeculativeGenerator(target, drafter=None, verifier="coupled")
    # an automatic budget would leave out a drafter that is of no use
    generator = SpeculativeGenerator(target, drafter=drafter, node_budget=8, **options)
    batch = tiny.padded(ROWS)
    given: dict[str, Any] = {"max_new_tokens": NEW, "pad_token_id": tiny.PAD}
    sampled = {**batch, **given, **sampling(0.7, "top_p"), "seed": SEEDS}
    assert torch.equal(plain.generate(**sampled), generator.generate(**sampled))
    output: Any = generator.generate(**batch, **given, do_sample=False)
    for row, prompt in enumerate(ROWS):
        alone = target.generate(tiny.ids(prompt), **given, do_sample=False)
        assert output[row, WIDTH:].tolist() == alone[0, len(prompt) :].tolist()
    return generator


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_another_model_changes_nothing(target: Any, family: str) -> None:
    drafter = SmallModel(tiny.make_model(family, tiny.FAMILIES[family][2][0], seed=4))
    assert identical(target, drafter).stats.num_drafted > NEW


def test_a_drafter_of_another_dtype(target: Any) -> None:
    rounded = tiny.make_model("llama", dtype=torch.bfloat16, seed=1)
    assert identical(target, SmallModel(rounded)).stats.num_accepted > NEW


@pytest.mark.parametrize("size", [198, 202])
def test_tables_padded_to_different_widths(size: int) -> None:
    target = tiny.make_model("llama", vocab_size=200, seed=1)
    drafter = SmallModel(tiny.make_model("llama", vocab_size=size, seed=2))
    assert identical(target, drafter).stats.num_drafted > NEW


# ---- where the draft model's positions end ----

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "overrides",
    [
        {"family": "gpt2", "n_positions": 32},
        {"family": "opt", "max_position_embeddings": 32},
        {"family": "llama", "max_position_embeddings": 32, "rope_parameters": DYNAMIC},
    ],
    ids=lambda overrides: overrides["family"],
)
def test_a_drafter_whose_positions_end_stops_drafting(
    target: Any, overrides: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    short = tiny.make_model(**overrides, seed=3)
    generator = SpeculativeGenerator(
        target, drafter=SmallModel(short), policy=Chain(), node_budget=5
    )
    arguments = {"max_new_tokens": NEW, "do_sample": False}
    with caplog.at_level(logging.WARNING, logger="specdec"):
        depths: dict[int, int] = {}  # drafted by the length of the text, over all rows
        written = [len(row) for row in ROWS]
        plain = SpeculativeGenerator(target, drafter=None).generate(
            **tiny.padded(ROWS), **arguments
        )
        texts: list[list[int]] = [[] for _ in ROWS]
        for step in generator.trace(**tiny.padded(ROWS), **arguments):
            length = written[step.row] + len(texts[step.row])
            depths[length] = max(depths.get(length, 0), len(step.tree) - 1)
            texts[step.row] += step.tokens
    assert plain[:, WIDTH:].tolist() == texts
    # behind a text of n tokens the last of a chain of k is never run: n + k - 1 positions
    assert all(depth == 0 or length + depth - 1 <= 32 for length, depth in depths.items())
    assert max(length for length, depth in depths.items() if depth == 5) in (26, 27, 28)
    assert max(depth for length, depth in depths.items() if length > 32) == 0
    assert caplog.text.count("draft model's 32 positions") == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_takes_a_drafter_that_knows_nothing(target: Any, policy: str) -> None:
    short = SmallModel(tiny.make_model("gpt2", n_positions=8))
    verifier = next(name for name in ("traversal", "spectr", "coupled") if fits(policy, name))
    arguments = {**tiny.padded(ROWS[1:]), "max_new_tokens": 6, "do_sample": False}
    generator = SpeculativeGenerator(target, drafter=short, policy=policy, verifier=verifier)
    plain = SpeculativeGenerator(target, drafter=None)
    assert torch.equal(generator.generate(**arguments), plain.generate(**arguments))
    assert generator.stats.num_drafted == 0
    generator.generate(**{**arguments, "do_sample": True})
    assert generator.stats.num_drafted == 0


def fits(policy: str, verifier: str) -> bool:
    return bool(POLICIES[policy]().draws <= VERIFIERS[verifier]().accepts)


# ---- what is refused ----


def test_a_drafter_on_another_device_is_refused(model: Any) -> None:
    drafter = SmallModel(model)
    elsewhere = TargetInfo(tiny.VOCAB, device=torch.device("cuda", 0))
    with pytest.raises(ConfigError, match=r"is on cpu, the target on cuda:0; move it"):
        drafter.attach(elsewhere)


def test_a_recurrent_drafter_is_refused() -> None:
    recurrent = MambaForCausalLM(
        MambaConfig(vocab_size=tiny.VOCAB, hidden_size=16, state_size=4, num_hidden_layers=1)
    )
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM.*(state|tree)"):
        SmallModel(recurrent)


def test_a_drafter_in_training_mode_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"training mode: call model.eval\(\)"):
        SmallModel(tiny.make_model("gpt2").train())


def test_another_vocabulary_says_where_a_tokenizer_goes(model: Any) -> None:
    drafter = SmallModel(tiny.make_model("llama", vocab_size=2 * tiny.VOCAB))
    with pytest.raises(ConfigError, match=r"has 192 tokens, the target 96.*tokenizer=draft_tok"):
        SpeculativeGenerator(model, drafter=drafter)


def test_a_target_tokenizer_alone_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="pass tokenizer=draft_tokenizer too"):
        SmallModel(model, target_tokenizer=tiny.letters())


# ---- the row's life ----


def nothing_is_left(drafter: SmallModel) -> bool:
    state = (drafter._places, drafter._waiting, drafter._laws, drafter._read, drafter._kept)
    return not any(state)


def test_rows_that_end_leave_the_draft_models_batch(target: Any) -> None:
    texts = SpeculativeGenerator(target, drafter=None).generate(
        **tiny.padded(ROWS), max_new_tokens=NEW, do_sample=False
    )[:, WIDTH:]
    ends = [int(texts[0, 9]), int(texts[2, 20])]
    drafter = SmallModel(target)
    generator = SpeculativeGenerator(target, drafter=drafter)
    plain = SpeculativeGenerator(target, drafter=None)
    arguments = {"eos_token_id": ends, "pad_token_id": tiny.PAD, "max_new_tokens": NEW}
    given = {**tiny.padded(ROWS), **arguments, "do_sample": False}
    assert torch.equal(plain.generate(**given), generator.generate(**given))
    assert nothing_is_left(drafter)


def test_a_call_that_was_broken_off_leaves_nothing_behind(target: Any) -> None:
    drafter = SmallModel(target)
    generator = SpeculativeGenerator(target, drafter=drafter)
    arguments = {**tiny.padded(ROWS), "max_new_tokens": NEW, "do_sample": False}
    stream = generator.stream(**arguments)
    next(stream)
    next(stream)
    stream.close()
    assert nothing_is_left(drafter)
    plain = SpeculativeGenerator(target, drafter=None)
    assert torch.equal(generator.generate(**arguments), plain.generate(**arguments))
