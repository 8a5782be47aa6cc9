"""Slots behind the nodes of a pass: the nodes never see them, and they see what they should."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from specdec import SpeculativeGenerator
from specdec.backend.model import TreeModel
from specdec.backend.pads import PadGroups
from specdec.backend.probe import probed
from specdec.budget import AutoBudget, FixedBudget
from specdec.cost import PassCost
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.errors import ConfigError
from specdec.target import Scores, TargetModel
from specdec.trees.tree import DraftTree
from specdec.types import DrafterNeeds, StepOutcome, TargetInfo

SLOTS = 3
PROMPTS = [tiny.prompt(5, seed=1), tiny.prompt(13, seed=2), tiny.prompt(9, seed=3)]
# two steps: a tree for each row, unequally large, and the path that is kept of it
TREES = [
    [([7, 11, 12, 13, 14], [-1, 0, 0, 2, 3]), ([9], [-1]), ([20, 21, 22], [-1, 0, 1])],
    [([8], [-1]), ([15, 16, 17], [-1, 0, 0]), ([23, 24], [-1, 0])],
]
PATHS = [[[2, 3], [], [1, 2]], [[], [2], [1]]]
CASES = [
    pytest.param(family, attention, id=f"{family}-{attention}")
    for family, (_, _, ways) in tiny.FAMILIES.items()
    for attention in ways
]
FEW = ["llama", "gemma3_text", "gpt2", "mistral"]

one_thread = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)


def slot_vectors(model: Any, scale: float = 1.0) -> Tensor:
    table = model.get_input_embeddings()
    noise = torch.randn(SLOTS, table.embedding_dim, generator=torch.Generator().manual_seed(0))
    return (scale * noise).to(table.weight.dtype)


@torch.no_grad()
def run(backend: TreeModel, needs: DrafterNeeds | None) -> tuple[list[Tensor], list[Scores], Any]:
    """Returns the prompts' last logits, the scores of both steps, and the prompt rows."""
    target = TargetModel(backend, backend.new_cache(len(PROMPTS), 32), needs)
    last, rows = target.prefill(PROMPTS)
    steps = []
    for trees, paths in zip(TREES, PATHS, strict=True):
        steps.append(target.score([DraftTree.from_lists(*tree) for tree in trees]))
        target.commit(paths)
    return last, steps, rows


def real_nodes(last: list[Tensor], steps: list[Scores]) -> Tensor:
    """Returns the logits of every position that is one, ``[n, V]``."""
    nodes = [
        scores.logits[row, : len(tokens)]
        for scores, trees in zip(steps, TREES, strict=True)
        for row, (tokens, _) in enumerate(trees)
    ]
    return torch.cat([torch.stack(last), *nodes])


def differences(backend: TreeModel, needs: DrafterNeeds) -> tuple[float, bool]:
    """Returns the largest difference that slots make, by the largest logit, and equal argmaxes."""
    plain, slotted = real_nodes(*run(backend, None)[:2]), real_nodes(*run(backend, needs)[:2])
    error = float((plain - slotted).abs().max() / plain.abs().max())
    return error, torch.equal(plain.argmax(-1), slotted.argmax(-1))


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_nodes_are_as_without_slots(family: str, attention: str) -> None:
    experts = "num_local_experts" in tiny.FAMILIES[family][1]  # torch has no float64 for them
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-4))[experts:]:
        model = tiny.make_model(family, attention, dtype)
        # large vectors: what leaks would show
        error, same = differences(probed(model), DrafterNeeds(probes=slot_vectors(model, 5.0)))
        assert error < allowed
        assert same


def test_a_node_that_sees_a_slot_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant: the roots see the slots behind them."""
    joined = PadGroups.joined

    def leaky(self: PadGroups, *rows: Tensor) -> Any:
        mixed = joined(self, *rows)
        mixed.ancestors[:, 0, -self.size :] = True
        return mixed

    model = tiny.make_model(dtype=torch.float64)
    backend, needs = probed(model), DrafterNeeds(probes=slot_vectors(model))
    assert differences(backend, needs)[0] < 1e-12
    monkeypatch.setattr(PadGroups, "joined", leaky)
    assert differences(backend, needs)[0] > 1e-3


@torch.no_grad()
def behind(model: Any, tokens: list[int], vectors: Tensor) -> Tensor:
    """Returns ``[g, V]``: the model's own pass over a text with the vectors behind it."""

    def put(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, : len(tokens)], vectors.unsqueeze(0)], dim=1)

    handle = model.get_input_embeddings().register_forward_hook(put)
    logits: Tensor = model(torch.tensor([tokens + [0] * len(vectors)])).logits[0, len(tokens) :]
    handle.remove()
    return logits


@pytest.mark.parametrize("family", FEW)
def test_slots_are_what_the_model_computes_behind_each_path(family: str) -> None:
    model = tiny.make_model(family, dtype=torch.float64)
    vectors = slot_vectors(model)
    _, steps, prompt_rows = run(probed(model), DrafterNeeds(probes=vectors))
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(prompt_rows[row].probes, behind(model, prompt, vectors))
        text = list(prompt)
        for scores, trees, paths in zip(steps, TREES, PATHS, strict=True):
            tree = DraftTree.from_lists(*trees[row])
            assert scores.probes is not None
            for node in range(len(tree)):
                path = [*text, tree.token_list[0], *tree.path_tokens(node)]
                expected = behind(model, path, vectors)
                torch.testing.assert_close(scores.probes[row, node], expected)
            text += [tree.token_list[node] for node in [0, *paths[row]]]


