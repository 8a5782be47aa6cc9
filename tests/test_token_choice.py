"""Tokens that C code chooses: those of transformers' processors and keyed noise, or none."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.kernels.decoder_layer import why_not_native
from specdec.kernels.keyed_argmax import keyed_argmax_reference
from specdec.kernels.step_structs import ChoosingStruct
from specdec.kernels.token_choice import (
    RowTree,
    WalksStruct,
    left_tokens,
    sampled_token,
    structure_sizes,
    walked,
)
from specdec.native_rules import sampling
from specdec.random import SeededRandom
from specdec.sampling import Prefix, ProcessedLaw
from specdec.trees.tree import DraftTree
from specdec.verifiers import Coupled
from specdec.warpers import cheaper, joined, truncation_of

pytestmark = pytest.mark.skipif(
    why_not_native() is not None, reason=f"no native code: {why_not_native()}"
)


def row_of(kind: str, width: int, rng: np.random.Generator) -> np.ndarray:
    row = rng.normal(0, 3, width).astype(np.float32)
    if kind == "ties":
        row = np.round(row)
    if kind == "barred":
        row[rng.random(width) < 0.9] = -np.inf
    if kind in ("nan", "inf"):
        row[rng.integers(width)] = float(kind)
    if kind == "none":
        row[:] = -np.inf
    return row


@pytest.mark.parametrize("kind", ["plain", "ties", "barred", "nan", "inf", "none"])
@pytest.mark.parametrize("width", [3, 64, 200, 1000, 5003])
def test_a_choice_is_that_of_processors_and_noise(kind: str, width: int) -> None:
    """For what C code cannot be sure of it chooses nothing."""
    rng = np.random.default_rng(width)
    chosen: list[bool] = []
    of_all: list[bool] = []
    for seed in range(60):
        temperature, top_k = rng.choice([1.0, 0.3, 2.0]), int(rng.choice([0, 1, 20, 64]))
        parts: list[Any] = [] if temperature == 1 else [TemperatureLogitsWarper(float(temperature))]
        parts += [TopKLogitsWarper(top_k)] if top_k else []
        if rng.random() < 0.7:
            parts.append(TopPLogitsWarper(rng.choice([0.5, 0.9, 0.99]), min_tokens_to_keep=2))
        left = truncation_of(joined([cheaper(part) for part in parts]))
        assert left is not None
        # behind the row stands what is no part of it
        around = np.full((1, width + 64), np.nan, np.float32)
        around[0, :width] = row_of(kind, width, rng)
        scores = torch.from_numpy(around)[:, :width]
        expected = scores
        for part in parts:
            expected = part(None, expected)
        for position in range(20):
            own = sampling(left, SeededRandom(seed, 5, 0))
            token = sampled_token(own, scores[0], position)
            chosen.append(token is not None)
            if token is not None:
                assert token == keyed_argmax_reference(expected[0], seed, 5, position)
        assert chosen[-1] or kind != "plain" or left.border is not None
        of_all += [chosen[-1]] if left.border is not None and not top_k else []
    if kind in ("nan", "inf", "none"):
        assert not any(chosen)
    else:
        assert sum(chosen) > (600 if kind == "plain" else 100)
    if kind == "plain" and width > 3:
        assert sum(of_all) > len(of_all) / 2 > 2


def left_of(parts: list[Any], scores: Tensor) -> tuple[list[int] | None, list[int]]:
    """Returns what C code says is left of ``[V]`` scores, and what transformers leaves."""
    left = truncation_of(joined([cheaper(part) for part in parts]))
    assert left is not None
    expected = scores.unsqueeze(0)
    for part in parts:
        expected = part(None, expected)
    kept = torch.nonzero(expected[0] > -torch.inf)[:, 0].tolist()
    return left_tokens(sampling(left, SeededRandom(0, 0, 0)), scores.contiguous()), kept


@pytest.mark.parametrize("top_k", [0, 60], ids=["of_all", "of_top_k"])
@pytest.mark.parametrize("width", [64, 300, 5003, 49152])
def test_a_nucleus_is_handed_over_where_its_border_is_beside_a_sum(width: int, top_k: int) -> None:
    """Within what torch's sums may err by, on either side of one, and further away."""
    rng = np.random.default_rng(width + top_k)
    told = 0
    for _ in range(40):
        scores = torch.from_numpy(rng.normal(0, 4, width).astype(np.float32))
        first = [TopKLogitsWarper(top_k)] if top_k else []
        possible = scores.topk(top_k).values if top_k else scores
        sums = possible.double().sort().values.softmax(-1).cumsum(-1)
        near = float(sums[-int(rng.integers(2, 6))])
        for off in (0, *(10.0 ** -rng.uniform(3, 9, 8) * rng.choice([-1, 1], 8))):
            top_p = min(max(1 - near - off, 1e-6), 1 - 1e-6)
            mine, theirs = left_of([*first, TopPLogitsWarper(top_p)], scores)
            assert mine in (None, theirs)
            told += mine is not None
    assert 10 < told < 40 * 9 / 2


