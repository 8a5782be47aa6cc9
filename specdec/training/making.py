"""Makes a drafter from a model's own text, as a command line asks: weights, run and card."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from specdec.cache_dir import default_cache_dir
from specdec.drafters.trained_table import save_table
from specdec.drafters.trigram import Trigram
from specdec.errors import ConfigError
from specdec.prompts import Prompt, encode
from specdec.training.card import CardFacts, of_run, write_card
from specdec.training.corpus import Corpus, OwnText
from specdec.training.evaluation import BlockEfficiency
from specdec.training.options import settings_of
from specdec.training.recipes import Entry
from specdec.training.trainer import TrainSettings, train
from specdec.training.trigram import TableSettings, count_table
from specdec.types import Drafter


class Material(NamedTuple):
    """What a drafter is made from.

    Attributes:
        corpus: the target's own text.
        model: the target.
        tokenizer: its tokenizer.
        name: the target's.
        asked: prompts of the user's own to evaluate on; none for those that are kept from training.
    """

    corpus: Corpus
    model: Any
    tokenizer: Any
    name: str
    asked: Sequence[Prompt]


def train_drafter(
    arguments: argparse.Namespace,
    entry: Entry,
    settings: TrainSettings,
    material: Material,
) -> None:
    """Trains a drafter with the recipe of `entry`, or goes on with a run that was cut off.

    Args:
        arguments: of the command.
        entry: the drafter's.
        settings: of the training.
        material: what it is made from.

    Effects:
        Writes the drafter, its run and its card.

    Raises:
        ConfigError: if there is too little text, or the folder holds another run.
    """
    corpus, model, tokenizer, name, asked = material
    folder = _out(arguments, name)
    texts, num_texts = _split(arguments, corpus)
    # steps of the optimizer drown in bfloat16; --mixed-precision computes in it
    own = settings_of(arguments, entry.settings_class())
    recipe = entry.make()(model.float(), texts[:num_texts], **own)
    prompts, evaluated_on = _prompts(arguments, tokenizer, texts[num_texts:], asked)
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
        evaluate=_evaluation(arguments, entry.drafter_of, model, tokenizer, prompts)
        if prompts
        else None,
        progress=not arguments.quiet,
    )
    card = write_card(
        folder,
        _facts(arguments, entry.drafter, name, evaluated_on),
        corpus.facts,
        texts[:num_texts],
        *of_run(run),
        asdict(settings) | own,
    )
    sys.stdout.write(f"{folder} has the drafter, {card.name} says what it is\n")


def count_tables(
    arguments: argparse.Namespace,
    settings: TableSettings,
    material: Material,
) -> None:
    """Counts the tables of `trigram`.

    Args:
        arguments: of the command.
        settings: of the tables.
        material: what they are made from.

    Effects:
        Writes the tables and their card.

    Raises:
        ConfigError: if there is too little text.
    """
    corpus, model, tokenizer, name, asked = material
    folder = _out(arguments, name)
    texts, num_texts = _split(arguments, corpus)
    prompts, evaluated_on = _prompts(arguments, tokenizer, texts[num_texts:], asked)
    table = count_table(texts[:num_texts], settings)
    recipe = {k: v for k, v in corpus.facts.recipe.items() if k != "openings"}
    save_table(folder, model, table, {"text": recipe, **asdict(settings)})
    measure = _evaluation(arguments, lambda made: Trigram(weights=made), model, tokenizer, prompts)
    card = write_card(
        folder,
        _facts(arguments, Trigram.__name__, name, evaluated_on),
        corpus.facts,
        texts[:num_texts],
        [("rows", f"{len(table.ids)}, of {table.ids.shape[1]} successors each")],
        [measure(folder)] if prompts else [],
        asdict(settings),
    )
    sys.stdout.write(f"{folder} has the tables, {card.name} says what they are\n")


def _out(arguments: argparse.Namespace, name: str) -> Path:
    given: Path | None = arguments.out
    return given or default_cache_dir() / "drafters" / f"{arguments.recipe}-{name}"


def _split(arguments: argparse.Namespace, corpus: Corpus) -> tuple[list[OwnText], int]:
    """Returns the texts without features, and how many of them are for training: the first."""
    texts = list(corpus.texts(layers=()))
    held_out = min(max(arguments.held_out, 0), len(texts) // 4)
    if held_out == len(texts):
        raise ConfigError(f"{corpus.folder} has no text to train on; raise --num-texts")
    return texts, len(texts) - held_out


def _prompts(
    arguments: argparse.Namespace,
    tokenizer: Any,
    held_out: Sequence[OwnText],
    asked: Sequence[Prompt],
) -> tuple[list[Any], str]:
    """Returns prompts to evaluate on, and in words what they are."""
    if asked:
        told = f"{len(asked)} prompts of {Path(arguments.eval_prompts).name}"
        return [encode(tokenizer, prompt) for prompt in asked], told
    prompts = [text.tokens[: text.answer_start].unsqueeze(0) for text in held_out]
    return prompts, f"prompts of {len(held_out)} of its own texts that were kept from training"


def _facts(arguments: argparse.Namespace, drafter: str, name: str, evaluated_on: str) -> CardFacts:
    return CardFacts(
        arguments.recipe,
        drafter,
        name,
        arguments.licence,
        _command(sys.argv),
        f"{evaluated_on}, {arguments.eval_tokens} tokens each, {arguments.eval_nodes} nodes",
    )


def _evaluation(
    arguments: argparse.Namespace,
    load: Callable[[Path], Drafter],
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
) -> BlockEfficiency:
    return BlockEfficiency(
        model,
        tokenizer,
        load,
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
