"""The command line: `python -m specdec demo|generate|compare|sweep|bench|train`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from specdec.errors import ConfigError, TrainingError, UnsupportedModelError

# where a command is hooked in: its module has `add_arguments(parser)`, `run(arguments)` and a
# docstring that teaches, the help of the command; the line is for the list of all commands
COMMANDS = {
    "demo": (
        "specdec.commands.demo",
        "write three texts with a real model, next to plain decoding",
    ),
    "generate": ("specdec.commands.generate", "write one text"),
    "compare": ("specdec.commands.compare", "compare drafters with plain generation: a report"),
    "sweep": ("specdec.commands.sweep", "measure acceptance over a grid, resumable"),
    "bench": ("specdec.commands.bench", "time whole generations over batch sizes and contexts"),
    "train": ("specdec.training.cli", "train a drafter on text that the model writes itself"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; see `one_line_errors`."""
    # no hub is asked unless the user says so: an unreachable one costs half a minute a load
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser(next(iter(argv), "")).parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    arguments.invocation = ["specdec", *argv]  # for the records of measurements
    with one_line_errors(f"specdec {arguments.command}"):
        arguments.run(arguments)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turns an error that a user can mend into one line and status 2."""
    from specdec.wheel_model import DemoModelError

    try:
        yield
    except (ConfigError, TrainingError, UnsupportedModelError, DemoModelError, OSError) as error:
        sys.stderr.write(f"{program}: {error}\n")
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _parser(chosen: str) -> argparse.ArgumentParser:
    """Returns the parser; of the commands only the chosen one is imported and has its options."""
    parser = argparse.ArgumentParser(
        prog="specdec",
        description="Speculative decoding with draft trees for HuggingFace causal language models.",
        epilog="`specdec COMMAND --help` explains a command, with examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (path, summary) in COMMANDS.items():
        if name != chosen:
            commands.add_parser(name, help=summary)
            continue
        module = import_module(path)
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
