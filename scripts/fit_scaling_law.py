"""Fits log-linear scaling laws of acceptance to a CSV file or to the cells of a sweep.

    python scripts/fit_scaling_law.py points.csv --x training_tokens --y block_efficiency
    python scripts/fit_scaling_law.py points.csv --x training_tokens,draft_parameters \\
        --y block_efficiency --bounds 1,6 --figure law.png --out law.json
    python scripts/fit_scaling_law.py sweep --x batch_size --y tokens_per_second \\
        --where drafter=token_recycling --where temperature=0.0

The law is y = a ln(x) + b, summed over several x. Take the x of one training run at a constant
learning rate, or sizes at the same number of training tokens: a schedule that ends in a decay lifts
its last point above the law. The points largest in the first x are held out once, and foretold by
the others; a law is worth having if it beats the guess that nothing changes. Where y comes within
20 % of its upper bound a line must overshoot, and the logit of y between its bounds is fitted, too.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from specdec.bench.files import whole_file, write_text
from specdec.bench.scaling import fit_laws, near_bound
from specdec.bench.scaling_points import read_points
from specdec.cli import one_line_errors


def main() -> None:
    """Fits, prints a table, and writes what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("points", type=Path, help="CSV file with a heading, or a sweep's folder")
    parser.add_argument("--x", type=names, required=True, metavar="A,B", help="columns")
    parser.add_argument("--y", required=True, help="column of what was measured")
    parser.add_argument(
        "--where", type=condition, action="append", default=[], metavar="COLUMN=VALUE"
    )
    parser.add_argument(
        "--bounds",
        type=bounds,
        metavar="LOW,HIGH",
        help="of y: 0,1 for a rate (taken for a y whose name ends so), 1,DEPTH+1 for tokens a call",
    )
    parser.add_argument("--figure", type=Path, help=".png or .svg (matplotlib)")
    parser.add_argument("--out", type=Path, help="JSON of everything that is printed")
    arguments = parser.parse_args()
    with one_line_errors("fit_scaling_law"):
        points = read_points(arguments.points, arguments.x, arguments.y, dict(arguments.where))
        limits = arguments.bounds or ((0.0, 1.0) if arguments.y.endswith("_rate") else None)
        laws = fit_laws(points, limits)
        show(points, laws, limits)
        if arguments.out is not None:
            with whole_file(arguments.out) as part:
                write_text(part, json.dumps(record(points, laws), indent=1) + "\n")
        if arguments.figure is not None:
            from specdec.bench.figures import save
            from specdec.bench.scaling_figure import law_figure

            save(law_figure(points, laws), arguments.figure)


def names(text):
    """Returns the parts of a list with commas."""
    return text.split(",")


def condition(text):
    """Returns a column's name and the value it must have."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected COLUMN=VALUE, got {text!r}")
    return name, value


def bounds(text):
    """Returns two numbers, the smaller one first."""
    low, high = map(float, text.split(","))
    if not low < high:
        raise argparse.ArgumentTypeError(f"expected LOW,HIGH with LOW below HIGH, got {text!r}")
    return low, high


def show(points, laws, limits):
    """Prints each law's coefficients with their intervals, its fit, and its extrapolation."""
    console = Console(highlight=False)
    table = Table(title=f"{points.y_name}: {len(points.y)} points, 95 % intervals")
    table.add_column("law")
    coefficients = [*(f"per ln {name}" for name in points.x_names), "intercept"]
    for heading in (*coefficients, "R²", "rms", "largest foretold", "measured", "error", "flat"):
        table.add_column(heading, justify="right")
    for law in laws:
        fit, out = law.fit, law.held_out
        values = zip([*fit.slopes, fit.intercept], fit.intervals, strict=True)
        table.add_row(
            law.form,
            *(f"{value:.4g} ({low:.4g} to {high:.4g})" for value, (low, high) in values),
            f"{fit.r_squared:.4f}",
            f"{fit.rmse:.4g}",
            f"{out.predicted:.4g} ({out.interval[0]:.4g} to {out.interval[1]:.4g})",
            f"{out.measured:.4g}",
            f"{out.error:+.3g}",
            f"{out.flat_error:+.3g}",
        )
    console.print(table)
    console.print("[dim]flat: the error of the guess that nothing changes beyond the fit[/dim]")
    if limits is not None and near_bound(points, limits):
        console.print(
            f"[yellow]{points.y_name} comes near its bound {limits[1]:g}:[/] beyond these points "
            "the line overshoots; go by the logit"
        )


def record(points, laws):
    """Returns everything as plain numbers and lists."""
    return {
        "x": list(points.x_names),
        "y": points.y_name,
        "points": [[*x, y] for x, y in zip(points.x.tolist(), points.y.tolist(), strict=True)],
        "laws": [
            asdict(law.fit)
            | {
                "form": law.form,
                "intervals": law.fit.intervals.tolist(),
                "held_out": {
                    "predicted": law.held_out.predicted,
                    "measured": law.held_out.measured,
                    "error": law.held_out.error,
                    "interval": list(law.held_out.interval),
                    "flat_error": law.held_out.flat_error,
                    "slopes": list(law.held_out.fit.slopes),
                    "intercept": law.held_out.fit.intercept,
                },
            }
            for law in laws
        ],
    }


if __name__ == "__main__":
    main()
