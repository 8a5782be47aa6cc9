"""Toy targets and drafters over a few tokens, and the decoding loop around them, in float64.

`ToyLoop` takes the production policy and verifier through the steps of the real loop. Its
`output_law` is exact, and so is the target's own law that it must equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from specdec.errors import ConfigError
from specdec.random import RowStreams
from specdec.testing.enumerate import Tape, enumerate_law, independent_streams
from specdec.trees.grow import grow_trees
from specdec.trees.tree import DraftTree
from specdec.types import (
    Budget,
    DraftLaw,
    LawRows,
    Root,
    StepOutcome,
    TargetLaw,
    TreePolicy,
    Verifier,
)

Tokens = tuple[int, ...]
Processor = Callable[[Sequence[int], Tensor], Tensor]


def random_logits(vocab_size: int, seed: Sequence[int], sharpness: float) -> Tensor:
    """Returns ``[vocab_size]`` float64 normal logits times `sharpness`, the same for a seed."""
    noise = np.random.default_rng(list(seed)).standard_normal(vocab_size)
    return torch.from_numpy(noise * sharpness)


def repetition_penalty(penalty: float) -> Processor:
    """Returns the rule of Keskar et al. (arXiv 1909.05858) against tokens of the prefix."""

    def process(prefix: Sequence[int], logits: Tensor) -> Tensor:
        seen = torch.tensor(sorted(set(prefix)))
        logits = logits.clone()
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        return logits

    return process


def keep_top(count: int) -> Processor:
    """Returns the rule that leaves the `count` largest logits, and minus infinity elsewhere."""

    def process(prefix: Sequence[int], logits: Tensor) -> Tensor:
        del prefix
        kept = torch.full_like(logits, -torch.inf)
        top = torch.topk(logits, count).indices
        kept[top] = logits[top]
        return kept

    return process


class ToyTarget:
    """A target with a random table of logits.

    Args:
        vocab_size: number of tokens.
        seed: of the table.
        order: how many tokens of the prefix the raw logits depend on; None for all.
        sharpness: standard deviation of the logits.
        processors: what the user's logits processors are in the real loop.
        greedy: whether the law is the point mass at the argmax.
    """

    def __init__(
        self,
        vocab_size: int = 3,
        seed: int = 0,
        *,
        order: int | None = None,
        sharpness: float = 1.0,
        processors: Sequence[Processor] = (),
        greedy: bool = False,
    ) -> None:
        self.vocab_size = vocab_size
        self.greedy = greedy
        self._seed = seed
        self._order = order
        self._sharpness = sharpness
        self._processors = tuple(processors)
        self._scores: dict[tuple[Tokens, Tokens], Tensor] = {}

    def logits(self, prefix: Tokens) -> Tensor:
        """Returns ``[V]`` raw logits of the token after `prefix`."""
        context = prefix if self._order is None else prefix[len(prefix) - self._order :]
        return random_logits(self.vocab_size, (0, self._seed, *context), self._sharpness)

    def scores(self, prefix: Tokens, seen: Tokens | None = None) -> Tensor:
        """Returns ``[V]`` processed logits; `seen` is what processors see, if not the prefix."""
        seen = prefix if seen is None else seen
        if (prefix, seen) not in self._scores:
            scores = self.logits(prefix)
            for process in self._processors:
                scores = process(seen, scores)
            self._scores[prefix, seen] = scores
        return self._scores[prefix, seen]

    def probs(self, prefix: Tokens, seen: Tokens | None = None) -> Tensor:
        """Returns ``[V]`` probabilities of the token after `prefix`."""
        scores = self.scores(prefix, seen)
        if not self.greedy:
            return torch.softmax(scores, dim=-1)
        point = torch.zeros_like(scores)
        point[int(torch.argmax(scores))] = 1.0
        return point

    def text_law(self, prefix: Tokens, length: int) -> dict[Tokens, float]:
        """Returns the law of the next `length` tokens."""
        return self.extend_law({(): 1.0}, prefix, length)

    def extend_law(
        self, law: dict[Tokens, float], prefix: Tokens, length: int
    ) -> dict[Tokens, float]:
        """Returns the law of texts of one length, each text going on by the target's own law."""
        law = dict(law)
        for shorter in range(length):
            for text in [t for t in law if len(t) == shorter]:
                mass = law.pop(text)
                for token, prob in enumerate(self.probs(prefix + text).tolist()):
                    if prob > 0.0:
                        longer = (*text, token)
                        law[longer] = law.get(longer, 0.0) + mass * prob
        return law


