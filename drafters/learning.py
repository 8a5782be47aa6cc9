"""What drafters that learn have in common: tables that can be saved, and loaded by a later run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from specdec.drafters.base import BaseDrafter
from specdec.errors import ConfigError, StateError

_HEADER = "specdec_drafter"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class LearnedState:
    """What a drafter has learned.

    Attributes:
        arrays: tables, by name.
        facts: whatever JSON holds; vocabulary and shape options belong here, so that `restore`
            can tell a file that does not fit.
    """

    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def array(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        """Returns a table, writable. Raises StateError if it is missing or of another form.

        Args:
            name: of the table.
            shape: what is expected; -1 stands for any length.
            dtype: what is expected.
        """
        if name not in self.arrays:
            raise StateError(f"table {name!r} is missing; there are {sorted(self.arrays)}")
        table = self.arrays[name]
        fits = len(table.shape) == len(shape) and all(
            expected in (-1, length) for expected, length in zip(shape, table.shape, strict=True)
        )
        if not fits or table.dtype != np.dtype(dtype):
            raise StateError(
                f"table {name!r} should be {np.dtype(dtype)} of shape {shape} (-1: any), got "
                f"{table.dtype} of shape {table.shape}"
            )
        return np.array(table)

    def fact(self, name: str, expected: type) -> Any:
        """Returns a fact. Raises StateError if it is missing or of another type."""
        if not isinstance(self.facts.get(name), expected):
            raise StateError(
                f"fact {name!r} should be {expected.__name__}, got {self.facts.get(name)!r}"
            )
        return self.facts[name]

    def part(self, name: str) -> LearnedState:
        """Returns the state that was put in under a name by `joined`."""
        prefix = f"{name}/"
        return LearnedState(
            {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)},
            self.fact(name, dict),
        )

    @staticmethod
    def joined(parts: Mapping[str, LearnedState]) -> LearnedState:
        """Returns one state that holds several."""
        return LearnedState(
            {f"{name}/{k}": v for name, part in parts.items() for k, v in part.arrays.items()},
            {name: dict(part.facts) for name, part in parts.items()},
        )


class LearningDrafter(BaseDrafter):
    """A drafter whose tables outlive a call; subclasses give `state` and `restore`.

    Rows of a batch, and calls, share the tables. That changes which guesses are made, never the
    text: every guess is checked by the target.
    """

    def state(self) -> LearnedState:
        """Returns what was learned."""
        raise NotImplementedError

    def restore(self, state: LearnedState) -> None:
        """Takes over what was learned elsewhere, and forgets its own.

        Raises:
            StateError: if it does not fit this drafter, which is then left as it was.
        """
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what was learned to one safetensors file; an older file stays until it is done."""
        path = Path(path)
        state = self.state()
        header = {"version": _VERSION, "drafter": self.name, "facts": dict(state.facts)}
        arrays = {name: np.ascontiguousarray(table) for name, table in state.arrays.items()}
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            save_file(arrays, partial, metadata={_HEADER: json.dumps(header)})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes over what `save` wrote.

        Raises:
            StateError: if the file is damaged, of another drafter, or does not fit; the drafter
                is then left as it was.
            FileNotFoundError: if there is no such file.
        """
        arrays, header = _read(Path(path))
        if header.get("version") != _VERSION:
            raise StateError(
                f"{path} has version {header.get('version')!r}, this program reads {_VERSION}"
            )
        if header.get("drafter") != self.name:
            raise StateError(
                f"{path} was written by drafter {header.get('drafter')!r}, this is {self.name!r}"
            )
        if not isinstance(header.get("facts"), dict):
            raise StateError(f"{path} has no facts beside its tables")
        try:
            self.restore(LearnedState(arrays, header["facts"]))
        except ConfigError as error:
            raise StateError(f"{path} does not fit: {error}") from error


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(f"there is no drafter state at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StateError(
            f"{path} is damaged or no safetensors file ({error}); save the drafter's state again"
        ) from error
    if not isinstance(header, dict):
        raise StateError(f"{path} is a safetensors file, but no drafter's state")
    return arrays, header
