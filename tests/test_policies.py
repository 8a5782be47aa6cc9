"""Tree policies beyond the first three, and the verifiers made for them.

Every policy x verifier that declare each other is enumerated over two steps; shapes, properties and
errors are tested below. RSD-S draws continuous values, so it is tested by a powered chi-square.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from specdec import build
from specdec.build import build_policy
from specdec.errors import ConfigError, LogitsError
from specdec.random import SeededRandom, row_streams
from specdec.testing.monte_carlo import chi_square
from specdec.testing.toys import ToyDraft, ToyLoop, ToyTarget, repetition_penalty
from specdec.trees import (
    BestFirst,
    Chain,
    DraftTree,
    DySpec,
    DySpecLayered,
    DySpecThreshold,
    Iid,
    Marginals,
    MonteCarlo,
    RsdC,
    RsdS,
    SampledPlusTop,
    Sequoia,
    Static,
    Stem,
    TopN,
)
from specdec.trees.grow import grow_trees
from specdec.trees.templates import (
    branching_template,
    default_branching,
    sequoia_template,
    sequoia_value,
)
from specdec.types import Budget, Draw, LawRows, Root
from specdec.verifiers import Block, Coupled, Match, Rejection, SpecTr, Traversal
from specdec.verifiers.optimal import (
    closed_form,
    iid_tuples,
    max_flow,
    reduced_lp,
    transport_lp,
    wor_tuples,
)
from specdec.verifiers.spectr import solve_rho

EXACT = 1e-12
FALSE_ALARM = 1e-9
PREFIX = (0, 1)

POLICIES = {
    "dyspec": (DySpec(), Budget(4, 3)),
    "dyspec_layered": (DySpecLayered(), Budget(4, 3)),
    "dyspec_threshold": (DySpecThreshold(0.2), Budget(4, 3)),
    "rsd_c": (RsdC([2, 1]), Budget(4, 2)),
    "sequoia": (Sequoia([0.6, 0.3]), Budget(3, 2)),
    "stem": (Stem(1, 2), Budget(3, 2)),
    "iid": (Iid(2), Budget(4, 2)),
    "iid trie": (Iid(2, merge=True), Budget(4, 2)),
    "sampled_plus_top": (SampledPlusTop([2, 1]), Budget(4, 2)),
    "top_n": (TopN(width=2), Budget(4, 3)),
    "marginals": (Marginals(), Budget(4, 3)),
    "monte_carlo": (MonteCarlo(num_iterations=12), Budget(4, 3)),
    "chain of draws": (Chain(Draw.IID), Budget(3, 3)),
    "chain": (Chain(), Budget(3, 3)),
    "best_first": (BestFirst(), Budget(3, 3)),
    "best_first, the hopeless left out": (BestFirst(), Budget(4, 3, least_chance=0.25)),
}
VERIFIERS = (Match(), Rejection(), Traversal(), SpecTr(), Block(), Coupled())


def pairs() -> list[object]:
    cases = []
    for (name, (policy, budget)), verifier in itertools.product(POLICIES.items(), VERIFIERS):
        declared = policy.draws <= verifier.accepts
        tested = ("chain", "chain of draws", "best_first", "monte_carlo")
        known = name in tested and verifier.name in (
            "match",
            "rejection",
            "coupled",
        )  # test_exactness.py has these
        if declared and not known and (verifier.name != "block" or name.startswith("chain")):
            cases.append(pytest.param(policy, budget, verifier, id=f"{name}-{verifier.name}"))
    return cases


def loop_over(policy, verifier, budget, seed=0, sparse=False, **target):
    rules = [repetition_penalty(1.7)]
    return ToyLoop(
        policy,
        verifier,
        ToyTarget(3, seed, sharpness=1.2, processors=rules, **target),
        ToyDraft(3, seed, sparse=sparse),
        budget,
    )


def grow(policy, draft, budget, random=None, prefix=PREFIX) -> DraftTree:
    law = draft.law(prefix)
    random = random or row_streams(0, 0).draft
    plan = policy.grow(law, Root(prefix[-1], len(prefix) - 1), budget, random)
    return grow_trees([(law, plan)], lambda asked: [one.rows(h) for one, h in asked])[0]


# --------------------------------------------------------------------------- exactness


@pytest.mark.parametrize(("policy", "budget", "verifier"), pairs())
def test_two_steps_follow_the_target_exactly(policy, budget, verifier) -> None:
    loop = loop_over(policy, verifier, budget, seed=2, sparse=True)
    assert loop.error(PREFIX, [budget, Budget(budget.nodes, 1)]) < EXACT


@pytest.mark.parametrize("verifier", VERIFIERS, ids=lambda v: v.name)
@pytest.mark.parametrize("name", ["dyspec_layered", "iid", "sampled_plus_top", "chain", "top_n"])
def test_at_temperature_zero_every_rule_follows_the_argmax(name, verifier) -> None:
    policy, budget = POLICIES[name]
    if not policy.draws <= verifier.accepts or (verifier.name == "block" and name != "chain"):
        pytest.skip("these two do not declare each other")
    loop = loop_over(policy, verifier, budget, seed=1, greedy=True)
    assert loop.error(PREFIX) < EXACT
    texts = {loop.text(PREFIX, row_streams(seed, 0), 5) for seed in range(5)}
    assert len(texts) == 1


@pytest.mark.parametrize("verifier", [Rejection(), Traversal()], ids=lambda v: v.name)
@pytest.mark.parametrize("seed", [0, 1])
def test_rsd_s_follows_the_target(verifier, seed) -> None:
    loop = loop_over(RsdS(2), verifier, Budget(6, 3), seed=seed)
    texts = [loop.text(PREFIX, row_streams(run, 0), 2) for run in range(6000)]
    result = chi_square(texts, loop.target.text_law(PREFIX, 2))
    assert not result.rejects(FALSE_ALARM)


class SortedSiblings:
    """MUTANT: a tree's siblings tested in falling order of their own draft probability."""

    accepts = Rejection.accepts
    name = "sorted"

    def __init__(self, verifier) -> None:
        self._verifier = verifier

    def verify(self, tree, target, random):
        q = tree.q.log_probs
        children = [
            sorted(nodes, key=lambda n: -float(q[tree.q_row_list[n], tree.token_list[n]]))
            for nodes in tree.children
        ]
        tree.__dict__["children"] = children  # the cached property
        return self._verifier.verify(tree, target, random)


