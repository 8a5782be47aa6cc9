"""Tiny random diffusion drafters for tests: wide weights, so that a slot's law depends on all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from specdec.drafters import Diffusion
from specdec.drafters.diffusion_checkpoint import save_diffusion
from specdec.drafters.diffusion_model import DiffusionConfig, DiffusionNet
from specdec.types import TargetInfo


def tiny_config(target: Any, **overrides: Any) -> DiffusionConfig:
    """Returns the sizes of a small network for a target."""
    theirs = target.config.get_text_config(decoder=True)
    arguments: dict[str, Any] = {
        "target_layer_ids": (0, 1),
        "block_size": 4,
        "sample_from_anchor": True,
        "hidden_size": theirs.hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "draft_vocab_size": theirs.vocab_size,
    }
    return DiffusionConfig(**{**arguments, **overrides})


def tiny_net(target: Any, seed: int = 0, spread: float = 0.4, **overrides: Any) -> DiffusionNet:
    """Returns a random network whose every weight counts."""
    net = DiffusionNet(tiny_config(target, **overrides)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * spread
            # what scales a norm stays near one
            parameter.copy_(1.0 + 0.1 * noise if parameter.ndim == 1 else noise)
    return net


def saved(
    folder: Path,
    target: Any,
    vocabulary: list[int] | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Writes a random network in full precision and returns its folder."""
    ids = None if vocabulary is None else torch.tensor(vocabulary)
    if ids is not None:
        overrides["draft_vocab_size"] = len(ids)
    net = tiny_net(target, seed, **overrides)
    save_diffusion(folder, target, net, ids, {"seed": seed}, dtype=torch.float32)
    return folder


def attached(folder: Path, target: Any, **options: Any) -> Diffusion:
    """Returns a drafter that is ready to be asked."""
    drafter = Diffusion(folder, **options)
    drafter.attach(TargetInfo(target.config.vocab_size, model=target))
    return drafter
