"""Prints block efficiency by node budget over a prompt file, one warm drafter throughout.

    python scripts/measure_block_efficiency.py --prompts question.jsonl --budgets 16 32 80

Greedy decoding, batch 1, prompts in file order and spread over their categories. Nothing here is a
timing: block efficiency counts tokens and target calls (the prefill and its token left out).
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from specdec import SpeculativeGenerator
from specdec.pretrained import load_model
from specdec.prompts import encode, read_prompts, spread_over_categories
from specdec.stats import Counts


def main() -> None:
    """Runs every budget with a new drafter over all prompts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", required=True, help="Spec-Bench question.jsonl, JSONL or text")
    parser.add_argument("--limit", type=int, default=40, help="prompts, spread over categories")
    parser.add_argument("--model", help="name or path; the demo model when left out")
    parser.add_argument("--drafter", default="token_recycling")
    parser.add_argument("--policy", default="best_first")
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 32, 80])
    parser.add_argument("--max-new-tokens", type=int, default=96)
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model, device="cpu")
    prompts = spread_over_categories(read_prompts(arguments.prompts), arguments.limit)
    columns: dict[int, dict[str, Counts]] = {}
    overheads = {}
    for budget in arguments.budgets:
        generator = SpeculativeGenerator(
            model,
            tokenizer,
            drafter=arguments.drafter,
            policy=arguments.policy,
            node_budget=budget,
        )
        counts: dict[str, Counts] = defaultdict(Counts)
        own = target = 0.0
        for prompt in tqdm(prompts, desc=f"{arguments.drafter}, {budget} nodes"):
            generator.generate(
                encode(tokenizer, prompt), do_sample=False, max_new_tokens=arguments.max_new_tokens
            )
            counts[prompt.category].add(generator.stats.totals)
            counts["overall"].add(generator.stats.totals)
            seconds = generator.stats.seconds
            own += sum(seconds[phase] for phase in ("draft", "verify", "commit", "observe"))
            target += seconds["target"]
        columns[budget] = counts
        overheads[budget] = own / (own + target)

    table = Table(title=f"Block efficiency, {arguments.drafter} / {arguments.policy}, greedy")
    table.add_column("category")
    for budget in columns:
        table.add_column(f"{budget} nodes", justify="right")
    categories = [name for name in next(iter(columns.values())) if name != "overall"]
    for name in [*categories, "overall"]:
        cells = [f"{counts[name].block_efficiency:.2f}" for counts in columns.values()]
        table.add_row(name, *cells, style="bold" if name == "overall" else "")
    table.add_row("outside the target's pass", *(f"{share:.1%}" for share in overheads.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
