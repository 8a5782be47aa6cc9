"""Trains a drafter for a model, on text the model writes itself; no other data is needed.

    python -m specdec train student --epochs 8 --out student
    python -m specdec train diffusion --model NAME_OR_PATH --minutes 40 --out diffusion
    python -m specdec train student --config run.yaml
    python -m specdec train trigram --out table
    python -m specdec train text --num-texts 2048 --texts own_text

A configuration file has the options' names with underscores: `num_texts: 2048`, `layers: [0, 1,
29]`; options behind `--config` on the command line take their place. A run, and the writing of the
text, goes on where it was when the same command is run again. docs/training.md has the times.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from specdec.backend.features import decoder_layers
from specdec.backend.fingerprint import fingerprint
from specdec.cache_dir import default_cache_dir
from specdec.errors import ConfigError
from specdec.pretrained import load_model
from specdec.prompts import Prompt, read_prompts, spread_over_categories
from specdec.training.corpus import Corpus
from specdec.training.diffusion_init import target_layers
from specdec.training.making import Material, count_tables, train_drafter
from specdec.training.options import ConfigFile, add_settings, settings_of
from specdec.training.own_text import TextRecipe, write_own_text
from specdec.training.recipes import RECIPES, Entry
from specdec.training.trainer import TrainSettings
from specdec.training.trigram import TableSettings

_TEXT = "text"
_TABLE = "trigram"
_LENGTHS = ("steps", "epochs", "minutes")
_TEXT_OPTIONS = ("num_texts", "prompt_tokens", "answer_tokens", "greedy_share")
_TEXT_BATCH = 32  # rows written at a time, and so a shard of the corpus
_FEATURE_LAYERS = 3
_TRAINING = {field.name for field in fields(TrainSettings)}  # of every recipe, the seed too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a sub-command for the text, and one for each drafter that can be trained."""
    commands = parser.add_subparsers(dest="recipe", required=True, metavar="DRAFTER")
    _add_text_arguments(
        commands.add_parser(
            _TEXT, help="only have the target write the text to train on", allow_abbrev=False
        )
    )
    table = commands.add_parser(
        _TABLE, help="tables counted over the target's text: no steps", allow_abbrev=False
    )
    _add_text_arguments(table)
    _add_output_arguments(table)
    add_settings(table.add_argument_group(_TABLE), TableSettings)
    for name, entry in RECIPES.items():
        command = commands.add_parser(name, help=entry.help, allow_abbrev=False)
        _add_text_arguments(command)
        _add_training_arguments(command)
        add_settings(command.add_argument_group(name), entry.settings_class(), taken=_TRAINING)
        command.set_defaults(learning_rate=entry.learning_rate)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command that `add_arguments` reads.

    Raises:
        ConfigError: for options that cannot work, and for text or a run of something else.
        UnsupportedModelError: if the model cannot be trained for.
        TrainingError: if the loss is not finite.
    """
    entry = RECIPES.get(arguments.recipe)
    settings = None if entry is None else _settings(arguments, entry)
    table = None
    if arguments.recipe == _TABLE:
        table = TableSettings(**settings_of(arguments, TableSettings))
    asked = _eval_prompts(arguments)  # now, and not after minutes of work
    model, tokenizer = load_model(arguments.model)
    name = Path(model.config.name_or_path).name or type(model).__name__
    corpus = _corpus(arguments, model, tokenizer, name)
    if entry is not None and settings is not None:
        train_drafter(arguments, entry, settings, Material(corpus, model, tokenizer, name, asked))
        return
    if table is not None:
        count_tables(arguments, table, Material(corpus, model, tokenizer, name, asked))
        return
    texts = list(corpus.texts(layers=()))
    tokens = sum(len(text.tokens) for text in texts)
    sys.stdout.write(f"{corpus.folder} has {len(texts)} texts, {tokens} tokens\n")


def _add_text_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME_OR_PATH", help="the target; the demo model when left out"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        action=ConfigFile,
        default=argparse.SUPPRESS,
        help="options, as YAML",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    text = parser.add_argument_group(
        "own text",
        "text that is there is used, finished if it was cut off, and added to if more is asked for",
    )
    text.add_argument("--texts", metavar="FOLDER", type=Path, help="in the cache when left out")
    text.add_argument("--num-texts", type=int, help=f"{TextRecipe().num_texts} when left out")
    text.add_argument("--prompt-tokens", type=int, help="at most, of a user's turn")
    text.add_argument("--answer-tokens", type=int, help="at most, of an answer")
    text.add_argument("--greedy-share", type=float, help="of the answers; the others are sampled")
    text.add_argument("--text-batch-size", type=int, help=f"rows at a time; {_TEXT_BATCH} at first")
    text.add_argument(
        "--text-dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the model that writes; bfloat16 is faster where the hardware multiplies it. A "
        "drafter is trained beside the model in float32 in any case",
    )
    text.add_argument(
        "--feature-layers",
        type=int,
        nargs="+",
        metavar="N",
        help="whose states to keep; a low, a middle and a high one when left out",
    )


def _add_output_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds what every drafter needs, and returns the group about its evaluation."""
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="in the cache when left out")
    parser.add_argument(
        "--licence", default="see its own card", help="the target's, for the drafter's card"
    )
    evaluation = parser.add_argument_group("evaluation", "block efficiency of a chain, greedy")
    evaluation.add_argument(
        "--held-out", type=int, default=16, help="texts kept from training, for their prompts"
    )
    evaluation.add_argument(
        "--eval-prompts", metavar="FILE", help="JSONL or text, in place of the held-out prompts"
    )
    evaluation.add_argument("--eval-tokens", type=int, default=64, help="to write per prompt")
    evaluation.add_argument("--eval-nodes", type=int, default=6, help="length of the chain")
    return evaluation


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="the exact form: the same anywhere")
    length.add_argument("--epochs", type=float)
    length.add_argument("--minutes", type=float, help="as many steps as take that long here")
    add_settings(training, TrainSettings, taken=(*_LENGTHS, "evaluations"))
    evaluation = _add_output_arguments(parser)
    evaluation.add_argument("--evaluations", type=int, default=4, help="spread over the run")


