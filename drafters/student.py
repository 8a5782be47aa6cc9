"""A few layers taken from the target and taught to guess for it, with its embedding and head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from specdec.backend.cut import copied_layers, with_head_rows
from specdec.backend.features import decoder_layers
from specdec.backend.probe import probed
from specdec.drafters.checkpoint import load_checkpoint, shipped
from specdec.drafters.text_reader import TextReader
from specdec.drafters.vocabulary_bridge import PartialVocabulary, SharedVocabulary
from specdec.errors import ConfigError, StateError
from specdec.types import TargetInfo

VOCABULARY = "vocabulary"  # the tensor of the ids it guesses; the others are of its layers


class Student(TextReader):
    """Drafts with 1 to 3 layers distilled from the target, on the target's own text.

    It is a language model of the target's family: copies of some of its layers, trained further,
    between the target's embedding and the target's norm and head, which are shared and not stored.
    The head's rows may be those of the tokens that the target writes most; the others are then
    never guessed.

    Source: DistillSpec, Zhou et al. (arXiv 2310.08461), for the objectives and for text of the
    target's own; layers taken from the target as in Kangaroo (arXiv 2404.18911), but with a cache
    of their own and without the target's states.

    Args:
        weights: a folder that ``scripts/train_drafter.py student`` wrote; None for the weights that
            come with the toolkit.
    """

    name = "student"

    def __init__(self, weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self._weights = weights
        self._whole: Any = None

    def attach(self, target: TargetInfo) -> None:
        """Loads the weights, and shares the rest with the target.

        Raises:
            ConfigError: if the model is not known, or no weights come with the toolkit for it.
            StateError: if the weights are damaged, or of another target.
        """
        model = target.model
        if model is None:
            raise ConfigError(
                "student shares the target's embedding and head: give it to a "
                "SpeculativeGenerator, which hands it the model"
            )
        if self._whole is model:
            return
        folder = shipped(self.name, model) if self._weights is None else self._weights
        tensors, config = load_checkpoint(folder, self.name, model)
        vocabulary = tensors.pop(VOCABULARY, None)
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        layers: Any = config.get("layers")
        if not _are_indices(layers, count):
            raise StateError(f"{folder}: layers should be numbers below {count}, got {layers!r}")
        if vocabulary is not None and not _are_tokens(vocabulary, target.vocab_size):
            raise StateError(
                f"{folder}: the vocabulary should be different ids below {target.vocab_size}, the "
                "width of the target's logits"
            )
        student = student_model(model, layers, vocabulary)
        try:
            decoder_layers(student).load_state_dict(tensors)
        except RuntimeError as error:
            raise StateError(f"{folder}: the weights do not fit the layers: {error}") from error
        self._backend = probed(student)
        self._vocabulary = (
            SharedVocabulary(target.vocab_size, target.vocab_size)
            if vocabulary is None
            else PartialVocabulary(vocabulary.long().to(self._backend.device), target.vocab_size)
        )
        self._whole = model
        self.reset()


def student_model(model: Any, layers: Sequence[int], vocabulary: Tensor | None = None) -> Any:
    """Returns an untrained student: copies of the target's layers, all else shared with it.

    Args:
        model: the target.
        layers: which of its layers, from the embedding up.
        vocabulary: ``[W]`` ids whose logits it has, in that order; None for all.

    Raises:
        UnsupportedModelError: if the target's layers are not found.
    """
    student = copied_layers(model, layers)
    return student if vocabulary is None else with_head_rows(student, vocabulary.long())


def _are_indices(layers: Any, count: int) -> bool:
    return (
        isinstance(layers, list)
        and len(layers) > 0
        and all(isinstance(layer, int) and 0 <= layer < count for layer in layers)
    )


def _are_tokens(vocabulary: Tensor, size: int) -> bool:
    return (
        vocabulary.ndim == 1
        and not vocabulary.is_floating_point()
        and len(vocabulary) > 0
        and 0 <= int(vocabulary.min()) <= int(vocabulary.max()) < size
        and len(set(vocabulary.tolist())) == len(vocabulary)
    )
