"""Points for a scaling law: columns of a CSV file, or of a sweep's cells."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specdec.bench.results import read_results
from specdec.bench.scaling import Points
from specdec.errors import ConfigError


def read_points(
    path: str | Path,
    x_names: Sequence[str],
    y_name: str,
    where: Mapping[str, str] | None = None,
) -> Points:
    """Returns the points of a CSV file with a heading, or of the folder of a sweep.

    Args:
        path: file or folder.
        x_names: columns whose logarithms count.
        y_name: column of what was measured.
        where: columns with the values, as texts, that a row must have; others are left out.

    Raises:
        ConfigError: if it cannot be read, a column is not there or has no number in it, or the
            points do not serve, see `Points`.
    """
    path = Path(path)
    rows = _cells(path) if path.is_dir() else _csv(path)
    wanted = where or {}
    names = (*x_names, y_name)
    _check_names(rows, [*names, *wanted], path)
    some = [row for row in rows if all(str(row[k]) == v for k, v in wanted.items())]
    if not some:
        conditions = ", ".join(f"{k}={v}" for k, v in wanted.items())
        raise ConfigError(f"{path} has no row with {conditions or 'numbers'}")
    table = np.array([[_number(row[name], name, path) for name in names] for row in some])
    return Points(tuple(x_names), y_name, table[:, :-1], table[:, -1])


def _cells(folder: Path) -> list[dict[str, Any]]:
    rows = [row for row in read_results(folder) if row["status"] == "ok"]
    # speeds stand within `timing`
    return [row | {k: v for k, v in row["timing"].items() if k != "seconds"} for row in rows]


def _csv(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file, strict=True))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no CSV file: {error}") from error
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ConfigError(f"{path}:{number}: another number of columns than the heading has")
    return rows


def _check_names(rows: Sequence[Mapping[str, Any]], names: Sequence[str], path: Path) -> None:
    if not rows:
        raise ConfigError(f"{path} has no rows")
    missing = [name for name in names if name not in rows[0]]
    if missing:
        raise ConfigError(
            f"{path} has no column {', '.join(map(repr, missing))}; it has: {', '.join(rows[0])}"
        )


def _number(value: Any, name: str, path: Path) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{path}: {name} must be a number in every row, got {value!r}")
    return number
