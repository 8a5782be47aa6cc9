"""Weights of trained drafters: what is read back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from specdec.backend.fingerprint import fingerprint
from specdec.drafters.checkpoint import load_checkpoint, save_checkpoint, shipped
from specdec.errors import ConfigError, StateError
from tests.tiny import make_model

TENSORS = {"a": torch.arange(6.0).view(2, 3)}


def saved(folder: Path, seed: int = 0) -> Path:
    save_checkpoint(folder, "student", make_model(seed=seed), TENSORS, {"layers": [0]})
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved(tmp_path / "s"), "student", make_model())
    torch.testing.assert_close(checkpoint.tensors, TENSORS)
    assert checkpoint.config["layers"] == [0]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="'student', not 'diffusion'"):
        load_checkpoint(saved(tmp_path), "diffusion", make_model())


@pytest.mark.parametrize("other", [{"seed": 1}, {"family": "qwen2"}, {"num_hidden_layers": 3}])
def test_of_another_target(tmp_path: Path, other: dict[str, object]) -> None:
    with pytest.raises(StateError, match="train one for it"):
        load_checkpoint(saved(tmp_path), "student", make_model(**other))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_copy_in_another_dtype_is_the_same_target(dtype: torch.dtype) -> None:
    assert fingerprint(make_model().to(dtype)) == fingerprint(make_model())


def test_damaged(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(StateError, match="damaged"):
        load_checkpoint(folder, "student", make_model())
    weights.unlink()
    with pytest.raises(StateError, match="missing"):
        load_checkpoint(folder, "student", make_model())
    (folder / "config.json").write_text("{")
    with pytest.raises(StateError, match="damaged"):
        load_checkpoint(folder, "student", make_model())
    (folder / "config.json").write_text(json.dumps([1]))
    with pytest.raises(StateError, match="JSON object"):
        load_checkpoint(folder, "student", make_model())
    (folder / "config.json").unlink()
    with pytest.raises(StateError, match="no trained drafter"):
        load_checkpoint(folder, "student", make_model())


def test_of_another_version(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"version": 99}))
    with pytest.raises(StateError, match="version 99"):
        load_checkpoint(folder, "student", make_model())


def test_none_comes_with_the_toolkit() -> None:
    with pytest.raises(ConfigError, match=r"scripts/train_drafter\.py student"):
        shipped("student", make_model())
