"""Times passes of a model on a CPU by the layout of its linear layers' weights.

    python scripts/bench_layouts.py
    python scripts/bench_layouts.py --weights bfloat16 --rows 1 9 17 --layouts onednn blocks

What "blocks" can do depends on what the weights once were, so --weights makes them another
checkpoint's: "bfloat16" rounds them, as if loaded from such a file; "float32" adds noise in the
last places, so that no shorter form holds them. The layouts take turns in one process.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table

from specdec.backend.linear_formats import FORMATS
from specdec.bench.pass_speed import time_layouts
from specdec.bench.provenance import hardware
from specdec.pretrained import load_model


def main() -> None:
    """Prints a table: a row for each layout, a column for each number of rows."""
    arguments = parse()
    model, _ = load_model(arguments.model, device="cpu")
    as_from(model, arguments.weights)
    layouts = [None if name == "none" else name for name in arguments.layouts]
    timings = time_layouts(
        model, arguments.rows, [arguments.context], layouts, repeats=arguments.repeats
    )
    title = f"ms a pass, {arguments.context} tokens before it, medians of {arguments.repeats}"
    table = Table(
        title=title, caption=f"{hardware()['processor']}, {torch.get_num_threads()} threads"
    )
    table.add_column("weights in", no_wrap=True)
    for rows in arguments.rows:
        table.add_column(f"{rows} row{'s' * (rows > 1)}", justify="right")
    for name in dict.fromkeys(name for name, _, _ in timings):
        own = [timings[name, arguments.context, rows].median for rows in arguments.rows]
        table.add_row(name, *(f"{1e3 * seconds:.1f}" for seconds in own))
    Console().print(table)


def parse() -> argparse.Namespace:
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="name or path; the demo model when left out")
    parser.add_argument("--weights", choices=["own", "bfloat16", "float32"], default="own")
    parser.add_argument(
        "--layouts", nargs="+", choices=["none", *FORMATS], default=["none", "onednn", "blocks"]
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 9, 17, 33, 65])
    parser.add_argument("--context", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=21)
    return parser.parse_args()


@torch.no_grad()
def as_from(model: torch.nn.Module, kind: str) -> None:
    """Changes the weights to what a checkpoint of another kind would have given."""
    noise = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if kind == "bfloat16":
            weight.copy_(weight.bfloat16())
        elif kind == "float32":
            weight.mul_(1 + 1e-5 * torch.randn(weight.shape, generator=noise))


if __name__ == "__main__":
    main()
