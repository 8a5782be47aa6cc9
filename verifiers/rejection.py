"""Recursive rejection sampling over a tree, for all three draw laws."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.random import RandomSource
from specdec.trees.tree import DraftTree
from specdec.types import Draw, ProbRow, TargetLaw, Verdict


class Rejection:
    """Tests children in order: accept with min(1, p/q), else p becomes the residual norm((p-q)+).

    q is the law the child was really drawn from, rebuilt in sibling order. With one child this is
    Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318); with draws from one q,
    SpecInfer's multi-round rule (arXiv 2305.09781, duplicates kept and tested); without
    replacement, RSD (arXiv 2402.14160), Sequoia (arXiv 2402.12374) and DySpec (arXiv 2410.11744);
    with point masses, a child's token is zeroed in p when it is rejected.
    """

    name = "rejection"
    accepts = frozenset({Draw.POINT, Draw.IID, Draw.WOR})

    def verify(self, tree: DraftTree, target: TargetLaw, random: RandomSource) -> Verdict:
        """Returns the accepted path and the token after it; O(V) for each tested child."""
        node = 0
        path: list[int] = []
        while True:
            child, residual = _test_children(tree, node, target.row(node), random)
            if child is None:
                return Verdict(path, random.categorical(residual))
            path.append(child)
            node = child


def _test_children(
    tree: DraftTree, node: int, target_probs: Tensor, random: RandomSource
) -> tuple[int | None, Tensor]:
    """Returns the accepted child, or None and the ``[V]`` law to draw the next token from."""
    laws: dict[int, ProbRow] = {}  # the rows of q that were needed, as the drafter gave them
    rejected: list[int] = []
    for child in tree.children[node]:
        token, draw = tree.token_list[child], tree.draw_list[child]
        p = float(target_probs[token])
        if draw == Draw.POINT:
            if random.bernoulli(p):
                return child, target_probs
            target_probs = _without(target_probs, token)
        else:
            row = tree.q_row_list[child]
            if row not in laws:
                laws[row] = tree.draft_probs(row)
            q = _zeroed(laws[row], rejected) if draw == Draw.WOR and rejected else laws[row]
            q_token = _probability(q, token)
            if q_token == 0.0:  # underflow: nothing but tokens like it is left, so it says nothing
                continue
            if random.bernoulli(p / q_token):
                return child, target_probs
            target_probs = _residual(target_probs, q)
        rejected.append(token)
    return None, target_probs


def _probability(q: ProbRow, token: int) -> float:
    if q.ids is None:
        return float(q.probs[token])
    return float(q.probs[q.ids == token].sum())


def _without(target_probs: Tensor, token: int) -> Tensor:
    """Returns (p - point mass)+, normalised; p itself when nothing else is left (rounding)."""
    rest = target_probs.clone()
    rest[token] = 0.0
    total = rest.sum()
    return rest / total if total > 0 else target_probs


def _residual(target_probs: Tensor, q: ProbRow) -> Tensor:
    """Returns norm((p - q)+); p itself when it is all zero, which only rounding can cause."""
    if q.ids is None:
        rest = target_probs - q.probs.to(target_probs.device)
    else:
        known = q.ids >= 0
        rest = target_probs.clone()
        rest[q.ids[known]] -= q.probs[known].to(rest)
    rest = rest.clamp_(min=0.0)
    total = rest.sum()
    return rest / total if total > 0 else target_probs


def _zeroed(q: ProbRow, tokens: list[int]) -> ProbRow:
    """Returns q with `tokens` zeroed and the rest normalised again."""
    probs = q.probs.clone()
    for token in tokens:
        probs[token if q.ids is None else q.ids == token] = 0.0
    total = probs.sum()
    return ProbRow(probs / total if total > 0 else torch.zeros_like(probs), q.ids)