def test_rsd_s_with_sorted_siblings_is_caught() -> None:
    """TV 0.05 or more on these laws: far beyond what the test above lets through."""
    loop = loop_over(RsdS(2), SortedSiblings(Rejection()), Budget(6, 3), seed=0)
    texts = [loop.text(PREFIX, row_streams(run, 0), 2) for run in range(6000)]
    assert chi_square(texts, loop.target.text_law(PREFIX, 2)).rejects(FALSE_ALARM)


class StopsAtFirstFailure(Block):
    """MUTANT: token by token with block verification's coins."""

    def verify(self, tree, target, random):
        first = FirstFailure(random)
        return super().verify(tree, target, first)


class FirstFailure:
    """After the first coin that fails, all coins fail."""

    def __init__(self, random) -> None:
        self._random, self._failed = random, False

    def bernoulli(self, probability: float) -> bool:
        self._failed = self._failed or not self._random.bernoulli(probability)
        return not self._failed

    def categorical(self, weights):
        return self._random.categorical(weights)


class UncappedTraversal(Traversal):
    """MUTANT: a rejected leaf leaves its parent's law as it was."""

    def verify(self, tree, target, random):
        rows = {}

        class Fixed:
            greedy = target.greedy

            def row(self, node):
                return rows.setdefault(node, target.row(node))

        verdict = super().verify(tree, Fixed(), Recorder(random))
        node = verdict.path[-1] if verdict.path else 0
        return type(verdict)(verdict.path, random.categorical(target.row(node)))


class Recorder(FirstFailure):
    """Coins as they are; the last token is drawn elsewhere."""

    def bernoulli(self, probability: float) -> bool:
        return self._random.bernoulli(probability)

    def categorical(self, weights):
        return 0


class GreedyRho(SpecTr):
    """MUTANT: K-SEQ with rho = 1, below the least valid one."""

    def verify(self, tree, target, random):
        import specdec.verifiers.spectr as module

        honest, module.solve_rho = module.solve_rho, lambda p, q, k: 1.0
        try:
            return super().verify(tree, target, random)
        finally:
            module.solve_rho = honest


