"""Runs a sweep: the cells of a grid, one after another, each into its folder as soon as it is done.

Processes that share a sweep take every n-th cell of the grid each, so they need not speak with one
another; they write to one folder.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from specdec.bench.cells import SweepCell, check_names, span
from specdec.bench.drafters import make_drafter
from specdec.bench.grid import Grid
from specdec.bench.measure import measure_cell
from specdec.bench.provenance import device_name, git_revision, hardware, versions
from specdec.bench.store import SweepStore
from specdec.errors import ConfigError
from specdec.pretrained import load_model
from specdec.prompts import Prompt, digest, read_prompts, spread_over_categories
from specdec.types import Drafter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """What a process did.

    Attributes:
        measured: cells that were measured now.
        errors: cells that ended in an error now.
        known: cells of its share that had been done before.
        left_out: (policy, verifier, reason) of the grid's pairs that would not be lossless.
    """

    measured: int
    errors: int
    known: int
    left_out: list[tuple[str, str, str]]


def run_sweep(
    grid: Grid,
    folder: str | Path,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    device: torch.device | str = "cpu",
    command: Sequence[str] = (),
    retry_errors: bool = False,
    parquet: bool = False,
    progress: bool = True,
) -> Report:
    """Measures the cells of a grid that the folder does not have yet.

    A cell that raises is listed with its message, and the sweep goes on.

    Args:
        grid: what to measure.
        folder: see `specdec.bench.store`; of a sweep that several machines share, one that all see.
        process_index: of this process, from 0.
        num_processes: that share the grid and the folder.
        device: of the models.
        command: for the manifest.
        retry_errors: whether cells that ended in an error before run again.
        parquet: whether steps are written as Parquet instead of JSONL; needs pyarrow.
        progress: whether a bar shows the turns done and the time left.

    Raises:
        ConfigError: before any cell runs, for names that nothing has, prompts that cannot be read
            or have changed since the folder was begun, or a folder that cannot be used.
        OSError: if the folder cannot be written any more; finished cells stay.
    """
    if parquet and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("Parquet needs pyarrow: pip install pyarrow, or take the default, JSONL")
    check_names(grid)
    prompts = {name: read_prompts(name) for name in grid.prompts}
    digests = {name: digest(read) for name, read in prompts.items()}
    cells, left_out = span(grid, digests)
    if not cells:
        reasons = "; ".join(reason for _, _, reason in left_out)
        raise ConfigError(f"the grid has no cell, as none of its pairs go together: {reasons}")
    device = torch.device(device)
    environment = {
        **versions(),
        "git": git_revision(),
        "device": device_name(device),
        "process": process_index,
    }
    with SweepStore(folder, process_index) as store:
        _check_prompts(store, digests)
        known = store.finished(retry_errors=retry_errors)
        share = cells[process_index::num_processes]
        todo = [cell for cell in share if cell.key not in known]
        if process_index == 0:
            store.add_run(
                {
                    "begun": _now(),
                    "command": list(command),
                    "grid": grid.to_dict(),
                    "cells": len(cells),
                    "left_out": left_out,
                    "prompts": {
                        n: {"sha256": digests[n], "count": len(prompts[n])} for n in prompts
                    },
                    "processes": num_processes,
                    "versions": versions(),
                    "git": git_revision(),
                    "hardware": hardware(),
                }
            )
        chosen = {name: _chosen(read, grid) for name, read in prompts.items()}
        models = _Models(device)
        errors = 0
        turns = {name: sum(len(p.turns) for p in some) for name, some in chosen.items()}
        total = sum(turns[cell.prompts] for cell in todo)
        with tqdm(total=total, unit="turn", disable=not progress, desc="sweep") as bar:
            for number, cell in enumerate(todo, start=1):
                begin = bar.n
                bar.set_postfix_str(f"cell {number}/{len(todo)}, errors {errors}: {cell.label}")
                facts = {"environment": environment, "begun": _now()}
                try:
                    model, tokenizer = models.target(cell.model, cell.dtype)
                    drafter = models.drafter(cell.drafter, cell.dtype, tokenizer)
                    measured = measure_cell(
                        cell, model, tokenizer, drafter, chosen[cell.prompts], progress=bar.update
                    )
                # whatever breaks a cell, out of memory among it, must not cost the cells behind it
                except Exception as error:  # noqa: BLE001
                    errors += 1
                    message = f"{type(error).__name__}: {error}"
                    logger.warning("cell %s (%s) broke: %s", cell.key, cell.label, message)
                    store.append(_broken(cell, message) | facts)
                    bar.total += begin - bar.n  # its turns are neither done nor left
                    bar.update(0)
                    bar.total = max(bar.total, bar.n)
                    _free(device)
                else:
                    facts["timing"] = measured.row.pop("timing")
                    store.save(
                        measured.row | facts, measured.steps, measured.answers, parquet=parquet
                    )
    return Report(len(todo) - errors, errors, len(share) - len(todo), left_out)


def _broken(cell: SweepCell, message: str) -> dict[str, Any]:
    return {"cell": cell.key, "status": "error", **asdict(cell), "error": message}


def _chosen(prompts: list[Prompt], grid: Grid) -> list[Prompt]:
    if grid.limit is not None:
        prompts = spread_over_categories(prompts, grid.limit)
    if grid.max_turns is not None:
        prompts = [prompt.shortened(grid.max_turns) for prompt in prompts]
    return prompts


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _check_prompts(store: SweepStore, digests: dict[str, str]) -> None:
    for row in store.rows():
        name = row["prompts"]
        if digests.get(name, row["prompts_sha256"]) != row["prompts_sha256"]:
            raise ConfigError(
                f"prompt file {name} has changed since cells of {store.folder} were measured with "
                "it; choose another folder, or give the changed file another name"
            )


class _Models:
    """Loads models by name, and keeps those of the target at hand."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._name: tuple[str, str] | None = None
        self._target: tuple[Any, Any] | None = None
        self._drafts: dict[str, tuple[Any, Any]] = {}

    def target(self, name: str, dtype: str) -> tuple[Any, Any]:
        """Returns a model and its tokenizer."""
        if self._target is None or self._name != (name, dtype):
            self._target = None  # before the next one needs the memory
            self._drafts = {}
            _free(self._device)
            self._target = self._load(name, dtype)
            self._name = (name, dtype)
        return self._target

    def drafter(self, spec: str, dtype: str, tokenizer: Any) -> str | Drafter | None:
        """Returns what `SpeculativeGenerator` takes; an object is new and has learned nothing."""

        def load(name: str) -> tuple[Any, Any]:
            if name not in self._drafts:
                self._drafts[name] = self._load(name, dtype)
            return self._drafts[name]

        return make_drafter(spec, tokenizer, load)

    def _load(self, name: str, dtype: str) -> tuple[Any, Any]:
        return load_model(name, device=self._device, dtype=dtype)
