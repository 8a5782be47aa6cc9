"""The decoding loop: one call, all its rows, from the prefill to the last token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import torch
from transformers import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from specdec.backend.cache import TreeCache
from specdec.backend.support import PositionLimit
from specdec.budget import NodeBudget
from specdec.call import Call
from specdec.drafting import Drafting
from specdec.multi_step import MultiStep
from specdec.native_verdicts import NativeVerdicts
from specdec.prefill import prefill_order
from specdec.random import RowStreams
from specdec.row_copies import row_copies
from specdec.row_text import Row, RowEnded, Scored, Step, TreeLogits
from specdec.rows import RowInput
from specdec.sampling import Prefix, ProcessedLaw
from specdec.stats import DecodeStats
from specdec.stopping import RowStopper
from specdec.target import Scores, TargetModel
from specdec.trees.tree import DraftTree
from specdec.types import Drafter, StepOutcome, TopTokens, TreePolicy, Verdict, Verifier


@dataclass(frozen=True, slots=True)
class Parts:
    """The replaceable parts of the loop; `drafter` None is plain decoding."""

    drafter: Drafter | None
    policy: TreePolicy
    verifier: Verifier
    budget: NodeBudget


class DecodeLoop:
    """Runs a prepared call.

    `steps` yields what each step committed; afterwards `rows` has every row's tokens. The loop
    owns nothing that outlives the call but what the drafter learns.

    Args:
        call: from `specdec.call.prepare`.
        inputs: the rows of the call.
        streams: two random sources for each row.
        parts: drafter, policy, verifier and budget.
        target: with the earlier turn, if any, already in its cache.
        stats: filled as the call goes on.
        vocab_size: of the model; a guess past it is an error.
        positions: where the text must end; None where positions are open-ended.
    """

    def __init__(
        self,
        call: Call,
        inputs: list[RowInput],
        streams: list[RowStreams],
        parts: Parts,
        target: TargetModel,
        stats: DecodeStats,
        *,
        vocab_size: int,
        positions: PositionLimit | None,
    ) -> None:
        self._call = call
        self._parts = parts
        self._target = target
        self._stats = stats
        self._positions = positions
        self._drafting = Drafting(
            parts, target.cache, greedy=call.greedy, vocab_size=vocab_size, positions=positions
        )
        device = call.input_ids.device
        count = len(inputs)
        details = bool(call.config.return_dict_in_generate)
        self.rows = [
            Row(
                index=index,
                offset=item.offset - len(item.visible_past),
                tokens=item.visible_past + item.tokens,
                num_new=len(item.tokens),
                prefix=Prefix(item.padding + item.visible_past + item.tokens, device),
                processors=LogitsProcessorList(
                    row_copies(call.processors, index, count, len(item.padding))
                ),
                stopper=RowStopper(
                    StoppingCriteriaList(row_copies(call.criteria, index, count, len(item.padding)))
                ),
                streams=row_streams,
                stats=stats.rows[index],
                positions=positions,
                keeps_scores=details and bool(call.config.output_scores),
                keeps_logits=details and bool(call.config.output_logits),
            )
            for index, (item, row_streams) in enumerate(zip(inputs, streams, strict=True))
        ]
        self._verdicts = NativeVerdicts(call, parts, stats)
        self._several = MultiStep.of(call, self.rows, parts, target, stats, self._verify)
        # rows in the order of the cache; the active ones come first
        self.places = list(self.rows)
        if not any(target.lengths):
            self.places = [self.rows[row] for row in prefill_order([i.tokens for i in inputs])]

    @property
    def cache(self) -> TreeCache:
        """The cache; finished rows keep their place in it, behind the active ones."""
        return self._target.cache

    @property
    def _active(self) -> list[Row]:
        return self.places[: len(self._target.lengths)]

    def steps(self) -> Iterator[list[Step]]:
        """Yields, for every step, what became of each row that was active in it.

        Of a lone row several steps may come together, in their order.

        Before an error, the tokens that were text when it was raised.
        """
        drafter = self._parts.drafter
        try:
            yield from self._delivered(self._prefill)
            while self._target.lengths:
                yield from self._delivered(self._step)
        finally:
            if drafter is not None:
                for row in self._active:
                    drafter.stop(row.index)
                    self._parts.budget.stop(row.index)

    def run_last_tokens(self) -> None:
        """Brings the last token of rows that ended before others into the cache.

        A cache has one width for all rows, so in the next turn that token counts as cached. A row
        at the end of its positions is left out: there is no next turn for it.
        """
        longest = max(len(row.generated) for row in self.rows)
        limit = self._positions
        behind = [
            len(row.generated) < longest
            and (limit is None or row.root_position < limit.num_positions)
            for row in self.places
        ]
        if any(behind):
            self._target.catch_up(
                [row.root_position for row in self.places],
                [row.tokens[-1] if b else None for row, b in zip(self.places, behind, strict=True)],
            )

    @staticmethod
    def _delivered(run: Callable[[list[Step]], None]) -> Iterator[list[Step]]:
        steps: list[Step] = []
        try:
            # not around a yield: what happens there is the caller's
            with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
                run(steps)
        finally:
            # also before an error, which then takes its way
            yield sorted(steps, key=lambda step: step.row)

    def _prefill(self, steps: list[Step]) -> None:
        drafter = self._parts.drafter
        rows = list(self._active)
        for row in rows:
            row.stats.num_prompt_tokens = row.offset + len(row.tokens)
        with self._stats.timed("prefill"):
            logits, prompt_rows = self._target.prefill([row.tokens[-row.num_new :] for row in rows])
            if drafter is not None:
                for row, guesses in zip(rows, prompt_rows, strict=True):
                    drafter.start(row.index, tuple(row.tokens), guesses)
        for row, row_logits in zip(rows, logits, strict=True):
            tree = DraftTree.root_only(row.tokens[-1])
            self._verify(row, TreeLogits(tree, row_logits.unsqueeze(0)), steps)
        self._retire()

    def _step(self, steps: list[Step]) -> None:
        """Runs a step of the active rows; of a lone one several, where it can."""
        active = list(self._active)
        if self._several is not None and self._several.run(active[0], steps):
            self._retire()
            return
        context = sum(self._target.lengths) / len(active)
        trees = self._trees(active, context)
        drafter, before = self._parts.drafter, self._pass_seconds
        learns = drafter is not None and (drafter.needs.every_step or self._parts.budget.learns())
        top_k = drafter.needs.node_top_k if drafter is not None and learns else 0
        scores = self._score(trees, top_k)
        all_logits = scores.of(trees)
        with self._stats.timed("verify"):
            tops = scores.top_tokens(trees, top_k)
        verdicts = self._verdicts.of(active, trees, all_logits)
        told = zip(active, trees, all_logits, tops, verdicts, strict=True)
        try:
            for row, tree, logits, top, verdict in told:
                self._verify(row, TreeLogits(tree, logits), steps, top, verdict)
        finally:
            for step in steps:
                self.rows[step.row].stats.record(step.tree.parent_list, step.path, len(step.tokens))
        with self._stats.timed("commit"):
            # the last token kept is the next root, or the end: either way it is not in the cache
            self._target.commit([step.path[: len(step.tokens) - 1] for step in steps])
        if drafter is not None:
            nodes = len(trees) * max(map(len, trees))
            self._parts.budget.scored(nodes, context, self._pass_seconds - before)
        if drafter is not None and learns:
            with self._stats.timed("observe"):
                self._learn(drafter, steps, scores, tops if top_k else [None] * len(steps))
        self._retire()

    def _trees(self, active: list[Row], context: float) -> list[DraftTree]:
        """Returns what is to be scored of each row behind `context` tokens on average."""
        with self._stats.timed("draft"):
            begin = time.perf_counter()
            trees = self._drafting.trees(active, context)
            rows = [row.index for row in active]
            return self._parts.budget.cut(rows, trees, context, time.perf_counter() - begin)

    def _score(self, trees: Sequence[DraftTree], top_k: int) -> Scores:
        """Runs the pass over the trees; `top_k` likeliest tokens are wanted behind each node."""
        with self._stats.timed("target"):
            upcoming = self._parts.budget.drafts_next(len(trees))
            # a greedy choice is the likeliest token, where nothing changes the logits
            select = max(top_k, int(self._call.greedy and not self._call.processors))
            scores = self._target.score(trees, probes=upcoming, top_k=select)
            self._stats.target_passes += 1
        return scores

    def _learn(
        self,
        drafter: Drafter,
        steps: list[Step],
        scores: Scores,
        tops: Sequence[TopTokens | None],
    ) -> None:
        """Tells drafter, policy and budget what became of the step's trees."""
        begin = time.perf_counter()
        outcomes = [
            _outcome(step, scores, place, top, self.rows[step.row].tokens)
            for place, (step, top) in enumerate(zip(steps, tops, strict=True))
        ]
        drafter.observe(outcomes)
        for outcome in outcomes:
            self._parts.policy.observe(outcome)
            self._parts.budget.observe(outcome)
        nodes = sum(len(step.tree) for step in steps)
        self._parts.budget.learned(nodes, time.perf_counter() - begin)

    @property
    def _pass_seconds(self) -> float:
        """Seconds of the passes so far; verifying waits for what a device has not done yet."""
        return self._stats.seconds["target"] + self._stats.seconds["verify"]

    def _verify(
        self,
        row: Row,
        scored: Scored,
        steps: list[Step],
        top: TopTokens | None = None,
        verdict: Verdict | None = None,
    ) -> None:
        """Makes text of a verdict, for which the verifier is asked if there is none yet.

        Adds to `steps` what became text, also when it raises.
        """
        tree, law = scored.tree, None
        step = Step(row.index, [], [], scored)
        try:
            with self._stats.timed("verify"), suppress(RowEnded):
                if verdict is None:
                    law = self._law(row, step, top)
                    verdict = self._parts.verifier.verify(tree, law, row.streams.verify)
                path, next_token = verdict
                emitted = [*(tree.token_list[node] for node in path), next_token]
                row.commit(step, law, path, emitted)
        finally:
            if step.tokens:
                # the verifier's path may go on behind the end of the text
                step.path = step.path[: len(step.tokens)]
                steps.append(step)
            if law is not None:
                self._stats.seconds["verify"] -= law.processor_seconds
                self._stats.seconds["processors"] += law.processor_seconds

    def _law(self, row: Row, step: Step, top: TopTokens | None) -> ProcessedLaw:
        """Returns the target's law at the nodes of a step's tree."""
        return ProcessedLaw(
            step.tree,
            step.logits,
            row.prefix,
            row.processors,
            greedy=self._call.greedy,
            root_position=row.root_position,
            ends=row.stopper.eos_token_ids,
            reach=partial(row.reach, step) if self._parts.verifier.walks_down else None,
            choices=None if top is None else top.choices,
        )

    def _retire(self) -> None:
        """Takes finished rows out of the batch."""
        for place in reversed(range(len(self._active))):
            if self.places[place].done:
                last = len(self._active) - 1
                self._target.cache.retire(place)
                if self._parts.drafter is not None:
                    self._parts.drafter.stop(self.places[place].index)
                    self._parts.budget.stop(self.places[place].index)
                self.places[place], self.places[last] = self.places[last], self.places[place]


def _outcome(
    step: Step, scores: Scores, place: int, top: TopTokens | None, tokens: Sequence[int]
) -> StepOutcome:
    """Returns what drafter, policy and budget learn of a row's step; `tokens` end with its own."""
    nodes = len(step.tree)
    root = len(tokens) - len(step.tokens) - 1
    return StepOutcome(
        step.row,
        step.tree,
        step.path,
        step.tokens,
        step.logits,
        None if scores.features is None else scores.features[place, :nodes],
        None if scores.probes is None else scores.probes[place, :nodes],
        top,
        tokens[root - 1] if root else None,
    )