def _settings(arguments: argparse.Namespace, entry: Entry) -> TrainSettings:
    given = settings_of(arguments, TrainSettings)
    if all(given[name] is None for name in _LENGTHS):
        given["epochs"] = entry.epochs
    return TrainSettings(**given)


def _corpus(arguments: argparse.Namespace, model: Any, tokenizer: Any, name: str) -> Corpus:
    """Returns the corpus that is there, finished, or a new one."""
    folder = arguments.texts or default_cache_dir() / "texts" / name
    given = {k: getattr(arguments, k) for k in _TEXT_OPTIONS if getattr(arguments, k) is not None}
    layers, batch_size, dtype = arguments.feature_layers, _TEXT_BATCH, arguments.text_dtype
    if (folder / "corpus.json").exists():
        facts = Corpus(folder).facts
        if facts.target != fingerprint(model):
            raise ConfigError(
                f"{folder} holds text and features of the model with fingerprint {facts.target}; "
                f"{name} has {fingerprint(model)}: take another folder with --texts"
            )
        kept = dict(facts.recipe)
        batch_size = kept.pop("batch_size")
        written_in = kept.pop("dtype", dtype)  # older text does not tell, and is refused below
        dtype = written_in if dtype == "auto" else dtype
        given = kept | {"openings": tuple(kept["openings"])} | given
        layers = facts.layers if layers is None else layers
    if layers is None:
        layers = target_layers(len(decoder_layers(model)), _FEATURE_LAYERS)
    if arguments.text_batch_size is not None:
        batch_size = arguments.text_batch_size
    if dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        model, _ = load_model(arguments.model, dtype=dtype)
    return write_own_text(
        model,
        tokenizer,
        folder,
        TextRecipe(**given),
        layers=layers,
        batch_size=batch_size,
        progress=not arguments.quiet,
    )


def _eval_prompts(arguments: argparse.Namespace) -> list[Prompt]:
    """Returns prompts of the user's own to evaluate on; none where none are named."""
    if getattr(arguments, "eval_prompts", None) is None:
        return []
    prompts = read_prompts(arguments.eval_prompts)
    return spread_over_categories(prompts, max(1, arguments.held_out))