class RerankedDySpec(DySpecLayered):
    """MUTANT: keeps the drawn nodes of largest own probability instead of the best slots."""

    def grow(self, law, root, budget, random):
        tree = yield from super().grow(law, root, Budget(2 * budget.nodes, budget.depth), random)
        value = [0.0] * len(tree)
        for node in range(1, len(tree)):
            row, token = tree.q_row_list[node], tree.token_list[node]
            ids = None if tree.q.ids is None else tree.q.ids[row]
            index = token if ids is None else int((ids == token).nonzero()[0])
            value[node] = value[tree.parent_list[node]] + float(tree.q.log_probs[row, index])
        kept = sorted(sorted(range(1, len(tree)), key=lambda n: -value[n])[: budget.nodes])
        places = {0: 0} | {node: place for place, node in enumerate(kept, start=1)}
        every = [0, *kept]
        return DraftTree.from_lists(
            [tree.token_list[n] for n in every],
            [-1] + [places[tree.parent_list[n]] for n in kept],
            [Draw(tree.draw_list[n]) for n in every],
            [tree.q_row_list[n] for n in every],
            tree.q,
        )


class UnlikelyDropped(Chain):
    """MUTANT: goes by the least chance for drawn nodes, and so looks at what they hold."""

    def grow(self, law, root, budget, random):
        tree = yield from super().grow(law, root, budget, random)
        chance, kept = 0.0, []
        for node in range(1, len(tree)):
            row, token = tree.q_row_list[node], tree.token_list[node]
            ids = None if tree.q.ids is None else tree.q.ids[row]
            index = token if ids is None else int((ids == token).nonzero()[0])
            chance += float(tree.q.log_probs[row, index])
            if chance < math.log(budget.least_chance):
                break
            kept.append(node)
        return tree.cut(kept)


@pytest.mark.parametrize(
    ("policy", "verifier", "budget"),
    [
        pytest.param(
            UnlikelyDropped(Draw.IID),
            Rejection(),
            Budget(2, 2, least_chance=0.3),
            id="unlikely draws dropped",
        ),
        pytest.param(
            Chain(Draw.IID), StopsAtFirstFailure(), Budget(3, 3), id="block, first failure"
        ),
        pytest.param(
            DySpecLayered(), UncappedTraversal(), Budget(3, 2), id="traversal, no residual"
        ),
        pytest.param(Iid(2), GreedyRho(), Budget(4, 2), id="K-SEQ, rho too small"),
        pytest.param(RerankedDySpec(), Rejection(), Budget(2, 2), id="drawn nodes reranked"),
    ],
)
def test_mutants_are_caught(policy, verifier, budget) -> None:
    errors = [loop_over(policy, verifier, budget, seed).error(PREFIX, [budget]) for seed in (0, 1)]
    assert max(errors) > 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_paths_below_the_least_chance_are_not_grown(seed) -> None:
    draft, least = ToyDraft(5, seed), 0.12
    everything = grow(BestFirst(), draft, Budget(12, 4))
    promising = grow(BestFirst(), draft, Budget(12, 4, least))
    assert 0 < promising.num_drafted < everything.num_drafted
    assert min(promising.path_chances[1:]) >= least


def test_nothing_is_asked_below_nodes_whose_children_hardly_promise_enough() -> None:
    def levels_asked(least: float) -> int:
        asked, law = 0, ToyDraft(5, 2).law(PREFIX)

        def expand(requests):
            nonlocal asked
            asked += 1
            return [one.rows(handles) for one, handles in requests]

        budget = Budget(12, 8, least)
        plan = BestFirst().grow(law, Root(PREFIX[-1], 0), budget, row_streams(0, 0).draft)
        tree = grow_trees([(law, plan)], expand)[0]
        assert asked >= max(tree.depth_list)
        return asked

    assert levels_asked(0.45) == 1 < levels_asked(0.15) < levels_asked(0.0)


def test_drawn_trees_do_not_look_at_the_least_chance() -> None:
    for policy in (Chain(Draw.IID), DySpec(), DySpecLayered(), RsdC([2, 1]), Sequoia(), Iid(2)):
        trees = [
            grow(policy, ToyDraft(4, 1), budget, row_streams(5, 0).draft)
            for budget in (Budget(4, 2), Budget(4, 2, least_chance=0.5))
        ]
        assert trees[0].token_list == trees[1].token_list


