"""Steps without a draft: what reads the target, or has a cache of its own, goes on where it was."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from specdec import SpeculativeGenerator
from specdec.budget import AutoBudget, FixedBudget
from specdec.cost import PassCost
from specdec.drafters import EarlyExit, SmallModel
from specdec.trees import Chain

ROWS = [tiny.prompt(7, seed=1), tiny.prompt(4, seed=2), tiny.prompt(11, seed=3)]
NEW = 32
NODES = 4


class Pausing(FixedBudget):
    """Drafts in three steps of five."""

    def __init__(self) -> None:
        super().__init__(NODES)
        self._step = -1

    def most(self, num_rows: int) -> int:
        self._step += 1
        return 0 if self._step % 5 in (1, 2) else NODES


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