class ToyTargetLaw:
    """The toy target's law at the nodes of one tree; a `TargetLaw`.

    Attributes:
        asked: the nodes that were asked for, in order.
    """

    def __init__(self, target: ToyTarget, tree: DraftTree, committed: Tokens) -> None:
        self.greedy = target.greedy
        self.asked: list[int] = []
        self._target = target
        self._tree = tree
        self._committed = committed

    def prefix(self, node: int) -> Tokens:
        """Returns every token up to and including the node's."""
        return (*self._committed, *self._tree.path_tokens(node))

    def seen(self, node: int) -> Tokens:
        """Returns the prefix that processors see."""
        return self.prefix(node)

    def position(self, node: int) -> int:
        """Returns the absolute position of the token emitted after `node`."""
        return len(self.prefix(node))

    def scores(self, node: int) -> Tensor:
        """Returns ``[V]`` float64 processed logits."""
        self.asked.append(node)
        return self._target.scores(self.prefix(node), self.seen(node))

    def row(self, node: int) -> Tensor:
        """Returns ``[V]`` float64 probabilities."""
        self.asked.append(node)
        return self._target.probs(self.prefix(node), self.seen(node))

    def argmax(self, node: int) -> int:
        """Returns the most probable token, the lowest id among equals."""
        return int(torch.argmax(self.scores(node)))


