"""Prompt files: Spec-Bench's question.jsonl, JSONL with a `prompt` field, or plain text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a file; `category` is "" where the file names none."""

    text: str
    category: str = ""


def read_prompts(path: str | Path) -> list[Prompt]:
    """Returns the prompts of a file in their order; of several turns the first.

    A ``.jsonl`` file has one object a line with `turns` (Spec-Bench) or `prompt`, and perhaps a
    `category`; any other file is text, one prompt a line.

    Raises:
        ConfigError: if the file is missing, empty, not text, or a line cannot be understood.
    """
    path = Path(path)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise ConfigError(f"prompt file {path} does not exist") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt file {path} is not UTF-8 text: {error}") from error
    if not lines:
        raise ConfigError(f"prompt file {path} is empty")
    if path.suffix != ".jsonl":
        return [Prompt(line) for line in lines]
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _parse(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not a JSON object: {error}") from error
    text = record.get("turns", [record.get("prompt")])[0] if isinstance(record, dict) else None
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{where}: expected an object with `turns` or `prompt`")
    return Prompt(text, str(record.get("category", "")))


def spread_over_categories(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Returns `count` prompts in file order, as evenly over the categories as they come."""
    by_category: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_category.setdefault(prompt.category, []).append(index)
    rounds = [
        (position, index)
        for members in by_category.values()
        for position, index in enumerate(members)
    ]
    chosen = sorted(rounds, key=lambda item: item[0])[:count]  # stable: categories in file order
    return [prompts[index] for index in sorted(index for _, index in chosen)]


def encode(tokenizer: Any, prompt: Prompt) -> Tensor:
    """Returns ``[1, T]`` ids, through the chat template where the tokenizer has one."""
    if tokenizer.chat_template is None:
        ids: Tensor = tokenizer(prompt.text, return_tensors="pt").input_ids
        return ids
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt.text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    templated: Tensor = encoded["input_ids"]
    return templated
