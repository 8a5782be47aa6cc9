"""The training loop: the same losses each time, after a kill too, and errors that help."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.errors import ConfigError, StateError, TrainingError
from specdec.training.corpus import OwnText
from specdec.training.trainer import TrainSettings, train

NUM_TEXTS = 7
STEPS = 17  # into the third epoch, and no multiple of what is saved


def texts(count: int = NUM_TEXTS) -> list[OwnText]:
    generator = torch.Generator().manual_seed(3)
    return [
        OwnText(
            torch.randint(0, 9, (6,), generator=generator),
            2,
            True,
            torch.randn(6, 4, generator=generator).half(),
            torch.full((6, 1), -1),
            torch.zeros(6, 1),
        )
        for _ in range(count)
    ]


class KilledError(Exception):
    """Stands for a kill."""


class Line:
    """A linear map with dropout, so that a loss depends on torch's generator."""

    kind = "line"
    layers = (0,)

    def __init__(self, killed_at: float = 2.0, broken_at: float = 2.0, poison: str = "") -> None:
        torch.manual_seed(5)
        self._module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.5))
        self._killed_at, self._broken_at, self._poison = killed_at, broken_at, poison
        self.seen: list[float] = []

    def module(self) -> torch.nn.Module:
        return self._module

    def num_batches(self, texts: Sequence[OwnText]) -> int:
        return len(texts)

    def batches(self, texts: Sequence[OwnText], generator: torch.Generator) -> Iterator[Any]:
        for index in torch.randperm(len(texts), generator=generator).tolist():
            yield {"features": texts[index].features.float(), "index": torch.tensor(index)}

    def loss(self, batch: Any, progress: float) -> tuple[Tensor, dict[str, float]]:
        self.seen.append(progress)
        if progress >= self._killed_at:
            raise KilledError
        loss = (self._module(batch["features"]) - 1).square().mean()
        if progress >= self._broken_at:
            loss = loss * torch.nan if self._poison == "loss" else (loss - loss.detach()).sqrt()
        return loss, {"index": float(batch["index"])}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        weights = [p.tolist() for p in self._module.parameters()]
        (folder / "line.json").write_text(json.dumps(weights))


def losses(folder: Path, recipe: Line, given: dict[str, Any] | None = None) -> list[Any]:
    """Trains and returns the log without what follows the clock."""
    settings = TrainSettings(**{"steps": STEPS, "save_every": 4, "evaluations": 3} | (given or {}))
    run = train(recipe, texts(), folder, settings, progress=False, evaluate=measured)
    return [{k: v for k, v in r.items() if k != "seconds"} for r in run.records()]


def measured(folder: Path) -> dict[str, float]:
    """Returns a figure that tells the weights apart, and disturbs torch's generator."""
    torch.rand(3)
    return {"first": json.loads((folder / "line.json").read_text())[0][0][0]}


