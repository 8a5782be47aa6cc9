"""Trains a drafter for a model, on text the model writes itself; no other data is needed.

    python scripts/train_drafter.py student --epochs 8 --out student
    python scripts/train_drafter.py diffusion --model NAME_OR_PATH --minutes 40 --out diffusion
    python scripts/train_drafter.py student --config run.yaml
    python scripts/train_drafter.py text --num-texts 2048 --texts own_text

A configuration file has the options' names with underscores: `num_texts: 2048`, `layers: [0, 1,
29]`; options behind `--config` on the command line take their place. A run, and the writing of the
text, goes on where it was when the same command is run again. docs/training.md has the times.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from specdec.demo_model import DemoModelError
from specdec.errors import ConfigError, TrainingError, UnsupportedModelError
from specdec.training.cli import add_arguments, run


def main() -> None:
    """Runs one command; errors a user can mend are printed in one line and end with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        run(arguments)
    except (
        ConfigError,
        TrainingError,
        UnsupportedModelError,
        DemoModelError,
        OSError,
    ) as error:
        sys.stderr.write(f"train_drafter: {error}\n")
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        sys.stderr.write("train_drafter: stopped; the same command goes on from here\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
