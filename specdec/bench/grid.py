"""The grid of a sweep: its axes, read from YAML or a command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from specdec.bench.drafters import NO_DRAFTER
from specdec.errors import ConfigError
from specdec.pretrained import DEMO

_LARGEST_SEED = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Grid:
    """The axes of a sweep; a cell for each combination that makes sense.

    Attributes:
        prompts: prompt files or ``datasets:`` names, see `specdec.prompts.read_prompts`.
        models: names or paths of targets, "demo" for the demo model.
        drafters: "none" for plain decoding, or as `specdec.bench.drafters.check_drafter` says.
        policies: names, "auto", and "chain (drawn)" and "static (drawn)".
        verifiers: names or "auto".
        temperatures: 0 is greedy.
        node_budgets: draft nodes a tree, or "auto" (which follows the clock: no two runs agree).
        max_depths: the deepest level of a tree, None for no bound.
        batch_sizes: prompts a call.
        seeds: 0 to 2**31 - 1.
        limit: prompts of each file, spread over its categories; None for all.
        max_turns: turns of each conversation, the first ones; None for all.
        max_new_tokens: tokens a turn.
        top_p: nucleus of the temperatures above 0.
        dtype: of the weights: "auto", "float32", "bfloat16", "float16".
        packed_weights: "none", "auto", "blocks", "onednn", "mkl" or "fp16".

    Raises:
        ConfigError: for a value that cannot be one of its axis; the message says what can.
    """

    prompts: tuple[str, ...]
    models: tuple[str, ...] = (DEMO,)
    drafters: tuple[str, ...] = ("token_recycling",)
    policies: tuple[str, ...] = ("auto",)
    verifiers: tuple[str, ...] = ("auto",)
    temperatures: tuple[float, ...] = (0.0,)
    node_budgets: tuple[int | str, ...] = (32,)
    max_depths: tuple[int | None, ...] = (None,)
    batch_sizes: tuple[int, ...] = (1,)
    seeds: tuple[int, ...] = (0,)
    limit: int | None = None
    max_turns: int | None = None
    max_new_tokens: int = 128
    top_p: float = 1.0
    dtype: str = "auto"
    packed_weights: str = "none"

    def __post_init__(self) -> None:
        for name, (is_valid, expected) in _VALUES.items():
            value = getattr(self, name)
            axis = isinstance(value, tuple)
            if axis and not value:
                raise ConfigError(f"{name} is empty: give at least one {expected}, or leave it out")
            for one in value if axis else (value,):
                if not is_valid(one):
                    raise ConfigError(f"{name}: expected {expected}, got {one!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "grid") -> Grid:
        """Returns the grid of names and values; a single value counts as a list of one.

        Raises:
            ConfigError: for an unknown name, a missing prompt file or a value that cannot be.
        """
        known = [f.name for f in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(
                f"{where}: unknown {', '.join(map(repr, unknown))}; known are: {', '.join(known)}"
            )
        if "prompts" not in values:
            raise ConfigError(f"{where}: no prompts; name at least one prompt file")
        try:
            return cls(**{name: _value(name, value) for name, value in values.items()})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers, strings and lists, ready for JSON or YAML."""
        return {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self).items()}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in names, f"one of {', '.join(names)}"


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompts": (_is_name, "the name of a prompt file"),
    "models": (_is_name, "the name or path of a model"),
    "drafters": (_is_name, "the name of a drafter"),
    "policies": (_is_name, "the name of a policy"),
    "verifiers": (_is_name, "the name of a verifier"),
    "temperatures": (lambda v: _is_number(v) and v >= 0, "a number of at least 0"),
    "node_budgets": (lambda v: v == "auto" or _is_count(v), "a positive whole number or 'auto'"),
    "max_depths": (lambda v: v is None or _is_count(v), "a positive whole number or null"),
    "batch_sizes": (_is_count, "a positive whole number"),
    "seeds": (
        lambda v: v == 0 or (_is_count(v) and v <= _LARGEST_SEED),
        f"a whole number from 0 to {_LARGEST_SEED}",
    ),
    "limit": (lambda v: v is None or _is_count(v), "a positive whole number or null"),
    "max_turns": (lambda v: v is None or _is_count(v), "a positive whole number or null"),
    "max_new_tokens": (_is_count, "a positive whole number"),
    "top_p": (lambda v: _is_number(v) and 0 < v <= 1, "a number above 0 and up to 1"),
    "dtype": _one_of("auto", "float32", "bfloat16", "float16"),
    "packed_weights": _one_of("none", "auto", "blocks", "onednn", "mkl", "fp16"),
}
SCALARS = ("limit", "max_turns", "max_new_tokens", "top_p", "dtype", "packed_weights")


def _value(name: str, value: Any) -> Any:
    if name in SCALARS:
        return value
    several = value if isinstance(value, list | tuple) else [value]
    if name == "drafters":  # YAML's null, and Python's None, mean plain decoding here
        several = [NO_DRAFTER if one is None else one for one in several]
    if name == "temperatures":
        several = [float(one) if _is_number(one) else one for one in several]
    return tuple(several)


def read_grid(path: str | Path) -> dict[str, Any]:
    """Returns the names and values of a YAML file, for `Grid.from_mapping`.

    Raises:
        ConfigError: if the file is missing, not YAML, or not a mapping; the message has the place.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"grid file {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"grid file {path} is not YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"grid file {path}: expected names with values, such as `temperatures: [0, 1]`, got "
            f"{'nothing' if values is None else type(values).__name__}"
        )
    return values
