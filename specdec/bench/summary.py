"""What the runs of a comparison say together: ratios of sums, with intervals over prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from specdec.bench.generation import Run
from specdec.stats import Counts

OVERALL = "overall"
CONFIDENCE = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Summary:
    """A method over the prompts of one category, or of all.

    Attributes:
        method: its name.
        category: or "overall".
        prompts: how many.
        speedup: baseline seconds of all prompts together / the method's.
        speedup_interval: its 95 % interval, prompts resampled; None for fewer than two prompts.
        median: of the prompts' speed-ups; `low` and `high` are their 20 % and 80 % quantiles.
        slower: share of the prompts on which the method took longer than the baseline.
        tokens_per_second: of all prompts together.
        counts: of all prompts together, see `Run.counts`.
        draft_ms: milliseconds of drafting and learning a tree; None where the method does not tell.
        beside: share of the steps beside the target's passes, see `DecodeStats`; None likewise.
        identical: prompts with the baseline's tokens, None where it is not to be expected.
    """

    method: str
    category: str
    prompts: int
    speedup: float
    speedup_interval: tuple[float, float] | None
    median: float
    low: float
    high: float
    slower: float
    tokens_per_second: float
    counts: Counts
    draft_ms: float | None
    beside: float | None
    identical: int | None

    @property
    def block_efficiency(self) -> float:
        """Tokens a target call, over all prompts."""
        return self.counts.block_efficiency

    @property
    def nodes(self) -> float:
        """Draft nodes a target call."""
        calls = self.counts.target_calls
        return self.counts.num_drafted / calls if calls else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers, strings and lists; counts and ratios stand among the rest."""
        values = asdict(self)
        del values["counts"]
        low, high = values.pop("speedup_interval") or (None, None)
        interval = {"speedup_interval_low": low, "speedup_interval_high": high}
        return values | interval | {"nodes": self.nodes} | self.counts.to_dict()


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """Returns a summary for each method and category, "overall" last, in order of appearance."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        # a file's own category of that name is another thing
        category = f"{OVERALL} (category)" if run.category == OVERALL else run.category
        groups[category, run.method].append(run)
        groups[OVERALL, run.method].append(run)
    ordered = sorted(groups, key=lambda key: key[0] == OVERALL)
    return [_summary(method, category, groups[category, method]) for category, method in ordered]


def _summary(method: str, category: str, runs: Sequence[Run]) -> Summary:
    ratios = np.array([run.speedup for run in runs])
    seconds = np.array([run.seconds for run in runs])
    baseline = np.array([run.baseline_seconds for run in runs])
    low, median, high = np.quantile(ratios, [0.2, 0.5, 0.8])
    exact = [run.identical for run in runs if run.identical is not None]
    drafting = [run.draft_seconds for run in runs if run.draft_seconds is not None]
    counts = Counts()
    for run in runs:
        counts.add(run.counts)
    beside = sum(run.beside_seconds or 0.0 for run in runs)
    steps = sum(run.step_seconds or 0.0 for run in runs)
    draft_ms = None
    if drafting:
        draft_ms = 1000 * sum(drafting) / counts.target_calls if counts.target_calls else 0.0
    return Summary(
        method=method,
        category=category,
        prompts=len(runs),
        speedup=float(baseline.sum() / seconds.sum()),
        speedup_interval=ratio_interval(baseline, seconds),
        median=float(median),
        low=float(low),
        high=float(high),
        slower=float((ratios < 1).mean()),
        tokens_per_second=float(sum(run.num_tokens for run in runs) / seconds.sum()),
        counts=counts,
        draft_ms=draft_ms,
        beside=beside / steps if steps else None,
        identical=sum(exact) if exact else None,
    )


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float] | None:
    """Returns the percentile bootstrap interval of a ratio of sums, pairs resampled together.

    Args:
        numerators: ``[n]``, one for each prompt.
        denominators: ``[n]``, positive.
    """
    if len(numerators) < 2:
        return None
    found = bootstrap(
        (numerators, denominators),
        lambda above, below, axis=-1: above.sum(axis=axis) / below.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=0,
    ).confidence_interval
    return float(found.low), float(found.high)
