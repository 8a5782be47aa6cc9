"""The loop that fits a drafter: the same command gives the same losses, killed in between or not.

Nothing random is carried from step to step: an epoch's batches come from a generator of the seed
and the epoch's number, and each step begins with torch's own seeded by its number. So a state is
the weights, the optimizer's moments and the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from tqdm import tqdm

from specdec.errors import ConfigError, TrainingError
from specdec.training.corpus import OwnText
from specdec.training.run_folder import RunFolder

_BETAS = (0.9, 0.95)
_UNTIMED, _TIMED = 2, 6  # steps by which a time budget is turned into a number of steps
_SEED_STRIDE = 1_000_003  # between the seeds of two runs; no run has as many steps


class Recipe(Protocol):
    """What is trained, on what, towards what.

    Attributes:
        kind: the drafter's name.
        layers: of the target whose features the texts must hold; empty for none.
    """

    kind: str
    layers: tuple[int, ...]

    def module(self) -> torch.nn.Module:
        """Returns the trainable parameters, float32, on the device where they are trained.

        What belongs to the target is not registered in it.
        """
        ...

    def batches(self, texts: Sequence[OwnText], generator: torch.Generator) -> Iterator[Any]:
        """Yields the batches of one epoch, a function of the texts and the generator alone.

        A batch is a tensor, or a tuple, list or dict of them: the loop moves it to the device.
        """
        ...

    def num_batches(self, texts: Sequence[OwnText]) -> int:
        """Returns how many batches an epoch has."""
        ...

    def loss(self, batch: Any, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Returns the loss of a batch, and figures for the log.

        Args:
            batch: one of `batches`, on the module's device.
            progress: how much of the run is done, 0 to 1.
        """
        ...

    def save(self, folder: Path) -> None:
        """Writes the drafter as `specdec.drafters.checkpoint` does, with its settings."""
        ...


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How to train. Exactly one of `steps`, `epochs` and `minutes` says how long.

    Attributes:
        steps: of the optimizer.
        epochs: passes over the texts.
        minutes: of steps at the speed of the first ones, evaluations not counted. How many steps
            that is depends on the machine; the run keeps it.
        learning_rate: at its height; it rises linearly, then falls to zero by a cosine.
        warm_up: share of the steps in which it rises.
        weight_decay: of matrices; vectors have none.
        clip: largest norm of the gradient.
        seed: of every draw.
        save_every: steps between two saved states.
        evaluations: spread evenly over the run, the last one at its end; 0 for none.
        mixed_precision: "no" or "bf16", see accelerate.

    Raises:
        ConfigError: for values that make no sense.
    """

    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    learning_rate: float = 6e-4
    warm_up: float = 0.04
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    save_every: int = 100
    evaluations: int = 4
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        lengths = [value for value in (self.steps, self.epochs, self.minutes) if value is not None]
        if len(lengths) != 1 or not lengths[0] > 0:
            raise ConfigError(
                "exactly one of steps, epochs and minutes says how long to train, and is above 0; "
                f"got steps={self.steps}, epochs={self.epochs}, minutes={self.minutes}"
            )
        for name in ("learning_rate", "clip", "save_every"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.mixed_precision not in ("no", "bf16"):
            raise ConfigError(f"mixed_precision is 'no' or 'bf16', got {self.mixed_precision!r}")
        if not 0 <= self.warm_up < 1 or self.weight_decay < 0 or self.evaluations < 0:
            raise ConfigError(
                "warm_up must be 0 up to 1, weight_decay and evaluations not below 0; got "
                f"{self.warm_up}, {self.weight_decay}, {self.evaluations}"
            )


def train(
    recipe: Recipe,
    texts: Sequence[OwnText],
    folder: Path,
    settings: TrainSettings,
    *,
    about: Mapping[str, Any] | None = None,
    evaluate: Callable[[Path], Mapping[str, float]] | None = None,
    progress: bool = True,
) -> RunFolder:
    """Trains a drafter, or goes on with a run that was cut off.

    Args:
        recipe: what to train.
        texts: the target's own, with the features of `recipe.layers`.
        folder: gets the drafter, and the run's files in its folder ``run``.
        settings: how.
        about: what else the run depends on, as JSON; a run that is there must agree.
        evaluate: measures the drafter in a folder.
        progress: whether to show a bar.

    Returns:
        The run's files; `RunFolder.records` has the losses.

    Raises:
        ConfigError: if the folder holds another run, if the texts make no batch, or under a
            launcher of several processes.
        StateError: if the run's files are damaged.
        TrainingError: if the loss or its gradient is not finite.
    """
    module = recipe.module()
    device = next(module.parameters()).device
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=settings.mixed_precision)
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"a drafter is trained by one process, got {accelerator.num_processes}: start it "
            "without a launcher, or with --num_processes 1"
        )
    per_epoch = recipe.num_batches(texts)
    if per_epoch < 1:
        raise ConfigError(f"{len(texts)} texts make no batch for {recipe.kind}: write more text")
    forked = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(forked, device_type=device.type):
        fit = _Fit(recipe, module, settings, accelerator)
        run = RunFolder(folder / "run")
        steps = run.plan(
            {"kind": recipe.kind, "num_texts": len(texts), **asdict(settings), **(about or {})},
            lambda: _num_steps(settings, per_epoch, fit, texts),
        )
        fit.new_optimizer()
        start = run.load(fit.module, fit.optimizer)
        evaluated = {
            round(steps * (i + 1) / settings.evaluations) for i in range(settings.evaluations)
        }
        bar = tqdm(total=steps, initial=start, desc=recipe.kind, disable=not progress)
        batches = _batches(recipe, texts, settings.seed, start)
        for step, batch in enumerate(islice(batches, steps - start), start + 1):
            begin = time.perf_counter()
            record = fit.step(batch, step, steps)
            seconds = time.perf_counter() - begin
            run.log({"step": step, **record, "seconds": round(seconds, 4)})
            bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
            bar.update()
            if step in evaluated and evaluate is not None:
                recipe.save(folder)
                figures = evaluate(folder)
                run.log({"step": step, **figures})
                if progress:
                    told = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
                    bar.write(f"step {step}: {told}")
            if step % settings.save_every == 0 or step in evaluated or step == steps:
                run.save(step, fit.module, fit.optimizer)
        bar.close()
        recipe.save(folder)
    return run


class _Fit:
    """The module and its optimizer."""

    def __init__(
        self,
        recipe: Recipe,
        module: torch.nn.Module,
        settings: TrainSettings,
        accelerator: Accelerator,
    ) -> None:
        self.recipe = recipe
        self._settings = settings
        self._accelerator = accelerator
        self.module = module.train()
        self._trained = [p for p in self.module.parameters() if p.requires_grad]
        self.new_optimizer()

    def new_optimizer(self) -> None:
        """Forgets the moments."""
        groups = [
            {
                "params": [p for p in self._trained if p.ndim > 1],
                "weight_decay": self._settings.weight_decay,
            },
            {"params": [p for p in self._trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer: Any = self._accelerator.prepare_optimizer(
            torch.optim.AdamW(groups, self._settings.learning_rate, _BETAS)
        )

    def step(self, batch: Any, step: int, steps: int, learning_rate: float | None = None) -> Any:
        """Takes a step; returns loss and figures.

        Args:
            batch: one of the recipe's.
            step: its number, the first is 1.
            steps: of the run.
            learning_rate: in place of the schedule's.

        Raises:
            TrainingError: if the loss or its gradient is not finite; nothing was changed then.
        """
        torch.manual_seed(self._settings.seed * _SEED_STRIDE + step)
        rate = self._rate(step, steps) if learning_rate is None else learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = send_to_device(batch, self._trained[0].device)
        with self._accelerator.autocast():
            loss, figures = self.recipe.loss(batch, (step - 1) / steps)
        value = float(loss.detach())  # sync: a loss that is not finite must not reach the weights
        if not math.isfinite(value):
            raise self._broken("loss", value, step)
        self._accelerator.backward(loss)
        norm = float(self._accelerator.clip_grad_norm_(self._trained, self._settings.clip))
        if not math.isfinite(norm):
            raise self._broken("gradient's norm", norm, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": value, **figures, "gradient_norm": norm, "learning_rate": rate}

    def _rate(self, step: int, steps: int) -> float:
        """Returns the learning rate of a step: up linearly, down by a cosine."""
        rising = max(1, round(self._settings.warm_up * steps))
        if step <= rising:
            return self._settings.learning_rate * step / rising
        done = (step - rising) / (steps - rising + 1)
        return self._settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def _broken(self, what: str, value: float, step: int) -> TrainingError:
        return TrainingError(
            f"the {what} of step {step} is {value} in the training of {self.recipe.kind}: lower "
            "the learning rate, or look for such numbers in the texts' features; the state saved "
            "last is sound"
        )


def _num_steps(settings: TrainSettings, per_epoch: int, fit: _Fit, texts: Sequence[OwnText]) -> int:
    """Returns the steps of a new run."""
    if settings.steps is not None:
        return settings.steps
    if settings.epochs is not None:
        return max(1, round(settings.epochs * per_epoch))
    assert settings.minutes is not None
    begin = 0.0
    for count, batch in enumerate(
        islice(_batches(fit.recipe, texts, settings.seed, 0), _UNTIMED + _TIMED)
    ):
        if count == _UNTIMED:
            begin = time.perf_counter()
        fit.step(batch, 1, 1, learning_rate=0.0)  # the weights stay as they are
    seconds = (time.perf_counter() - begin) / _TIMED
    return max(1, int(settings.minutes * 60 / seconds))


def _batches(recipe: Recipe, texts: Sequence[OwnText], seed: int, start: int) -> Iterator[Any]:
    """Yields batches epoch after epoch, without the first `start`."""
    per_epoch = recipe.num_batches(texts)
    epoch, skipped = divmod(start, per_epoch)
    while True:
        generator = torch.Generator().manual_seed(seed * _SEED_STRIDE + epoch)
        count = 0
        for count, batch in enumerate(recipe.batches(texts, generator), 1):
            if count > skipped:
                yield batch
        assert count == per_epoch, f"{recipe.kind}: an epoch of {count} batches, not {per_epoch}"
        epoch, skipped = epoch + 1, 0
