"""A trained drafter that guesses a block of tokens in one pass from what the target computed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.backend.packed import packed_linears
from specdec.drafters.block_law import BlockDrafter, BlockLaw, Guess
from specdec.drafters.checkpoint import shipped
from specdec.drafters.context_cache import ContextCache
from specdec.drafters.diffusion_checkpoint import read_diffusion
from specdec.drafters.diffusion_model import DiffusionNet
from specdec.drafters.target_parts import TargetParts
from specdec.errors import ConfigError
from specdec.types import DrafterNeeds, PromptRows, StepOutcome, TargetInfo


class Diffusion(BlockDrafter):
    """Drafts with a small diffusion network over the target's own states.

    Outputs of a few target layers at every committed token are the context of a block of masks
    behind the last token; one pass of two layers predicts all of them. With a Markov head the law
    at a node depends on its parent's token, without one on its depth alone.

    Source: DFlash (arXiv 2602.06036); DSpark (arXiv 2607.05147) for the Markov and the confidence
    head; trees over such blocks, DDTree (arXiv 2604.12989). See `DiffusionNet`, and `BlockDrafter`
    for several denoising steps. One step is what published networks are trained for.

    Args:
        weights: a folder that `scripts/train_drafter.py diffusion` wrote, or a published DFlash
            folder; None for the weights that come with the toolkit for the target.
        num_steps: denoising steps a block.
        order: of several steps, "left_to_right" or "confident".
        min_confidence: a slot whose confidence head says less names no token; 0 for none. Without
            such a head only 0 is allowed.
        num_candidates: tokens a row names at most.

    Raises:
        ConfigError: for an argument that makes no sense.
    """

    name = "diffusion"

    def __init__(
        self,
        weights: str | os.PathLike[str] | None = None,
        *,
        num_steps: int = 1,
        order: str = "left_to_right",
        min_confidence: float = 0.0,
        num_candidates: int = 64,
    ) -> None:
        super().__init__(num_steps, order, num_candidates)
        if not 0.0 <= min_confidence < 1.0:
            raise ConfigError(f"min_confidence must be in [0, 1), got {min_confidence}")
        self._weights = None if weights is None else Path(weights)
        self._min_confidence = min_confidence
        self._contexts = ContextCache()
        self._target: Any = None
        self._net: DiffusionNet
        self._parts: TargetParts

    @property
    def num_predicted(self) -> int:
        """Tokens a block predicts."""
        return self._net.config.num_predicted

    def attach(self, target: TargetInfo) -> None:
        """Reads the weights, and takes embedding and head of the target.

        Raises:
            ConfigError: if the model is not known or not the one of an earlier generator, or if no
                weights come with the toolkit for it.
            StateError: if the weights are damaged, or not for this model.
        """
        model = target.model
        if model is None:
            raise ConfigError(
                "diffusion reads the target's layers: give it to a SpeculativeGenerator, which "
                "hands it the model"
            )
        if self._target is model:
            return
        if self._target is not None:
            raise ConfigError("this Diffusion drafts for another model; make one for each model")
        folder = self._weights or shipped(self.name, model)
        table = model.get_input_embeddings().weight
        # half precision is slow on a CPU, and the network is small
        dtype = torch.float32 if table.device.type == "cpu" else table.dtype
        dtype = torch.float64 if table.dtype == torch.float64 else dtype
        loaded = read_diffusion(folder, model)
        config = loaded.config
        if self._min_confidence and not config.confidence:
            raise ConfigError(
                f"min_confidence needs a confidence head, and the weights in {folder} have none"
            )
        self._net = loaded.net.to(table.device, dtype).eval().requires_grad_(False)
        self._parts = TargetParts(
            model,
            loaded.vocabulary,
            dtype,
            embedding_scale=config.input_embedding_scale,
            multiplier=config.output_multiplier,
            softcap=config.final_logit_softcapping,
        )
        self._vocabulary = None if loaded.vocabulary is None else self._parts.vocabulary
        self._reads_previous = config.markov_rank > 0
        self._runner = _Runner(self._net, self._parts)
        self._packed = packed_linears(self._runner)
        self.needs = DrafterNeeds(layers=config.target_layer_ids)
        self._target = model

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        """Begins a row with the features of its prompt, or of the prompt's end."""
        features = None if prompt_rows is None else prompt_rows.features
        known = 0 if features is None else len(features)
        if features is not None:
            self._check_width(features)
        self._contexts.start(row, len(prompt) - known, features)

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        """Notes the features of the root and of the nodes that became text."""
        for outcome in outcomes:
            if outcome.features is None:
                raise ConfigError("diffusion needs the target's features, and the step has none")
            self._check_width(outcome.features)
            kept = [0, *outcome.path][: len(outcome.emitted)]
            self._contexts.note(outcome.row, outcome.features[kept])

    def stop(self, row: int) -> None:
        """Forgets the row."""
        self._contexts.stop(row)

    def reset(self) -> None:
        """Drops all rows; there is nothing learned."""
        self._contexts.clear()

    def _guess(self, laws: Sequence[BlockLaw], given: Tensor) -> list[Guess]:
        """Runs one pass over blocks behind the rows' contexts."""
        rows = list(dict.fromkeys(law.row for law in laws))
        blocks: list[list[int]] = [[] for _ in rows]
        for index, law in enumerate(laws):
            blocks[rows.index(law.row)].append(index)
        with self._packed.active() if self._packed is not None else nullcontext():
            context, own = self._contexts.read(rows, self._runner.keys_values)
            # rows of a batch may have different numbers of blocks: the last one is repeated
            most = max(map(len, blocks))
            order = torch.tensor([some + some[-1:] * (most - len(some)) for some in blocks])
            anchors = torch.tensor([law.text[law.length - 1] for law in laws])
            positions = torch.tensor([law.length - 1 for law in laws])
            device = context.device
            states, logits = self._runner.run(
                anchors[order].to(device),
                given[order].to(device),
                positions[order].to(device),
                context,
                own.unsqueeze(1).expand(-1, most, -1),
                self._last_contexts(rows) if self._net.config.reads_last else None,
            )
        guesses = []
        for law, index in zip(laws, range(len(laws)), strict=True):
            row = rows.index(law.row)
            place = blocks[row].index(index)
            guesses.append(Guess(logits[row, place], states[row, place]))
        return guesses

    def _last_contexts(self, rows: Sequence[int]) -> Tensor:
        """Returns ``[R, D]`` contexts of the tokens before the anchors, zeros where not known."""
        found = dict(enumerate(self._contexts.last(rows)))
        features = {index: feature for index, feature in found.items() if feature is not None}
        weight = self._net.fc.weight
        contexts = weight.new_zeros(len(rows), len(weight))
        if features:
            stacked = torch.stack(list(features.values())).to(weight.dtype)
            contexts[list(features)] = self._net.contexts(stacked)
        return contexts

    def _scores(self, guess: Guess, slots: list[int], previous: list[int]) -> Tensor:
        """Adds the Markov bias, and empties slots that are not sure enough."""
        logits = guess.logits[slots]
        if not self._reads_previous and not self._min_confidence:
            return logits
        bias = None
        if self._reads_previous:
            last = self._parts.draft_ids[torch.tensor(previous, device=logits.device)]
            bias = self._net.bias(last)
            logits = torch.addmm(logits, bias, self._net.markov_head.markov_w2.weight.T)
        if self._min_confidence and guess.states is not None:
            # it looks at the path and not at the token to come, so drawn tokens stay lossless
            sure = self._net.confidence(guess.states[slots], bias).sigmoid()
            logits[sure < self._min_confidence] = -torch.inf
        return logits

    def _check_width(self, features: Tensor) -> None:
        expected = self._net.fc.in_features
        if features.shape[-1] != expected:
            raise ConfigError(
                f"diffusion expected {expected} features a token (layers "
                f"{list(self._net.config.target_layer_ids)} of the target), got "
                f"{features.shape[-1]}"
            )


