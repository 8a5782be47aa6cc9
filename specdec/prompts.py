"""Prompt files: Spec-Bench's question.jsonl, JSONL with a `prompt` field, plain text; data sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from torch import Tensor

from specdec.errors import ConfigError

_DATASETS = "datasets:"
_DATASETS_FORM = "datasets:NAME?split=SPLIT&config=CONFIG&column=COLUMN"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a file.

    Attributes:
        text: the first turn.
        category: "" where the file names none.
        followups: the user's later turns, each asked after the answer to the one before it.
        question_id: the file's own, None where it has none.
        number: its place among the file's prompts, from 0; equal prompts may differ in it.
    """

    text: str
    category: str = ""
    followups: tuple[str, ...] = ()
    question_id: int | str | None = None
    number: int = field(default=0, compare=False)

    @property
    def turns(self) -> tuple[str, ...]:
        """What the user says, turn by turn."""
        return (self.text, *self.followups)

    def shortened(self, max_turns: int) -> Prompt:
        """Returns the conversation's first turns, at least one."""
        return replace(self, followups=self.followups[: max_turns - 1])


def read_prompts(path: str | Path) -> list[Prompt]:
    """Returns the prompts of a file in their order, with all their turns.

    A ``.jsonl`` file has one object a line with `turns` (Spec-Bench) or `prompt`, and perhaps a
    `category` and a `question_id`; any other file is text, one prompt a line. A name
    ``datasets:NAME?split=SPLIT&config=CONFIG&column=COLUMN`` is a HuggingFace data set, whose
    records are read like those of a ``.jsonl`` file; `column` names another field for the prompt.

    Raises:
        ConfigError: if the file is missing, unreadable, empty, not text, or a line cannot be
            understood; or if the data set, or the package `datasets`, is not there.
    """
    if str(path).startswith(_DATASETS):
        return _from_datasets(str(path))
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"prompt file {path} does not exist") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt file {path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ConfigError(f"prompt file {path} cannot be read: {error.strerror}") from error
    if "\0" in text:
        raise ConfigError(f"prompt file {path} is not text: it has a zero byte; expected JSONL")
    # not splitlines(): a JSON string may hold U+2028 as it is
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ConfigError(f"prompt file {path} is empty")
    if path.suffix != ".jsonl":
        return [Prompt(line.rstrip("\r"), number=n) for n, (_, line) in enumerate(lines)]
    return [_parse(line, f"{path}:{place}", n) for n, (place, line) in enumerate(lines)]


def _parse(line: str, where: str, number: int) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not a JSON object: {error}") from error
    return _prompt(record, where, number)


def _prompt(record: Any, where: str, number: int, column: str = "prompt") -> Prompt:
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: not a JSON object but {type(record).__name__}")
    turns = record.get("turns") if column == "prompt" else None
    turns = [record.get(column)] if turns is None else turns
    if not isinstance(turns, list) or not turns or not all(_is_text(turn) for turn in turns):
        raise ConfigError(
            f"{where}: expected an object with `turns` (a list of texts) or `{column}` (a text), "
            f"got the fields {', '.join(map(str, record)) or 'none'}"
        )
    identity = record.get("question_id")
    if isinstance(identity, bool) or not isinstance(identity, int | str | None):
        raise ConfigError(f"{where}: question_id must be a number or a text, got {identity!r}")
    category = record.get("category")
    category = "" if category is None else str(category)
    return Prompt(turns[0], category, tuple(turns[1:]), identity, number)


def _is_text(turn: Any) -> bool:
    return isinstance(turn, str) and bool(turn.strip())


def _from_datasets(spec: str) -> list[Prompt]:
    name, _, query = spec.removeprefix(_DATASETS).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(options.keys() - {"split", "config", "column"})
    if not name or unknown or not all(options.values()):
        raise ConfigError(f"{spec!r} is no data set: expected {_DATASETS_FORM}")
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{spec!r} needs the package datasets: pip install datasets, or save the prompts as "
            "JSONL with a `prompt` field"
        ) from error
    try:
        records = datasets.load_dataset(
            name, options.get("config"), split=options.get("split", "test")
        )
    except (OSError, ValueError) as error:  # what it raises for names, splits and the network
        raise ConfigError(f"{spec!r} cannot be loaded: {error}") from error
    column = options.get("column", "prompt")
    prompts = [
        _prompt(record, f"{spec}, record {number}", number, column)
        for number, record in enumerate(records)
    ]
    if not prompts:
        raise ConfigError(f"{spec!r} is empty")
    return prompts


def digest(prompts: Iterable[Prompt]) -> str:
    """Returns the SHA-256 of what is asked, in hexadecimal; independent of the file's form."""
    asked = [[prompt.question_id, prompt.category, *prompt.turns] for prompt in prompts]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


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
    """Returns ``[1, T]`` ids of the first turn, through the chat template if there is one."""
    return encode_chat(tokenizer, [prompt.text])


def encode_chat(tokenizer: Any, messages: Sequence[str]) -> Tensor:
    """Returns ``[1, T]`` int64 ids of a conversation, ready for the next answer.

    Without a chat template the messages are joined by blank lines.

    Args:
        tokenizer: the target's.
        messages: the user's and the model's in turn, the user's first and last.
    """
    if tokenizer.chat_template is None:
        ids: Tensor = tokenizer("\n\n".join(messages), return_tensors="pt").input_ids
        return ids
    encoded = tokenizer.apply_chat_template(
        [
            {"role": "assistant" if place % 2 else "user", "content": message}
            for place, message in enumerate(messages)
        ],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    templated: Tensor = encoded["input_ids"]
    return templated
