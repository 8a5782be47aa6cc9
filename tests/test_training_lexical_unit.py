"""Training of the slots: what counts, what is computed, and that only the vectors change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from specdec import SpeculativeGenerator
from specdec.drafters import LexicalUnit
from specdec.errors import ConfigError
from specdec.target import TargetModel
from specdec.training.corpus import OwnText
from specdec.training.lexical_unit import LexicalUnitRecipe, UnitSettings, make, slot_weights
from specdec.trees.tree import DraftTree
from specdec.types import DrafterNeeds

FAMILIES = ["llama", "gemma3_text", "gpt2"]

one_thread = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)


@torch.no_grad()
def own_texts(model: Any, count: int = 4, new: int = 24, top_k: int = 8) -> list[OwnText]:
    """Returns texts that a tiny model wrote greedily, with its laws, prompts unequally long."""
    texts = []
    for index in range(count):
        prompt = tiny.ids(tiny.prompt(6 + 3 * index, seed=index))
        tokens = model.generate(prompt, max_new_tokens=new, do_sample=False)[0]
        start = prompt.shape[1]
        top = torch.log_softmax(model(tokens.unsqueeze(0)).logits[0].float(), -1).topk(top_k)
        top_ids, log_probs = top.indices, top.values
        for hidden in (slice(0, start), slice(len(tokens) - 1, None)):
            top_ids[hidden], log_probs[hidden] = -1, -torch.inf
        features = torch.zeros(len(tokens), 0, dtype=torch.float16)
        texts.append(OwnText(tokens, start, True, features, top_ids, log_probs))
    return texts


def batch_of(recipe: LexicalUnitRecipe, texts: list[OwnText], seed: int = 0) -> Any:
    return next(iter(recipe.batches(texts, torch.Generator().manual_seed(seed))))


def test_what_counts() -> None:
    """A text of 8 tokens, answer from 2 on; the target gives these chances to tokens 3 to 7."""
    chances = torch.tensor([0.9, 0.2, 0.9, 0.9, 0.9])
    tokens = torch.arange(8)
    ids = torch.full((8, 2), -1)
    log_probs = torch.full((8, 2), -torch.inf)
    ids[2:7, 0], ids[2:7, 1] = 50, tokens[3:]
    log_probs[2:7, 1] = chances.log()
    log_probs[2:7, 0] = (1 - chances).log()
    text = OwnText(tokens, 2, True, torch.zeros(8, 0), ids, log_probs)
    weights = slot_weights(text, UnitSettings(num_pads=2, alpha=0.5, outside=0.1, decay=0.5))
    expected = [
        [0.0, 0.05],  # slot 1 stands for token 3, but nothing says what slot 0 would have to be
        [1.0, 0.05],  # tokens 3 and 4
        [0.1, 0.05],  # tokens 4 and 5: an unlikely one first
        [1.0, 0.5],
        [1.0, 0.5],
        [1.0, 0.0],  # token 7, and none after it
        [0.0, 0.0],
        [0.0, 0.0],
    ]
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_sees_what_drafting_sees(family: str) -> None:
    """Slots at many places of ragged texts in one pass are the slots of a pass of the loop."""
    model = tiny.make_model(family, dtype=torch.float64)
    texts = own_texts(model)
    recipe = make(model, texts, groups=6, batch_texts=4)
    batch = batch_of(recipe, texts)
    with torch.no_grad():
        logits = recipe._slot_logits(batch)
    vectors = recipe.module().pads.detach()
    for row in range(4):
        for group in range(6):
            end = int(batch.points[row, group])
            tokens = batch.tokens[row, : end + 1].tolist()
            target = TargetModel(
                recipe._backend,
                recipe._backend.new_cache(1, 64),
                DrafterNeeds(probes=vectors.double()),
            )
            with torch.no_grad():
                target.prefill([tokens[:-1]])
                scores = target.score([DraftTree.root_only(tokens[-1])])
            assert scores.probes is not None
            torch.testing.assert_close(logits[row, group], scores.probes[0, 0])


def test_targets_are_the_laws_that_the_slots_stand_for() -> None:
    model = tiny.make_model()
    texts = own_texts(model)
    batch = batch_of(make(model, texts, groups=5), texts)
    for row in range(len(texts)):
        with torch.no_grad():
            logits = model(batch.tokens[row : row + 1]).logits[0]
        for point, ids, weights in zip(
            batch.points[row], batch.ids[row], batch.weights[row], strict=True
        ):
            for slot in range(3):
                if weights[slot] > 0:  # slot 0 stands for the token after the next one
                    assert ids[slot, 0] == logits[point + 1 + slot].argmax()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_and_changes_nothing_else(family: str, tmp_path: Path) -> None:
    model = tiny.make_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    texts = own_texts(model)
    recipe = make(model, texts, groups=12)
    module = recipe.module()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    assert [tuple(p.shape) for p in module.parameters()] == [(3, 32)]
    losses = []
    for step in range(30):
        loss, metrics = recipe.loss(batch_of(recipe, texts), step / 30)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert min(losses) >= 0.0
    assert set(metrics) == {f"right_at_slot_{slot}" for slot in range(3)}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    recipe.save(tmp_path)
    drafter = LexicalUnit(tmp_path)
    SpeculativeGenerator(model, drafter=drafter)
    torch.testing.assert_close(drafter.needs.probes, module.pads.detach())


def test_the_same_seed_gives_the_same_run() -> None:
    model = tiny.make_model()
    texts = own_texts(model)
    runs = []
    for _ in range(2):
        recipe = make(model, texts, groups=4, batch_texts=3)
        batches = list(recipe.batches(texts, torch.Generator().manual_seed(7)))
        assert len(batches) == recipe.num_batches(texts) == 2
        assert sum(len(batch.tokens) for batch in batches) == len(texts)
        runs.append([recipe.loss(batch, 0.0)[0].item() for batch in batches])
    assert runs[0] == runs[1]
    other = batch_of(recipe, texts, seed=8)
    assert not torch.equal(other.points[:, 0], batches[0].points[:, 0])


def test_settings_that_make_no_sense() -> None:
    model = tiny.make_model()
    with pytest.raises(ConfigError, match=r"no settings \['slots'\]; it has \['alpha'"):
        make(model, [], slots=3)
    with pytest.raises(ConfigError, match="at least 1"):
        make(model, [], num_pads=0)
    with pytest.raises(ConfigError, match="from 0 to 1"):
        make(model, [], alpha=1.2)
    texts = own_texts(model, count=1)
    bare = [text._replace(top_ids=text.top_ids[:, :0]) for text in texts]
    with pytest.raises(ConfigError, match="the corpus needs a top_k"):
        batch_of(make(model, bare), bare)
