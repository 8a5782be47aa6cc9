"""The card of a trained drafter: what it is, what made it, and how good it was."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from specdec.training.corpus import CorpusFacts, OwnText
from specdec.training.run_folder import RunFolder


class CardFacts(NamedTuple):
    """What only the command knows.

    Attributes:
        kind: the drafter's name.
        drafter: its class in `specdec.drafters`.
        target: the target's name.
        licence: the target's, which its own text and copies of its weights fall under.
        command: that trained it.
        evaluation: on what, in words.
    """

    kind: str
    drafter: str
    target: str
    licence: str
    command: str
    evaluation: str


def write_card(
    folder: Path,
    facts: CardFacts,
    corpus: CorpusFacts,
    texts: Sequence[OwnText],
    work: Sequence[tuple[str, str]],
    figures: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> Path:
    """Writes README.md into a drafter's folder and returns its path.

    Args:
        folder: the drafter's.
        facts: what the command knows.
        corpus: what the training text was made from.
        texts: that it was trained on.
        work: what was done, as lines of the card's table.
        figures: `block_efficiency` and `acceptance_rate` when they were measured, and at what
            `step`, if there were steps.
        settings: of training and recipe.
    """
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    answers = sum(len(text.tokens) - text.answer_start for text in texts)
    greedy = sum(text.greedy for text in texts)
    how = {k: v for k, v in corpus.recipe.items() if k != "openings"}
    lines = [
        f"# {facts.kind} drafter for {facts.target}",
        "",
        f"Made on {datetime.datetime.now(tz=datetime.UTC).date()} with torch {torch.__version__} "
        f"and transformers {transformers.__version__} on {_hardware()}. Loads with",
        f"`drafter=specdec.drafters.{facts.kind.title().replace('_', '')}(weights=FOLDER)`.",
        "",
        "| | |",
        "|---|---|",
        f"| target | {facts.target}, fingerprint {corpus.target} |",
        f"| licence | that of the target: {facts.licence} |",
        f"| weights | {size / 1e6:.1f} MB |",
        f"| data | {len(texts)} texts the target wrote itself ({greedy} greedily, the others at "
        f"temperature 1), {answers} tokens of answers; nobody else's text |",
        *(f"| {name} | {told} |" for name, told in work),
        "",
        "## Command",
        "",
        "```",
        facts.command,
        "```",
        "",
        "## Figures",
        "",
        f"Greedy, as a chain, on {facts.evaluation}:",
        "",
        "| step | block efficiency | acceptance rate |",
        "|---|---|---|",
        *(
            f"| {figure.get('step', 'no steps')} | {figure['block_efficiency']:.3f} | "
            f"{figure['acceptance_rate']:.1%} |"
            for figure in figures
        ),
        "",
        "## Settings",
        "",
        "```json",
        json.dumps({"training": dict(settings), "text": how}, indent=2),
        "```",
        "",
    ]
    path = folder / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def of_run(run: RunFolder) -> tuple[list[tuple[str, str]], list[Mapping[str, Any]]]:
    """Returns what a run of the optimizer has to tell `write_card`: its work and its figures."""
    records = list(run.records())
    losses = [record for record in records if "loss" in record]
    tail = losses[-max(1, len(losses) // 20) :]
    minutes = sum(record["seconds"] for record in losses) / 60
    work = [
        ("steps", f"{len(losses)} in {minutes:.1f} minutes"),
        (
            "loss",
            f"{_mean(tail, 'loss'):.4f} over the last {len(tail)} steps, "
            f"{_mean(losses[: len(tail)], 'loss'):.4f} over the first",
        ),
    ]
    return work, [record for record in records if "block_efficiency" in record]


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(record[name] for record in records)) / max(1, len(records))


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"one {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} threads of a CPU ({platform.machine()})"
