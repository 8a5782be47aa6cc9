"""How the diffusion drafter is trained: blocks of masks at random places of answers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pad_sequence

from specdec.drafters.diffusion import block_inputs
from specdec.drafters.diffusion_checkpoint import save_diffusion
from specdec.drafters.diffusion_model import DiffusionNet
from specdec.drafters.target_parts import TargetParts
from specdec.errors import ConfigError
from specdec.training.block_losses import chain_metrics, compare_laws
from specdec.training.corpus import OwnText
from specdec.training.diffusion_init import feature_scale, new_network, target_layers
from specdec.training.vocabulary import most_written

_NUM_FEATURES = 3  # layers that are read unless they are named
_SORTED_BATCHES = 8  # texts of so many batches are sorted by length, so that little is padding


@dataclass(frozen=True, slots=True)
class DiffusionSettings:
    """What is built, and how it is trained.

    Attributes:
        layers: of the target to read; None for a low, a middle and a high one.
        num_layers: of the drafter.
        block_size: slots, the anchor's included, which predicts too; so many tokens are predicted.
        vocab_size: the target's likeliest tokens that can be drafted; fewer if it has fewer.
        markov_rank: of the bias by the previous token; 0 for none.
        confidence: whether to train a confidence head.
        reads_last: whether slots begin with the context of the token before the anchor too.
        start: "target" begins with the target's last layers where they fit, "random" does not.
        texts_per_batch: texts of a step.
        anchors_per_token: blocks for each token of an answer, an epoch.
        given_share: of the blocks, those whose first tokens are given; for several denoising steps.
        decay: a token k behind the anchor weighs exp(-(k - 1) / decay).
        cross_entropy: its share of the loss; the rest is total variation.
        cross_entropy_fade: share of the run in which cross-entropy goes from the whole of the loss
            to its share: total variation hardly moves a law that is far off.
        seed: of the weights that start at random.
    """

    layers: tuple[int, ...] | None = None
    num_layers: int = 2
    block_size: int = 8
    vocab_size: int = 8192
    markov_rank: int = 64
    confidence: bool = False
    reads_last: bool = True
    start: str = "target"
    texts_per_batch: int = 8
    anchors_per_token: float = 0.25
    given_share: float = 0.0
    decay: float = 3.0
    cross_entropy: float = 0.1
    cross_entropy_fade: float = 0.15
    seed: int = 0


class DiffusionBatch(NamedTuple):
    """Some texts, and the blocks to be guessed in them; R texts of at most T tokens, N blocks.

    Attributes:
        tokens: ``[R, T]`` int64.
        lengths: ``[R]`` int64.
        features: ``[R, T, F]`` float16.
        top_ids: ``[R, T, c]`` int64, the target's likeliest tokens after each, -1 for none.
        top_log_probs: ``[R, T, c]`` float32.
        greedy: ``[R]`` bool, whether a text was written greedily.
        anchors: ``[R, N]`` int64 places of the tokens before the blocks, -1 for no block.
        num_given: ``[R, N]`` int64 tokens behind the anchor that are given.
    """

    tokens: Tensor
    lengths: Tensor
    features: Tensor
    top_ids: Tensor
    top_log_probs: Tensor
    greedy: Tensor
    anchors: Tensor
    num_given: Tensor


class DiffusionRecipe:
    """A `specdec.training.trainer.Recipe`: the network, its batches and its loss.

    Every block is all masks behind its anchor and sees the context before it and nothing of other
    blocks; contexts are computed once a text for all its blocks. The loss compares the slot's law
    with the target's on its likeliest tokens and the rest: a share of cross-entropy, and total
    variation, which is 1 - the chance that a draw is accepted. The Markov bias is given the text's
    own previous token. Tokens outside the draft vocabulary are left out.

    Source: DFlash (arXiv 2602.06036) for anchors, masks and weights; DSpark (arXiv 2607.05147) for
    the loss and the confidence head's aim. We compare with the target's law where DFlash learns the
    token that came.

    Args:
        target: the model whose text it is; on the device to train on.
        texts: its text, for the draft vocabulary and the scale of the features; features of theirs
            are not wanted yet.
        settings: what is built.

    Raises:
        ConfigError: if the settings make no sense.
    """

    kind = "diffusion"

    def __init__(self, target: Any, texts: Sequence[OwnText], settings: DiffusionSettings) -> None:
        if settings.start not in ("target", "random"):
            raise ConfigError(f"start must be 'target' or 'random', got {settings.start!r}")
        if settings.block_size < 2 or settings.texts_per_batch < 1 or not texts:
            raise ConfigError(f"no diffusion drafter can be trained with {settings}")
        config = target.config.get_text_config(decoder=True)
        self.layers = settings.layers or target_layers(config.num_hidden_layers, _NUM_FEATURES)
        self.settings = settings
        self._target = target
        size = target.get_output_embeddings().weight.shape[0]
        self._vocabulary = None
        if settings.vocab_size < size:
            self._vocabulary = most_written(texts, size, settings.vocab_size)
        self._scale = feature_scale(target, texts, self.layers)
        self._net = new_network(
            target,
            self.layers,
            self._vocabulary,
            self._scale,
            num_layers=settings.num_layers,
            block_size=settings.block_size,
            markov_rank=settings.markov_rank,
            confidence=settings.confidence,
            reads_last=settings.reads_last,
            from_target=settings.start == "target",
            seed=settings.seed,
        ).to(target.device)
        sizes = self._net.config
        self._parts = TargetParts(
            target,
            self._vocabulary,
            torch.float32,
            embedding_scale=sizes.input_embedding_scale,
            multiplier=sizes.output_multiplier,
            softcap=sizes.final_logit_softcapping,
        )

    def module(self) -> DiffusionNet:
        """Returns what is trained."""
        return self._net

    def num_batches(self, texts: Sequence[OwnText]) -> int:
        """Returns the batches of an epoch."""
        return -(-len(texts) // self.settings.texts_per_batch)

    def batches(
        self, texts: Sequence[OwnText], generator: torch.Generator
    ) -> Iterator[DiffusionBatch]:
        """Yields the batches of one epoch: new anchors each time.

        Raises:
            ConfigError: if the texts hold features of other layers.
        """
        width, expected = texts[0].features.shape[1], len(self._scale)
        if width != expected:
            raise ConfigError(
                f"the texts hold {width} features a token; layers {list(self.layers)} of this "
                f"{type(self._target).__name__} have {expected}"
            )
        size = self.settings.texts_per_batch
        order = torch.randperm(len(texts), generator=generator).tolist()
        for begin in range(0, len(order), size * _SORTED_BATCHES):
            window = order[begin : begin + size * _SORTED_BATCHES]
            window.sort(key=lambda index: len(texts[index].tokens))
            parts = [window[i : i + size] for i in range(0, len(window), size)]
            for place in torch.randperm(len(parts), generator=generator).tolist():
                yield self._batch([texts[index] for index in parts[place]], generator)

    def loss(self, batch: DiffusionBatch, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Returns the mean loss of a batch, and what to log.

        Args:
            batch: of `batches`.
            progress: of the run, 0 to 1.

        Returns:
            The loss, and numbers for the log: `accept_k`, the mean chance that token k is accepted
            if those before it were; `expected_efficiency`, tokens a pass of a drawn chain, and
            `greedy_efficiency` of a chain at temperature 0, both on the target's own text.
        """
        states, wanted, places = self._states(batch)
        rows = torch.arange(len(batch.tokens), device=places.device).view(-1, 1, 1)
        tokens = self._parts.draft_ids[batch.tokens[rows, places]]
        supervised = wanted & (tokens >= 0)
        before = (rows, places - 1)
        logits = self._parts.logits(states[supervised])
        bias = None
        if self.settings.markov_rank:
            previous = self._parts.draft_ids[batch.tokens[before]]
            bias = self._net.bias(previous[supervised])
            logits = torch.addmm(logits, bias, self._net.markov_head.markov_w2.weight.T)
        top_ids = batch.top_ids[before][supervised]
        compared = compare_laws(
            logits,
            self._parts.draft_ids[top_ids.clamp(min=0)].where(top_ids >= 0, -1),
            batch.top_log_probs[before][supervised],
        )
        fade = self.settings.cross_entropy_fade
        faded = min(progress / fade, 1.0) if fade else 1.0
        share = 1.0 - faded * (1.0 - self.settings.cross_entropy)
        losses = share * compared.cross_entropy + (1 - share) * compared.total_variation
        if self.settings.confidence:
            accepted = 1.0 - compared.total_variation.detach()
            sure = self._net.confidence(states[supervised], bias)
            losses = losses + binary_cross_entropy_with_logits(sure, accepted, reduction="none")
        slots = torch.arange(wanted.shape[-1], device=wanted.device)
        weights = torch.exp(-slots / self.settings.decay).expand_as(wanted)[supervised]
        metrics = chain_metrics(compared, wanted, supervised, batch.greedy)
        return (weights * losses).sum() / weights.sum().clamp_min(1e-9), metrics

    def save(self, folder: Path) -> None:
        """Writes the network as `specdec.drafters.Diffusion` reads it."""
        net = copy.deepcopy(self._net)
        # the scale of the features becomes part of the weights
        net.fc.weight.data *= self._scale
        recipe = asdict(self.settings) | {"layers": list(self.layers)}
        save_diffusion(folder, self._target, net, self._vocabulary, recipe)

    def _states(self, batch: DiffusionBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Returns states ``[R, N, k, D]``, which to supervise, and places in the text."""
        net, sizes = self._net, self._net.config
        device, length = batch.tokens.device, batch.tokens.shape[1]
        context = net.contexts(batch.features.to(self._scale.dtype) * self._scale)
        positions = torch.arange(length, device=device)
        kept = net.keys_values(context, positions.expand(len(context), -1))
        anchors = batch.anchors.clamp(min=0)
        offsets = torch.arange(1, sizes.num_predicted + 1, device=device)
        places = anchors.unsqueeze(-1) + offsets
        inside = (places < batch.lengths.view(-1, 1, 1)) & (batch.anchors >= 0).unsqueeze(-1)
        places = places.clamp(max=length - 1)
        rows = torch.arange(len(context), device=device)
        behind = batch.tokens[rows.view(-1, 1, 1), places]
        shown = offsets <= batch.num_given.unsqueeze(-1)
        blocks = block_inputs(
            net, self._parts, batch.tokens[rows.view(-1, 1), anchors], behind.where(shown, -1)
        )
        slots = torch.arange(sizes.block_size, device=device)
        last = None
        if sizes.reads_last:
            # a text never begins with an answer, so a token stands before every anchor
            last = context[rows.view(-1, 1), (anchors - 1).clamp(min=0)]
        visible = positions < anchors.unsqueeze(-1)
        states = net(blocks, anchors.unsqueeze(-1) + slots, kept, visible, last)
        return states[:, :, sizes.first_slot :], inside & ~shown, places

    def _batch(self, texts: Sequence[OwnText], generator: torch.Generator) -> DiffusionBatch:
        anchors = [self._anchors(text, generator) for text in texts]
        chosen = pad_sequence(anchors, batch_first=True, padding_value=-1)
        shape = chosen.shape
        given = torch.randint(1, self.settings.block_size, shape, generator=generator)
        some = torch.rand(shape, generator=generator) < self.settings.given_share
        return DiffusionBatch(
            pad_sequence([text.tokens for text in texts], batch_first=True),
            torch.tensor([len(text.tokens) for text in texts]),
            pad_sequence([text.features for text in texts], batch_first=True),
            pad_sequence([text.top_ids for text in texts], batch_first=True, padding_value=-1),
            pad_sequence([text.top_log_probs for text in texts], batch_first=True),
            torch.tensor([text.greedy for text in texts]),
            chosen,
            given * some,
        )

    def _anchors(self, text: OwnText, generator: torch.Generator) -> Tensor:
        """Returns places in the answer with a token behind them, each at most once, in order."""
        count = max(len(text.tokens) - 1 - text.answer_start, 1)
        number = min(count, max(1, round(count * self.settings.anchors_per_token)))
        chosen = torch.randperm(count, generator=generator)[:number]
        return text.answer_start + chosen.sort().values


def make(model: Any, texts: Sequence[OwnText], /, **settings: Any) -> DiffusionRecipe:
    """Returns the recipe that the settings ask for.

    Args:
        model: the target.
        texts: its own, with features or without; for the draft vocabulary.
        settings: those of `DiffusionSettings`.

    Raises:
        ConfigError: for settings that make no sense.
    """
    return DiffusionRecipe(model, texts, DiffusionSettings(**settings))
