"""Which model something was made for: copies of a model share a hash, other models do not."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

# what a state of the model depends on; names and versions are no part of it
_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
_SAMPLED_ROWS = 64


def fingerprint(model: Any) -> str:
    """Returns 16 hexadecimal digits for the architecture and the embedding of a model.

    A sample of the embedding's rows is hashed at eight bits of mantissa, so that copies in float32,
    float16 and bfloat16 agree wherever rounding does not decide.

    Args:
        model: a HuggingFace causal language model.
    """
    config = model.config.get_text_config(decoder=True)
    facts = {name: getattr(config, name, None) for name in _FIELDS}
    table = model.get_input_embeddings().weight.detach()
    rows = torch.linspace(0, len(table) - 1, min(_SAMPLED_ROWS, len(table))).long()
    sample = table[rows.to(table.device)].float().cpu()
    # coarse steps of the sample's own scale: the rounding of any dtype stays far below one
    steps = (sample.mean(dim=1) / sample.abs().mean().clamp_min(1e-12) * 16).round().to(torch.int16)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(steps.numpy().tobytes())
    return digest.hexdigest()[:16]
