"""What a call did: integer counts and seconds. Ratios are properties, formed when asked for.

Counts leave out the prefill and the token it gives, so plain decoding has block efficiency 1.000.
Tokens cut off by a stop (end of sequence, stop string, length) are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

_KEPT = {
    "packed_weights": "packed weights (packed_weights=None leaves them out)",
    "drafter": "the drafter's tables",
}
PHASES = ("prefill", "draft", "target", "processors", "verify", "commit", "observe")


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def _add_at(counts: list[int], index: int, amount: int = 1) -> None:
    counts.extend([0] * (index + 1 - len(counts)))
    counts[index] += amount


@dataclass(slots=True)
class Counts:
    """The counts of one row, or of all rows of a call added up.

    Attributes:
        num_emitted: tokens kept after the first one.
        target_calls: trees scored; a batch of B rows scored in one pass counts B.
        num_drafted: draft nodes scored, roots not included.
        num_tested: draft nodes the verifier decided on: at every node it visited the children in
            their order, up to the one it took, or all of them.
        num_accepted: draft nodes that became text.
        tested_by_depth: steps that had a node to test at depth 1, 2, ... and got that far.
        accepted_by_depth: steps that accepted one there.
        acceptance_histogram: steps by the number of draft nodes they accepted: 0, 1, 2, ...
    """

    num_emitted: int = 0
    target_calls: int = 0
    num_drafted: int = 0
    num_tested: int = 0
    num_accepted: int = 0
    tested_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    acceptance_histogram: list[int] = field(default_factory=list)

    @property
    def block_efficiency(self) -> float:
        """Tokens emitted for each target call after the prefill, bonus token included."""
        return _ratio(self.num_emitted, self.target_calls)

    @property
    def mean_acceptance_length(self) -> float:
        """vLLM's name for `block_efficiency`."""
        return self.block_efficiency

    @property
    def acceptance_rate(self) -> float:
        """Accepted draft nodes / tested draft nodes."""
        return _ratio(self.num_accepted, self.num_tested)

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted draft nodes / all draft nodes."""
        return _ratio(self.num_accepted, self.num_drafted)

    @property
    def acceptance_by_depth(self) -> list[float]:
        """How often a node was accepted at depth 1, 2, ..., given that one was tested there."""
        pairs = zip(self.accepted_by_depth, self.tested_by_depth, strict=True)
        return [_ratio(accepted, tested) for accepted, tested in pairs]

    def record(self, parents: Sequence[int], path: Sequence[int], num_emitted: int) -> None:
        """Counts one step of one row.

        Args:
            parents: of the tree's nodes, as `DraftTree.parent_list`.
            path: the accepted nodes that were kept.
            num_emitted: tokens that became text.
        """
        self.target_calls += 1
        self.num_emitted += num_emitted
        self.num_drafted += len(parents) - 1
        self.num_accepted += len(path)
        _add_at(self.acceptance_histogram, len(path))
        children_of: dict[int, list[int]] = {node: [] for node in (0, *path)}
        for child, parent in enumerate(parents):
            if parent in children_of:
                children_of[parent].append(child)
        for depth, children in enumerate(children_of.values()):
            # where a stop cut the path short, the verifier's next decision did not become text
            if not children or num_emitted <= depth:
                break
            taken = path[depth] if depth < len(path) else None
            self.num_tested += children.index(taken) + 1 if taken else len(children)
            _add_at(self.tested_by_depth, depth)
            _add_at(self.accepted_by_depth, depth, int(taken is not None))

    def add(self, other: Counts) -> None:
        """Adds another row's counts."""
        for name in ("num_emitted", "target_calls", "num_drafted", "num_tested", "num_accepted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("tested_by_depth", "accepted_by_depth", "acceptance_histogram"):
            for index, amount in enumerate(getattr(other, name)):
                _add_at(getattr(self, name), index, amount)

    def to_dict(self) -> dict[str, Any]:
        """Returns counts and ratios as plain numbers and lists."""
        counts = {name: getattr(self, name) for name in self.__slots__}
        ratios = (
            "block_efficiency",
            "acceptance_rate",
            "draft_acceptance_rate",
            "acceptance_by_depth",
        )
        return counts | {name: getattr(self, name) for name in ratios}


@dataclass(slots=True)
class RowStats(Counts):
    """One row's counts, and how it went.

    Attributes:
        num_prompt_tokens: real tokens of the prompt, an earlier turn's cache included.
        num_generated: tokens added to the prompt, the prefill's token included.
        finish_reason: "eos", "length", "criterion" (a stop string or any other criterion),
            "positions" (a learned position table ran out), or "" while it is running.
    """

    num_prompt_tokens: int = 0
    num_generated: int = 0
    finish_reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain numbers, lists and strings."""
        own = ("num_prompt_tokens", "num_generated", "finish_reason")
        return {name: getattr(self, name) for name in (*Counts.__slots__, *own)} | {
            "block_efficiency": self.block_efficiency,
            "acceptance_rate": self.acceptance_rate,
        }


class _Timed:
    """Adds the time spent inside to a phase; a class, as a generator takes more calls."""

    __slots__ = ("_begin", "_phase", "_seconds")

    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self._seconds, self._phase = seconds, phase

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._phase] += time.perf_counter() - self._begin


class DecodeStats:
    """Counts and times of one call; `rows[i]` has the counts of row i.

    Attributes:
        rows: one `RowStats` for each row of the (expanded) batch.
        target_passes: forward passes after the prefill; one serves all active rows.
        seconds: seconds spent in each of `PHASES`.
        settings: the parts in use: drafter, policy, verifier, node_budget.
        kept_bytes: what stands beside the model between calls: "packed_weights", copies of its
            weights in another layout, and "drafter", its tables when they are full.
    """

    def __init__(
        self,
        num_rows: int = 0,
        settings: dict[str, Any] | None = None,
        kept_bytes: dict[str, int] | None = None,
    ) -> None:
        self.rows = [RowStats() for _ in range(num_rows)]
        self.target_passes = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.settings = settings or {}
        self.kept_bytes = kept_bytes or {}

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Adds the time spent inside to a phase."""
        return _Timed(self.seconds, phase)

    @property
    def step_seconds(self) -> float:
        """What the steps took, the prefill and the user's processors left out."""
        return sum(self.seconds.values()) - self.seconds["prefill"] - self.seconds["processors"]

    @property
    def beside_seconds(self) -> float:
        """What of it is beside the target's passes: drafting, verifying, committing, learning."""
        return self.step_seconds - self.seconds["target"]

    @property
    def totals(self) -> Counts:
        """All rows' counts added up."""
        total = Counts()
        for row in self.rows:
            total.add(row)
        return total

    @property
    def total_seconds(self) -> float:
        """All phases, the prefill included."""
        return sum(self.seconds.values())

    @property
    def decode_seconds(self) -> float:
        """All phases after the prefill."""
        return self.total_seconds - self.seconds["prefill"]

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all rows for each second, the prefill included."""
        return _ratio(sum(row.num_generated for row in self.rows), self.total_seconds)

    @property
    def overhead_fraction(self) -> float:
        """Share of a step that is ours: draft, verify, commit and observe.

        The user's processors are left out of both sides of the ratio.
        """
        own = sum(self.seconds[phase] for phase in ("draft", "verify", "commit", "observe"))
        return _ratio(own, own + self.seconds["target"])

    def __getattr__(self, name: str) -> Any:
        # counts and ratios of the whole call read like those of a row
        if name.startswith("_") or not hasattr(Counts, name):
            raise AttributeError(f"DecodeStats has no attribute {name!r}")
        return getattr(self.totals, name)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain numbers, lists and strings, ready for JSON."""
        return {
            "settings": self.settings,
            **self.totals.to_dict(),
            "target_passes": self.target_passes,
            "tokens_per_second": self.tokens_per_second,
            "overhead_fraction": self.overhead_fraction,
            "seconds": dict(self.seconds),
            "kept_bytes": dict(self.kept_bytes),
            "rows": [row.to_dict() for row in self.rows],
        }

    def __repr__(self) -> str:
        return (
            f"DecodeStats(num_emitted={self.num_emitted}, target_calls={self.target_calls}, "
            f"block_efficiency={self.block_efficiency:.3f}, "
            f"acceptance_rate={self.acceptance_rate:.3f}, "
            f"tokens_per_second={self.tokens_per_second:.1f})"
        )

    def explain(self) -> str:
        """Returns a paragraph in plain words: where the time went, and what would help."""
        total = self.totals
        if not total.target_calls:
            return "Nothing was decoded after the prefill, so there is nothing to explain yet."
        parts = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        shares = {
            phase: _ratio(seconds, self.total_seconds) for phase, seconds in self.seconds.items()
        }
        spent = ", ".join(
            f"{phase} {share:.0%}"
            for phase, share in sorted(shares.items(), key=lambda item: -item[1])
            if share >= 0.005
        )
        sentences = [
            f"With {parts or 'the default parts'}, {total.num_emitted} tokens took "
            f"{total.target_calls} target calls: block efficiency {total.block_efficiency:.2f} "
            f"(plain decoding has 1.00).",
            f"Of {total.num_drafted} draft nodes {total.num_accepted} became text "
            f"({total.draft_acceptance_rate:.0%}); of those the verifier came to, "
            f"{total.acceptance_rate:.0%}.",
            f"The {self.total_seconds:.2f} s went to {spent}.",
            *self._memory(),
            self._advice(total, shares),
        ]
        return " ".join(sentences)

    def _memory(self) -> list[str]:
        kept = [
            f"{self.kept_bytes[name] / 1e6:.0f} MB of {words}"
            for name, words in _KEPT.items()
            if self.kept_bytes.get(name)
        ]
        return [f"Beside the model stand {' and '.join(kept)}."] if kept else []

    def _advice(self, total: Counts, shares: dict[str, float]) -> str:
        per_step = _ratio(total.num_drafted, total.target_calls)
        if total.num_drafted == 0:
            return "Nothing was drafted: a drafter would let one pass give more than one token."
        if shares["processors"] > 0.2:
            return (
                "The logits processors take a large share; they run once for each emitted token, "
                "as in plain decoding, so a cheaper processor helps and another drafter does not."
            )
        if shares["prefill"] > 0.5:
            return "Most of the time is the prefill, which no drafter can shorten."
        if self.overhead_fraction > 0.1:
            return (
                "Drafting and bookkeeping are dear here: a cheaper drafter or a smaller tree helps."
            )
        if total.block_efficiency < 1.2 and per_step > 4:
            return (
                f"Few of the {per_step:.0f} nodes a step are accepted: a smaller node_budget makes "
                "each pass cheaper, another drafter may guess better."
            )
        return (
            "The target's passes dominate, as they should; a larger node_budget pays as long as a "
            "pass over more rows costs little more."
        )
