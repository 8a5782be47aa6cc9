"""A scaling law as a picture: points, fits, their intervals, and the point that was held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from specdec.bench.figures import FAINT, INK, colours, drawing
from specdec.bench.scaling import Law, Points, band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FINE = 100


def law_figure(points: Points, laws: Sequence[Law]) -> Figure:
    """Returns a panel for each law: over the only x, or fitted against measured for several."""
    colour = colours([law.form for law in laws])
    with drawing(0.5 + 4.1 * len(laws), 3.5) as figure:
        grid = figure.subplots(1, len(laws), sharey=True, squeeze=False)[0]
        for axes, law in zip(grid, laws, strict=True):
            if len(points.x_names) == 1:
                _over_x(axes, points, law, colour[law.form])
            else:
                _against(axes, points, law, colour[law.form])
            held_out = law.held_out
            axes.set_title(
                f"{law.form}: R² {law.fit.r_squared:.3f}, largest foretold "
                f"{held_out.predicted:.3g}, measured {held_out.measured:.3g}",
                fontsize=8.5,
                fontweight="normal",
            )
            axes.legend(loc="best")
        grid[0].set_ylabel(points.y_name)
    return figure


def _over_x(axes: Axes, points: Points, law: Law, colour: str) -> None:
    kept, out = ~points.largest, points.largest
    x = points.x[:, 0]
    fine = np.geomspace(x.min(), x.max(), _FINE)[:, None]
    low, high = band(points, law.fit, fine)
    axes.fill_between(fine[:, 0], low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(fine[:, 0], law.fit.predict(fine), color=colour, linewidth=1.6, label="all points")
    axes.plot(
        fine[:, 0],
        law.held_out.fit.predict(fine),
        color=FAINT,
        linewidth=1.2,
        linestyle=(0, (4, 3)),
        label="without the largest",
    )
    axes.scatter(x[kept], points.y[kept], s=26, color=INK, zorder=3)
    axes.scatter(
        x[out], points.y[out], s=34, facecolors="white", edgecolors=INK, zorder=3, label="held out"
    )
    middle, (bottom, top) = law.held_out.predicted, law.held_out.interval
    axes.errorbar(
        [x.max()], [middle], [[middle - bottom], [top - middle]], color=FAINT, capsize=3, zorder=2
    )
    axes.set_xscale("log")
    axes.set_xlabel(f"{points.x_names[0]} (bars: 95 % for a new point)")


def _against(axes: Axes, points: Points, law: Law, colour: str) -> None:
    kept, out = ~points.largest, points.largest
    fitted, foretold = law.fit.predict(points.x[kept]), law.held_out.fit.predict(points.x[out])
    ends = [float(points.y.min()), float(points.y.max())]
    axes.plot(ends, ends, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.scatter(fitted, points.y[kept], s=26, color=colour, label="fitted to all points")
    axes.scatter(
        foretold,
        points.y[out],
        s=34,
        facecolors="white",
        edgecolors=colour,
        label="held out, foretold by the others",
    )
    axes.set_xlabel(f"fitted, by {' and '.join(points.x_names)}")
