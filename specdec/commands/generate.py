"""Writes the continuation of a prompt to the terminal, then explains where the time went.

The text is the model's own: greedy, or sampled by its law.

    python -m specdec generate --prompt "Name three colours."
    python -m specdec generate --prompt @question.txt --temperature 0.7 --seed 3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from specdec.commands.parts import add_parts, add_sampling, load, parts_of, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_parts(parser)
    parser.add_argument("--prompt", required=True, help="the text, or @FILE to read it from one")
    parser.add_argument("--max-new-tokens", type=positive, default=256)
    add_sampling(parser)
    parser.add_argument("--seed", type=int, help="makes a sampled text repeatable")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from specdec.bench.decoding import decoding_arguments
    from specdec.demo import stream_text
    from specdec.generator import SpeculativeGenerator
    from specdec.prompts import Prompt, encode

    text = arguments.prompt
    if text.startswith("@"):
        text = Path(text[1:]).read_text(encoding="utf-8")
    model, tokenizer = load(arguments.model)
    generator = SpeculativeGenerator(model, tokenizer, **parts_of(arguments, tokenizer))
    stream_text(
        generator,
        encode(tokenizer, Prompt(text)).to(model.device),
        seed=arguments.seed,
        **decoding_arguments(arguments.max_new_tokens, arguments.temperature, arguments.top_p),
    )
    sys.stderr.write(f"\n{generator.stats.explain()}\n" if generator.stats else "\n")
