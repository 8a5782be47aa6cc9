"""Tabulates block efficiency by policy x verifier x temperature x node budget.

    python scripts/tabulate_acceptance.py synthetic --distance 0.3
    python scripts/tabulate_acceptance.py model --prompts question.jsonl --limit 13
    python scripts/tabulate_acceptance.py model --prompts question.jsonl --draft-layers 27

`synthetic` is a random law over 64 tokens and a drafter at a set total variation from it; `model`
is the demo model, or any other, with token recycling, a drafter by name, or the model's own first
layers as a draft model. All cells of a run see the same laws, prompts and seeds. Nothing here is a
timing: block efficiency counts tokens and target calls.

Cells are appended to the CSV file as they are measured; a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from specdec.bench.acceptance import Cell, declared_pairs, distinct, model_cell, synthetic_cell

Measure = Callable[[str, str, float, int], Cell]


def main() -> None:
    """Measures every cell that the CSV file does not have yet, then prints the table."""
    arguments = parse()
    measure = {"synthetic": measure_synthetic, "model": measure_model}[arguments.law](arguments)
    pairs = declared_pairs()
    if arguments.pairs:
        wanted = [tuple(pair.split("/")) for pair in arguments.pairs]
        unknown = [pair for pair in wanted if pair not in pairs]
        if unknown:
            raise SystemExit(f"unknown pairs {unknown}; known are {pairs}")
        pairs = [pair for pair in pairs if pair in wanted]
    grid = [
        (policy, verifier, temperature, budget)
        for temperature in arguments.temperatures
        for policy, verifier in distinct(pairs, temperature)
        for budget in arguments.budgets
    ]
    cells = read_cells(arguments.out)
    known = {(c.policy, c.verifier, c.temperature, c.node_budget) for c in cells}
    for key in tqdm([key for key in grid if key not in known], desc="cells"):
        cells.append(measure(*key))
        append_cell(arguments.out, cells[-1])
    Console().print(rich_table(cells))
    arguments.out.with_suffix(".md").write_text(markdown(cells), encoding="utf-8")
    print(f"{arguments.out} and {arguments.out.with_suffix('.md')} written")


def parse() -> argparse.Namespace:
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--budgets", type=int, nargs="+", default=[8, 16, 32, 64])
    common.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.6, 1.0])
    common.add_argument("--pairs", nargs="+", help="policy/verifier; all that fit when left out")
    common.add_argument("--out", type=Path, default=Path("acceptance.csv"))
    laws = parser.add_subparsers(dest="law", required=True)
    synthetic = laws.add_parser("synthetic", parents=[common], help="a random pair of laws")
    synthetic.add_argument("--distance", type=float, default=0.3, help="total variation, T = 1")
    synthetic.add_argument("--texts", type=int, default=12, help="texts of 50 steps a cell")
    model = laws.add_parser("model", parents=[common], help="a HuggingFace model")
    model.add_argument("--prompts", required=True, help="Spec-Bench question.jsonl, JSONL or text")
    model.add_argument("--limit", type=int, default=13, help="prompts, spread over categories")
    model.add_argument("--model", help="name or path; the demo model when left out")
    model.add_argument("--drafter", default="token_recycling")
    model.add_argument("--draft-layers", type=int, help="draft with the model's first layers")
    model.add_argument("--max-new-tokens", type=int, default=48)
    return parser.parse_args()


def measure_synthetic(arguments: argparse.Namespace) -> Measure:
    """Returns what measures a cell on the synthetic pair."""
    return partial(synthetic_cell, distance=arguments.distance, texts=arguments.texts)


def measure_model(arguments: argparse.Namespace) -> Measure:
    """Returns what measures a cell on a model."""
    from specdec.backend.packed import packed_linears
    from specdec.drafters import EarlyExit
    from specdec.pretrained import load_model
    from specdec.prompts import encode, read_prompts, spread_over_categories

    model, tokenizer = load_model(arguments.model, device="cpu")
    prompts = spread_over_categories(read_prompts(arguments.prompts), arguments.limit)
    drafter = arguments.drafter
    if arguments.draft_layers:
        drafter = EarlyExit(arguments.draft_layers)
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    packed = packed_linears(model)

    def measure(policy: str, verifier: str, temperature: float, node_budget: int) -> Cell:
        # held by this function, or every cell would pack the weights anew
        assert packed is None or packed is packed_linears(model)
        return model_cell(
            policy,
            verifier,
            temperature,
            node_budget,
            model=model,
            drafter=drafter,
            prompts=ids,
            max_new_tokens=arguments.max_new_tokens,
        )

    return measure


def read_cells(path: Path) -> list[Cell]:
    """Returns the cells of a CSV file, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Cell(
                row["policy"],
                row["verifier"],
                float(row["temperature"]),
                int(row["node_budget"]),
                float(row["block_efficiency"]),
                float(row["error"]),
                int(row["steps"]),
            )
            for row in csv.DictReader(file)
        ]


def append_cell(path: Path, cell: Cell) -> None:
    """Writes a cell behind the others."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Cell)])
        if new:
            writer.writeheader()
        writer.writerow(asdict(cell))


def _layout(cells: list[Cell]) -> tuple[list[str], list[list[str]], list[str]]:
    """Returns headings, rows, and a note: a row for each pair, a column for each setting."""
    settings = sorted({(c.temperature, c.node_budget) for c in cells})
    values = {(c.policy, c.verifier, c.temperature, c.node_budget): c for c in cells}
    pairs = sorted({(c.policy, c.verifier) for c in cells})
    best = {
        setting: max(c.block_efficiency for c in cells if (c.temperature, c.node_budget) == setting)
        for setting in settings
    }
    rows = []
    for policy, verifier in pairs:
        row = [policy, verifier]
        for setting in settings:
            cell = values.get((policy, verifier, *setting))
            text = "" if cell is None else f"{cell.block_efficiency:.2f}"
            top = cell is not None and cell.block_efficiency == best[setting]
            row.append(f"**{text}**" if top else text)
        rows.append(row)
    errors = sorted(c.error for c in cells)
    note = (
        f"Standard errors {errors[0]:.2f} to {errors[-1]:.2f}, "
        f"{min(c.steps for c in cells)} to {max(c.steps for c in cells)} target calls a cell."
    )
    headings = ["policy", "verifier", *(f"T={t:g} n={n}" for t, n in settings)]
    return headings, rows, [note]


def rich_table(cells: list[Cell]) -> Table:
    """Returns the table for a terminal."""
    headings, rows, notes = _layout(cells)
    table = Table(title="Block efficiency", caption=" ".join(notes))
    for heading in headings:
        table.add_column(heading, justify="left" if "=" not in heading else "right")
    for row in rows:
        table.add_row(*(f"[bold]{c.strip('*')}[/]" if c.startswith("*") else c for c in row))
    return table


def markdown(cells: list[Cell]) -> str:
    """Returns the table for the docs."""
    headings, rows, notes = _layout(cells)
    rule = ["---" if "=" not in heading else "---:" for heading in headings]
    lines = [f"| {' | '.join(row)} |" for row in [headings, rule, *rows]]
    return "\n".join([*lines, "", *notes, ""])


if __name__ == "__main__":
    main()
