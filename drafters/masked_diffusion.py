"""An independent masked-diffusion language model as drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specdec.drafters.block_law import BlockDrafter, BlockLaw, Guess
from specdec.drafters.vocabulary_bridge import SharedVocabulary
from specdec.errors import ConfigError
from specdec.types import TargetInfo


class MaskedDiffusion(BlockDrafter):
    """Drafts with a HuggingFace model that fills masks, of the target's tokenizer.

    The row's text with masks behind it is one pass of the model, which sees it in both directions;
    it keeps no cache, so a pass reads the whole text. See `BlockDrafter` for several steps.

    Source: SpecDiff, Christopher et al. (arXiv 2408.05636); the order "left_to_right" is ours. The
    paper draws the tokens of its last step and takes that step's laws for theirs, which is exact
    for one step only.

    Args:
        model: gives ``logits`` for ``input_ids`` and ``attention_mask``; in eval mode.
        mask_token_id: the model's mask; None for the one its settings name.
        block_size: masks behind the text (gamma in the paper).
        num_steps: denoising steps a block.
        order: of several steps, "left_to_right" or "confident".
        shifted: whether the logits at a token are those of the next one, as in models made from an
            autoregressive one (Dream).
        max_context: tokens of the text that the model reads, the last ones; None for as many as
            its positions allow.
        num_candidates: tokens a row names at most.

    Raises:
        ConfigError: for an argument that makes no sense.
    """

    name = "masked_diffusion"

    def __init__(
        self,
        model: Any,
        mask_token_id: int | None = None,
        *,
        block_size: int = 8,
        num_steps: int = 1,
        order: str = "left_to_right",
        shifted: bool = False,
        max_context: int | None = None,
        num_candidates: int = 64,
    ) -> None:
        super().__init__(num_steps, order, num_candidates)
        if mask_token_id is None:
            mask_token_id = getattr(model.config, "mask_token_id", None)
        if mask_token_id is None:
            raise ConfigError("the model's settings name no mask: pass mask_token_id=...")
        if model.training:
            raise ConfigError("the draft model is in training mode: call model.eval() first")
        limit = getattr(model.config, "max_position_embeddings", None)
        if max_context is None and limit is not None:
            max_context = limit - block_size
        if block_size < 1 or (max_context is not None and max_context < 1):
            raise ConfigError(
                f"block_size and max_context must be at least 1, got {block_size} and {max_context}"
                f"; the model has {limit} positions"
            )
        self._model = model
        self._mask = mask_token_id
        self._block_size = block_size
        self._shifted = shifted
        self._max_context = max_context
        self._shared: SharedVocabulary

    @property
    def num_predicted(self) -> int:
        """Tokens a block predicts."""
        return self._block_size

    def attach(self, target: TargetInfo) -> None:
        """Checks that the vocabularies agree. Raises ConfigError if they do not."""
        self._shared = SharedVocabulary(self._model.config.vocab_size, target.vocab_size)

    def _guess(self, laws: Sequence[BlockLaw], given: Tensor) -> list[Guess]:
        """Runs the texts with their blocks, padded on the right."""
        texts = []
        for law, block in zip(laws, given, strict=True):
            first = 0 if self._max_context is None else max(0, law.length - self._max_context)
            known = [self._shared.draft_token(token) for token in law.text[first : law.length]]
            texts.append(torch.cat([torch.tensor(known), block.where(block >= 0, self._mask)]))
        ids = pad_sequence(texts, batch_first=True, padding_value=self._mask)
        lengths = torch.tensor([len(text) for text in texts])
        mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
        device = self._model.device
        logits = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        ends = (lengths - int(self._shifted)).tolist()
        blocks = [row[end - self._block_size : end] for row, end in zip(logits, ends, strict=True)]
        guesses = [Guess(self._shared.scores(block)) for block in blocks]
        for guess in guesses:
            guess.logits[:, self._mask : self._mask + 1] = -torch.inf  # a mask is no guess
        return guesses
