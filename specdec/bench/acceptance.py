"""Block efficiency by policy and verifier: on a real model, and on a synthetic pair of laws."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specdec import SpeculativeGenerator
from specdec.bench.synthetic import SyntheticDraft, SyntheticTarget
from specdec.build import POLICIES, VERIFIERS, build_policy, build_verifier
from specdec.errors import ConfigError
from specdec.random import row_streams
from specdec.testing.toys import ToyLoop
from specdec.types import Budget, Drafter, Draw, TreePolicy

_VOCAB_SIZE = 64
_SHARPNESS = 2.5  # of the synthetic target: its likeliest token has about .4
_TEXT = 50  # steps of a synthetic text

# the drawn forms of policies that can choose or draw
DRAWN_FORMS = {"chain": Draw.WOR, "static": Draw.WOR}


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table.

    Attributes:
        policy: name, with "(drawn)" behind it for the drawn form of a policy that has both.
        verifier: name.
        temperature: of the target; the drafter follows where it can.
        node_budget: draft nodes a tree.
        block_efficiency: tokens a target call.
        error: its standard error.
        steps: target calls.
    """

    policy: str
    verifier: str
    temperature: float
    node_budget: int
    block_efficiency: float
    error: float
    steps: int


def declared_pairs() -> list[tuple[str, str]]:
    """Returns every (policy, verifier) that declare each other, `block` with chains only."""
    names = [*POLICIES, *(f"{name} (drawn)" for name in DRAWN_FORMS)]
    return [
        (policy, verifier)
        for policy in sorted(names)
        for verifier in VERIFIERS
        if make_policy(policy).draws <= build_verifier(verifier).accepts
        and (verifier != "block" or policy.startswith("chain"))
    ]


def make_policy(name: str) -> TreePolicy:
    """Returns a new policy for a name of `declared_pairs`. Raises ConfigError for another one."""
    plain = name.removesuffix(" (drawn)")
    if plain == name:
        return build_policy(name)
    if plain not in DRAWN_FORMS:
        raise ConfigError(f"unknown policy {name!r}; drawn forms have: {', '.join(DRAWN_FORMS)}")
    from specdec import trees

    made: TreePolicy = getattr(trees, plain.capitalize())(draw=DRAWN_FORMS[plain])
    return made


def distinct(pairs: Iterable[tuple[str, str]], temperature: float) -> Iterator[tuple[str, str]]:
    """Yields the pairs that can differ: at temperature 0 every rule follows the argmax."""
    seen: set[str] = set()
    for policy, verifier in pairs:
        if temperature > 0.0 or policy not in seen:
            seen.add(policy)
            yield policy, verifier


def synthetic_cell(
    policy: str,
    verifier: str,
    temperature: float,
    node_budget: int,
    *,
    distance: float,
    texts: int = 12,
) -> Cell:
    """Measures a pair on `SyntheticTarget` and `SyntheticDraft`; all cells see the same laws."""
    target = SyntheticTarget(_VOCAB_SIZE, 1, sharpness=_SHARPNESS, temperature=temperature)
    draft = SyntheticDraft(target, distance, temperature=temperature)
    loop = ToyLoop(
        make_policy(policy),
        build_verifier(verifier),
        target,
        draft,
        Budget(node_budget, node_budget),
        learn=True,
    )
    means = []
    for text in range(texts):
        streams, emitted = row_streams(text, 0), 0
        prefix: tuple[int, ...] = (text, 0)
        for _ in range(_TEXT):
            tokens = loop.step(prefix, streams)
            emitted += len(tokens)
            prefix += tokens
        means.append(emitted / _TEXT)
    return _cell(policy, verifier, temperature, node_budget, means, [_TEXT] * texts)


def model_cell(
    policy: str,
    verifier: str,
    temperature: float,
    node_budget: int,
    *,
    model: Any,
    drafter: str | Drafter,
    prompts: Sequence[torch.Tensor],
    max_new_tokens: int,
) -> Cell:
    """Measures a pair on a model: one warm drafter over all prompts, the seed fixed."""
    generator = SpeculativeGenerator(
        model,
        drafter=drafter,
        policy=make_policy(policy),
        verifier=verifier,
        node_budget=node_budget,
    )
    generator.close()  # a drafter object starts anew in every cell
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    arguments = sampling if temperature > 0.0 else {"do_sample": False}
    means, steps = [], []
    for number, ids in enumerate(prompts):
        generator.generate(ids, max_new_tokens=max_new_tokens, seed=number, **arguments)
        assert generator.stats is not None
        totals = generator.stats.totals
        if totals.target_calls:
            means.append(totals.block_efficiency)
            steps.append(totals.target_calls)
    return _cell(policy, verifier, temperature, node_budget, means, steps)


def _cell(
    policy: str,
    verifier: str,
    temperature: float,
    node_budget: int,
    means: Sequence[float],
    steps: Sequence[int],
) -> Cell:
    """Returns the cell; its error is the ratio estimator's over texts."""
    total = sum(steps)
    mean = sum(m * n for m, n in zip(means, steps, strict=True)) / total
    deviations = [n * (m - mean) for m, n in zip(means, steps, strict=True)]
    spread = statistics.pstdev(deviations) if len(means) > 1 else math.nan
    error = spread * math.sqrt(len(means)) / total
    return Cell(policy, verifier, temperature, node_budget, mean, error, total)
