"""Times generation methods against one another, prompt by prompt in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specdec.generator import SpeculativeGenerator
from specdec.stats import Counts, DecodeStats

BASELINE = "model.generate"
PLAIN = "plain, our loop"
LOOKUP = "transformers prompt lookup"
ASSISTED = "transformers assisted"


@dataclass(frozen=True, slots=True)
class Run:
    """One method on one prompt (or batch of prompts).

    Attributes:
        method: its name.
        prompt: the number of the prompt.
        category: of the prompt.
        seconds: from the call to its return, prefill included.
        baseline_seconds: of `model.generate` on the same prompt in the same round.
        num_tokens: new tokens of all rows.
        counts: of all rows; transformers' methods tell nothing of their drafts, so theirs are all
            tokens and all passes, the first pass included, which verifies guesses there too.
        draft_seconds: spent on drafting and on learning from what became of it; None where the
            method does not tell, this and the next two.
        beside_seconds: of the steps beside the target's passes, see `DecodeStats`.
        step_seconds: of the steps, prefill and the user's processors left out.
        identical: whether the tokens are those of the baseline; None where the method samples
            other tokens by design.
    """

    method: str
    prompt: int
    category: str
    seconds: float
    baseline_seconds: float
    num_tokens: int
    counts: Counts
    draft_seconds: float | None
    beside_seconds: float | None
    step_seconds: float | None
    identical: bool | None

    @property
    def speedup(self) -> float:
        """Seconds of the baseline for each second of the method."""
        return self.baseline_seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers, strings and lists; counts and ratios stand among the rest."""
        values = asdict(self)
        del values["counts"]
        return values | {"speedup": self.speedup} | self.counts.to_dict()


class Method:
    """A way to generate.

    Args:
        model: what the passes are counted of, where there is no generator to tell them.
        generator: the toolkit's generator; None for a method of transformers.
        **extra: more arguments of `model.generate`, for a method of transformers.
    """

    def __init__(
        self, model: Any, generator: SpeculativeGenerator | None = None, **extra: Any
    ) -> None:
        self.generator = generator
        self._model = model
        self._extra = extra

    @property
    def settings(self) -> dict[str, Any]:
        """The parts that the last call had, or the arguments that make transformers' method."""
        stats = self.generator.stats if self.generator is not None else None
        if stats is not None:
            return stats.settings
        return {k: v for k, v in self._extra.items() if isinstance(v, int | str)}

    def forget(self) -> None:
        """Makes the drafter forget what it has learned of the texts so far."""
        if self.generator is not None and self.generator.drafter is not None:
            self.generator.drafter.reset()

    def run(
        self, inputs: Mapping[str, Tensor], **arguments: Any
    ) -> tuple[Tensor, int, Counts, DecodeStats | None]:
        """Returns ids ``[B, T + new]``, new tokens and counts as in `Run`, and all else told."""
        ids = inputs["input_ids"]
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        if self.generator is None:
            with _counted_passes(self._model) as passes:
                text = self._model.generate(ids, **rest, **arguments, **self._extra)
            tokens = len(ids) * (text.shape[1] - ids.shape[1])
            return text, tokens, Counts(tokens, len(ids) * passes[0]), None
        text = self.generator.generate(ids, **{**rest, **arguments})
        stats = self.generator.stats
        assert stats is not None
        assert isinstance(text, Tensor)
        tokens = sum(row.num_generated for row in stats.rows)
        return text, tokens, stats.totals, stats


@contextmanager
def _counted_passes(model: Any) -> Iterator[list[int]]:
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    handle = model.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def methods_of(
    model: Any,
    tokenizer: Any,
    drafters: Mapping[str, Any],
    *,
    assistant: Any = None,
    with_lookup: bool = True,
    **settings: Any,
) -> dict[str, Callable[[], Method]]:
    """Returns what makes the baseline, our loop without drafts, transformers' rivals, our drafters.

    Args:
        model: the target.
        tokenizer: its tokenizer.
        drafters: names to drafters, or to dicts of arguments of `SpeculativeGenerator`.
        assistant: a draft model for transformers' assisted generation.
        with_lookup: time transformers' prompt lookup too; it takes one row only.
        **settings: for every `SpeculativeGenerator`.
    """

    def ours(arguments: Mapping[str, Any]) -> Callable[[], Method]:
        return lambda: Method(
            model, SpeculativeGenerator(model, tokenizer, **{**settings, **arguments})
        )

    makers: dict[str, Callable[[], Method]] = {
        BASELINE: lambda: Method(model),
        PLAIN: ours({"drafter": None}),
    }
    if with_lookup:
        makers[LOOKUP] = lambda: Method(model, prompt_lookup_num_tokens=10)
    if assistant is not None:
        makers[ASSISTED] = lambda: Method(model, assistant_model=assistant)
    for name, drafter in drafters.items():
        makers[name] = ours(drafter if isinstance(drafter, dict) else {"drafter": drafter})
    return makers


def time_prompts(
    methods: Mapping[str, Method],
    prompts: Sequence[tuple[str, dict[str, Tensor]]],
    *,
    repeats: int = 1,
    progress: Callable[[Sequence[int]], Any] = lambda indices: indices,
    **arguments: Any,
) -> list[Run]:
    """Returns a run for each method and prompt; the order of the methods alternates.

    A pause of the machine then hits all methods alike, and a drift cancels in the ratios. Every
    round begins with drafters that have learned nothing, so that none has seen a text before.

    Args:
        methods: the baseline must be among them.
        prompts: category and model inputs (`input_ids`, perhaps `attention_mask`) of each.
        repeats: rounds over the prompts; the least time of a method on a prompt counts.
        progress: wraps the numbers of the prompts of all rounds, as tqdm does.
        **arguments: of `generate`.
    """
    order = list(methods)
    best: dict[tuple[int, str], Run] = {}
    for number in progress(range(repeats * len(prompts))):
        index, turn = number % len(prompts), number // len(prompts)
        if index == 0:
            for method in methods.values():
                method.forget()
        category, inputs = prompts[index]
        now: dict[str, Any] = {}
        forward = (index + turn) % 2 == 0
        for name in order if forward else order[::-1]:
            torch.manual_seed(index)  # for calls that sample
            begin = time.perf_counter()
            done = methods[name].run(inputs, **arguments)
            now[name] = (time.perf_counter() - begin, *done)
        baseline_seconds, expected, *_ = now[BASELINE]
        for name, (seconds, text, tokens, counts, stats) in now.items():
            same = text.shape == expected.shape and torch.equal(text, expected)
            run = Run(
                method=name,
                prompt=index,
                category=category,
                seconds=seconds,
                baseline_seconds=baseline_seconds,
                num_tokens=tokens,
                counts=counts,
                draft_seconds=stats and stats.seconds["draft"] + stats.seconds["observe"],
                beside_seconds=stats and stats.beside_seconds,
                step_seconds=stats and stats.step_seconds,
                identical=None if arguments["do_sample"] else same,
            )
            known = best.setdefault((index, name), run)
            best[index, name] = min(known, run, key=lambda one: one.seconds)
    least = {index: best[index, BASELINE].seconds for index in range(len(prompts))}
    return [
        replace(best[index, name], baseline_seconds=least[index])
        for index in range(len(prompts))
        for name in order
    ]
