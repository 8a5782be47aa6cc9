"""The user's model during one call: prefill, score a batch of trees, commit the accepted paths."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.backend.cache import TreeCache
from specdec.backend.captured import CapturedPasses, bucket
from specdec.backend.features import FeatureTap
from specdec.backend.model import TreeModel, causal_ancestors, token_matrix
from specdec.backend.pads import PadGroups
from specdec.kernels.block_linear import MOST_ROWS
from specdec.kernels.decoded import Decoded
from specdec.kernels.multi_step import RowDecoder
from specdec.kernels.top_k_rows import top_k_rows
from specdec.kernels.tree_mask import ancestor_matrices
from specdec.prefill import groups, slack_of, sources_of
from specdec.top_tokens import top_tokens
from specdec.trees.tree import DraftTree
from specdec.types import DrafterNeeds, PromptRows, TopTokens

# of the rows of a pass together: bounds the logits when a drafter wants every prompt position, and
# the masks of rows that go on from an earlier turn
_CHUNK_TOKENS = 512
# of a prompt, up to which direct passes (`specdec.backend.direct_pass`) are the faster way: behind
# more their attention takes longer than torch's. Where `linear` is the best product for many rows,
# and where blocks are
_DIRECT_TOKENS, _DIRECT_TOKENS_IN_BLOCKS = 256, 1024
_ONE_TOKEN = torch.zeros(1, 1, dtype=torch.int64)


class Scores(NamedTuple):
    """What one pass over a batch of trees computed.

    Attributes:
        decoded: logits ``[B, N, V]`` of every node, in the model's dtype, and the largest of them
            where the pass has selected them.
        features: ``[B, N, F]`` of every node, see `DrafterNeeds.layers`; None if not asked for.
        probes: ``[B, N, g, V]`` logits of the slots behind every node; None if there are none.
    """

    decoded: Decoded
    features: Tensor | None
    probes: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """``[B, N, V]`` of every node."""
        return self.decoded.logits

    def of(self, trees: Sequence[DraftTree]) -> list[Tensor]:
        """Returns the logits ``[n, V]`` of each tree's own nodes."""
        width = self.logits.shape[1]
        pairs = zip(self.decoded.rows, map(len, trees), strict=True)
        return [own if size == width else own[:size] for own, size in pairs]

    def top_tokens(self, trees: Sequence[DraftTree], top_k: int) -> Sequence[TopTokens | None]:
        """Returns the likeliest tokens behind each tree's own nodes: those that the pass selected.

        Args:
            trees: as they were scored.
            top_k: how many are selected where the pass did not; 0 for none.
        """
        top = self.decoded.top
        if top is None:
            return top_tokens(self.of(trees), top_k) if top_k else [None] * len(trees)
        width, tops = self.logits.shape[1], []
        for row, ((ids, logits), size) in enumerate(zip(top.rows, map(len, trees), strict=True)):
            own = (ids, logits) if size == width else (ids[:size], logits[:size])
            tops.append(TopTokens(*own, top.choices(row, size)))
        return tops


