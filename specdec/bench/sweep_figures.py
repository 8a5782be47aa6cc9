"""Figures of a sweep: what budget and temperature do, and what the calibrated costs foretell."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.bench import figures
from specdec.bench.drafters import NO_DRAFTER
from specdec.bench.results import read_results, read_steps
from specdec.bench.slot_figure import slot_map
from specdec.cost import PassCost
from specdec.errors import ConfigError
from specdec.stats import PHASES, Counts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# what tells one line of a figure from another; seeds are added up
_AXES = (
    *("model", "prompts", "drafter", "policy", "verifier", "temperature", "node_budget"),
    *("max_depth", "batch_size"),
)
_SHORT = {"temperature": "T={:g}", "node_budget": "n={}", "max_depth": "d≤{}", "batch_size": "b={}"}
_MOST_LINES, _MOST_PANELS, _MOST_TREES = 10, 4, 4
_FINE = 60  # points of a calibrated curve


@dataclass(frozen=True, slots=True)
class Pool:
    """The cells of a sweep that differ in nothing but the seed.

    Attributes:
        settings: of the cells, by the names of their columns.
        rows: of the cells.
        counts: of all of them.
        error: standard error of the block efficiency over prompts; seeds do not make it smaller,
            for they share the prompts. None for a single prompt.
    """

    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    counts: Counts
    error: float | None

    def total(self, name: str) -> float:
        """Returns a column of the rows, added up."""
        return float(sum(row[name] for row in self.rows))

    def seconds(self, *phases: str) -> float:
        """Returns the seconds of some phases of the cells; without any, of all but the prefill."""
        wanted = phases or [phase for phase in PHASES if phase != "prefill"]
        return float(sum(row["timing"]["seconds"][name] for row in self.rows for name in wanted))

    @property
    def draft_ms(self) -> float:
        """Milliseconds of drafting and learning a tree."""
        return 1000 * self.seconds("draft", "observe") / max(1, self.counts.target_calls)


def pool_seeds(rows: Iterable[dict[str, Any]]) -> list[Pool]:
    """Returns the cells that were done, those that differ in the seed alone together."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["status"] == "ok":
            groups[tuple(row[name] for name in _AXES)].append(row)
    pools = []
    for key, some in groups.items():
        total = Counts()
        for row in some:
            total.add(Counts(**{name: row[name] for name in Counts.__slots__}))
        errors = [row["block_efficiency_error"] for row in some]
        known = [error for error in errors if error is not None]
        error = float(np.mean(known)) if known else None
        pools.append(Pool(dict(zip(_AXES, key, strict=True)), some, total, error))
    return pools


def by_budget(pools: Sequence[Pool]) -> Figure:
    """Returns block efficiency against the node budget, a panel for each temperature."""

    def draw(axes: Axes, line: Sequence[Pool], style: dict[str, Any]) -> None:
        _errorbar(axes, line, [pool.settings["node_budget"] for pool in line], style)

    figure = _panels(pools, "node_budget", "temperature", draw)
    _budget_axis(figure, pools)
    figure.supylabel("block efficiency", fontsize=9)
    return figure


def by_temperature(pools: Sequence[Pool]) -> Figure:
    """Returns block efficiency against the temperature, a panel for each node budget."""

    def draw(axes: Axes, line: Sequence[Pool], style: dict[str, Any]) -> None:
        _errorbar(axes, line, [pool.settings["temperature"] for pool in line], style)

    figure = _panels(pools, "temperature", "node_budget", draw)
    figure.supxlabel("temperature", fontsize=9)
    figure.supylabel("block efficiency", fontsize=9)
    return figure


def speed_by_budget(pools: Sequence[Pool], cost: PassCost | None = None) -> Figure:
    """Returns tokens a second after the prefill against the node budget, by temperature.

    Args:
        pools: of `pool_seeds`.
        cost: what a pass costs. If given, dashed curves show what follows from it: the block
            efficiency and all other seconds as measured, interpolated between the budgets.
    """

    def draw(axes: Axes, line: Sequence[Pool], style: dict[str, Any]) -> None:
        budgets = [pool.settings["node_budget"] for pool in line]
        speeds = [pool.total("num_emitted") / pool.seconds() for pool in line]
        axes.plot(budgets, speeds, **style | ({} if cost is None else {"linestyle": "none"}))
        if cost is not None:
            fine, foretold = _calibrated(line, cost)
            axes.plot(fine, foretold, color=style["color"], linewidth=1.3, linestyle=(0, (4, 2)))

    figure = _panels(pools, "node_budget", "temperature", draw)
    _budget_axis(figure, pools)
    for axes in figure.axes:
        axes.set_ylim(bottom=0)
    note = "" if cost is None else " (dashed: by costs)"
    figure.supylabel(f"decoded tokens/s{note}", fontsize=9)
    return figure


def _calibrated(line: Sequence[Pool], cost: PassCost) -> tuple[np.ndarray, np.ndarray]:
    """Returns node budgets, and the tokens a second that the costs of a pass foretell for them."""
    budgets = np.log2([pool.settings["node_budget"] for pool in line])
    fine = np.linspace(budgets[0], budgets[-1], _FINE)

    def between(measure: Callable[[Pool], float]) -> np.ndarray:
        values: np.ndarray = np.interp(fine, budgets, [measure(pool) for pool in line])
        return values

    passes = "target_passes"
    nodes = between(
        lambda pool: (pool.counts.target_calls + pool.counts.num_drafted) / pool.total(passes)
    )
    context = between(
        lambda pool: (
            (pool.total("num_prompt_tokens") + pool.total("num_generated") / 2)
            / pool.total("num_turns")
        )
    )
    emitted = between(lambda pool: pool.counts.num_emitted / pool.total(passes))
    other = between(lambda pool: (pool.seconds() - pool.seconds("target")) / pool.total(passes))
    passing = [cost.of([n], c)[0] for n, c in zip(nodes, context, strict=True)]
    return 2**fine, emitted / (np.array(passing) + other)


