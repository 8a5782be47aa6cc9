"""The slots of draft trees as a picture: how often each one becomes text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from specdec.bench.figures import FAINT, INK, drawing
from specdec.trees.layout import tidy_layout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMN, _ROW = 0.78, 0.3  # inches from a depth to the next, and from leaf to leaf
_RADIUS_POINTS = 9.0


def slot_shares(ranks: Mapping[tuple[int, ...], int]) -> dict[tuple[int, ...], float]:
    """Returns the share of steps that accepted each slot.

    Args:
        ranks: steps by their accepted path, each node named by its place among its siblings; the
            steps that accepted nothing have the empty path.

    Returns:
        By path, parents before their children; the root, the empty path, has 1.
    """
    accepted: Counter[tuple[int, ...]] = Counter()
    for path, steps in ranks.items():
        for depth in range(len(path) + 1):
            accepted[path[:depth]] += steps
    total = sum(ranks.values())
    return {path: accepted[path] / total for path in sorted(accepted)}


def slot_map(ranks: Mapping[tuple[int, ...], int], *, title: str = "", most: int = 40) -> Figure:
    """Returns the tree of slots, first siblings above; the darker, the more often accepted.

    Args:
        ranks: see `slot_shares`.
        title: above the picture.
        most: slots shown, those accepted most often.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shares = slot_shares(ranks)
    # a parent is accepted at least as often as its children, so it is never left out before them
    often = sorted(shares, key=lambda path: (-shares[path], len(path), path))[: most + 1]
    paths = sorted(often)
    number = {path: index for index, path in enumerate(paths)}
    places = tidy_layout([-1, *(number[path[:-1]] for path in paths[1:])])
    deepest = max(place.depth for place in places)
    rows = max(place.y for place in places)
    shade = colormaps["YlGnBu"]
    with drawing(max(3.6, (deepest + 1.2) * _COLUMN), 0.75 + (rows + 1) * _ROW) as figure:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_xlim(-0.5, deepest + 0.6)
        axes.set_ylim(rows + 0.7, -0.9)
        for path, place in zip(paths, places, strict=True):
            share = shares[path]
            if path:
                parent = places[number[path[:-1]]]
                axes.plot(
                    [parent.depth, parent.depth + 0.5, place.depth],
                    [parent.y, place.y, place.y],
                    color=FAINT,
                    linewidth=0.5 + 5 * share,
                    alpha=0.45,
                    solid_joinstyle="round",
                    zorder=1,
                )
            # the square root spreads the many small shares
            level = share**0.5 * 0.85
            axes.scatter(
                [place.depth],
                [place.y],
                s=(2 * _RADIUS_POINTS) ** 2,
                color=to_hex(shade(level)) if path else "white",
                edgecolors=INK if not path else FAINT,
                linewidths=0.7,
                zorder=2,
            )
            axes.text(
                place.depth,
                place.y,
                _percent(share) if path else "root",
                ha="center",
                va="center_baseline",
                fontsize=6.2,
                color="white" if path and level > 0.55 else INK,
                zorder=3,
            )
        for depth in range(1, deepest + 1):
            axes.text(depth, -0.75, f"depth {depth}", ha="center", fontsize=7, color=FAINT)
        shown = len(paths) - 1
        of = f"{shown} slots" if shown == len(shares) - 1 else f"{shown} of {len(shares) - 1} slots"
        axes.set_title(f"{title}\n" if title else "", fontsize=10)
        figure.supxlabel(
            f"share of {sum(ranks.values())} steps that accepted the slot, in %; {of}", fontsize=7.5
        )
    return figure


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.1f}"
