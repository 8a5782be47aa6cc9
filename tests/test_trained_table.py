"""Tables counted over a model's own text: the mean of its laws, and a drafter that begins there."""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from specdec import SpeculativeGenerator
from specdec.build import build_drafter
from specdec.drafters import Hybrid, Trigram, checkpoint
from specdec.drafters.pair_store import NO_TOKEN
from specdec.drafters.trained_table import load_table, save_table
from specdec.errors import ConfigError, StateError
from specdec.training.cli import add_arguments, run
from specdec.training.corpus import OwnText
from specdec.training.trigram import TableSettings, count_table
from specdec.types import TargetInfo

VOCAB, KEPT = 12, 6


def text(length: int, seed: int) -> OwnText:
    """Returns random tokens, and a random law behind each token of the answer but the last."""
    draw = torch.Generator().manual_seed(seed)
    answer_start = 3
    laws = torch.rand(length, VOCAB, generator=draw).softmax(dim=-1)
    chances, ids = laws.topk(KEPT)
    ids[: answer_start - 1], ids[-1] = -1, -1
    return OwnText(
        torch.randint(0, VOCAB, (length,), generator=draw),
        answer_start,
        True,
        torch.zeros(length, 0, dtype=torch.float16),
        ids,
        chances.log(),
    )


TEXTS = [text(40 + seed, seed) for seed in range(8)]


def brute_force(least_pair: int, least_single: int) -> dict[tuple[int, int], dict[int, float]]:
    """Returns the mean chance of every successor, by pair; one position after the other."""
    sums: dict[tuple[int, int], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for own in TEXTS:
        tokens = own.tokens.tolist()
        for at, ids in enumerate(own.top_ids.tolist()):
            if ids[0] < 0:
                continue
            for pair in ((tokens[at - 1], tokens[at]), (NO_TOKEN, tokens[at])):
                counts[pair] += 1
                for token, chance in zip(ids, own.top_log_probs[at].exp().tolist(), strict=True):
                    sums[pair][token] += chance
    often = {NO_TOKEN: least_single}
    return {
        pair: {token: total / counts[pair] for token, total in own.items()}
        for pair, own in sums.items()
        if counts[pair] >= often.get(pair[0], least_pair)
    }


@pytest.mark.parametrize(("least_pair", "least_single"), [(1, 1), (3, 30)])
def test_rows_are_the_mean_of_the_laws(least_pair: int, least_single: int) -> None:
    settings = TableSettings(4, least_pair, least_single, 0.25)
    table = count_table(TEXTS, settings)
    expected = brute_force(least_pair, least_single)
    pairs = list(zip(table.firsts.tolist(), table.seconds.tolist(), strict=True))
    assert sorted(pairs) == sorted(expected)
    assert len(pairs) > 4
    for pair, ids, log_shares in zip(pairs, table.ids, table.log_shares, strict=True):
        means = expected[pair]
        best = sorted(means, key=means.__getitem__, reverse=True)[: Trigram.SURVIVORS]
        assert ids.tolist() == best[:4]
        total = sum(means[token] for token in best)
        shares = [math.log(means[token] / total) for token in best[:4]]
        np.testing.assert_allclose(log_shares, shares, atol=2e-3)


def test_chances_are_counted_on_texts_kept_out() -> None:
    """By hand: the rows of the other texts, and whether their guesses came in these."""
    settings = TableSettings(4, 1, 1, 0.25)
    table = count_table(TEXTS, settings)
    blank = TEXTS[0]._replace(top_ids=torch.full_like(TEXTS[0].top_ids, -1))
    others = count_table([blank, blank, *TEXTS[2:]], settings)
    rows = {
        (first, second): ids
        for first, second, ids in zip(
            others.firsts.tolist(), others.seconds.tolist(), others.ids.tolist(), strict=True
        )
    }
    hits = trials = 0
    for own in TEXTS[:2]:
        tokens = own.tokens.tolist()[own.answer_start - 2 :]
        for first, second, following in zip(tokens, tokens[1:], tokens[2:], strict=False):
            if (first, second) in rows:
                trials += len(rows[first, second])
                hits += following in rows[first, second]
    assert trials > 50
    fresh_hits, fresh_trials = Trigram().counts()
    pair = 0  # where the pair itself is known
    assert table.trials[pair].sum() - fresh_trials[pair].sum() == pytest.approx(trials)
    assert table.hits[pair].sum() - fresh_hits[pair].sum() == pytest.approx(hits)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    model = tiny.make_model()
    table = count_table(TEXTS, TableSettings(4, 1, 1, 0.25))
    save_table(tmp_path, model, table, {"least_pair": 1})
    read = load_table(tmp_path, model, tiny.VOCAB)
    order = np.argsort(table.firsts == NO_TOKEN, kind="stable")  # pairs come first
    for name in ("firsts", "seconds", "ids"):
        assert (getattr(read, name) == getattr(table, name)[order]).all()
    np.testing.assert_allclose(read.log_shares, table.log_shares[order], atol=1 / 32 + 1e-2)
    np.testing.assert_allclose(read.hits, table.hits, rtol=1e-6)
    assert json.loads((tmp_path / "config.json").read_text())["least_pair"] == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"ids": torch.full((3, 4), tiny.VOCAB, dtype=torch.int32)}, "not in the vocabulary"),
        ({"ids": torch.zeros(3, 4)}, "'ids' is missing or of another form"),
        ({"pairs": torch.zeros(2, 3, dtype=torch.int32)}, "'pairs' is missing"),
        ({"singles": torch.full((1,), -1, dtype=torch.int32)}, "not in the vocabulary"),
        ({"shares": torch.zeros(3, 3, dtype=torch.uint8)}, "do not fit together"),
        ({"hits": torch.zeros(3, 8, 10)}, "positive counts"),
        ({"trials": torch.ones(2, 8, 10), "hits": torch.ones(2, 8, 10)}, "keeps 8"),
    ],
)
def test_damaged_tables_are_refused(
    tmp_path: Path, spoil: dict[str, torch.Tensor], message: str
) -> None:
    model = tiny.make_model()
    whole = {
        "pairs": torch.zeros(2, 2, dtype=torch.int32),
        "singles": torch.zeros(1, dtype=torch.int32),
        "ids": torch.zeros(3, 4, dtype=torch.int32),
        "shares": torch.zeros(3, 4, dtype=torch.uint8),
        "hits": torch.ones(3, 8, 10),
        "trials": torch.ones(3, 8, 10),
    }
    checkpoint.save_checkpoint(tmp_path, "trigram", model, whole | spoil, {})
    with pytest.raises(StateError, match=message):
        Trigram(weights=tmp_path).attach(TargetInfo(tiny.VOCAB, model=model))


