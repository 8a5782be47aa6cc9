"""The network of the diffusion drafter: a block of masks that reads the target's layers.

Letters: R rows, T context positions, N blocks of a row, S slots of a block, D the target's width,
L layers, Hq and Hkv heads, F features (the outputs of m layers of the target, one behind another).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


@dataclass(frozen=True, slots=True)
class DiffusionConfig:
    """Sizes and conventions; the names of published files where these have one.

    Attributes:
        target_layer_ids: layers of the target whose outputs are read, 0 the first.
        block_size: slots of a block, the anchor's included.
        sample_from_anchor: slot k predicts the token behind its own position, the anchor's slot
            too (DSpark); otherwise slot k predicts the token at its position, from 1 (DFlash).
        hidden_size: the target's width.
        draft_vocab_size: tokens that can be predicted.
        qk_norm: whether queries and keys are normalised by head.
        markov_rank: of the bias by the previous token; 0 for none.
        confidence: whether there is a head for the chance of acceptance.
        reads_last: whether the context of the token before the anchor is added to every slot.
        mask_token_id: whose embedding is the mask; None where the mask is a vector of its own.
        input_embedding_scale: times the target's embedding.
        output_multiplier: times the logits.
        final_logit_softcapping: c of c tanh(logits / c); None for none.
    """

    target_layer_ids: tuple[int, ...]
    block_size: int
    sample_from_anchor: bool
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    draft_vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    qk_norm: bool = False
    markov_rank: int = 0
    confidence: bool = False
    reads_last: bool = False
    mask_token_id: int | None = None
    input_embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None

    @property
    def num_predicted(self) -> int:
        """Tokens that a block predicts behind its anchor."""
        return self.block_size - (0 if self.sample_from_anchor else 1)

    @property
    def first_slot(self) -> int:
        """The slot that predicts the token right behind the anchor."""
        return 0 if self.sample_from_anchor else 1


class DiffusionNet(nn.Module):
    """What is trained; embedding and head are the target's (`specdec.drafters.target_parts`).

    Features of m layers become one context vector a committed position. Every layer puts keys and
    values of these before those of the block, whose slots see each other in both directions, and
    alone ask. Positions are absolute.

    Source: DFlash (arXiv 2602.06036), whose tensor names these are; the anchor's own prediction,
    the low-rank bias by the previous token and the confidence head are DSpark's (arXiv 2607.05147).
    We differ in the mask, which may be a vector of its own, in the bias, whose table has a row for
    every token of the draft vocabulary and not of the target's, and in an option: slots begin with
    the last context too, EAGLE's pair of state and token (arXiv 2401.15077), so that a network that
    is trained briefly need not first learn to look there.

    Args:
        config: sizes.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(len(config.target_layer_ids) * width, width, bias=False)
        self.hidden_norm = nn.RMSNorm(width, eps)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(width, eps)
        if config.reads_last:
            self.last_context = nn.Linear(width, width, bias=False)
        if config.mask_token_id is None:
            self.mask_embedding = nn.Parameter(torch.zeros(width))
        if config.markov_rank:
            self.markov_head = _MarkovHead(config.draft_vocab_size, config.markov_rank)
        if config.confidence:
            self.confidence_head = _ConfidenceHead(width + config.markov_rank)

    def contexts(self, features: Tensor) -> Tensor:
        """Returns context vectors ``[..., D]`` of features ``[..., F]``."""
        context: Tensor = self.hidden_norm(self.fc(features))
        return context

    def keys_values(self, contexts: Tensor, positions: Tensor) -> Tensor:
        """Returns what the layers keep of contexts, ``[L, 2, ..., Hkv, head_dim]``.

        Args:
            contexts: ``[..., D]``.
            positions: ``[...]`` int64, their places in the text.
        """
        rotation = self._rotation(positions, contexts.dtype)
        kept = [torch.stack(layer.self_attn.keys_values(contexts, rotation)) for layer in self._all]
        return torch.stack(kept)

    def forward(
        self,
        blocks: Tensor,
        positions: Tensor,
        context: Tensor,
        visible: Tensor,
        last: Tensor | None = None,
    ) -> Tensor:
        """Returns ``[R, N, S, D]`` states of the slots, normalised for the head.

        Args:
            blocks: ``[R, N, S, D]`` embeddings: the anchor's, then tokens that are given, or masks.
            positions: ``[R, N, S]`` int64.
            context: ``[L, 2, R, T, Hkv, head_dim]`` of `keys_values`.
            visible: ``[R, N, T]`` bool, the contexts that each block sees.
            last: ``[R, N, D]`` of `contexts`, of the token before each anchor, zeros where it is
                not known; asked for if `reads_last`.
        """
        rotation = self._rotation(positions, blocks.dtype)
        states = blocks
        if last is not None:
            states = states + self.last_context(last).unsqueeze(2)
        for layer, own in zip(self._all, context, strict=True):
            states = layer(states, rotation, own[0], own[1], visible)
        normed: Tensor = self.norm(states)
        return normed

    def bias(self, previous: Tensor) -> Tensor:
        """Returns ``[n, r]``, the factor of the bias behind previous draft tokens ``[n]``.

        A token outside the draft vocabulary, -1, has no bias.
        """
        factor: Tensor = self.markov_head.markov_w1(previous.clamp(min=0))
        return factor * (previous >= 0).unsqueeze(-1)

    def confidence(self, states: Tensor, bias: Tensor | None) -> Tensor:
        """Returns ``[n]`` logits of the chance that the next draft is accepted.

        Args:
            states: ``[n, D]`` of the slots.
            bias: ``[n, r]`` of `bias`; None without a Markov head.
        """
        inputs = states if bias is None else torch.cat([states, bias], dim=-1)
        logits: Tensor = self.confidence_head.proj(inputs)
        return logits.squeeze(-1)

    @property
    def _all(self) -> list[_Layer]:
        return [layer for layer in self.layers if isinstance(layer, _Layer)]

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines ``[..., 1, head_dim]``, the same for every head."""
        half = torch.arange(0, self.config.head_dim, 2, device=positions.device)
        exponents = half.double() / self.config.head_dim
        frequencies = self.config.rope_theta**-exponents
        angles = positions.double().unsqueeze(-1) * frequencies
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(-2)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class _Layer(nn.Module):
    """Attention and a gated feed-forward part, each behind a norm."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(width, eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)
        self.mlp = _GatedMlp(width, config.intermediate_size)

    def forward(
        self,
        states: Tensor,
        rotation: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        visible: Tensor,
    ) -> Tensor:
        normed = self.input_layernorm(states)
        states = states + self.self_attn(normed, rotation, keys, values, visible)
        result: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return result


