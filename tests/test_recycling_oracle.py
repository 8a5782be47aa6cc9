"""Token recycling as its paper describes it, written anew, against the drafter of this package."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from specdec import SpeculativeGenerator
from specdec.drafters import TokenRecycling
from specdec.trees.static import TOKEN_RECYCLING_80

NEW = 60
K = 8


def paper_steps(model: Any, prompts: list[list[int]]) -> tuple[int, int]:
    """Returns tokens and target calls, the prefill and its token not counted.

    Luo et al. (arXiv 2408.08696): a matrix of ids alone, all zero at first; the fixed tree of 80
    ranks is filled from it; the longest path that the model's argmax agrees with is accepted; the
    eight best ids at every node, accepted or not, overwrite its token's row, the deepest last.
    The prompt teaches nothing, and the matrix outlives it. Every node is a text of its own here:
    no cache, no mask.
    """
    matrix = torch.zeros(tiny.VOCAB, K, dtype=torch.int64)
    paths = sorted(map(tuple, TOKEN_RECYCLING_80), key=lambda path: (len(path), path))
    calls = 0
    for prompt in prompts:
        text = [*prompt, int(model(tiny.ids(prompt)).logits[0, -1].argmax())]
        while len(text) < len(prompt) + 1 + NEW:
            drafts: dict[tuple[int, ...], list[int]] = {(): []}
            for path in paths:
                above = drafts[path[:-1]]
                token = above[-1] if above else text[-1]
                drafts[path] = [*above, int(matrix[token, path[-1]])]
            texts = [[*text, *draft] for draft in drafts.values()]
            width = max(map(len, texts))
            batch = torch.tensor([row + [tiny.PAD] * (width - len(row)) for row in texts])
            ends = torch.tensor([len(row) - 1 for row in texts])
            logits = model(batch).logits[torch.arange(len(texts)), ends]  # later tokens are unseen
            choice = dict(zip(drafts, logits.argmax(-1).tolist(), strict=True))
            agreed = [
                path
                for path, draft in drafts.items()
                if all(choice[path[:i]] == draft[i] for i in range(len(path)))
            ]
            best = max(agreed, key=len)
            matrix_rows = [row[-1] for row in texts]
            for token, ids in zip(matrix_rows, logits.topk(K).indices, strict=True):
                matrix[token] = ids
            text += [*drafts[best], choice[best]]
            calls += 1
    return NEW * len(prompts), calls


@pytest.mark.slow
@torch.no_grad()
def test_block_efficiency_is_not_below_the_papers() -> None:
    """At the paper's 80 nodes: our tree, and the paper's own tree filled from our matrix."""
    model: Any = tiny.make_model("llama")
    prompts = [tiny.prompt(length, seed=length) for length in range(5, 29, 2)]
    tokens, calls = paper_steps(model, prompts)
    for policy in ("best_first", "static"):
        generator = SpeculativeGenerator(
            model, drafter=TokenRecycling(), policy=policy, node_budget=80
        )
        emitted = target_calls = 0
        for prompt in prompts:
            generator.generate(tiny.ids(prompt), max_new_tokens=NEW + 1, do_sample=False)
            emitted += generator.stats.totals.num_emitted
            target_calls += generator.stats.totals.target_calls
        assert emitted == tokens
        assert target_calls <= calls
