"""What the three acceptance rules do, beside being exact (tests/test_exactness.py)."""

from __future__ import annotations

import itertools

import pytest
import torch

from specdec import build
from specdec.random import RowStreams, row_streams
from specdec.testing.enumerate import enumerate_law
from specdec.testing.toys import ToyDraft, ToyLoop, ToyTarget, ToyTargetLaw
from specdec.trees import BestFirst, Chain, DraftTree, Static
from specdec.types import Budget, Draw, LawRows, TargetLaw, TreePolicy, Verdict, Verifier
from specdec.verifiers import Coupled, Match, Rejection

POINT, IID, WOR = Draw.POINT, Draw.IID, Draw.WOR
MATCH, REJECTION, COUPLED = Match(), Rejection(), Coupled()
VERIFIERS: list[Verifier] = [MATCH, REJECTION, COUPLED]
PREFIX = (0, 1)
ROUNDING = 1e-14  # of probabilities in float64


class Fixed:
    """A target law given by its rows, one for each node; writes down which nodes were asked for."""

    def __init__(self, rows: list[list[float]], *, greedy: bool = False) -> None:
        self.greedy = greedy
        self.asked: list[int] = []
        self._rows = torch.tensor(rows, dtype=torch.float64)

    def position(self, node: int) -> int:
        return 100 + node

    def scores(self, node: int) -> torch.Tensor:
        self.asked.append(node)
        return self._rows[node].log()

    def row(self, node: int) -> torch.Tensor:
        self.asked.append(node)
        return self._rows[node]

    def argmax(self, node: int) -> int:
        self.asked.append(node)
        return int(torch.argmax(self._rows[node]))


def verdict_law(
    verifier: Verifier, tree: DraftTree, target: TargetLaw
) -> dict[tuple[tuple[int, ...], int], float]:
    def run(streams: RowStreams) -> tuple[tuple[int, ...], int]:
        verdict = verifier.verify(tree, target, streams.verify)
        return tuple(verdict.path), verdict.next_token

    return enumerate_law(run)


def accepted(law: dict[tuple[tuple[int, ...], int], float]) -> float:
    """Probability that the first token came from the tree."""
    return sum(mass for (path, _), mass in law.items() if path)


def drawn_tree(tokens: list[int], draw: Draw, q: list[float]) -> DraftTree:
    """Siblings drawn from one law."""
    n = len(tokens)
    law = LawRows(torch.tensor([q], dtype=torch.float64).log())
    return DraftTree.from_lists(
        [0, *tokens], [-1] + [0] * n, [POINT] + [draw] * n, [-1] + [0] * n, law
    )


def acceptance(draw: Draw, count: int, p: list[float], q: list[float]) -> float:
    """Chance that one of `count` drawn siblings is accepted, over all draws."""
    total = 0.0
    for tokens in itertools.product(range(len(q)), repeat=count):
        chance, left = 1.0, list(q)
        for token in tokens:
            chance *= left[token] / sum(left) if left[token] else 0.0
            if draw == WOR:
                left[token] = 0.0
        if chance > 0.0:
            tree = drawn_tree(list(tokens), draw, q)
            total += chance * accepted(verdict_law(REJECTION, tree, Fixed([p] * (count + 1))))
    return total


P = [0.5, 0.3, 0.2]
Q = [0.2, 0.2, 0.6]


# --------------------------------------------------------------------------- names and contracts


def test_names_and_accepted_draws() -> None:
    assert {v.name: v.accepts for v in VERIFIERS} == {
        "match": {POINT},
        "rejection": {POINT, IID, WOR},
        "coupled": set(Draw),
    }
    assert all(isinstance(verifier, Verifier) for verifier in VERIFIERS)


@pytest.mark.parametrize("verifier", VERIFIERS, ids=lambda v: v.name)
def test_a_root_alone_gives_the_targets_own_token(verifier: Verifier) -> None:
    law = verdict_law(verifier, DraftTree.root_only(0), Fixed([P]))
    assert law == pytest.approx({((), token): p for token, p in enumerate(P)}, abs=ROUNDING)


@pytest.mark.parametrize("verifier", VERIFIERS, ids=lambda v: v.name)
def test_only_nodes_on_the_path_are_asked_for(verifier: Verifier) -> None:
    """Processors that keep state must never see a rejected branch, and see each node once."""
    tree = DraftTree.from_lists([0, 1, 2, 0, 1, 2], [-1, 0, 0, 1, 1, 2])

    def run(streams: RowStreams) -> bool:
        target = Fixed([P] * 6)
        verdict = verifier.verify(tree, target, streams.verify)
        return target.asked == [0, *verdict.path]

    assert verifier.walks_down
    assert enumerate_law(run).keys() == {True}