def test_beside_features_and_prompt_rows() -> None:
    model = tiny.make_model(dtype=torch.float64)
    backend, vectors = probed(model), slot_vectors(model)
    both = run(backend, DrafterNeeds(prompt_top_k=2, layers=(0, 1), probes=vectors))
    features = run(backend, DrafterNeeds(prompt_top_k=2, layers=(0, 1)))
    for mixed, alone in zip(both[1], features[1], strict=True):
        torch.testing.assert_close(mixed.features, alone.features)
    for mixed, alone in zip(both[2], features[2], strict=True):
        torch.testing.assert_close(tuple(mixed[:3]), tuple(alone[:3]))
        assert alone.probes is None
        assert mixed.probes.shape == (SLOTS, tiny.VOCAB)


@pytest.mark.parametrize("form", ["learned", "dynamic"])
def test_slots_end_where_positions_end(form: str) -> None:
    """Past that end a table has no row, and dynamic rope changes the rows in front too."""
    if form == "learned":
        model = tiny.make_model("gpt2", dtype=torch.float64, n_positions=17)
    else:
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        model = tiny.make_model(
            dtype=torch.float64, max_position_embeddings=17, rope_parameters=rope
        )
    error, same = differences(probed(model), DrafterNeeds(probes=slot_vectors(model)))
    assert error < 1e-12
    assert same


def test_the_embedding_is_left_as_it_was() -> None:
    model = tiny.make_model()
    vectors = slot_vectors(model)
    pads = PadGroups(model, vectors, None)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model.get_input_embeddings()(ids)
    others: list[Tensor] = []
    with pads.entering(1):
        inside = model.get_input_embeddings()(ids)
        other = threading.Thread(target=lambda: others.append(model.get_input_embeddings()(ids)))
        other.start()
        other.join()
    assert torch.equal(inside[0, 1:], vectors)
    assert torch.equal(inside[0, 0], before[0, 0])
    assert torch.equal(others[0], before)
    with pytest.raises(IndexError), pads.entering(1):
        model(torch.tensor([[10**9]]))
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("shape", [(3, 31), (0, 32), (32,)])
def test_vectors_of_another_width(shape: tuple[int, ...]) -> None:
    backend = probed(tiny.make_model())
    with pytest.raises(ConfigError, match=r"vectors \[g, 32\] of the width"):
        TargetModel(backend, backend.new_cache(1, 8), DrafterNeeds(probes=torch.zeros(shape)))


# ---- what they cost ----

LINEAR = PassCost(rows=(1, 65), contexts=(64,), seconds=((1.0, 5.0),))
STEEP = PassCost(rows=(1, 65), contexts=(64,), seconds=((1.0, 20.0),))


def chain(nodes: int) -> DraftTree:
    chances = [float("nan")] + [0.8] * nodes
    return DraftTree.from_lists(list(range(nodes + 1)), list(range(-1, nodes)), chances=chances)


def test_a_budget_counts_their_rows() -> None:
    widths = []
    for probes in (0, 3):
        budget = AutoBudget(STEEP, draft_seconds=0.0, probes=probes)
        for _ in range(20):
            grown = chain(budget.allot([0], 64)[0].nodes)
            (tree,) = budget.cut([0], [grown], 64, 0.0)
            path = list(range(1, min(tree.num_drafted, 3) + 1))
            budget.observe(StepOutcome(0, tree, path, [0] * (len(path) + 1), torch.empty(0)))
        widths.append(tree.num_drafted)
    assert widths == [3, 0]
    # 64 rows are 16 nodes with three slots each, the root among them
    roomy = AutoBudget(LINEAR, max_rows=64, probes=3)
    assert [roomy.allot(range(n), 64)[0].nodes for n in (1, 4, 8, 17)] == [8, 3, 1, 0]


def test_no_slots_while_drafting_does_not_pay() -> None:
    budget = AutoBudget(LINEAR, draft_seconds=0.0, probes=3)
    asked, ready = [], True
    for _ in range(200):
        drafting = budget.allot([0], 64)[0].nodes > 0
        if drafting:
            asked.append(ready)  # every try is prepared by the pass before it
            (tree,) = budget.cut([0], [chain(4)], 64, 0.0)
            budget.observe(StepOutcome(0, tree, [], [0], torch.empty(0)))
        ready = budget.drafts_next(1)
    assert all(asked)
    assert len(asked) < 30
    assert not AutoBudget(LINEAR, max_rows=64, probes=3).drafts_next(17)
    assert FixedBudget(4).drafts_next(10**6)


class Watcher(PromptLookup):
    """Guesses from the prompt, and counts the steps that had slots."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[bool] = []

    def attach(self, target: TargetInfo) -> None:
        super().attach(target)
        self.needs = DrafterNeeds(probes=slot_vectors(target.model))

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        super().observe(outcomes)
        for outcome in outcomes:
            self.steps.append(outcome.probes is not None)
            if outcome.probes is not None:
                assert outcome.probes.shape == (len(outcome.tree), SLOTS, tiny.VOCAB)


@pytest.mark.parametrize("node_budget", [4, "auto"])
def test_the_loop_follows_the_budget(node_budget: int | str) -> None:
    model = tiny.make_model()
    watcher = Watcher()
    dear = PassCost(rows=(1, 65), contexts=(64,), seconds=((1.0, 500.0),))
    generator = SpeculativeGenerator(
        model, drafter=watcher, calibration=dear, node_budget=node_budget
    )
    ids = tiny.ids(PROMPTS[1])
    output = generator.generate(ids, max_new_tokens=60, do_sample=False)
    expected = model.generate(ids, max_new_tokens=60, do_sample=False)
    assert output.tolist() == expected.tolist()
    share = float(np.mean(watcher.steps))
    assert share == 1.0 if node_budget == 4 else share < 0.6
