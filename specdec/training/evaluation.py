"""Block efficiency of a drafter while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from specdec.generator import SpeculativeGenerator
from specdec.stats import Counts
from specdec.types import Drafter


class BlockEfficiency:
    """Measures drafters of one kind, greedily, as chains.

    Args:
        model: the target.
        tokenizer: its tokenizer.
        load: makes a drafter of a folder of weights.
        prompts: ``[1, T]`` ids each.
        num_nodes: the chain's length.
        max_new_tokens: to write behind each prompt.
        progress: whether to show a bar.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        load: Callable[[Path], Drafter],
        prompts: Sequence[Tensor],
        *,
        num_nodes: int = 6,
        max_new_tokens: int = 64,
        progress: bool = True,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._load = load
        self._prompts = prompts
        self._num_nodes = num_nodes
        self._max_new_tokens = max_new_tokens
        self._progress = progress

    def __call__(self, folder: Path) -> dict[str, float]:
        """Returns the figures of the drafter in a folder."""
        generator = SpeculativeGenerator(
            self._model,
            self._tokenizer,
            drafter=self._load(folder),
            policy="chain",
            verifier="match",
            node_budget=self._num_nodes,
        )
        counts = Counts()
        for prompt in tqdm(self._prompts, "evaluation", leave=False, disable=not self._progress):
            generator.generate(
                prompt.to(self._model.device),
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            assert generator.stats is not None
            counts.add(generator.stats.totals)
        return {
            "block_efficiency": counts.block_efficiency,
            "acceptance_rate": counts.acceptance_rate,
        }