class ToyDraft:
    """A drafter with a random table of laws over the next token, given the whole prefix.

    Args:
        vocab_size: number of tokens.
        seed: of the table.
        sharpness: standard deviation of the logits.
        support: how many tokens a law names; None for all.
        sparse: whether laws come as ids and log-probabilities, with an entry of padding at the end.
        known_length: prefixes longer than this get a law that names no token.
    """

    def __init__(
        self,
        vocab_size: int = 3,
        seed: int = 0,
        *,
        sharpness: float = 1.0,
        support: int | None = None,
        sparse: bool = False,
        known_length: int | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.sparse = sparse
        self._seed = seed
        self._sharpness = sharpness
        self._support = vocab_size if support is None else support
        self._known_length = known_length
        self._log_probs: dict[Tokens, Tensor] = {}

    def logits(self, prefix: Tokens) -> Tensor:
        """Returns ``[V]`` unnormalised logits of the law after `prefix`."""
        return random_logits(self.vocab_size, (1, self._seed, *prefix), self._sharpness)

    def log_probs(self, prefix: Tokens) -> Tensor:
        """Returns ``[V]`` float64 log-probabilities of the law after `prefix`."""
        if prefix not in self._log_probs:
            logits = keep_top(self._support)(prefix, self.logits(prefix))
            row = torch.log_softmax(logits, dim=-1)
            if self._known_length is not None and len(prefix) > self._known_length:
                row = torch.full_like(row, -torch.inf)
            self._log_probs[prefix] = row
        return self._log_probs[prefix]

    def law(self, prefix: Tokens) -> ToyLaw:
        """Returns the law to grow a tree from, the last token of `prefix` being the root."""
        return ToyLaw(self, prefix)


class ToyLaw:
    """A `DraftLaw` over the table of a `ToyDraft`; a new handle for every `extend`."""

    def __init__(self, draft: ToyDraft, prefix: Tokens) -> None:
        self._draft = draft
        self._prefixes = [prefix]

    def extend(self, parent: int, token: int) -> int:
        """Returns a new handle for `parent` followed by `token`."""
        self._prefixes.append((*self._prefixes[parent], token))
        return len(self._prefixes) - 1

    def rows(self, handles: Sequence[int]) -> LawRows:
        """Returns the law at each handle."""
        dense = torch.stack([self._draft.log_probs(self._prefixes[handle]) for handle in handles])
        if not self._draft.sparse:
            return LawRows(dense)
        values, ids = torch.sort(dense, dim=-1, descending=True, stable=True)
        padded = torch.cat([values, torch.full_like(values[:, :1], -torch.inf)], dim=-1)
        ids = torch.cat([ids, torch.full_like(ids[:, :1], -1)], dim=-1)
        return LawRows(padded, ids.masked_fill(padded == -torch.inf, -1))


def expand(requests: Sequence[tuple[DraftLaw, Sequence[int]]]) -> list[LawRows]:
    """Answers the requests of one level, as `Drafter.expand` does."""
    return [law.rows(handles) for law, handles in requests]


@dataclass(frozen=True)
class ToyLoop:
    """The decoding loop of one row, around production policy and verifier.

    Attributes:
        policy: grows the trees.
        verifier: accepts.
        target: gives the true law.
        draft: guesses.
        budget: of every step.
        target_law: makes the target's law over a tree; a test may put a mutant here.
        learn: whether the policy observes what became of its trees, as in the real loop; what is
            enumerated must not change between two runs, so there it does not.
    """

    policy: TreePolicy
    verifier: Verifier
    target: ToyTarget
    draft: ToyDraft
    budget: Budget
    target_law: Callable[[ToyTarget, DraftTree, Tokens], TargetLaw] = ToyTargetLaw
    learn: bool = False

    def grow(self, prefix: Tokens, streams: RowStreams) -> DraftTree:
        """Returns the tree of one step."""
        law = self.draft.law(prefix)
        root = Root(prefix[-1], len(prefix) - 1, self.target.greedy)
        plan = self.policy.grow(law, root, self.budget, streams.draft)
        return grow_trees([(law, plan)], expand)[0]

    def step(self, prefix: Tokens, streams: RowStreams) -> Tokens:
        """Returns the tokens that one step emits after `prefix`.

        Raises:
            ConfigError: if the tree holds draws that the verifier does not accept.
        """
        tree = self.grow(prefix, streams)
        refused = tree.kinds - self.verifier.accepts
        if refused:
            names = ", ".join(sorted(draw.name for draw in refused))
            raise ConfigError(f"verifier {self.verifier.name} does not accept {names} draws")
        target = self.target_law(self.target, tree, prefix)
        verdict = self.verifier.verify(tree, target, streams.verify)
        emitted = (*(tree.token_list[node] for node in verdict.path), verdict.next_token)
        if self.learn:
            self.policy.observe(StepOutcome(0, tree, verdict.path, emitted, torch.empty(0)))
        return emitted

    def text(self, prefix: Tokens, streams: RowStreams, length: int) -> Tokens:
        """Returns the first `length` tokens after `prefix`, all steps with the same streams."""
        text: Tokens = ()
        while len(text) < length:
            text += self.step(prefix + text, streams)
        return text[:length]

    def output_law(
        self,
        prefix: Tokens,
        budgets: Sequence[Budget] | None = None,
        *,
        joint: bool = False,
        streams: Callable[[Tape], RowStreams] = independent_streams,
    ) -> dict[Tokens, float]:
        """Returns the law of everything that consecutive steps emit, texts unequally long.

        Args:
            prefix: the committed tokens before the first step.
            budgets: of each step; None for two steps with the loop's own.
            joint: whether all steps are enumerated as one run with one pair of streams, so that
                noise used twice, or anything else that passes from step to step, shows in the law.
                Otherwise runs that agree in their text are merged between steps, which is cheap.
            streams: makes the sources of a row.
        """
        loops = [replace(self, budget=b) for b in budgets or (self.budget, self.budget)]

        def run_all(sources: RowStreams) -> Tokens:
            text: Tokens = ()
            for loop in loops:
                text += loop.step(prefix + text, sources)
            return text

        if joint:
            return enumerate_law(run_all, streams)
        law: dict[Tokens, float] = {(): 1.0}
        for loop in loops:
            longer: dict[Tokens, float] = {}
            for text, mass in law.items():
                step_law = enumerate_law(partial(loop.step, prefix + text), streams)
                for emitted, weight in step_law.items():
                    key = text + emitted
                    longer[key] = longer.get(key, 0.0) + mass * weight
            law = longer
        return law

    def error(
        self,
        prefix: Tokens,
        budgets: Sequence[Budget] | None = None,
        *,
        joint: bool = False,
        streams: Callable[[Tape], RowStreams] = independent_streams,
    ) -> float:
        """Returns the total variation between the text's law and the target's own.

        Texts are brought to the length of the longest by the target's law: the emitted tokens
        must follow the target's law whatever their number. Arguments as for `output_law`.
        """
        law = self.output_law(prefix, budgets, joint=joint, streams=streams)
        length = max(map(len, law))
        extended = self.target.extend_law(law, prefix, length)
        return total_variation(extended, self.target.text_law(prefix, length))


def total_variation(law: dict[Tokens, float], other: dict[Tokens, float]) -> float:
    """Returns half the sum of absolute differences of two laws."""
    return 0.5 * sum(abs(law.get(key, 0.0) - other.get(key, 0.0)) for key in law.keys() | other)
