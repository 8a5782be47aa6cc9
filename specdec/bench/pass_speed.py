"""Times whole passes of a model over trees: what a node more costs, over lengths of context."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from specdec.backend.cache import TreeCache
from specdec.backend.capture_check import captured_passes
from specdec.backend.captured import WARM_UP_PASSES, CapturedPasses, bucket
from specdec.backend.model import TreeModel
from specdec.backend.probe import probed
from specdec.backend.recorders import Recorder
from specdec.bench.attention_speed import Timing
from specdec.errors import ConfigError
from specdec.kernels.tree_mask import ancestor_matrix

# hidden size, feed-forward size, layers, query heads, KV heads, vocabulary
SHAPES = {
    "llama-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-1b": (2048, 8192, 16, 32, 8, 128256),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "tiny": (64, 128, 2, 4, 2, 256),
}


def random_model(shape: str, dtype: torch.dtype, device: torch.device, max_context: int) -> Any:
    """Returns a llama of random weights; how long a pass takes does not depend on them.

    Args:
        shape: one of `SHAPES`.
        dtype: of the weights.
        device: where they are made.
        max_context: positions that it must have.

    Raises:
        ConfigError: for an unknown shape.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    if shape not in SHAPES:
        raise ConfigError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    hidden, inner, layers, heads, kv_heads, vocab_size = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab_size,
        max_position_embeddings=max_context,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.eval()


@torch.inference_mode()
def time_passes(
    model: Any,
    nodes: Sequence[int],
    contexts: Sequence[int],
    impls: Sequence[str | None],
    *,
    repeats: int,
    captured: bool = False,
    make_recorder: Callable[[], Recorder] | None = None,
) -> dict[tuple[str, int, int], Timing]:
    """Returns the seconds of a pass by attention, context and nodes of the tree, all in turns.

    Args:
        model: any that can take trees.
        nodes: of a tree, the root included; 1 is a step of plain decoding.
        contexts: tokens before the tree.
        impls: of the tree attention; None for the model's own.
        repeats: rounds that count; one more warms up, or as many as recording takes.
        captured: each attention once more, its passes repeated from recordings, the trees padded as
            in a text.
        make_recorder: see `captured_passes`.

    Raises:
        ConfigError: if they are to be captured and there is no GPU.
        UnsupportedModelError: if the model's passes cannot be recorded.
    """
    runs: dict[tuple[str, int, int], Callable[[], float]] = {}
    for impl in impls:
        # packed weights are a CPU's, and their code is in no recording
        backend = probed(model, None if captured else "auto", tree_attention=impl)
        name = "the model's own" if backend.tree_attention is None else backend.tree_attention
        for context in contexts:
            cache = backend.new_cache(1, context + max(nodes))
            for count in nodes:
                runs[name, context, count] = _pass(backend, cache, context, count)
        if captured:
            passes = captured_passes(backend, True, make_recorder)
            assert passes is not None
            cache = passes.new_cache(1, max(contexts) + bucket(max(nodes)))
            for context in contexts:
                for count in nodes:
                    run = _pass(backend, cache, context, count, passes)
                    runs[f"{name}, captured", context, count] = run
    return _timed(runs, repeats, WARM_UP_PASSES if captured else 1)


@torch.inference_mode()
def time_layouts(
    model: Any,
    nodes: Sequence[int],
    contexts: Sequence[int],
    layouts: Sequence[str | None],
    *,
    repeats: int,
) -> dict[tuple[str, int, int], Timing]:
    """Returns the seconds of a pass by layout of the weights, context and nodes, all in turns.

    Args:
        model: of float32 on a CPU.
        nodes: of a tree, the root included; 1 is a step of plain decoding.
        contexts: tokens before the tree.
        layouts: of `packed_weights`; None for the model's own layers.
        repeats: rounds that count; one more warms up.

    Raises:
        ConfigError: for a layout that cannot be had here.
    """
    runs: dict[tuple[str, int, int], Callable[[], float]] = {}
    for layout in layouts:
        backend = probed(model, packed_weights=layout)
        name = "the model's own" if backend.packed is None else ", ".join(backend.packed.formats)
        for context in contexts:
            cache = backend.new_cache(1, context + max(nodes))
            for count in nodes:
                runs[name, context, count] = _pass(backend, cache, context, count)
    return _timed(runs, repeats, 1)


def _timed(
    runs: dict[tuple[str, int, int], Callable[[], float]], repeats: int, warm_up: int
) -> dict[tuple[str, int, int], Timing]:
    """Returns medians and quantiles of runs that are made in turns."""
    seconds: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for repeat in range(repeats + warm_up):
        for key, run in runs.items():
            taken = run()
            if repeat >= warm_up:
                seconds[key].append(taken)
    found = {}
    for key, own in seconds.items():
        low, median, high = np.quantile(own, [0.2, 0.5, 0.8]).tolist()
        found[key] = Timing(median, low, high)
    return found


def _pass(
    backend: TreeModel,
    cache: TreeCache,
    context: int,
    nodes: int,
    captured: CapturedPasses | None = None,
) -> Callable[[], float]:
    size = nodes if captured is None else bucket(nodes)
    parents = [-1, *((n - 1) // 2 for n in range(1, nodes))]
    ancestors = ancestor_matrix(parents, size).unsqueeze(0)
    tokens = torch.zeros(1, size, dtype=torch.int64)
    positions = context + ancestors.sum(-1) - 1

    def run() -> float:
        cache.lengths[:] = [context]  # zeros, which cost what any other keys and values cost
        cache.drop_pending()
        begin = time.perf_counter()
        if captured is not None:
            logits, _ = captured.run(cache, tokens, positions, ancestors)
        else:
            logits = backend.forward(cache, tokens, positions, ancestors if nodes > 1 else None)
        logits[0, 0, 0].item()  # waits for the device
        return time.perf_counter() - begin

    return run
