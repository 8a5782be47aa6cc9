"""Measures acceptance over models, drafters, policies, verifiers, temperatures and budgets.

One cell for each combination. DIR gets results.jsonl (a row a cell), steps/ (a row for each prompt
and step), answers/ (Spec-Bench's format) and manifest.json (versions, revision, hardware, command).

    python -m specdec sweep --prompts question.jsonl --limit 40 --out sweep \\
        --drafters token_recycling,none --policies best_first,chain --temperatures 0,1
    python -m specdec sweep --grid grid.yaml --out sweep
    accelerate launch --multi_gpu --num_processes 2 scripts/sweep_acceptance.py --grid grid.yaml \\
        --out sweep

`--multi_gpu` starts processes on machines without GPUs too (`--cpu` starts a single one).

A grid file has the options' names with underscores: `prompts: question.jsonl`,
`temperatures: [0, 1]`. Options on the command line take its place, one by one. A sweep that was
stopped goes on where it was when the same command is run again. `scripts/plot_sweep.py` draws it.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.commands.parts import DRAFTER_FORMS, names

if TYPE_CHECKING:
    from specdec.bench.grid import Grid
    from specdec.bench.sweep import Report

_AXES = {
    "models": "names or paths; the demo model when left out",
    "drafters": f"none for plain decoding, {DRAFTER_FORMS}",
    "policies": "best_first, chain, sequoia, auto, ...",
    "verifiers": "coupled, rejection, traversal, auto, ...",
    "temperatures": "0 is greedy",
    "node-budgets": "draft nodes a tree, or auto",
    "max-depths": "levels of a tree, or null for no bound",
    "batch-sizes": "prompts a call",
    "seeds": "of sampling; each prompt and turn has one made of it",
}
_COLUMNS = {
    "model": "model",
    "prompts": "prompts",
    "drafter": "drafter",
    "policy": "policy",
    "verifier": "verifier",
    "temperature": "T",
    "node_budget": "nodes",
    "max_depth": "depth",
    "batch_size": "batch",
    "seed": "seed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options; the grid has their defaults."""
    parser.add_argument("--grid", type=Path, help="YAML file of axes")
    parser.add_argument("--prompts", type=names, help="Spec-Bench question.jsonl, JSONL, text, ...")
    for axis, text in _AXES.items():
        parser.add_argument(f"--{axis}", type=values, metavar="A,B", help=text)
    parser.add_argument("--limit", type=int, help="prompts of a file, spread over categories")
    parser.add_argument("--max-turns", type=int, help="turns of a conversation, the first ones")
    parser.add_argument("--max-new-tokens", type=int, help="tokens a turn")
    parser.add_argument("--top-p", type=float, help="nucleus of the temperatures above 0")
    parser.add_argument("--dtype", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--packed-weights", help="none, auto, blocks, onednn, mkl or fp16")
    parser.add_argument("--out", type=Path, required=True, help="the sweep's folder")
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="of steps")
    parser.add_argument("--retry-errors", action="store_true", help="run broken cells again")


def run(arguments: argparse.Namespace) -> None:
    """Runs this process's share of the sweep, then prints the table."""
    import torch
    from accelerate import PartialState

    from specdec.bench.sweep import run_sweep

    grid = grid_of(arguments)
    # processes that accelerate launches on a machine without an accelerator split the grid too
    state = PartialState(cpu=not torch.accelerator.is_available())
    try:
        report = run_sweep(
            grid,
            arguments.out,
            process_index=state.process_index,
            num_processes=state.num_processes,
            device=state.device,
            command=arguments.invocation,
            retry_errors=arguments.retry_errors,
            parquet=arguments.format == "parquet",
            progress=state.is_local_main_process,
        )
    finally:
        state.destroy_process_group()
    if state.is_main_process:
        show(report, arguments.out)


def values(text: str) -> list[Any]:
    """Returns the parts of a list with commas, numbers as numbers; the grid checks them."""
    return [number(part) for part in names(text)]


def number(text: str) -> Any:
    """Returns a number where the text is one, None for null, else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None if text == "null" else text


def grid_of(arguments: argparse.Namespace) -> Grid:
    """Returns the grid of the file, with the command line's options in place of its own."""
    from specdec.bench.grid import Grid, read_grid

    settings = {} if arguments.grid is None else read_grid(arguments.grid)
    options = vars(arguments)
    given = {f.name: options[f.name] for f in fields(Grid) if options[f.name] is not None}
    return Grid.from_mapping(settings | given, str(arguments.grid or "command line"))


def show(report: Report, folder: Path) -> None:
    """Prints every cell of the folder, and what went wrong."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from specdec.bench.results import read_results

    console = Console()
    for policy, verifier, reason in report.left_out:
        console.print(
            f"[yellow]left out[/] {policy} with {verifier}: {escape(reason)}", highlight=False
        )
    rows = read_results(folder)
    done = [row for row in rows if row["status"] == "ok"]
    table = Table(title="tokens a target call (standard error), accepted share of tested nodes")
    varying = [name for name in _COLUMNS if len({str(row[name]) for row in done}) > 1]
    for heading in (*map(_COLUMNS.__getitem__, varying), "block eff.", "accepted", "tok/s"):
        table.add_column(heading, overflow="fold")
    for row in done:
        error = row["block_efficiency_error"]
        table.add_row(
            *(str(row[name]) for name in varying),
            f"{row['block_efficiency']:.3f}" + ("" if error is None else f" ({error:.3f})"),
            f"{row['acceptance_rate']:.1%}",
            f"{row['timing']['tokens_per_second']:.1f}",
        )
    if done:
        console.print(table)
    for row in rows:
        if row["status"] == "error":
            console.print(f"[red]error[/] cell {row['cell']}: {escape(row['error'])}")
    console.print(
        f"{report.measured} cells measured now, {report.errors} broken, {report.known} known "
        f"before; {folder} has {len(rows)}"
    )
