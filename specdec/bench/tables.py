"""Tables of a comparison, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from specdec.bench.generation import BASELINE
from specdec.bench.summary import OVERALL, Summary

_WIDTH = 160  # of a file or a pipe, where rich would fold a table at 80 columns


def wide_console() -> Console:
    """Returns a console of the terminal's width; one wide enough for the tables elsewhere."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def overall_table(title: str, summaries: Sequence[Summary], memory: Mapping[str, int]) -> Table:
    """Returns a row for each method over all prompts."""
    table = Table(
        title=f"{title}: against {BASELINE}",
        caption="speed: of all prompts together, 95 % interval over prompts; slower: share of "
        "prompts; nodes and draft ms: a target call; beside: share of the steps beside the model's "
        "passes, processors apart; MB: beside the model's weights",
    )
    table.add_column("method", overflow="fold")
    columns = ("speed", "interval", "median", "slower", "tok/s", "block eff.", "accepted", "nodes")
    for heading in (*columns, "draft ms", "beside", "same", "MB"):
        table.add_column(heading, justify="right")
    for s in summaries:
        if s.category == OVERALL:
            tells = s.draft_ms is not None
            table.add_row(
                s.method,
                f"{s.speedup:.2f}x",
                interval_text(s.speedup_interval),
                f"{s.median:.2f}x",
                f"{s.slower:.0%}",
                f"{s.tokens_per_second:.1f}",
                f"{s.block_efficiency:.2f}",
                f"{s.counts.acceptance_rate:.0%}" if s.counts.num_tested else "",
                f"{s.nodes:.1f}" if tells else "",
                "" if s.draft_ms is None else f"{s.draft_ms:.2f}",
                "" if s.beside is None else f"{s.beside:.1%}",
                "" if s.identical is None else f"{s.identical}/{s.prompts}",
                f"{memory[s.method] / 1e6:.0f}",
            )
    return table


def category_table(title: str, summaries: Sequence[Summary]) -> Table:
    """Returns the speed-up, and behind it the block efficiency, of each method in each category."""
    table = Table(title=f"{title}: speed-up, block efficiency by category")
    table.add_column("category")
    methods = [s.method for s in summaries if s.category == OVERALL and s.method != BASELINE]
    for method in methods:
        table.add_column(method, justify="right")
    cells = {
        (s.category, s.method): f"{s.speedup:.2f}x {s.block_efficiency:.2f}" for s in summaries
    }
    for category in dict.fromkeys(s.category for s in summaries):
        table.add_row(category, *(cells[category, method] for method in methods))
    return table


def interval_text(interval: tuple[float, float] | None) -> str:
    """Returns "1.02-1.31", or nothing where there is no interval."""
    return "" if interval is None else f"{interval[0]:.2f}-{interval[1]:.2f}"
