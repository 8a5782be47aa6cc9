"""The rows of a call: padding taken out, an earlier turn told apart from the new tokens."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.call import Call, past_length, real_columns
from specdec.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RowInput:
    """One row as it comes in.

    Attributes:
        tokens: real tokens that are not cached yet, at least one.
        offset: absolute position of the first of them.
        padding: ids at padded columns; processors see them in front.
        visible_past: cached real tokens whose ids were given too; processors see them.
        past_columns: cache columns with real tokens.
        new_columns: columns of `tokens` in the sequences that come back, behind cached columns.
    """

    tokens: list[int]
    offset: int
    padding: list[int]
    visible_past: list[int]
    past_columns: list[int]
    new_columns: list[int]


def split_rows(call: Call) -> list[RowInput]:
    """Returns the rows of a call.

    Raises:
        ConfigError: if a row has nothing to start from.
    """
    cached = past_length(call)
    width = call.input_ids.shape[1]
    # as in transformers: the ids are the whole sequence, or, when the mask is wider, its new part
    first = cached if cached and call.mask_length > width else 0
    return [
        _split(call, row, ids, cached, first) for row, ids in enumerate(call.input_ids.tolist())
    ]


def _split(call: Call, row: int, ids: list[int], cached: int, first: int) -> RowInput:
    real = real_columns(call, row)
    if len(real) != first + len(ids):
        raise ConfigError(
            f"input_ids has {len(ids)} columns, attention_mask {call.mask_length}; "
            + (
                f"with {cached} columns cached, input_ids must be the whole sequence, or the new "
                "tokens under an attention_mask of the whole sequence"
                if cached
                else "expected the same number"
            )
        )
    columns = [c for c in range(first, first + len(ids)) if real[c]]
    new_columns = [c for c in columns if c >= cached]
    if not new_columns:
        if cached:
            raise ConfigError(
                f"row {row} has no token behind the {cached} cached ones; input_ids must be the "
                "whole sequence, or the new tokens under an attention_mask of the whole sequence"
            )
        raise ConfigError(f"the prompt of row {row} is empty: its attention_mask is all zero")
    past_columns = [c for c in range(cached) if real[c]]
    return RowInput(
        tokens=[ids[c - first] for c in new_columns],
        offset=len(past_columns),
        padding=[ids[c - first] for c in range(first, first + len(ids)) if not real[c]],
        visible_past=[ids[c - first] for c in columns if c < cached],
        past_columns=past_columns,
        new_columns=new_columns,
    )
