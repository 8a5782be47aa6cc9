"""Times tree attention, or whole passes with it, beside what torch and transformers offer.

    python scripts/bench_kernels.py --out kernels.csv --plot kernels.svg
    python scripts/bench_kernels.py --contexts 1024 8192 32768 --nodes 1 16 64
    python scripts/bench_kernels.py --passes llama-8b --contexts 1024 16384 65536

One layer: our kernel, SDPA with the heads repeated and a bool mask (as transformers calls it), SDPA
with enable_gqa, FlexAttention compiled (--flex), SDPA without any mask, and a copy of the keys and
values; the share is of the copy's bandwidth. Caches rotate, methods take turns, times are medians
with the 20 % and 80 % quantiles; on a GPU calls are replayed from a graph. With --passes, a random
model of that shape: passes over trees, the share being that of a step of plain decoding (one node);
with --captured each of them repeated from a CUDA graph as well.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table
from tqdm import tqdm

from specdec.bench.attention_speed import (
    COPY,
    Case,
    Inputs,
    Timing,
    bandwidth_share,
    methods_for,
    time_case,
)
from specdec.bench.figures import colours, drawing, require_packages, save
from specdec.bench.files import explained
from specdec.bench.pass_speed import SHAPES, random_model, time_passes
from specdec.bench.tables import wide_console
from specdec.errors import ConfigError

FIELDS = ("method", "context", "nodes", "us", "us_low", "us_high", "share", "setting")
Line = dict[str, str | int | float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table, and writes what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 16, 64], help="root included")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32, help="of queries")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--impl", default="auto", help="of our kernel: triton, torch, reference")
    parser.add_argument("--flex", action="store_true", help="FlexAttention too; needs a compiler")
    parser.add_argument("--rotate-mb", type=int, default=512 if cuda else 64, help="of caches")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--passes", choices=SHAPES, help="whole passes of a model of this shape")
    parser.add_argument("--captured", action="store_true", help="passes from CUDA graphs as well")
    parser.add_argument("--out", type=Path, help="CSV")
    parser.add_argument("--plot", type=Path, help="SVG or PNG")
    options = parser.parse_args(arguments)
    if options.captured and not (options.passes and options.device.startswith("cuda")):
        raise ConfigError(
            "--captured repeats the passes of --passes from CUDA graphs: give a shape and a GPU; "
            f"got --passes {options.passes} and --device {options.device}"
        )
    if options.plot is not None:
        require_packages("matplotlib")
    lines = pass_lines(options) if options.passes else kernel_lines(options)
    print_table(lines)
    if options.out is not None:
        with explained(options.out), options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(lines)
    if options.plot is not None:
        plot(lines, options.plot)


def setting(options: argparse.Namespace) -> str:
    """Returns what all lines of a run have in common."""
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    shape = options.passes or (
        f"{options.batch_size} x {options.heads}/{options.kv_heads} heads of {options.head_dim}"
    )
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{shape}, {options.dtype}, {name}{threads}, torch {torch.__version__}"


def kernel_lines(options: argparse.Namespace) -> list[Line]:
    """Returns a line for each method, context and tree of one layer."""
    shared = setting(options)
    found: list[Line] = []
    shapes = [(context, nodes) for context in options.contexts for nodes in options.nodes]
    for context, nodes in tqdm(shapes, desc="shapes"):
        case = Case(
            options.batch_size,
            options.heads,
            options.kv_heads,
            options.head_dim,
            nodes,
            context,
            getattr(torch, options.dtype),
        )
        inputs = Inputs(case, torch.device(options.device), options.rotate_mb * 10**6)
        methods = methods_for(inputs, flex=options.flex, impl=options.impl)
        timings = time_case(inputs, methods, options.repeats)
        for name, timing in timings.items():
            share = bandwidth_share(name, timing, timings[COPY])
            found.append(line(name, context, nodes, timing, share, shared))
    return found


def pass_lines(options: argparse.Namespace) -> list[Line]:
    """Returns a line for each attention, context and tree of a whole model."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    longest = max(options.contexts) + max(options.nodes)
    model = random_model(options.passes, dtype, device, longest)
    timings = time_passes(
        model,
        options.nodes,
        options.contexts,
        (None, options.impl),
        repeats=options.repeats,
        captured=options.captured,
    )
    shared = setting(options)
    return [
        # the share is that of a step of one node with the same attention
        line(name, context, nodes, timing, first_of(timings, name, context) / timing.median, shared)
        for (name, context, nodes), timing in timings.items()
    ]


def first_of(timings: dict[tuple[str, int, int], Timing], name: str, context: int) -> float:
    """Returns the median of the smallest tree."""
    fewest = min(nodes for own, at, nodes in timings if (own, at) == (name, context))
    return timings[name, context, fewest].median


def line(method: str, context: int, nodes: int, timing: Timing, share: float, shared: str) -> Line:
    """Returns one line of the CSV."""
    us, low, high = (round(1e6 * value, 2) for value in timing)
    values = (method, context, nodes, us, low, high, round(share, 3), shared)
    return dict(zip(FIELDS, values, strict=True))


def print_table(lines: Sequence[Line]) -> None:
    """Prints all lines, a column for each tree."""
    sizes = list(dict.fromkeys(int(line["nodes"]) for line in lines))
    table = Table(title="us: median (20 %, 80 %) and share", caption=str(lines[0]["setting"]))
    table.add_column("method")
    table.add_column("context", justify="right")
    for size in sizes:
        table.add_column(f"{size} nodes", justify="right")
    rows: dict[tuple[str, int], dict[int, str]] = {}
    for own in lines:
        cell = f"{own['us']} ({own['us_low']}, {own['us_high']}) {float(own['share']):.0%}"
        rows.setdefault((str(own["method"]), int(own["context"])), {})[int(own["nodes"])] = cell
    for (method, context), cells in sorted(rows.items(), key=lambda row: row[0][1]):
        table.add_row(method, str(context), *(cells.get(size, "") for size in sizes))
    wide_console().print(table)


def plot(lines: Sequence[Line], file: Path) -> None:
    """Draws time over context, a panel for each tree."""
    sizes = list(dict.fromkeys(int(line["nodes"]) for line in lines))
    methods = list(dict.fromkeys(str(line["method"]) for line in lines))
    contexts = list(dict.fromkeys(int(line["context"]) for line in lines))
    colour_of = colours(methods)
    with drawing(4.2 * len(sizes), 3.6) as figure:
        panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
        for axes, size in zip(panels, sizes, strict=True):
            for method in methods:
                own = [n for n in lines if (n["method"], n["nodes"]) == (method, size)]
                axes.plot(
                    [int(n["context"]) for n in own],
                    [float(n["us"]) for n in own],
                    marker="o",
                    markersize=3,
                    color=colour_of[method],
                    label=method,
                )
            heading = f"{size} node" if size == 1 else f"{size} nodes"
            axes.set(xscale="log", yscale="log", xlabel="context, tokens", title=heading)
            axes.set_xticks(contexts, [str(context) for context in contexts], minor=False)
            axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        panels[0].set_ylabel("us")
        panels[-1].legend(frameon=False, fontsize="small")
        save(figure, file)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
