"""Broken rules that the checks of tests/test_exactness.py must catch.

Each mutant is the production code with one mistake that real projects have made. The number beside
a case is the total variation that was measured, or for sampled cases the effect of one sample.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch

from specdec.random import RandomSource
from specdec.testing.enumerate import MisuseError, shared_streams
from specdec.testing.monte_carlo import chi_square, noise_table, tabulated_streams
from specdec.testing.toys import ToyDraft, ToyLoop, ToyTarget, ToyTargetLaw, repetition_penalty
from specdec.trees import Chain, DraftTree, MonteCarlo, Static
from specdec.trees.build import TreeBuilder
from specdec.types import (
    Budget,
    DraftLaw,
    Draw,
    GrowPlan,
    Root,
    TargetLaw,
    TreePolicy,
    Verdict,
    Verifier,
)
from specdec.verifiers import Coupled, Match, Rejection, Traversal
from specdec.verifiers.laws import ResidualLaw
from specdec.verifiers.walk import follow

EXACT = 1e-12
PREFIX = (0, 1)
PAIR = [(0,), (1,)]


def loop_with(
    policy: TreePolicy, verifier: Verifier, budget: Budget, seed: int = 0, vocab_size: int = 3
) -> ToyLoop:
    target, draft = ToyTarget(vocab_size, seed), ToyDraft(vocab_size, seed)
    return ToyLoop(policy, verifier, target, draft, budget)


def with_children(tree: DraftTree, children: list[list[int]]) -> DraftTree:
    """A view of the tree in which siblings stand in another order, or not at all."""
    view = copy.copy(tree)
    vars(view)["children"] = children
    return view


# --------------------------------------------------------------------------- mistakes of verifiers


class SortsSiblings(Rejection):
    """Tests siblings from likely to unlikely under q, whatever the order of drawing."""

    def verify(self, tree: DraftTree, target: TargetLaw, random: RandomSource) -> Verdict:
        def likelihood(node: int) -> float:
            return float(tree.draft_probs(tree.q_row_list[node]).probs[tree.token_list[node]])

        children = [sorted(nodes, key=likelihood, reverse=True) for nodes in tree.children]
        return super().verify(with_children(tree, children), target, random)


class SkipsDuplicates(Rejection):
    """Tests a token once, although its second draw says that q is likely to repeat it."""

    def verify(self, tree: DraftTree, target: TargetLaw, random: RandomSource) -> Verdict:
        children = []
        for nodes in tree.children:
            first = {tree.token_list[node]: node for node in reversed(nodes)}
            children.append([node for node in nodes if first[tree.token_list[node]] == node])
        return super().verify(with_children(tree, children), target, random)


@pytest.mark.parametrize(
    ("mutant", "draw", "seed", "threshold"),
    [
        (SortsSiblings(), Draw.WOR, 0, 0.1),  # 0.21
        (SortsSiblings(), Draw.WOR, 1, 0.1),  # 0.21
        (SortsSiblings(), Draw.IID, 0, 0.1),  # 0.17
        (SkipsDuplicates(), Draw.IID, 0, 0.03),  # 0.059
        (SkipsDuplicates(), Draw.IID, 1, 0.002),  # 0.0044
    ],
)
def test_order_and_number_of_siblings(
    mutant: Verifier, draw: Draw, seed: int, threshold: float
) -> None:
    policy, budget = Static(PAIR, draw), Budget(2, 1)
    assert loop_with(policy, Rejection(), budget, seed).error(PREFIX) < EXACT
    assert loop_with(policy, mutant, budget, seed).error(PREFIX) > threshold


class SamplesEachPath(Match):
    """Draws at every node once for each path through it, then takes the longest path that matches.

    The acceptance rule of ADED's public code, and of others: a token with several paths below it
    gets several chances.
    """

    def verify(self, tree: DraftTree, target: TargetLaw, random: RandomSource) -> Verdict:
        best: Verdict | None = None
        for leaf in range(len(tree)):
            if tree.children[leaf]:
                continue
            ways = [leaf]
            while ways[-1]:
                ways.append(tree.parent_list[ways[-1]])
            verdict = Verdict([], random.categorical(target.row(0)))
            for node in reversed(ways[:-1]):
                if tree.token_list[node] != verdict.next_token:
                    break
                verdict = Verdict([*verdict.path, node], random.categorical(target.row(node)))
            if best is None or len(verdict.path) > len(best.path):
                best = verdict
        assert best is not None
        return best


@pytest.mark.parametrize(
    "policy", [MonteCarlo(12), Static([(0,), (0, 0), (0, 1)])], ids=["monte_carlo", "static"]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_node_is_drawn_once_however_many_paths_lead_through_it(
    policy: TreePolicy, seed: int
) -> None:
    budget = Budget(3, 2)
    assert loop_with(policy, Match(), budget, seed).error(PREFIX, [budget]) < EXACT
    assert loop_with(policy, SamplesEachPath(), budget, seed).error(PREFIX, [budget]) > 0.02


@pytest.mark.parametrize(("seed", "threshold"), [(0, 0.1), (1, 0.005)])  # 0.22, 0.013
def test_law_without_replacement_must_be_normalised_again(
    seed: int, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeroing nothing is the same mistake: p is zero already at every rejected token."""

    def only_zeroed(q: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        probs = q.clone()
        probs[tokens] = 0.0
        return probs

    loop = loop_with(Static(PAIR, Draw.WOR), Rejection(), Budget(2, 1), seed)
    assert loop.error(PREFIX) < EXACT
    monkeypatch.setattr("specdec.verifiers.laws._zeroed", only_zeroed)
    assert loop.error(PREFIX) > threshold


@pytest.mark.parametrize("verifier", [Rejection(), Traversal()], ids=lambda v: v.name)
def test_named_laws_are_normalised_again_too(
    verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse laws are subtracted token by token, on a path of their own."""

    def only_zeroed(q: dict[int, float], tokens: list[int]) -> dict[int, float]:
        return {token: weight for token, weight in q.items() if token not in tokens}

    target, draft = ToyTarget(3, 0), ToyDraft(3, 0, sparse=True)
    loop = ToyLoop(Static(PAIR, Draw.WOR), verifier, target, draft, Budget(2, 1))
    assert loop.error(PREFIX) < EXACT
    monkeypatch.setattr("specdec.verifiers.laws._zeroed", only_zeroed)
    assert loop.error(PREFIX) > 0.01


def test_what_is_left_of_the_target_keeps_its_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual is kept without being normalised; its sum must follow every rejection."""
    target, draft = ToyTarget(3, 0), ToyDraft(3, 0, sparse=True)
    loop = ToyLoop(Static(PAIR, Draw.WOR), Rejection(), target, draft, Budget(2, 1))
    assert loop.error(PREFIX) < EXACT
    monkeypatch.setattr(
        ResidualLaw, "p", lambda self, child: self._weight(self._tree.token_list[child])
    )
    assert loop.error(PREFIX) > 0.01


# --------------------------------------------------------------------------- mistakes of the target


class RootPrefix(ToyTargetLaw):
    """Shows processors the prefix of the root at every node."""

    def seen(self, node: int) -> tuple[int, ...]:
        return self._committed


@pytest.mark.parametrize(
    "verifier", [Match(), Rejection(), Coupled()], ids=lambda verifier: verifier.name
)
@pytest.mark.parametrize(("seed", "threshold"), [(0, 0.001), (1, 0.01)])  # 0.0027, 0.034
def test_repetition_penalty_needs_each_nodes_own_prefix(
    verifier: Verifier, seed: int, threshold: float
) -> None:
    target = ToyTarget(3, seed, processors=[repetition_penalty(2.0)])
    loop = ToyLoop(Chain(), verifier, target, ToyDraft(3, seed), Budget(2, 2))
    assert loop.error(PREFIX) < EXACT
    mutant = ToyLoop(Chain(), verifier, target, ToyDraft(3, seed), Budget(2, 2), RootPrefix)
    assert mutant.error(PREFIX) > threshold


# --------------------------------------------------------------------------- mistakes of policies


def selected(tree: DraftTree, nodes: Sequence[int]) -> DraftTree:
    """The tree of some of the nodes, each with its parent."""
    index = {node: number for number, node in enumerate(nodes)}
    return DraftTree.from_lists(
        [tree.token_list[node] for node in nodes],
        [-1, *(index[tree.parent_list[node]] for node in nodes[1:])],
        [Draw(tree.draw_list[node]) for node in nodes],
        [tree.q_row_list[node] for node in nodes],
        tree.q,
    )


class KeepsBest:
    """Draws a tree, then keeps the nodes of largest path probability: reranking (EAGLE-2)."""

    name = "keeps_best"

    def __init__(self, policy: TreePolicy, num_kept: int) -> None:
        self.draws = policy.draws
        self._policy = policy
        self._num_kept = num_kept

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        tree = yield from self._policy.grow(law, root, budget, random)
        values = [1.0]
        for node in range(1, len(tree)):
            token, parent = tree.token_list[node], tree.parent_list[node]
            (log_probs, _) = law.rows([self._handle(law, tree, parent)])
            values.append(values[parent] * float(log_probs[0, token].exp()))
        order = sorted(range(1, len(tree)), key=lambda node: (-values[node], node))
        return selected(tree, [0, *sorted(order[: self._num_kept])])

    def _handle(self, law: DraftLaw, tree: DraftTree, node: int) -> int:
        handle = 0
        for token in tree.path_tokens(node):
            handle = law.extend(handle, token)
        return handle


@pytest.mark.parametrize(
    ("draw", "seed", "threshold"),
    [
        (Draw.IID, 0, 0.03),  # 0.082
        (Draw.IID, 3, 0.005),  # 0.018
        (Draw.WOR, 0, 0.03),  # 0.097
        (Draw.WOR, 3, 0.005),  # 0.018
    ],
)
def test_drawn_tokens_must_not_be_reranked(draw: Draw, seed: int, threshold: float) -> None:
    policy = Static([(0,), (1,), (1, 0)], draw)
    budgets = [Budget(3, 2), Budget(1, 1)]
    assert loop_with(policy, Rejection(), budgets[0], seed).error(PREFIX, budgets) < EXACT
    mutant = KeepsBest(policy, 2)
    # one path of two drawn tokens, or two siblings: their values decide
    assert loop_with(mutant, Rejection(), budgets[0], seed).error(PREFIX, budgets) > threshold


def test_point_masses_may_be_reranked() -> None:
    policy = KeepsBest(Static([(0,), (1,), (0, 0)]), 2)
    assert loop_with(policy, Rejection(), Budget(3, 2)).error(PREFIX) < EXACT


class Trie:
    """Draws sequences of length two independently and merges their common beginnings.

    Children stand in order of first occurrence. Given the earlier ones, a new child follows q with
    them zeroed: verified as drawn without replacement it is lossless, as independent it is not.
    """

    name = "trie"

    def __init__(self, draw: Draw, num_sequences: int) -> None:
        self.draws = frozenset({draw})
        self._draw = draw
        self._num_sequences = num_sequences

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        builder = TreeBuilder(root.token)
        sequences = [0] * self._num_sequences
        for _ in range(budget.depth):
            new_level = []
            for node in sorted(set(sequences)):
                rows = yield [builder.handles[node]]
                q_row = builder.add_law(rows, 0)
                children: dict[int, int] = {}
                for _ in range(sequences.count(node)):
                    token = random.categorical(rows.log_probs[0].exp())
                    if token not in children:
                        handle = law.extend(builder.handles[node], token)
                        children[token] = builder.add(node, token, handle, self._draw, q_row)
                    new_level.append(children[token])
            sequences = new_level
        return builder.build()


@pytest.mark.parametrize(("seed", "threshold"), [(0, 0.03), (1, 0.003)])  # 0.061, 0.0065
def test_a_trie_of_independent_sequences(seed: int, threshold: float) -> None:
    budgets = [Budget(4, 2), Budget(2, 1)]
    right = loop_with(Trie(Draw.WOR, 2), Rejection(), budgets[0], seed)
    assert right.error(PREFIX, budgets) < EXACT
    mutant = loop_with(Trie(Draw.IID, 2), Rejection(), budgets[0], seed)
    assert mutant.error(PREFIX, budgets) > threshold


# --------------------------------------------------------------------------- one random stream


@pytest.mark.parametrize(
    ("policy", "budget", "threshold"),
    [
        (Chain(Draw.IID), Budget(1, 1), 0.1),  # 0.19
        (Static(PAIR, Draw.IID), Budget(2, 1), 0.05),  # 0.097
        (Static(PAIR, Draw.WOR), Budget(2, 1), 0.1),  # 0.18
    ],
)
def test_draft_and_verifier_need_two_streams(
    policy: TreePolicy, budget: Budget, threshold: float
) -> None:
    loop = loop_with(policy, Rejection(), budget)
    assert loop.error(PREFIX, joint=True) < EXACT
    assert loop.error(PREFIX, joint=True, streams=shared_streams) > threshold


# --------------------------------------------------------------------------- mistakes of coupled

FALSE_ALARM = 1e-9  # of each test, for right code; seeds are fixed
MISS = 1e-6  # how likely a mutant of the stated effect passes


class KeyedByDepth(ToyTargetLaw):
    """Noise keyed by the depth inside the step: every step begins with the same noise."""

    def position(self, node: int) -> int:
        return self._tree.depth_list[node]


class KeyedByToken(ToyTargetLaw):
    """Noise keyed by the token before."""

    def position(self, node: int) -> int:
        return self._tree.token_list[node]


class Rebased(ToyTargetLaw):
    """Each call counts positions from its own start: text fed back meets old noise again."""

    def position(self, node: int) -> int:
        return (super().position(node) - len(PREFIX)) % 2


class ChosenAfterNoise(Coupled):
    """Uses the noise where it favours the first guess, and fresh coins where it does not."""

    def verify(self, tree: DraftTree, target: TargetLaw, random: RandomSource) -> Verdict:
        def choose(node: int) -> int:
            position = target.position(node)
            guess = next((tree.token_list[child] for child in tree.children[node]), None)
            flat = torch.zeros_like(target.scores(node))
            if random.gumbel_argmax(flat, position) == guess:
                return random.gumbel_argmax(target.scores(node), position)
            return random.categorical(target.row(node))

        return follow(tree, choose)


class ReusesNoiseForResidual(Coupled):
    """Rejection with fresh coins, then the residual's token by the noise that drew the guess."""

    def __init__(self, draft: ToyDraft) -> None:
        self._draft = draft

    def verify(self, tree: DraftTree, target: TargetLaw, random: RandomSource) -> Verdict:
        assert isinstance(target, ToyTargetLaw)

        def choose(node: int) -> int:
            p, position = target.row(node), target.position(node)
            if not tree.children[node]:
                return random.gumbel_argmax(p.log(), position)
            q = self._draft.log_probs(target.prefix(node)).exp()
            guess = tree.token_list[tree.children[node][0]]
            if random.bernoulli(float(p[guess] / q[guess])):
                return guess
            return random.gumbel_argmax((p - q).clamp(min=0.0).log(), position)

        return follow(tree, choose)


class OnlyCandidates(Coupled):
    """Chooses among the children where there are two or more, as if p had no other tokens."""

    def verify(self, tree: DraftTree, target: TargetLaw, random: RandomSource) -> Verdict:
        def choose(node: int) -> int:
            candidates = [tree.token_list[child] for child in tree.children[node]]
            scores = target.scores(node)
            if len(candidates) > 1:
                kept = torch.full_like(scores, -torch.inf)
                kept[candidates] = scores[candidates]
                scores = kept
            return random.gumbel_argmax(scores, target.position(node))

        return follow(tree, choose)


class RedrawsMismatch(Coupled):
    """Draws anew, with fresh coins, where the choice is no child."""

    def verify(self, tree: DraftTree, target: TargetLaw, random: RandomSource) -> Verdict:
        verdict = super().verify(tree, target, random)
        last = verdict.path[-1] if verdict.path else 0
        if tree.children[last]:
            return Verdict(verdict.path, random.categorical(target.row(last)))
        return verdict


class ConstantTarget(ToyTarget):
    def __init__(self, *probs: float) -> None:
        super().__init__(len(probs))
        self._constant = torch.tensor(probs, dtype=torch.float64).log()

    def logits(self, prefix: tuple[int, ...]) -> torch.Tensor:
        return self._constant


class ConstantDraft(ToyDraft):
    def __init__(self, *probs: float) -> None:
        super().__init__(len(probs))
        self._constant = torch.tensor(probs, dtype=torch.float64).log()

    def logits(self, prefix: tuple[int, ...]) -> torch.Tensor:
        return self._constant


RANDOM = (ToyTarget(3, 5, order=1, sharpness=0.6), ToyDraft(3, 6))
# laws that the two quiet mistakes disturb most
PEAKED = (ConstantTarget(0.34, 0.32, 0.34), ConstantDraft(0.002, 0.002, 0.996))
RESIDUAL = (ConstantTarget(0.21, 0.19, 0.6), ConstantDraft(0.003, 0.56, 0.437))
CHAIN, DEPTH_3 = Chain(Draw.COUPLED), Budget(3, 3)
FORKS = Static([(0,), (1,), (0, 0), (0, 1)], Draw.COUPLED)

# loop, effect of one text: sum (p' - p)^2 / p over the first three tokens, and number of texts.
# The effects were measured with 20 000 texts of another seed.
COUPLED_MUTANTS: dict[str, tuple[ToyLoop, float, int]] = {
    "keyed by depth": (ToyLoop(CHAIN, Coupled(), *RANDOM, DEPTH_3, KeyedByDepth), 2.2, 700),
    "keyed by token": (ToyLoop(CHAIN, Coupled(), *RANDOM, DEPTH_3, KeyedByToken), 3.6, 700),
    "positions re-based": (ToyLoop(CHAIN, Coupled(), *RANDOM, DEPTH_3, Rebased), 1.3, 700),
    "chosen by noise": (ToyLoop(CHAIN, ChosenAfterNoise(), *PEAKED, DEPTH_3), 0.7, 700),
    "residual by noise": (
        ToyLoop(CHAIN, ReusesNoiseForResidual(RESIDUAL[1]), *RESIDUAL, DEPTH_3),
        0.06,
        3500,
    ),
    "only candidates": (ToyLoop(FORKS, OnlyCandidates(), *RANDOM, Budget(4, 2)), 0.3, 900),
    "redraws mismatch": (ToyLoop(CHAIN, RedrawsMismatch(), *RANDOM, DEPTH_3), 0.25, 1000),
}


@pytest.mark.parametrize("name", list(COUPLED_MUTANTS))
def test_mistakes_with_keyed_noise(name: str) -> None:
    loop, effect, num_texts = COUPLED_MUTANTS[name]
    noise = noise_table(seed=101, num_rows=num_texts, num_positions=12)
    texts = [loop.text(PREFIX, tabulated_streams(101, row, noise), 3) for row in range(num_texts)]
    result = chi_square(texts, loop.target.text_law(PREFIX, 3))
    assert result.miss_probability(num_texts * effect, FALSE_ALARM) < MISS
    assert result.rejects(FALSE_ALARM)
    assert result.statistic > num_texts * effect / 2  # else the effect above is out of date


@pytest.mark.parametrize("law", [KeyedByDepth, KeyedByToken, Rebased])
def test_enumeration_refuses_noise_used_for_two_laws(law: type[ToyTargetLaw]) -> None:
    target, draft = ToyTarget(3, 5), ToyDraft(3, 6)
    right = ToyLoop(Chain(), Coupled(), target, draft, Budget(1, 1))
    assert right.error(PREFIX, joint=True) < EXACT
    with pytest.raises(MisuseError, match="used for another law"):
        ToyLoop(Chain(), Coupled(), target, draft, Budget(1, 1), law).error(PREFIX, joint=True)
