"""Losslessness: the exact law of the emitted text equals the target's, over two steps in a row.

All draws of the production policies and verifiers are enumerated, in float64, over three or four
tokens. tests/test_mutants.py shows what these checks catch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice, product

import pytest
import torch

from specdec.errors import ConfigError
from specdec.random import RandomSource, RowStreams, SeededRandom, row_streams
from specdec.testing.enumerate import MisuseError, enumerate_law, shared_streams
from specdec.testing.monte_carlo import chi_square, noise_table, tabulated_streams
from specdec.testing.toys import (
    ToyDraft,
    ToyLoop,
    ToyTarget,
    keep_top,
    repetition_penalty,
    total_variation,
)
from specdec.trees import BestFirst, Chain, CoupledBestFirst, MonteCarlo, Static
from specdec.trees.build import TreeBuilder
from specdec.types import Budget, DraftLaw, Draw, GrowPlan, LawRows, Root, TreePolicy, Verifier
from specdec.verifiers import Coupled, Match, Rejection

EXACT = 1e-12  # float64 leaves about 1e-16
# a chi-square test of right code fails with this probability; seeds are fixed, so it never does
FALSE_ALARM = 1e-9
PREFIX = (0, 1)
VERIFIERS: list[Verifier] = [Match(), Rejection(), Coupled()]
INDEPENDENT = (Draw.POINT, Draw.IID, Draw.WOR)

TWO_BY_TWO = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
UNEVEN = [(0,), (1,), (1, 0), (0, 0), (0, 1)]
SIBLINGS = [(0,), (1,), (2,)]


def policies(draw: Draw) -> dict[str, tuple[TreePolicy, list[Budget]]]:
    """The policies that can draw so, each with the budgets of two steps."""
    small = Budget(1, 1)
    if draw == Draw.POINT:
        return {
            "chain": (Chain(), [Budget(2, 2), small]),
            "static": (Static(TWO_BY_TWO), [Budget(6, 2), Budget(2, 1)]),
            "best_first": (BestFirst(max_branching=2), [Budget(4, 3), small]),
            "monte_carlo": (MonteCarlo(num_iterations=12), [Budget(4, 3), small]),
        }
    return {
        "chain": (Chain(draw), [Budget(2, 2), small]),
        "static": (Static(UNEVEN[:3], draw), [Budget(3, 2), small]),
        "siblings": (Static(SIBLINGS, draw), [Budget(3, 1), small]),
    }


def toy_target(seed: int, *, greedy: bool = False, vocab_size: int = 3) -> ToyTarget:
    """Targets with rules on the prefix, and in every third one a token that p never emits."""
    rules = [repetition_penalty(1.7)]
    if seed % 3 == 2:
        rules.append(keep_top(2))
    return ToyTarget(vocab_size, seed, sharpness=1.2, processors=rules, greedy=greedy)


# dense, sparse, and both with tokens that the draft law never draws; the last one knows nothing
# beyond one more token
DRAFTS: dict[str, Callable[[int], ToyDraft]] = {
    "dense": lambda seed: ToyDraft(3, seed),
    "sparse": lambda seed: ToyDraft(3, seed, sparse=True),
    "dense_cut": lambda seed: ToyDraft(3, seed, support=2),
    "sparse_cut": lambda seed: ToyDraft(3, seed, support=2, sparse=True),
    "short": lambda seed: ToyDraft(3, seed, support=2, sparse=True, known_length=len(PREFIX) + 1),
}


def matrix() -> list[object]:
    """Every verifier with every draw it accepts, every policy and every form of draft law."""
    cases = []
    for verifier, draw in product(VERIFIERS, INDEPENDENT):
        if draw in verifier.accepts:
            # coupled never looks at q or draws: two forms of drawn trees are enough there
            few = verifier.name == "coupled" and draw != Draw.POINT
            for draft, policy in product(
                ["dense", "sparse_cut"] if few else DRAFTS, policies(draw)
            ):
                name = f"{verifier.name}-{draw.name}-{policy}-{draft}"
                cases.append(pytest.param(verifier, draw, policy, draft, id=name))
    return cases


# --------------------------------------------------------------------------- the test double


def _two_draws(source: RandomSource, log_weights: torch.Tensor) -> tuple[int, ...]:
    (stream,) = source.without_replacement(log_weights.unsqueeze(0))
    return tuple(index for index, _ in islice(stream, 2))


def test_enumeration_gives_the_laws_of_the_draws() -> None:
    weights = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    log_weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    assert enumerate_law(lambda s: s.draft.bernoulli(0.25)) == {True: 0.25, False: 0.75}
    assert enumerate_law(lambda s: s.draft.bernoulli(7.0)) == {True: 1.0}
    assert enumerate_law(lambda s: s.draft.bernoulli(0.0)) == {False: 1.0}
    assert enumerate_law(lambda s: s.draft.categorical(weights)) == {0: 0.25, 2: 0.75}
    drawn = enumerate_law(lambda s: _two_draws(s.draft, log_weights))
    assert len(drawn) == 6
    assert drawn[0, 2] == pytest.approx(0.5 * 0.3 / 0.5, abs=1e-15)
    assert drawn[1, 0] == pytest.approx(0.2 * 0.5 / 0.8, abs=1e-15)


def test_enumeration_draws_from_both_streams_independently() -> None:
    law = enumerate_law(lambda s: (s.draft.bernoulli(0.25), s.verify.bernoulli(0.5)))
    assert law[True, True] == 0.125
    assert sum(law.values()) == 1.0


def test_enumerated_noise_is_one_choice_per_position() -> None:
    scores = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def twice(streams: RowStreams) -> tuple[int, int, int]:
        first = streams.verify.gumbel_argmax(scores, 7)
        return (
            first,
            streams.draft.gumbel_argmax(scores.clone(), 7),
            streams.verify.gumbel_argmax(scores, 8),
        )

    law = enumerate_law(twice)
    p = torch.softmax(scores, dim=0).tolist()
    assert law.keys() == {(i, i, j) for i in range(2) for j in range(2)}
    assert law[1, 1, 0] == pytest.approx(p[1] * p[0], abs=1e-15)


def test_enumeration_refuses_misuse() -> None:
    scores = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def other_scores(streams: RowStreams) -> int:
        streams.draft.gumbel_argmax(scores, 7)
        return streams.verify.gumbel_argmax(2 * scores, 7)

    with pytest.raises(MisuseError, match="noise of position 7"):
        enumerate_law(other_scores)
    with pytest.raises(MisuseError, match="positive sum"):
        enumerate_law(lambda s: s.draft.categorical(torch.zeros(2)))
    with pytest.raises(MisuseError, match="negative or NaN"):
        enumerate_law(lambda s: s.draft.bernoulli(math.nan))
    with pytest.raises(MisuseError, match="cannot be enumerated"):
        enumerate_law(lambda s: s.draft.keyed_noise(0, torch.arange(3)).sum())


def test_enumeration_notices_state_that_outlives_a_run() -> None:
    runs: list[int] = []

    def other_weights(streams: RowStreams) -> bool:
        runs.append(0)
        return streams.draft.bernoulli(0.5 if len(runs) == 1 else 0.25)

    def fewer_draws(streams: RowStreams) -> None:
        runs.append(0)
        if len(runs) == 1:
            streams.draft.bernoulli(0.5)

    with pytest.raises(MisuseError, match="another draw"):
        enumerate_law(other_weights)
    runs.clear()
    with pytest.raises(MisuseError, match="fewer draws"):
        enumerate_law(fewer_draws)


def test_shared_stream_uses_one_uniform_for_both_draws() -> None:
    halves = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    law = enumerate_law(
        lambda s: (s.draft.categorical(halves), s.verify.bernoulli(0.6), s.verify.bernoulli(0.5)),
        shared_streams,
    )
    expected = {(0, True): 0.5, (1, True): 0.1, (1, False): 0.15, (2, False): 0.25}
    firsts: dict[tuple[int, bool], float] = {}
    for (token, accepted, _), mass in law.items():
        firsts[token, accepted] = firsts.get((token, accepted), 0.0) + mass
    assert firsts.keys() == expected.keys()
    for outcome, mass in expected.items():
        assert firsts[outcome] == pytest.approx(mass, abs=1e-15)
    assert law[0, True, False] == pytest.approx(0.25, abs=1e-15)  # a second uniform is new


def test_shared_stream_agrees_with_two_generators_of_one_seed() -> None:
    weights = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)

    def run(streams: RowStreams) -> tuple[int, ...]:
        first = streams.draft.categorical(weights)
        second = streams.draft.categorical(weights.flip(0))
        return first, second, streams.verify.categorical(weights.square())

    def same(row: int) -> RowStreams:
        return RowStreams(SeededRandom(5, row, 0), SeededRandom(5, row, 0))

    law = enumerate_law(run, shared_streams)
    result = chi_square([run(same(row)) for row in range(4000)], law)
    assert not result.rejects(1e-6)


# --------------------------------------------------------------------------- exact laws


@pytest.mark.parametrize(("verifier", "draw", "policy", "draft"), matrix())
def test_text_of_two_steps_follows_the_target(
    verifier: Verifier, draw: Draw, policy: str, draft: str
) -> None:
    tree_policy, budgets = policies(draw)[policy]
    number = list(DRAFTS).index(draft)
    for seed in (number, number + 7) if draw == Draw.POINT else (number,):
        loop = ToyLoop(tree_policy, verifier, toy_target(seed), DRAFTS[draft](seed), budgets[0])
        assert loop.error(PREFIX, budgets) < EXACT


@pytest.mark.parametrize(("verifier", "draw", "policy", "draft"), matrix())
def test_greedy_text_is_the_argmax(verifier: Verifier, draw: Draw, policy: str, draft: str) -> None:
    tree_policy, budgets = policies(draw)[policy]
    target = toy_target(3, greedy=True)
    loop = ToyLoop(tree_policy, verifier, target, DRAFTS[draft](4), budgets[0])
    law = loop.output_law(PREFIX, budgets)
    (greedy_text,) = target.text_law(PREFIX, max(map(len, law)))
    assert all(text == greedy_text[: len(text)] for text in law)
    assert sum(law.values()) == pytest.approx(1.0, abs=EXACT)


@pytest.mark.parametrize(
    ("verifier", "draw"),
    [
        pytest.param(verifier, draw, id=f"{verifier.name}-{draw.name}")
        for verifier in VERIFIERS
        for draw in INDEPENDENT
        if draw in verifier.accepts
    ],
)
def test_nothing_passes_from_step_to_step(verifier: Verifier, draw: Draw) -> None:
    """Both steps as one run, with one pair of streams: noise used twice would show."""
    budgets = [Budget(2, 1), Budget(1, 1)]
    for policy in (Chain(draw), Static(SIBLINGS, draw))[: 1 if verifier.name == "coupled" else 2]:
        loop = ToyLoop(policy, verifier, toy_target(1), ToyDraft(3, 1), budgets[0])
        joint = loop.output_law(PREFIX, budgets, joint=True)
        assert total_variation(joint, loop.output_law(PREFIX, budgets)) < EXACT
        assert loop.error(PREFIX, budgets, joint=True) < EXACT


@pytest.mark.parametrize(
    ("draw", "draft"),
    [
        (Draw.WOR, ToyDraft(3, 0)),
        (Draw.WOR, ToyDraft(3, 1, support=2, sparse=True)),
        (Draw.IID, ToyDraft(3, 2, support=2, sparse=True)),
    ],
)
def test_two_by_two_trees_of_drawn_tokens(draw: Draw, draft: ToyDraft) -> None:
    loop = ToyLoop(Static(TWO_BY_TWO, draw), Rejection(), toy_target(0), draft, Budget(6, 2))
    assert loop.error(PREFIX, [Budget(6, 2), Budget(1, 1)]) < EXACT


@pytest.mark.parametrize("draw", [Draw.IID, Draw.WOR])
def test_four_tokens_and_three_siblings(draw: Draw) -> None:
    template = [*SIBLINGS, (0, 0)]
    draft = ToyDraft(4, 3, support=3)
    target = toy_target(1, vocab_size=4)
    loop = ToyLoop(Static(template, draw), Rejection(), target, draft, Budget(4, 2))
    assert loop.error(PREFIX, [Budget(4, 2), Budget(1, 1)]) < EXACT


@pytest.mark.parametrize("draw", [Draw.IID, Draw.WOR])
def test_a_draft_that_is_the_target_itself(draw: Draw) -> None:
    """p = q: residuals are zero but for rounding, and every token of a chain is accepted."""
    target = ToyTarget(3, 4)

    class Same(ToyDraft):
        def logits(self, prefix: tuple[int, ...]) -> torch.Tensor:
            return target.logits(prefix)

    loop = ToyLoop(Chain(draw), Rejection(), target, Same(), Budget(2, 2))
    law = loop.output_law(PREFIX, [Budget(2, 2)])
    assert sum(mass for text, mass in law.items() if len(text) < 3) < EXACT
    assert loop.error(PREFIX, [Budget(2, 2), Budget(1, 1)]) < EXACT


def first_tokens(law: dict[tuple[int, ...], float], count: int) -> dict[tuple[int, ...], float]:
    firsts: dict[tuple[int, ...], float] = {}
    for text, mass in law.items():
        firsts[text[:count]] = firsts.get(text[:count], 0.0) + mass
    return firsts


@pytest.mark.parametrize(
    ("policy", "budget"),
    [(Chain(Draw.IID), Budget(1, 1)), (Static(SIBLINGS, Draw.WOR), Budget(2, 1))],
    ids=["chain", "siblings"],
)
def test_production_streams_give_the_targets_law(policy: TreePolicy, budget: Budget) -> None:
    """The seeded sources themselves; one stream for both of a row would be seen for sure."""
    loop = ToyLoop(policy, Rejection(), ToyTarget(3, 2, sharpness=0.7), ToyDraft(3, 2), budget)
    expected = loop.target.text_law(PREFIX, 2)
    texts = [loop.text(PREFIX, row_streams(31, row), 2) for row in range(700)]
    result = chi_square(texts, expected)
    assert not result.rejects(FALSE_ALARM)
    shared = first_tokens(loop.output_law(PREFIX, joint=True, streams=shared_streams), 2)
    distance = sum((shared.get(text, 0.0) - p) ** 2 / p for text, p in expected.items())
    assert result.miss_probability(len(texts) * distance, FALSE_ALARM) < 1e-6


# --------------------------------------------------------------------------- mixed trees


class Mixed:
    """One level of children that come to be in different ways, and one POINT child below the first.

    Args:
        recipe: the draws of the children in order. "rest" draws from q with the tokens so far
            zeroed, kept as a law of its own; IID and WOR draw from the law of the node.
    """

    name = "mixed"
    draws = frozenset({Draw.POINT, Draw.IID, Draw.WOR})

    def __init__(self, *recipe: Draw | str) -> None:
        self._recipe = recipe

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        builder = TreeBuilder(root.token)
        rows = yield [0]
        own_row = builder.add_law(rows, 0)
        log_probs = rows.log_probs[0]
        taken: list[int] = []
        for how in self._recipe:
            rest = log_probs.clone()
            rest[taken] = -torch.inf
            if how == Draw.POINT:
                token, draw, q_row = int(torch.argmax(rest)), Draw.POINT, -1
            elif how == Draw.IID:
                token, draw, q_row = random.categorical(log_probs.exp()), Draw.IID, own_row
            elif how == Draw.WOR:
                token, draw, q_row = random.categorical(rest.exp()), Draw.WOR, own_row
            else:
                q_row = builder.add_law(LawRows(rest.log_softmax(-1).unsqueeze(0)), 0)
                token, draw = random.categorical(rest.exp()), Draw.IID
            taken.append(token)
            builder.add(0, token, law.extend(0, token), draw, q_row)
        if len(builder) > 1:
            rows = yield [builder.handles[1]]
            token = int(torch.argmax(rows.log_probs[0]))
            builder.add(1, token, law.extend(builder.handles[1], token))
        return builder.build()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "recipe",
    [
        (Draw.IID, Draw.POINT),
        (Draw.WOR, Draw.POINT, Draw.POINT),
        (Draw.POINT, "rest"),
        (Draw.POINT, Draw.WOR),
        (Draw.POINT, Draw.IID),
        (Draw.IID, Draw.WOR),
        (Draw.WOR, Draw.IID),
        (Draw.WOR, Draw.IID, Draw.WOR),
        (Draw.IID, Draw.POINT, Draw.WOR),
        (Draw.IID, Draw.IID, "rest", Draw.POINT),
    ],
    ids=lambda recipe: "-".join(str(getattr(how, "name", how)) for how in recipe),
)
def test_siblings_drawn_in_different_ways(recipe: tuple[Draw | str, ...], seed: int) -> None:
    draft = ToyDraft(4, seed)
    loop = ToyLoop(Mixed(*recipe), Rejection(), toy_target(seed, vocab_size=4), draft, Budget(5, 2))
    assert loop.error(PREFIX, [Budget(5, 2)]) < EXACT


def test_top_tokens_behind_one_drawn_from_the_rest() -> None:
    """The top token is fixed first but tested last; the drawn one follows q without it."""

    class SampledFirst:
        name = "sampled_first"
        draws = frozenset({Draw.POINT, Draw.IID})

        def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
            builder = TreeBuilder(root.token)
            rows = yield [0]
            top = int(torch.argmax(rows.log_probs[0]))
            rest = rows.log_probs[0].clone()
            rest[top] = -torch.inf
            q_row = builder.add_law(LawRows(rest.log_softmax(-1).unsqueeze(0)), 0)
            sampled = random.categorical(rest.exp())
            builder.add(0, sampled, law.extend(0, sampled), Draw.IID, q_row)
            builder.add(0, top, law.extend(0, top))
            return builder.build()

    for seed in range(3):
        target, draft = toy_target(seed), ToyDraft(3, seed)
        loop = ToyLoop(SampledFirst(), Rejection(), target, draft, Budget(2, 1))
        assert loop.error(PREFIX) < EXACT
        law = loop.output_law(PREFIX, [Budget(2, 1)])
        p, q = target.probs(PREFIX), draft.log_probs(PREFIX).exp()
        top = int(torch.argmax(q))
        rest = q.clone()
        rest[top] = 0.0
        others = torch.minimum(p, rest / rest.sum()).sum()  # closed form of arXiv 2502.18779
        accepted = sum(mass for text, mass in law.items() if len(text) == 2)
        assert accepted == pytest.approx(float(p[top] + others), abs=EXACT)


# --------------------------------------------------------------------------- coupled


def test_draws_with_the_verifiers_noise_are_for_coupled_only() -> None:
    assert {v.name for v in VERIFIERS if Draw.COUPLED in v.accepts} == {"coupled"}
    for verifier in (Match(), Rejection()):
        loop = ToyLoop(Chain(Draw.COUPLED), verifier, ToyTarget(), ToyDraft(), Budget(1, 1))
        with pytest.raises(ConfigError, match=f"{verifier.name} does not accept COUPLED"):
            loop.step(PREFIX, row_streams(0, 0))


def coupled_loops(vocab_size: int, target: ToyTarget) -> Iterator[ToyLoop]:
    drafts = [
        ToyDraft(vocab_size, 1),
        ToyDraft(vocab_size, 2, sparse=True, support=3),
        ToyDraft(vocab_size, 3, sharpness=8.0),
        ToyDraft(vocab_size, 4, known_length=len(PREFIX) + 3),
    ]
    trees = [
        *((Chain(draw), Budget(4, 3)) for draw in Draw),
        *((Static(UNEVEN, draw), Budget(5, 4)) for draw in Draw),
        (Static(draw=Draw.COUPLED), Budget(40, 3)),
        (CoupledBestFirst(), Budget(6, 3)),
        (CoupledBestFirst(), Budget(6, 3, least_chance=0.3)),
        (CoupledBestFirst(max_branching=1), Budget(4, 4)),
        (BestFirst(), Budget(9, 4)),
        (BestFirst(), Budget(1, 1)),
    ]
    for index, (policy, budget) in enumerate(trees):
        yield ToyLoop(policy, Coupled(), target, drafts[index % len(drafts)], budget)
        yield ToyLoop(policy, Coupled(), target, drafts[(index + 1) % len(drafts)], budget)


@pytest.mark.parametrize("greedy", [False, True])
def test_coupled_text_is_the_same_for_every_tree(greedy: bool) -> None:
    rules = [repetition_penalty(1.3), keep_top(4)]
    target = ToyTarget(5, 11, sharpness=0.7, processors=rules, greedy=greedy)
    plain = ToyLoop(Chain(), Coupled(), target, ToyDraft(5), Budget(0, 0))
    texts = {}
    for seed in (3, -1):
        texts[seed] = plain.text(PREFIX, row_streams(seed, 0), 8)
        lengths = set()
        for loop in coupled_loops(5, target):
            assert loop.text(PREFIX, row_streams(seed, 0), 8) == texts[seed]
            lengths.add(len(loop.step(PREFIX, row_streams(seed, 0))))
        assert len(lengths) > 1  # else no draft token was ever accepted
    other_row = plain.text(PREFIX, row_streams(3, 1), 8)
    assert (texts[3] == texts[-1] == other_row) == greedy
    assert (texts[3] == other_row) == greedy


NUM_TEXTS = 2500


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return noise_table(seed=77, num_rows=NUM_TEXTS, num_positions=12)


def test_tabulated_noise_is_the_production_noise(noise: torch.Tensor) -> None:
    scores = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    for row in (0, 1, NUM_TEXTS - 1):
        table, source = tabulated_streams(77, row, noise), row_streams(77, row)
        for position in (0, 5, 11):
            assert torch.equal(
                table.draft.keyed_noise(position, torch.arange(4)),
                source.draft.keyed_noise(position, torch.arange(4)),
            )
            assert table.verify.gumbel_argmax(scores, position) == source.verify.gumbel_argmax(
                scores, position
            )


@pytest.mark.parametrize(
    ("policy", "budget"),
    [
        (Chain(Draw.COUPLED), Budget(2, 2)),
        (Static([(0,), (1,), (0, 0)], Draw.COUPLED), Budget(3, 2)),
        (CoupledBestFirst(), Budget(2, 2)),
    ],
    ids=["chain", "static", "best_first"],
)
def test_coupled_text_follows_the_target(
    policy: TreePolicy, budget: Budget, noise: torch.Tensor
) -> None:
    """Rows of one seed as samples; tests/test_mutants.py computes what this number would catch."""
    target = ToyTarget(3, 5, order=1, sharpness=0.6)
    loop = ToyLoop(policy, Coupled(), target, ToyDraft(3, 6), budget)
    texts = [loop.text(PREFIX, tabulated_streams(77, r, noise), 3) for r in range(NUM_TEXTS)]
    result = chi_square(texts, target.text_law(PREFIX, 3))
    assert not result.rejects(FALSE_ALARM)
    # power against every law 0.15 away in total variation, since sum (p' - p)^2 / p >= 4 TV^2
    assert result.degrees == 26
    assert result.miss_probability(NUM_TEXTS * 4 * 0.15**2, FALSE_ALARM) < 1e-6


def test_coupled_text_follows_the_target_over_seeds() -> None:
    target = ToyTarget(3, 5, order=1, sharpness=0.6)
    loop = ToyLoop(Chain(Draw.COUPLED), Coupled(), target, ToyDraft(3, 6), Budget(1, 1))
    texts = [loop.text(PREFIX, row_streams(seed, 0), 2) for seed in range(-300, 300)]
    assert not chi_square(texts, target.text_law(PREFIX, 2)).rejects(FALSE_ALARM)


def test_noise_of_many_rows_gives_the_targets_law() -> None:
    """The law of plain coupled decoding, with power against an error of 0.01 in total variation."""
    num_rows = 200_000
    target = ToyTarget(3, 8, order=1, sharpness=0.8)
    table = noise_table(seed=-5, num_rows=num_rows, num_positions=5)[..., :3]
    scores = torch.stack([target.scores((token,)) for token in range(3)])
    token = torch.zeros(num_rows, dtype=torch.int64)
    texts = []
    for position in range(1, 5):
        token = torch.argmax(scores[token] + table[:, position], dim=1)
        texts.append(token)
    samples = map(tuple, torch.stack(texts, dim=1).tolist())
    result = chi_square(samples, target.text_law((0,), 4))
    assert not result.rejects(FALSE_ALARM)
    assert result.miss_probability(num_rows * 4 * 0.02**2, FALSE_ALARM) < 1e-6