def test_the_same_command_twice_gives_the_same_losses(tmp_path: Path) -> None:
    first = losses(tmp_path / "a", Line())
    assert losses(tmp_path / "b", Line()) == first
    assert [r["step"] for r in first if "loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in first if "first" in r] == [6, 11, 17]
    other = losses(tmp_path / "c", Line(), {"seed": 1})
    assert [r["loss"] for r in other if "loss" in r] != [r["loss"] for r in first if "loss" in r]


def test_it_learns(tmp_path: Path) -> None:
    steps = {"steps": 20 * NUM_TEXTS, "learning_rate": 0.05}
    values = [r["loss"] for r in losses(tmp_path, Line(), steps) if "loss" in r]
    assert sum(values[-NUM_TEXTS:]) < 0.8 * sum(values[:NUM_TEXTS])


@pytest.mark.parametrize("killed_at", [1, 4, 5, 6, 11, 16])
def test_a_run_that_was_cut_off_gives_the_losses_of_one_that_was_not(
    tmp_path: Path, killed_at: int
) -> None:
    whole = losses(tmp_path / "whole", Line())
    with pytest.raises(KilledError):
        losses(tmp_path / "cut", Line(killed_at / STEPS))
    # a kill may also cut off the line that is being written
    log = tmp_path / "cut" / "run" / "losses.jsonl"
    log.write_text(log.read_text() + '{"step": 99, "lo')
    recipe = Line()
    assert losses(tmp_path / "cut", recipe) == whole
    saved = max([s for s in (4, 6, 8, 11, 12, 16) if s <= killed_at], default=0)
    assert len(recipe.seen) == STEPS - saved  # it went on, and did not begin anew
    names = ("line.json", "run/run.json", "run/state.safetensors")
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    first = losses(tmp_path, Line())
    recipe = Line()
    assert losses(tmp_path, recipe) == first
    assert recipe.seen == []


def test_epochs_and_minutes_say_how_many_steps(tmp_path: Path) -> None:
    by_epochs = losses(tmp_path / "e", Line(), {"steps": None, "epochs": 1.5})
    assert max(r["step"] for r in by_epochs) == round(1.5 * NUM_TEXTS)
    given = {"steps": None, "minutes": 0.001, "evaluations": 0}
    with pytest.raises(KilledError):  # the measurement's own progress is 0
        losses(tmp_path / "m", Line(killed_at=1e-9), given)
    steps = json.loads((tmp_path / "m" / "run" / "run.json").read_text())["steps"]
    timed = losses(tmp_path / "m", Line(), given)
    assert max(r["step"] for r in timed) == steps
    # what the measurement did left no trace
    exact = losses(tmp_path / "x", Line(), {"steps": steps, "evaluations": 0})
    assert timed == exact


def test_the_learning_rate_rises_and_falls(tmp_path: Path) -> None:
    given = {"learning_rate": 0.1, "warm_up": 0.25}
    rates = [r["learning_rate"] for r in losses(tmp_path, Line(), given) if "loss" in r]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.1)
    assert top == 3
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True)
    assert 0 < rates[-1] < 0.002


@pytest.mark.parametrize(("poison", "what"), [("loss", "loss"), ("gradient", "gradient's norm")])
def test_a_loss_that_is_no_number_names_its_step(tmp_path: Path, poison: str, what: str) -> None:
    """The gradient of sqrt at 0 is infinite, while the loss is 0."""
    with pytest.raises(TrainingError, match=rf"the {what} of step 7 is (nan|inf).*line.*lower"):
        losses(tmp_path, Line(broken_at=6 / STEPS, poison=poison))
    # the run goes on from the last sound state
    assert losses(tmp_path, Line()) == losses(tmp_path / "whole", Line())


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    losses(tmp_path, Line())
    with pytest.raises(ConfigError, match=r"another run: learning_rate was 0\.0006 and is 0\.1"):
        losses(tmp_path, Line(), {"learning_rate": 0.1})
    with pytest.raises(ConfigError, match=r"num_texts was 7 and is 3"):
        train(Line(), texts(3), tmp_path, TrainSettings(steps=STEPS, save_every=4, evaluations=3))


def test_damaged_files_of_a_run(tmp_path: Path) -> None:
    losses(tmp_path, Line())
    state = tmp_path / "run" / "state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:60])
    with pytest.raises(StateError, match=r"state\.safetensors is damaged.*delete it"):
        losses(tmp_path, Line())
    state.write_bytes(whole)
    wider = Line()
    wider._module = torch.nn.Linear(4, 5)
    with pytest.raises(StateError, match="other tensors"):
        losses(tmp_path, wider)
    (tmp_path / "run" / "run.json").write_text('{"version": 1, "facts": 3')
    with pytest.raises(StateError, match=r"run\.json is damaged"):
        losses(tmp_path, Line())


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"steps": 3, "epochs": 1.0},
        {"steps": 0},
        {"minutes": -1.0},
        {"steps": 3, "learning_rate": 0.0},
        {"steps": 3, "warm_up": 1.0},
        {"steps": 3, "mixed_precision": "fp8"},
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="got"):
        TrainSettings(**given)


def test_no_text_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 texts make no batch for line"):
        train(Line(), [], tmp_path, TrainSettings(steps=1), progress=False)


def test_the_callers_generator_is_left_alone(tmp_path: Path) -> None:
    recipe = Line()
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    train(recipe, texts(), tmp_path, TrainSettings(steps=3), progress=False)
    assert torch.equal(torch.rand(2), expected)
