"""Times generation methods against one another, prompt by prompt in one process."""

from __future__ import annotations

import gc
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from specdec.generator import SpeculativeGenerator

BASELINE = "model.generate"
OVERALL = "overall"


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
        block_efficiency: tokens for each target call, NaN where the method does not tell.
        identical: whether the tokens are those of the baseline; None where the method samples
            other tokens by design.
    """

    method: str
    prompt: int
    category: str
    seconds: float
    baseline_seconds: float
    num_tokens: int
    block_efficiency: float
    identical: bool | None

    @property
    def speedup(self) -> float:
        """Seconds of the baseline for each second of the method."""
        return self.baseline_seconds / self.seconds


@dataclass(frozen=True, slots=True)
class Method:
    """A way to generate.

    Attributes:
        run: from ids and keyword arguments of `generate` to ids ``[B, T + new]``.
        generator: the toolkit's generator behind it, None for a method of transformers.
    """

    run: Callable[..., Tensor]
    generator: SpeculativeGenerator | None = None


def methods_of(
    model: Any,
    tokenizer: Any,
    drafters: Mapping[str, Any],
    *,
    assistant: Any = None,
    with_lookup: bool = True,
    **settings: Any,
) -> dict[str, Method]:
    """Returns the baseline, plain decoding through our loop, transformers' rivals, our drafters.

    Args:
        model: the target.
        tokenizer: its tokenizer.
        drafters: names to drafters, or to dicts of arguments of `SpeculativeGenerator`.
        assistant: a draft model for transformers' assisted generation.
        with_lookup: time transformers' prompt lookup too; it takes one row only.
        **settings: for every `SpeculativeGenerator`.
    """

    def ours(**arguments: Any) -> Method:
        generator = SpeculativeGenerator(model, tokenizer, **{**settings, **arguments})
        return Method(generator.generate, generator)  # type: ignore[arg-type]

    def theirs(**extra: Any) -> Method:
        def run(ids: Tensor, **arguments: Any) -> Tensor:
            generated: Tensor = model.generate(ids, **arguments, **extra)
            return generated

        return Method(run)

    methods = {BASELINE: theirs(), "plain, our loop": ours(drafter=None)}
    if with_lookup:
        methods["transformers prompt lookup"] = theirs(prompt_lookup_num_tokens=10)
    if assistant is not None:
        methods["transformers assisted"] = theirs(assistant_model=assistant)
    for name, drafter in drafters.items():
        methods[name] = ours(**(drafter if isinstance(drafter, dict) else {"drafter": drafter}))
    return methods


def time_prompts(
    methods: Mapping[str, Method],
    prompts: Sequence[tuple[str, dict[str, Tensor]]],
    *,
    repeats: int = 1,
    progress: Callable[[Sequence[int]], Any] = lambda indices: indices,
    **arguments: Any,
) -> list[Run]:
    """Returns a run for each method, prompt and repeat; the order of the methods alternates.

    A pause of the machine then hits all methods alike, and a drift cancels in the ratios.

    Args:
        methods: from `methods_of`; the baseline must be among them.
        prompts: category and model inputs (`input_ids`, perhaps `attention_mask`) of each.
        repeats: rounds over each prompt; the least time of a method on a prompt counts.
        progress: wraps the prompts' numbers, as tqdm does.
        **arguments: of `generate`.
    """
    order = list(methods)
    runs = []
    for index in progress(range(len(prompts))):
        category, inputs = prompts[index]
        best: dict[str, float] = dict.fromkeys(order, float("inf"))
        texts: dict[str, Tensor] = {}
        for turn in range(repeats):
            forward = (index + turn) % 2 == 0
            for name in order if forward else order[::-1]:
                begin = time.perf_counter()
                texts[name] = _call(methods[name], inputs, arguments)
                best[name] = min(best[name], time.perf_counter() - begin)
        expected = texts[BASELINE]
        width = inputs["input_ids"].shape[1]
        for name in order:
            generator = methods[name].generator
            stats = generator.stats if generator is not None else None
            runs.append(
                Run(
                    method=name,
                    prompt=index,
                    category=category,
                    seconds=best[name],
                    baseline_seconds=best[BASELINE],
                    num_tokens=_new_tokens(texts[name], width, stats),
                    block_efficiency=float("nan") if stats is None else stats.block_efficiency,
                    identical=_same(texts[name], expected, sampled=bool(arguments["do_sample"])),
                )
            )
    return runs


def _call(method: Method, inputs: dict[str, Tensor], arguments: dict[str, Any]) -> Tensor:
    ids = inputs["input_ids"]
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    return method.run(ids, **rest, **arguments)


def _new_tokens(text: Tensor, width: int, stats: Any) -> int:
    if stats is not None:
        return sum(row.num_generated for row in stats.rows)
    return int(text.shape[0] * (text.shape[1] - width))


def _same(text: Tensor, expected: Tensor, *, sampled: bool) -> bool | None:
    return None if sampled else bool(text.shape == expected.shape and torch.equal(text, expected))


@dataclass(frozen=True, slots=True)
class Summary:
    """A method over the prompts of one category, or of all.

    Attributes:
        method: its name.
        category: or "overall".
        prompts: how many.
        speedup: baseline seconds of all prompts together / the method's.
        median: of the prompts' speed-ups; `low` and `high` are their 20 % and 80 % quantiles.
        slower: share of the prompts on which the method took longer than the baseline.
        tokens_per_second: of all prompts together.
        block_efficiency: mean over the prompts.
        identical: prompts with the baseline's tokens, None where it is not to be expected.
    """

    method: str
    category: str
    prompts: int
    speedup: float
    median: float
    low: float
    high: float
    slower: float
    tokens_per_second: float
    block_efficiency: float
    identical: int | None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers and strings."""
        return asdict(self)


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """Returns a summary for each method and category, "overall" last, in order of appearance."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.category, run.method].append(run)
        groups[OVERALL, run.method].append(run)
    ordered = sorted(groups, key=lambda key: key[0] == OVERALL)
    return [_summary(method, category, groups[category, method]) for category, method in ordered]


def _summary(method: str, category: str, runs: Sequence[Run]) -> Summary:
    ratios = np.array([run.speedup for run in runs])
    seconds = sum(run.seconds for run in runs)
    low, median, high = np.quantile(ratios, [0.2, 0.5, 0.8])
    exact = [run.identical for run in runs if run.identical is not None]
    return Summary(
        method=method,
        category=category,
        prompts=len(runs),
        speedup=sum(run.baseline_seconds for run in runs) / seconds,
        median=float(median),
        low=float(low),
        high=float(high),
        slower=float((ratios < 1).mean()),
        tokens_per_second=sum(run.num_tokens for run in runs) / seconds,
        block_efficiency=float(np.mean([run.block_efficiency for run in runs])),
        identical=sum(exact) if exact else None,
    )


def peak_memory(method: Method, inputs: dict[str, Tensor], **arguments: Any) -> int:
    """Returns the most bytes the process held during one call, sampled every few milliseconds."""
    gc.collect()
    process, done = psutil.Process(), threading.Event()
    peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        _call(method, inputs, arguments)
    finally:
        done.set()
        watcher.join()
    return int(peak)
