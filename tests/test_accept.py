"""Choices and the walk: every implementation, held to the production noise and to each other."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from specdec.kernels.accept import accept_tree
from specdec.random import SeededRandom

pytestmark = pytest.mark.kernels
HAS_TRITON = importlib.util.find_spec("triton") is not None
triton_only = pytest.mark.skipif(not HAS_TRITON, reason="needs the package triton")
IMPLS = ["reference", pytest.param("triton", marks=triton_only)]


def make_trees(batch_size, nodes, vocab_size, seed, dtype=torch.float32):
    """Returns logits, tokens, parents and sizes; rows past a tree are NaN."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch_size, nodes, vocab_size, generator=generator)
    tokens = torch.randint(vocab_size, (batch_size, nodes), generator=generator)
    parents = torch.full((batch_size, nodes), -1, dtype=torch.int32)
    sizes = [max(nodes - 2 * row, 1) for row in range(batch_size)]
    for row, size in enumerate(sizes):
        for node in range(1, size):
            parents[row, node] = int(torch.randint(node, (), generator=generator))
        logits[row, size:] = torch.nan
        parents[row, size:] = 0
    return logits.to(dtype), tokens, parents, torch.tensor(sizes, dtype=torch.int32)


def plant(logits, tokens, parents, sizes, keys, temperature, shares=0.7):
    """Gives some nodes the token that is chosen at their parent, so that walks go deep."""
    generator = torch.Generator().manual_seed(5)
    for row, size in enumerate(sizes.tolist()):
        depths = [0] * size
        for node in range(1, size):
            parent = int(parents[row, node])
            depths[node] = depths[parent] + 1
            if torch.rand((), generator=generator) < shares:
                scores = logits[row, parent].float()
                if keys is None:
                    tokens[row, node] = scores.argmax()
                    continue
                seed, number, position, _ = keys[row].tolist()
                source = SeededRandom(seed, number, stream=1)
                tokens[row, node] = source.gumbel_argmax(
                    scores / temperature, position + depths[parent] + 1
                )


def run(impl, device, logits, tokens, parents, sizes, keys, **kwargs):
    moved = [part.to(device) for part in (logits, tokens, parents, sizes)]
    keys = None if keys is None else keys.to(device)
    accepted = accept_tree(*moved, keys, impl=impl, **kwargs)
    return [part.cpu() for part in accepted]