def tables_for(model: Any, folder: Path) -> Path:
    table = count_table(TEXTS, TableSettings(4, 1, 1, 0.25))
    save_table(folder, model, table, {})
    return folder


def test_a_drafter_begins_with_its_table(tmp_path: Path) -> None:
    model = tiny.make_model()
    drafter = Trigram(weights=tables_for(model, tmp_path))
    with pytest.raises(ConfigError, match="hands it the model"):
        drafter.attach(TargetInfo(tiny.VOCAB))
    drafter.attach(TargetInfo(tiny.VOCAB, model=model))
    pair = tuple(TEXTS[0].tokens[10:12].tolist())
    begun = drafter.guesses(*pair)
    assert begun.tokens
    learned = Trigram()
    learned.attach(TargetInfo(tiny.VOCAB))
    drafter.restore(learned.state())
    assert not drafter.guesses(*pair).tokens
    drafter.reset()
    assert drafter.guesses(*pair) == begun
    with pytest.raises(StateError, match="train one for it"):
        drafter.attach(TargetInfo(tiny.VOCAB, model=tiny.make_model(seed=1)))
    with pytest.raises(StateError, match="4 successors a row, this drafter keeps 3"):
        Trigram(num_successors=3, weights=tmp_path).attach(TargetInfo(tiny.VOCAB, model=model))


@pytest.mark.parametrize("sampled", [False, True])
def test_a_table_of_nonsense_changes_no_text(tmp_path: Path, sampled: bool) -> None:
    model = tiny.make_model()
    drafter = Trigram(weights=tables_for(model, tmp_path))
    given: dict[str, Any] = {"max_new_tokens": 30, "do_sample": sampled, "pad_token_id": 0}
    prompts = tiny.padded([tiny.prompt(7), tiny.prompt(15, seed=3)])
    texts = [
        SpeculativeGenerator(model, drafter=own, node_budget=7).generate(**prompts, **given, seed=5)
        for own in (None, drafter)
    ]
    assert torch.equal(*texts)


def test_auto_takes_what_ships_and_hybrid_begins_with_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.make_model()
    tables_for(model, tmp_path / "trigram-tiny")
    monkeypatch.setattr(checkpoint, "files", lambda package: tmp_path)
    pair = TEXTS[0].tokens[10:12].tolist()
    for name, other, known in (
        ("auto", False, True),
        ("auto", True, False),
        ("hybrid", False, False),
    ):
        drafter = build_drafter(name)
        assert isinstance(drafter, Hybrid)
        target = tiny.make_model(seed=1) if other else model
        drafter.attach(TargetInfo(tiny.VOCAB, model=target))
        table = drafter.sources[1]
        assert isinstance(table, Trigram)
        assert bool(table.guesses(*pair).tokens) == known


def test_too_few_texts() -> None:
    with pytest.raises(ConfigError, match="of 3 texts, 0 would be kept out"):
        count_table(TEXTS[:3], TableSettings())
    with pytest.raises(ConfigError, match="num_successors must be 1 to 8, got 9"):
        TableSettings(num_successors=9)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        TableSettings(held_out_share=1.0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_one_command_for_any_target(tmp_path: Path, family: str) -> None:
    model = tiny.make_model(family)
    model.save_pretrained(tmp_path / "model")
    tiny.letters().save_pretrained(tmp_path / "model")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = {
        "--model": tmp_path / "model",
        "--texts": tmp_path / "texts",
        "--num-texts": 24,
        "--answer-tokens": 24,
        "--held-out": 3,
        "--out": tmp_path / "out",
        "--least-pair": 1,
    }
    words = [str(word) for option in options.items() for word in option]
    run(parser.parse_args(["trigram", *words, "--quiet"]))
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("| rows |", "block efficiency", "| no steps |", '"least_pair": 1'):
        assert part in card
    given: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    prompt = tiny.ids(tiny.prompt(9))
    generator = SpeculativeGenerator(
        model, drafter=Trigram(weights=tmp_path / "out"), node_budget=4
    )
    assert torch.equal(generator.generate(prompt, **given), model.generate(prompt, **given))
    assert generator.stats is not None
    assert generator.stats.num_drafted > 0
