"""Compares drafters with model.generate and with transformers' prompt lookup.

Every drafter that needs nothing but its name takes part, each prompt by prompt in turn with the
others, so that a slow moment of the machine hits all alike. Ratios compare whole calls, prefill
included. OUT gets report.html (figures within), results.csv (a row a method and category),
runs.csv (a row a method and prompt) and manifest.json (versions, revision, hardware, command).

    python -m specdec compare --out compared
    python -m specdec compare --prompts question.jsonl --out compared
    python -m specdec compare --drafters hybrid,early_exit:20 --max-new-tokens 128 --out compared
"""

from __future__ import annotations

import argparse
from pathlib import Path

from specdec.commands.parts import (
    DRAFTER_FORMS,
    add_model,
    add_prompts,
    add_sampling,
    load,
    names,
    node_budget,
    positive,
)

_NODES = 8  # what a CPU can afford, see specdec.generator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_prompts(parser, limit=13, required=False)
    parser.add_argument("--max-new-tokens", type=positive, default=48, help="a prompt (48)")
    parser.add_argument(
        "--drafters",
        type=names,
        metavar="A,B",
        help=f"each {DRAFTER_FORMS}; all that need nothing but their name when left out",
    )
    parser.add_argument(
        "--node-budget",
        type=node_budget,
        default=_NODES,
        help=f"draft nodes a tree ({_NODES}, the same for all), or auto: by what a pass costs "
        "here, so that no two runs agree",
    )
    add_sampling(parser)
    add_model(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from tqdm import tqdm

    from specdec.bench.compare import REPORT, check_folder, compare, save
    from specdec.bench.drafters import check_drafter
    from specdec.bench.figures import require_packages
    from specdec.bench.tables import category_table, overall_table, wide_console
    from specdec.demo import PROMPTS
    from specdec.prompts import read_prompts, spread_over_categories

    # whatever can be wrong is told before minutes of work
    require_packages("jinja2", "matplotlib")
    prompts = read_prompts(arguments.prompts) if arguments.prompts else list(PROMPTS)
    for drafter in arguments.drafters or ():
        check_drafter(drafter)
    check_folder(arguments.out)
    model, tokenizer = load(arguments.model)
    comparison = compare(
        model,
        tokenizer,
        spread_over_categories(prompts, arguments.limit),
        arguments.drafters,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        node_budget=arguments.node_budget,
        command=arguments.invocation,
        progress=lambda numbers: tqdm(numbers, desc="prompts", unit="prompt"),
    )
    save(comparison, arguments.out)
    console = wide_console()
    measured = comparison.measured
    console.print(overall_table("drafters", measured.summaries, measured.memory))
    if len({summary.category for summary in measured.summaries}) > 2:
        console.print(category_table("drafters", measured.summaries))
    for name, reason in comparison.setting["left_out"].items():
        console.print(f"[dim]left out {name}: {reason}[/dim]", highlight=False, soft_wrap=True)
    console.print(f"[dim]{arguments.out / REPORT} written[/dim]", soft_wrap=True)
