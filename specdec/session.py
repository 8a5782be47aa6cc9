"""One call of a generator: what it allocates, and the loop that runs it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from transformers.generation.stopping_criteria import MaxLengthCriteria

from specdec.auto import PartsForCalls
from specdec.backend.captured import bucket
from specdec.backend.exchange import import_cache
from specdec.backend.model import TreeModel
from specdec.call import Call, past_length
from specdec.errors import ConfigError
from specdec.loop import DecodeLoop, Parts
from specdec.random import draw_seed, row_streams
from specdec.rows import RowInput, split_rows
from specdec.stats import DecodeStats
from specdec.target import TargetModel
from specdec.types import Drafter, DrafterNeeds

_INITIAL_ROOM = 1024  # new tokens a cache has room for before it grows


class Session:
    """One call between its preparation and its output.

    Args:
        call: from `specdec.call.prepare`.
        parts: of the generator; those for this call are taken from them.
        seed: an int, or one for each row; None takes one from torch's global generator.

    Attributes:
        call: as given.
        inputs: the rows of the call.
        stats: of the call, once it is open.
        loop: that runs it, once it is open.

    Raises:
        ConfigError: for a seed that does not fit the rows, or parts that do not fit each other.
    """

    def __init__(self, call: Call, parts: PartsForCalls, seed: int | Sequence[int] | None) -> None:
        self.call = call
        self.parts = parts.for_call(call, seeded=seed is not None)
        self.inputs: list[RowInput] = split_rows(call)
        self._keys = _row_keys(seed, call, len(self.inputs))
        self.stats: DecodeStats
        self.loop: DecodeLoop

    def open(self, backend: TreeModel) -> None:
        """Allocates the cache and makes the loop."""
        lengths = [item.offset + len(item.tokens) for item in self.inputs]
        longest, limit = max(lengths), backend.traits.positions
        if limit is not None:
            limit = limit.for_prompts(lengths, [item.offset for item in self.inputs])
        drafter = self.parts.drafter
        nodes = 1 + (self.parts.budget.max_nodes if drafter is not None else 0)
        needs = drafter.needs if drafter is not None else DrafterNeeds()
        new_tokens = min(_new_tokens(self.call), _INITIAL_ROOM)
        pass_rows = nodes * (1 + needs.num_probes)
        captured = backend.captured
        if captured is not None and not captured.serves(probes=needs.num_probes > 0):
            captured = None
        if captured is not None:
            pass_rows = bucket(nodes)
        cache = (captured or backend).new_cache(len(self.inputs), longest + new_tokens + pass_rows)
        if past_length(self.call):
            import_cache(cache, self.call.past, [item.past_columns for item in self.inputs])
        self.stats = DecodeStats(
            len(self.inputs), _settings(self.parts), _kept_bytes(backend, drafter)
        )
        self.loop = DecodeLoop(
            self.call,
            self.inputs,
            [row_streams(seed, row) for seed, row in self._keys],
            self.parts,
            TargetModel(backend, cache, needs, captured),
            self.stats,
            vocab_size=backend.traits.vocab_size,
            positions=limit,
        )


def _new_tokens(call: Call) -> int:
    lengths = [c.max_length for c in call.criteria if isinstance(c, MaxLengthCriteria)]
    return min(lengths, default=_INITIAL_ROOM) - call.input_ids.shape[1]


def _row_keys(seed: int | Sequence[int] | None, call: Call, num_rows: int) -> list[tuple[int, int]]:
    """Returns (seed, row number) for each row.

    One seed serves all rows, told apart by their numbers; a row with a seed of its own needs no
    number, so it writes the same text alone and in any batch.
    """
    if seed is None:
        # greedy decoding leaves torch's generator alone, as `model.generate` does
        seed = 0 if call.greedy else draw_seed()
    try:
        if not isinstance(seed, Sequence):
            return [(operator.index(seed), row) for row in range(num_rows)]
        seeds = [operator.index(own) for own in seed]
    except TypeError as error:
        raise ConfigError(f"seed must be an int, or one for each row, got {seed!r}") from error
    samples = call.config.num_return_sequences or 1
    if len(seeds) == num_rows:
        return [(own, 0) for own in seeds]
    if len(seeds) * samples == num_rows:
        return [(seeds[row // samples], row % samples) for row in range(num_rows)]
    raise ConfigError(f"seed has {len(seeds)} entries, the call has {num_rows} rows")


def _kept_bytes(backend: TreeModel, drafter: Drafter | None) -> dict[str, int]:
    """Returns what stands beside the model between calls, see `DecodeStats.kept_bytes`."""
    packed = backend.packed.nbytes if backend.packed is not None else 0
    tables: int = getattr(drafter, "nbytes", 0)
    return {"packed_weights": packed, "drafter": tables}


def _settings(parts: Parts) -> dict[str, Any]:
    if parts.drafter is None:
        return {"drafter": None, "verifier": parts.verifier.name}
    return {
        "drafter": parts.drafter.name,
        "policy": parts.policy.name,
        "verifier": parts.verifier.name,
        "node_budget": parts.budget.setting,
    }
