"""One row of a call: its text so far, and how the tokens of a step join it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import LogitsProcessorList

from specdec.backend.support import PositionLimit
from specdec.errors import ConfigError
from specdec.random import RowStreams
from specdec.sampling import Prefix, ProcessedLaw
from specdec.stats import RowStats
from specdec.stopping import RowStopper
from specdec.trees.tree import DraftTree

logger = logging.getLogger(__name__)


class RowEnded(Exception):  # noqa: N818 (a signal between row and loop, no error)
    """Ends the verification of a row: its text has ended."""


class Scored(Protocol):
    """A tree, and what the target said of it; either may be made when it is first asked for."""

    @property
    def tree(self) -> DraftTree:
        """The tree."""
        ...

    @property
    def logits(self) -> Tensor:
        """``[N, V]`` raw logits at its nodes, in the model's dtype."""
        ...


class TreeLogits(NamedTuple):
    """A tree and the raw logits of its nodes."""

    tree: DraftTree
    logits: Tensor


@dataclass(slots=True)
class Step:
    """What one step did to one row; for streaming, traces and drawings.

    Attributes:
        row: the row's number in the call.
        tokens: what became text.
        path: accepted nodes that became text, root not included.
        scored: the tree and its logits; as long as a step is kept, so are these, and those of steps
            that came together with it.
    """

    row: int
    tokens: list[int]
    path: list[int]
    scored: Scored

    @property
    def tree(self) -> DraftTree:
        """The scored tree."""
        return self.scored.tree

    @property
    def logits(self) -> Tensor:
        """``[N, V]`` raw logits at the tree's nodes, in the model's dtype."""
        return self.scored.logits

    @property
    def next_token(self) -> int | None:
        """The target's own token behind the path; None where the text ended before it."""
        return self.tokens[-1] if len(self.tokens) > len(self.path) else None

    def target_probs(self) -> list[float]:
        """Returns the model's probability of each node's token at its parent, 1.0 for the root.

        This is the softmax of the RAW logits: before the call's processors and its temperature, so
        not what the verifier compared with where there are any. Computed anew at each call.
        """
        tree = self.tree
        parents, tokens = tree.parent_list[1:], tree.token_list[1:]
        logits = self.logits
        log_sums = logits.float().logsumexp(dim=-1)[parents]
        return [1.0, *(logits[parents, tokens].float() - log_sums).exp().clamp(max=1).tolist()]


@dataclass(slots=True)
class Row:
    """A row's state. `tokens` starts at `offset`: an earlier turn's ids may be unknown.

    Tokens join one by one, and the criteria are asked for each before anything is asked about the
    next, as in `generate`. So a processor never runs behind a stop, and after an error the step
    holds what had become text.
    """

    index: int
    offset: int
    tokens: list[int]
    num_new: int
    prefix: Prefix
    processors: LogitsProcessorList
    stopper: RowStopper
    streams: RowStreams
    stats: RowStats
    positions: PositionLimit | None
    keeps_scores: bool
    keeps_logits: bool
    scores: list[Tensor] = field(default_factory=list)
    raw_logits: list[Tensor] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    done: bool = False

    @property
    def root_position(self) -> int:
        """Absolute position of the row's last token, the next root; padding left out."""
        return self.offset + len(self.tokens) - 1

    def reach(self, step: Step, law: ProcessedLaw, node: int) -> None:
        """Commits the path to a node about which a rule that walks down is asking.

        Raises:
            RowEnded: if the text ends on it.
        """
        path = step.tree.path_to(node)
        if len(path) > len(step.path):
            self.commit(step, law, path, step.tree.path_tokens(node))

    def commit(
        self, step: Step, law: ProcessedLaw | None, path: list[int], tokens: list[int]
    ) -> None:
        """Makes tokens text, those left out that already are.

        Args:
            step: grows with every token.
            law: of the step's tree; None where neither scores nor logits are kept.
            path: the accepted nodes, root not included.
            tokens: those of the path, and behind them the verifier's own where it is known.

        Raises:
            RowEnded: if the text ends with one of them; the others are dropped.
            ConfigError: if the verifier asked about a path that it did not accept.
        """
        if tokens[: len(step.tokens)] != step.tokens:
            raise ConfigError(
                f"the verifier asked what follows {step.tokens} and then took {tokens}; a rule "
                "that does so must not claim to walk down: walks_down = False"
            )
        step.path = path
        for place in range(len(step.tokens), len(tokens)):
            self._append(step, law, path[place - 1] if place else 0, tokens[place])
            if self.done:
                raise RowEnded

    def _append(self, step: Step, law: ProcessedLaw | None, node: int, token: int) -> None:
        if law is not None and self.keeps_scores:
            self.scores.append(law.scores(node))
        if law is not None and self.keeps_logits:
            self.raw_logits.append(law.raw(node))
        self.prefix.extend([token])
        self.tokens.append(token)
        self.generated.append(token)
        step.tokens.append(token)
        self.stats.num_generated += 1
        # a criterion that raises finds the token in the text, as in `generate`
        if self.stopper.stops(self.prefix, token, self.scores if self.keeps_scores else None):
            self.done = True
            self.stats.finish_reason = self.stopper.reason(token, self.prefix.length)
        elif self.positions is not None and self.root_position >= self.positions.num_positions:
            self.done = True
            self.stats.finish_reason = "positions"
            logger.warning(
                "row %d stopped after %d new tokens: the model's %d %s positions end here",
                self.index,
                len(self.generated),
                *self.positions,
            )
