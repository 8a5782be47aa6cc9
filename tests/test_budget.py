"""Budgets that follow costs: what they cut, when they stop drafting, and what a mistake costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from scipy.optimize import isotonic_regression
from tape import Tape

from specdec import SpeculativeGenerator
from specdec.backend.capture_check import captured_passes
from specdec.backend.probe import probed
from specdec.budget import AutoBudget
from specdec.budget.chances import RealisedChances, rising
from specdec.budget.levels import Levels
from specdec.budget.pass_clock import PassClock
from specdec.budget.pauses import Pauses
from specdec.cost import PassCost, _convex, measure, pass_cost
from specdec.drafters.base import BaseDrafter
from specdec.errors import ConfigError, TreeError
from specdec.trees.tree import DraftTree
from specdec.types import DraftContext, DraftLaw, LawRows, StepOutcome

CHEAP = PassCost(rows=(1, 65), contexts=(64,), seconds=((1.0, 1.6),))
MIDDLING = PassCost(rows=(1, 65), contexts=(64,), seconds=((1.0, 7.4),))  # a tenth for a row
LINEAR = PassCost(rows=(1, 65), contexts=(64,), seconds=((1.0, 65.0),))


def chain(nodes: int, chance: float) -> DraftTree:
    return DraftTree.from_lists(
        list(range(nodes + 1)), list(range(-1, nodes)), chances=[float("nan")] + [chance] * nodes
    )


def simulate(
    cost: PassCost, claimed: float, accepted: Callable[[int], int], steps: int = 128
) -> tuple[float, list[int]]:
    """Returns simulated seconds and the width of each step, for a drafter of chains.

    `accepted` says how many nodes of step i would become text, were they all scored.
    """
    budget = AutoBudget(cost, draft_seconds=0.02)
    seconds, widths = 0.0, []
    for step in range(steps):
        nodes = budget.allot([0], 64)[0].nodes
        tree = DraftTree.root_only(0)
        if nodes:
            seconds += 0.02
            (tree,) = budget.cut([0], [chain(nodes, claimed)], 64, 0.02)
        seconds += cost.of([len(tree)], 64)[0]
        path = list(range(1, min(accepted(step), tree.num_drafted) + 1))
        budget.observe(StepOutcome(0, tree, path, [0] * (len(path) + 1), torch.empty(0)))
        widths.append(tree.num_drafted)
    return seconds, widths


def test_a_drafter_that_is_always_wrong_costs_little() -> None:
    seconds, widths = simulate(CHEAP, claimed=0.99, accepted=lambda step: 0)
    assert seconds <= 1.03 * 128
    assert sum(widths[64:]) <= 70


def test_a_drafter_that_is_wrong_from_now_on_costs_little() -> None:
    seconds, _ = simulate(CHEAP, 0.9, lambda step: 8 if step < 50 else 0, steps=450)
    before, _ = simulate(CHEAP, 0.9, lambda step: 8, steps=50)
    assert seconds - before <= 1.04 * 400


def test_passes_that_cost_as_much_as_their_rows_end_in_plain_decoding() -> None:
    generator = np.random.default_rng(0)
    seconds, widths = simulate(LINEAR, 0.8, lambda step: int(generator.geometric(0.4)) - 1)
    assert seconds <= 1.25 * 128
    assert np.mean(widths[32:]) < 0.3


def test_a_drafter_that_is_right_gets_more_nodes() -> None:
    _, widths = simulate(CHEAP, 0.95, lambda step: 32)
    assert widths[-1] >= 20


def test_a_drafter_that_becomes_right_is_noticed() -> None:
    _, widths = simulate(CHEAP, 0.9, lambda step: 0 if step < 100 else 12, steps=300)
    assert np.mean(widths[250:]) >= 8


def test_the_width_follows_how_long_the_accepted_runs_are() -> None:
    _, short = simulate(CHEAP, 0.9, lambda step: 1, steps=300)
    _, long = simulate(CHEAP, 0.9, lambda step: 6, steps=300)
    assert np.mean(short[200:]) < np.mean(long[200:]) < 12


@pytest.mark.parametrize(
    ("seconds", "seconds_per_node", "pays"),
    [(0.0, 0.0, True), (0.0, 1.0, False), (1.5, 0.0, True)],
)
def test_what_a_drafter_takes_to_learn_from_more_nodes_counts(
    seconds: float, seconds_per_node: float, pays: bool
) -> None:
    """What it takes for a step without a tree is spent in any case."""
    budget = AutoBudget(CHEAP)
    widths = []
    for step in range(120):
        nodes = budget.allot([0], 64)[0].nodes
        tree = DraftTree.root_only(0)
        if nodes:
            (tree,) = budget.cut([0], [chain(nodes, 0.3)], 64, 0.0)
        path = [1] if tree.num_drafted and step % 4 == 0 else []
        budget.observe(StepOutcome(0, tree, path, [0] * (len(path) + 1), torch.empty(0)))
        budget.learned(len(tree), seconds + seconds_per_node * len(tree))
        widths.append(tree.num_drafted)
    # one token in four steps pays for a row of a cheap pass, not for a second of learning
    assert (np.mean(widths[40:]) > 0.9) == pays


@pytest.mark.parametrize(("level_seconds", "deepest"), [(0.001, 9), (0.08, 3), (0.9, 1)])
def test_levels_are_drafted_as_far_as_they_pay(level_seconds: float, deepest: int) -> None:
    """Half of the texts get from one level to the next; a pass takes a second."""
    generator = np.random.default_rng(0)
    budget = AutoBudget(CHEAP)
    depths = []
    for _ in range(200):
        allotted = budget.allot([0], 64)[0]
        depth = max(1, min(allotted.depth, allotted.nodes))
        (tree,) = budget.cut([0], [chain(depth, 0.7)], 64, level_seconds * depth)
        accepted = min(int(generator.geometric(0.5)) - 1, tree.num_drafted)
        path = list(range(1, accepted + 1))
        budget.observe(StepOutcome(0, tree, path, [0] * (accepted + 1), torch.empty(0)))
        depths.append(depth)
    middle = np.median(depths[50:])
    assert deepest / 2 <= middle <= 2 * deepest


def test_a_long_copy_is_drafted_as_deep_as_it_goes() -> None:
    levels = Levels(32)
    for _ in range(12):
        depth = levels.best(1.0, 0.01)
        levels.observe(depth, depth)
    assert levels.best(1.0, 0.01) == 32


def test_the_chance_to_get_to_a_level_falls() -> None:
    levels = Levels(8)
    for depth, accepted in ((4, 2), (6, 6), (1, 1), (3, 0)):
        levels.observe(depth, accepted)
    reach = levels.reach()
    assert (np.diff(reach) <= 0).all()
    assert 0 < reach[-1] < reach[0] < 1


def test_levels_forget_for_as_long_as_a_text_goes_on() -> None:
    """Against counts that fade at every step, over more steps than a float has room to grow in."""
    levels, generator = Levels(6), np.random.default_rng(0)
    hits, trials = np.zeros(6), np.zeros(6)
    for _ in range(20_000):
        depth = int(generator.integers(1, 7))
        accepted = int(generator.integers(0, depth + 1))
        levels.observe(depth, accepted)
        hits = 0.95 * hits + (np.arange(6) < accepted)
        trials = 0.95 * trials + (np.arange(6) < depth)
    expected, above = [], 1.0
    for hit, trial in zip(hits, trials, strict=True):
        above = min(above, (hit + 0.6 * above) / (trial + 1.0))
        expected.append(above)
    assert levels.reach() == pytest.approx(expected)


def test_a_cold_first_draft_is_soon_forgotten() -> None:
    budget = AutoBudget(CHEAP)
    widths = []
    for step in range(40):
        nodes = budget.allot([0], 64)[0].nodes
        tree = DraftTree.root_only(0)
        if nodes:
            seconds = 9.0 if step == 0 else 0.02
            (tree,) = budget.cut([0], [chain(nodes, 0.9)], 64, seconds)
        path = list(range(1, tree.num_drafted + 1))[:3]
        budget.observe(StepOutcome(0, tree, path, [0] * (len(path) + 1), torch.empty(0)))
        widths.append(tree.num_drafted)
    assert np.mean(widths[8:]) >= 3


def test_what_is_grown_must_promise_what_a_node_costs() -> None:
    least = [AutoBudget(cost).allot([0], 64)[0].least_chance for cost in (CHEAP, MIDDLING, LINEAR)]
    # half of what a node costs is .0047, .05 and .5 of a pass: the buckets that hold these begin at
    assert least == [0.005, 0.04, 0.45]
    budget = AutoBudget(MIDDLING, draft_seconds=0.0)
    for step in range(30):  # a sixth of what is claimed comes true: more must be claimed
        budget.allot([0], 64)
        (tree,) = budget.cut([0], [chain(1, 0.9)], 64, 0.0)
        path = [1] if tree.num_drafted and step % 6 == 0 else []
        budget.observe(StepOutcome(0, tree, path, [0] * (len(path) + 1), torch.empty(0)))
    assert budget.allot([1], 64)[0].least_chance > least[1]


def test_a_bucket_of_which_little_is_known_goes_by_all_claims() -> None:
    chances = RealisedChances()
    first = chances.expected(1, [0.1, 0.9])
    for step in range(40):
        path = [1] if step % 10 == 0 else []
        tree = chain(1, 0.9)
        chances.observe(0, tree.path_chances, path)
    later = chances.expected(1, [0.1, 0.9])
    assert later[1] < 0.25 < first[1]
    assert later[0] < 0.5 * first[0]  # never scored, and yet thought less of


def test_what_must_not_fall_is_scipys_isotonic_regression() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        values = generator.choice([0.1, 0.3, 0.4, 0.7], size=14)
        weights = generator.uniform(0.1, 9.0, size=14)
        expected = isotonic_regression(values, weights=weights).x
        assert rising(values.tolist(), weights.tolist()) == pytest.approx(expected.tolist())


def test_pauses_get_longer_and_end_with_a_gain() -> None:
    pauses = Pauses()
    lengths = []
    for _ in range(9):
        pauses.drafted(gain=-0.02, loss=0.04, plain=1.0)
        lengths.append(0)
        while pauses.paused:
            pauses.skip()
            lengths[-1] += 1
    assert lengths == [0, 0, 1, 2, 4, 8, 8, 8, 8]
    assert pauses.exploring
    pauses.drafted(gain=1.0, loss=0.04, plain=1.0)
    assert not pauses.exploring
    assert not pauses.paused


def test_learning_is_rationed_in_long_pauses() -> None:
    pauses = Pauses()
    assert all(pauses.learns(1.0, 1.0) for _ in range(20))
    for _ in range(12):
        while pauses.paused:
            pauses.skip()
        pauses.drafted(gain=-0.1, loss=0.1, plain=1.0)
    learned = sum([pauses.learns(0.05, 1.0) for _ in range(1000)])
    assert 45 <= learned <= 55  # a 20th of a step, in each 20th step: a quarter of a hundredth
    assert all(pauses.learns(0.002, 1.0) for _ in range(20))


@pytest.mark.parametrize("steps_a_text", [7, 40, 300])
@pytest.mark.parametrize("loss", [0.05, 1.0])
def test_tries_take_half_a_hundredth_of_the_time_however_short_texts_are(
    steps_a_text: int, loss: float
) -> None:
    pauses, tries, steps = Pauses(), [], 0
    while steps < 12_000:
        for _ in range(steps_a_text):
            steps += 1
            if pauses.paused:
                pauses.skip()
            else:
                tries.append(steps)
                pauses.drafted(gain=-loss, loss=loss, plain=1.0)
        pauses.resume()
    # the first ones come sooner, until enough of them have lost
    late = [step for step in tries if step > 2_000]
    assert 0.002 <= loss * len(late) / 10_000 <= 0.0055


def test_another_text_has_its_try_at_once_if_the_last_one_is_paid_for() -> None:
    pauses = Pauses()
    for _ in range(12):
        while pauses.paused:
            pauses.skip()
        pauses.drafted(gain=-1.0, loss=1.0, plain=1.0)
    pauses.skip()
    pauses.resume()
    assert not pauses.paused
    pauses.drafted(gain=-1.0, loss=1.0, plain=1.0)
    pauses.resume()
    assert pauses.paused
    left = 0
    while pauses.paused:
        pauses.skip()
        left += 1
    assert left == 199


def test_a_batch_has_one_width_and_the_likeliest_nodes() -> None:
    budget = AutoBudget(CHEAP, draft_seconds=0.0)
    budget.allot([0, 1], 64)
    trees = [chain(8, 0.9), chain(8, 0.1)]
    first, second = budget.cut([0, 1], trees, 64, 0.0)
    assert first.num_drafted == second.num_drafted == 4
    assert first.token_list == [0, 1, 2, 3, 4]


def test_logits_of_a_batch_stay_within_memory() -> None:
    budget = AutoBudget(CHEAP, max_nodes=32, max_rows=64)
    assert [budget.allot(range(n), 64)[0].nodes for n in (1, 16, 33, 64, 100)] == [8, 3, 0, 0, 0]


def test_cutting_keeps_parents_and_remembers_the_tree() -> None:
    tree = DraftTree.from_lists([5, 6, 7, 8, 9], [-1, 0, 0, 1, 2], handles=[0, 3, 1, 2, 4])
    less = tree.cut([2, 4])
    assert (less.token_list, less.parent_list) == ([5, 7, 9], [-1, 0, 1])
    assert (less.handles, less.grown) == ((0, 1, 4), tree)
    assert less.cut([1]).grown is tree
    with pytest.raises(TreeError, match="without their parents"):
        tree.cut([4])


def test_chances_multiply_along_paths() -> None:
    tree = DraftTree.from_lists(
        [0, 1, 2, 3], [-1, 0, 1, 0], chances=[float("nan"), 0.8, 0.5, float("nan")]
    )
    assert tree.path_chances == pytest.approx([1.0, 0.8, 0.4, 0.5])


class Wrong(BaseDrafter):
    """Is sure of a token that the target never takes."""

    name = "wrong"

    def law(self, context: DraftContext) -> DraftLaw:
        return _WrongLaw()


class _WrongLaw:
    def __init__(self) -> None:
        self._handles = 0

    def extend(self, parent: int, token: int) -> int:
        self._handles += 1
        return self._handles

    def rows(self, handles: list[int]) -> LawRows:
        return LawRows(torch.zeros(len(handles), 1), torch.full((len(handles), 1), 1))


@pytest.mark.parametrize("drafter", ["token_recycling", Wrong()])
@pytest.mark.parametrize("cost", [CHEAP, LINEAR])
@pytest.mark.parametrize("do_sample", [False, True])
def test_text_does_not_depend_on_the_budget(
    drafter: object, cost: PassCost, do_sample: bool
) -> None:
    model = tiny.make_model("llama")
    inputs = tiny.padded([tiny.prompt(9), tiny.prompt(14, 1)])
    settings = {"max_new_tokens": 40, "do_sample": do_sample, "pad_token_id": tiny.PAD, "seed": 3}
    plain = SpeculativeGenerator(model, drafter=None).generate(**inputs, **settings)
    generator = SpeculativeGenerator(model, drafter=drafter, calibration=cost)
    assert generator.generate(**inputs, **settings).tolist() == plain.tolist()
    assert generator.stats.settings["node_budget"] == "auto"


def test_drawn_trees_keep_a_fixed_number_of_nodes() -> None:
    model = tiny.make_model("llama")
    generator = SpeculativeGenerator(model, policy="dyspec_layered", verifier="rejection")
    generator.generate(tiny.ids(tiny.prompt(9)), max_new_tokens=8, do_sample=True)
    assert generator.stats.settings["node_budget"] == 8


class TestPassCost:
    table = PassCost((1, 4, 8), (100, 300), ((1.0, 1.5, 1.4), (2.0, 2.5, 4.5)))

    def test_is_linear_between_points_and_beyond(self) -> None:
        costs = self.table.of([1, 2, 4, 8, 12], 100)
        assert costs == pytest.approx([1.0, 1.0 + 0.4 / 3, 1.4, 1.4, 1.4])
        assert self.table.of([12], 300) == pytest.approx([6.5])
        assert self.table.of([1], 200) == pytest.approx([1.5])
        assert self.table.of([1], 500) == pytest.approx([3.0])
        assert self.table.of([1], 1) == pytest.approx([1.0])

    def test_comes_back_from_its_file(self, tmp_path: Path) -> None:
        self.table.save(tmp_path / "a" / "costs.json", facts={"device": "cpu"})
        assert PassCost.load(tmp_path / "a" / "costs.json") == self.table
        assert json.loads((tmp_path / "a" / "costs.json").read_text())["facts"]["device"] == "cpu"

    @pytest.mark.parametrize(
        "text",
        ["", "{}", '{"version": 7}', "[1]"]
        + [
            json.dumps({"version": 3, "rows": rows, "contexts": [9], "seconds": seconds})
            for rows, seconds in (
                ([1, 2], [[1.0]]),
                ([2, 1], [[1.0, 2.0]]),
                ([1], [[-1.0]]),
                ([1], [[float("nan")]]),
                ([], [[]]),
                ([1], [1.0]),
            )
        ],
    )
    def test_other_files_are_refused(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "costs.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError):
            PassCost.load(path)
        with pytest.raises(ConfigError):
            SpeculativeGenerator(tiny.make_model("llama"), calibration=path)


def test_costs_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    backend = probed(tiny.make_model("llama"))
    state = torch.random.get_rng_state()
    cost = pass_cost(backend)
    assert torch.equal(state, torch.random.get_rng_state())
    monkeypatch.setattr("specdec.cost.measure", None)
    monkeypatch.setattr("specdec.cost._FASTER", 0.0)
    assert pass_cost(backend) == cost
    (kept,) = (tmp_path / "calibration").iterdir()
    other = probed(tiny.make_model("llama", dtype=torch.float64))
    monkeypatch.undo()
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    pass_cost(other)
    assert len(list((tmp_path / "calibration").iterdir())) == 2
    kept.write_text("half a fi", encoding="utf-8")
    assert pass_cost(backend).rows == cost.rows


def test_pass_costs_follow_the_passes_of_the_text() -> None:
    """Outside of a text the table was measured too low, and its nodes far too cheap."""
    generator = np.random.default_rng(0)
    clock = PassClock(CHEAP)
    for _ in range(150):
        nodes = int(generator.choice([1, 1, 2, 4, 9]))
        true = 1.2 + 0.05 * (nodes - 1)
        pause = 9.0 if generator.random() < 0.03 else 0.0
        clock.scored(nodes, 64, true * float(generator.uniform(0.9, 1.1)) + pause)
    assert clock.of([1, 5, 9], 64) == pytest.approx([1.2, 1.4, 1.6], rel=0.12)
    table = PassClock(CHEAP, follows=False)
    table.scored(9, 64, 5.0)
    assert table.of([1, 65], 64) == pytest.approx([1.0, 1.6])


def test_in_a_pause_one_pass_of_four_is_noted() -> None:
    """Those of a pause are alike; one behind a tree is always noted."""
    budget, noted = AutoBudget(CHEAP), []
    budget._passes.scored = lambda *pass_: noted.append(pass_)  # type: ignore[method-assign]
    for asked, expected in ((False, 3), (True, 12)):
        noted.clear()
        budget._asked = asked
        for _ in range(12):
            budget.scored(1, 64, 1.0)
        assert len(noted) == expected


def test_what_a_pass_costs_is_asked_again_when_a_text_has_grown() -> None:
    cost = PassCost(rows=(1, 9), contexts=(0, 1000), seconds=((1.0, 2.0), (3.0, 6.0)))
    clock = PassClock(cost, follows=False)
    for context in (0, 5, 500, 512, 1000, 20, 0):
        expected = cost.of([1, 4, 9], context // 16 * 16)
        assert clock.of([1, 4, 9], context) == pytest.approx(expected)
        assert clock.of([1, 4, 9], context) == pytest.approx(cost.of([1, 4, 9], context), rel=0.04)


@pytest.mark.parametrize(
    ("seconds", "curve"),
    [
        ([1.0, 1.1, 1.3, 1.7], [1.0, 1.1, 1.3, 1.7]),
        ([1.0, 1.0, 1.0, 1.8], [1.0, 1.0, 1.0, 1.8]),  # memory-bound up to four rows
        ([1.0, 1.2, 1.2, 1.2], [1.1, 1.15, 1.15, 1.2]),  # no first node costs more than the rest
        ([2.0, 1.0, 2.0, 1.0], [1.2, 1.2, 1.2, 1.2]),
    ],
)
def test_measured_costs_become_a_convex_curve(seconds: list[float], curve: list[float]) -> None:
    rows = np.array([1, 2, 4, 8])
    fitted = _convex(rows, np.array(seconds))
    assert fitted == pytest.approx(curve, rel=0.1)
    slopes = np.diff(fitted) / np.diff(rows)
    assert slopes.min() >= 0
    assert np.diff(slopes).min() >= -1e-12


def test_costs_of_a_busy_machine_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    backend = probed(tiny.make_model("llama"))
    cost = pass_cost(backend)
    (kept,) = (tmp_path / "calibration").iterdir()
    slow = tuple(tuple(100 * second for second in of_context) for of_context in cost.seconds)
    replace(cost, seconds=slow).save(kept)
    assert pass_cost(backend).seconds[0][0] < slow[0][0] / 2


def test_a_model_with_few_positions_is_measured_within_them() -> None:
    cost = measure(probed(tiny.make_model("gpt2")))
    assert max(cost.rows) + max(cost.contexts) <= 256


def test_captured_passes_are_measured_as_they_will_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From recordings, and kept apart from the costs of passes that run as they are."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    Tape.made.clear()
    backend = probed(tiny.make_model("llama"))
    pass_cost(backend)
    backend.captured = captured_passes(backend, True, Tape)
    cost = pass_cost(backend)
    assert len(list((tmp_path / "calibration").iterdir())) == 2
    assert sum(tape.recorded for tape in Tape.made) >= len(cost.rows)
    before = sum(tape.replayed for tape in Tape.made)
    monkeypatch.setattr("specdec.cost.measure", None)
    monkeypatch.setattr("specdec.cost._FASTER", 0.0)
    assert pass_cost(backend) == cost
    assert sum(tape.replayed for tape in Tape.made) > before
