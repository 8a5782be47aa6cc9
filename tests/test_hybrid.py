"""The hybrid: what it mixes, how it learns whom to trust, and that its parts fit together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import tiny
import torch

from specdec import SpeculativeGenerator
from specdec.drafters import Hybrid, PromptLookup, SmallModel, Suffix, TokenRecycling
from specdec.drafters.base import BaseDrafter
from specdec.drafters.learning import LearnedState
from specdec.errors import ConfigError, StateError
from specdec.trees.tree import DraftTree
from specdec.types import DraftContext, DrafterNeeds, DraftLaw, LawRows, PromptRows, StepOutcome

pytestmark = pytest.mark.usefixtures("each_way")


class Table(BaseDrafter):
    """Gives the same row everywhere, and notes what it is told."""

    def __init__(self, name: str, row: dict[int, float], dense: int = 0, top_k: int = 0) -> None:
        self.name = name
        self.row = row
        self.dense = dense
        self.needs = DrafterNeeds(prompt_top_k=top_k)
        self.seen: list[object] = []

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        self.seen.append(prompt_rows)

    def law(self, context: DraftContext) -> DraftLaw:
        return _TableLaw(self)

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        self.seen += outcomes


class _TableLaw:
    def __init__(self, table: Table) -> None:
        self.table = table
        self.paths: list[tuple[int, ...]] = [()]

    def extend(self, parent: int, token: int) -> int:
        self.paths.append((*self.paths[parent], token))
        return len(self.paths) - 1

    def rows(self, handles: Sequence[int]) -> LawRows:
        ids = sorted(self.table.row, key=lambda token: -self.table.row[token])
        logs = torch.tensor([[math.log(self.table.row[i]) for i in ids]] * len(handles))
        if not self.table.dense:
            return LawRows(logs.reshape(len(handles), -1), torch.tensor([ids] * len(handles)))
        full = torch.full((len(handles), self.table.dense), -torch.inf)
        full[:, ids] = logs
        return LawRows(full)


def mixed(*tables: Table) -> dict[int, float]:
    law = Hybrid(tables).law(DraftContext(0, [1], 5))
    rows = law.rows([0])
    assert torch.equal(rows.log_probs, rows.log_probs.sort(descending=True).values)
    pairs = zip(rows.ids[0].tolist(), rows.log_probs[0].exp().tolist(), strict=True)
    return {token: chance for token, chance in pairs if token >= 0}


@pytest.mark.parametrize("dense", [0, 12])
def test_a_mixture_adds_what_its_sources_say(dense: int) -> None:
    first = Table("first", {3: 0.6, 5: 0.2})
    second = Table("second", {5: 0.5, 7: 0.3}, dense)
    assert mixed(first, second) == pytest.approx({5: 0.35, 3: 0.3, 7: 0.15})


def test_of_one_source_nothing_is_changed() -> None:
    assert mixed(Table("one", {3: 0.6, 5: 0.2})) == pytest.approx({3: 0.6, 5: 0.2})


def test_rows_of_every_node_go_to_every_source() -> None:
    first, second = Table("first", {3: 0.6}), Table("second", {4: 0.5})
    law = Hybrid([first, second]).law(DraftContext(0, [1], 5))
    child = law.extend(law.extend(0, 3), 4)
    law.rows([child])
    assert [own.paths for own in law.laws] == [[(), (3,), (3, 4)]] * 2


def outcome(law: DraftLaw, emitted: int) -> StepOutcome:
    law.rows([0])
    tree = DraftTree.from_lists([1, 3], [-1, 0], handles=[0, law.extend(0, 3)])
    return StepOutcome(0, tree, [], [emitted], torch.zeros(2, 12))


def test_the_source_that_is_right_gains_weight_where_it_was_as_sure() -> None:
    first, second = Table("first", {3: 0.7}), Table("second", {4: 0.7})
    hybrid = Hybrid([first, second])
    for _ in range(300):
        hybrid.observe([outcome(hybrid.law(DraftContext(0, [1], 5)), 4)])
    rows = hybrid.law(DraftContext(0, [1], 5)).rows([0])
    assert rows.ids[0, 0] == 4
    assert rows.log_probs[0, 0].exp() > 0.69
    second.row = {4: 0.3}  # as sure as never before: nothing is known of that
    rows = hybrid.law(DraftContext(0, [1], 5)).rows([0])
    assert rows.log_probs[0].exp().tolist() == pytest.approx([0.35, 0.15])
    assert [type(seen) for seen in first.seen] == [StepOutcome] * 300


def test_a_token_that_nobody_named_teaches_nothing() -> None:
    hybrid = Hybrid([Table("first", {3: 0.7}), Table("second", {4: 0.7})])
    before = hybrid.state().arrays["mixture/weights"].copy()
    hybrid.observe([outcome(hybrid.law(DraftContext(0, [1], 5)), 9)])
    assert np.array_equal(before, hybrid.state().arrays["mixture/weights"])


def test_prompt_rows_are_as_many_as_each_source_asked_for() -> None:
    tables = [Table("none", {}), Table("two", {}, top_k=2), Table("five", {}, top_k=5)]
    hybrid = Hybrid(tables)
    assert hybrid.needs.prompt_top_k == 5
    hybrid.start(0, [1, 2], PromptRows(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5)))
    none, two, five = (table.seen[0] for table in tables)
    assert none is None
    assert (two.ids.shape, five.logits.shape) == ((2, 2), (2, 5))


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("with_model", [False, True])
def test_text_is_that_of_plain_decoding(do_sample: bool, with_model: bool) -> None:
    model = tiny.make_model("llama")
    inputs = tiny.padded([tiny.prompt(9), tiny.prompt(14, 1), tiny.prompt(5, 2)])
    settings = {"max_new_tokens": 20, "do_sample": do_sample, "pad_token_id": tiny.PAD, "seed": 3}
    plain = SpeculativeGenerator(model, drafter=None).generate(**inputs, **settings)
    sources: list = [Suffix(), TokenRecycling(), PromptLookup()]
    if with_model:
        sources.append(SmallModel(tiny.make_model("llama", seed=1)))
    generator = SpeculativeGenerator(model, drafter=Hybrid(sources), node_budget=6)
    for _ in range(2):
        assert generator.generate(**inputs, **settings).tolist() == plain.tolist()
    assert generator.stats.num_drafted > 0


def test_a_source_that_is_the_model_itself_comes_to_be_trusted() -> None:
    model = tiny.make_model("llama")

    def block_efficiency(drafter: object) -> float:
        generator = SpeculativeGenerator(
            model, drafter=drafter, policy="best_first", verifier="match", node_budget=6
        )
        generator.generate(tiny.ids(tiny.prompt(9)), max_new_tokens=100, do_sample=False)
        return generator.stats.block_efficiency

    alone = block_efficiency(SmallModel(model))
    assert block_efficiency(Hybrid([Suffix(), SmallModel(model)])) > 0.85 * alone


@pytest.mark.parametrize("sources", [[], [Suffix(), Suffix()]])
def test_sources_need_different_names(sources: list) -> None:
    with pytest.raises(ConfigError, match="different names"):
        Hybrid(sources)


def test_a_state_of_other_sources_changes_nothing() -> None:
    saved = Hybrid([Suffix(), TokenRecycling()]).state()
    with pytest.raises(StateError, match="expected the sources"):
        Hybrid([Suffix()]).restore(saved)
    hybrid = Hybrid([Suffix(), TokenRecycling()])
    with pytest.raises(StateError, match="shares"):
        hybrid.restore(
            LearnedState(
                saved.arrays | {"mixture/weights": saved.arrays["mixture/weights"] * 2}, saved.facts
            )
        )
    broken = {k: v for k, v in saved.arrays.items() if k != "token_recycling/hits"}
    with pytest.raises(StateError, match="hits"):
        hybrid.restore(LearnedState(broken, saved.facts))
    assert set(hybrid.state().arrays) == set(saved.arrays)