def some_keys(batch_size):
    # seeds with both words in use, a row number, a position past 16 bits
    seeds = [-(2**63), 2**63 - 1, 12345678901234567, 7, 2**32][:batch_size]
    return torch.tensor([[s, 3 * i, 70_000 + i, 0] for i, s in enumerate(seeds)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_walks_like_the_production_verifier(impl, noisy, dtype, kernel_device):
    """`SeededRandom.gumbel_argmax`, which `coupled` asks, is the judge, node by node."""
    logits, tokens, parents, sizes = make_trees(2, 6, 4103, seed=1, dtype=dtype)
    keys = some_keys(2) if noisy else None
    plant(logits, tokens, parents, sizes, keys, 0.7)
    paths, counts, next_tokens = run(
        impl, kernel_device, logits, tokens, parents, sizes, keys, temperature=0.7
    )
    for row in range(2):
        node, expected, depth = 0, [], 0
        while True:
            scores = logits[row, node].float()
            choice = int(scores.argmax())
            if noisy:
                seed, number, position, _ = keys[row].tolist()
                source = SeededRandom(seed, number, stream=1)
                choice = source.gumbel_argmax(scores / 0.7, position + depth + 1)
            children = [
                child
                for child in range(1, int(sizes[row]))
                if parents[row, child] == node and tokens[row, child] == choice
            ]
            if not children:
                break
            node, depth = children[0], depth + 1
            expected.append(node)
        assert int(next_tokens[row]) == choice
        assert int(counts[row]) == len(expected)
        assert paths[row].tolist() == expected + [-1] * (6 - len(expected))
    assert int(counts.max()) >= 2


@triton_only
@pytest.mark.slow
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(
    ("nodes", "vocab_size"),
    [(1, 1), (7, 5), (1, 50_257), (7, 4096), (7, 4097), (33, 600), (64, 90), (128, 40)],
)
def test_triton_chooses_what_the_reference_does(nodes, vocab_size, noisy, kernel_device):
    trees = make_trees(4, nodes, vocab_size, seed=nodes + vocab_size)
    keys = some_keys(4) if noisy else None
    plant(*trees, keys, 0.9)
    expected = run("reference", torch.device("cpu"), *trees, keys, temperature=0.9)
    output = run("triton", kernel_device, *trees, keys, temperature=0.9)
    assert all(torch.equal(a, b) for a, b in zip(output, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_lowest_id_wins_a_tie(impl, kernel_device):
    """Half precision has many equal logits; torch.argmax takes the first."""
    logits = torch.zeros(2, 1, 9000)
    logits[0, 0, [8191, 77, 4500, 78]] = 2.0
    one = torch.ones(2, 1, dtype=torch.int64)
    parents, sizes = -torch.ones(2, 1, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    _, _, next_tokens = run(impl, kernel_device, logits, one, parents, sizes, None)
    assert next_tokens.tolist() == [77, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_siblings_with_one_token_take_the_first(impl, kernel_device):
    logits = torch.zeros(1, 4, 8)
    logits[0, 0, 5] = logits[0, 2, 6] = logits[0, 3, 7] = 1.0
    tokens = torch.tensor([[1, 4, 5, 5]])
    parents = torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32)
    paths, counts, next_tokens = run(
        impl, kernel_device, logits, tokens, parents, torch.tensor([4], dtype=torch.int32), None
    )
    assert (paths.tolist(), counts.tolist(), next_tokens.tolist()) == ([[2, -1, -1, -1]], [1], [6])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("noisy", [False, True])
def test_nothing_to_choose_is_said(impl, noisy, kernel_device):
    """NaN at one token, minus infinity everywhere; an infinite logit and one left over are fine."""
    logits = torch.full((4, 1, 5000), -torch.inf)
    logits[0, 0] = 0.0
    logits[0, 0, 4999] = torch.nan
    logits[2, 0, 4321] = -5.0
    logits[3, 0] = 0.0
    logits[3, 0, 42] = torch.inf
    one, sizes = torch.ones(4, 1, dtype=torch.int64), torch.ones(4, dtype=torch.int32)
    parents = -torch.ones(4, 1, dtype=torch.int32)
    keys = some_keys(4) if noisy else None
    _, counts, next_tokens = run(impl, kernel_device, logits, one, parents, sizes, keys)
    assert counts.tolist() == [0, 0, 0, 0]
    assert next_tokens.tolist() == [-1, -1, 4321, 42]


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_logits(impl, kernel_device):
    logits, tokens, parents, sizes = make_trees(2, 3, 300, seed=3)
    wide = torch.stack([logits, torch.full_like(logits, torch.nan)], dim=-1).flatten(-2)
    expected = run("reference", torch.device("cpu"), logits, tokens, parents, sizes, some_keys(2))
    output = run(impl, kernel_device, wide[..., ::2], tokens, parents, sizes, some_keys(2))
    assert all(torch.equal(a, b) for a, b in zip(output, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_a_nonce_makes_other_noise(impl, kernel_device):
    logits = torch.zeros(64, 1, 64)
    one, sizes = torch.ones(64, 1, dtype=torch.int64), torch.ones(64, dtype=torch.int32)
    parents = -torch.ones(64, 1, dtype=torch.int32)
    keys = torch.stack([torch.tensor([9, 0, 0, nonce]) for nonce in range(64)])
    next_tokens = run(impl, kernel_device, logits, one, parents, sizes, keys)[2]
    assert len(set(next_tokens.tolist())) > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(1, 2, 3, dtype=torch.int64)}, "floating point; got .* torch.int64"),
        ({"tokens": torch.zeros(1, 3, dtype=torch.int64)}, r"tokens must be \[1, 2\] torch.int64"),
        ({"parents": torch.zeros(1, 2, dtype=torch.int64)}, "int32 on cpu; got .* torch.int64"),
        ({"num_nodes": torch.zeros(2, dtype=torch.int32)}, r"num_nodes must be \[1\]"),
        ({"noise_keys": torch.zeros(1, 3, dtype=torch.int64)}, r"noise_keys must be \[1, 4\]"),
        ({"temperature": 0.0}, "temperature must be positive; got 0.0"),
        ({"impl": "torch"}, "one of .*'reference', 'triton'.* got 'torch'"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {
        "logits": torch.zeros(1, 2, 3),
        "tokens": torch.zeros(1, 2, dtype=torch.int64),
        "parents": torch.tensor([[-1, 0]], dtype=torch.int32),
        "num_nodes": torch.tensor([2], dtype=torch.int32),
    }
    accept_tree(**arguments)
    with pytest.raises(ValueError, match=message):
        accept_tree(**arguments | change)


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr("specdec.kernels.implementations.has_triton", lambda: False)
    trees = make_trees(1, 2, 3, seed=0)
    with pytest.raises(ImportError, match=r"pip install 'specdec-toolkit\[triton\]'"):
        accept_tree(*trees, impl="triton")
    assert (
        accept_tree(*trees).counts.tolist() == accept_tree(*trees, impl="reference").counts.tolist()
    )