@pytest.mark.parametrize("name", sorted(build.VERIFIERS))
def test_a_rule_walks_down_if_it_says_so(name: str) -> None:
    """What it asks about becomes text; `block` and `traversal` look ahead, and do not say so."""
    verifier = build.build_verifier(name)
    # siblings of one token, with different children, where the rule takes a tree that branches
    tokens, parents = ([2, 0], [0, 1]) if name == "block" else ([2, 2, 0, 2], [0, 0, 1, 2])
    draw = IID if IID in verifier.accepts else POINT
    tree = DraftTree.from_lists(
        [0, *tokens],
        [-1, *parents],
        draws=[POINT, *[draw] * len(tokens)],
        q_row=[-1, *[0] * len(tokens)],
        q=LawRows(torch.tensor([Q], dtype=torch.float64).log()),
    )

    def run(streams: RowStreams) -> bool:
        target = Fixed([P] * len(tree))
        verdict = verifier.verify(tree, target, streams.verify)
        text = tree.path_tokens(verdict.path[-1] if verdict.path else 0)
        asked = [tree.path_tokens(node) for node in target.asked]
        return asked == [text[:depth] for depth in range(len(text) + 1)]

    assert set(enumerate_law(run)) == ({True} if verifier.walks_down else {True, False})


@pytest.mark.parametrize("verifier", VERIFIERS, ids=lambda v: v.name)
def test_rows_and_laws_are_left_as_they_are(verifier: Verifier) -> None:
    draw = POINT if verifier is MATCH else WOR
    tree = drawn_tree([2, 0, 1], draw, Q)
    target = Fixed([P] * 4)
    for seed in range(20):
        verifier.verify(tree, target, row_streams(seed, 0).verify)
    assert target._rows.tolist() == [P] * 4
    assert tree.q is not None
    assert tree.q.log_probs[0].exp().tolist() == pytest.approx(Q, abs=ROUNDING)


