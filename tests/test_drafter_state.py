"""What a drafter learned, saved and loaded; files that are damaged, foreign or do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file

from specdec import SpeculativeGenerator
from specdec.drafters import Hybrid, Suffix, TokenRecycling, Trigram
from specdec.drafters.learning import LearnedState, LearningDrafter
from specdec.errors import StateError
from specdec.types import TargetInfo

pytestmark = pytest.mark.usefixtures("each_way")

# how to make each learning drafter; what it learns must survive a file
LEARNERS = {
    "hybrid": lambda: Hybrid([Suffix(), Trigram(num_pairs=4096)]),
    "suffix": Suffix,
    "token_recycling": TokenRecycling,
    "trigram": lambda: Trigram(num_pairs=4096),
}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny.make_model("llama")


def taught(name: str, model: torch.nn.Module) -> LearningDrafter:
    drafter = LEARNERS[name]()
    generator = SpeculativeGenerator(model, drafter=drafter, node_budget=6)
    generator.generate(tiny.ids(tiny.prompt(20)), max_new_tokens=24, do_sample=False)
    return drafter


def tree_sizes(model: torch.nn.Module, drafter: LearningDrafter) -> tuple[list[int], list[int]]:
    generator = SpeculativeGenerator(model, drafter=drafter, node_budget=6)
    output = generator.generate(tiny.ids(tiny.prompt(20)), max_new_tokens=24, do_sample=False)
    return output.tolist(), generator.stats.rows[0].acceptance_histogram


@pytest.mark.parametrize("name", LEARNERS)
def test_a_loaded_drafter_goes_on_where_the_saved_one_stood(
    name: str, model: torch.nn.Module, tmp_path: Path
) -> None:
    drafter = taught(name, model)
    drafter.save(tmp_path / "state.safetensors")
    fresh = LEARNERS[name]()
    fresh.load(tmp_path / "state.safetensors")
    assert tree_sizes(model, fresh) == tree_sizes(model, drafter)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "foreign", "version", "drafter"])
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(
    name: str, damage: str, model: torch.nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "state.safetensors"
    drafter = taught(name, model)
    drafter.save(path)
    arrays = load_file(path)
    header = {"version": 1, "drafter": name, "facts": {}}
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "noise":
        path.write_bytes(bytes(range(256)) * 8)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        save_file(arrays, path)
    elif damage == "version":
        save_file(arrays, path, {"specdec_drafter": json.dumps(header | {"version": 99})})
    else:
        save_file(arrays, path, {"specdec_drafter": json.dumps(header | {"drafter": "other"})})
    before = drafter.state()
    with pytest.raises(StateError, match=r"state\.safetensors"):
        drafter.load(path)
    after = drafter.state()
    assert before.facts == after.facts
    assert all(np.array_equal(table, after.arrays[key]) for key, table in before.arrays.items())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        TokenRecycling().load(tmp_path / "nothing.safetensors")


def test_an_old_file_survives_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.safetensors"
    drafter = TokenRecycling()
    drafter.attach(TargetInfo(vocab_size=16))
    drafter.save(path)
    before = path.read_bytes()

    def full_disk(*arguments: object, **options: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("specdec.drafters.learning.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        drafter.save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"successors": np.full((16, 8), 16, np.int32)}, "not in its vocabulary"),
        ({"successors": np.full((16, 4), 1, np.int32)}, "shape"),
        ({"successors": np.full((16, 8), 1.0, np.float32)}, "int32"),
        ({"log_shares": np.zeros((15, 8), np.float16)}, "log_shares"),
        ({"hits": np.zeros((8, 10))}, "positive"),
        ({"trials": None}, "missing"),
    ],
)
def test_tables_of_another_form_are_refused(
    change: dict[str, np.ndarray | None], message: str
) -> None:
    drafter = TokenRecycling()
    drafter.attach(TargetInfo(vocab_size=16))
    arrays = {**drafter.state().arrays, **change}
    with pytest.raises(StateError, match=message):
        drafter.restore(LearnedState({k: v for k, v in arrays.items() if v is not None}))
