"""A training run on disk: what it was asked for, its losses, and the state it goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.errors import ConfigError, StateError

_RUN = "run.json"
_LOSSES = "losses.jsonl"
_STATE = "state.safetensors"
_VERSION = 1


class RunFolder:
    """The files of one run; each is replaced as a whole, so that a kill at any time leaves a run.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    @property
    def losses(self) -> Path:
        """The log: one JSON object a line, with `step` and what was measured then."""
        return self.folder / _LOSSES

    def plan(self, facts: Mapping[str, Any], measure: Callable[[], int]) -> int:
        """Returns the number of steps of the run: the one it began with, or a new one.

        Args:
            facts: what the run is asked for; a run that is there must have been asked the same.
            measure: says how many steps a new run takes.

        Raises:
            ConfigError: if another run is there.
            StateError: if the file is damaged.
        """
        path = self.folder / _RUN
        asked = json.loads(json.dumps(facts))
        if path.exists():
            kept = _read_json(path)
            changed = sorted(
                name
                for name in {*asked, *kept["facts"]}
                if asked.get(name) != kept["facts"].get(name)
            )
            if changed:
                told = ", ".join(
                    f"{name} was {kept['facts'].get(name)!r} and is {asked.get(name)!r}"
                    for name in changed
                )
                raise ConfigError(
                    f"{self.folder} holds another run: {told}; repeat its command to go on with "
                    "it, or take another folder"
                )
            return int(kept["steps"])
        self.folder.mkdir(parents=True, exist_ok=True)
        steps = measure()
        record = {"version": _VERSION, "steps": steps, "facts": asked}
        _replace(path, lambda partial: partial.write_text(json.dumps(record, indent=2) + "\n"))
        return steps

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a line to the log."""
        with self.losses.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> Iterator[dict[str, Any]]:
        """Yields the lines of the log; one that a kill cut off is left out."""
        if not self.losses.exists():
            return
        for line in self.losses.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return

    def save(self, step: int, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Writes the weights and the optimizer's moments after a step."""
        tensors = {f"module.{name}": tensor for name, tensor in _trained(module).items()}
        for index, moments in optimizer.state_dict()["state"].items():
            for name, moment in moments.items():
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(moment)
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        _replace(
            self.folder / _STATE, lambda partial: save_file(tensors, partial, {"step": str(step)})
        )

    def load(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Brings module and optimizer to the last saved step, and the log back to it.

        Returns:
            The number of that step; 0 where nothing was saved yet.

        Raises:
            StateError: if the file is damaged or has other tensors.
        """
        path = self.folder / _STATE
        step, tensors = 0, {}
        if path.exists():
            try:
                with safe_open(path, framework="pt") as file:
                    step = int(file.metadata()["step"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                raise StateError(
                    f"{path} is damaged ({error}); delete it, and the run starts from its beginning"
                ) from error
            _restore(path, tensors, module, optimizer)
        kept = [record for record in self.records() if record["step"] <= step]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        _replace(self.losses, lambda partial: partial.write_text(lines, encoding="utf-8"))
        return step


def _trained(module: torch.nn.Module) -> dict[str, Tensor]:
    """Returns the parameters that are trained."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _restore(
    path: Path,
    tensors: Mapping[str, Tensor],
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    trained = _trained(module)
    weights = {
        name.removeprefix("module."): tensor
        for name, tensor in tensors.items()
        if name.startswith("module.")
    }
    expected = {name: tuple(p.shape) for name, p in trained.items()}
    if {name: tuple(t.shape) for name, t in weights.items()} != expected:
        raise StateError(
            f"{path} holds other tensors than this drafter has: {len(weights)}, not "
            f"{len(expected)}; take another folder"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, moment = name.split(".", 2)
            state.setdefault(int(index), {})[moment] = tensor
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Has a file written beside `path`, then puts it in its place."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.replace(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        if record["version"] != _VERSION:
            raise StateError(
                f"{path} is of version {record['version']!r}, this program reads {_VERSION}"
            )
        if not isinstance(record["facts"], dict) or int(record["steps"]) < 1:
            raise StateError(f"{path} is damaged: it names no run")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{path} is damaged ({error}); take another folder") from error
    return dict(record)
