"""Which models can take trees, read off their configuration before anything is run."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from specdec.backend.attention import GROUPED
from specdec.backend.tree_layers import TREE
from specdec.errors import ConfigError, UnsupportedModelError

# what a model says while a pass of ours is running in another thread, and what is its own
_OURS = {GROUPED: "sdpa"} | {name: own for own, name in TREE.items()}
_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
_SUPPORTED_ATTENTION = ("sdpa", "eager")


class PositionLimit(NamedTuple):
    """Where a model's positions end, or where they begin to mean something else.

    Attributes:
        num_positions: positions 0 .. num_positions - 1 are safe.
        kind: "learned" (a table that is used up), "dynamic" (rotary frequencies that follow the
            longest position of a pass from there on, so a draft node would change the logits of
            the tokens above it), or "longrope" (other frequencies from there on, for the whole
            text).
    """

    num_positions: int
    kind: str

    def for_prompts(self, lengths: Sequence[int], cached: Sequence[int]) -> PositionLimit | None:
        """Returns the limit that holds for rows that begin with `lengths` tokens.

        Args:
            lengths: tokens of each prompt, an earlier turn's cache included.
            cached: how many of them are in that cache.

        Raises:
            ConfigError: if a prompt reaches past what the model can do.
        """
        if max(lengths) <= self.num_positions:
            return self
        if self.kind == "longrope" and min(lengths) > self.num_positions:
            if any(0 < count <= self.num_positions for count in cached):
                raise ConfigError(
                    f"longrope gives a text of more than {self.num_positions} tokens other "
                    "frequencies than past_key_values was made with; leave past_key_values out"
                )
            return None  # the whole text has the long frequencies, and keeps them
        if self.kind == "longrope":
            raise ConfigError(
                f"some prompts of the batch are longer than {self.num_positions} tokens, some are "
                "not: longrope gives them different frequencies; generate them in separate calls"
            )
        raise ConfigError(
            f"a prompt has {max(lengths)} tokens, the model has {self.num_positions} {self.kind} "
            "positions"
        )


class ModelTraits(NamedTuple):
    """What the backend must know of a model.

    Attributes:
        attention: "sdpa" (bool masks) or "eager" (additive masks).
        layer_types: kinds of layers when the model takes one mask for each, else empty.
        window: width of the sliding window, None without one.
        positions: how far positions reach, None where they are open-ended.
        vocab_size: width of the logits' table.
    """

    attention: str
    layer_types: frozenset[str]
    window: int | None
    positions: PositionLimit | None
    vocab_size: int


def read_traits(model: Any) -> ModelTraits:
    """Returns the traits of a HuggingFace causal language model.

    Raises:
        UnsupportedModelError: if the model cannot take trees, with the reason.
    """
    config = model.config.get_text_config(decoder=True)
    family = f"{type(model).__name__} ({config.model_type})"

    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{family} is an encoder-decoder model; only decoder-only models are supported"
        )
    attention = _OURS.get(config._attn_implementation, config._attn_implementation)
    if attention not in _SUPPORTED_ATTENTION:
        raise UnsupportedModelError(
            f"{family} uses attn_implementation={attention!r}, which takes no tree mask; "
            f"load it with attn_implementation='sdpa' or 'eager'"
        )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(
            f"{family} has a recurrent state, which would leak from one branch of a tree into its "
            "siblings"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{family} takes no position_ids (alibi or the like), so siblings of a tree cannot "
            "share a position"
        )
    if getattr(config, "alibi", False):
        raise UnsupportedModelError(
            f"{family} uses alibi, whose distances are read off a plain mask and not off a tree"
        )
    layer_types = frozenset(getattr(config, "layer_types", None) or ())
    unknown = ", ".join(sorted(layer_types - _KNOWN_LAYER_TYPES))
    if unknown:
        raise UnsupportedModelError(
            f"{family} has layers of type {unknown}: either their state would leak from one branch "
            "of a tree into its siblings, or they make a mask of their own"
        )
    if "local" in (getattr(config, "attention_layers", None) or ()):
        raise UnsupportedModelError(
            f"{family} has local attention layers with a mask of their own, which counts the "
            "siblings of a tree as distance; the probe's few tokens would not show it"
        )
    return ModelTraits(
        attention=attention,
        layer_types=layer_types,
        window=_window(config, layer_types),
        positions=_position_limit(model, config),
        vocab_size=config.vocab_size,
    )


def _window(config: Any, layer_types: frozenset[str]) -> int | None:
    if layer_types and "sliding_attention" not in layer_types:
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)


def _position_limit(model: Any, config: Any) -> PositionLimit | None:
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        learned = leaf in ("wpe", "embed_positions", "position_embeddings", "position_embedding")
        if learned and isinstance(module, nn.Embedding) and module.num_embeddings >= limit:
            return PositionLimit(limit, "learned")
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if parameters.get("rope_type") == "dynamic":
            return PositionLimit(limit, "dynamic")
        if parameters.get("rope_type") == "longrope":
            own = getattr(config, "original_max_position_embeddings", None)
            return PositionLimit(
                parameters.get("original_max_position_embeddings") or own or limit, "longrope"
            )
    return None
