"""A preallocated key-value cache in which every row has its own length.

Row b holds its tokens at slots ``0 .. length[b]``, whatever padding the prompt had. A pass writes
its N new tokens behind them; nothing is committed until `commit` says which of them stay, so
rolling back costs nothing. Further passes may add to the same tree first: `pending` counts its
nodes so far. HuggingFace's own layers concatenate the whole cache at every step instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.kernels.layer_parts import LayerCaches


class LayerSpec(NamedTuple):
    """What one layer's keys and values look like."""

    num_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, layer: Any) -> LayerSpec:
        """Returns the spec of a filled HuggingFace cache layer."""
        keys, values = layer.keys, layer.values
        return cls(keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype, keys.device)


class TreeCache:
    """The cache of one call.

    Layers of equal shape share one pool ``[L, B, H, S, D]`` for keys and one for values, so that
    a path is compacted in two copies for all layers together.

    Args:
        specs: one for each layer of the model.
        batch_size: rows.
        capacity: slots a row; it grows by doubling when more are asked for.
    """

    def __init__(self, specs: Sequence[LayerSpec], batch_size: int, capacity: int) -> None:
        self.specs = list(specs)
        self.lengths = [0] * batch_size
        self.capacity = capacity
        self._groups: dict[LayerSpec, list[int]] = {}
        for index, spec in enumerate(self.specs):
            self._groups.setdefault(spec, []).append(index)
        self._pools = self._allocate(batch_size, capacity)
        self.layers = [TreeLayer(self) for _ in self.specs]
        self.hf_cache = Cache(layers=list(self.layers))
        self.pending = 0
        self.pass_size = 0
        self.generation = 0  # raised when keys and values move to other addresses
        self._first = 0  # pools' row that is the first in view
        self._slots: dict[torch.device, tuple[Tensor, Tensor]] = {}  # of the running pass
        self._of_layers: dict[tuple[int, ...], LayerCaches] = {}  # of the views as they lie
        self._attended: int | None = None  # by a pass that does not go by the lengths here
        self._lay_views()

    def _allocate(self, batch_size: int, capacity: int) -> dict[LayerSpec, tuple[Tensor, Tensor]]:
        # zeros, not empty: a masked slot that holds NaN would still poison the weighted sum
        return {
            spec: (
                torch.zeros(
                    (len(members), batch_size, spec.num_heads, capacity, spec.key_dim),
                    dtype=spec.dtype,
                    device=spec.device,
                ),
                torch.zeros(
                    (len(members), batch_size, spec.num_heads, capacity, spec.value_dim),
                    dtype=spec.dtype,
                    device=spec.device,
                ),
            )
            for spec, members in self._groups.items()
        }

    def _lay_views(self) -> None:
        """Points every layer at its rows of the pools; only active rows are in view."""
        self._of_layers.clear()
        end = self._first + self.batch_size
        for spec, members in self._groups.items():
            keys, values = self._pools[spec]
            for place, index in enumerate(members):
                self.layers[index].keys = keys[place, self._first : end]
                self.layers[index].values = values[place, self._first : end]

    def of_layers(self, places: tuple[int, ...]) -> LayerCaches:
        """Returns keys and values of some layers' active rows, for C code."""
        own = self._of_layers.get(places)
        if own is None:
            layers = [self.layers[place] for place in places]
            own = LayerCaches([layer.keys for layer in layers], [layer.values for layer in layers])
            self._of_layers[places] = own
        return own

    @property
    def batch_size(self) -> int:
        """Active rows."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(k.nbytes + v.nbytes for k, v in self._pools.values())

    def begin_pass(self, pass_size: int) -> None:
        """Prepares for a pass that adds `pass_size` nodes to every row's tree."""
        needed = max(self.lengths) + self.pending + pass_size
        if needed > self.capacity:
            self._grow(max(needed, 2 * self.capacity))
        self.pass_size = pass_size
        self._slots.clear()

    def end_pass(self) -> None:
        """Counts the nodes of the pass that has run as pending."""
        self.pending += self.pass_size
        self.pass_size = 0

    @property
    def visible(self) -> int:
        """Slots that the running pass attends over: committed, pending and new ones."""
        if self._attended is not None:
            return self._attended
        return max(self.lengths) + self.pending + self.pass_size

    def slots(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns where the running pass writes: rows ``[B, 1]`` and slots ``[B, N]`` there."""
        if device not in self._slots:
            rows = torch.arange(self.batch_size, device=device).unsqueeze(1)
            starts = torch.tensor(self.lengths, device=device).unsqueeze(1) + self.pending
            self._slots[device] = rows, starts + torch.arange(self.pass_size, device=device)
        return self._slots[device]

    @property
    def starts(self) -> list[int] | None:
        """Each row's first slot that the running pass writes to; None if only the device knows."""
        return None if self._attended is not None else [n + self.pending for n in self.lengths]

    @property
    def writes_in_order(self) -> bool:
        """Whether all rows write to the same slots, which the host knows."""
        return self._attended is None and min(self.lengths) == max(self.lengths)

    @contextmanager
    def writing_to(self, slots: Tensor, visible: int) -> Iterator[None]:
        """Has the running pass write to slots that only the device knows.

        Args:
            slots: ``[B, N]`` int64 on the device of all layers.
            visible: slots attended over; what is not to be seen is for the masks to hide.
        """
        rows = torch.arange(self.batch_size, device=slots.device).unsqueeze(1)
        self._slots, self._attended = {slots.device: (rows, slots)}, visible
        try:
            yield
        finally:
            self._slots, self._attended = {}, None

    def restart(self, batch_size: int) -> None:
        """Empties the cache for another call of at most as many rows, at the same addresses."""
        for pools in self._pools.values():
            for pool in pools:
                pool.zero_()  # see `_allocate`
        self.lengths[:] = [0] * batch_size
        self.pending = self.pass_size = self._first = 0
        self._lay_views()

    @property
    def pool_rows(self) -> int:
        """Rows there is room for, active or not."""
        return next(iter(self._pools.values()))[0].shape[1]

    def advance(self, counts: Sequence[int]) -> None:
        """Commits the first `counts[b]` pending nodes of each row, a chain; drops the others."""
        self.lengths[:] = [n + count for n, count in zip(self.lengths, counts, strict=True)]
        self.pending = 0

    def drop_pending(self, keep: int = 0) -> None:
        """Forgets the pending nodes but the first `keep`; the next pass overwrites them."""
        self.pending = keep

    def roll_back(self, lengths: Sequence[int]) -> None:
        """Shortens the active rows to `lengths` and forgets what is pending; copies nothing."""
        self.lengths[:] = lengths
        self.pending = 0

    def _grow(self, capacity: int) -> None:
        old, filled = self._pools, self.capacity
        self._pools = self._allocate(self.pool_rows, capacity)
        for spec, pools in old.items():
            for new, pool in zip(self._pools[spec], pools, strict=True):
                new[..., :filled, :] = pool
        self.capacity = capacity
        self.generation += 1
        self._lay_views()

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keeps the pending nodes of `paths`; all others will be overwritten.

        Args:
            paths: for each active row the nodes that became text, ascending.
        """
        for row, path in enumerate(paths):
            start = self.lengths[row]
            count = len(path)
            if list(path) != list(range(count)):
                for keys, values in self._pools.values():
                    for pool in (keys, values):
                        source = torch.tensor(path, device=pool.device) + start
                        kept = pool[:, row].index_select(-2, source)
                        pool[:, row, :, start : start + count] = kept
        self.advance([len(path) for path in paths])

    def retire(self, row: int) -> None:
        """Takes a row out of the active ones; the last active row takes its place.

        The retired row's keys and values stay, behind the active rows, until they are exported.
        """
        last = self.batch_size - 1
        if row != last:
            for keys, values in self._pools.values():
                for pool in (keys, values):
                    pool[:, [row, last]] = pool[:, [last, row]]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self._lay_views()

    @contextmanager
    def only(self, rows: range) -> Iterator[None]:
        """Has passes run over some of the active rows; the others stay as they are."""
        if len(rows) == len(self.lengths):
            yield
            return
        lengths = list(self.lengths)
        self.lengths[:], self._first = lengths[rows.start : rows.stop], rows.start
        self._lay_views()
        try:
            yield
        finally:
            lengths[rows.start : rows.stop] = self.lengths
            self.lengths[:], self._first = lengths, 0
            self._lay_views()

    def copy_row(self, source: int, row: int) -> None:
        """Makes an active row hold what another one has committed."""
        length = self.lengths[source]
        for pools in self._pools.values():
            for pool in pools:
                pool[:, row, :, :length] = pool[:, source, :, :length]
        self.lengths[row] = length

    def revive(self, lengths: Sequence[int]) -> None:
        """Makes retired rows active again; `lengths` are all rows' in the order of the pools."""
        self.lengths[:] = lengths
        self._lay_views()

    def row_states(self, pool_row: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Returns keys and values ``[H, length, D]`` of each layer for a row, active or retired."""
        states: list[tuple[Tensor, Tensor]] = [None] * len(self.specs)  # type: ignore[list-item]
        for spec, members in self._groups.items():
            keys, values = self._pools[spec]
            for place, index in enumerate(members):
                states[index] = (
                    keys[place, pool_row, :, :length],
                    values[place, pool_row, :, :length],
                )
        return states

    def pending_states(self) -> list[tuple[Tensor, Tensor]]:
        """Returns each layer's keys and values ``[B, H, pending, D]``; nothing is committed yet."""
        states = [(layer.keys, layer.values) for layer in self.layers]
        return [(k[:, :, : self.pending], v[:, :, : self.pending]) for k, v in states]


class TreeLayer(CacheLayerMixin):
    """One layer's view of a `TreeCache`, in the form that HuggingFace's attention calls."""

    is_sliding = False
    is_compileable = False
    keys: Tensor
    values: Tensor

    def __init__(self, cache: TreeCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: the storage exists from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes the new nodes behind each row's earlier ones; returns all visible slots."""
        count = key_states.shape[-2]
        if self._cache.writes_in_order:
            start = self._cache.lengths[0] + self._cache.pending
            self.keys[:, :, start : start + count] = key_states
            self.values[:, :, start : start + count] = value_states
        else:
            rows, slots = self._cache.slots(key_states.device)
            # unlike a slice, an index does not take another dtype, such as autocast's
            self.keys[rows, :, slots] = key_states.transpose(1, 2).to(self.keys.dtype)
            self.values[rows, :, slots] = value_states.transpose(1, 2).to(self.values.dtype)
        visible = self._cache.visible
        return self.keys[:, :, :visible], self.values[:, :, :visible]

    @property
    def cache(self) -> TreeCache:
        """What it is a layer of."""
        return self._cache

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of slots attended over, and that they start at slot 0."""
        return self._cache.visible, 0

    def get_seq_length(self) -> int:
        """Returns the length of the longest row, pending nodes included."""
        return max(self._cache.lengths) + self._cache.pending

    def get_max_length(self) -> int:
        """Returns -1: the cache grows."""
        return -1
