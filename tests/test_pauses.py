"""Steps without a draft: what reads the target, or has a cache of its own, goes on where it was."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch

from specdec import SpeculativeGenerator
from specdec.budget import AutoBudget, FixedBudget
from specdec.cost import PassCost
from specdec.drafters import EarlyExit, Hybrid, SmallModel, Suffix, Trigram
from specdec.trees import Chain
from specdec.types import Budget, StepOutcome

ROWS = [tiny.prompt(7, seed=1), tiny.prompt(4, seed=2), tiny.prompt(11, seed=3)]
NEW = 32
NODES = 4


class Pausing(FixedBudget):
    """Drafts in three steps of five."""

    def __init__(self) -> None:
        super().__init__(NODES)
        self._step = -1

    def allot(self, rows: Sequence[int], context: float) -> list[Budget]:
        self._step += 1
        return [Budget(0, 0)] * len(rows) if self._pauses else super().allot(rows, context)

    def learns(self) -> bool:
        return self._step % 5 != 1  # from a step behind one that was missed, too

    @property
    def _pauses(self) -> bool:
        return self._step % 5 in (1, 2)


def pausing(model: Any, drafter: Any, policy: Any = "auto") -> SpeculativeGenerator:
    generator = SpeculativeGenerator(model, drafter=drafter, policy=policy, node_budget=NODES)
    generator._parts._fixed = Pausing()
    return generator


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model("llama", num_hidden_layers=3, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["small_model", "early_exit"])
def test_a_model_that_drafts_for_itself_stays_right(model: Any, kind: str) -> None:
    drafter = SmallModel(model) if kind == "small_model" else EarlyExit(3)
    generator = pausing(model, drafter, Chain())
    steps = generator.trace(**tiny.padded(ROWS), max_new_tokens=NEW, do_sample=False)
    widths = set()
    for step in steps:
        leaf = step.path[-1] if step.path else 0
        assert not step.tree.children[leaf] or step.next_token is None
        widths.add(step.tree.num_drafted)
    assert {0, NODES} <= widths


@pytest.mark.parametrize(
    "drafter", ["hybrid", "token_recycling", "trigram", "suffix", "prompt_lookup", "early_exit"]
)
def test_the_text_is_the_same(model: Any, drafter: str) -> None:
    given = {**tiny.padded(ROWS), "max_new_tokens": NEW, "do_sample": True, "seed": [1, 2, 3]}
    expected = SpeculativeGenerator(model, drafter=None).generate(**given)
    assert torch.equal(pausing(model, drafter).generate(**given), expected)


@pytest.mark.parametrize("drafter", ["token_recycling", "trigram", "suffix", "hybrid"])
def test_a_table_may_miss_steps_without_a_draft(
    model: Any, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it learns of the others is what it learns of them when it sees every step."""
    seen: list[tuple[int, int | None, int]] = []
    generator = pausing(model, drafter)
    own = generator.drafter
    observe = own.observe

    def noted(outcomes: Sequence[StepOutcome]) -> None:
        seen.extend((o.row, o.before, o.tree.token_list[0]) for o in outcomes)
        observe(outcomes)

    monkeypatch.setattr(own, "observe", noted)
    output = generator.generate(tiny.ids(ROWS[0]), max_new_tokens=NEW, do_sample=False)
    text = output[0].tolist()
    pairs = set(itertools.pairwise(text))
    assert 0 < len(seen) < generator.stats.target_calls
    assert all((before, root) in pairs for _, before, root in seen)
    if drafter == "trigram":
        stored = own._table.store.state().arrays["pairs"].tolist()
        assert {(before, root) for _, before, root in seen} <= set(map(tuple, stored))


def test_what_reads_the_target_sees_every_step(model: Any) -> None:
    assert EarlyExit(1).needs.every_step
    assert SmallModel(model).needs.every_step
    assert not Hybrid([Suffix(), Trigram()]).needs.every_step
    assert Hybrid([Suffix(), SmallModel(model)]).needs.every_step


def test_a_draft_model_that_does_not_pay_is_left_out(model: Any) -> None:
    """Every row of a pass costs as much as a pass: plain decoding is the best there is."""
    cost = PassCost(rows=(1, 65), contexts=(64,), seconds=((1e-3, 65e-3),))
    foe = tiny.make_model("llama", num_hidden_layers=1, seed=9, dtype=torch.float64)
    generator = SpeculativeGenerator(model, drafter=SmallModel(foe), calibration=cost)
    ids = tiny.ids(ROWS[0])
    plain = SpeculativeGenerator(model, drafter=None)
    given = {"max_new_tokens": 64, "do_sample": False}
    assert torch.equal(generator.generate(ids, **given), plain.generate(ids, **given))
    assert isinstance(generator._parts._costed, AutoBudget)
    assert generator.stats is not None
    assert generator.stats.num_drafted < 0.5 * generator.stats.target_calls
