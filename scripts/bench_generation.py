"""Times generation with draft trees against `model.generate`, prompt by prompt in one process.

    python scripts/bench_generation.py --prompts question.jsonl --limit 39
    python scripts/bench_generation.py --prompts question.jsonl --temperature 0.7 --top-p 0.9
    python scripts/bench_generation.py --prompts question.jsonl --batch-sizes 1 2 4 8
    python scripts/bench_generation.py --prompts question.jsonl --contexts 128 512 2048

Every method runs on every prompt before the next prompt comes, and their order alternates, so the
ratios survive a noisy machine. Ratios compare whole calls, prefill included. One prompt that is
not counted warms everything up first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec.bench.generation import (
    BASELINE,
    OVERALL,
    Run,
    Summary,
    methods_of,
    peak_memory,
    summarise,
    time_prompts,
)
from specdec.demo_model import ensure_demo_model
from specdec.prompts import encode, read_prompts, spread_over_categories

Inputs = tuple[str, dict[str, Tensor]]


def main() -> None:
    """Times what the command line asks for; writes JSON, prints tables."""
    arguments = parse()
    path = arguments.model or ensure_demo_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else "auto"
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    assistant = None
    if arguments.assistant:
        assistant = AutoModelForCausalLM.from_pretrained(arguments.assistant, dtype=dtype)
        assistant = assistant.to(device).eval()
    prompts = spread_over_categories(read_prompts(arguments.prompts), arguments.limit)
    texts = [(prompt.category or "prompts", encode(tokenizer, prompt)[0]) for prompt in prompts]
    console = Console()
    report: dict[str, Any] = {"setting": setting(arguments, model), "results": []}
    for title, inputs, single in settings(arguments, texts, tokenizer.pad_token_id):
        methods = methods_of(
            model,
            tokenizer,
            {name: {"drafter": name} for name in arguments.drafters},
            assistant=assistant if single else None,
            with_lookup=single,
        )
        calls = decoding(arguments) | {"pad_token_id": tokenizer.pad_token_id}
        on_device = [(c, {k: v.to(device) for k, v in i.items()}) for c, i in inputs]
        time_prompts(methods, on_device[:1], **calls)
        runs = time_prompts(
            methods,
            on_device,
            repeats=arguments.repeats,
            progress=lambda indices, title=title: tqdm(indices, desc=title),
            **calls,
        )
        memory = {
            name: peak_memory(method, on_device[0][1], **calls) for name, method in methods.items()
        }
        summaries = summarise(runs)
        report["results"].append(
            {
                "title": title,
                "summaries": [summary.to_dict() for summary in summaries],
                "peak_memory_bytes": memory,
                "runs": [asdict(run) for run in runs],
            }
        )
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        console.print(overall_table(title, summaries, memory))
        if len({summary.category for summary in summaries}) > 2:
            console.print(category_table(title, summaries))
        if arguments.plot is not None:
            plot(runs, arguments.plot.with_stem(f"{arguments.plot.stem}-{title.replace(' ', '-')}"))
    console.print(f"[dim]{arguments.out} written[/dim]")


def parse() -> argparse.Namespace:
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", required=True, help="Spec-Bench question.jsonl, JSONL or text")
    parser.add_argument("--limit", type=int, default=13, help="prompts, spread over categories")
    parser.add_argument("--model", help="name or path; the demo model when left out")
    parser.add_argument("--assistant", help="draft model for transformers' assisted generation")
    parser.add_argument("--drafters", nargs="+", default=["auto"])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=1, help="rounds; the least time counts")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="rows a call; 1 by default")
    parser.add_argument("--contexts", type=int, nargs="+", help="cut or fill prompts to tokens")
    parser.add_argument("--out", type=Path, default=Path("generation.json"))
    parser.add_argument("--plot", type=Path, help="SVG or PNG of the speed-ups (matplotlib)")
    return parser.parse_args()


def decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `generate`."""
    settings: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    if arguments.temperature > 0:
        settings |= {
            "do_sample": True,
            "temperature": arguments.temperature,
            "top_p": arguments.top_p,
        }
    return settings


