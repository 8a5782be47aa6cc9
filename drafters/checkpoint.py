"""Weights of trained drafters: a folder with `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.backend.fingerprint import fingerprint
from specdec.errors import ConfigError, StateError

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_VERSION = 1


class Checkpoint(NamedTuple):
    """What a folder of weights holds.

    Attributes:
        tensors: by name, on the CPU, in the dtype they were written in.
        config: the drafter's own settings, and its recipe.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def save_checkpoint(
    folder: str | os.PathLike[str],
    kind: str,
    target: Any,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> None:
    """Writes the weights of a drafter; each of the two files appears only when it is whole.

    Args:
        folder: made if it is not there.
        kind: the drafter's name.
        target: the model it was trained for; its fingerprint is kept.
        tensors: what was trained. What belongs to the target is not among them.
        config: settings and recipe, as JSON holds them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header = {"specdec_drafter": kind, "version": _VERSION, "target": fingerprint(target)}
    weights, settings = folder / f".{os.getpid()}.weights", folder / f".{os.getpid()}.config"
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, weights)
        settings.write_text(json.dumps({**header, **config}, indent=2) + "\n")
        weights.replace(folder / _WEIGHTS)
        settings.replace(folder / _CONFIG)
    finally:
        weights.unlink(missing_ok=True)
        settings.unlink(missing_ok=True)


def load_checkpoint(folder: str | os.PathLike[str], kind: str, target: Any) -> Checkpoint:
    """Returns the weights that `save_checkpoint` wrote.

    Args:
        folder: where they are.
        kind: the drafter's name.
        target: the model it is to draft for.

    Raises:
        StateError: if the folder is incomplete or damaged, if it holds another kind of drafter, or
            if it was trained for another model.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if config.get("specdec_drafter") != kind:
        raise StateError(
            f"{folder} holds a drafter of kind {config.get('specdec_drafter')!r}, not {kind!r}"
        )
    if config.get("version") != _VERSION:
        raise StateError(
            f"{folder} has version {config.get('version')!r}, this program reads {_VERSION}"
        )
    own = fingerprint(target)
    if config.get("target") != own:
        raise StateError(
            f"{folder} was trained for the model with fingerprint {config.get('target')}, this "
            f"{type(target).__name__} has {own}; train one for it: scripts/train_drafter.py {kind}"
        )
    return Checkpoint(read_weights(folder / _WEIGHTS), config)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file. Raises StateError if it is missing or damaged."""
    if not Path(path).exists():
        raise StateError(f"{path} is missing")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise StateError(f"{path} is damaged or no safetensors file ({error})") from error


def find_shipped(kind: str, target: Any) -> Path | None:
    """Returns the folder of the weights that come with the toolkit for a model; None without any.

    Args:
        kind: the drafter's name.
        target: the model it is to draft for; one whose embedding is offloaded is not recognised.
    """
    if target.get_input_embeddings().weight.device.type == "meta":
        return None
    own = fingerprint(target)
    assets = Path(str(files("specdec.assets")))
    for path in sorted(assets.glob(f"*/{_CONFIG}")):
        config = _read_config(path.parent)
        if config.get("specdec_drafter") == kind and config.get("target") == own:
            return path.parent
    return None


def shipped(kind: str, target: Any) -> Path:
    """Returns the folder of the weights that come with the toolkit for a model.

    Args:
        kind: the drafter's name.
        target: the model it is to draft for.

    Raises:
        ConfigError: if there are none; the message says how to train them.
    """
    folder = find_shipped(kind, target)
    if folder is None:
        raise ConfigError(
            f"no trained {kind} drafter comes with the toolkit for this {type(target).__name__}; "
            f"train one with scripts/train_drafter.py {kind}, and pass its folder as weights=..."
        )
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise StateError(f"{path} is missing: {folder} is no trained drafter") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StateError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise StateError(f"{path} should hold a JSON object, got {type(config).__name__}")
    return config
