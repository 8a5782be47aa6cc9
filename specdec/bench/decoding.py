"""Arguments and inputs of `generate`, as all measurements form them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def decoding_arguments(
    max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0
) -> dict[str, Any]:
    """Returns the arguments of greedy decoding at temperature 0, else of sampling."""
    if temperature == 0.0:
        return {"max_new_tokens": max_new_tokens, "do_sample": False}
    # top_k: transformers' default of 50 would be a truncation that nobody has named
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0}
    return {"max_new_tokens": max_new_tokens, "do_sample": True, **sampling}


def pad_token_id(tokenizer: Any) -> int:
    """Returns a token to pad with: the tokenizer's own, else its end of sequence, else 0."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in known if token is not None)


def padded(rows: Sequence[Tensor], pad: int) -> dict[str, Tensor]:
    """Returns ``[B, T]`` int64 ids and mask of rows ``[T_i]``, padded on the left."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