def settings(
    arguments: argparse.Namespace, texts: Sequence[tuple[str, Tensor]], pad: int
) -> Iterator[tuple[str, list[Inputs], bool]]:
    """Yields a title, the inputs, and whether calls have one row."""
    if arguments.contexts:
        joined = torch.cat([ids for _, ids in texts])
        for length in arguments.contexts:
            pieces = [
                torch.cat([joined[start:], joined])[:length]
                for start in range(0, len(joined), max(1, len(joined) // len(texts)))
            ]
            yield f"context {length}", [("text", {"input_ids": p[None]}) for p in pieces], True
        return
    for size in arguments.batch_sizes or [1]:
        if size == 1:
            yield "batch 1", [(c, {"input_ids": ids[None]}) for c, ids in texts], True
            continue
        groups: dict[str, list[Tensor]] = {}
        for category, ids in texts:
            groups.setdefault(category, []).append(ids)
        batches = [
            (category, padded((members * size)[:size], pad)) for category, members in groups.items()
        ]
        yield f"batch {size}", batches, False


def padded(rows: Sequence[Tensor], pad: int) -> dict[str, Tensor]:
    """Returns rows padded on the left."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def setting(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Returns everything that a figure needs beside it."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "command": {key: str(value) for key, value in vars(arguments).items() if value is not None},
        "model": type(model).__name__,
        "dtype": str(model.dtype),
        "device": f"{device.type} {name}".strip(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def overall_table(title: str, summaries: Sequence[Summary], memory: dict[str, int]) -> Table:
    """Returns a row for each method over all prompts."""
    table = Table(title=f"{title}: against {BASELINE}")
    table.add_column("method")
    columns = ("speed", "median", "20 %", "80 %", "slower", "tok/s", "block eff.", "same", "MB")
    for heading in columns:
        table.add_column(heading, justify="right")
    for s in summaries:
        if s.category == OVERALL:
            table.add_row(
                s.method,
                f"{s.speedup:.2f}x",
                f"{s.median:.2f}x",
                f"{s.low:.2f}",
                f"{s.high:.2f}",
                f"{s.slower:.0%}",
                f"{s.tokens_per_second:.1f}",
                "" if s.block_efficiency != s.block_efficiency else f"{s.block_efficiency:.2f}",
                "" if s.identical is None else f"{s.identical}/{s.prompts}",
                f"{memory[s.method] / 1e6:.0f}",
            )
    return table


def category_table(title: str, summaries: Sequence[Summary]) -> Table:
    """Returns the speed-up of each method in each category."""
    table = Table(title=f"{title}: speed-up by category")
    table.add_column("category")
    methods = [s.method for s in summaries if s.category == OVERALL and s.method != BASELINE]
    for method in methods:
        table.add_column(method, justify="right")
    cells = {(s.category, s.method): f"{s.speedup:.2f}x" for s in summaries}
    for category in dict.fromkeys(s.category for s in summaries):
        table.add_row(category, *(cells[category, method] for method in methods))
    return table


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draws each prompt's speed-up as a point, by method."""
    import matplotlib.pyplot as plt

    methods = [name for name in dict.fromkeys(run.method for run in runs) if name != BASELINE]
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.5 * len(methods)), layout="constrained")
    for place, method in enumerate(methods):
        ratios = sorted(run.speedup for run in runs if run.method == method)
        axes.scatter(ratios, [place] * len(ratios), s=14, alpha=0.5)
        axes.plot([ratios[len(ratios) // 2]] * 2, [place - 0.3, place + 0.3], color="black")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(yticks=range(len(methods)), yticklabels=methods, xscale="log")
    axes.set_xlabel(f"speed against {BASELINE}, one point a prompt, line: median")
    figure.savefig(path)


if __name__ == "__main__":
    main()
