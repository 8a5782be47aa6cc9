"""A smaller language model as drafter, of the target's tokenizer or of another one."""

from __future__ import annotations

from typing import Any

from torch import nn

from specdec.backend.cut import with_head_rows
from specdec.backend.probe import probed
from specdec.drafters.text_reader import TextReader
from specdec.drafters.vocabulary_bridge import SharedVocabulary, VocabularyBridge
from specdec.errors import ConfigError
from specdec.types import TargetInfo

_FEW = 0.75  # share of a head's rows up to which a copy of those that are wanted is made


class SmallModel(TextReader):
    """Drafts with any smaller HuggingFace causal language model.

    A level of the trees of all rows is one batched pass. Accepted nodes keep their place in the
    draft model's cache, so a step feeds it nothing but the tokens it has not seen. It drafts with
    the user's own temperature and truncations, applied once: a model that drafts for itself is
    always right, as long as no other processor changes the target's law.

    With a tokenizer of its own the draft model reads the row's text in its own tokens, and guesses
    those tokens that both vocabularies have: see `VocabularyBridge`. Where these are few of its
    own, it runs with a copy of their rows of its head, as they were when it was attached.

    The draft model may have another dtype than the target, not another device. Behind the end of
    its learned positions, or of the lengths for which dynamic or long rope keeps its frequencies,
    it guesses nothing and the target goes on alone.

    Source: Leviathan et al. (arXiv 2211.17192) for one chain; SpecInfer (arXiv 2305.09781) for
    trees; Timor et al. (arXiv 2502.05202), token-level intersection, for other tokenizers.

    Args:
        model: the draft model; `attn_implementation` "sdpa" or "eager".
        tokenizer: the draft model's (`assistant_tokenizer` in transformers), if it is not the
            target's.
        target_tokenizer: the target's; None for the one the generator was made with.

    Raises:
        UnsupportedModelError: if the model cannot take trees.
        ConfigError: for a target tokenizer without the draft model's own.
    """

    name = "small_model"

    def __init__(self, model: Any, tokenizer: Any = None, target_tokenizer: Any = None) -> None:
        super().__init__()
        if tokenizer is None and target_tokenizer is not None:
            raise ConfigError(
                "target_tokenizer without the draft model's own: pass tokenizer=draft_tokenizer "
                "too, or neither if the two models share one"
            )
        self._tokenizer = tokenizer
        self._target_tokenizer = target_tokenizer
        self._model = model
        self._backend = probed(model, packed_weights=None)  # packed when it is known what is run
        self.reset()

    def attach(self, target: TargetInfo) -> None:
        """Fits the two vocabularies together.

        Raises:
            ConfigError: if they do not fit, if the target's tokenizer is wanted and unknown, or if
                the draft model lies on another device.
        """
        if target.device is not None and target.device != self._backend.device:
            raise ConfigError(
                f"the draft model is on {self._backend.device}, the target on {target.device}; "
                f"move it with draft_model.to({str(target.device)!r})"
            )
        self._vocabulary = self._fitted(target)
        self._told_the_end = False
        model = self._model
        if isinstance(self._vocabulary, VocabularyBridge):
            ids = self._vocabulary.own_ids
            if len(ids) <= _FEW * self._backend.traits.vocab_size and _has_plain_head(model):
                model = with_head_rows(model, ids)
        self._backend = probed(model)

    def _fitted(self, target: TargetInfo) -> SharedVocabulary | VocabularyBridge:
        own_size = self._backend.traits.vocab_size
        if self._tokenizer is None:
            return SharedVocabulary(own_size, target.vocab_size)
        theirs = self._target_tokenizer or target.tokenizer
        if theirs is None:
            raise ConfigError(
                "a draft model with a tokenizer of its own needs the target's too: "
                "SpeculativeGenerator(model, tokenizer, ...), "
                "SmallModel(draft_model, tokenizer=..., target_tokenizer=...), or "
                "generate(..., tokenizer=...)"
            )
        if self._tokenizer.get_vocab() == theirs.get_vocab():
            return SharedVocabulary(own_size, target.vocab_size)
        return VocabularyBridge(self._tokenizer, theirs, own_size, target.vocab_size)


def _has_plain_head(model: Any) -> bool:
    """Returns whether the logits are the head's, and the head is nothing but its weights."""
    head = model.get_output_embeddings()
    return (
        type(head) is nn.Linear
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and "forward" not in vars(head)
        and "forward" not in vars(model)  # bound to the model itself, as accelerate does it
    )
