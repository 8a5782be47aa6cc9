"""`coupled_best_first` sees the verifier's noise, so it must change the speed and nothing else.

That it is lossless is tested in tests/test_exactness.py (equality, chi-square) and here by what
goes wrong without `coupled`; the rest is what its estimate is worth.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec.build import check_draws
from specdec.errors import ConfigError
from specdec.random import row_streams
from specdec.testing.monte_carlo import chi_square, noise_table, tabulated_streams
from specdec.testing.toys import ToyDraft, ToyLoop, ToyTarget
from specdec.trees import BestFirst, Chain, CoupledBestFirst, DraftTree
from specdec.trees.grow import grow_trees
from specdec.types import Budget, Draw, Guesses, LawRows, Root, StepOutcome
from specdec.verifiers import Coupled, Match, Rejection, Traversal

PREFIX = (0, 1)


def grow(policy, draft, budget, streams, prefix=PREFIX, greedy=False) -> DraftTree:
    law = draft.law(prefix)
    root = Root(prefix[-1], len(prefix) - 1, greedy)
    plan = policy.grow(law, root, budget, streams.draft)
    return grow_trees([(law, plan)], lambda asked: [one.rows(h) for one, h in asked])[0]


def tokens_a_step(policy, target, draft, budget, steps: int, *, learn: bool = True) -> float:
    """Mean tokens a step of the real loop."""
    loop = ToyLoop(policy, Coupled(), target, draft, budget, learn=learn)
    total, prefix = 0, PREFIX
    for step in range(steps):
        emitted = loop.step(prefix, row_streams(step, 0))
        total += len(emitted)
        prefix = (prefix + emitted)[-2:]
    return total / steps


@pytest.mark.parametrize("verifier", [Match(), Rejection(), Traversal()], ids=lambda v: v.name)
def test_only_coupled_takes_its_trees(verifier) -> None:
    check_draws(CoupledBestFirst(), Coupled())
    with pytest.raises(ConfigError, match="coupled"):
        check_draws(CoupledBestFirst(), verifier)


class SecretlyCoupled(CoupledBestFirst):
    """MUTANT: says that its nodes are point masses, so that any verifier takes them."""

    draws = frozenset({Draw.POINT})

    def grow(self, law, root, budget, random):
        tree = yield from super().grow(law, root, budget, random)
        return DraftTree.from_lists(tree.token_list, tree.parent_list)


class NoiseTwice(Match):
    """MUTANT: on a mismatch the token is drawn with the noise that the tree has already seen."""

    accepts = frozenset(Draw)

    def verify(self, tree, target, random):
        verdict = super().verify(tree, target, random)
        last = verdict.path[-1] if verdict.path else 0
        if not tree.children[last]:
            return verdict
        # the children's tokens were rejected, so the law is renormalised without them, and reused
        scores = target.scores(last).clone()
        scores[[tree.token_list[child] for child in tree.children[last]]] = -torch.inf
        return verdict._replace(next_token=random.gumbel_argmax(scores, target.position(last)))


def test_noise_used_for_the_tree_and_again_for_the_residual_is_caught() -> None:
    num_texts = 4000
    target = ToyTarget(3, 5, order=1, sharpness=0.6)
    noise = noise_table(seed=9, num_rows=num_texts, num_positions=8)
    law = target.text_law(PREFIX, 2)

    def result(verifier):
        loop = ToyLoop(SecretlyCoupled(), verifier, target, ToyDraft(3, 6), Budget(1, 1))
        texts = (loop.text(PREFIX, tabulated_streams(9, r, noise), 2) for r in range(num_texts))
        return chi_square(texts, law)

    assert not result(Coupled()).rejects(1e-9)
    # fresh coins know nothing of the noise: even then match is lossless
    assert not result(Match()).rejects(1e-9)
    assert result(NoiseTwice()).rejects(1e-9)


def test_knowing_the_noise_is_worth_more_than_probability_alone() -> None:
    target = ToyTarget(8, 3, order=1, sharpness=1.0)

    class Near(ToyDraft):
        """The target's own logits, disturbed."""

        def logits(self, prefix):
            return target.logits(prefix) + 0.5 * super().logits(prefix[-1:])

    draft, budget = Near(8, 1), Budget(8, 6)
    blind = tokens_a_step(BestFirst(), target, draft, budget, 300)
    seeing = tokens_a_step(CoupledBestFirst(), target, draft, budget, 300)
    chain = tokens_a_step(Chain(), target, draft, budget, 300)
    assert seeing > 1.15 * blind > chain