class _Runner(nn.Module):
    """The network and the head as one module, whose linear layers can be packed."""

    def __init__(self, net: DiffusionNet, parts: TargetParts) -> None:
        super().__init__()
        self.net = net
        self.head = parts.head
        self._parts = parts

    def keys_values(self, features: Tensor, positions: Tensor) -> Tensor:
        """Returns ``[L, 2, n, Hkv, head_dim]`` of features ``[n, F]``."""
        dtype = self.net.fc.weight.dtype
        return self.net.keys_values(self.net.contexts(features.to(dtype)), positions)

    def run(
        self,
        anchors: Tensor,
        given: Tensor,
        positions: Tensor,
        context: Tensor,
        visible: Tensor,
        last: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns states ``[R, N, k, D]`` and logits ``[R, N, k, Vd]`` of the predicted tokens.

        Args:
            anchors: ``[R, N]`` int64 ids of the tokens before the blocks.
            given: ``[R, N, k]`` int64 ids behind them, -1 for masks.
            positions: ``[R, N]`` int64 of the anchors.
            context: ``[L, 2, R, T, Hkv, head_dim]``.
            visible: ``[R, N, T]`` bool.
            last: ``[R, D]`` contexts of the tokens before the anchors, if the network reads them.
        """
        if last is not None:
            last = last.unsqueeze(1).expand(-1, anchors.shape[1], -1)
        config = self.net.config
        blocks = block_inputs(self.net, self._parts, anchors, given)
        offsets = torch.arange(config.block_size, device=anchors.device)
        states = self.net(blocks, positions.unsqueeze(-1) + offsets, context, visible, last)
        states = states[:, :, config.first_slot :]
        return states, self._parts.logits(states)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        """Runs every layer once, as `PackedLinears` asks of a model, to see which share inputs."""
        weight = self.net.fc.weight
        features = weight.new_zeros(1, weight.shape[1])
        context = self.keys_values(features, torch.zeros(1, dtype=torch.int64)).unsqueeze(2)
        given = torch.full((1, 1, self.net.config.num_predicted), -1)
        anchor = input_ids[:1, :1]
        visible = torch.ones(1, 1, 1, dtype=torch.bool)
        last = self.net.contexts(features) if self.net.config.reads_last else None
        return self.run(anchor, given, torch.ones_like(anchor), context, visible, last)[1]


def block_inputs(net: DiffusionNet, parts: TargetParts, anchors: Tensor, given: Tensor) -> Tensor:
    """Returns ``[R, N, S, D]``: the anchors' embeddings, then tokens that are given, or masks.

    Args:
        net: its mask.
        parts: the embedding.
        anchors: ``[R, N]`` int64 ids.
        given: ``[R, N, k]`` int64 ids, -1 for a mask. The last token of a block whose anchor
            predicts has no slot of its own.
    """
    tokens = torch.cat([anchors.unsqueeze(-1), given], dim=-1)[..., : net.config.block_size]
    embedded = parts.embed(tokens.clamp(min=0))
    mask: Tensor
    if net.config.mask_token_id is None:
        mask = net.mask_embedding
    else:
        mask = parts.embed(torch.tensor(net.config.mask_token_id, device=tokens.device))
    return torch.where((tokens >= 0).unsqueeze(-1), embedded, mask)
