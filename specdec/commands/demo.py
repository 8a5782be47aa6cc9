"""Streams three texts through draft trees, then compares with model.generate.

Shown are speed, block efficiency, whether the texts are identical, and one real tree. Accepted
guesses are green.

    python -m specdec demo
    python -m specdec demo --drafter suffix --node-budget 16 --figure tree.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from specdec.commands.parts import add_parts, load, parts_of, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_parts(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument(
        "--figure",
        metavar="FILE",
        type=Path,
        help="save a picture of the tree shown at the end, .svg or .png (needs matplotlib)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from specdec.demo import run_demo
    from specdec.trees.figure import check_figure_file

    if arguments.figure is not None:
        check_figure_file(arguments.figure)  # now, and not after minutes of work
    model, tokenizer = load(arguments.model)
    run_demo(
        model,
        tokenizer,
        max_new_tokens=arguments.max_new_tokens,
        figure=arguments.figure,
        **parts_of(arguments, tokenizer),
    )