@pytest.mark.parametrize("verifier", VERIFIERS, ids=lambda v: v.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_dtypes_are_taken(verifier: Verifier, dtype: torch.dtype) -> None:
    target = Fixed([[0.0, 1.0, 0.0]] * 3)
    target._rows = target._rows.to(dtype)
    tree = DraftTree.from_lists([0, 1, 2], [-1, 0, 1])
    assert verifier.verify(tree, target, row_streams(0, 0).verify) == Verdict([1], 1)


# --------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("draw", [POINT, IID, WOR])
@pytest.mark.parametrize("seed", range(4))
def test_all_rules_agree_at_temperature_zero(draw: Draw, seed: int) -> None:
    target = ToyTarget(4, seed, greedy=True)
    loop = ToyLoop(Static(draw=draw), REJECTION, target, ToyDraft(4, seed), Budget(30, 3))
    for row in range(5):
        tree = loop.grow(PREFIX, row_streams(seed, row))
        verdicts = []
        for verifier in VERIFIERS:
            law = ToyTargetLaw(target, tree, PREFIX)
            verdict = verifier.verify(tree, law, row_streams(seed, row).verify)
            tokens = [*(tree.token_list[node] for node in verdict.path), verdict.next_token]
            verdicts.append(tokens)
        assert verdicts[0] == verdicts[1] == verdicts[2]
        for length, token in enumerate(verdicts[0]):
            prefix = (*PREFIX, *verdicts[0][:length])
            assert token == int(torch.argmax(target.scores(prefix)))


def test_greedy_match_and_coupled_draw_nothing() -> None:
    tree = DraftTree.from_lists([0, 2, 1], [-1, 0, 0])
    for verifier in (MATCH, COUPLED):
        law = verdict_law(verifier, tree, Fixed([P] * 3, greedy=True))
        assert law == {((), 0): 1.0}


def test_among_equal_children_the_first_is_followed() -> None:
    tree = DraftTree.from_lists([0, 1, 1], [-1, 0, 0])
    for verifier in VERIFIERS:
        target = Fixed([[0.0, 1.0, 0.0]] * 3, greedy=True)
        assert verifier.verify(tree, target, row_streams(0, 0).verify).path == [1]


# --------------------------------------------------------------------------- point masses


@pytest.mark.parametrize("seed", range(3))
def test_rules_agree_on_point_masses(seed: int) -> None:
    """Whatever the rule, a path of guesses is accepted with the target's probability of it."""
    target, draft = ToyTarget(4, seed), ToyDraft(4, seed)
    tree = ToyLoop(BestFirst(), MATCH, target, draft, Budget(6, 3)).grow(PREFIX, row_streams(0, 0))
    laws = [verdict_law(v, tree, ToyTargetLaw(target, tree, PREFIX)) for v in VERIFIERS]
    assert laws[0] == pytest.approx(laws[1], abs=ROUNDING)
    assert laws[0] == pytest.approx(laws[2], abs=ROUNDING)
    expected = 0.0
    for node in range(1, len(tree)):
        tokens = tree.path_tokens(node)
        expected += target.text_law(PREFIX, len(tokens))[tuple(tokens)]
    length = sum(mass * len(path) for (path, _), mass in laws[0].items())
    assert length == pytest.approx(expected, abs=ROUNDING)


def test_a_guess_that_the_target_excludes_is_never_taken() -> None:
    tree = DraftTree.from_lists([0, 1, 0], [-1, 0, 0])
    for verifier in VERIFIERS:
        law = verdict_law(verifier, tree, Fixed([[0.4, 0.0, 0.6]] * 3))
        assert {path for path, _ in law} == {(), (2,)}
        assert all(token != 1 for _, token in law)


def test_point_siblings_that_cover_the_target_leave_nothing_over() -> None:
    """After every other token was rejected the last one is certain, but for rounding."""
    tree = DraftTree.from_lists([0, 0, 1, 2], [-1, 0, 0, 0])
    third = 1.0 / 3.0
    law = verdict_law(REJECTION, tree, Fixed([[third, third, third]] * 4))
    assert accepted(law) == pytest.approx(1.0, abs=ROUNDING)


# --------------------------------------------------------------------------- drawn tokens


def test_one_child_is_leviathans_rule() -> None:
    for token in range(3):
        for draw in (IID, WOR):
            law = verdict_law(REJECTION, drawn_tree([token], draw, Q), Fixed([P] * 2))
            assert accepted(law) == pytest.approx(min(1.0, P[token] / Q[token]), abs=ROUNDING)
    law = verdict_law(REJECTION, drawn_tree([2], IID, Q), Fixed([P] * 2))
    rejected = {token: mass for (path, token), mass in law.items() if not path}
    # residual (0.3, 0.1, 0), normalised, times the chance 2/3 of a rejection
    assert rejected == pytest.approx({0: 2 / 3 * 0.75, 1: 2 / 3 * 0.25}, abs=ROUNDING)
    assert acceptance(IID, 1, P, Q) == pytest.approx(sum(map(min, P, Q)), abs=ROUNDING)


def test_a_leaf_is_followed_by_the_targets_law() -> None:
    bonus = [0.1, 0.2, 0.7]
    law = verdict_law(REJECTION, drawn_tree([0], IID, Q), Fixed([P, bonus]))
    assert {k: v for k, v in law.items() if k[0]} == pytest.approx(
        {((1,), token): p for token, p in enumerate(bonus)}, abs=ROUNDING
    )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_acceptance_of_independent_draws_has_a_closed_form(count: int) -> None:
    """1 - prod over rounds of (1 - sum min(p_i, q)), p_i the residual of round i."""
    p, missed = torch.tensor(P, dtype=torch.float64), 1.0
    q = torch.tensor(Q, dtype=torch.float64)
    for _ in range(count):
        missed *= 1.0 - float(torch.minimum(p, q).sum())
        p = (p - q).clamp(min=0.0)
        p = p / p.sum()
    assert acceptance(IID, count, P, Q) == pytest.approx(1.0 - missed, abs=ROUNDING)


def test_draws_without_replacement_cover_the_vocabulary() -> None:
    """As many siblings as tokens: one of them is accepted for sure; independent draws miss."""
    assert acceptance(WOR, 3, P, Q) == pytest.approx(1.0, abs=ROUNDING)
    assert acceptance(IID, 3, P, Q) < 0.99
    assert acceptance(WOR, 2, P, Q) > acceptance(IID, 2, P, Q)


def test_a_rejected_tokens_second_draw_is_never_accepted_but_counts() -> None:
    once = verdict_law(REJECTION, drawn_tree([2], IID, Q), Fixed([P] * 2))
    twice = verdict_law(REJECTION, drawn_tree([2, 2], IID, Q), Fixed([P] * 3))
    assert accepted(twice) == pytest.approx(accepted(once), abs=ROUNDING)
    assert {path for path, _ in twice} == {(), (1,)}
    # residual (0.75, 0.25, 0) less q, normalised: (0.55, 0.05, 0) / 0.6
    rejected = {token: mass for (path, token), mass in twice.items() if not path}
    assert rejected == pytest.approx({0: 2 / 3 * 55 / 60, 1: 2 / 3 * 5 / 60}, abs=ROUNDING)


@pytest.mark.parametrize("draw", [IID, WOR])
@pytest.mark.parametrize("tokens", [[0], [2], [1, 0], [0, 1, 2]])
def test_a_draft_equal_to_the_target_is_always_accepted(draw: Draw, tokens: list[int]) -> None:
    law = verdict_law(REJECTION, drawn_tree(tokens, draw, P), Fixed([P] * (len(tokens) + 1)))
    assert accepted(law) == pytest.approx(1.0, abs=ROUNDING)


def test_a_residual_that_rounding_empties_is_the_target_itself() -> None:
    """q is p times (1 + 1e-14): a rejection, possible by rounding only, must not divide by 0."""
    tree = drawn_tree([0], IID, [x * (1 + 1e-14) for x in P])
    law = verdict_law(REJECTION, tree, Fixed([P] * 2))
    after_rejection = [token for path, token in law if not path]
    assert after_rejection == [0, 1, 2]
    assert accepted(law) == pytest.approx(1.0, abs=1e-13)


def test_sparse_law_is_zero_where_it_names_nothing() -> None:
    """A token outside the support of q is reached through the residual; padding does nothing."""
    dense = drawn_tree([1], IID, [0.25, 0.75, 0.0])
    sparse = DraftTree.from_lists(
        [0, 1],
        [-1, 0],
        [POINT, IID],
        [-1, 0],
        LawRows(
            torch.tensor([[0.75, 0.25, 0.0, 0.0]], dtype=torch.float64).log(),
            torch.tensor([[1, 0, -1, -1]]),
        ),
    )
    laws = [verdict_law(REJECTION, tree, Fixed([P] * 2)) for tree in (dense, sparse)]
    assert laws[0] == pytest.approx(laws[1], abs=ROUNDING)
    assert laws[0][(), 2] > 0.0


def test_a_last_sibling_that_underflows_is_passed_over() -> None:
    """Its law is all rounding: nothing to divide by, and nothing that may be accepted on it."""
    log_q = torch.tensor([[0.0, -800.0, -torch.inf]], dtype=torch.float64)
    tree = DraftTree.from_lists(
        [0, 0, 1], [-1, 0, 0], [POINT, WOR, WOR], [-1, 0, 0], LawRows(log_q)
    )
    law = verdict_law(REJECTION, tree, Fixed([P] * 3))
    # q is a point mass at 0: accepted with p(0), then the rest of p
    assert accepted(law) == pytest.approx(P[0], abs=ROUNDING)
    rejected = {token: mass for (path, token), mass in law.items() if not path}
    assert rejected == pytest.approx({1: P[1], 2: P[2]}, abs=ROUNDING)


@pytest.mark.parametrize(
    ("tokens", "draws", "expected"),
    [
        # 1 was drawn with q = (0.2, 0.2, 0.6) less token 2: (0.5, 0.5, 0)
        ([2, 1], [POINT, WOR], 0.2 + 0.8 * min(1.0, 0.375 / 0.5)),
        # q as it is, although 2 is gone from p
        ([2, 1], [POINT, IID], 0.2 + 0.8 * 1.0),
    ],
)
def test_law_of_a_sibling_behind_a_point_mass(
    tokens: list[int], draws: list[Draw], expected: float
) -> None:
    law = LawRows(torch.tensor([Q], dtype=torch.float64).log())
    tree = DraftTree.from_lists([0, *tokens], [-1, 0, 0], [POINT, *draws], [-1, 0, 0], law)
    assert accepted(verdict_law(REJECTION, tree, Fixed([P] * 3))) == pytest.approx(
        expected, abs=ROUNDING
    )


# --------------------------------------------------------------------------- coupled


def test_coupled_emits_the_perturbed_argmax_of_each_position() -> None:
    target = ToyTarget(6, 3)
    draft = ToyDraft(6, 3, sparse=True)
    loop = ToyLoop(Static(draw=Draw.COUPLED), COUPLED, target, draft, Budget(40, 3))
    depths = set()
    for seed in range(10):
        tokens = loop.step(PREFIX, row_streams(seed, 4))
        depths.add(len(tokens))
        for length, token in enumerate(tokens):
            prefix = (*PREFIX, *tokens[:length])
            noise = row_streams(seed, 4).draft.keyed_noise(len(prefix), torch.arange(6))
            assert token == int(torch.argmax(target.scores(prefix) + noise))
    assert len(depths) > 1


@pytest.mark.parametrize(
    "policy",
    [Chain(Draw.COUPLED), Static([(0,), (1,), (0, 0), (0, 0, 0)], Draw.COUPLED)],
    ids=["chain", "static"],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_guesses_by_the_verifiers_noise_hit_when_the_draft_is_right(
    policy: TreePolicy, sparse: bool
) -> None:
    """A draft that is the target itself guesses every token of the text."""
    target = ToyTarget(5, 2)

    class Same(ToyDraft):
        def logits(self, prefix: tuple[int, ...]) -> torch.Tensor:
            return target.logits(prefix)

    loop = ToyLoop(policy, COUPLED, target, Same(5, sparse=sparse), Budget(4, 3))
    assert [len(loop.step(PREFIX, row_streams(seed, 0))) for seed in range(10)] == [4] * 10