# --------------------------------------------------------------------------- acceptance


def accepted(policy, verifier, budget, seed) -> float:
    """Returns the expected number of tokens one step emits."""
    loop = loop_over(policy, verifier, budget, seed)
    law = loop.output_law(PREFIX, [budget])
    return sum(len(text) * mass for text, mass in law.items())


@pytest.mark.parametrize("seed", range(4))
def test_traversal_accepts_at_least_as_much_as_rejection(seed) -> None:
    for policy in (RsdC([2, 2]), SampledPlusTop([2, 2]), Iid(2)):
        budget = Budget(6, 2)
        more = accepted(policy, Traversal(), budget, seed)
        assert more >= accepted(policy, Rejection(), budget, seed) - 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_on_a_chain_traversal_is_block_verification(seed) -> None:
    chain, budget = Chain(Draw.IID), Budget(3, 3)
    block = loop_over(chain, Block(), budget, seed).output_law(PREFIX, [budget])
    traversal = loop_over(chain, Traversal(), budget, seed).output_law(PREFIX, [budget])
    assert block.keys() == traversal.keys()
    assert all(block[text] == pytest.approx(traversal[text], abs=1e-12) for text in block)
    assert accepted(chain, Block(), budget, seed) >= accepted(chain, Rejection(), budget, seed)


def random_laws(count: int, size: int = 5):
    generator = np.random.default_rng(0)
    for _ in range(count):
        sharpness = generator.choice([0.3, 1.0, 3.0])
        logits = sharpness * generator.normal(size=size)
        p = np.exp(logits) / np.exp(logits).sum()
        noisy = np.exp(logits + generator.normal(size=size))
        yield p, noisy / noisy.sum()


def one_level(verifier, draw: Draw, k: int, p, q) -> float:
    """Returns the chance that one node with k drawn children accepts one of them."""
    from specdec.random import RowStreams
    from specdec.testing.enumerate import enumerate_law

    class Law:
        def extend(self, parent: int, token: int) -> int:
            return token + 1

        def rows(self, handles):
            return LawRows(torch.tensor(q).log().expand(len(handles), -1))

    class Target:
        greedy = False

        def row(self, node: int):
            return torch.tensor(p)

    policy = Static([(i,) for i in range(k)], draw)

    def run(streams: RowStreams) -> bool:
        law = Law()
        plan = policy.grow(law, Root(0, 0), Budget(k, 1), streams.draft)
        tree = grow_trees([(law, plan)], lambda asked: [one.rows(h) for one, h in asked])[0]
        verdict = verifier.verify(tree, Target(), streams.verify)
        tokens = {tree.token_list[node] for node in tree.children[0]}
        return bool(verdict.path) or verdict.next_token in tokens

    return enumerate_law(run).get(True, 0.0)


@pytest.mark.parametrize("k", [2, 3])
def test_acceptance_lies_between_its_bounds(k) -> None:
    for p, q in random_laws(6, size=4):
        single = float(np.minimum(p, q).sum())
        iid, wor = iid_tuples(q, k), wor_tuples(q, k)
        rejection = one_level(Rejection(), Draw.IID, k, p, q)
        without = one_level(Rejection(), Draw.WOR, k, p, q)
        k_seq = one_level(SpecTr(), Draw.IID, k, p, q)
        best = closed_form(p, iid)
        assert single - 1e-9 <= rejection <= best + 1e-9
        assert (1 - (1 - 1 / k) ** k) * best - 1e-9 <= k_seq <= best + 1e-9
        assert rejection - 1e-9 <= without <= closed_form(p, wor) + 1e-9


@pytest.mark.parametrize("law", [iid_tuples, wor_tuples])
def test_the_four_forms_of_the_oracle_agree(law) -> None:
    for p, q in random_laws(8):
        tuples = law(q, 2)
        value = closed_form(p, tuples)
        for form in (transport_lp, reduced_lp, max_flow):
            assert form(p, tuples) == pytest.approx(value, abs=1e-6)


