"""Times whole generations against model.generate, over batch sizes or lengths of context.

Every method runs on every prompt before the next prompt comes, and their order alternates, so the
ratios survive a noisy machine. Ratios compare whole calls, prefill included. `compare` looks closer
at drafters, one row a call.

    python -m specdec bench --prompts question.jsonl --limit 13
    python -m specdec bench --prompts question.jsonl --temperature 0.7 --top-p 0.9
    python -m specdec bench --prompts question.jsonl --batch-sizes 1 2 4 8 --plot speed.svg
    python -m specdec bench --prompts question.jsonl --contexts 128 512 2048
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.commands.parts import (
    DRAFTER_FORMS,
    add_model,
    add_prompts,
    add_sampling,
    drafter_of,
    load,
    positive,
)

if TYPE_CHECKING:
    from torch import Tensor

    from specdec.bench.compare import Measured

    Inputs = tuple[str, dict[str, Tensor]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_prompts(parser, limit=13, required=False)
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument(
        "--drafters", nargs="+", default=["auto"], metavar="DRAFTER", help=f"each {DRAFTER_FORMS}"
    )
    parser.add_argument(
        "--assistant", metavar="NAME_OR_PATH", help="draft model of transformers' assisted decoding"
    )
    add_sampling(parser)
    parser.add_argument("--repeats", type=positive, default=1, help="rounds; the least time counts")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--batch-sizes",
        type=positive,
        nargs="+",
        default=[1],
        help="rows a call, different prompts of a category (1)",
    )
    sizes.add_argument("--contexts", type=positive, nargs="+", help="cut prompts of so many tokens")
    add_model(parser)
    parser.add_argument("--out", type=Path, default=Path("generation.json"))
    parser.add_argument("--plot", type=Path, help="SVG or PNG of the speed-ups (matplotlib)")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command: JSON after every size, then tables."""
    import json
    from datetime import UTC, datetime
    from functools import partial

    from tqdm import tqdm
    from transformers.utils import logging

    from specdec.bench.compare import measure_methods
    from specdec.bench.decoding import decoding_arguments, pad_token_id
    from specdec.bench.figures import require_packages
    from specdec.bench.generation import methods_of
    from specdec.bench.provenance import device_name, git_revision, hardware, versions
    from specdec.bench.tables import category_table, overall_table, wide_console
    from specdec.demo import PROMPTS
    from specdec.prompts import encode, read_prompts, spread_over_categories

    if arguments.plot is not None:
        require_packages("matplotlib")
    given = read_prompts(arguments.prompts) if arguments.prompts else list(PROMPTS)
    prompts = spread_over_categories(given, arguments.limit)
    model, tokenizer = load(arguments.model)
    assistant = load(arguments.assistant)[0] if arguments.assistant else None
    texts = [(prompt.category or "prompts", encode(tokenizer, prompt)[0]) for prompt in prompts]
    # a batch has more rows than prompts were asked for, and a context more tokens: the others of
    # the file join in
    wanted = max(arguments.batch_sizes) > 1 or arguments.contexts
    others = [p for p in given if p not in prompts] if wanted else []
    rest = [(prompt.category or "prompts", encode(tokenizer, prompt)[0]) for prompt in others]
    pad = pad_token_id(tokenizer)
    calls = decoding_arguments(arguments.max_new_tokens, arguments.temperature, arguments.top_p)
    if arguments.contexts:
        # a piece of text may well end at once, which would time its prompt alone; transformers
        # warns, in every call, that with such an id texts run to their full length
        calls["eos_token_id"] = -1
        logging.set_verbosity_error()
    console = wide_console()
    report: dict[str, Any] = {
        "command": arguments.invocation,
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": type(model).__name__,
        "dtype": str(model.dtype),
        "device": device_name(model.device),
        "versions": versions(),
        "git": git_revision(),
        "hardware": hardware(),
        "results": [],
    }
    for title, inputs, single in settings(arguments, texts, rest, pad):
        measured = measure_methods(
            methods_of(
                model,
                tokenizer,
                {name: drafter_of(name, tokenizer) for name in arguments.drafters},
                assistant=assistant if single else None,
                with_lookup=single,
            ),
            [(c, {k: v.to(model.device) for k, v in i.items()}) for c, i in inputs],
            repeats=arguments.repeats,
            progress=partial(tqdm, desc=title),
            pad_token_id=pad,
            **calls,
        )
        report["results"].append(
            {
                "title": title,
                "methods": measured.settings,
                "summaries": [summary.to_dict() for summary in measured.summaries],
                "memory_bytes": measured.memory,
                "runs": [run.to_dict() for run in measured.runs],
            }
        )
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        console.print(overall_table(title, measured.summaries, measured.memory))
        if len({summary.category for summary in measured.summaries}) > 2:
            console.print(category_table(title, measured.summaries))
        if arguments.plot is not None:
            plot(
                measured,
                arguments.plot.with_stem(f"{arguments.plot.stem}-{title.replace(' ', '-')}"),
            )
    console.print(f"[dim]{arguments.out} written[/dim]")


def settings(
    arguments: argparse.Namespace,
    texts: Sequence[tuple[str, Tensor]],
    rest: Sequence[tuple[str, Tensor]],
    pad: int,
) -> Iterator[tuple[str, list[Inputs], bool]]:
    """Yields a title, the inputs, and whether calls have one row.

    There is a batch for each of the `texts`, with it first. Other prompts of its category follow,
    then those of other categories: none comes twice while there are others. There are as many
    contexts, cut from all texts one behind the other.
    """
    import torch

    from specdec.bench.decoding import padded

    if arguments.contexts:
        joined = torch.cat([ids for _, ids in (*texts, *rest)])
        for length in arguments.contexts:
            whole = joined.repeat(1 + math.ceil(length / len(joined)))
            starts = [len(joined) * place // len(texts) for place in range(len(texts))]
            pieces = [whole[start : start + length] for start in starts]
            yield f"context {length}", [("text", {"input_ids": p[None]}) for p in pieces], True
        return
    for size in arguments.batch_sizes:
        if size == 1:
            yield "batch 1", [(c, {"input_ids": ids[None]}) for c, ids in texts], True
            continue
        batches = []
        for place, (category, ids) in enumerate(texts):
            others = [*texts[place + 1 :], *rest, *texts[:place]]
            others.sort(key=lambda other: other[0] != category)
            members = islice(cycle([ids, *(other for _, other in others)]), size)
            batches.append((category, padded(list(members), pad)))
        yield f"batch {size}", batches, False


def plot(measured: Measured, path: Path) -> None:
    """Saves a picture of the speed-ups."""
    from specdec.bench.figures import speed_ratios
    from specdec.bench.generation import BASELINE
    from specdec.bench.report import ratios_of

    speed_ratios(ratios_of(measured), BASELINE).savefig(path, dpi=160)
