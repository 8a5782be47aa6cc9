"""Compares drafters on a model: plain decoding, transformers' rivals and ours, prompt by prompt."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.bench.decoding import decoding_arguments, pad_token_id
from specdec.bench.drafters import check_drafter, drafters_for, make_drafter
from specdec.bench.files import whole_file, write_text
from specdec.bench.generation import Method, Run, methods_of, time_prompts
from specdec.bench.memory import added_memory
from specdec.bench.provenance import device_name, git_revision, hardware, versions
from specdec.bench.summary import Summary, summarise
from specdec.errors import ConfigError
from specdec.pretrained import load_model
from specdec.prompts import Prompt, digest, encode

MANIFEST, RESULTS, RUNS, REPORT = "manifest.json", "results.csv", "runs.csv", "report.html"
UNNAMED = "prompts"  # the category of prompts whose file names none
_SCHEMA = "specdec comparison 1"
_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """What methods took on the same prompts.

    Attributes:
        runs: a run for each method and prompt.
        summaries: of each category, "overall" last.
        memory: bytes that each method adds, see `specdec.bench.memory`.
        settings: the parts each method had.
    """

    runs: list[Run]
    summaries: list[Summary]
    memory: dict[str, int]
    settings: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What methods took, and everything that a figure of it needs beside it."""

    measured: Measured
    setting: dict[str, Any]


def measure_methods(
    makers: Mapping[str, Callable[[], Method]],
    inputs: Sequence[tuple[str, dict[str, Tensor]]],
    *,
    repeats: int = 1,
    progress: Callable[[Sequence[int]], Any] = lambda indices: indices,
    **arguments: Any,
) -> Measured:
    """Measures the memory of each method by itself, then times all of them in turns.

    Args:
        makers: from `methods_of`.
        inputs: category and model inputs of each prompt.
        repeats: see `time_prompts`.
        progress: see `time_prompts`.
        **arguments: of `generate`.
    """
    longest = max((one for _, one in inputs), key=lambda one: one["input_ids"].numel())
    methods = {name: make() for name, make in makers.items()}
    for method in methods.values():
        method.run(inputs[0][1], **arguments | {"max_new_tokens": _WARM_UP_TOKENS})
    # while `methods` keep the packed weights: all share them
    memory = {name: added_memory(make, longest, **arguments) for name, make in makers.items()}
    runs = time_prompts(methods, inputs, repeats=repeats, progress=progress, **arguments)
    settings = {name: method.settings for name, method in methods.items()}
    return Measured(runs, summarise(runs), memory, settings)


def compare(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    drafters: Sequence[str] | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    node_budget: int | str = 8,
    command: Sequence[str] = (),
    progress: Callable[[Sequence[int]], Any] = lambda indices: indices,
) -> Comparison:
    """Compares drafters with `model.generate` and transformers' prompt lookup, batch 1.

    Args:
        model: the target.
        tokenizer: its tokenizer.
        prompts: the first turn of each is asked.
        drafters: as `specdec.bench.drafters.make_drafter` takes them; None for every drafter of the
            registry that needs nothing but its name.
        max_new_tokens: a prompt.
        temperature: 0 is greedy, and texts are then compared.
        top_p: nucleus of a temperature above 0.
        node_budget: draft nodes a tree, or "auto".
        command: for the record.
        progress: wraps the prompts' numbers, as tqdm does.

    Raises:
        ConfigError: for an unknown drafter, or no prompts.
    """
    if not prompts:
        raise ConfigError("a comparison needs at least one prompt")
    left_out: dict[str, str] = {}
    if drafters is None:
        drafters, left_out = drafters_for(model, tokenizer)
    drafts = {
        one: load_model(one, device=model.device) for d in drafters for one in check_drafter(d)
    }
    made = {d: make_drafter(d, tokenizer, drafts.__getitem__) for d in drafters}
    assistant = next((draft for draft, _ in drafts.values()), None)
    calls = decoding_arguments(max_new_tokens, temperature, top_p)
    begin, begun = time.perf_counter(), datetime.now(UTC)
    measured = measure_methods(
        methods_of(model, tokenizer, made, assistant=assistant, node_budget=node_budget),
        [
            (prompt.category or UNNAMED, {"input_ids": encode(tokenizer, prompt).to(model.device)})
            for prompt in prompts
        ],
        progress=progress,
        pad_token_id=pad_token_id(tokenizer),
        **calls,
    )
    setting = {
        "schema": _SCHEMA,
        "begun": begun.isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - begin,
        "command": list(command),
        "model": _facts(model),
        "prompts": {
            "count": len(prompts),
            "categories": len({prompt.category for prompt in prompts}),
            "sha256": digest(prompts),
        },
        "decoding": calls,
        "node_budget": node_budget,
        "methods": measured.settings,
        "left_out": left_out,
        "memory_bytes": measured.memory,
        "versions": versions(),
        "git": git_revision(),
        "hardware": hardware(),
    }
    return Comparison(measured, setting)


def _facts(model: Any) -> dict[str, Any]:
    return {
        "name": Path(str(model.config.name_or_path)).name or type(model).__name__,
        "class": type(model).__name__,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
    }


def check_folder(folder: str | Path) -> Path:
    """Returns the folder of a comparison, made if it is missing: to be called before long work.

    Raises:
        ConfigError: if it cannot be written, or holds something else, such as a sweep.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return folder
    except ValueError as error:
        raise ConfigError(
            f"{folder / MANIFEST} is no manifest of a comparison ({error}); choose another folder"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"the folder {folder} cannot be used ({error.strerror}): expected a folder that can be "
            "written, or a name for a new one"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("schema") != _SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise ConfigError(
            f"{folder} holds something else than a comparison of this version (schema {found!r}, "
            f"expected {_SCHEMA!r}); choose another folder (nothing was changed)"
        )
    return folder


def save(comparison: Comparison, folder: str | Path) -> None:
    """Writes results.csv, runs.csv, report.html and, last, manifest.json; each whole or not at all.

    Raises:
        OSError: if a file cannot be written; what stood there before stays.
        ConfigError: if a package that the report needs is not installed.
    """
    from specdec.bench.report import render

    folder = Path(folder)
    memory = comparison.measured.memory
    rows = [
        one.to_dict() | {"memory_bytes": memory[one.method]}
        for one in comparison.measured.summaries
    ]
    for name, text in (
        (RESULTS, _csv(rows)),
        (RUNS, _csv([run.to_dict() for run in comparison.measured.runs])),
        (REPORT, render(comparison)),
        (MANIFEST, json.dumps(comparison.setting, indent=1, allow_nan=False) + "\n"),
    ):
        with whole_file(folder / name) as part:
            write_text(part, text)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table with a column for each name; lists stand in it as JSON."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    return out.getvalue()
