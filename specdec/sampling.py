"""The target's law at a tree's nodes: the user's processors on each node's own prefix."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from specdec.errors import LogitsError
from specdec.kernels.argmax import argmax_row

if TYPE_CHECKING:
    from specdec.trees.tree import DraftTree


class Prefix:
    """One row's ids as HuggingFace's processors and criteria see them, left padding included.

    A buffer that is written in place: the ids along the path being verified stand behind the
    committed ones, so that asking for a node's prefix copies nothing. Until somebody asks, ids are
    only noted: without processors and criteria of the user's nobody does.

    Args:
        ids: the row's padding ids, if any, and behind them its real tokens so far.
        device: where processors run.
    """

    def __init__(self, ids: list[int], device: torch.device) -> None:
        self._buffer = torch.empty((1, len(ids) + 64), dtype=torch.int64, device=device)
        self._noted = list(ids)  # committed, not in the buffer yet
        self.length = len(ids)

    def extend(self, tokens: Sequence[int]) -> None:
        """Commits tokens."""
        self._noted += tokens
        self.length += len(tokens)

    @property
    def device(self) -> torch.device:
        """Where processors and criteria run: with the caller's input ids, as in `generate`."""
        return self._buffer.device

    def ids(self) -> Tensor:
        """Returns ``[1, length]`` int64, the committed ids; a view."""
        return self.followed_by(())

    def followed_by(self, tokens: Sequence[int]) -> Tensor:
        """Returns ``[1, length + len(tokens)]``, the ids with a draft path behind them; a view."""
        self._write(self.length - len(self._noted), [*self._noted, *tokens])
        self._noted.clear()
        return self._buffer[:, : self.length + len(tokens)]

    def _write(self, begin: int, tokens: Sequence[int]) -> None:
        end = begin + len(tokens)
        if end > self._buffer.shape[1]:
            grown = torch.empty((1, 2 * end), dtype=torch.int64, device=self._buffer.device)
            grown[:, :begin] = self._buffer[:, :begin]
            self._buffer = grown
        if not tokens:
            return
        if self._buffer.device.type == "cpu":  # numpy writes in a fifth of the time
            self._buffer.numpy()[0, begin:end] = tokens
        else:
            self._buffer[0, begin:end] = torch.tensor(tokens, device=self._buffer.device)


def warp_logits(processors: LogitsProcessorList, logits: Tensor) -> Tensor:
    """Returns ``[n, V]`` logits after the temperature and the truncations among the processors.

    These look at nothing but the logits, so a drafter can follow the user's settings with them.
    transformers names them warpers.
    """
    for processor in processors:
        if type(processor).__name__.endswith("LogitsWarper"):
            logits = processor(None, logits)
    return logits


class ProcessedLaw:
    """A `TargetLaw` over one scored tree.

    Args:
        tree: the tree.
        logits: ``[N, V]`` raw logits of its nodes, any floating dtype.
        prefix: the row's ids up to and including the root.
        processors: the user's, in order, as `generate` prepared them.
        greedy: whether the law is the point mass at the argmax.
        root_position: absolute position of the root, padding left out.
        ends: tokens that end the text. No processor is called behind one (a grammar, say, has
            nothing to answer there), not even for rules that look at nodes which are no text yet.
        reach: called with this law and a node before anything is computed there; for rules that
            walk down, since to ask about a node is to accept its path. May end the walk by raising.
        choices: the argmax of each node's raw logits, and its logit, if they are known.
    """

    def __init__(
        self,
        tree: DraftTree,
        logits: Tensor,
        prefix: Prefix,
        processors: LogitsProcessorList,
        *,
        greedy: bool,
        root_position: int,
        ends: frozenset[int] = frozenset(),
        reach: Callable[[ProcessedLaw, int], None] | None = None,
        choices: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        self.greedy = greedy
        self._tree = tree
        self._logits = logits
        self._prefix = prefix
        self._processors = processors
        self._root_position = root_position
        self._root_length = prefix.length
        self._ends = ends
        self._reach = reach
        self._choices = choices
        # by the path's tokens: independent draws may repeat, and one prefix has one row
        self._scores: dict[tuple[int, ...], Tensor] = {}
        self.processor_seconds = 0.0

    def position(self, node: int) -> int:
        """Returns the absolute position of the token emitted after `node`."""
        return self._root_position + self._tree.depth_list[node] + 1

    def scores(self, node: int) -> Tensor:
        """Returns ``[V]`` float32 processed logits; computed once a prefix.

        Raises:
            LogitsError: if no token is left to choose.
        """
        path = tuple(self._tree.path_tokens(node))
        if path not in self._scores:
            if self._reach is not None:
                self._reach(self, node)
            scores = self._given(node).unsqueeze(0)
            if self._processors and self._ends.isdisjoint(path):
                ids = self._ids(path)
                begin = time.perf_counter()
                for processor in self._processors:  # the list's own call inspects signatures
                    scores = processor(ids, scores)
                self.processor_seconds += time.perf_counter() - begin
            self._check(float(scores.max()), node)  # NaN anywhere gives NaN
            self._scores[path] = scores.squeeze(0)
        return self._scores[path]

    def row(self, node: int) -> Tensor:
        """Returns ``[V]`` float32 probabilities."""
        if self.greedy:
            point = torch.zeros_like(self.scores(node))
            point[self.argmax(node)] = 1.0
            return point
        return torch.softmax(self.scores(node), dim=-1)

    def argmax(self, node: int) -> int:
        """Returns the most probable token, the lowest id among equals."""
        if not self._processors:
            if self._reach is not None:
                self._reach(self, node)
            if self._choices is not None:
                best, largest = self._choices[node]
            else:
                raw = self._logits[node]
                best = argmax_row(raw)
                largest = float(raw[best])
            self._check(largest, node)
            return best
        return argmax_row(self.scores(node))

    def raw(self, node: int) -> Tensor:
        """Returns ``[V]`` float32 raw logits, as `output_logits` reports them."""
        return self._logits[node].to(self._prefix.device, torch.float32, copy=True)

    def _given(self, node: int) -> Tensor:
        """Returns what processors get: a copy, unless the first one leaves it as it is."""
        if self._processors and getattr(self._processors[0], "writes_anew", False):
            return self._logits[node].to(self._prefix.device, torch.float32)
        return self.raw(node)  # the raw logits are still wanted

    def _ids(self, path: Sequence[int]) -> Tensor:
        """Returns ``[1, T]`` ids up to a node, however much of its path is committed by now."""
        committed = self._prefix.length - self._root_length
        ids = self._prefix.followed_by(path[committed:])
        return ids[:, : self._root_length + len(path)]

    def _check(self, largest: float, node: int) -> None:
        if largest != largest or largest == -float("inf"):
            what = "NaN" if largest != largest else "minus infinity for every token"
            raise LogitsError(
                f"the logits at position {self.position(node)} are {what}"
                + (" after the logits processors" if self._processors else "")
                + "; there is no token to choose"
            )
