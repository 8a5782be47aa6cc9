"""What a pass of the target costs: measured once on this machine, then looked up."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from specdec.backend.cache import TreeCache
from specdec.backend.captured import WARM_UP_PASSES, bucket
from specdec.backend.model import TreeModel, causal_ancestors
from specdec.cache_dir import default_cache_dir
from specdec.errors import ConfigError

logger = logging.getLogger(__name__)

_VERSION = 3
_PASSES = 2  # raised when ours become faster: what was measured before is out of date
_ROWS = (1, 2, 4, 8, 16, 32)
_CONTEXTS = (64, 768)
_ROUNDS = 10
_SECONDS = 8.0  # no further round is begun after this long
_MOST_CHECKS = 4  # passes by which a table of an earlier run is checked
_CHECK_SECONDS = 0.5  # that they may take; one is run in any case
_FASTER = 0.8
_FAR = 1 << 20  # nodes: more than any pass has


@dataclass(frozen=True)
class PassCost:
    """Seconds of one pass, by how many nodes it scores and how long the prefixes are.

    Attributes:
        rows: nodes of all trees of the pass together, ascending.
        contexts: tokens before them, ascending.
        seconds: one list for each context, one entry for each of `rows`.

    Raises:
        ConfigError: if the lengths do not fit, or a number is not positive.
    """

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    _knots: list[int] = field(init=False, repr=False, compare=False)
    _near: list[float] = field(init=False, repr=False, compare=False)
    _farther: list[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shapes = [len(of_context) for of_context in self.seconds]
        if not self.rows or shapes != [len(self.rows)] * len(self.contexts):
            raise ConfigError(
                f"a cost table needs {len(self.contexts)} lists of {len(self.rows)} seconds, got "
                f"lists of {shapes}"
            )
        rising = list(self.rows) == sorted(set(self.rows))
        if not rising or list(self.contexts) != sorted(set(self.contexts)):
            raise ConfigError("rows and contexts of a cost table must ascend")
        if not all(second > 0 for of_context in self.seconds for second in of_context):
            raise ConfigError("the seconds of a cost table must be positive")
        far = self._drawn(self.seconds[-1])
        near = np.minimum(self._drawn(self.seconds[0]), far)  # longer prefixes cost no less
        object.__setattr__(self, "_knots", [*self.rows, _FAR])
        object.__setattr__(self, "_near", near.tolist())
        object.__setattr__(self, "_farther", (far - near).tolist())

    def of(self, rows: Sequence[float], context: float) -> list[float]:
        """Returns seconds for numbers of nodes, linear between and beyond the measured points.

        In plain lists: each step asks for a few numbers, for which numpy's calls take longer.

        Args:
            rows: at least 1 each; fractions, of means, are served too.
            context: tokens before the trees; the mean over a batch's rows.
        """
        knots, seconds = self._knots, self._near
        if len(self.contexts) > 1:
            share = (context - self.contexts[0]) / (self.contexts[-1] - self.contexts[0])
            share = max(share, 0.0)
            farther = zip(seconds, self._farther, strict=True)
            seconds = [near + share * more for near, more in farther]
        costs = []
        for number in rows:
            right = min(bisect_right(knots, number, 1), len(knots) - 1)
            left = knots[right - 1]
            share = max(number - left, 0) / (knots[right] - left)
            costs.append(seconds[right - 1] + share * (seconds[right] - seconds[right - 1]))
        return costs

    def _drawn(self, measured: Sequence[float]) -> np.ndarray:
        """Returns the seconds at the knots: what was measured, and one far point on its line."""
        # fewer nodes never cost more: whatever disturbed a measurement has made it longer
        seconds = np.minimum.accumulate(measured[::-1])[::-1]
        slope = 0.0
        if len(self.rows) > 1:
            slope = (seconds[-1] - seconds[-2]) / (self.rows[-1] - self.rows[-2])
        return np.append(seconds, seconds[-1] + slope * (_FAR - self.rows[-1]))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PassCost:
        """Returns what `save` wrote.

        Raises:
            ConfigError: if it is no such file.
            FileNotFoundError: if there is none.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            table = json.loads(text)
            if table["version"] != _VERSION:
                raise ConfigError(f"{path} has version {table['version']}, expected {_VERSION}")
            return cls(
                tuple(map(int, table["rows"])),
                tuple(map(int, table["contexts"])),
                tuple(tuple(map(float, of_context)) for of_context in table["seconds"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is no table of pass costs ({error}); delete it to measure again"
            ) from error

    def save(self, path: str | os.PathLike[str], **facts: Any) -> None:
        """Writes the table as JSON, facts beside it; a reader never sees half a file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        table = {
            "version": _VERSION,
            "rows": self.rows,
            "contexts": self.contexts,
            "seconds": self.seconds,
            **facts,
        }
        try:
            partial.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def pass_cost(backend: TreeModel) -> PassCost:
    """Returns the costs of a model on this machine, measured now if no earlier run has.

    The table is kept in the user's cache folder, under what it depends on: the model's shape and
    dtype, the device, the threads and the versions. A table that turns out to have been measured
    while the machine was busy is replaced.
    """
    facts = _facts(backend)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    path = default_cache_dir() / "calibration" / f"{digest}.json"
    try:
        kept = PassCost.load(path)
        if not _made_under_load(backend, kept):
            return kept
        logger.info("passes are faster than the costs at %s say; measuring again", path)
    except FileNotFoundError:
        pass
    except ConfigError as error:
        logger.warning("%s; measuring again", error)
    logger.info("measuring what a pass of %s costs here", type(backend.model).__name__)
    cost = measure(backend)
    try:
        cost.save(path, facts=facts)
    except OSError as error:
        logger.warning("the measured costs could not be kept at %s: %s", path, error)
    return cost


@torch.no_grad()
def measure(backend: TreeModel, rows: Sequence[int] = _ROWS) -> PassCost:
    """Measures passes over chains of several lengths, a few rounds of them in turn.

    Takes some seconds; draws no random number and leaves nothing behind. What is kept is the convex
    curve nearest to the medians: a pass is bound by memory first and by arithmetic later, so that a
    node more never costs less than the one before, and the first of them are what matters most.
    """
    limit = backend.traits.positions
    room = limit.num_positions if limit is not None else _CONTEXTS[-1] + max(rows)
    rows = [count for count in rows if count < room] or [1]
    contexts = sorted({max(1, min(context, room - max(rows))) for context in _CONTEXTS})
    rounds: list[list[list[float]]] = []
    begin = time.perf_counter()
    cache = _cache(backend, contexts[-1] + bucket(max(rows)))
    warm_up = 1 if backend.captured is None else WARM_UP_PASSES
    for _ in range(warm_up + _ROUNDS):
        rounds.append(
            [[_seconds(backend, cache, n, context) for n in rows] for context in contexts]
        )
        if time.perf_counter() - begin > _SECONDS:
            break
    # the first rounds are a warm-up, of which the last counts only if there were no others
    medians = np.median(rounds[warm_up:] or rounds[-1:], axis=0)
    curves = [tuple(_convex(np.array(rows), own).tolist()) for own in medians]
    return PassCost(tuple(rows), tuple(contexts), tuple(curves))


def _convex(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Returns the rising convex curve nearest to measured seconds, by relative squares."""
    bends = [np.maximum(rows - bend, 0) for bend in (0, *rows[1:-1])]
    basis = np.stack([np.ones(len(rows)), *bends], axis=1)
    weights, _ = nnls(basis / seconds[:, None], np.ones(len(rows)))
    curve: np.ndarray = basis @ weights
    return curve


@torch.no_grad()
def _made_under_load(backend: TreeModel, cost: PassCost) -> bool:
    """Returns whether the cheapest pass of a table is well faster now; slower says nothing."""
    cache = _cache(backend, cost.contexts[0] + cost.rows[0])
    kept = cost.seconds[0][0]
    if backend.captured is not None:
        for _ in range(WARM_UP_PASSES):
            _seconds(backend, cache, cost.rows[0], cost.contexts[0])
    checks = max(1, min(_MOST_CHECKS, int(_CHECK_SECONDS / kept)))
    now = [_seconds(backend, cache, cost.rows[0], cost.contexts[0]) for _ in range(checks)]
    return float(np.median(now)) < _FASTER * kept


def _cache(backend: TreeModel, capacity: int) -> TreeCache:
    captured = backend.captured
    return (backend if captured is None else captured).new_cache(1, capacity)


def _seconds(backend: TreeModel, cache: TreeCache, count: int, context: int) -> float:
    cache.lengths[:] = [context]  # zeros, which cost what any other keys and values cost
    captured = backend.captured
    size = count if captured is None else bucket(count)
    tokens = torch.zeros(1, size, dtype=torch.int64)
    positions = context + torch.arange(size).unsqueeze(0)
    ancestors = causal_ancestors(1, size)
    begin = time.perf_counter()
    if captured is not None:
        logits, _ = captured.run(cache, tokens, positions, ancestors)
    else:
        logits = backend.forward(cache, tokens, positions, ancestors if size > 1 else None)
    if logits.device.type != "cpu":
        logits[0, 0, 0].item()  # waits for the device
    seconds = time.perf_counter() - begin
    cache.advance([0])
    return seconds


def _facts(backend: TreeModel) -> dict[str, Any]:
    device = backend.device
    recorded = {} if backend.captured is None else {"captured": True}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "model": type(backend.model).__name__,
        "config": hashlib.sha256(backend.model.config.to_json_string().encode()).hexdigest(),
        "dtype": str(backend.model.dtype),
        "attention": backend.attention or backend.traits.attention,
        "packed": None if backend.packed is None else backend.packed.formats,
        "fused_layers": 0 if backend.packed is None else len(backend.packed.fused),
        "direct": backend.direct is not None,
        "tree_attention": backend.tree_attention,
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "passes": _PASSES,
        **recorded,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    import platform

    return platform.processor() or platform.machine()
