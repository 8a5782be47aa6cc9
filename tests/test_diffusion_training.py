"""The recipe of the diffusion drafter: what it builds, what it learns, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from specdec import SpeculativeGenerator
from specdec.drafters import Diffusion
from specdec.errors import ConfigError
from specdec.training.block_losses import compare_laws
from specdec.training.corpus import OwnText
from specdec.training.diffusion import (
    DiffusionRecipe,
    DiffusionSettings,
    make,
)
from specdec.training.diffusion_init import target_layers
from specdec.training.own_text import TextRecipe, write_own_text
from specdec.trees import Chain

SMALL: dict[str, Any] = {
    "layers": (0, 1),
    "num_layers": 1,
    "block_size": 4,
    "vocab_size": 64,
    "markov_rank": 8,
    "texts_per_batch": 4,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


def own_texts(model: Any, folder: Path, count: int = 16) -> list[OwnText]:
    recipe = TextRecipe(count, prompt_tokens=6, answer_tokens=24, openings=("ab", "q", "xyz", "5"))
    corpus = write_own_text(
        model, tiny.letters(), folder, recipe, layers=(0, 1), top_k=8, batch_size=8, progress=False
    )
    return list(corpus.texts())


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model("llama", seed=1, eos_token_id=tiny.EOS)


@pytest.fixture(scope="module")
def texts(model: Any, tmp_path_factory: pytest.TempPathFactory) -> list[OwnText]:
    return own_texts(model, tmp_path_factory.mktemp("corpus"))


def recipe_for(target: Any, texts: list[OwnText], **settings: Any) -> DiffusionRecipe:
    return DiffusionRecipe(target, texts, DiffusionSettings(**settings))


def trained(recipe: DiffusionRecipe, texts: list[OwnText], epochs: int) -> list[float]:
    """Fits the recipe's module; returns the loss of every step."""
    optimizer = torch.optim.AdamW(recipe.module().parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    steps, losses = epochs * recipe.num_batches(texts), []
    for _ in range(epochs):
        for batch in recipe.batches(texts, generator):
            loss, _ = recipe.loss(batch, len(losses) / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert len(losses) == steps
    return losses


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_training_makes_a_drafter_that_guesses_right(family: str, tmp_path: Path) -> None:
    """On the text that it has seen: the point is that training and drafting see the same."""
    target = tiny.make_model(family, seed=1, eos_token_id=tiny.EOS)
    texts = [text for text in own_texts(target, tmp_path / "corpus") if text.greedy]
    settings = {**SMALL, "vocab_size": tiny.VOCAB, "anchors_per_token": 1.0, "confidence": True}
    recipe = recipe_for(target, texts, **settings)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    trained(recipe, texts, epochs=100)
    _, metrics = recipe.loss(next(recipe.batches(texts, torch.Generator().manual_seed(1))), 1.0)
    assert metrics["greedy_efficiency"] > 1.5
    assert "block_efficiency" not in metrics  # in the log that is what a decoder measured
    torch.testing.assert_close(dict(target.state_dict()), before)
    recipe.save(tmp_path / "weights")
    generator = SpeculativeGenerator(
        target, drafter=Diffusion(tmp_path / "weights"), policy=Chain(), node_budget=4
    )
    emitted = calls = 0
    for text in texts[:6]:
        generator.generate(
            text.tokens[None, : text.answer_start],
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
        )
        emitted += generator.stats.totals.num_emitted
        calls += generator.stats.totals.target_calls
    # the decoder's chains are those that training scored
    assert emitted / calls > 1.4


def test_the_same_seed_gives_the_same_losses(model: Any, texts: list[OwnText]) -> None:
    first, second = (
        trained(recipe_for(model, texts, **SMALL, given_share=0.5), texts, epochs=2)
        for _ in range(2)
    )
    assert first == second


def test_a_slots_loss_is_the_distance_of_the_whole_laws() -> None:
    """With every token named, and against the sum over the vocabulary where some are not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    p = torch.randn(5, 12, generator=generator, dtype=torch.float64).softmax(-1)
    values, ids = p.sort(descending=True)
    q = logits.softmax(-1)
    whole = compare_laws(logits, ids, values.log())
    torch.testing.assert_close(
        whole.total_variation, 0.5 * (p - q).abs().sum(-1), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(whole.cross_entropy, -(p * q.log()).sum(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.accepted, torch.minimum(p, q).sum(-1))
    some = ids.clone()
    some[:, 5:] = -1
    some[:, 1] = -1  # a likely token that cannot be drafted
    part = compare_laws(logits, some, values.log())
    named = [0, 2, 3, 4]
    p_named = values[:, named]
    q_named = q.gather(-1, ids[:, named])
    rest = (p_named.sum(-1) - q_named.sum(-1)).abs()
    expected = 0.5 * ((p_named - q_named).abs().sum(-1) + rest)
    torch.testing.assert_close(part.total_variation, expected)
    assert torch.equal(part.hits, logits.argmax(-1) == ids[:, 0])


def test_a_block_learns_nothing_from_the_tokens_it_is_to_guess(
    model: Any, texts: list[OwnText]
) -> None:
    """States of a block do not move when the text behind its anchor does, features included."""
    recipe = recipe_for(model, texts, **SMALL)
    batch = next(recipe.batches(texts, torch.Generator().manual_seed(1)))
    last = int(batch.anchors[0, 0])
    one = batch._replace(anchors=batch.anchors.clone().fill_(-1))
    one.anchors[0, 0] = last
    tokens, features = batch.tokens.clone(), batch.features.clone()
    tokens[0, last + 1 :] = 7
    features[0, last:] += 1.0  # the anchor's own are not known when it is drafted from
    changed = one._replace(tokens=tokens, features=features)
    before, after = (recipe._states(own)[0][0, 0] for own in (one, changed))
    assert torch.equal(before, after)
    features[0, last - 1] += 1.0
    seen = recipe._states(one._replace(features=features))[0][0, 0]
    assert not torch.equal(before, seen)


def test_blocks_of_a_text_do_not_see_each_other(model: Any, texts: list[OwnText]) -> None:
    recipe = recipe_for(model, texts, **SMALL, anchors_per_token=1.0)
    batch = next(recipe.batches(texts, torch.Generator().manual_seed(1)))
    together = recipe._states(batch)[0][:, 3]
    alone = recipe._states(
        batch._replace(anchors=batch.anchors[:, 3:4], num_given=batch.num_given[:, 3:4])
    )[0][:, 0]
    torch.testing.assert_close(together, alone)


def test_given_tokens_are_shown_and_not_asked_for(model: Any, texts: list[OwnText]) -> None:
    recipe = recipe_for(model, texts, **SMALL, given_share=1.0)
    batch = next(recipe.batches(texts, torch.Generator().manual_seed(1)))
    _, wanted, places = recipe._states(batch)
    inside = (places < batch.lengths.view(-1, 1, 1)) & (batch.anchors >= 0).unsqueeze(-1)
    hidden = torch.arange(4) >= batch.num_given.unsqueeze(-1)
    # a place past the end of the longest text is clamped to it, and counts as outside
    assert not (wanted & ~hidden).any()
    assert (wanted.sum(-1) <= 4 - batch.num_given).all()
    assert wanted.any()
    assert (inside & hidden & ~wanted).sum() <= (places == batch.tokens.shape[1] - 1).sum()


@pytest.mark.parametrize(
    ("num_layers", "count", "layers"),
    [
        (30, 3, (1, 14, 27)),
        (36, 5, (1, 9, 17, 25, 33)),
        (3, 3, (0, 1)),
        (1, 3, (0,)),
        (30, 1, (15,)),
    ],
)
def test_layers_that_are_read(num_layers: int, count: int, layers: tuple[int, ...]) -> None:
    assert target_layers(num_layers, count) == layers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "zero"}, "start must be 'target' or 'random'"),
        ({"block_size": 1}, "no diffusion drafter can be trained"),
    ],
)
def test_settings_that_make_no_sense(
    settings: dict[str, Any], message: str, model: Any, texts: list[OwnText]
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_for(model, texts, **{**SMALL, **settings})


def test_texts_with_features_of_other_layers(model: Any, texts: list[OwnText]) -> None:
    recipe = recipe_for(model, texts, **{**SMALL, "layers": (0,)})
    with pytest.raises(
        ConfigError, match=r"hold 64 features a token; layers \[0\] of this .* have 32"
    ):
        next(recipe.batches(texts, torch.Generator()))


def test_made_from_texts_without_features(model: Any, texts: list[OwnText]) -> None:
    """The recipe says which features it wants before they are read."""
    bare = [text._replace(features=torch.empty(len(text.tokens), 0)) for text in texts]
    recipe = make(model, bare, vocab_size=40, block_size=5, num_layers=1, seed=3)
    assert recipe.layers == (0, 1)
    assert recipe.module().config.draft_vocab_size == 40
    assert recipe.module().config.num_predicted == 5
    loss, _ = recipe.loss(next(recipe.batches(texts, torch.Generator())), 0.5)
    assert loss.isfinite()
