"""Processors and criteria for one row of a batch whose rows stand at different lengths."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from specdec.warpers import cheaper, joined


def row_copies(parts: Any, row: int, num_rows: int, padding: int) -> list[Any]:
    """Returns processors or criteria for one row of a batch.

    A single row gets the objects themselves. In a batch rows advance by different amounts, so each
    has its own shallow copies and calls them with a batch of one; where an object counts rows by
    itself it is told which one this is.

    Args:
        parts: as `generate` prepared them.
        row: the row's number.
        num_rows: rows of the call.
        padding: ids of padding in front of what the row's processors see.
    """
    return joined([_row_copy(cheaper(part), row, num_rows, padding) for part in parts])


def _row_copy(part: Any, row: int, num_rows: int, padding: int) -> Any:
    if type(part) is RepetitionPenaltyLogitsProcessor:
        # padding is no text: newer versions of transformers leave it out too, from the left
        ignored = part.prompt_ignore_length
        part = copy.copy(part)
        if not isinstance(ignored, int):
            given = 0 if ignored is None else int(ignored[row])
            part.prompt_ignore_length = max(given, padding) or None
        return part
    if num_rows == 1:
        return part
    part = copy.copy(part)
    allowed = getattr(part, "_prefix_allowed_tokens_fn", None)
    if allowed is not None:
        # rows of one prompt share its number since transformers 5.24, before that each has its own
        number = row // getattr(part, "_num_beams", 1)
        part._prefix_allowed_tokens_fn, part._num_beams = _for_row(allowed, number), 1
    guidance = getattr(part, "unconditional_context", None)
    if guidance is not None:
        part.unconditional_context = {
            key: value[row : row + 1] if isinstance(value, Tensor) else value
            for key, value in guidance.items()
        }
    prompts = getattr(part, "encoder_input_ids", None)
    if prompts is not None:  # one a prompt, not one a sample
        prompt = row * len(prompts) // num_rows
        part.encoder_input_ids = prompts[prompt : prompt + 1]
    ngrams = getattr(part, "generated_ngrams", None)
    if ngrams is not None:
        part.generated_ngrams = [ngrams[row * len(ngrams) // num_rows]]
        part.batch_size = 1
    return part


def _for_row(allowed: Any, row: int) -> Any:
    return lambda _, ids: allowed(row, ids)
