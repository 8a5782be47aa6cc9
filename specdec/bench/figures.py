"""Figures of acceptance and of speed: one function a figure, each returns a matplotlib figure.

A series (a method, a cell of a sweep) has a name, and keeps its colour and its marker in all
figures that are given the same names in the same order.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import accumulate, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from specdec.bench.files import whole_file
from specdec.errors import ConfigError
from specdec.stats import Counts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID = "#24292f", "#6e7781", "#e4e7eb"
_COLOURS = (
    *("#3b6fd4", "#e8833a", "#2f9e63", "#a55bd0", "#d64550", "#1aa3b0", "#b58a1b", "#d4609f"),
    *("#7a6a58", "#5b6b7b"),
)
_MARKERS = "osD^vPX*<>"
_RATIOS = (
    *(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5),
    *(3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 20.0),
)
_CLOSEST_TICKS = 0.07  # share of an axis
_FEWEST = 10  # steps; a share of fewer is noise, and is not drawn
_STYLE: Any = {  # matplotlib's stubs type each key of these
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "specdec",
}


class Dot(NamedTuple):
    """A series as a point: what a tree costs to draft in milliseconds, and what it gives."""

    draft_ms: float
    block_efficiency: float


class Ratio(NamedTuple):
    """A method's speed against the baseline.

    Attributes:
        value: over all prompts.
        interval: of that value, None where there is none.
        prompts: the ratio on each prompt.
    """

    value: float
    interval: tuple[float, float] | None
    prompts: Sequence[float]


def require_packages(*names: str) -> None:
    """Raises ConfigError if a package that figures and reports need is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"figures and reports need {' and '.join(missing)}: "
            "pip install 'specdec-toolkit[bench]'"
        )


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """Yields an empty figure of so many inches, in the style that all figures share."""
    require_packages("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained", facecolor="white")


