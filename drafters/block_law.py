"""What drafters that guess a whole block in one pass share: the laws, and the steps of a block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from specdec.drafters.base import BaseDrafter
from specdec.errors import ConfigError
from specdec.kernels.top_k_rows import top_k_rows
from specdec.types import DraftContext, DraftLaw, LawRows

ORDERS = ("left_to_right", "confident")
_NO_TOKEN = -1


class Guess(NamedTuple):
    """What a pass says of the tokens of one block, k of them, the anchor not counted.

    Attributes:
        logits: ``[k, Vd]`` of each token, the tokens between the anchor and it unknown or given.
        states: ``[k, D]`` of the slots that predict them; None if nobody asks for them.
    """

    logits: Tensor
    states: Tensor | None = None


class BlockDrafter(BaseDrafter, ABC):
    """Fills a block of masks behind the root; a node's law is that of its depth.

    A block takes one denoising step or several. With one, the law at a node is the slot's own, or
    the slot's and the previous token's where there is such a bias: either way a law of the next
    token given the path, so that drawing from it is lossless. With several steps there are two
    orders:

    - ``"left_to_right"``: the block is cut into `num_steps` runs of slots, and a run is guessed
      with the tokens of the node's own path given. These are again laws given the path.
    - ``"confident"``: each step gives the tokens it is surest of, wherever they stand, and the
      others are guessed anew with these given. The law of a token is that of the step that gave
      it. What was given is always the most probable token and never drawn, so these rows are fixed
      before a policy draws from them, which keeps them lossless; but they are conditioned on tokens
      to the right that the text need not have, hence `honest` is False. (Tokens DRAWN in such an
      order, and tested with the law of their step, are not lossless: TV 0.06 on a toy.)

    Subclasses give the passes (`_guess`), and may let a slot's law depend on the token before it.

    Args:
        num_steps: denoising steps a block.
        order: of several steps.
        num_candidates: tokens a row names at most; drawing is from these, renormalised.

    Raises:
        ConfigError: for an unknown order, or a number below 1.
    """

    # logits depend on the previous token too, see `_scores`
    _reads_previous = False

    def __init__(self, num_steps: int, order: str, num_candidates: int) -> None:
        if order not in ORDERS:
            raise ConfigError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        if num_steps < 1 or num_candidates < 1:
            raise ConfigError(
                f"num_steps and num_candidates must be at least 1, got {num_steps} and "
                f"{num_candidates}"
            )
        self._num_steps = num_steps
        self._order = order
        self._num_candidates = num_candidates
        self.honest = num_steps == 1 or order == "left_to_right"
        # of the draft vocabulary: the target's ids, and the way back; None where they are the same
        self._vocabulary: Tensor | None = None

    @property
    @abstractmethod
    def num_predicted(self) -> int:
        """Tokens a block predicts."""

    @abstractmethod
    def _guess(self, laws: Sequence[BlockLaw], given: Tensor) -> list[Guess]:
        """Runs one pass over blocks.

        Args:
            laws: whose rows they belong to; a row may have several.
            given: ``[n, k]`` int64, the target's ids of tokens that are given behind the anchor, -1
                for those that are masks.
        """

    def _scores(self, guess: Guess, slots: list[int], previous: list[int]) -> Tensor:
        """Returns ``[n, Vd]`` logits at slots of a block, which the caller may overwrite.

        Args:
            guess: the block.
            slots: the tokens' places in it, from 0.
            previous: the target's ids of the tokens before them.
        """
        return guess.logits[slots]

    def law(self, context: DraftContext) -> DraftLaw:
        """Returns the law behind the row's text; nothing is computed before it is asked."""
        return BlockLaw(context, self.num_predicted, -(-self.num_predicted // self._steps_run))

    @torch.no_grad()
    def expand(self, requests: Sequence[tuple[DraftLaw, Sequence[int]]]) -> list[LawRows]:
        """Runs the blocks that are asked for the first time in one pass, for all rows."""
        own = [(cast("BlockLaw", law), handles) for law, handles in requests]
        new = [(law, stem) for law, handles in own for stem in law.stems_without_guess(handles)]
        if new:
            self._fill([law for law, _ in new], [stem for _, stem in new])
        for law, handles in own:
            law.know(handles, self._named_rows, self._reads_previous)
        return [law.rows(handles) for law, handles in own]

    @property
    def _steps_run(self) -> int:
        """Runs of slots that are guessed one after another, each given the path."""
        return min(self._num_steps, self.num_predicted) if self._order == "left_to_right" else 1

    def _fill(self, laws: Sequence[BlockLaw], stems: Sequence[tuple[int, ...]]) -> None:
        """Guesses new blocks, in several steps if the most confident tokens are given first."""
        given = torch.full((len(laws), self.num_predicted), _NO_TOKEN)
        for index, stem in enumerate(stems):
            given[index, : len(stem)] = torch.tensor(stem, dtype=torch.int64)
        guesses = self._guess(laws, given)
        if self._order == "confident":
            steps = min(self._num_steps, self.num_predicted)
            for step in range(1, steps):
                goal = step * self.num_predicted // steps
                given = torch.stack(
                    [
                        self._most_confident(row, guess, goal)
                        for row, guess in zip(given, guesses, strict=True)
                    ]
                )
                newer = self._guess(laws, given)
                guesses = [
                    _kept(old, new, row >= 0)
                    for old, new, row in zip(guesses, newer, given, strict=True)
                ]
        for law, stem, guess in zip(laws, stems, guesses, strict=True):
            law.by_stem[stem] = guess

    def _most_confident(self, given: Tensor, guess: Guess, goal: int) -> Tensor:
        """Returns ``[k]`` given tokens with the surest of the others, `goal` in all."""
        chances, ids = guess.logits.softmax(dim=-1).max(dim=-1)
        if self._vocabulary is not None:
            ids = self._vocabulary[ids]
        sure = chances.cpu().masked_fill(given >= 0, 2.0)
        best = torch.topk(sure, goal).indices
        filled = given.clone()
        filled[best] = torch.where(given[best] >= 0, given[best], ids.cpu()[best])
        return filled

    def _named_rows(
        self, law: BlockLaw, guess: Guess, slots: list[int], previous: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Returns the likeliest ids and their log-probabilities ``[n, c]`` at slots of a block."""
        logits = self._scores(guess, slots, previous)
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        if law.warp is not None:
            logits = law.warp(logits)
        values, ids = top_k_rows(logits, min(self._num_candidates, logits.shape[1]))
        log_probs = values - logits.logsumexp(dim=-1, keepdim=True)
        if self._vocabulary is not None:
            ids = self._vocabulary[ids]
        # a slot that names no token has minus infinity everywhere, and NaN by now
        nothing = values == -torch.inf
        return ids.masked_fill(nothing, _NO_TOKEN), log_probs.masked_fill(nothing, -torch.inf)


class BlockLaw:
    """One row's block: which slot, and which given tokens, stand behind each handle."""

    def __init__(self, context: DraftContext, num_predicted: int, run: int) -> None:
        self.row = context.row
        self.warp = context.warp
        self.text = context.tokens
        self.length = len(context.tokens)  # the text goes on growing
        self.by_stem: dict[tuple[int, ...], Guess] = {}
        self._num_predicted = num_predicted
        self._run = run
        self._paths: list[tuple[int, ...]] = [()]
        self._known: dict[int, tuple[Tensor, Tensor] | None] = {}  # None behind the block's end
        # rows that serve every node of a depth, by stem and slot, or by the previous token too
        self._shared: dict[tuple[tuple[int, ...], int, int], tuple[Tensor, Tensor]] = {}

    def extend(self, parent: int, token: int) -> int:
        """Returns a new handle for `parent` followed by `token`."""
        self._paths.append((*self._paths[parent], token))
        return len(self._paths) - 1

    def rows(self, handles: Sequence[int]) -> LawRows:
        """Returns the rows at handles that have been asked of the drafter."""
        found = [self._known[handle] for handle in handles]
        some = next((row for row in found if row is not None), None)
        if some is None:
            shape = (len(handles), 1)
            return LawRows(torch.full(shape, -torch.inf), torch.full(shape, _NO_TOKEN))
        nothing = torch.full_like(some[0], _NO_TOKEN), torch.full_like(some[1], -torch.inf)
        ids, log_probs = zip(*(row or nothing for row in found), strict=True)
        return LawRows(torch.stack(log_probs), torch.stack(ids))

    def stems_without_guess(self, handles: Sequence[int]) -> list[tuple[int, ...]]:
        """Returns the given tokens of blocks that these handles want and that were not run."""
        wanted = dict.fromkeys(
            self._stem(handle) for handle in handles if self._slot(handle) < self._num_predicted
        )
        return [stem for stem in wanted if stem not in self.by_stem]

    def know(
        self,
        handles: Sequence[int],
        name: Callable[[BlockLaw, Guess, list[int], list[int]], tuple[Tensor, Tensor]],
        by_previous: bool,
    ) -> None:
        """Computes the rows at handles; blocks must have been run.

        Args:
            handles: asked for.
            name: gives ids and log-probabilities at slots of a guess behind previous tokens.
            by_previous: whether a row depends on the token before it.
        """
        keys = {
            handle: (
                self._stem(handle),
                self._slot(handle),
                self._previous(handle) if by_previous else _NO_TOKEN,
            )
            for handle in handles
        }
        missing = [key for key in dict.fromkeys(keys.values()) if key not in self._shared]
        for stem in dict.fromkeys(stem for stem, slot, _ in missing if slot < self._num_predicted):
            own = [key for key in missing if key[0] == stem and key[1] < self._num_predicted]
            if not by_previous:  # all depths at once: the next level will ask
                own = [(stem, slot, _NO_TOKEN) for slot in self._run_of(own[0][1])]
            ids, log_probs = name(
                self, self.by_stem[stem], [slot for _, slot, _ in own], [last for _, _, last in own]
            )
            self._shared.update(zip(own, zip(ids, log_probs, strict=True), strict=True))
        for handle, key in keys.items():
            self._known[handle] = self._shared.get(key)

    def _slot(self, handle: int) -> int:
        return len(self._paths[handle])

    def _stem(self, handle: int) -> tuple[int, ...]:
        """Returns the tokens that are given to the block of a handle."""
        path = self._paths[handle]
        return path[: len(path) // self._run * self._run]

    def _previous(self, handle: int) -> int:
        path = self._paths[handle]
        return path[-1] if path else self.text[self.length - 1]

    def _run_of(self, slot: int) -> range:
        first = slot // self._run * self._run
        return range(first, min(first + self._run, self._num_predicted))


def _kept(old: Guess, new: Guess, given: Tensor) -> Guess:
    """Returns the new guess, but the old one of tokens that were given to it."""
    column = given.to(new.logits.device).unsqueeze(-1)
    states = None
    if old.states is not None and new.states is not None:
        states = torch.where(column, old.states, new.states)
    return Guess(torch.where(column, old.logits, new.logits), states)