class _Attention(nn.Module):
    """Slots of a block ask the contexts and each other."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_groups = config.num_attention_heads // config.num_key_value_heads
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def keys_values(self, states: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns keys and values ``[..., Hkv, head_dim]``."""
        keys = self.k_proj(states).unflatten(-1, (-1, self.head_dim))
        if hasattr(self, "k_norm"):
            keys = self.k_norm(keys)
        values = self.v_proj(states).unflatten(-1, (-1, self.head_dim))
        return _rotated(keys, rotation), values

    def forward(
        self,
        states: Tensor,
        rotation: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        visible: Tensor,
    ) -> Tensor:
        blocks, slots = states.shape[1:3]
        queries = self.q_proj(states).unflatten(-1, (-1, self.head_dim))
        if hasattr(self, "q_norm"):
            queries = self.q_norm(queries)
        queries = _rotated(queries, rotation) * self.head_dim**-0.5
        own_keys, own_values = self.keys_values(states, rotation)
        # [R, Hkv, N, S * G, head_dim]: the heads of a group share keys, slots share what they see
        queries = queries.unflatten(3, (-1, self.num_groups)).permute(0, 3, 1, 2, 4, 5)
        queries = queries.flatten(3, 4)
        to_context = queries.flatten(2, 3) @ keys.permute(0, 2, 3, 1)
        to_context = to_context.unflatten(2, (blocks, -1))
        to_context = to_context.masked_fill(~visible[:, None, :, None, :], -torch.inf)
        to_block = queries @ own_keys.permute(0, 3, 1, 4, 2)
        weights = torch.cat([to_context, to_block], dim=-1).softmax(dim=-1)
        of_context, of_block = torch.split(weights, [keys.shape[1], slots], dim=-1)
        mixed: Tensor = of_context.flatten(2, 3) @ values.transpose(1, 2)
        mixed = torch.unflatten(mixed, 2, (blocks, -1))
        mixed = mixed + of_block @ own_values.permute(0, 3, 1, 2, 4)
        mixed = torch.unflatten(mixed, 3, (slots, -1)).permute(0, 2, 3, 1, 4, 5)
        result: Tensor = self.o_proj(mixed.flatten(3))
        return result


class _GatedMlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        result: Tensor = self.down_proj(silu(self.gate_proj(states)) * self.up_proj(states))
        return result


class _MarkovHead(nn.Module):
    """Logits of a token get ``markov_w1[previous] . markov_w2[token]``."""

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, vocab_size, bias=False)


class _ConfidenceHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)


def _rotated(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Returns ``[..., H, head_dim]`` turned by each position's angles; halves are the pairs."""
    cosines, sines = rotation
    first, second = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat([-second, first], dim=-1) * sines