def test_rho_is_valid_and_least() -> None:
    for p, q in random_laws(20):
        p_, q_ = torch.tensor(p), torch.tensor(q)
        rho = solve_rho(p_, q_, 3)
        beta = float(torch.minimum(p_ / rho, q_).sum())
        assert 1 - (1 - beta) ** 3 <= rho * beta + 1e-12
        smaller = max(1.0, rho - 1e-6)
        beta = float(torch.minimum(p_ / smaller, q_).sum())
        assert smaller == 1.0 or 1 - (1 - beta) ** 3 >= smaller * beta - 1e-9


# --------------------------------------------------------------------------- shapes


class PathDraws:
    """Draws that depend on the law alone: the heap and the layered growth must then agree."""

    def without_replacement(self, log_weights):
        return [
            SeededRandom(hash(tuple(row.tolist())), 0, 0).without_replacement(row.unsqueeze(0))[0]
            for row in log_weights
        ]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("nodes", [1, 5, 16, 40])
def test_growing_by_level_gives_the_heaps_tree(nodes, sparse) -> None:
    for seed in range(4):
        draft = ToyDraft(7, seed, sparse=sparse)
        heap = grow(DySpec(), draft, Budget(nodes, 6), PathDraws())
        layered = grow(DySpecLayered(), draft, Budget(nodes, 6), PathDraws())
        paths = [sorted(tuple(t.path_tokens(n)) for n in range(len(t))) for t in (heap, layered)]
        assert paths[0] == paths[1]
        assert len(heap) == nodes + 1


def test_growing_by_level_asks_once_a_level() -> None:
    calls = []

    class Counting(ToyDraft):
        pass

    draft = Counting(7, 0)
    law = draft.law(PREFIX)
    plan = DySpecLayered().grow(law, Root(1, 1), Budget(30, 5), row_streams(0, 0).draft)

    def expand(asked):
        calls.append(len(asked[0][1]))
        return [one.rows(handles) for one, handles in asked]

    tree = grow_trees([(law, plan)], expand)[0]
    assert len(calls) <= 5
    assert max(tree.depth_list) <= 5


def test_the_threshold_bounds_every_slot() -> None:
    draft = ToyDraft(7, 3)
    tree = grow(DySpecThreshold(0.1), draft, Budget(60, 6))
    value = {0: 1.0}
    for node in range(1, len(tree)):
        parent = tree.parent_list[node]
        earlier = [s for s in tree.children[parent] if s < node]
        shares = tree.q.log_probs[tree.q_row_list[node]].exp()
        slot = value[parent] * (1 - sum(float(shares[tree.token_list[s]]) for s in earlier))
        assert slot >= 0.1 - 1e-6
        value[node] = value[parent] * float(shares[tree.token_list[node]])


def test_rsd_s_keeps_the_width_at_every_level() -> None:
    tree = grow(RsdS(3), ToyDraft(7, 0), Budget(12, 4))
    assert [tree.depth_list.count(depth) for depth in range(1, 5)] == [3, 3, 3, 3]
    assert [tree.depth_list.count(d) for d in (1, 2)] == [3, 3]


def test_default_branching_fits_every_budget() -> None:
    for nodes in range(1, 200):
        branching = default_branching(nodes)
        assert len(branching_template(branching)) <= nodes
        assert len(branching_template(branching)) > nodes / 2
    assert default_branching(16)[:3] == [2, 2, 2]


@pytest.mark.parametrize("acceptance", [[0.8, 0.1], [0.5, 0.3, 0.1, 0.05], [0.9], [0.4, 0.4, 0.4]])
def test_sequoias_heap_attains_its_dynamic_programme(acceptance) -> None:
    for nodes in (1, 2, 5, 12, 20):
        paths = sequoia_template(acceptance, nodes, depth=4)
        value = sum(math.prod(acceptance[rank] for rank in path) for path in paths)
        assert value == pytest.approx(sequoia_value(acceptance, nodes, depth=4))


def test_stem_branches_at_its_end() -> None:
    tree = grow(Stem(2, 2), ToyDraft(7, 0), Budget(6, 6))
    assert [len(children) for children in tree.children] == [1, 1, 2, 1, 1, 0, 0]