@pytest.mark.parametrize("gap", [0.0, 8.0, 17.0, 95.0])
@pytest.mark.parametrize("kept", [1, 2, 5])
@pytest.mark.parametrize("top_p", [0.0, 0.5, 0.9, 0.999, 0.99999, 0.999999, 1.0])
def test_tokens_of_next_to_no_chance_stay_where_they_must(
    top_p: float, kept: int, gap: float
) -> None:
    """The likeliest one by a gap ahead: what is beside it may be lost to rounding."""
    rng, told = np.random.default_rng(kept), 0
    for width in (3, 20, 64, 287, 1000, 49152):
        for _ in range(5):
            scores = torch.from_numpy(rng.normal(0, 2, width).astype(np.float32))
            scores[int(rng.integers(width))] = scores.max() + gap
            mine, theirs = left_of([TopPLogitsWarper(top_p, min_tokens_to_keep=kept)], scores)
            assert mine in (None, theirs)
            told += mine is not None
    assert told or kept > 1 or top_p not in (0.5, 0.9)


def tree_of(nodes: int, rng: np.random.Generator) -> DraftTree:
    """Returns a tree of the few likeliest tokens, some siblings of which repeat a token."""
    parents = [-1, *(int(rng.integers(node)) for node in range(1, nodes))]
    return DraftTree.from_lists(rng.integers(6, size=nodes).tolist(), parents)


def lists_of(tree: DraftTree) -> tuple[list[int], list[int]]:
    return tree.token_list, tree.parent_list


def test_walks_are_those_of_the_rule() -> None:
    """Rows of several trees at once, one of which C code leaves to others."""
    rng = np.random.default_rng(0)
    parts = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(5), TopPLogitsWarper(0.9)]
    processors = joined([cheaper(part) for part in parts])
    left = truncation_of(processors)
    assert left is not None
    accepted = 0
    for _ in range(40):
        trees = [tree_of(int(rng.integers(1, 24)), rng) for _ in range(5)]
        logits = [
            torch.from_numpy(rng.normal(0, 2, (len(t), 90)).astype(np.float32)) for t in trees
        ]
        for own in logits:
            own[:, :6] += 4
        logits[2][0, 7] = torch.nan
        rows = [SeededRandom(3, row, 0) for row in range(5)]
        found, seconds = walked(
            [sampling(left, row) for row in rows],
            [
                RowTree(*lists_of(tree), own, 10 * place)
                for place, (tree, own) in enumerate(zip(trees, logits, strict=True))
            ],
        )
        assert 0 < seconds < 1
        for place, walk in enumerate(found):
            if place == 2:
                assert walk is None
                continue
            assert walk is not None
            law = ProcessedLaw(
                trees[place],
                logits[place],
                Prefix([1], torch.device("cpu")),
                LogitsProcessorList(processors),
                greedy=False,
                root_position=10 * place,
            )
            path, token = Coupled().verify(trees[place], law, rows[place])
            assert walk.path == path
            assert walk.emitted == [*(trees[place].token_list[node] for node in path), token]
            accepted += len(path)
            if path:  # the walk gets to a node that C code cannot choose at
                logits[place][path[-1], 7] = torch.nan
                row = RowTree(*lists_of(trees[place]), logits[place], 10 * place)
                assert walked([sampling(left, rows[place])], [row])[0] == [None]
    assert accepted > 30


def test_rows_at_once_are_rows_by_themselves() -> None:
    """Whatever threads share them out; of a temperature alone each needs its own room."""
    rng = np.random.default_rng(1)
    torch.set_num_threads(4)
    left = truncation_of([TemperatureLogitsWarper(3.0)])
    assert left is not None
    tree = DraftTree.root_only(1)
    for _ in range(10):
        rows = [
            RowTree(*lists_of(tree), torch.from_numpy(own), 5)
            for own in rng.normal(0, 1, (8, 1, 30000)).astype(np.float32)
        ]
        choosing = [sampling(left, SeededRandom(2, row, 0)) for row in range(8)]
        together, _ = walked(choosing, rows)
        alone = [walked([own], [row])[0][0] for own, row in zip(choosing, rows, strict=True)]
        assert together == alone
        assert None not in together


def test_structures_are_those_of_the_c_code() -> None:
    assert structure_sizes() == [ctypes.sizeof(WalksStruct), ctypes.sizeof(ChoosingStruct)]