class TargetModel:
    """Scores trees for the rows of one call; rows advance by different amounts.

    The first token of a row comes from the prefill. From then on a row's cache holds its sequence
    without the last token, which is the root of the next tree.

    Args:
        backend: the probed model.
        cache: empty, or holding an earlier turn of the conversation.
        needs: what the drafter wants to see.
        captured: runs the passes over trees, on a cache of its own; None has `backend` run them.

    Raises:
        ConfigError: if it wants the features of a layer that the model does not have, or slots
            behind the nodes that are not of the model's width.
    """

    def __init__(
        self,
        backend: TreeModel,
        cache: TreeCache,
        needs: DrafterNeeds | None = None,
        captured: CapturedPasses | None = None,
    ) -> None:
        self._backend = backend
        self._captured = captured
        self.cache = cache
        self._prompt_top_k = needs.prompt_top_k if needs else 0
        self._tap = FeatureTap(backend.model, needs.layers) if needs and needs.layers else None
        self._pads: PadGroups | None = None
        self._of_row: RowDecoder | None = None
        self._asked_of_row: tuple[object, ...] = ()
        if needs is not None and needs.probes is not None:
            self._pads = PadGroups(backend.model, needs.probes, backend.traits.positions)

    @property
    def lengths(self) -> list[int]:
        """Committed tokens of each active row."""
        return self.cache.lengths

    def prefill(
        self, prompts: Sequence[Sequence[int]]
    ) -> tuple[list[Tensor], list[PromptRows | None]]:
        """Runs the prompts and commits them.

        Rows of unlike length run apart instead of being padded, and equal prompts run once; an
        empty cache gains most from rows in the order of `prefill_order`.

        Args:
            prompts: each row's tokens that are not in the cache yet, at least one, no padding.

        Returns:
            Each row's ``[V]`` logits after its last prompt token, and its prompt rows (or None).
        """
        fresh = max(self.cache.lengths) == 0
        sources = sources_of(prompts) if fresh else list(range(len(prompts)))
        num_run = 1 + max(row for row, source in enumerate(sources) if row == source)
        last: list[Tensor] = []
        rows: list[PromptRows | None] = []
        for group in groups([len(p) for p in prompts[:num_run]], slack_of(self._backend.device)):
            with self.cache.only(group):
                own_last, own_rows = self._run_prompts(prompts[group.start : group.stop])
            last += own_last
            rows += own_rows
        for row, source in enumerate(sources[num_run:], start=num_run):
            self.cache.copy_row(source, row)
            last.append(last[source])
            rows.append(rows[source])
        if self._pads is not None:
            nothing = PromptRows(torch.empty(0, 0, dtype=torch.int64), torch.empty(0, 0))
            probes = self._behind_the_prompts(self._pads)
            rows = [(r or nothing)._replace(probes=p) for r, p in zip(rows, probes, strict=True)]
        return last, rows

    def _run_prompts(
        self, prompts: Sequence[Sequence[int]]
    ) -> tuple[list[Tensor], list[PromptRows | None]]:
        """Runs and commits the prompts of the rows in view; returns what `prefill` does."""
        width = max(map(len, prompts))
        last: list[Tensor] = [torch.empty(0)] * len(prompts)
        seen: list[list[PromptRows]] = [[] for _ in prompts]
        top_k = self._prompt_top_k
        # rows that begin need no mask of ours; padding behind a row's end is never looked at
        fresh = max(self.cache.lengths) == 0
        direct = self._goes_directly(max(self.cache.lengths) + width, len(prompts))
        chunk = width if fresh and top_k == 0 else max(_CHUNK_TOKENS // len(prompts), 1)
        chunk = MOST_ROWS // len(prompts) if direct else chunk
        for begin in range(0, width, chunk):
            end = min(begin + chunk, width)
            pieces = [prompt[begin:end] for prompt in prompts]
            size = end - begin
            # padding shares the last position: a longer one may change a model's frequencies
            depths = [[min(i, max(len(piece) - 1, 0)) for i in range(size)] for piece in pieces]
            positions = torch.tensor(self.cache.lengths).unsqueeze(1) + torch.tensor(depths)
            plain = fresh and begin == 0 and not direct
            ancestors = None if plain else causal_ancestors(len(prompts), size)
            ends = [len(prompt) - 1 - begin for prompt in prompts]
            wanted = sorted({e for e in ends if 0 <= e < size} or {0})
            keep = None if top_k else torch.tensor(wanted)
            scores = self._pass(token_matrix(pieces, size), positions, ancestors, keep)
            logits, features = scores.logits, scores.features
            for row, piece in enumerate(pieces):
                if 0 <= ends[row] < size:
                    index = ends[row] if top_k else wanted.index(ends[row])
                    last[row] = logits[row, index]
                if piece and (top_k or features is not None):
                    own = None if features is None else features[row, : len(piece)]
                    seen[row].append(_prompt_rows(logits[row, : len(piece)], top_k, own))
            self.cache.advance([len(piece) for piece in pieces])
        return last, [_joined(chunks) if chunks else None for chunks in seen]

    def _goes_directly(self, length: int, num_rows: int) -> bool:
        """Returns whether prompts of such a length run in parts past the model's own code."""
        looked_at = self._tap is not None or self._pads is not None
        packed = self._backend.packed
        if self._backend.direct is None or packed is None or looked_at:
            return False
        most = _DIRECT_TOKENS_IN_BLOCKS if packed.for_prompts else _DIRECT_TOKENS
        return length <= most and num_rows <= MOST_ROWS

    def score(self, trees: Sequence[DraftTree], *, probes: bool = True, top_k: int = 0) -> Scores:
        """Returns the logits and features of one tree for each active row, from one pass.

        Trees smaller than the largest are padded; rows past a tree's end mean nothing.

        Args:
            trees: one for each active row.
            probes: whether to run the slots behind the nodes, where the drafter asked for them.
            top_k: likeliest tokens to select on the way, where the pass can.
        """
        self.cache.drop_pending()  # of a drafter that shares this cache
        width = max(map(len, trees))
        if self._captured is not None:
            return self._score_captured(self._captured, trees, width)
        tokens, positions = self._nodes(trees, width)
        # one new token behind prefixes of equal length is plain decoding, and goes its way
        pads = self._pads if probes else None
        even = min(self.cache.lengths) == max(self.cache.lengths)
        if width == 1 and even and pads is None:
            return self._pass(tokens, positions, None, top_k=top_k)
        ancestors = ancestor_matrices([tree.parent_list for tree in trees], width)
        if pads is None:
            return self._pass(tokens, positions, ancestors, top_k=top_k)
        rows = pads.joined(tokens, positions, ancestors)
        decoded, features, _ = self._pass(*rows, pads=width)
        real, behind = pads.split(decoded.logits, width)
        return Scores(Decoded(real), None if features is None else features[:, :width], behind)

    def _nodes(self, trees: Sequence[DraftTree], width: int) -> tuple[Tensor, Tensor]:
        """Returns tokens and positions ``[B, width]`` of trees behind what is committed."""
        tokens = token_matrix([tree.token_list for tree in trees], width)
        # padding stands where the root does
        depths = [tree.depth_list + [0] * (width - len(tree)) for tree in trees]
        rows = zip(self.cache.lengths, depths, strict=True)
        return tokens, torch.tensor([[start + depth for depth in own] for start, own in rows])

    def _score_captured(
        self, captured: CapturedPasses, trees: Sequence[DraftTree], width: int
    ) -> Scores:
        """Scores trees that are padded to a size of which there may be a recording."""
        size = bucket(width)
        tokens, positions = self._nodes(trees, size)
        ancestors = ancestor_matrices([tree.parent_list for tree in trees], size)
        logits, features = captured.run(self.cache, tokens, positions, ancestors, self._tap)
        # the next pass writes over them, and texts and drafters may keep what they are given
        features = None if features is None else features[:, :width].clone()
        return Scores(Decoded(logits[:, :width].clone()), features)

    def of_row(self, top_k: int, most_nodes: int) -> RowDecoder | None:
        """Returns what runs several steps of the only row; None where passes are looked at.

        Args:
            top_k: likeliest tokens wanted behind each node.
            most_nodes: of a tree.
        """
        direct, cache = self._backend.direct, self.cache
        looked_at = self._tap is not None or self._pads is not None
        kernel = self._backend.tree_attention is not None
        if direct is None or looked_at or kernel or self._captured is not None:
            return None
        if not direct.serves(_ONE_TOKEN, None):
            return None
        asked = direct, cache.generation, top_k, most_nodes
        if asked != self._asked_of_row:
            self._of_row = direct.of_row(cache, top_k, most_nodes)
            self._asked_of_row = asked
        return self._of_row

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keeps each row's root and accepted nodes; everything else of the last pass is gone."""
        self.cache.commit([[0, *path] for path in paths])

    @torch.no_grad()
    def catch_up(self, lengths: Sequence[int], last_tokens: Sequence[int | None]) -> None:
        """Runs and commits one more token of some rows, finished ones included.

        Args:
            lengths: committed tokens of every row, in the order of the cache.
            last_tokens: what stands behind them; None for a row that is to stay as it is.
        """
        self.cache.revive(lengths)
        tokens = [[0 if token is None else token] for token in last_tokens]
        # a row that stays takes a position that changes nothing for the others
        pairs = zip(lengths, last_tokens, strict=True)
        positions = torch.tensor([[0 if token is None else length] for length, token in pairs])
        self._backend.forward(
            self.cache, token_matrix(tokens, 1), positions, causal_ancestors(len(tokens), 1)
        )
        self.cache.advance([int(token is not None) for token in last_tokens])

    def _behind_the_prompts(self, pads: PadGroups) -> Tensor:
        """Returns ``[B, g, V]`` logits of the slots behind what is committed: a pass of its own.

        A prompt's pass may go the model's own way, with its own masks; the slots would not.
        """
        ends = torch.tensor(self.cache.lengths).unsqueeze(1) - 1
        seen = torch.zeros(len(ends), 1, 0, dtype=torch.bool)
        positions, ancestors = pads.behind(ends, seen)
        logits = self._pass(torch.zeros_like(positions), positions, ancestors, pads=1).logits
        self.cache.drop_pending()
        return logits

    def _pass(
        self,
        tokens: Tensor,
        positions: Tensor,
        ancestors: Tensor | None,
        keep: Tensor | None = None,
        *,
        pads: int = 0,
        top_k: int = 0,
    ) -> Scores:
        """Runs one pass, see `TreeModel.forward_selecting`, and reads the features wanted.

        The last rows of it are `pads` groups of slots.
        """
        with ExitStack() as hooks:
            if self._tap is not None:
                hooks.enter_context(self._tap.reading())
            if self._pads is not None and pads:
                hooks.enter_context(self._pads.entering(pads))
            decoded = self._backend.forward_selecting(
                self.cache, tokens, positions, ancestors, keep, top_k
            )
        return Scores(decoded, self._tap.take() if self._tap else None)


def _prompt_rows(logits: Tensor, top_k: int, features: Tensor | None) -> PromptRows:
    """Returns what a drafter is told of ``[T]`` prompt positions."""
    if top_k == 0:
        return PromptRows(torch.empty(0, 0, dtype=torch.int64), torch.empty(0, 0), features)
    values, ids = top_k_rows(logits, top_k)
    return PromptRows(ids.cpu(), values.float().cpu(), features)


def _joined(chunks: Sequence[PromptRows]) -> PromptRows:
    """Returns the rows of one prompt, which was run in several chunks."""
    features = [chunk.features for chunk in chunks if chunk.features is not None]
    return PromptRows(
        torch.cat([chunk.ids for chunk in chunks]),
        torch.cat([chunk.logits for chunk in chunks]),
        torch.cat(features) if features else None,
    )