def test_with_the_targets_own_law_the_first_guess_is_always_right() -> None:
    target = ToyTarget(6, 3, order=1)

    class Same(ToyDraft):
        def logits(self, prefix):
            return target.logits(prefix)

    policy = CoupledBestFirst(max_branching=1)
    assert tokens_a_step(policy, target, Same(6), Budget(4, 4), 50, learn=False) == 5.0


def test_the_estimate_learns_that_the_noise_means_nothing() -> None:
    """A drafter that is always right whatever the noise: its weight must fall, s must not."""
    policy = CoupledBestFirst()
    draft = ToyDraft(5, 2, sharpness=2.0)
    for step in range(400):
        streams = row_streams(step, 0)
        tree = grow(policy, draft, Budget(4, 1), streams)
        best = int(torch.argmax(draft.log_probs(PREFIX)))
        policy.observe(StepOutcome(0, tree, [], [best], torch.empty(0)))
    assert policy.weights[1] < 0.5
    assert policy.weights[0] > 1.0


def test_a_token_outside_the_candidates_raises_the_chance_of_none_of_these() -> None:
    policy = CoupledBestFirst()
    draft = ToyDraft(6, 2, support=3, sparse=True)
    outside = next(t for t in range(6) if draft.log_probs(PREFIX)[t] == -torch.inf)

    def chance_of_the_tree(streams) -> float:
        tree = grow(policy, draft, Budget(3, 1), streams)
        policy.observe(StepOutcome(0, tree, [], [outside], torch.empty(0)))
        return sum(tree.chance_list[1:])

    first = chance_of_the_tree(row_streams(0, 0))
    for step in range(300):
        chance_of_the_tree(row_streams(step, 0))
    assert chance_of_the_tree(row_streams(0, 0)) < 0.5 * first


def test_a_greedy_target_gets_the_tree_of_best_first() -> None:
    draft, budget, streams = ToyDraft(6, 4, sparse=True), Budget(7, 4), row_streams(3, 0)
    coupled = grow(CoupledBestFirst(), draft, budget, streams, greedy=True)
    plain = grow(BestFirst(), draft, budget, streams)
    assert coupled.token_list == plain.token_list
    assert coupled.parent_list == plain.parent_list


def test_a_law_that_is_looked_up_teaches_the_same() -> None:
    """Node by node or level by level: same trees, and same weights after what came of them."""

    class Listed(ToyDraft):
        def law(self, prefix):
            law = super().law(prefix)
            law.bound = lambda _handle: 1.0

            def guesses(handle):
                rows = law.rows([handle])
                chances = rows.log_probs[0].exp().tolist()
                named = [i for i, chance in enumerate(chances) if chance > 0]
                return Guesses([int(rows.ids[0, i]) for i in named], [chances[i] for i in named])

            law.guesses = guesses
            return law

    weights = []
    for kind in (ToyDraft, Listed):
        policy, draft = CoupledBestFirst(), kind(6, 3, support=4, sparse=True)
        for step in range(60):
            tree = grow(policy, draft, Budget(5, 3), row_streams(step, 0))
            path = [1] if step % 2 else []
            emitted = [tree.token_list[node] for node in path] + [step % 6]
            policy.observe(StepOutcome(0, tree, path, emitted, torch.empty(0)))
        weights.append(policy.weights)
    assert weights[0] == pytest.approx(weights[1], rel=1e-3)
    assert not np.allclose(weights[0], CoupledBestFirst().weights)


def test_laws_without_tokens_and_padding_do_no_harm() -> None:
    policy = CoupledBestFirst()
    rows = LawRows(torch.tensor([[-0.1, -torch.inf]]), torch.tensor([[3, -1]]))

    class Padded(ToyDraft):
        def law(self, prefix):
            law = super().law(prefix)
            law.rows = lambda handles: LawRows(
                rows.log_probs.expand(len(handles), -1), rows.ids.expand(len(handles), -1)
            )
            return law

    for _ in range(3):
        tree = grow(policy, Padded(5), Budget(4, 3), row_streams(1, 0))
        assert tree.token_list[1:] == [3, 3, 3]
        policy.observe(StepOutcome(0, tree, [1], [3, 2], torch.empty(0)))
    assert np.isfinite(policy.weights).all()


def test_trees_that_nobody_observes_are_forgotten() -> None:
    policy = CoupledBestFirst()
    for step in range(5):
        grow(policy, ToyDraft(4), Budget(3, 2), row_streams(step, 0))
    assert len(policy._out) <= 1
