"""Reads what a sweep wrote: the rows of its cells, and the steps behind each."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specdec.errors import ConfigError

logger = logging.getLogger(__name__)

SCHEMA = 2  # of rows and manifest; a reader of an older one would count wrongly
RESULTS, STEPS, ANSWERS, MANIFEST = "results.jsonl", "steps", "answers", "manifest.json"


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a sweep's folder, in the order in which the cells were done.

    A last line without an end is what a killed sweep leaves; it is not counted.

    Raises:
        ConfigError: if a line is damaged or of another schema.
    """
    path = Path(folder) / RESULTS
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    if rest:
        logger.warning("%s ends within a line: that cell counts as not done", path)
    rows = [_row(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    for row in rows:
        check_schema(row, path)
        if "cell" not in row or row.get("status") not in ("ok", "error"):
            raise ConfigError(f"{path} has a row without `cell` or `status`; choose another folder")
    return rows


def read_steps(folder: str | Path, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the step rows of a cell that was done.

    Args:
        folder: of the sweep.
        row: of `read_results`.

    Raises:
        ConfigError: if the cell ended in an error, or if its file is missing or damaged.
    """
    if row["status"] != "ok":
        raise ConfigError(f"cell {row['cell']} has no steps, it ended in an error: {row['error']}")
    path = Path(folder) / row["steps"]
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(path).to_pylist()
            return
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _row(line, f"{path}:{number}")
    except OSError as error:
        raise ConfigError(f"the steps {path} cannot be read: {error.strerror}") from error


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(
            f"{where}: not a JSON object ({error}); the file was left as it is: remove the line, "
            "and the cell runs again"
        ) from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: not a JSON object but {type(row).__name__}")
    return row


def check_schema(record: dict[str, Any], path: Path) -> None:
    """Raises ConfigError if a row or a manifest was written under another schema."""
    if record.get("schema") != SCHEMA:
        raise ConfigError(
            f"{path} has schema {record.get('schema')!r}, this version writes {SCHEMA}: their "
            "numbers do not mix; choose another folder (nothing was changed)"
        )
