"""Between a `TreeCache` and the caches users hold: an earlier turn comes in, this turn goes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from specdec.backend.cache import TreeCache
from specdec.errors import ConfigError


def import_cache(cache: TreeCache, past: Any, columns: Sequence[Sequence[int]]) -> None:
    """Copies an earlier turn into an empty `TreeCache`.

    Args:
        cache: with one row for each row of the call and room enough.
        past: a HuggingFace cache of B rows; B may be smaller by the factor num_return_sequences.
        columns: for each row the cached columns that hold real tokens, ascending.

    Raises:
        ConfigError: if the cache does not fit the model or the batch, or lacks what is still seen.
    """
    length = int(past.get_seq_length())
    layers = getattr(past, "layers", [])
    if len(layers) != len(cache.layers):
        raise ConfigError(
            f"past_key_values has {len(layers)} layers, the model has {len(cache.layers)}"
        )
    past_rows = layers[0].keys.shape[0]
    if cache.batch_size % past_rows:
        raise ConfigError(f"past_key_values has {past_rows} rows, the call has {cache.batch_size}")
    factor = cache.batch_size // past_rows
    for source, target in zip(layers, cache.layers, strict=True):
        if source.keys.shape[1::2] != target.keys.shape[1::2]:
            raise ConfigError(
                "past_key_values was made by another model: heads and width "
                f"{tuple(source.keys.shape[1::2])}, this one has {tuple(target.keys.shape[1::2])}"
            )
        # a sliding layer has dropped what nobody sees; a static one has room to spare
        missing = max(length - source.keys.shape[-2], 0)
        for row, real in enumerate(columns):
            slots = [slot for slot, column in enumerate(real) if column >= missing]
            if len(slots) < min(len(real), length - missing):
                # padding behind an early end took the place of tokens that are still in view
                raise ConfigError(
                    f"the sliding-window layers of past_key_values no longer hold the last "
                    f"{min(len(real), length - missing)} tokens of row {row}, only {len(slots)} of "
                    "them; leave past_key_values out, or begin the conversation with "
                    "DynamicCache() without a config, which keeps everything"
                )
            taken = torch.tensor([real[slot] - missing for slot in slots], dtype=torch.int64)
            into = torch.tensor(slots, dtype=torch.int64, device=target.keys.device)
            for name in ("keys", "values"):
                states = getattr(source, name)[row // factor]
                states = states.index_select(-2, taken.to(states.device)).to(into.device)
                getattr(target, name)[row].index_copy_(-2, into, states)
    cache.lengths[:] = [len(real) for real in columns]


def export_cache(
    cache: TreeCache, config: Any, rows: Sequence[tuple[int, Sequence[int]]], width: int, past: Any
) -> Cache:
    """Returns the sequences' cache as `model.generate` would have left it.

    Args:
        cache: after the last commit.
        config: the model's configuration, which knows about sliding layers.
        rows: for each row of the call its place in the pools, and the column of each cached token.
        width: columns of the result.
        past: the cache that was handed in, filled in place; None for a new one.
    """
    # layers that keep everything stay so: later turns may need what a window would drop
    layers = getattr(past, "layers", [])
    windowed = past is None or any(getattr(layer, "is_sliding", False) for layer in layers)
    exported = DynamicCache(config=config if windowed else None)
    states = [cache.row_states(place, len(columns)) for place, columns in rows]
    for layer in range(len(cache.layers)):
        stacked = tuple(
            torch.stack(
                [
                    _spread(states[row][layer][part], columns, width)
                    for row, (_, columns) in enumerate(rows)
                ]
            )
            for part in (0, 1)
        )
        exported.update(stacked[0], stacked[1], layer)
    if past is None:
        return exported
    past.layers[:] = exported.layers
    filled: Cache = past
    return filled


def _spread(states: Tensor, columns: Sequence[int], width: int) -> Tensor:
    """Returns ``[H, width, D]`` with the states at their columns and zeros at padding."""
    if list(columns) == list(range(width)):
        return states.clone()
    result = states.new_zeros((states.shape[0], width, states.shape[-1]))
    result[:, torch.tensor(columns, device=states.device)] = states
    return result
