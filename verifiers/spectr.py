"""SpecTr's K-SEQ: several i.i.d. guesses for one token, accepted one after another."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.random import RandomSource
from specdec.trees.tree import DraftTree
from specdec.types import Draw, ProbRow, TargetLaw, Verdict

_BISECTIONS = 60


class SpecTr:
    """Verifies k i.i.d. sequences together (policy `iid`).

    At a prefix shared by k sequences their next tokens are k i.i.d. draws x from q. Each is
    accepted in turn with min(1, p(x) / (rho q(x))); sequences whose next token is the accepted one
    go on. If all fail, the token comes from the residual, and if some sequence happens to carry it
    the walk goes on below. rho in [1, k] is the least valid one, solved anew for each number of
    sequences left; duplicates stay, each is a draw of its own.

    Accepts at least 1 - (1 - 1/k)^k of what the best rule could (SpecTr, theorem 2).

    Source: Sun et al., SpecTr (arXiv 2310.15141), algorithm 2; following the residual token into
    the tree is ours, and is exact because the branches below are independent of the failure.
    """

    name = "spectr"
    accepts = frozenset({Draw.IID})
    walks_down = True

    def verify(self, tree: DraftTree, target: TargetLaw, random: RandomSource) -> Verdict:
        """Returns the accepted path and the token after it; O(V log(1/eps)) a level."""
        survivors = [0]  # nodes of equal prefix; any of them stands for it
        while True:
            node = survivors[0]
            p = target.row(node)
            candidates = sorted(child for s in survivors for child in tree.children[s])
            if not candidates:
                return Verdict(tree.path_to(node), random.categorical(p))
            q = _dense(tree.draft_probs(tree.q_row_list[candidates[0]]), p)
            token = _k_seq([tree.token_list[child] for child in candidates], p, q, random)
            survivors = [child for child in candidates if tree.token_list[child] == token]
            if not survivors:
                return Verdict(tree.path_to(node), token)


def solve_rho(p: Tensor, q: Tensor, k: int) -> float:
    """Returns the least rho in [1, k] with 1 - (1 - beta)^k <= rho beta, beta = sum min(p/rho, q).

    The upper end of the bisection is returned, which is always valid.
    """
    low, high = 1.0, float(k)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        beta = float(torch.minimum(p / middle, q).sum())
        if 1.0 - (1.0 - beta) ** k >= middle * beta:
            low = middle
        else:
            high = middle
        if high - low < 1e-9:
            break
    return high


def _k_seq(tokens: list[int], p: Tensor, q: Tensor, random: RandomSource) -> int:
    """Returns the token K-SEQ emits for the draws `tokens`."""
    rho = solve_rho(p, q, len(tokens))
    for token in tokens:
        if random.bernoulli(float(p[token]) / (rho * float(q[token]))):
            return token
    taken = torch.minimum(p / rho, q)
    beta = float(taken.sum())
    if beta > 0.0:
        accepted = 1.0 - (1.0 - beta) ** len(tokens)
        rest = (p - taken * (accepted / beta)).clamp_(min=0.0)
    else:
        rest = p
    return random.categorical(rest if float(rest.sum()) > 0.0 else p)


def _dense(row: ProbRow, like: Tensor) -> Tensor:
    """Returns the law as ``[V]`` in the target's dtype."""
    if row.ids is None:
        return row.probs.to(like)
    dense = torch.zeros_like(like)
    known = row.ids >= 0
    dense[row.ids[known]] = row.probs[known].to(like)
    return dense