def colours(names: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each series."""
    return dict(zip(names, cycle(_COLOURS), strict=False))


def markers(names: Sequence[str]) -> dict[str, str]:
    """Returns a marker for each series."""
    return dict(zip(names, cycle(_MARKERS), strict=False))


def data_uri(figure: Figure) -> str:
    """Returns a figure as an SVG within an address, for the `src` of an image."""
    from matplotlib import rc_context

    with rc_context(_STYLE), io.BytesIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
        return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def save(figure: Figure, file: Path) -> None:
    """Writes a figure as .png or .svg; the same figure gives the same bytes."""
    from matplotlib import rc_context

    metadata = {"Date": None} if file.suffix == ".svg" else {}
    with rc_context(_STYLE), whole_file(file) as part:
        figure.savefig(part, format=file.suffix[1:], dpi=160, metadata=metadata)


def speed_ratios(
    ratios: Mapping[str, Ratio], baseline: str, rivals: Collection[str] = ()
) -> Figure:
    """Returns each method's speed against the baseline: all prompts, the ratio and its interval.

    Args:
        ratios: by method.
        baseline: its name.
        rivals: methods that are no series of other figures; they are grey.
    """
    names = list(ratios)
    colour = dict.fromkeys(rivals, FAINT) | colours([n for n in names if n not in rivals])
    with drawing(7.2, 0.9 + 0.42 * len(names)) as figure:
        axes = figure.subplots()
        axes.axvline(1, color=INK, linewidth=1)
        for place, name in enumerate(names):
            ratio = ratios[name]
            axes.scatter(
                ratio.prompts,
                [place] * len(ratio.prompts),
                s=16,
                alpha=0.35,
                color=colour[name],
                linewidths=0,
            )
            if ratio.interval is not None:
                axes.plot(ratio.interval, [place] * 2, color=colour[name], linewidth=5, alpha=0.6)
            axes.scatter(
                [ratio.value], [place], s=46, color=colour[name], edgecolors="white", zorder=3
            )
            axes.annotate(
                f"{ratio.value:.2f}×",
                (1, place),
                xycoords=("axes fraction", "data"),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontweight="bold",
            )
        axes.set_xscale("log")
        _plain_ticks(axes, _RATIOS, "×")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"speed against {baseline} (dots: prompts; bars: 95 % intervals)")
    return figure


def acceptance_by_depth(series: Mapping[str, Counts]) -> Figure:
    """Returns how often a guess is accepted at each depth, and how often a step gets that far."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    names = list(series)
    colour, marker = colours(names), markers(names)
    with drawing(8.6, 3.4) as figure:
        left, right = figure.subplots(1, 2)
        for name, counts in series.items():
            style = {"color": colour[name], "marker": marker[name], "markersize": 4.5, "lw": 1.6}
            known = [tested >= _FEWEST for tested in counts.tested_by_depth]
            rates = counts.acceptance_by_depth[: sum(known)]
            reached = [n / counts.target_calls for n in counts.accepted_by_depth]
            left.plot(range(1, len(rates) + 1), rates, label=name, **style)
            right.plot(range(1, len(reached) + 1), reached, **style)
        left.set(ylim=(0, 1.02), title="accepted, where a guess was tested")
        right.set(ylim=(0, None), title="steps that accept this deep")
        for axes in (left, right):
            axes.set_xlabel("depth in the tree")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.set_xlim(0.5, max(1.5, axes.get_xlim()[1]))
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        _legend(figure, names)
    return figure


def accepted_lengths(series: Mapping[str, Counts], *, longest: int = 12) -> Figure:
    """Returns a histogram for each series: the share of steps by how many guesses they accepted.

    Args:
        series: counts by name.
        longest: longer ones stand together in the last bar.
    """
    from matplotlib.ticker import PercentFormatter

    names = list(series)
    colour = colours(names)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    width = min(longest, max(len(c.acceptance_histogram) - 1 for c in series.values()))
    with drawing(2.9 * columns, 0.4 + 1.75 * rows) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, name in zip(grid.flat, names, strict=False):
            counts = series[name]
            bars = [*counts.acceptance_histogram, *[0] * (width + 1)]
            bars = [*bars[:width], sum(bars[width:])]
            shares = [bar / max(1, counts.target_calls) for bar in bars]
            axes.bar(range(width + 1), shares, color=colour[name], width=0.82)
            mean = counts.num_accepted / max(1, counts.target_calls)
            axes.axvline(mean, color=INK, linewidth=1, linestyle=(0, (3, 2)))
            axes.set_title(name, fontsize=9)
            axes.text(
                0.98,
                0.92,
                f"mean {mean:.2f}",
                transform=axes.transAxes,
                ha="right",
                va="top",
                color=FAINT,
            )
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            ticks = range(0, width + 1, 1 if width <= 8 else 2)
            full = any(len(c.acceptance_histogram) > width + 1 for c in series.values())
            axes.set_xticks(ticks, [f"{t}+" if full and t == width else str(t) for t in ticks])
            axes.grid(visible=False, axis="x")
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        for axes in grid.flat[max(0, len(names) - columns) : len(names)]:
            axes.tick_params(labelbottom=True)  # nothing stands below it
        figure.supxlabel("guesses accepted in a step", fontsize=9)
        figure.supylabel("share of steps", fontsize=9)
    return figure


def draft_cost(dots: Mapping[str, Dot]) -> Figure:
    """Returns block efficiency against the cost of drafting; a line joins what nothing beats."""
    names = list(dots)
    colour, marker = colours(names), markers(names)
    with drawing(6.4, 3.8) as figure:
        axes = figure.subplots()
        front = _front(list(dots.values()))
        axes.plot(
            [dot.draft_ms for dot in front],
            [dot.block_efficiency for dot in front],
            color=FAINT,
            linewidth=1,
            linestyle=(0, (4, 3)),
            zorder=1,
        )
        for name, dot in dots.items():
            axes.scatter(
                *dot,
                s=52,
                color=colour[name],
                marker=marker[name],
                edgecolors="white",
                linewidths=0.8,
                zorder=3,
                label=name,
            )
        _log_if_wide(axes, [dot.draft_ms for dot in dots.values()])
        axes.margins(0.12, 0.15)
        axes.set_xlabel("drafting and learning, ms a tree (dashed: not beaten in both)")
        axes.set_ylabel("block efficiency, tokens a target call")
        _legend(figure, names)
    return figure


def _front(dots: Sequence[Dot]) -> list[Dot]:
    """Returns the dots that no other one beats in cost and in block efficiency, cheapest first."""
    ordered = sorted(dots, key=lambda dot: (dot.draft_ms, -dot.block_efficiency))
    best = accumulate((dot.block_efficiency for dot in ordered), max, initial=float("-inf"))
    return [
        dot for dot, before in zip(ordered, best, strict=False) if dot.block_efficiency > before
    ]


def _log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) > 8 * min(values):
        axes.set_xscale("log")
        _plain_ticks(axes, [digit * 10.0**power for power in range(-4, 5) for digit in (1, 2, 5)])


def _plain_ticks(axes: Axes, wanted: Sequence[float], unit: str = "") -> None:
    """Writes numbers at a logarithmic x axis: those wanted that are within it, far enough apart."""
    from matplotlib.ticker import NullLocator

    low, high = axes.get_xlim()
    apart = (high / low) ** _CLOSEST_TICKS
    ticks: list[float] = []
    # from 1 upwards and downwards, so that 1 has its tick wherever it can
    for tick in sorted((t for t in wanted if low <= t <= high), key=lambda t: max(t, 1 / t)):
        if all(max(tick / other, other / tick) > apart for other in ticks):
            ticks.append(tick)
    axes.set_xticks(ticks, [f"{tick:g}{unit}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(figure: Figure, names: Sequence[str]) -> None:
    """Puts one legend beside the axes, where it covers nothing."""
    if len(names) > 1:
        figure.legend(loc="outside right upper")
