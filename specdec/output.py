"""The result of a call in HuggingFace's form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.backend.cache_name import LIBRARY_CACHE_NAME
from specdec.backend.exchange import export_cache
from specdec.call import Call
from specdec.loop import DecodeLoop
from specdec.rows import RowInput


def collect(
    call: Call, inputs: list[RowInput], loop: DecodeLoop, config: Any
) -> Tensor | GenerateDecoderOnlyOutput:
    """Returns the sequences, or the dictionary output that was asked for.

    Rows that ended early are filled up with the padding token, their scores and logits with zeros.

    Effects:
        Fills the cache that was handed in.
    """
    longest = max(len(row.generated) for row in loop.rows)
    new = torch.full((len(loop.rows), longest), call.pad_token_id, dtype=torch.int64)
    for row in loop.rows:
        new[row.index, : len(row.generated)] = torch.tensor(row.generated)
    sequences = torch.cat([call.input_ids, new.to(call.input_ids.device)], dim=1)
    past = _fill_cache(call, inputs, loop, config) if call.fill_past else None
    if not call.config.return_dict_in_generate:
        return sequences
    fields: dict[str, Any] = {"sequences": sequences, LIBRARY_CACHE_NAME: past}
    if call.config.output_scores:
        fields["scores"] = _stack([row.scores for row in loop.rows])
    if call.config.output_logits:
        fields["logits"] = _stack([row.raw_logits for row in loop.rows])
    return GenerateDecoderOnlyOutput(**fields)


def _stack(rows: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Returns one ``[B, V]`` tensor for each new token, as `generate` does."""
    longest = max(map(len, rows))
    empty = torch.zeros_like(rows[0][0])
    return tuple(
        torch.stack([row[step] if step < len(row) else empty for row in rows])
        for step in range(longest)
    )


def _fill_cache(call: Call, inputs: list[RowInput], loop: DecodeLoop, config: Any) -> Any:
    loop.run_last_tokens()
    places = {row.index: place for place, row in enumerate(loop.places)}
    first_new = max(call.mask_length, call.input_ids.shape[1])
    # the last token of the longest rows was never run
    width = first_new + max(len(row.generated) for row in loop.rows) - 1
    rows = []
    for row, item in zip(loop.rows, inputs, strict=True):
        generated = range(first_new, min(first_new + len(row.generated), width))
        columns = [*item.past_columns, *item.new_columns, *generated]
        rows.append((places[row.index], columns))
    return export_cache(loop.cache, config, rows, width, call.past)
