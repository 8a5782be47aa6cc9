"""Draws a sweep: acceptance by depth, lengths, slots, budgets, temperatures, costs.

    python scripts/plot_sweep.py sweep
    python scripts/plot_sweep.py sweep --out figures --format svg --calibrate

By depth, lengths and slots stand for the largest budget, these and cost for the lowest temperature.
"""

import argparse
import sys
from pathlib import Path

from specdec.bench.results import read_results
from specdec.bench.sweep_figures import draw_sweep
from specdec.cli import one_line_errors


def main() -> None:
    """Draws what the folder has data for, and prints the names of the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of a sweep")
    parser.add_argument("--out", type=Path, help="folder to write; FOLDER/figures when left out")
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure what a pass of the sweep's model costs on this machine, and draw the speeds "
        "that follow: of use on the machine of the sweep",
    )
    arguments = parser.parse_args()
    with one_line_errors("plot_sweep"):
        cost = calibrated(arguments.folder) if arguments.calibrate else None
        files = draw_sweep(
            arguments.folder,
            arguments.out or arguments.folder / "figures",
            suffix=f".{arguments.format}",
            cost=cost,
        )
    sys.stdout.writelines(f"{file}\n" for file in files)


def calibrated(folder):
    """Returns the costs of a pass of the model that the sweep's first cell ran."""
    from specdec.backend.probe import probed
    from specdec.cost import pass_cost
    from specdec.errors import ConfigError
    from specdec.pretrained import load_model

    rows = [row for row in read_results(folder) if row["status"] == "ok"]
    if not rows:
        raise ConfigError(f"{folder} has no cell that was done")
    model, _ = load_model(rows[0]["model"], dtype=rows[0]["dtype"])
    packed = rows[0]["packed_weights"]
    return pass_cost(probed(model, None if packed == "none" else packed))


if __name__ == "__main__":
    main()