def _errorbar(
    axes: Axes, line: Sequence[Pool], places: Sequence[float], style: dict[str, Any]
) -> None:
    errors = [pool.error or 0.0 for pool in line]
    axes.errorbar(
        places, [pool.counts.block_efficiency for pool in line], errors, elinewidth=1, **style
    )


def _panels(
    pools: Sequence[Pool],
    along: str,
    across: str,
    draw: Callable[[Axes, Sequence[Pool], dict[str, Any]], None],
) -> Figure:
    """Returns lines along one setting, and a panel for each value of another one."""
    pools = [p for p in pools if not isinstance(p.settings[along], str)]
    values = sorted({p.settings[across] for p in pools}, key=lambda v: (isinstance(v, str), v))
    values = values[:_MOST_PANELS]
    pools = [p for p in pools if p.settings[across] in values]
    lines: dict[str, dict[Any, list[Pool]]] = defaultdict(lambda: defaultdict(list))
    label = _labels(pools, along, across)
    for pool in sorted(pools, key=lambda p: p.settings[along]):
        lines[label(pool)][pool.settings[across]].append(pool)
    names = list(lines)[:_MOST_LINES]
    colour, marker = figures.colours(names), figures.markers(names)
    with figures.drawing(1.9 + 2.6 * len(values), 3.2) as figure:
        grid = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
        for axes, value in zip(grid, values, strict=True):
            for name in names:
                if line := lines[name][value]:
                    style = {"color": colour[name], "marker": marker[name], "label": name}
                    draw(axes, line, style | {"markersize": 5, "linewidth": 1.5})
            if len(values) > 1:
                axes.set_title(_SHORT[across].format(value), fontsize=9)
        handles = {
            text: handle
            for axes in grid
            for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if len(handles) > 1:
            figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    return figure


def _budget_axis(figure: Figure, pools: Sequence[Pool]) -> None:
    from matplotlib.ticker import NullLocator

    budgets = sorted({_budget(p) for p in pools} - {0})
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [str(budget) for budget in budgets])
        axes.xaxis.set_minor_locator(NullLocator())
    figure.supxlabel("node budget", fontsize=9)


def _labels(pools: Sequence[Pool], *besides: str) -> Callable[[Pool], str]:
    """Returns what names a pool by the settings in which the pools differ."""
    varying = [
        name
        for name in _AXES
        if name not in besides and len({str(pool.settings[name]) for pool in pools}) > 1
    ]

    def label(pool: Pool) -> str:
        parts = [
            _SHORT.get(name, "{}").format(value)
            for name in varying
            if (value := pool.settings[name]) is not None
        ]
        return ", ".join(parts) or pool.settings["drafter"]

    return label


def _budget(pool: Pool) -> int:
    """Returns the node budget, 0 for "auto"."""
    budget = pool.settings["node_budget"]
    return budget if isinstance(budget, int) else 0


def _named(pools: Sequence[Pool]) -> dict[str, Pool]:
    """Returns pools by name, no more than a figure can hold."""
    label = _labels(pools)
    return {label(pool): pool for pool in pools[:_MOST_LINES]}


def draw_sweep(
    folder: str | Path, out: str | Path, *, suffix: str = ".png", cost: PassCost | None = None
) -> list[Path]:
    """Draws every figure that the cells of a sweep have the data for; returns the files.

    By depth, lengths and slots stand for the largest budget, these and cost for the lowest
    temperature.

    Args:
        folder: of the sweep.
        out: folder of the figures, made if it is missing.
        suffix: ".png" or ".svg".
        cost: see `speed_by_budget`.

    Raises:
        ConfigError: if there is no matplotlib, or no cell with drafts in the folder.
    """
    figures.require_packages("matplotlib")
    rows = read_results(folder)
    pools = [pool for pool in pool_seeds(rows) if pool.settings["drafter"] != NO_DRAFTER]
    if not pools:
        raise ConfigError(f"{folder} has no cell of a drafter that was done: nothing to draw")
    coldest = min(pool.settings["temperature"] for pool in pools)
    cold = [pool for pool in pools if pool.settings["temperature"] == coldest]
    largest = max(map(_budget, cold))
    best = _named([pool for pool in cold if _budget(pool) == largest])
    counts = {name: pool.counts for name, pool in best.items()}
    dots = {
        name: figures.Dot(pool.draft_ms, pool.counts.block_efficiency)
        for name, pool in _named(cold).items()
    }
    found = {
        "acceptance_by_depth": figures.acceptance_by_depth(counts),
        "accepted_lengths": figures.accepted_lengths(counts),
        "draft_cost": figures.draft_cost(dots),
    }
    if len({_budget(pool) for pool in pools} - {0}) > 1:
        found["efficiency_by_budget"] = by_budget(pools)
        found["speed_by_budget"] = speed_by_budget(pools, cost)
    if len({pool.settings["temperature"] for pool in pools}) > 1:
        found["efficiency_by_temperature"] = by_temperature(pools)
    for number, (name, pool) in enumerate(list(best.items())[:_MOST_TREES], start=1):
        ranks = Counter(
            tuple(step["ranks"]) for row in pool.rows for step in read_steps(folder, row)
        )
        found[f"slots_{number}"] = slot_map(ranks, title=name)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in found.items():
        files.append(out / f"{name}{suffix}")
        figures.save(figure, files[-1])
    return files
