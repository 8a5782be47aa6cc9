"""The student's recipe: divergences from the target's own laws, on the answers it wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from specdec.backend.features import decoder_layers
from specdec.drafters.checkpoint import save_checkpoint
from specdec.drafters.student import VOCABULARY, student_model
from specdec.errors import ConfigError
from specdec.training.corpus import OwnText
from specdec.training.divergence import FORWARD_KL, OBJECTIVES, divergence
from specdec.training.vocabulary import most_written

_POOL = 16  # batches whose texts are sorted by length together
_FORWARD_SHARE = 0.1  # of the run: the other objectives are flat far from the target


@dataclass(frozen=True, slots=True)
class StudentSettings:
    """What a student is made of, and what it is taught by.

    Attributes:
        layers: of the target to begin with, 0 the first; None for the first two and the last.
        objective: forward_kl, reverse_kl or total_variation.
        vocab_size: tokens it can guess, those that the target writes most; 0 for all of them.
        texts_per_batch: texts of a step.

    Raises:
        ConfigError: for values that make no sense.
    """

    layers: tuple[int, ...] | None = None
    objective: str = FORWARD_KL
    vocab_size: int = 8192
    texts_per_batch: int = 8

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(
                f"objective is one of {', '.join(OBJECTIVES)}, got {self.objective!r}"
            )
        if self.texts_per_batch < 1 or self.vocab_size < 0:
            raise ConfigError(
                "texts_per_batch must be at least 1 and vocab_size at least 0, got "
                f"{self.texts_per_batch} and {self.vocab_size}"
            )


def make(model: Any, texts: Sequence[OwnText], /, **settings: Any) -> StudentRecipe:
    """Returns the recipe that the settings ask for.

    Args:
        model: the target. Effects: its weights no longer take gradients.
        texts: its own; what it wrote most is the student's vocabulary.
        settings: those of `StudentSettings`.

    Raises:
        ConfigError: for settings that make no sense, or layers that the target does not have.
    """
    chosen = StudentSettings(**settings)
    count = len(decoder_layers(model))
    layers = chosen.layers or sorted({0, min(1, count - 1), count - 1})
    if any(not 0 <= layer < count for layer in layers):
        raise ConfigError(f"layers must be 0 to {count - 1}, the target's, got {list(layers)}")
    size = model.get_output_embeddings().weight.shape[0]
    reduced = 0 < chosen.vocab_size < size
    return StudentRecipe(
        model,
        layers,
        most_written(texts, size, chosen.vocab_size) if reduced else None,
        objective=chosen.objective,
        batch_size=chosen.texts_per_batch,
    )


class StudentRecipe:
    """Trains copies of some of the target's layers; see `specdec.drafters.Student`.

    A batch is whole texts, padded behind. The loss counts the positions whose laws were kept: those
    of the answers. It begins with forward KL for a tenth of the run, whatever the objective.

    Args:
        model: the target. Effects: its weights no longer take gradients.
        layers: which of its layers to begin with.
        vocabulary: ``[W]`` int64 ids it can guess, None for all.
        objective: one of `OBJECTIVES`.
        batch_size: texts a step.
    """

    kind = "student"
    layers: tuple[int, ...] = ()

    def __init__(
        self,
        model: Any,
        layers: Sequence[int],
        vocabulary: Tensor | None = None,
        *,
        objective: str = FORWARD_KL,
        batch_size: int = 8,
    ) -> None:
        self._target = model.requires_grad_(False)
        self._taken = list(layers)
        self._vocabulary = vocabulary
        self._objective = objective
        self._batch_size = batch_size
        self._student = student_model(model, layers, vocabulary)
        self._module = decoder_layers(self._student).requires_grad_(True)
        size = model.get_output_embeddings().weight.shape[0]
        self._places = torch.arange(size)
        if vocabulary is not None:
            self._places = torch.full((size,), -1)
            self._places[vocabulary] = torch.arange(len(vocabulary))

    def module(self) -> nn.Module:
        """Returns the layers."""
        return self._module

    def num_batches(self, texts: Sequence[OwnText]) -> int:
        """Returns how many batches an epoch has."""
        return -(-len(texts) // self._batch_size)

    def batches(
        self, texts: Sequence[OwnText], generator: torch.Generator
    ) -> Iterator[dict[str, Tensor]]:
        """Yields batches of texts of similar length, in random order."""
        order = torch.randperm(len(texts), generator=generator).tolist()
        batches = []
        for begin in range(0, len(order), _POOL * self._batch_size):
            pool = order[begin : begin + _POOL * self._batch_size]
            pool.sort(key=lambda index: len(texts[index].tokens))
            batches += [
                pool[i : i + self._batch_size] for i in range(0, len(pool), self._batch_size)
            ]
        for batch in torch.randperm(len(batches), generator=generator).tolist():
            yield self._padded([texts[index] for index in batches[batch]])

    def loss(self, batch: dict[str, Tensor], progress: float) -> tuple[Tensor, dict[str, float]]:
        """Returns the mean divergence over the answers' positions."""
        objective = self._objective if progress >= _FORWARD_SHARE else FORWARD_KL
        with _head_reads(self._student, batch["positions"]):
            logits = self._student(input_ids=batch["tokens"], use_cache=False).logits[0]
        found = divergence(logits, batch["places"], batch["log_probs"], objective)
        return found.value, {"acceptance": found.acceptance, "agreement": found.agreement}

    def save(self, folder: Path) -> None:
        """Writes the layers in float16."""
        tensors = {
            name: tensor.to(torch.float16) if tensor.is_floating_point() else tensor
            for name, tensor in self._module.state_dict().items()
        }
        if self._vocabulary is not None:
            tensors[VOCABULARY] = self._vocabulary.to(torch.int32)
        settings = {"layers": self._taken, "objective": self._objective}
        save_checkpoint(folder, self.kind, self._target, tensors, settings)

    def _padded(self, texts: Sequence[OwnText]) -> dict[str, Tensor]:
        tokens = pad_sequence([text.tokens for text in texts], batch_first=True)
        ids = pad_sequence([text.top_ids for text in texts], batch_first=True, padding_value=-1)
        log_probs = pad_sequence([text.top_log_probs for text in texts], batch_first=True)
        positions = (ids[..., 0] >= 0).flatten().nonzero().squeeze(1)
        return {
            "tokens": tokens,
            "positions": positions,
            "places": self._places[ids.flatten(0, 1)[positions]],
            "log_probs": log_probs.flatten(0, 1)[positions],
        }


@contextmanager
def _head_reads(model: Any, positions: Tensor) -> Iterator[None]:
    """Has the model's head read some positions of the flattened batch, as one row."""

    def pick(_head: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0].flatten(0, 1)[positions].unsqueeze(0)

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()
