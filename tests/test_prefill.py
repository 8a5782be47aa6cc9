"""Prompts of a batch: each runs once and without padding, and is what it would be alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from specdec import SpeculativeGenerator
from specdec.backend.probe import probed
from specdec.prefill import groups, prefill_order, sources_of
from specdec.target import TargetModel
from specdec.trees.tree import DraftTree
from specdec.types import DrafterNeeds, PromptRows

LONG, MIDDLE, SHORT = (tiny.prompt(n, seed=n) for n in (61, 30, 3))
# in no good order; the third and the last repeat earlier ones
PROMPTS = [MIDDLE, LONG, MIDDLE, SHORT, tiny.prompt(34, seed=9), LONG]

one_thread = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)


@pytest.mark.parametrize(
    ("lengths", "slack", "expected"),
    [
        ([7], 0, [range(1)]),
        ([5, 5, 5], 0, [range(3)]),
        ([9, 5, 5], 0, [range(1), range(1, 3)]),
        ([9, 5, 5], 7, [range(2), range(2, 3)]),
        ([9, 5, 5], 8, [range(3)]),
        ([3, 9, 3], 6, [range(2), range(2, 3)]),
        ([40, 30, 20, 10], 10, [range(2), range(2, 4)]),
    ],
)
def test_rows_share_a_pass_while_they_need_little_padding(
    lengths: list[int], slack: int, expected: list[range]
) -> None:
    assert groups(lengths, slack) == expected


def test_long_prompts_come_first_and_repeated_ones_last() -> None:
    assert sources_of(PROMPTS) == [0, 1, 0, 3, 4, 1]
    assert prefill_order(PROMPTS) == [1, 4, 0, 3, 5, 2]


@torch.no_grad()
def prefilled(
    model: Any, prompts: Sequence[Sequence[int]], needs: DrafterNeeds
) -> tuple[list[Tensor], list[PromptRows | None], Tensor]:
    """Returns what a prefill does, and the logits of the step behind it."""
    backend = probed(model)
    target = TargetModel(backend, backend.new_cache(len(prompts), 128), needs)
    last, rows = target.prefill(prompts)
    assert target.lengths == [len(prompt) for prompt in prompts]
    trees = [DraftTree.from_lists([5, 6, 7], [-1, 0, 0])] * len(prompts)
    return last, rows, target.score(trees).logits


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("top_k", [0, 4])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_row_is_what_it_would_be_alone(family: str, top_k: int, ordered: bool) -> None:
    """Cache, last logits and prompt rows, in the order that runs best and in another."""
    model = tiny.make_model(family, dtype=torch.float64)
    needs = DrafterNeeds(prompt_top_k=top_k, layers=(1,))
    order = prefill_order(PROMPTS) if ordered else range(len(PROMPTS))
    prompts = [PROMPTS[row] for row in order]
    last, rows, after = prefilled(model, prompts, needs)
    for row, prompt in enumerate(prompts):
        own_last, own_rows, own_after = prefilled(model, [prompt], needs)
        torch.testing.assert_close(last[row], own_last[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(after[row], own_after[0], rtol=1e-9, atol=1e-9)
        mine, own = rows[row], own_rows[0]
        assert mine is not None
        assert own is not None
        assert mine.features is not None
        assert torch.equal(mine.ids, own.ids)
        assert len(mine.ids) == (len(prompt) if top_k else 0)
        torch.testing.assert_close(mine.logits, own.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.features, own.features, rtol=1e-9, atol=1e-9)


def tokens_run(model: Any, run: Any) -> list[int]:
    """Returns the tokens of each pass of a model, padding counted."""
    sizes: list[int] = []

    def count(_module: Any, arguments: Any, _output: Any) -> None:
        sizes.append(arguments[0].numel())

    handle = model.get_input_embeddings().register_forward_hook(count)
    try:
        run()
    finally:
        handle.remove()
    return sizes


def test_prompts_run_once_and_without_padding() -> None:
    model = tiny.make_model("llama")
    generator = SpeculativeGenerator(model, drafter=None)
    inputs = tiny.padded(PROMPTS)

    def run() -> None:
        generator.generate(**inputs, max_new_tokens=1, do_sample=False)

    # the one of 30 shares a pass with that of 34
    assert tokens_run(model, run) == [61, 2 * 34, 3]


def test_samples_of_one_prompt_share_its_prefill() -> None:
    model = tiny.make_model("llama")
    generator = SpeculativeGenerator(model, drafter=None)
    arguments: dict[str, Any] = {"max_new_tokens": 4, "do_sample": True, "seed": 3}
    texts: list[Tensor] = []

    def run() -> None:
        texts.append(generator.generate(tiny.ids(LONG), num_return_sequences=5, **arguments))

    assert tokens_run(model, run)[0] == len(LONG)
    assert len({tuple(text) for text in texts[0].tolist()}) > 1
    # the fifth row is the one of number 4 in any batch, also in one whose prompts all differ
    others = tiny.ids(*(tiny.prompt(len(LONG), seed=n) for n in range(4)), LONG)
    assert torch.equal(texts[0][4], generator.generate(others, **arguments)[4])


def test_a_ragged_batch_runs_under_autocast() -> None:
    """Keys then come in another dtype than the cache has; rows of unlike length take it as well."""
    generator = SpeculativeGenerator(tiny.make_model("llama"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text = generator.generate(**tiny.padded(PROMPTS), max_new_tokens=4, do_sample=False)
    assert text.shape == (len(PROMPTS), len(LONG) + 4)


def test_a_cache_that_grows_during_the_prefill_keeps_every_row() -> None:
    model = tiny.make_model("llama", dtype=torch.float64)
    backend = probed(model)
    small, large = (TargetModel(backend, backend.new_cache(6, room)) for room in (4, 128))
    with torch.no_grad():
        for mine, own in zip(small.prefill(PROMPTS)[0], large.prefill(PROMPTS)[0], strict=True):
            torch.testing.assert_close(mine, own, rtol=1e-12, atol=1e-12)
    for row, prompt in enumerate(PROMPTS):
        for mine, own in zip(
            small.cache.row_states(row, len(prompt)),
            large.cache.row_states(row, len(prompt)),
            strict=True,
        ):
            torch.testing.assert_close(mine, own, rtol=1e-12, atol=1e-12)


def test_an_error_in_a_later_group_leaves_the_generator_usable() -> None:
    model = tiny.make_model("llama")
    generator = SpeculativeGenerator(model, drafter=None)
    inputs = tiny.padded(PROMPTS)
    arguments: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    expected = generator.generate(**inputs, **arguments)
    passes: list[int] = []

    def fail(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 2:
            raise RuntimeError("out of memory")

    handle = model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            generator.generate(**inputs, **arguments)
    finally:
        handle.remove()
    assert torch.equal(generator.generate(**inputs, **arguments), expected)


def test_steps_come_in_the_order_of_the_rows() -> None:
    generator = SpeculativeGenerator(tiny.make_model("llama"), drafter=None)
    stream = generator.stream(**tiny.padded(PROMPTS), max_new_tokens=2, do_sample=False)
    assert [row for row, _ in stream] == 2 * list(range(len(PROMPTS)))
