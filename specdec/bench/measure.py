"""Measures one cell of a sweep: every prompt, turn by turn, step by step."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from specdec.bench.acceptance import make_policy
from specdec.bench.cells import SweepCell
from specdec.bench.decoding import decoding_arguments, pad_token_id, padded
from specdec.generator import SpeculativeGenerator
from specdec.prompts import Prompt, encode_chat
from specdec.random import RandomSource
from specdec.row_text import Step
from specdec.stats import PHASES, Counts, DecodeStats
from specdec.types import Budget, Drafter, DraftLaw, GrowPlan, Root, StepOutcome, TreePolicy


@dataclass(slots=True)
class Measured:
    """What a cell gave.

    Attributes:
        row: of the table: the cell's settings, counts and ratios over all prompts, and `timing`.
        steps: a row for each prompt, turn and step; the prefill and its token are left out. `ranks`
            are the places of the accepted nodes among their siblings, level by level.
        answers: a row for each prompt, in Spec-Bench's format: `new_tokens` count the prefill's
            token, `accept_lengths` are the tokens of each step, `wall_time` is in seconds and that
            of the whole call, whatever its batch size.
    """

    row: dict[str, Any]
    steps: list[dict[str, Any]]
    answers: list[dict[str, Any]]


@dataclass(slots=True)
class _Talk:
    """A conversation: what was said so far, and what each turn took."""

    prompt: Prompt
    messages: list[str] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    accept_lengths: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    @property
    def question_id(self) -> int | str:
        own = self.prompt.question_id
        return self.prompt.number if own is None else own

    def answer(self, cell: SweepCell) -> dict[str, Any]:
        choice = {
            "index": 0,
            "turns": self.messages[1::2],
            "decoding_steps": self.steps,
            "new_tokens": self.new_tokens,
            "wall_time": self.wall_s,
            "accept_lengths": self.accept_lengths,
        }
        return {
            "question_id": self.question_id,
            "category": self.prompt.category,
            "answer_id": f"{cell.key}-{self.prompt.number}",
            "model_id": cell.label,
            "choices": [choice],
            "tstamp": time.time(),
        }


def measure_cell(
    cell: SweepCell,
    model: Any,
    tokenizer: Any,
    drafter: str | Drafter | None,
    prompts: Sequence[Prompt],
    *,
    progress: Callable[[int], Any] = lambda _turns: None,
) -> Measured:
    """Runs a cell with one generator, its drafter and policy learning from prompt to prompt.

    The answer to a turn is put into the chat before the next turn is asked. Every prompt and turn
    has a seed of its own, so that its text depends on neither the batch nor the other prompts.

    Args:
        cell: the settings; `model`, `drafter` and `prompts` of it only name what is handed in.
        model: the target.
        tokenizer: the target's.
        drafter: a name, an object that nothing else uses, or None.
        prompts: in the order in which they are asked.
        progress: is told how many turns have been done.

    Raises:
        Whatever `SpeculativeGenerator` raises for these parts, and `generate` for these prompts.
    """
    policy: str | TreePolicy = cell.policy
    if cell.policy != "auto":
        policy = make_policy(cell.policy)
        if cell.max_depth is not None:
            policy = ShallowPolicy(policy, cell.max_depth)
    talks = [_Talk(prompt) for prompt in prompts]
    rows: list[dict[str, Any]] = []
    calls: list[DecodeStats] = []
    wall_s = 0.0
    with SpeculativeGenerator(
        model,
        tokenizer,
        drafter=drafter,
        policy=policy,
        verifier=cell.verifier,
        node_budget=cell.node_budget or 1,
        packed_weights=None if cell.packed_weights == "none" else cell.packed_weights,
    ) as generator:
        for first in range(0, len(talks), cell.batch_size):
            batch = talks[first : first + cell.batch_size]
            for turn in range(max(len(talk.prompt.turns) for talk in batch)):
                asked = [talk for talk in batch if turn < len(talk.prompt.turns)]
                wall_s += _ask(cell, generator, asked, turn, rows)
                assert generator.stats is not None
                calls.append(generator.stats)
                progress(len(asked))
    return Measured(
        _summary(cell, talks, calls, wall_s), rows, [talk.answer(cell) for talk in talks]
    )


def _ask(
    cell: SweepCell,
    generator: SpeculativeGenerator,
    talks: Sequence[_Talk],
    turn: int,
    rows: list[dict[str, Any]],
) -> float:
    """Asks one turn of a batch; returns the seconds of the call."""
    for talk in talks:
        talk.messages.append(talk.prompt.turns[turn])
        talk.steps.append(0)
    tokenizer = generator.tokenizer
    inputs = padded([encode_chat(tokenizer, t.messages)[0] for t in talks], pad_token_id(tokenizer))
    inputs = {name: tensor.to(generator.model.device) for name, tensor in inputs.items()}
    texts: list[list[int]] = [[] for _ in talks]
    arguments = decoding_arguments(cell.max_new_tokens, cell.temperature, cell.top_p)
    logging_s = 0.0
    begin = time.perf_counter()
    for step in generator.trace(seed=_seeds(cell, talks, turn), **inputs, **arguments):
        arrived = time.perf_counter()
        prefill = not texts[step.row]
        texts[step.row] += step.tokens
        if not prefill:
            talk = talks[step.row]
            talk.steps[turn] += 1
            talk.accept_lengths.append(len(step.tokens))
            counts = Counts()
            counts.record(step.tree.parent_list, step.path, len(step.tokens))
            rows.append(
                {
                    "cell": cell.key,
                    "prompt": talk.prompt.number,
                    "question_id": talk.question_id,
                    "category": talk.prompt.category,
                    "turn": turn,
                    "step": talk.steps[turn],
                    "drafted": counts.num_drafted,
                    "depth": max(step.tree.depth_list),
                    "tested": counts.num_tested,
                    "accepted": counts.num_accepted,
                    "emitted": counts.num_emitted,
                    "ranks": _ranks(step),
                    "tokens": step.tokens,
                }
            )
        del step  # its logits need not outlast the next pass
        logging_s += time.perf_counter() - arrived
    seconds = time.perf_counter() - begin - logging_s
    assert generator.stats is not None
    for talk, text, stats in zip(talks, texts, generator.stats.rows, strict=True):
        talk.messages.append(tokenizer.decode(text, skip_special_tokens=True).strip())
        talk.counts.add(stats)
        talk.new_tokens.append(stats.num_generated)
        talk.wall_s.append(seconds)
    return seconds


def _ranks(step: Step) -> list[int]:
    """Returns the place of each accepted node among its siblings, from the first level down."""
    children = step.tree.children
    parents = [0, *step.path][:-1]
    return [children[p].index(node) for p, node in zip(parents, step.path, strict=True)]


def _seeds(cell: SweepCell, talks: Sequence[_Talk], turn: int) -> list[int]:
    # by the number in the file, so that --limit and --batch-sizes leave a prompt's text alone
    return [(cell.seed << 32) + (talk.prompt.number << 8) + turn for talk in talks]


def _summary(
    cell: SweepCell, talks: Sequence[_Talk], calls: Sequence[DecodeStats], wall_s: float
) -> dict[str, Any]:
    total = Counts()
    for talk in talks:
        total.add(talk.counts)
    rows = [row for call in calls for row in call.rows]
    seconds = {phase: sum(call.seconds[phase] for call in calls) for phase in PHASES}
    generated = sum(row.num_generated for row in rows)
    return {
        "cell": cell.key,
        "status": "ok",
        **asdict(cell),
        "settings": calls[-1].settings,  # "auto" resolved
        "num_prompts": len(talks),
        "num_turns": len(rows),
        "num_prompt_tokens": sum(row.num_prompt_tokens for row in rows),
        "num_generated": generated,
        "target_passes": sum(call.target_passes for call in calls),
        "finish_reasons": dict(sorted(Counter(row.finish_reason for row in rows).items())),
        **total.to_dict(),
        "block_efficiency_error": _standard_error([talk.counts for talk in talks], total),
        "timing": {
            "wall_s": wall_s,
            "tokens_per_second": generated / wall_s,
            "seconds": seconds,
        },
    }


def _standard_error(prompts: Sequence[Counts], total: Counts) -> float | None:
    """Returns the ratio estimator's over prompts; None for one prompt, or without any step."""
    count = len(prompts)
    if count < 2 or not total.target_calls:
        return None
    mean = total.block_efficiency
    squares = sum((one.num_emitted - mean * one.target_calls) ** 2 for one in prompts)
    return math.sqrt(squares * count / (count - 1)) / total.target_calls


class ShallowPolicy:
    """A policy whose trees go no deeper than `max_depth`; its draws and its exactness are the same.

    Args:
        policy: grows the trees.
        max_depth: the deepest level, at least 1; the root has depth 0.
    """

    def __init__(self, policy: TreePolicy, max_depth: int) -> None:
        self.name = policy.name
        self.draws = policy.draws
        self._policy = policy
        self._max_depth = max_depth

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree of the policy under a budget cut in depth."""
        shallow = budget._replace(depth=min(budget.depth, self._max_depth))
        return self._policy.grow(law, root, shallow, random)

    def observe(self, outcome: StepOutcome) -> None:
        """Lets the policy learn."""
        self._policy.observe(outcome)
