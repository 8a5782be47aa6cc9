"""What a diffusion drafter begins with: the layers it reads, and its first weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specdec.backend.features import FeatureTap, decoder_layers
from specdec.drafters.diffusion_model import DiffusionConfig, DiffusionNet
from specdec.drafters.target_parts import logit_conventions
from specdec.training.corpus import OwnText

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
_SPREAD = 0.02  # of weights that start at random
_SAMPLED_ROWS = 4096
_SAMPLED_TEXTS = 16


def target_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Returns which layers of a target to read, low to high (DFlash, arXiv 2602.06036).

    Args:
        num_layers: of the target; of a shallow one fewer than `count` may come back.
        count: layers wanted.
    """
    if count == 1:
        return (num_layers // 2,)
    chosen = {round(1 + k * (num_layers - 4) / (count - 1)) for k in range(count)}
    return tuple(sorted({min(max(layer, 0), num_layers - 1) for layer in chosen}))


@torch.no_grad()
def feature_scale(target: Any, texts: Sequence[OwnText], layers: Sequence[int]) -> Tensor:
    """Returns ``[F]`` float32: times this, features have a mean square of one.

    The first token of a text is left out; models keep numbers there that are far out of scale.

    Args:
        target: it is run on a few of the texts.
        texts: its own.
        layers: of it to read.
    """
    tap = FeatureTap(target, layers)
    total = torch.zeros((), device=target.device)
    count = 0
    for text in texts[:: max(1, len(texts) // _SAMPLED_TEXTS)]:
        with tap.reading():
            target(input_ids=text.tokens.unsqueeze(0).to(target.device), use_cache=False)
        inner = tap.take()[0, 1:].float()
        total = total + inner.square().sum(dim=0)
        count += len(inner)
    mean = total / max(count, 1)
    # a feature that hardly moves stays small
    return (mean + 1e-2 * mean.median() + 1e-12).rsqrt()


def new_network(
    target: Any,
    layers: tuple[int, ...],
    vocabulary: Tensor | None,
    scale: Tensor,
    *,
    num_layers: int,
    block_size: int,
    markov_rank: int,
    confidence: bool,
    reads_last: bool,
    from_target: bool,
    seed: int,
) -> DiffusionNet:
    """Returns a network of the target's sizes.

    Args:
        target: a HuggingFace causal language model.
        layers: of it to read.
        vocabulary: ``[Vd]`` int64; None for all tokens.
        scale: ``[F]`` float32 of `feature_scale`.
        num_layers: of the network.
        block_size: slots, the anchor's included.
        markov_rank: of the bias; 0 for none.
        confidence: whether there is a confidence head.
        reads_last: see `DiffusionConfig`.
        from_target: whether to begin with copies of the target's last layers, and contexts with the
            highest feature, which these layers then read as in the target; as far as names and
            shapes agree.
        seed: of the weights that start at random.
    """
    theirs = target.config.get_text_config(decoder=True)
    table = target.get_input_embeddings().weight.detach().float()
    used = table if vocabulary is None else table[vocabulary.to(table.device)]
    heads = theirs.num_attention_heads
    rope = getattr(theirs, "rope_parameters", None) or {}
    multiplier, softcap = logit_conventions(target)
    config = DiffusionConfig(
        target_layer_ids=layers,
        block_size=block_size,
        sample_from_anchor=True,
        hidden_size=theirs.hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(theirs, "num_key_value_heads", None) or heads,
        head_dim=getattr(theirs, "head_dim", None) or theirs.hidden_size // heads,
        intermediate_size=getattr(theirs, "intermediate_size", None) or 4 * theirs.hidden_size,
        draft_vocab_size=len(used),
        rope_theta=float(rope.get("rope_theta") or 10000.0),
        qk_norm=hasattr(getattr(decoder_layers(target)[0], "self_attn", None), "q_norm"),
        markov_rank=markov_rank,
        confidence=confidence,
        reads_last=reads_last,
        input_embedding_scale=_embedding_scale(target),
        output_multiplier=multiplier,
        final_logit_softcapping=softcap,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    net = DiffusionNet(config)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=_SPREAD)
    nn.init.normal_(net.mask_embedding, std=_SPREAD)
    torch.random.set_rng_state(state)
    if markov_rank:
        # neighbours in the embedding begin as neighbours; the bias begins at zero
        net.markov_head.markov_w1.weight.data = _components(used.cpu(), markov_rank)
        nn.init.zeros_(net.markov_head.markov_w2.weight)
    if confidence:
        nn.init.zeros_(net.confidence_head.proj.weight)
        nn.init.zeros_(net.confidence_head.proj.bias)
    _copy_final_norm(net, target)
    if from_target:
        _copy_layers(net, target, scale.cpu())
    return net


@torch.no_grad()
def _embedding_scale(target: Any) -> float:
    """Returns what brings embeddings, as the target's own module gives them, to the size of one."""
    module = target.get_input_embeddings()
    ids = torch.arange(min(len(module.weight), _SAMPLED_ROWS), device=module.weight.device)
    return 1.0 / max(float(module(ids).float().square().mean().sqrt()), 1e-6)


def _components(used: Tensor, rank: int) -> Tensor:
    """Returns ``[Vd, rank]``, rows of the embedding along its principal axes, of size one."""
    centred = used - used.mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -rank:]
    rows = centred @ axes
    rows = torch.nn.functional.pad(rows, (0, rank - rows.shape[1]))
    return rows / rows.square().mean().sqrt().clamp_min(1e-9)


def _copy_final_norm(net: DiffusionNet, target: Any) -> None:
    """Begins with the weight of the target's last norm, as it acts on states of size one."""
    for name in _FINAL_NORMS:
        module = getattr(target.base_model, name, None)
        if module is None:
            continue
        weight = module.weight.detach()
        if not isinstance(module, nn.LayerNorm):  # Gemma's weight acts as one more than it is
            with torch.no_grad():
                weight = module(torch.ones_like(weight).view(1, 1, -1)).flatten()
        net.norm.weight.data = weight.float().cpu().clone()


def _copy_layers(net: DiffusionNet, target: Any, scale: Tensor) -> None:
    """Begins with the target's last layers, which read its highest feature in place of states."""
    stack = decoder_layers(target)
    for own, theirs in zip(net.layers, list(stack)[-len(net.layers) :], strict=True):
        known = theirs.state_dict()
        for name, parameter in own.named_parameters():
            if name in known and known[name].shape == parameter.shape:
                parameter.data = known[name].float().cpu().clone()
    width = net.config.hidden_size
    net.fc.weight.data[:, -width:] += torch.diag(1.0 / scale[-width:])
    first = net.layers[0].input_layernorm
    assert isinstance(first, nn.RMSNorm)
    net.hidden_norm.weight.data = first.weight.data.clone()
