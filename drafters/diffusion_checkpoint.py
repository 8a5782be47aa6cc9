"""Weights of diffusion drafters: the toolkit's own folders, and published DFlash ones."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.drafters.checkpoint import load_checkpoint, read_weights, save_checkpoint
from specdec.drafters.diffusion_model import DiffusionConfig, DiffusionNet
from specdec.errors import StateError

_KIND = "diffusion"
_OFFSETS = "d2t"


class LoadedDiffusion(NamedTuple):
    """A network with its weights.

    Attributes:
        net: on the CPU, in float32.
        vocabulary: ``[Vd]`` int64, the target's ids of the draft vocabulary; None for all of them.
        config: sizes and conventions, the network's own.
    """

    net: DiffusionNet
    vocabulary: Tensor | None
    config: DiffusionConfig


def save_diffusion(
    folder: str | os.PathLike[str],
    target: Any,
    net: DiffusionNet,
    vocabulary: Tensor | None,
    recipe: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes a network in DFlash's layout, with the target's fingerprint.

    Beside DFlash's tensors there may be `mask_embedding`, `last_context.weight` and the heads, and
    the draft vocabulary as EAGLE-3 has it: `d2t`, what is to be added to a draft id to get the
    target's.

    Args:
        folder: made if it is not there.
        target: the model it was trained for.
        net: the network.
        vocabulary: ``[Vd]`` int64; None for all of the target's tokens.
        recipe: how it was trained, as JSON holds it.
        dtype: of the weights in the file.
    """
    tensors = {name: tensor.to(dtype) for name, tensor in net.state_dict().items()}
    if vocabulary is not None:
        tensors[_OFFSETS] = vocabulary.cpu() - torch.arange(len(vocabulary))
    config = net.config
    settings = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": config.block_size,
        "sample_from_anchor": config.sample_from_anchor,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "draft_vocab_size": config.draft_vocab_size,
        "dflash_config": {
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.target_layer_ids),
            "input_embedding_scale": config.input_embedding_scale,
            "output_multiplier": config.output_multiplier,
            "final_logit_softcapping": config.final_logit_softcapping,
        },
        "recipe": dict(recipe),
    }
    save_checkpoint(folder, _KIND, target, tensors, settings)


def read_diffusion(folder: str | os.PathLike[str], target: Any) -> LoadedDiffusion:
    """Returns the network in a folder.

    Published DFlash folders name no target: of these the width and the vocabulary are checked.

    Args:
        folder: one of `save_diffusion`, or with the `config.json` and `model.safetensors` of DFlash
            (arXiv 2602.06036) or DSpark (arXiv 2607.05147).
        target: the model it is to draft for.

    Raises:
        StateError: if it is damaged, made for another model, or of a form that is not supported.
    """
    folder = Path(folder)
    config = _own_config(folder)
    if "specdec_drafter" in config:
        tensors, config = load_checkpoint(folder, _KIND, target)
    elif "dflash_config" in config:
        tensors = read_weights(folder / "model.safetensors")
    else:
        raise StateError(
            f"{folder} holds neither a drafter of ours nor a DFlash one: its config.json has no "
            "dflash_config"
        )
    offsets = tensors.pop(_OFFSETS, None)
    tensors.pop("t2d", None)  # says the same as d2t
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise StateError(f"{folder}: {name} holds NaN or infinity; train the drafter again")
    vocabulary = None if offsets is None else offsets + torch.arange(len(offsets))
    sizes = _sizes(folder, config, tensors, target, vocabulary)
    _draft_rows_only(tensors, sizes, vocabulary)
    net = DiffusionNet(sizes)
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(expected.items() ^ found.items())
        raise StateError(
            f"{folder}: its tensors are not those that its config.json asks for; they differ in "
            f"{', '.join(f'{name} {list(shape)}' for name, shape in wrong[:6])}"
        )
    net.load_state_dict(tensors)
    return LoadedDiffusion(net.float(), vocabulary, sizes)


def _own_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StateError(f"{path} is missing: {folder} is no trained drafter") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StateError(f"{path} is damaged: {error}") from error
    return config if isinstance(config, dict) else {}


def _sizes(
    folder: Path,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    target: Any,
    vocabulary: Tensor | None,
) -> DiffusionConfig:
    """Returns the sizes that the settings and the tensors state, checked against the target."""
    theirs = target.config.get_text_config(decoder=True)
    own = config["dflash_config"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise StateError(f"{folder}: rotary positions of type {rope} are not supported")
    if "sliding_attention" in (config.get("layer_types") or []):
        raise StateError(f"{folder}: draft layers with a sliding window are not supported")
    try:
        layers = tuple(own["target_layer_ids"])
        markov = tensors.get("markov_head.markov_w1.weight")
        size = theirs.vocab_size if vocabulary is None else len(vocabulary)
        sizes = DiffusionConfig(
            target_layer_ids=layers,
            block_size=config.get("block_size") or own["block_size"],
            sample_from_anchor=bool(config.get("sample_from_anchor", False)),
            hidden_size=config["hidden_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim")
            or config["hidden_size"] // config["num_attention_heads"],
            intermediate_size=config["intermediate_size"],
            draft_vocab_size=size,
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or config["rope_theta"],
            qk_norm="layers.0.self_attn.q_norm.weight" in tensors,
            markov_rank=0 if markov is None else markov.shape[1],
            confidence="confidence_head.proj.weight" in tensors,
            reads_last="last_context.weight" in tensors,
            mask_token_id=None if "mask_embedding" in tensors else own["mask_token_id"],
            input_embedding_scale=own.get("input_embedding_scale") or 1.0,
            output_multiplier=own.get("output_multiplier") or 1.0,
            final_logit_softcapping=own.get("final_logit_softcapping"),
        )
    except (KeyError, TypeError) as error:
        raise StateError(f"{folder}: its config.json is incomplete: {error}") from error
    if sizes.hidden_size != theirs.hidden_size:
        raise StateError(
            f"{folder} was made for a target of width {sizes.hidden_size}, this "
            f"{type(target).__name__} has {theirs.hidden_size}"
        )
    if max(layers, default=-1) >= theirs.num_hidden_layers or min(layers, default=-1) < 0:
        raise StateError(
            f"{folder} reads the target's layers {list(layers)}; this {type(target).__name__} has "
            f"{theirs.num_hidden_layers}"
        )
    largest = -1 if vocabulary is None else int(vocabulary.max())
    if max(largest, sizes.mask_token_id or 0) >= theirs.vocab_size or (
        vocabulary is not None and int(vocabulary.min()) < 0
    ):
        raise StateError(
            f"{folder} names tokens up to {max(largest, sizes.mask_token_id or 0)}; the target's "
            f"vocabulary has {theirs.vocab_size}: it was made for another tokenizer"
        )
    return sizes


def _draft_rows_only(
    tensors: dict[str, Tensor], sizes: DiffusionConfig, vocabulary: Tensor | None
) -> None:
    """Cuts a Markov table over the target's vocabulary (DSpark) to the draft vocabulary."""
    name = "markov_head.markov_w1.weight"
    if vocabulary is not None and name in tensors and len(tensors[name]) > sizes.draft_vocab_size:
        tensors[name] = tensors[name][vocabulary]
