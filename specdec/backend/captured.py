"""Verify passes that are recorded once and repeated: no Python of the model between the kernels.

A recording is of fixed shapes and addresses, so the cache outlives a call, trees are padded to a
few sizes, and what differs from step to step (tokens, positions, ancestor words, lengths) is
written into buffers that the recorded operations read. What is padded is hidden by masks, as in any
pass.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdec.backend.cache import TreeCache
from specdec.backend.features import FeatureTap
from specdec.backend.model import TreeModel
from specdec.backend.model_state import foreign_hook, model_state
from specdec.backend.recorders import Recorder, Recording
from specdec.backend.tree_layers import MAX_NODES
from specdec.errors import ConfigError
from specdec.kernels.tree_mask import num_words, pack_ancestors

logger = logging.getLogger(__name__)

_FEWEST_SLOTS = 256  # attended over; further sizes are its doubles
_PLAIN_PASSES = 2  # of a shape before it is recorded: they warm up, and a rare one is not worth it
WARM_UP_PASSES = _PLAIN_PASSES + 1  # of a shape until it takes what it will take
_MOST_RECORDINGS = 64
_ROOM = 1024  # a cache has a multiple of so many slots, so that it fits the next call as well


def bucket(num_nodes: int) -> int:
    """Returns the nodes that a tree is padded to: a root and a power of two, or a root alone.

    Budgets are powers of two, mostly, and do not count the root.
    """
    if num_nodes == 1:
        return 1
    padded = 1 + (1 << (num_nodes - 2).bit_length())
    return MAX_NODES if num_nodes <= MAX_NODES < padded else padded


class CapturedPasses:
    """Runs a model's passes over whole trees from recordings, one for each padded shape.

    The first passes of a shape run as they are, a later one is recorded. Recordings are dropped
    when the cache moves or the model is no longer what was recorded, which is looked at once a
    call.

    Args:
        backend: the probed model.
        make_recorder: called again whenever all recordings were dropped.
        required: whether calls that cannot be served are refused; else they run as they are.
    """

    def __init__(
        self, backend: TreeModel, make_recorder: Callable[[], Recorder], *, required: bool
    ) -> None:
        self._backend = backend
        self._make_recorder = make_recorder
        self._required = required
        self._logged: set[str] = set()
        self._cache: TreeCache | None = None
        self._generation = 0  # of the cache
        self._state: Hashable = None
        self._recorder: Recorder
        self._inputs: dict[tuple[int, int], _Inputs] = {}
        self._seen: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, Recording] = {}
        self._is_full = False
        self._forget()

    @property
    def num_recordings(self) -> int:
        """Shapes that are recorded at present."""
        return len(self._recordings)

    def serves(self, *, probes: bool) -> bool:
        """Returns whether a call can run from recordings.

        Args:
            probes: whether its passes have slots behind the nodes.

        Raises:
            ConfigError: if it cannot, and recordings are required.
        """
        reason = self._obstacle(probes)
        if reason is None:
            return True
        if self._required:
            raise ConfigError(
                f"compile=True cannot be obeyed: {reason}; "
                "compile='auto' runs such calls as they are"
            )
        if reason not in self._logged:
            self._logged.add(reason)
            logger.info("passes are not captured: %s", reason)
        return False

    def new_cache(self, batch_size: int, capacity: int) -> TreeCache:
        """Returns an empty cache, the last call's if that one has the room.

        It belongs to one call at a time.
        """
        self._backend.refresh()
        state = (model_state(self._backend.model), id(self._backend.packed))
        if state != self._state:
            self._forget()
            self._state = state
        cache = self._cache
        # recordings go on in other calls, in inference mode or not
        with torch.inference_mode(False), torch.no_grad():
            if cache is None or batch_size > cache.pool_rows or capacity > cache.capacity:
                self.close()  # before there are two
                rounded = -(-capacity // _ROOM) * _ROOM
                cache = self._cache = self._backend.new_cache(batch_size, rounded)
                self._generation = cache.generation
            else:
                cache.restart(batch_size)
        return cache

    def run(
        self,
        cache: TreeCache,
        tokens: Tensor,
        positions: Tensor,
        ancestors: Tensor,
        tap: FeatureTap | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs a pass as `TreeModel.forward` does; its nodes are pending afterwards.

        Args:
            cache: `new_cache`'s, with nothing pending.
            tokens: ``[B, N]`` int64, N a `bucket`.
            positions: ``[B, N]`` int64.
            ancestors: ``[B, N, N]`` bool, all nodes of the trees; padding sees itself.
            tap: reads features, if some are wanted.

        Returns:
            Logits ``[B, N, V]`` and features ``[B, N, F]`` or None. They are the recording's own
            tensors: the next pass writes over them.

        Raises:
            RuntimeError: if the pass does what cannot be recorded.
        """
        batch_size, nodes = tokens.shape
        assert cache is self._cache
        with torch.inference_mode(False), torch.no_grad():
            cache.begin_pass(nodes)
            if cache.generation != self._generation:  # it has grown
                self._forget()
                self._generation = cache.generation
            inputs = self._inputs_of(batch_size, nodes)
            inputs.fill(
                torch.tensor(cache.lengths),
                tokens,
                self._backend.within_table(positions),
                pack_ancestors(ancestors),
            )
            attended = self._attended(cache)
            layers = tap.layers if tap is not None else ()
            key = (batch_size, nodes, attended, layers)
            run = partial(self._body, cache, inputs, attended, tap)
            recording = self._recording(key, run)
            outputs: tuple[Tensor, Tensor | None]
            if recording is None:
                outputs = run()
            else:
                recording.replay()
                outputs = recording.outputs
            cache.end_pass()
        return outputs

    def _recording(self, key: Hashable, run: Callable[[], Any]) -> Recording | None:
        """Returns the recording of a shape; None while it is too rare, or memory is full."""
        recording = self._recordings.pop(key, None)
        if recording is None:
            self._seen[key] += 1
            if self._seen[key] <= _PLAIN_PASSES or self._is_full:
                return None
            try:
                recording = self._recorder.record(run)
            except torch.OutOfMemoryError:
                if self._required:
                    raise
                logger.warning("no memory for further captured passes; they run as they are")
                self._is_full = True
                return None
            if len(self._recordings) >= _MOST_RECORDINGS:
                del self._recordings[next(iter(self._recordings))]
        self._recordings[key] = recording  # the last used one comes last
        return recording

    def close(self) -> None:
        """Gives back the memory of recordings and cache; the next call makes them anew."""
        self._forget()
        self._cache = None

    def _forget(self) -> None:
        self._recordings.clear()
        self._seen.clear()
        self._is_full = False
        self._inputs.clear()
        self._recorder = self._make_recorder()

    def _obstacle(self, probes: bool) -> str | None:
        device = self._backend.device
        if probes:
            return "the drafter reads slots behind the nodes"
        if torch.is_autocast_enabled(device.type):
            return f"autocast is on for {device.type}"
        hooked = foreign_hook(self._backend.model)
        if hooked is not None:
            return f"a hook on {hooked} of the model would not be called"
        return None

    def _attended(self, cache: TreeCache) -> int:
        """Returns how many slots are attended over: few sizes, and less than twice the need."""
        needed = max(cache.lengths) + cache.pass_size
        doubled = max(_FEWEST_SLOTS, 1 << (needed - 1).bit_length())
        return min(doubled, cache.capacity)

    def _inputs_of(self, batch_size: int, nodes: int) -> _Inputs:
        shape = batch_size, nodes
        if shape not in self._inputs:
            self._inputs[shape] = _Inputs(batch_size, nodes, self._backend.device)
        return self._inputs[shape]

    def _body(
        self, cache: TreeCache, inputs: _Inputs, attended: int, tap: FeatureTap | None
    ) -> tuple[Tensor, Tensor | None]:
        """What is recorded."""
        arguments: tuple[Any, ...] = (
            cache,
            inputs.tokens.long(),
            inputs.positions.long(),
            inputs.words,
            inputs.lengths,
            attended,
        )
        if tap is None:
            return self._backend.forward_on_device(*arguments), None
        with tap.reading():
            logits = self._backend.forward_on_device(*arguments)
        return logits, tap.take()


class _Inputs:
    """What differs from pass to pass, at addresses that stay; one copy fills all of it.

    Args:
        batch_size: B.
        nodes: N.
        device: of the model.
    """

    def __init__(self, batch_size: int, nodes: int, device: torch.device) -> None:
        words = num_words(nodes)
        sizes = [batch_size, batch_size * nodes, batch_size * nodes, batch_size * nodes * words]
        self.all = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self.lengths, tokens, positions, bits = torch.split(self.all, sizes)
        self.tokens = tokens.view(batch_size, nodes)
        self.positions = positions.view(batch_size, nodes)
        self.words = bits.view(batch_size, nodes, words)

    def fill(self, *parts: Tensor) -> None:
        """Writes lengths, tokens, positions and words, which stand on the host."""
        host = torch.cat([part.flatten().to(torch.int32) for part in parts])
        if self.all.is_cuda:
            host = host.pin_memory()  # whose memory is not given away before it has been read
        self.all.copy_(host, non_blocking=True)
