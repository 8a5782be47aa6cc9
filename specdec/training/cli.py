"""Trains a drafter for a model, on text the model writes itself; no other data is needed.

    python -m specdec train student --epochs 8 --out student
    python -m specdec train diffusion --model NAME_OR_PATH --minutes 40 --out diffusion
    python -m specdec train student --config run.yaml
    python -m specdec train text --num-texts 2048 --texts own_text

A configuration file has the options' names with underscores: `num_texts: 2048`, `layers: [0, 1,
29]`; options behind `--config` on the command line take their place. A run, and the writing of the
text, goes on where it was when the same command is run again. docs/training.md has the times.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from specdec.backend.features import decoder_layers
from specdec.backend.fingerprint import fingerprint
from specdec.cache_dir import default_cache_dir
from specdec.errors import ConfigError
from specdec.pretrained import load_model
from specdec.prompts import Prompt, encode, read_prompts, spread_over_categories
from specdec.training.card import CardFacts, write_card
from specdec.training.corpus import Corpus
from specdec.training.diffusion_init import target_layers
from specdec.training.evaluation import BlockEfficiency
from specdec.training.options import ConfigFile, add_settings, settings_of
from specdec.training.own_text import TextRecipe, write_own_text
from specdec.training.recipes import RECIPES, Entry
from specdec.training.trainer import TrainSettings, train

_TEXT = "text"
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
    asked = _eval_prompts(arguments)  # now, and not after minutes of work
    model, tokenizer = load_model(arguments.model)
    name = Path(model.config.name_or_path).name or type(model).__name__
    corpus = _corpus(arguments, model, tokenizer, name)
    if entry is not None and settings is not None:
        _train(arguments, entry, settings, corpus, model, tokenizer, name, asked)
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


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("training")
    training.add_argument("--out", metavar="FOLDER", type=Path, help="in the cache when left out")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="the exact form: the same anywhere")
    length.add_argument("--epochs", type=float)
    length.add_argument("--minutes", type=float, help="as many steps as take that long here")
    add_settings(training, TrainSettings, taken=(*_LENGTHS, "evaluations"))
    training.add_argument(
        "--licence", default="see its own card", help="the target's, for the drafter's card"
    )
    evaluation = parser.add_argument_group("evaluation", "block efficiency of a chain, greedy")
    evaluation.add_argument("--evaluations", type=int, default=4, help="spread over the run")
    evaluation.add_argument(
        "--held-out", type=int, default=16, help="texts kept from training, for their prompts"
    )
    evaluation.add_argument(
        "--eval-prompts", metavar="FILE", help="JSONL or text, in place of the held-out prompts"
    )
    evaluation.add_argument("--eval-tokens", type=int, default=64, help="to write per prompt")
    evaluation.add_argument("--eval-nodes", type=int, default=6, help="length of the chain")


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


def _train(
    arguments: argparse.Namespace,
    entry: Entry,
    settings: TrainSettings,
    corpus: Corpus,
    model: Any,
    tokenizer: Any,
    name: str,
    asked: Sequence[Prompt],
) -> None:
    folder = arguments.out or default_cache_dir() / "drafters" / f"{arguments.recipe}-{name}"
    texts = list(corpus.texts(layers=()))
    held_out = min(max(arguments.held_out, 0), len(texts) // 4)
    num_texts = len(texts) - held_out
    if num_texts < 1:
        raise ConfigError(f"{corpus.folder} has no text to train on; raise --num-texts")
    # steps of the optimizer drown in bfloat16; --mixed-precision computes in it
    own = settings_of(arguments, entry.settings_class())
    recipe = entry.make()(model.float(), texts[:num_texts], **own)
    prompts = [text.tokens[: text.answer_start].unsqueeze(0) for text in texts[num_texts:]]
    evaluated_on = f"prompts of {held_out} of its own texts that were kept from training"
    if asked:
        prompts = [encode(tokenizer, prompt) for prompt in asked]
        evaluated_on = f"{len(prompts)} prompts of {Path(arguments.eval_prompts).name}"
    if recipe.layers:
        texts = list(corpus.texts(layers=recipe.layers))
    run = train(
        recipe,
        texts[:num_texts],
        folder,
        settings,
        about={
            **own,
            "target": corpus.facts.target,
            "text": {k: v for k, v in corpus.facts.recipe.items() if k != "openings"},
        },
        evaluate=_evaluation(arguments, entry, model, tokenizer, prompts) if prompts else None,
        progress=not arguments.quiet,
    )
    card = write_card(
        folder,
        CardFacts(
            arguments.recipe,
            entry.drafter,
            name,
            arguments.licence,
            _command(sys.argv),
            f"{evaluated_on}, {arguments.eval_tokens} tokens each, {arguments.eval_nodes} nodes",
        ),
        corpus.facts,
        texts[:num_texts],
        run,
        asdict(settings) | own,
    )
    sys.stdout.write(f"{folder} has the drafter, {card.name} says what it is\n")


def _eval_prompts(arguments: argparse.Namespace) -> list[Prompt]:
    """Returns prompts of the user's own to evaluate on; none where none are named."""
    if getattr(arguments, "eval_prompts", None) is None:
        return []
    prompts = read_prompts(arguments.eval_prompts)
    return spread_over_categories(prompts, max(1, arguments.held_out))


def _evaluation(
    arguments: argparse.Namespace, entry: Entry, model: Any, tokenizer: Any, prompts: Sequence[Any]
) -> BlockEfficiency:
    return BlockEfficiency(
        model,
        tokenizer,
        entry.drafter_of,
        prompts,
        num_nodes=arguments.eval_nodes,
        max_new_tokens=arguments.eval_tokens,
        progress=not arguments.quiet,
    )


def _command(arguments: Sequence[str]) -> str:
    """Returns the command line; folders of this machine are nobody else's business."""
    own = arguments[2:] if arguments[1:2] == ["train"] else arguments[1:]
    parts = [Path(part).name if Path(part).is_absolute() else part for part in own]
    return shlex.join(["python", "-m", "specdec", "train", *parts])
