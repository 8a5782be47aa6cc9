"""The trained drafters that come with the toolkit: small, whole, and each with its card."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
from safetensors import safe_open

ASSETS = Path(str(files("specdec.assets")))
FOLDERS = sorted(path.parent for path in ASSETS.glob("*/config.json"))
KINDS = {"diffusion", "lexical_unit", "student", "trigram"}
MOST_BYTES = 40 * 10**6


def test_every_kind_ships_once() -> None:
    kinds = [json.loads((f / "config.json").read_text())["specdec_drafter"] for f in FOLDERS]
    assert sorted(kinds) == sorted(KINDS)
    assert len(FOLDERS) == sum(
        path.is_dir() and path.name != "__pycache__" for path in ASSETS.iterdir()
    )


def test_they_are_small() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < MOST_BYTES


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_weights_and_card(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert list(weights.keys())
    card = (folder / "README.md").read_text(encoding="utf-8")
    for word in ("SmolLM2-135M-Instruct", "apache-2.0", "python -m specdec train", "2026-"):
        assert word in card
    assert "/tmp" not in card
    assert str(Path.home()) not in card