def test_the_trie_shares_equal_prefixes() -> None:
    draft = ToyDraft(3, 0)
    tree = grow(Iid(6, merge=True), draft, Budget(18, 3))
    for children in tree.children:
        tokens = [tree.token_list[child] for child in children]
        assert len(tokens) == len(set(tokens))
    assert tree.kinds == {Draw.WOR}


def test_top_n_expands_no_more_than_its_width() -> None:
    tree = grow(TopN(width=2, max_depth=5), ToyDraft(7, 0), Budget(30, 5))
    parents = [
        {tree.parent_list[n] for n in range(1, len(tree)) if tree.depth_list[n] == d}
        for d in range(2, 6)
    ]
    assert max(map(len, parents)) <= 2


@pytest.mark.parametrize("name", [n for n in POLICIES if "chain" not in n])
@pytest.mark.parametrize("budget", [Budget(1, 1), Budget(8, 2), Budget(16, 16)])
def test_every_policy_has_a_default_for_every_budget(name, budget) -> None:
    policy = type(POLICIES[name][0])()
    tree = grow(policy, ToyDraft(5, 0), budget)
    assert tree.num_drafted <= budget.nodes
    assert max(tree.depth_list) <= budget.depth


# --------------------------------------------------------------------------- errors


def test_bad_arguments_say_what_was_expected() -> None:
    with pytest.raises(ConfigError, match="must not rise"):
        Sequoia([0.3, 0.5])
    with pytest.raises(ConfigError, match="at least one"):
        Sequoia([])
    with pytest.raises(ConfigError, match=r"in .0, 1."):
        Sequoia([1.2, 0.5])
    with pytest.raises(ConfigError, match="numbers >= 1"):
        RsdC([2, 0])
    with pytest.raises(ConfigError, match="makes 12 nodes, node_budget is 8"):
        grow(RsdC([3, 3]), ToyDraft(5, 0), Budget(8, 4))
    with pytest.raises(ConfigError, match="makes 6 nodes, node_budget is 4"):
        grow(SampledPlusTop([2, 2]), ToyDraft(5, 0), Budget(4, 4))
    with pytest.raises(ConfigError, match="threshold must be"):
        DySpecThreshold(0.0)
    with pytest.raises(ConfigError, match="width must be"):
        RsdS(0)
    loop = loop_over(RsdC([2]), Block(), Budget(2, 1))
    with pytest.raises(ConfigError, match="for chains"):
        loop.step(PREFIX, row_streams(0, 0))


# --------------------------------------------------------------------------- laws that are none


class _GivenLaw:
    """The same row at every node."""

    def __init__(self, rows: LawRows) -> None:
        self._rows = rows
        self._count = 1

    def extend(self, parent, token):
        self._count += 1
        return self._count - 1

    def rows(self, handles):
        ids = self._rows.ids
        count = len(handles)
        return LawRows(
            self._rows.log_probs.expand(count, -1), None if ids is None else ids.expand(count, -1)
        )


def grown_from(name: str, rows: LawRows, budget: Budget) -> DraftTree:
    law = _GivenLaw(rows)
    plan = build_policy(name).grow(law, Root(0, 5), budget, row_streams(0, 0).draft)
    return grow_trees([(law, plan)], lambda asked: [one.rows(h) for one, h in asked])[0]


@pytest.mark.parametrize("name", sorted(build.POLICIES))
@pytest.mark.parametrize(("value", "message"), [(math.nan, "NaN"), (0.7, "0.7, above 0")])
def test_a_law_that_is_no_law_is_an_error(name, value, message) -> None:
    dense = torch.tensor([[-1.0, value, -1.0]])
    for rows in (LawRows(dense), LawRows(dense, torch.tensor([[0, 1, 2]]))):
        with pytest.raises(LogitsError, match=f"draft law holds.*{message}"):
            grown_from(name, rows, Budget(4, 2))


@pytest.mark.parametrize("name", sorted(build.POLICIES))
def test_more_children_are_wanted_than_the_vocabulary_has(name) -> None:
    rows = LawRows(torch.log_softmax(torch.tensor([[0.5, 0.0]]), dim=-1))
    tree = grown_from(name, rows, Budget(40, 2))
    assert 0 < tree.num_drafted <= 40
    if tree.kinds != {Draw.IID}:  # duplicates stay there
        assert all(len(children) <= 2 for children in tree.children)
